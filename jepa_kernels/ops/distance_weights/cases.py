"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from jepa_kernels._core.case import Case
from jepa_kernels.packing import Packing

Make = Callable[[torch.Generator], dict[str, Any]]
Grid = tuple[int, int, int]


def _split(generator: torch.Generator, grid: Grid, context: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and target ids that share no patch."""
    chosen = torch.randperm(prod(grid), generator=generator)[: context + target]
    return chosen[:context].sort().values, chosen[context:].sort().values


def packed(grid: Grid, contexts: Sequence[int], targets: Sequence[int], rows: int = 0, scale: float = 1.0) -> Make:
    """Sequences of these lengths; `rows` > their sum leaves unused rows at the end of the contexts."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        both = [_split(generator, grid, *lengths) for lengths in zip(contexts, targets, strict=True)]
        ids, packing = Packing.from_ids([context for context, _ in both])
        target_ids, target_packing = Packing.from_ids([target for _, target in both])
        if rows:
            packing = packing.padded(rows, len(contexts), packing.max_seqlen)
            ids = torch.cat([ids, torch.full((rows - len(ids),), 2**40)])  # must never be read
        return dict(
            context_ids=ids,
            target_ids=target_ids,
            grid=grid,
            packing=packing,
            target_packing=target_packing,
            scale=scale,
        )

    return make


def rectangular(grid: Grid, rows: int, context: int, target: int, scale: float = 1.0) -> Make:
    """`rows` rows of as many context and of as many target ids."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        both = [_split(generator, grid, context, target) for _ in range(rows)]
        none = torch.zeros(0, dtype=torch.int64)
        ids = torch.cat([none, *(c for c, _ in both)]).view(rows, context)
        target_ids = torch.cat([none, *(t for _, t in both)]).view(rows, target)
        return dict(context_ids=ids, target_ids=target_ids, grid=grid, scale=scale)

    return make


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return packed((2, 8, 8), [13 + size, 5, 9 + size, 1], [3, 7 + size, 1, 12])(generator)


DIFFERENTIABLE = ()
AUTOCAST = None
CASES = (
    Case("packed_clips", packed((2, 8, 8), [13, 5, 9, 1], [3, 7, 1, 12])),
    Case("rectangular_images", rectangular((1, 14, 14), 3, 33, 70)),
    Case("scaled", rectangular((4, 24, 24), 2, 60, 9, scale=1.5)),
    Case("one_of_each", rectangular((1024, 1, 1024), 2, 1, 1)),
    Case("empty_sequences", packed((1, 4, 4), [3, 0, 4, 0], [0, 5, 2, 0])),
    Case("empty_batch", rectangular((1, 4, 4), 0, 3, 2)),
    Case("no_targets", rectangular((1, 4, 4), 2, 3, 0)),
    Case("unused_rows", packed((2, 4, 4), [2, 3], [4, 4], rows=9)),
)
