"""What calls of ops move and compute at least, for rooflines. Each op states it in its `cost.py`.

A function there is named after a stage of the op's torch schemas and takes its arguments, but for the backend. Bytes:
every input that is needed read once, every output written once; what several sequences share counts once. FLOPs: the
sums and products of the op's equation and of its gradient, each done once, a multiply-add being two; what a kernel
computes again does not count, as what it reads again does not. Ops that are products of matrices count these alone.
Formulas look at shapes, strides and dtypes of floating tensors alone, and at the values of whole numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any, NamedTuple

from torch import Tensor


class Cost(NamedTuple):
    bytes: float
    flops: float


def elements(*tensors: Any) -> int:
    """Numbers that the tensors, or lists of them, have in memory: a dimension that is expanded counts once."""
    return sum(
        prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
        if hasattr(t, "shape")
        else elements(*t)
        for t in tensors
        if t is not None
    )


def nbytes(*tensors: Any) -> int:
    """The bytes of these numbers; None has none."""
    return sum(elements(t) * t.dtype.itemsize if hasattr(t, "shape") else nbytes(*t) for t in tensors if t is not None)


def places(*tensors: Any) -> list[Any]:
    """Of tensors that are in the same place in memory one; None is in none."""
    return list({(t.data_ptr(), t.shape, t.stride(), t.dtype): t for t in tensors if t is not None}.values())


def lengths(cu_seqlens: Tensor) -> list[int]:
    """Of the sequences of a packing."""
    return cu_seqlens.diff().tolist()


def distinct(ids: Tensor, cu_seqlens: Tensor | None, images: int) -> int:
    """How many tokens `ids` name, [M, K] or packed: a token that several masks name counts once."""
    rows = [len(row) for row in ids] if cu_seqlens is None else lengths(cu_seqlens)
    image = (int(s % images) for s in range(len(rows)))
    seen: dict[int, set[int]] = {}
    flat, at = ids.reshape(-1).tolist(), 0
    for b, n in zip(image, rows, strict=True):
        seen.setdefault(b, set()).update(flat[at : at + n])
        at += n
    return sum(map(len, seen.values()))


def total(costs: Iterable[Cost]) -> Cost:
    """Of several calls."""
    found = list(costs)
    return Cost(sum(c.bytes for c in found), sum(c.flops for c in found))
