"""Public face of `distance_weights`."""

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import (
    INT64,
    check_ids,
    check_number,
    check_packing,
    check_placed,
    check_tensor,
    fail,
    sizes_of,
)
from jepa_kernels._core.define import define
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.ops.distance_weights import reference
from jepa_kernels.packing import Packing

OP = "distance_weights"

WEIGHTS = (torch.float32,)
KERNELS = (Kernel("triton", WEIGHTS), Kernel("cpu", WEIGHTS))

MAX_SIDE = 1024  # squared distances are whole fp32 numbers
GRID, ONE_FRAME = f"be (Gt, Gh, Gw), each 1 to {MAX_SIDE}", "an image has one frame: (1, Gh, Gw)"


def distance_weights(
    context_ids: Tensor,
    target_ids: Tensor,
    grid: tuple[int, int, int],
    *,
    packing: Packing | None = None,
    target_packing: Packing | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Weigh each context token by how near the nearest target token of its sequence lies, for a loss on the context.

    w = 1 / sqrt(d / scale), d = min over the targets of the euclidean distance in (t, h, w), in patches

    context_ids: int64 [M, K], increasing within each row, or packed [T] with packing; patch (t, h, w) of the grid is
        n = (t * Gh + h) * Gw + w.
    target_ids: int64 [M, L], increasing within each row, or packed with target_packing: row or sequence s
        belongs to the contexts of s, so a context that several masks share stands there once a mask.
    grid: (Gt, Gh, Gw), each 1 to 1024.
    packing, target_packing: both or none, of as many sequences.
    scale: > 0, the distance whose weight is 1. Published: 1, or Gh // 16 for larger crops.

    Returns fp32 [M, K] or [T], a `weight` of `latent_loss`. Squared distances are exact whole numbers. A sequence
    without targets and rows past the last sequence: 0. A token that is itself a target, which published masks rule
    out: infinity. No gradient.
    Raises ValueError and TypeError for arguments that do not fit.
    Source: V-JEPA 2.1 (arXiv:2603.14482), the dense loss.
    """
    _check(context_ids, target_ids, packing, target_packing)
    _check_options(grid, scale)
    frames, height, width = grid = (int(grid[0]), int(grid[1]), int(grid[2]))
    own = None if packing is None else packing.cu_seqlens
    other = None if target_packing is None else target_packing.cu_seqlens
    check_ids(OP, context_ids, frames * height * width, own, "context_ids")
    check_ids(OP, target_ids, frames * height * width, other, "target_ids")
    backend = select(OP, KERNELS, backend, context_ids, dtype=torch.float32)
    if backend == "reference":
        named = dict(packing=packing, target_packing=target_packing)
        return reference.forward(context_ids, target_ids, grid, **named, scale=scale)
    return _forward(context_ids, target_ids, own, other, *grid, scale, backend)


DENSE = sizes_of("M K int64 contiguous", "M L int64 contiguous")
PACKED = sizes_of("T int64 contiguous", "L int64 contiguous", "S+1 int32", "S+1 int32")


def _check(context_ids: Tensor, target_ids: Tensor, packing: Packing | None, target_packing: Packing | None) -> None:
    check_packing(OP, packing)
    check_packing(OP, target_packing, "target_packing")
    if packing is None or target_packing is None:
        usual = packing is target_packing and DENSE(context_ids, target_ids) is not None
    else:
        sizes = PACKED(context_ids, target_ids, packing.cu_seqlens, target_packing.cu_seqlens)
        usual = sizes is not None and sizes[:2] == (packing.tokens, target_packing.tokens)
    if not usual:
        _check_ids_each(context_ids, target_ids)
        _check_sequences(context_ids, target_ids, packing, target_packing)


def _check_ids_each(context_ids: Tensor, target_ids: Tensor) -> None:
    for name, ids in (("context_ids", context_ids), ("target_ids", target_ids)):
        shape = "T" if isinstance(ids, Tensor) and ids.dim() == 1 else "M K"
        check_tensor(OP, name, ids, shape, dtypes=INT64, device=getattr(context_ids, "device", None))
        if not ids.is_contiguous():
            fail(OP, name, "be contiguous", f"strides {ids.stride()}", "call .contiguous()")


def _check_options(grid: Any, scale: float) -> None:
    if not isinstance(grid, (tuple, list)):
        fail(OP, "grid", GRID, type(grid).__name__, ONE_FRAME, TypeError)
    if len(grid) != 3 or not (_is_side(grid[0]) and _is_side(grid[1]) and _is_side(grid[2])):
        fail(OP, "grid", GRID, grid, ONE_FRAME)
    check_number(OP, "scale", scale)
    if not 0 < scale < math.inf:
        fail(OP, "scale", "be greater than 0 and finite", scale, "leave it out for distances in patches")


def _is_side(n: Any) -> bool:
    if type(n) is int:
        return 1 <= n <= MAX_SIDE
    return isinstance(n, Integral) and not isinstance(n, bool) and 1 <= int(n) <= MAX_SIDE


def _check_sequences(
    context_ids: Tensor, target_ids: Tensor, packing: Packing | None, target_packing: Packing | None
) -> None:
    sequences = []
    named = (("packing", context_ids, packing), ("target_packing", target_ids, target_packing))
    for (name, ids, p), other in zip(named, ("target_packing", "packing"), strict=True):
        ids_name = "context_ids" if name == "packing" else "target_ids"
        if p is None and ids.dim() == 1:
            fail(
                OP, name, f"be given with {ids_name} [T]", "None", f"pass it, or rows [M, K] without {other}", TypeError
            )
        if p is None:
            sequences.append(ids.shape[0])
            continue
        if ids.dim() != 1 or p.tokens != len(ids):
            actual, remedy = tuple(ids.shape), "pack ids with the same lengths"
            fail(OP, ids_name, f"have shape ({p.tokens},) like {name}.tokens", actual, remedy)
        check_placed(OP, name, p, ids.device)
        sequences.append(p.sequences)
    if (packing is None) != (target_packing is None):
        missing = "packing" if packing is None else "target_packing"
        fail(OP, missing, "be given with the other packing", "None", "pass both or none", TypeError)
    if sequences[0] != sequences[1]:
        remedy = "a context that several masks share stands there once a mask"
        fail(OP, "target_ids", f"hold {sequences[0]} sequences like context_ids", sequences[1], remedy)


def _fake(context_ids: Tensor, *rest: Any) -> Tensor:
    return context_ids.new_empty(context_ids.shape, dtype=torch.float32)


_forward = define(
    OP,
    "forward",
    "(Tensor context_ids, Tensor target_ids, Tensor? cu_seqlens, Tensor? target_cu_seqlens, SymInt frames,"
    " SymInt height, SymInt width, float scale, str backend) -> Tensor",
    _fake,
)
