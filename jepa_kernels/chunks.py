"""Any number of tensors in one launch: what is read of them on each call, and the table of chunks for GPU kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels._core.check import PLAIN

CHUNK = 1 << 14  # elements; a multiple of 16, so that each chunk is aligned as its tensor is
KEPT = 16  # tables

Lists = Sequence[Sequence[Tensor]]


class Group(NamedTuple):
    """Chunks of tensors whose dtypes are the same: one launch."""

    table: Tensor  # int64 [chunks, lists + 1], on the device: an address per list, then elements
    dtypes: tuple[torch.dtype | None, ...]  # one a list; None where the list has no tensor, and the address is 0


Groups = tuple[Group, ...]
_kept: dict[Any, Groups] = {}  # by stream (0: any) and what was read of the lists; oldest use first
_passing: dict[Any, Groups] = {}  # of changing lists
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


def unchanged(known: Any, lists: Lists) -> bool:
    """Whether `read(lists, plain=True)` would tell the same again, at less cost."""
    return read(lists, plain=True) == known if isinstance(known, tuple) else known.holds(lists)


def look(t: Tensor) -> tuple[object, ...]:
    """What `read` knows of one tensor."""
    return t.data_ptr(), t.shape, t.stride(), t.dtype, t.device


def groups(op: str, lists: Lists, known: Any = None, *, changing: bool = False) -> Groups:
    """The chunks of a call. Built and copied to the device when lists are seen first; later calls compare addresses.

    lists: the first is never empty, and its tensors are cut. Each other list is empty, or as long; its i-th tensor has
    as many elements as the first list's, or one (all chunks get its address), or none (there is no tensor).
    known: what `read` returned for the lists, where the caller has it.
    changing: lists that may lie elsewhere at the next call, as gradients do. Their tables belong to the current stream,
    and nothing waits for the device.
    A CUDA graph bakes the table's address in: tables used while capturing are kept for the life of the process.
    """
    first = lists[0][0]
    known = read(lists, plain=False) if known is None else known
    kept = _passing if changing else _kept
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return _captured_groups(op, known, kept)
    stream = torch.cuda.current_stream(first.device).cuda_stream if first.is_cuda and changing else 0
    found = kept.pop((stream, known), None) or build(lists, wait=not changing)
    kept[stream, known] = found
    if len(kept) > KEPT:
        if first.is_cuda and not changing:
            torch.cuda.synchronize(first.device)  # another stream may still read the oldest table
        kept.pop(next(iter(list(kept))), None)  # of a whole copy: another thread may add or remove one
    return found


def _captured_groups(op: str, known: Any, kept: dict[Any, Groups]) -> Groups:
    """The tables of an earlier step, on any stream: what captures waits for the device, or for that step, to begin."""
    for (_, before), found in list(kept.items()):
        if before == known:
            _captured.append(found)
            return found
    raise RuntimeError(
        f"{op}: the first update of a list of tensors must run before graph capture, got new addresses; "
        f"run the step once on the same tensors, then capture it"
    )


def build(lists: Lists, *, wait: bool = True) -> Groups:
    """The chunks of these lists, unmemoised: for who holds the tensors, and so knows that the addresses stay.

    wait: until the tables are on the device, visible to every stream; else they are for the current stream alone.
    """
    alike: dict[tuple[torch.dtype | None, ...], list[list[Tensor | None]]] = {}
    for i, cut in enumerate(lists[0]):
        row = [_present(tensors[i], cut) if tensors else None for tensors in lists]
        alike.setdefault(tuple([None if t is None else t.dtype for t in row]), []).append(row)
    device = lists[0][0].device
    tables = {dtypes: _table(rows) for dtypes, rows in alike.items()}
    if device.type == "cuda" and not wait:
        return tuple(Group(t.pin_memory().to(device, non_blocking=True), dtypes) for dtypes, t in tables.items())
    return tuple(Group(t.to(device), dtypes) for dtypes, t in tables.items())


def _present(t: Tensor, cut: Tensor) -> Tensor | None:
    return None if t.numel() == 0 < cut.numel() else t


def _table(rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
    host: dict[str, Any] = dict(device="cpu")  # whatever torch.set_default_device names
    numel = torch.tensor([row[0].numel() for row in rows], **host)  # type: ignore[union-attr]
    address = torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in rows], **host)
    size = torch.tensor([[0 if t is None or t.numel() == 1 else t.element_size() for t in row] for row in rows], **host)
    count = (numel + CHUNK - 1) // CHUNK
    of = torch.arange(len(rows), **host).repeat_interleave(count)  # the row of each chunk
    start = (torch.arange(len(of), **host) - (count.cumsum(0) - count)[of]) * CHUNK
    left = (numel[of] - start).clamp(max=CHUNK)
    return torch.cat([address[of] + start[:, None] * size[of], left[:, None]], 1)
