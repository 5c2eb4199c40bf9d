"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jepa_kernels._core.case import Case
from jepa_kernels.packing import Packing

Make = Callable[[torch.Generator], dict[str, Any]]


def _ids(generator: torch.Generator, count: int, kept: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator)[:kept].sort().values


def _latents(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Trained-like: an offset, and outlier channels an order of magnitude larger."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x[..., ::17] *= 12
    return x + 0.5


def packed(batch: int, count: int, channels: int, lengths: Sequence[int], rows: int = 0, **options: Any) -> Make:
    """`lengths` of masks * batch sequences; `rows` > their sum leaves unused rows at the end."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        ids, packing = Packing.from_ids([_ids(generator, count, n) for n in lengths])
        pred = _latents(generator, max(len(ids), rows), channels)
        if rows:
            packing = packing.padded(rows, len(lengths), packing.max_seqlen)
            ids = torch.cat([ids, torch.full((rows - len(ids),), 2**40)])  # must never be read
            pred[len(pred) - (rows - sum(lengths)) :] = float("nan")
        return dict(pred=pred, target=_latents(generator, batch, count, channels), ids=ids, packing=packing, **options)

    return make


def rectangular(batch: int, count: int, channels: int, masks: int, kept: int, **options: Any) -> Make:
    """masks * batch rows of `kept` ids; kept = count passes no ids."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        ids = [_ids(generator, count, kept) for _ in range(masks * batch)]
        chosen = torch.stack(ids) if ids else torch.zeros(0, kept, dtype=torch.int64)
        pred = _latents(generator, masks * batch, kept, channels)
        target = _latents(generator, batch, count, channels)
        return dict(pred=pred, target=target, ids=None if kept == count else chosen, **options)

    return make


def normed(make: Make, eps: float = 1e-6) -> Make:
    """With the encoder's own norm: gains around 1, outlier channels among the targets as they leave the last block."""

    def with_norm(generator: torch.Generator) -> dict[str, Any]:
        inputs = make(generator)
        channels = inputs["target"].shape[-1]
        gain, bias = torch.randn(2, channels, generator=generator, dtype=torch.float64) * 0.3
        return dict(inputs, norm=[gain + 1, bias, eps])

    return with_norm


def weighted(make: Make) -> Make:
    """With a weight for each token; of rows that count for nothing it is NaN."""

    def with_weight(generator: torch.Generator) -> dict[str, Any]:
        inputs = make(generator)
        weight = torch.rand(inputs["pred"].shape[:-1], generator=generator, dtype=torch.float64) + 0.1
        weight[inputs["pred"][..., 0].isnan()] = float("nan")
        return dict(inputs, weight=weight)

    return with_weight


def _constant_rows(generator: torch.Generator) -> dict[str, Any]:
    """Variance 0, and values far from 0."""
    inputs = rectangular(2, 6, 24, 1, 3)(generator)
    inputs["target"] = torch.ones_like(inputs["target"]) * 3 + 1e3 * (torch.arange(6.0)[:, None] % 2)
    return inputs


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    return packed(2, 16 + size, 20, [3 + size, 5, 9 + size, 1])(generator)


DIFFERENTIABLE = (0,)
AUTOCAST = None
CASES = (
    Case("packed_two_masks", packed(2, 16, 20, [3, 5, 9, 1]), ("pred",), gradcheck=True),
    Case("rectangular_four_masks", rectangular(3, 30, 65, 4, 7), ("pred",)),
    Case("all_tokens", rectangular(2, 9, 64, 2, 9), ("pred",)),
    Case("l1_per_token", packed(2, 16, 33, [3, 5, 9, 1], kind="l1", reduction="token"), ("pred",)),
    Case("l2_raw_targets", rectangular(2, 8, 48, 2, 3, kind="l2", normalize=False), ("pred",)),
    Case("small_beta", rectangular(2, 8, 160, 1, 3, beta=0.25, eps=1e-6), ("pred",)),
    Case("constant_rows", _constant_rows, ("pred",)),
    Case("one_channel", rectangular(2, 5, 1, 2, 3), ("pred",)),
    Case("wide_rows", rectangular(1, 3, 4100, 1, 2), ("pred",)),
    Case("empty_sequences", packed(2, 8, 16, [0, 0, 3, 0]), ("pred",)),
    Case("empty_batch", rectangular(0, 8, 16, 2, 3), ("pred",)),
    Case("norm_packed", normed(packed(2, 16, 20, [3, 5, 9, 1], kind="l1")), ("pred",), gradcheck=True),
    Case("norm_alone", normed(rectangular(2, 8, 65, 2, 3, normalize=False)), ("pred",)),
    Case("norm_of_constant_rows", normed(_constant_rows), ("pred",)),
    Case("norm_of_wide_rows", normed(rectangular(1, 3, 4100, 1, 2)), ("pred",)),
    Case("four_levels", rectangular(2, 8, 132, 2, 3, kind="l2", levels=4), ("pred",)),
    Case("norm_of_four_levels", normed(packed(2, 8, 64, [2, 3, 1, 4], levels=4)), ("pred",)),
    Case("l1_power_2", rectangular(2, 8, 40, 2, 3, kind="l1", power=2.0), ("pred",)),
    Case("l1_power_3_half", packed(2, 8, 40, [2, 3, 1, 4], kind="l1", power=1.5), ("pred",), gradcheck=True),
    Case("l1_power_4", rectangular(2, 8, 40, 2, 3, kind="l1", power=4.0), ("pred",)),
    Case("weighted", weighted(rectangular(2, 8, 40, 2, 3)), ("pred",), keep=("weight",)),
    Case("weighted_unused_rows", weighted(packed(2, 8, 40, [2, 3], rows=9, kind="l2", reduction="token")),
         ("pred",), keep=("weight",), gradcheck=True),
    Case("unused_rows", packed(2, 8, 40, [2, 3], rows=9), ("pred",)),
)  # fmt: skip
