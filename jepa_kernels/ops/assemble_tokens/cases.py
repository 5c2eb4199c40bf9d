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


def packed(
    contexts: Sequence[int],
    targets: Sequence[int],
    channels: int,
    *,
    count: int | None = None,
    groups: int = 1,
    unused: int = 0,
) -> Make:
    """Lengths of contexts and targets. count: patches of the position table, None for no table. unused: rows behind
    the last sequence of each packing."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        masks = len(targets) // max(len(contexts), 1)
        both = [c + t for c, t in zip(list(contexts) * masks, targets, strict=True)]
        packings = [_packing(lengths, unused) for lengths in (contexts, targets, both)]
        context = _x(generator, packings[0].tokens, channels)
        context[len(context) - unused :] = float("nan")
        ids = [None, None] if count is None else [_packed_ids(generator, count, p) for p in packings[:2]]
        return dict(
            context=context,
            mask_token=_x(generator, groups, channels),
            context_ids=ids[0],
            target_ids=ids[1],
            pos_embed=None if count is None else _x(generator, count, channels),
            context_packing=packings[0],
            target_packing=packings[1],
            packing=packings[2],
        )

    return make


def _packing(lengths: Sequence[int], unused: int) -> Packing:
    packing = Packing.from_lengths(lengths)
    return packing.padded(packing.tokens + unused, packing.sequences, packing.max_seqlen) if unused else packing


def _packed_ids(generator: torch.Generator, count: int, packing: Packing) -> torch.Tensor:
    ids = torch.full((packing.tokens,), 2**40)  # behind the last sequence: must never be read
    ids[: sum(packing.lengths)] = Packing.from_ids([_ids(generator, count, n) for n in packing.lengths])[0]
    return ids


def rectangular(
    batch: int, kept: int, masks: int, places: int, channels: int, count: int, *, pos: bool = True, groups: int = 1
) -> Make:
    """masks * batch sequences of `kept` context tokens and `places` targets."""

    def rows(generator: torch.Generator, sequences: int, length: int) -> torch.Tensor:
        drawn = [_ids(generator, count, length) for _ in range(sequences)]
        return torch.stack(drawn) if drawn else torch.zeros(0, length, dtype=torch.int64)

    def make(generator: torch.Generator) -> dict[str, Any]:
        return dict(
            context=_x(generator, batch, kept, channels),
            mask_token=_x(generator, groups, channels),
            context_ids=rows(generator, batch, kept) if pos else None,
            target_ids=rows(generator, masks * batch, places),
            pos_embed=_x(generator, count, channels) if pos else None,
        )

    return make


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return packed([5 + size, 3], [2, 7 + size, 4, 1], 20, count=16 + size)(generator)


BOTH = ("context", "mask_token")
TABLES = ("mask_token", "pos_embed")
DIFFERENTIABLE = (0, 1)
AUTOCAST = None
CASES = (
    Case("packed_two_masks", packed([5, 3], [2, 7, 4, 1], 20, count=16), BOTH, gradcheck=True),
    Case("packed_two_tokens", packed([40, 9], [70, 150, 3, 65], 48, groups=2), BOTH),
    Case("packed_fp32_tables", packed([9, 4, 6], [5, 8, 2] * 4, 72, count=20, groups=4), BOTH, keep=TABLES),
    Case("rectangular_four_masks", rectangular(3, 11, 4, 7, 33, 30), BOTH),
    Case("rectangular_without_positions", rectangular(2, 5, 2, 9, 1152, 30, pos=False, groups=2), BOTH),
    Case("one_channel", rectangular(2, 3, 2, 2, 1, 5), BOTH),
    Case("frozen_context", packed([4, 4], [3, 3], 64, count=9), ("mask_token",)),
    Case("frozen_token", rectangular(2, 4, 3, 3, 16, 9), ("context",)),
    Case("empty_sequences", packed([0, 3, 0], [2, 0, 0, 0, 5, 0], 16, count=8, groups=3), BOTH),
    Case("empty_batch", rectangular(0, 3, 2, 4, 16, 8), BOTH),
    Case("empty_packing", packed([], [], 16, count=8), BOTH),
    Case("unused_rows", packed([2, 5], [3, 1, 2, 4], 40, count=8, unused=3), BOTH),
)
