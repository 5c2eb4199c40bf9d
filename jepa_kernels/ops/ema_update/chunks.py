"""The table that the GPU kernels read: tensors cut into chunks, so that one launch updates them all."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 14  # elements; a multiple of 16, so that each chunk is aligned as its tensor is
KEPT = 16  # tables


class Group(NamedTuple):
    """Chunks of tensors of one pair of dtypes: one launch."""

    table: Tensor  # int64 [chunks, 4], on the device: addresses of target, online and shadow (or 0), elements
    online: torch.dtype
    shadow: torch.dtype | None


Groups = tuple[Group, ...]
_kept: dict[tuple[object, ...], Groups] = {}  # oldest use first
_captured: list[Groups] = []


def groups(target: Sequence[Tensor], online: Sequence[Tensor], shadow: Sequence[Tensor]) -> Groups:
    """The chunks of a call. Built and copied to the device when a list is seen first; later calls compare addresses.

    A CUDA graph bakes the table's address in: tables used while capturing are kept for the life of the process.
    """
    key = tuple(
        [x for t, o in zip(target, online, strict=True) for x in (t.data_ptr(), t.numel(), o.data_ptr(), o.dtype)]
        + [x for s in shadow for x in (s.data_ptr(), s.dtype)]
    )
    capturing = target[0].is_cuda and torch.cuda.is_current_stream_capturing()
    found = _kept.pop(key, None)
    if found is None:
        if capturing:
            raise RuntimeError(
                "ema_update: the first update of a list of tensors must run before graph capture, got new addresses; "
                "run the step once on the same tensors, then capture it"
            )
        found = _build(target, online, shadow)
    _kept[key] = found
    if capturing:
        _captured.append(found)
    if len(_kept) > KEPT:
        if target[0].is_cuda:
            torch.cuda.synchronize(target[0].device)  # another stream may still read the oldest table
        del _kept[next(iter(_kept))]
    return found


def _build(target: Sequence[Tensor], online: Sequence[Tensor], shadow: Sequence[Tensor]) -> Groups:
    rows: dict[tuple[torch.dtype, torch.dtype | None], list[Tensor]] = {}
    for i, (t, o) in enumerate(zip(target, online, strict=True)):
        s = shadow[i] if shadow else None
        rows.setdefault((o.dtype, None if s is None else s.dtype), []).append(_rows(t, o, s))
    # A plain, blocking copy: once per list, and visible to every stream afterwards.
    return tuple(Group(torch.cat(r).to(target[0].device), *dtypes) for dtypes, r in rows.items())


def _rows(target: Tensor, online: Tensor, shadow: Tensor | None) -> Tensor:
    start = torch.arange(0, target.numel(), CHUNK)
    columns = [t.data_ptr() + start * t.element_size() for t in (target, online)]
    columns.append(torch.zeros_like(start) if shadow is None else shadow.data_ptr() + start * shadow.element_size())
    return torch.stack([*columns, (target.numel() - start).clamp(max=CHUNK)], 1)
