"""Inputs that the conformance suite, the command line and the benchmarks share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jepa_kernels._core.case import Case
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope

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


def dense(
    batch: int,
    heads: tuple[int, int],
    queries: int,
    keys: int,
    width: int,
    change: Callable[[Inputs], None] = lambda inputs: None,
    **options: Any,
) -> Make:
    def make(generator: torch.Generator) -> Inputs:
        q = _x(generator, batch, heads[0], queries, width)
        k, v = (_x(generator, batch, heads[1], keys, width) for _ in range(2))
        inputs = dict(q=q, k=k, v=v, **options)
        change(inputs)
        return inputs

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


def _ranges(inputs: Inputs) -> None:
    """Each query sees a stretch of its sequence's keys; every fifth sees none."""
    rows = torch.arange(inputs["q"].shape[0])
    packing = inputs["packing"]
    keys = inputs.get("k_packing") or packing
    lengths = torch.cat([keys.cu_seqlens.diff(), torch.zeros(1, dtype=torch.int32)])[packing.sequence_of_token()]
    begin = rows * 7 % (lengths + 1)
    end = torch.minimum(begin + rows * 11 % 40, lengths)
    end = torch.where(rows % 5 == 4, begin, end)
    inputs["key_ranges"] = torch.stack([begin, end], 1).int()


def _dense_ranges(batched: bool) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        batch, _, queries, _ = inputs["q"].shape
        rows = torch.arange(batch * queries if batched else queries)
        begin = rows * 7 % inputs["k"].shape[2]
        ranges = torch.stack([begin, torch.minimum(begin + rows * 5 % 33, torch.tensor(inputs["k"].shape[2]))], 1)
        inputs["key_ranges"] = (ranges.view(batch, queries, 2) if batched else ranges).int()

    return change


def _positions(tokens: int, axes: int) -> torch.Tensor:
    """Frames, rows and columns of a grid that is 7 wide, some between two patches."""
    place = torch.arange(tokens)
    grid = torch.stack([place // 21, place // 7 % 3, place % 7], 1).float()
    return grid[:, :axes] + 0.25 * (place[:, None] % 3 == 1)


def _rope(axes: int, batched: bool = False, **options: Any) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        shapes = [inputs[n].shape for n in ("q", "k")]
        tokens = [s[0] if len(s) == 3 else s[2] for s in shapes]
        positions, k_positions = (_positions(n, axes) for n in tokens)
        if batched:
            offset = torch.arange(shapes[0][0]).view(-1, 1, 1)
            positions, k_positions = positions + offset, k_positions + 2 * offset
        inputs["rope"] = Rope(positions, k_positions if batched or tokens[0] != tokens[1] else None, **options)

    return change


def _all(*changes: Callable[[Inputs], None]) -> Callable[[Inputs], None]:
    def change(inputs: Inputs) -> None:
        for one in changes:
            one(inputs)

    return change


def dynamic(generator: torch.Generator, size: int) -> Inputs:
    return packed([3 + size, 1, 7 + size], (2, 1), 8)(generator)


def alone(inputs: Inputs) -> list[tuple[Inputs, slice]]:
    """Of a packed call, each sequence by itself and the rows where its output lies."""
    packing = inputs.get("packing")
    if packing is None or "rope" in inputs:
        return []
    keys, calls = inputs.get("k_packing") or packing, []
    q_ends, k_ends = packing.cu_seqlens.tolist(), keys.cu_seqlens.tolist()
    for s, (n, m) in enumerate(zip(packing.lengths, keys.lengths, strict=True)):
        rows, others = slice(q_ends[s], q_ends[s + 1]), slice(k_ends[s], k_ends[s + 1])
        call = inputs | dict(q=inputs["q"][rows], k=inputs["k"][others], v=inputs["v"][others])
        call |= {"packing": Packing.from_lengths([n], device=packing.cu_seqlens.device)}
        if "k_packing" in inputs:
            call["k_packing"] = Packing.from_lengths([m], device=packing.cu_seqlens.device)
        if "key_ranges" in inputs:
            call["key_ranges"] = inputs["key_ranges"][rows]
        calls.append((call, rows))
    return calls


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
    Case("grouped_heads_of_many_d16", packed([9, 2, 5, 4, 1], (4, 2), 16), GRADS),  # key heads share a task
    Case("long_d16", packed([300, 3], (2, 2), 16, [3, 290]), GRADS),  # more keys than a block of any kernel
    Case("cross_lengths_d88", packed([5, 70, 0, 9], (3, 1), 88, key_lengths=[66, 3, 4, 0]), GRADS),
    # Kernels round scores' gradients to 16 bits for their products: of fewer than these the error has no steady mean.
    Case("empty_key_ranges", packed([2, 9], (1, 1), 8, key_lengths=[0, 7]), GRADS, gradcheck=True),
    Case("unused_rows_d32", packed([17, 40], (2, 2), 32, unused=9), GRADS),
    Case("unused_rows_cross", packed([17, 4], (2, 1), 16, key_lengths=[3, 20], unused=3, scale=0.4), GRADS),
    Case("outlier_channels_d104", packed([50, 31], (2, 2), 104, change=_outlier_channels), GRADS),
    Case("constant_rows", packed([20, 9], (2, 2), 40, change=_constant_rows), GRADS),
    Case("qkv_views_d80", qkv_views([40, 7], 3, 80), GRADS),
    Case("dense_d128", dense(2, (4, 2), 33, 47, 128), GRADS),
    Case("dense_d64", dense(1, (2, 2), 150, 150, 64, scale=0.2), GRADS),
    Case("frames_of_3", packed([6, 0, 12, 3], (2, 1), 8, frame_size=3), GRADS, gradcheck=True),
    Case("causal_d16", packed([2, 70, 1], (2, 1), 16, frame_size=1), GRADS),
    Case("frames_of_43_d64", packed([129, 43, 86], (2, 2), 64, frame_size=43), GRADS),
    Case("frames_with_cached_keys_d24", packed([2, 70, 5], (2, 1), 24, [6, 99, 3], frame_size=3), GRADS),
    Case("ranges_d32", packed([5, 130, 0, 33], (2, 2), 32, change=_ranges), GRADS),
    Case("ranges_cross_d80", packed([70, 9], (2, 1), 80, [66, 130], change=_ranges, unused=3), GRADS),
    Case("ranges_in_frames_d16", packed([8, 72], (2, 2), 16, frame_size=8, change=_ranges), GRADS),
    Case("rope_interleaved_d64", packed([70, 3, 65], (2, 2), 64, change=_rope(3)), GRADS),
    Case("rope_tiled_d32", packed([40, 66], (2, 1), 32, change=_rope(3, pairing="tiled")), GRADS),
    Case("rope_half_d40_cross", packed([9, 66], (2, 2), 40, [70, 5], change=_rope(1, pairing="half")), GRADS),
    Case("rope_tiled_d80_frames", packed([84, 42], (2, 2), 80, frame_size=21, change=_rope(3, pairing="tiled")), GRADS),
    Case(
        "rope_ranges_frames_d8",
        packed([4, 6], (2, 1), 8, frame_size=2, change=_all(_ranges, _rope(2, angle_dtype=torch.bfloat16))),
        GRADS,
        gradcheck=True,
    ),
    Case("dense_frames_d88", dense(2, (2, 2), 60, 90, 88, frame_size=30), GRADS),
    Case("dense_frames_more_queries", dense(2, (2, 1), 7, 4, 16, frame_size=2), GRADS),
    Case("dense_ranges_rope_d48", dense(2, (2, 2), 35, 50, 48, change=_all(_dense_ranges(False), _rope(2))), GRADS),
    Case(
        "dense_batched_ranges_rope_d104",
        dense(2, (2, 1), 20, 70, 104, change=_all(_dense_ranges(True), _rope(3, batched=True))),
        GRADS,
    ),
    Case("dense_no_keys", dense(2, (2, 1), 3, 0, 16), GRADS),
    Case("empty_batch", dense(0, (2, 2), 5, 5, 16), GRADS),
)
