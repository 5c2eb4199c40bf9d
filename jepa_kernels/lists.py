"""Checks of lists of tensors that one call updates in place: all of them pass before the first write."""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from jepa_kernels._core.check import DENSE, PLAIN, fail
from jepa_kernels.chunks import KEPT

Name = TypeVar("Name")  # ordered


class Passed:
    """Lists that passed an op's checks, by what `chunks.read` told of them. The oldest are forgotten."""

    def __init__(self) -> None:
        self._known: dict[Any, None] = {}

    def __contains__(self, known: Any) -> bool:
        return known is not None and known in self._known

    def add(self, known: Any) -> None:
        if known is None:
            return
        self._known[known] = None
        if len(self._known) > KEPT:
            self._known.pop(next(iter(list(self._known))), None)  # of a copy: another thread may add or remove one


def tensors(op: str, argument: str, values: Any) -> list[Tensor | None]:
    """The values as a list of plain tensors; a DTensor counts as its local shard, exact for an elementwise update."""
    if type(values) is not list and (not isinstance(values, Iterable) or isinstance(values, (Tensor, str))):
        fail(op, argument, "be a list of tensors", type(values).__name__, "put it into a list", TypeError)
    return [t if type(t) in PLAIN or t is None else _local(op, f"{argument}[{i}]", t) for i, t in enumerate(values)]


def _local(op: str, name: str, t: Any) -> Tensor:
    if not isinstance(t, Tensor):
        fail(op, name, "be a tensor", type(t).__name__, "convert it with torch.as_tensor", TypeError)
    return local_of(op, name, t)


def local_of(op: str, name: str, t: Tensor) -> Tensor:
    """The shard of a DTensor, when it has arrived; a tensor that holds its elements itself, or is being traced."""
    if hasattr(t, "placements"):
        t = t._local_tensor  # type: ignore[attr-defined]
        t = t.wait() if hasattr(t, "wait") else t  # what a collective still fills
    if type(t) in PLAIN or torch.compiler.is_compiling() or _is_plain(type(t)):
        return t
    fail(op, name, "be a plain tensor or a DTensor of such", type(t).__name__, "convert it to one", TypeError)


def _is_plain(kind: type[Tensor]) -> bool:
    """Another class of tensor that leaves its operations to torch; or one without memory that torch traces with."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or kind.__module__.startswith("torch._subclasses")


def check_strided(op: str, name: str, t: Tensor) -> None:
    """A strided tensor whose elements fill a stretch of memory, dimensions in any order (channels_last too)."""
    if t.layout is not torch.strided:
        fail(op, name, "be a strided tensor", t.layout, DENSE, TypeError)
    if not is_dense(t):
        fail(op, name, "fill its memory without gaps", f"strides {t.stride()}", "call .contiguous()")
    check_stored(op, name, t)


def check_stored(op: str, name: str, t: Tensor) -> None:
    """The tensor's storage still holds all of its elements, as they are: kernels are given the address alone."""
    if torch.compiler.is_compiling():
        return
    check_held(op, name, t)
    if t.is_neg():
        fail(op, name, "be stored as it reads", "a tensor with the negative bit", "call .resolve_neg()", TypeError)


def check_held(op: str, name: str, t: Tensor) -> None:
    """The storage of a strided tensor still reaches to its last element: torch's own copies do not look."""
    size, reach = t.element_size(), t.numel()
    if not t.is_contiguous():
        reach = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
    needed, held = reach * size, t.untyped_storage().nbytes() - t.storage_offset() * size
    if held < needed and reach:
        fail(op, name, f"hold its {needed} bytes", f"a storage with {max(held, 0)}", "do not free or shrink it")


def is_dense(t: Tensor) -> bool:
    """Every element of a stretch of memory belongs to the tensor, once."""
    if t.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != filled:
            return False
        filled *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, and elements in the same order in memory (both are dense)."""
    return a.shape == b.shape and ((a.is_contiguous() and b.is_contiguous()) or a.stride() == b.stride())


def overlap(
    written: Iterable[tuple[Name, Tensor]], read: Iterable[tuple[Name, Tensor]] = ()
) -> tuple[Name, Name] | None:
    """Names of two dense tensors in one place of memory, at least one of them written; None where there are none."""
    spans = sorted([(*_span(t), True, n) for n, t in written] + [(*_span(t), False, n) for n, t in read])
    last: tuple[int, Any] = (0, None)  # where the memory of all before ends, and whose it is
    last_written = last
    for begin, end, writes, name in spans:
        if begin == end or begin == 0:  # empty, or without memory (meta)
            continue
        reached, other = last if writes else last_written
        if begin < reached:
            return other, name
        if end > last[0]:
            last = end, name
        if writes:
            last_written = end, name
    return None


def _span(t: Tensor) -> tuple[int, int]:
    begin = t.data_ptr()
    return begin, begin + t.numel() * t.element_size()


def observed() -> bool:
    """Somebody watches torch's calls: a dispatch mode (fake tensors, tracing, counting) or the profiler.

    An op of long lists that nobody watches may pass its kernel by the dispatcher, which takes a third of a microsecond
    for each tensor.
    """
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()
