"""A masked encoder into rows: every mask of a batch in one packed pass, against a loop over truncated masks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import jepa_kernels as jk
from benchmarks import timing
from benchmarks.measure import OURS, RIVAL_TOLERANCE, Interrupted, Settings, share_of_fma, verdict, with_backward
from benchmarks.memory import peak_bytes
from benchmarks.rows import Row, failed, finished, stated, timed_row
from jepa_kernels import testing
from jepa_kernels.masks import MaskBatch
from jepa_kernels.nn import Encoder

Loop = Callable[[Encoder, Tensor, list[Tensor]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Encoding:
    """Forward and backward of an encoder over all masks of some clips.

    name        as in the row, e.g. "vjepa2_vit_s_two_masks_per_token": its times are those of one token
    model       model() -> the encoder that is timed; every contestant has the same weights
    shallow     shallow() -> one of fewer layers, on which parity is checked: in float64 all of them take many seconds
    pixels      pixels() -> the clips, float32 [B, C, T, H, W]
    packed      the masks as they are drawn; truncated: cut to rectangles, as published
    masks       how many each clip has
    loop        loop(encoder, pixels, ids) -> what the published code computes, ids [B, K] mask by mask
    flops       flops(context_lengths), a multiply-add being two
    """

    name: str
    model: Callable[[], Encoder]
    shallow: Callable[[], Encoder]
    pixels: Callable[[], Tensor]
    packed: Callable[[], MaskBatch]
    truncated: Callable[[], MaskBatch]
    masks: int
    loop: Loop
    flops: Callable[[Any], float]
    smoke: bool = False
    stages: ClassVar[tuple[str, ...]] = ("backward",)
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)


class EncodingRun:
    """One (model, workload).

    The truncated masks of the loop have fewer tokens than ours, so every time in a row is the measured time of a call
    divided by the tokens of that call: `ours_us` by `tokens`, `baseline_us` by `baseline_tokens`. `flops` too is that
    of one token; `peak_bytes` is a call's.
    """

    def __init__(self, name: str, workload: Encoding, stage: str, dtype: str, settings: Settings):
        self.name, self.workload, self.stage, self.dtype, self.settings = name, workload, stage, dtype, settings
        self.group = f"{name}/{workload.name}/{stage}/{dtype}"
        self.lengths = workload.packed().context_lengths
        self.masks = workload.packed().to(settings.device)
        cut = workload.truncated()
        rows = torch.from_numpy(cut.context_ids).flatten().to(settings.device).split(cut.context_lengths.tolist())
        batch = cut.batch
        self.ids = [torch.stack(rows[j * batch : (j + 1) * batch]) for j in range(workload.masks)]
        self.pixels = workload.pixels().to(settings.device)
        self.encoder, self.shallow = (build().to(settings.device) for build in (workload.model, workload.shallow))
        self.tokens, self.loop_tokens = int(self.lengths.sum()), sum(ids.numel() for ids in self.ids)

    def gradients(self, encoder: Encoder, pixels: Tensor, *masks: Any) -> dict[str, Tensor]:
        """The latents, and every gradient of their mean square."""
        trained = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
        out = encoder(pixels, *masks)
        found = torch.autograd.grad(out.square().mean(), list(trained.values()))
        return {"out": out.detach(), **{f"d{n}": g for n, g in zip(trained, found, strict=True)}}

    def parity(self) -> dict[str, Any]:
        """Latents and gradients, within the error budget of plain PyTorch."""
        masks = self.masks.context_ids, self.masks.context_packing
        ours = self.gradients(self.shallow, self.pixels, *masks)
        with jk.use_backend("reference"):
            eager = self.gradients(self.shallow, self.pixels, *masks)
            exact = self.gradients(copy.deepcopy(self.shallow).double(), self.pixels.double(), *masks)
        return verdict([testing.compare(n, ours[n], exact[n], eager[n]) for n in exact])

    def rival_error(self) -> str | None:
        """Why the loop's time would mean nothing: on its own masks it gives other latents than our encoder."""
        with torch.no_grad():
            found = self.workload.loop(self.shallow, self.pixels, self.ids)
            wanted = [self.shallow(self.pixels, ids) for ids in self.ids]
        for j, (a, b) in enumerate(zip(found, wanted, strict=True)):
            error = (a - b).norm() / b.norm()
            if not error <= RIVAL_TOLERANCE[a.dtype]:
                return f"mask {j} differs by {error:.2g} of its norm"
        return None

    def rows(self, drive: Callable[..., object] = timing.loop) -> list[Row]:
        """Measure. A red parity, or a loop that computes something else, times nothing."""
        s, common = self.settings, self.common(self.parity())
        if not common["parity"]["pass"]:
            return [finished(failed(common, "loop", "parity: outside the error budget"), s)]
        error = self.rival_error()
        if error:
            return [finished(failed(common, "loop", error), s)]
        leaves = [p for p in self.encoder.parameters() if p.requires_grad]
        masks = self.masks.context_ids, self.masks.context_packing
        functions = {
            OURS: with_backward(lambda: self.encoder(self.pixels, *masks), leaves),
            "loop": with_backward(lambda: self.workload.loop(self.encoder, self.pixels, self.ids), leaves),
        }
        clock = timing.Clock(s.device)
        times = timing.interleave(functions, budget_s=4 * s.budget_s, rounds=(5, 50), clock=clock, drive=drive)
        row = self.row(common, times)
        if times.interrupted:
            raise Interrupted([row])
        memory = {n: peak_bytes(f, s.device) for n, f in functions.items()}
        return [{**row, "peak_bytes": memory[OURS], "baseline_peak_bytes": memory["loop"]}]

    def row(self, common: Row, times: timing.Times) -> Row:
        ours, loop = times.of(OURS) / self.tokens, times.of("loop") / self.loop_tokens
        row = timed_row(common, "loop", ours, loop, times.interrupted)
        if row["ours_us"] is not None:
            row["share_of_peak"] = share_of_fma(self.settings, common["flops"] / row["ours_us"]["p50"] * 1e6)
        return finished(row, self.settings)

    def common(self, parity: dict[str, Any]) -> Row:
        flops = self.workload.flops(self.lengths) / self.tokens
        counted = dict(flops=flops, tokens=self.tokens, baseline_tokens=self.loop_tokens)
        return stated("encoder", self, parity, **counted)
