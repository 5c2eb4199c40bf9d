"""A masked encoder into rows: every mask of a batch in one packed pass, against a loop over truncated masks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import jepa_kernels as jk
from benchmarks.measure import OURS, RIVAL_TOLERANCE, Settings, as_published, verdict, with_backward
from benchmarks.modelrun import ModelRun
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


class EncodingRun(ModelRun):
    """One packed pass, against a loop over masks.

    The truncated masks of the loop have fewer tokens than ours, so every time in a row is the measured time of a call
    divided by the tokens of that call: `ours_us` by `tokens`, `baseline_us` by `baseline_tokens`. `flops` too is that
    of one token; `peak_bytes` is a call's.
    """

    kind, rivals, fewest = "encoder", ("loop",), 5

    def __init__(self, name: str, workload: Encoding, stage: str, dtype: str, settings: Settings):
        super().__init__(name, workload, stage, dtype, settings)
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
        return verdict([testing.hold(n, ours[n], exact[n], eager[n]) for n in exact])

    def rival_error(self) -> str | None:
        """Why the loop's time would mean nothing: on its own masks it gives other latents than our encoder."""
        with torch.no_grad():
            found = as_published(self.workload.loop)(self.shallow, self.pixels, self.ids)
            wanted = [self.shallow(self.pixels, ids) for ids in self.ids]
        for j, (a, b) in enumerate(zip(found, wanted, strict=True)):
            error = (a - b).norm() / b.norm()
            if not error <= RIVAL_TOLERANCE[a.dtype]:
                return f"mask {j} differs by {error:.2g} of its norm"
        return None

    def functions(self) -> dict[str, Callable[[], object]]:
        leaves = [p for p in self.encoder.parameters() if p.requires_grad]
        masks, loop = (self.masks.context_ids, self.masks.context_packing), as_published(self.workload.loop)
        return {
            OURS: with_backward(lambda: self.encoder(self.pixels, *masks), leaves),
            "loop": with_backward(lambda: loop(self.encoder, self.pixels, self.ids), leaves),
        }

    def tokens_of_call(self, name: str) -> float:
        return self.tokens if name == OURS else self.loop_tokens

    def counted(self) -> dict[str, Any]:
        flops = self.workload.flops(self.lengths) / self.tokens
        return dict(flops=flops, tokens=self.tokens, baseline_tokens=self.loop_tokens)
