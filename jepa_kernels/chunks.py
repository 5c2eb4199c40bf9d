"""Any number of tensors in one launch: what is read of them on each call, and the table of chunks for GPU kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jepa_kernels._core import extension

CHUNK = 1 << 14  # elements; a multiple of 16, so that each chunk is aligned as its tensor is
KEPT = 16  # tables
PLAIN = (Tensor, nn.Parameter)

Lists = Sequence[Sequence[Tensor]]


class Group(NamedTuple):
    """Chunks of tensors whose dtypes are the same: one launch."""

    table: Tensor  # int64 [chunks, lists + 1], on the device: an address per list, then elements
    dtypes: tuple[torch.dtype | None, ...]  # one a list; None where the list has no tensor, and the address is 0


Groups = tuple[Group, ...]
_kept: dict[Any, Groups] = {}  # oldest use first
_captured: list[Groups] = []


def read(lists: Lists, *, plain: bool) -> Any:
    """Where and what these tensors are: equal and hashable while none has new memory, shape, strides or dtype.

    plain: None where one is of another class than Tensor and Parameter, or has no memory (meta tensors).
    """
    module = extension.load()
    if not isinstance(module, str):
        return module.read_lists(lists, plain)
    if plain and any(type(t) not in PLAIN or t.is_meta for tensors in lists for t in tensors):
        return None
    return tuple(tuple(map(look, tensors)) for tensors in lists)


def look(t: Tensor) -> tuple[object, ...]:
    """What `read` knows of one tensor."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.device


def groups(op: str, lists: Lists, known: Any = None) -> Groups:
    """The chunks of a call. Built and copied to the device when lists are seen first; later calls compare addresses.

    lists: the first is never empty, and its tensors are cut. Each other list is empty, or as long; its i-th tensor has
    as many elements as the first list's, or one (all chunks get its address), or none (there is no tensor).
    known: what `read` returned for the lists, where the caller has it.
    A CUDA graph bakes the table's address in: tables used while capturing are kept for the life of the process.
    """
    first = lists[0][0]
    key = read(lists, plain=False) if known is None else known
    capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
    found = _kept.pop(key, None)
    if found is None:
        if capturing:
            raise RuntimeError(
                f"{op}: the first update of a list of tensors must run before graph capture, got new addresses; "
                f"run the step once on the same tensors, then capture it"
            )
        found = build(lists)
    _kept[key] = found
    if capturing:
        _captured.append(found)
    if len(_kept) > KEPT:
        if first.is_cuda:
            torch.cuda.synchronize(first.device)  # another stream may still read the oldest table
        del _kept[next(iter(_kept))]
    return found


def build(lists: Lists) -> Groups:
    """The chunks of these lists, unmemoised: for who holds the tensors, and so knows that the addresses stay."""
    rows: dict[tuple[torch.dtype | None, ...], list[Tensor]] = {}
    for i, cut in enumerate(lists[0]):
        tensors = [_present(list_[i], cut) if list_ else None for list_ in lists]
        dtypes = tuple(None if t is None else t.dtype for t in tensors)
        rows.setdefault(dtypes, []).append(_rows(cut.numel(), tensors))
    # A plain, blocking copy: once per list, and visible to every stream afterwards.
    device = lists[0][0].device
    return tuple(Group(torch.cat(r).to(device), dtypes) for dtypes, r in rows.items())


def _present(t: Tensor, cut: Tensor) -> Tensor | None:
    return None if t.numel() == 0 < cut.numel() else t


def _rows(numel: int, tensors: Sequence[Tensor | None]) -> Tensor:
    start = torch.arange(0, numel, CHUNK)
    columns = [_addresses(t, start) for t in tensors]
    return torch.stack([*columns, (numel - start).clamp(max=CHUNK)], 1)


def _addresses(t: Tensor | None, start: Tensor) -> Tensor:
    if t is None:
        return torch.zeros_like(start)
    return t.data_ptr() + start * (0 if t.numel() == 1 else t.element_size())
