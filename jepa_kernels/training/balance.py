"""Which process, and which of its parts, takes which images of a batch: in order, or with as much to do for all."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from jepa_kernels._core.check import fail
from jepa_kernels.masks import MaskBatch
from jepa_kernels.training import flops


def costs(masks: MaskBatch, model: Any) -> np.ndarray:
    """int64 [B]: FLOPs of each image's tokens in the context encoder's blocks and, of every [context | target], in the
    predictor's, in a forward pass; the target encoder has as much to do with every image.

    model: the networks' config, of which the widths, the depths and the encoder's mlp_ratio are read.
    Pairs of tokens matter: with tokens alone 24 clips on each of 64 processes leave V-JEPA 2's ViT-L three times as
    much to wait for (`python -m benchmarks.balance`).
    """
    context, target = (x.reshape(-1, masks.batch) for x in (masks.context_lengths, masks.target_lengths))
    both = np.tile(context, (len(target) // max(len(context), 1), 1)) + target
    encoder = flops.blocks(context.sum(0), (context**2).sum(0), model.embed_dim, model.depth, model.mlp_ratio)
    width, depth = model.predictor_embed_dim, model.predictor_depth
    predictor = flops.blocks(both.sum(0), (both**2).sum(0), width, depth, flops.PREDICTOR_RATIO)
    return np.rint(encoder + predictor).astype(np.int64)


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
