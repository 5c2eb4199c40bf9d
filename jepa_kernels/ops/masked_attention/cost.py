"""Bytes and FLOPs of `masked_attention`."""

from typing import Any

import torch
from torch import Tensor

from jepa_kernels.cost import Cost, lengths, nbytes, places


def forward(q: Any, k: Any, v: Any, *options: Any) -> Cost:
    """q, k and v read; the output and, in fp32, the log-sum-exps written. Two products over the pairs that are seen."""
    heads, rows, width = _sizes(q)
    moved = 2 * nbytes(q) + nbytes(k, v, _tables(*options)) + 4 * heads * rows
    return Cost(moved, 4 * _pairs(q, k, *options) * heads * width)


def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *options: Any) -> Cost:
    """q, k, v, output and its gradient read, those of q, k and v written. Four products."""
    heads, _, width = _sizes(q)
    moved = nbytes(grad, q, k, v, out, lse, _tables(*options)) + nbytes(q, k, v)
    return Cost(moved, 8 * _pairs(q, k, *options) * heads * width)


def _tables(*options: Any) -> list[Any]:
    """Which keys each query sees, and the turns of queries and keys, which are one table where both share it."""
    return places(*options[7:10])


def _sizes(q: Any) -> tuple[int, int, int]:
    """(heads, queries of all sequences, channels of a head)."""
    if len(q.shape) == 3:
        return q.shape[1], q.shape[0], q.shape[2]
    return q.shape[1], q.shape[0] * q.shape[2], q.shape[3]


def _pairs(
    q: Any, k: Any, cu: Tensor | None, k_cu: Tensor | None, tiles: Any, k_tiles: Any, max_queries: int, max_keys: int,
    frame_size: int, key_ranges: Tensor | None, *options: Any,
) -> int:  # fmt: skip
    """Of a query and a key that it sees."""
    if cu is None or k_cu is None:
        sizes = [(q.shape[2], k.shape[2])] * q.shape[0]
    else:
        sizes = list(zip(lengths(cu), lengths(k_cu), strict=True))
    if not frame_size and key_ranges is None:
        return sum(n * m for n, m in sizes)
    ranges = None if key_ranges is None else key_ranges.reshape(-1, 2).cpu()
    seen, at = 0, 0
    for n, m in sizes:
        place = torch.arange(n) + (m - n)
        end = (place.div(frame_size, rounding_mode="floor") + 1) * frame_size if frame_size else torch.full((n,), m)
        begin = torch.zeros(n, dtype=torch.int64)
        if ranges is not None:
            own = ranges[at : at + n].long()
            begin, end = own[:, 0], torch.minimum(end, own[:, 1])
        seen += int((end.clamp(0, m) - begin.clamp(0, m)).clamp(min=0).sum())
        at += n
    return seen
