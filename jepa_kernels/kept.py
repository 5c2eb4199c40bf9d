"""Checks of the patches that a call keeps: ids in rows, or packed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from jepa_kernels._core.check import INT64, check_ids, check_packing, check_placed, check_tensor, fail, sizes_of
from jepa_kernels.packing import Packing

ROWS, PACKED = sizes_of("...", "M K int64 contiguous"), sizes_of("...", "S+1 int32", "T int64 contiguous")


def check_kept(op: str, ids: Tensor, packing: Packing | None, images: int, count: int, like: Tensor) -> None:
    """ids int64 [M, K], or [T] with a packing: mask-major rows of `images` images, each id one of `count` patches.

    like: a tensor on the device that they must be on.
    """
    check_packing(op, packing)
    cu_seqlens = None if packing is None else packing.cu_seqlens
    sizes = ROWS(like, ids) if packing is None else PACKED(like, cu_seqlens, ids)
    rows, tokens = sizes or _check_each(op, ids, packing, like.device)
    if packing is not None and packing.tokens != tokens:
        fail(op, "ids", f"hold packing.tokens = {packing.tokens} ids", tokens, "pack ids with the same lengths")
    if rows % images if images else rows:
        name = "ids" if packing is None else "packing"
        fail(op, name, f"hold a multiple of the {images} images", rows, "order rows mask-major: s = mask * B + b")
    check_ids(op, ids, count, cu_seqlens)


def _check_each(op: str, ids: Tensor, packing: Packing | None, device: torch.device) -> Sequence[int]:
    """The number of rows or sequences, and of ids in one of them or all."""
    check_tensor(op, "ids", ids, "M K" if packing is None else "T", dtypes=INT64, device=device)
    if not ids.is_contiguous():
        fail(op, "ids", "be contiguous", f"strides {ids.stride()}", "call .contiguous()")
    if packing is None:
        return ids.shape
    check_placed(op, "packing", packing, device)
    return packing.sequences, ids.shape[0]
