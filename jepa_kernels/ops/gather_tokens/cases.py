"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jepa_kernels._core.case import Case
from jepa_kernels.packing import Packing

Make = Callable[[torch.Generator], dict[str, Any]]


def _ids(generator: torch.Generator, count: int, kept: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator)[:kept].sort().values


def _x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def packed(batch: int, count: int, channels: int, lengths: Sequence[int], rows: int = 0) -> Make:
    """`lengths` of masks * batch sequences; `rows` > their sum leaves unused rows at the end."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        ids, packing = Packing.from_ids([_ids(generator, count, n) for n in lengths])
        if rows:
            packing = packing.padded(rows, len(lengths), packing.max_seqlen)
            ids = torch.cat([ids, torch.full((rows - len(ids),), 2**40)])  # must never be read
        return dict(x=_x(generator, batch, count, channels), ids=ids, packing=packing)

    return make


def rectangular(batch: int, count: int, channels: int, masks: int, kept: int) -> Make:
    """masks * batch rows of `kept` ids."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        ids = [_ids(generator, count, kept) for _ in range(masks * batch)]
        ids_of_rows = torch.stack(ids) if ids else torch.zeros(0, kept, dtype=torch.int64)
        return dict(x=_x(generator, batch, count, channels), ids=ids_of_rows)

    return make


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return packed(2, 16 + size, 20, [3 + size, 5, 9 + size, 1])(generator)


DIFFERENTIABLE = (0,)
AUTOCAST = None
CASES = (
    Case("packed_two_masks", packed(2, 16, 20, [3, 5, 9, 1]), ("x",), gradcheck=True),
    Case("rectangular_four_masks", rectangular(3, 30, 33, 4, 7), ("x",)),
    Case("all_tokens", rectangular(2, 9, 64, 1, 9), ("x",)),
    Case("one_channel", rectangular(2, 5, 1, 2, 3), ("x",)),
    Case("empty_sequences", packed(2, 8, 16, [0, 3, 0, 0, 4, 0]), ("x",)),
    Case("empty_batch", rectangular(0, 8, 16, 2, 3), ("x",)),
    Case("unused_rows", packed(2, 8, 40, [2, 3], rows=9), ("x",)),
)
