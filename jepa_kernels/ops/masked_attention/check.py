"""Argument checks of `masked_attention` and its forms."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import (
    check_number,
    check_packing,
    check_placed,
    check_tensor,
    fail,
    has_values,
    sizes_of,
)
from jepa_kernels._core.select import short
from jepa_kernels.ops.masked_attention.layout import views
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope, width_of

DENSE = sizes_of("B H N D f", "B G M D f", "B G M D f")
PACKED = sizes_of("N H D f", "M G D f", "M G D f", "S+1 int32", "S+1 int32")
STACKED, STACKED_PACKED = sizes_of("B N 3 H D f"), sizes_of("S+1 int32", "T 3 H D f")


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, k_packing: Packing | None) -> None:
    """q, k and v fit each other and their packings."""
    check_packing(op, packing)
    check_packing(op, k_packing, "k_packing")
    if not _usual(q, k, v, packing, k_packing):
        _check_each(op, q, k, v, packing is None)
        if packing is not None:
            _check_rows(op, "packing", "q", q, packing)
            _check_rows(op, "packing" if k_packing is None else "k_packing", "k", k, k_packing or packing)
        if k_packing is not None:
            _check_pair(op, packing, k_packing)


def _usual(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, k_packing: Packing | None) -> bool:
    if packing is None:
        sizes = DENSE(q, k, v)
        if sizes is None or k_packing is not None:
            return False
        _, heads, _, width, key_heads, _ = sizes
    else:
        keys = packing if k_packing is None else k_packing
        sizes = PACKED(q, k, v, packing.cu_seqlens, keys.cu_seqlens)
        if sizes is None or sizes[0] != packing.tokens or sizes[3] != keys.tokens:
            return False
        _, heads, width, _, key_heads, _ = sizes
    return _served(width) and key_heads > 0 and heads % key_heads == 0


def views_of(op: str, qkv: Tensor, packing: Packing | None) -> tuple[Tensor, ...]:
    """q, k and v of one tensor, that fit each other and the packing."""
    check_packing(op, packing)
    _, tokens, heads, width = (STACKED(qkv) if packing is None else STACKED_PACKED(packing.cu_seqlens, qkv)) or (0,) * 4
    if heads > 0 and _served(width) and (packing is None or packing.tokens == tokens):
        return views(qkv)
    check_tensor(op, "qkv", qkv, "T 3 H D" if packing is not None else "B N 3 H D")
    if qkv.shape[-3] != 3:
        fail(op, "qkv", "have 3 as its third last dimension", qkv.shape[-3], "use unflatten(-1, (3, H, D))")
    q, k, v = views(qkv)
    check_qkv(op, q, k, v, packing, None)
    return q, k, v


def _served(width: int) -> bool:
    return 8 <= width <= 128 and width % 8 == 0  # no `in range`: compiled code may have a symbol in its place


def _check_each(op: str, q: Tensor, k: Tensor, v: Tensor, dense: bool) -> None:
    check_tensor(op, "q", q, "B H N D" if dense else "T H D")
    device, dtype, keys = q.device, q.dtype, "B Hk M D" if dense else "Tk Hk D"
    for name, x in (("k", k), ("v", v)):
        check_tensor(op, name, x, keys, device=device)
        if x.dtype != dtype:
            fail(op, name, f"be of dtype {short(dtype)} like q", short(x.dtype), "cast all three alike", TypeError)
    q_shape, k_shape = q.shape, k.shape
    heads, key_heads, width = q_shape[1], k_shape[1], q_shape[-1]
    if not _served(width):
        fail(op, "q", "have a head dim D that is a multiple of 8 in 8..128", width, "pad the heads with zeros")
    if k_shape[-1] != width:
        fail(op, "k", f"have a head dim of {width} like q", k_shape[-1], "project q and k to one width")
    if v.shape != k_shape:
        fail(op, "v", f"have shape {tuple(k_shape)} like k", tuple(v.shape), "pass a value for every key")
    if dense and k_shape[0] != q_shape[0]:
        fail(op, "k", f"hold {q_shape[0]} sequences like q", k_shape[0], "expand it over the batch")
    if heads % key_heads if key_heads else heads:
        fail(op, "k", f"have a number of heads that divides q's {heads}", key_heads, "repeat or drop heads")


def _check_rows(op: str, argument: str, name: str, x: Tensor, packing: Packing) -> None:
    if packing.tokens != x.shape[0]:
        remedy = "pack it with the same lengths" if name == "q" else "pass k_packing where lengths differ"
        fail(op, name, f"hold {packing.tokens} rows like its packing", x.shape[0], remedy)
    check_placed(op, argument, packing, x.device)


def _check_pair(op: str, packing: Packing | None, k_packing: Packing) -> None:
    if packing is None:
        fail(op, "packing", "be given with k_packing", "None", "pass the packing of q", TypeError)
    if k_packing.sequences != packing.sequences:
        fail(op, "k_packing", f"hold {packing.sequences} sequences like packing", k_packing.sequences,
             "give every sequence its keys, or none by a length of 0")  # fmt: skip


def check_options(
    op: str,
    q: Tensor,
    k: Tensor,
    packing: Packing | None,
    k_packing: Packing | None,
    frame_size: int | None,
    key_ranges: Tensor | None,
    rope: Rope | None,
    scale: float | None,
) -> None:
    """What restricts, turns or scales the scores."""
    keys = packing if k_packing is None else k_packing
    if frame_size is not None:
        _check_frames(op, frame_size, k, keys)
    if key_ranges is not None:
        _check_ranges(op, key_ranges, q, k, packing, keys)
    if rope is not None:
        _check_rope(op, rope, q, k, packing is None)
    if scale is not None:
        check_number(op, "scale", scale)
        if not 0 < scale < 3.4e38:
            fail(op, "scale", "be finite and greater than 0 in fp32", scale, "leave it out for D ** -0.5")


def _check_frames(op: str, frame_size: int, k: Tensor, keys: Packing | None) -> None:
    if type(frame_size) is not int and (not isinstance(frame_size, Integral) or isinstance(frame_size, bool)):
        fail(op, "frame_size", "be an int", type(frame_size).__name__, "pass the tokens of one frame", TypeError)
    if frame_size < 1:
        fail(op, "frame_size", "be at least 1", frame_size, "leave it out to see all keys")
    if keys is None:
        count = k.shape[2]
        uneven = count if count % frame_size else None
    elif torch.compiler.is_compiling():  # compiled code never reads the lengths
        return
    else:
        uneven = next((n for n in keys.lengths if n % frame_size), None)
    if uneven is not None:
        fail(op, "frame_size", "divide the number of keys of every sequence", f"{frame_size} and {uneven} keys",
             "give every frame all its tokens")  # fmt: skip


def _check_ranges(
    op: str, key_ranges: Tensor, q: Tensor, k: Tensor, packing: Packing | None, keys: Packing | None
) -> None:
    shape = "T 2" if packing is not None else "B N 2" if getattr(key_ranges, "ndim", 0) == 3 else "N 2"
    check_tensor(op, "key_ranges", key_ranges, shape, dtypes=(torch.int32,), device=q.device)
    wanted = (q.shape[0], 2) if packing is not None else (q.shape[0], q.shape[2], 2)[-key_ranges.ndim :]
    if key_ranges.shape != wanted:
        fail(op, "key_ranges", f"have shape {wanted}", tuple(key_ranges.shape), "pass [begin, end) for every query")
    if not key_ranges.is_contiguous():
        fail(op, "key_ranges", "be contiguous", f"strides {key_ranges.stride()}", "call .contiguous()")
    if not has_values(key_ranges) or not (packing is None or has_values(packing.cu_seqlens)):
        return
    used = key_ranges
    most: Tensor | int = k.shape[2]
    if packing is not None and keys is not None:
        used = key_ranges[: packing.cu_seqlens[-1]]
        most = keys.cu_seqlens.diff()[packing.sequence_of_token()[: len(used)], None]
    outside = (used < 0) | (used > most)
    if outside.any():
        place = tuple(outside.nonzero()[0, :-1].tolist())
        fail(op, "key_ranges", "lie inside the sequence's keys", f"{used[place].tolist()} for query {place[-1]}",
             "count from the sequence's first key")  # fmt: skip


def _check_rope(op: str, rope: Any, q: Tensor, k: Tensor, dense: bool) -> None:
    if not isinstance(rope, Rope):
        fail(op, "rope", "be a Rope", type(rope).__name__, "build one with Rope(positions)", TypeError)
    places = rope.positions if rope.k_positions is None else rope.k_positions
    if width_of(q, k, rope.positions, places) is not None:
        return
    for x, name, positions in ((q, "q", rope.positions), (k, "k", places)):
        tokens = (x.shape[0], x.shape[2])[3 - positions.dim() :] if dense else (x.shape[0],)
        if tuple(positions.shape[:-1]) != tokens:
            fail(op, "rope", f"hold positions for {name}'s tokens {tokens}", tuple(positions.shape[:-1]),
                 "pass a position for every token, k_positions where keys differ")  # fmt: skip
        if positions.device != x.device:
            fail(op, "rope", f"be on {x.device}", positions.device, "build it from positions there")
