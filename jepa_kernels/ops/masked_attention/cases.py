"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jepa_kernels._core.case import Case
from jepa_kernels.packing import Packing

Make = Callable[[torch.Generator], dict[str, Any]]
Inputs = dict[str, Any]
GRADS = ("q", "k", "v")


def _x(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _packing(lengths: Sequence[int], unused: int) -> Packing:
    packing = Packing.from_lengths(lengths)
    return packing.padded(packing.tokens + unused, len(lengths), packing.max_seqlen) if unused else packing


def packed(
    lengths: Sequence[int],
    heads: tuple[int, int],
    width: int,
    key_lengths: Sequence[int] | None = None,
    unused: int = 0,
    change: Callable[[Inputs], None] = lambda inputs: None,
    **options: Any,
) -> Make:
    """heads: (of q, of k and v); `unused` rows of NaN behind the last sequence, which must never be read."""

    def make(generator: torch.Generator) -> Inputs:
        packing = _packing(lengths, unused)
        keys = packing if key_lengths is None else _packing(key_lengths, unused)
        inputs: Inputs = dict(
            q=_x(generator, packing.tokens, heads[0], width),
            k=_x(generator, keys.tokens, heads[1], width),
            v=_x(generator, keys.tokens, heads[1], width),
            packing=packing,
            **options,
        )
        if key_lengths is not None:
            inputs["k_packing"] = keys
        change(inputs)
        for name in GRADS:
            inputs[name][len(inputs[name]) - unused :] = float("nan")
        return inputs

    return make


def dense(batch: int, heads: tuple[int, int], queries: int, keys: int, width: int, **options: Any) -> Make:
    def make(generator: torch.Generator) -> Inputs:
        q = _x(generator, batch, heads[0], queries, width)
        k, v = (_x(generator, batch, heads[1], keys, width) for _ in range(2))
        return dict(q=q, k=k, v=v, **options)

    return make


def qkv_views(lengths: Sequence[int], heads: int, width: int) -> Make:
    """q, k and v as views of one [T, 3, H, D], a GEMM's output."""

    def make(generator: torch.Generator) -> Inputs:
        packing = Packing.from_lengths(lengths)
        q, k, v = _x(generator, packing.tokens, 3, heads, width).unbind(1)
        return dict(q=q, k=k, v=v, packing=packing)

    return make


def _outlier_channels(inputs: Inputs) -> None:
    """Trained-like: a few channels an order of magnitude larger, and an offset."""
    for name in ("k", "v"):
        inputs[name][..., ::17] *= 12
        inputs[name] += 0.5
    inputs["q"][..., ::17] /= 12


def _logits_up_to(bound: float) -> Callable[[Inputs], None]:
    """Every fourth query meets logits of up to `bound`: softmax becomes a choice."""

    def change(inputs: Inputs) -> None:
        rows = inputs["q"][::4]
        largest = torch.einsum("thd,mhd->thm", rows, inputs["k"]).abs().max()
        inputs["q"][::4] = rows * (bound * rows.shape[-1] ** 0.5 / largest)

    return change


def _constant_rows(inputs: Inputs) -> None:
    """One head of equal keys (uniform weights, no gradient of q), and equal queries."""
    inputs["k"][:, 0] = 1.0
    inputs["q"][::2] = 0.5


def dynamic(generator: torch.Generator, size: int) -> Inputs:
    return packed([3 + size, 1, 7 + size], (2, 1), 8)(generator)


RAGGED = (0, 1, 63, 64, 65, 130)
CAPS = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 5e-3}
DIFFERENTIABLE = (0, 1, 2)
AUTOCAST = GRADS
CASES = (
    Case("packed_grouped_heads", packed([3, 1, 7], (2, 1), 8), GRADS, gradcheck=True),
    Case("ragged_d64", packed(RAGGED, (2, 2), 64), GRADS),
    # Gradients of a choice cancel, in any algorithm, past the caps: they are held at smaller logits.
    Case("ragged_d80_logits_80", packed(RAGGED, (2, 2), 80, change=_logits_up_to(80.0))),
    Case("ragged_d80_logits_12", packed(RAGGED, (2, 2), 80, change=_logits_up_to(12.0)), GRADS),
    Case("ragged_d24_grouped_heads", packed([65, 2, 33], (6, 2), 24), GRADS),
    Case("cross_lengths_d88", packed([5, 70, 0, 9], (3, 1), 88, key_lengths=[66, 3, 4, 0]), GRADS),
    Case("empty_key_ranges", packed([2, 3], (1, 1), 8, key_lengths=[0, 2]), GRADS, gradcheck=True),
    Case("unused_rows_d32", packed([17, 40], (2, 2), 32, unused=9), GRADS),
    Case("unused_rows_cross", packed([17, 4], (2, 1), 16, key_lengths=[3, 20], unused=3, scale=0.4), GRADS),
    Case("outlier_channels_d104", packed([50, 31], (2, 2), 104, change=_outlier_channels), GRADS),
    Case("constant_rows", packed([20, 9], (2, 2), 40, change=_constant_rows), GRADS),
    Case("qkv_views_d80", qkv_views([40, 7], 3, 80), GRADS),
    Case("dense_d128", dense(2, (4, 2), 33, 47, 128), GRADS),
    Case("dense_d64", dense(1, (2, 2), 150, 150, 64, scale=0.2), GRADS),
    Case("dense_no_keys", dense(2, (2, 1), 3, 0, 16), GRADS),
    Case("empty_batch", dense(0, (2, 2), 5, 5, 16), GRADS),
)
