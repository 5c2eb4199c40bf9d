"""Checks of lists of tensors that one call updates in place: all of them pass before the first write."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import DENSE, fail

PLAIN = (Tensor, nn.Parameter)


def tensors(op: str, argument: str, values: Any) -> list[Tensor | None]:
    """The values as a list of plain tensors; a DTensor counts as its local shard, exact for an elementwise update."""
    if not isinstance(values, Iterable) or isinstance(values, (Tensor, str)):
        fail(op, argument, "be a list of tensors", type(values).__name__, "put it into a list", TypeError)
    return [t if t is None or type(t) in PLAIN else _local(op, f"{argument}[{i}]", t) for i, t in enumerate(values)]


def _local(op: str, name: str, t: Any) -> Tensor:
    if not isinstance(t, Tensor):
        fail(op, name, "be a tensor", type(t).__name__, "convert it with torch.as_tensor", TypeError)
    return getattr(t, "_local_tensor", t)


def check_strided(op: str, name: str, t: Tensor) -> None:
    """A strided tensor whose elements fill a stretch of memory, dimensions in any order (channels_last too)."""
    if t.layout is not torch.strided:
        fail(op, name, "be a strided tensor", t.layout, DENSE, TypeError)
    if not is_dense(t):
        fail(op, name, "fill its memory without gaps", f"strides {t.stride()}", "call .contiguous()")


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


def overlap(named: Iterable[tuple[str, Tensor]], read: Sequence[tuple[str, Tensor]] = ()) -> tuple[str, str] | None:
    """Names of two dense tensors that share memory, neither being in `read` or only one: None where no two do."""
    spans = sorted([(*_span(t), True, n) for n, t in named] + [(*_span(t), False, n) for n, t in read])
    written, any_end = ("", 0), ("", 0)
    for begin, end, writes, name in spans:
        if begin == end or begin == 0:  # empty, or without memory (meta)
            continue
        before = any_end if writes else written
        if begin < before[1]:
            return before[0], name
        any_end = max(any_end, (name, end), key=lambda span: span[1])
        if writes:
            written = (name, end)
    return None


def _span(t: Tensor) -> tuple[int, int]:
    begin = t.data_ptr()
    return begin, begin + t.numel() * t.element_size()
