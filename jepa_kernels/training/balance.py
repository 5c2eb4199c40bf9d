"""Which process, and which of its parts, takes which images of a batch: in order, or with as much to do for all."""

from __future__ import annotations

import heapq

import numpy as np

from jepa_kernels._core.check import fail
from jepa_kernels.masks import MaskBatch


def costs(masks: MaskBatch) -> np.ndarray:
    """int64 [B]: the tokens of each image in the context encoder and, of every [context | target], in the predictor.

    Tokens alone: attention, whose work grows with their square, is a small share of all work at the published sizes,
    and an image with more tokens has more of both (`python -m benchmarks.balance` measures the two).
    """
    context, target = (x.reshape(-1, masks.batch).sum(0) for x in (masks.context_lengths, masks.target_lengths))
    uses = len(masks.target_lengths) // max(len(masks.context_lengths), 1)
    return context * (1 + uses) + target


def in_order(images: int, parts: int) -> np.ndarray:
    """[parts, images / parts]: the first part has the first images, and so on."""
    return np.arange(images).reshape(parts, -1)


def balanced(costs: np.ndarray, parts: int) -> np.ndarray:
    """[parts, B / parts]: images of each part, as many in all, with sums of costs as equal as a greedy rule makes them.

    Longest processing time first, under a bound on the number: images from the most costly to the least, each to the
    part that has the least so far among those that are not full. O(B log B); a function of the costs alone, ties in
    order, so that every process finds the same. Images of a part are in rising order.
    Source: Graham, Bounds on multiprocessing timing anomalies (SIAM J. Appl. Math. 17, 1969); with as many items in
    each part: Babel, Kellerer, Kotov, The k-partitioning problem (Math. Methods Oper. Res. 47, 1998).
    """
    size, rest = divmod(len(costs), parts)
    if rest:
        fail("balance", "costs", f"be a multiple of {parts} in number", len(costs), "use another number of parts")
    if not size:
        return np.empty((parts, 0), dtype=np.int64)
    found: list[list[int]] = [[] for _ in range(parts)]
    least = [(0, part) for part in range(parts)]  # a heap
    for image in np.argsort(-costs, kind="stable").tolist():
        sum_so_far, part = heapq.heappop(least)
        found[part].append(image)
        if len(found[part]) < size:
            heapq.heappush(least, (sum_so_far + int(costs[image]), part))
    return np.sort(np.array(found), axis=1)
