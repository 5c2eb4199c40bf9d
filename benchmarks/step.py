"""A training step into rows: parity of the loss and every gradient first, then time, time by part, and memory."""

import itertools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import jepa_kernels as jk
from benchmarks import timing
from benchmarks.measure import DRAWS, OURS, RIVAL_TOLERANCE, Settings, share_of_fma, verdict
from benchmarks.modelrun import ModelRun
from benchmarks.rows import Row
from jepa_kernels import testing
from jepa_kernels.masks import MaskBatch
from jepa_kernels.models.jepa import train_step
from jepa_kernels.nn import compile_blocks

LEARNING_RATE, MOMENTUM = 1e-4, 0.996


@dataclass(frozen=True)
class Step:
    """A training step of one size.

    name      as in the row, e.g. "vit_small_16_truncated"
    model     model() -> the network, with the same weights at every call; model(shadow_dtype=...) with shadows
    pixels    pixels() -> the batch, float32 [B, C, H, W] or [B, C, T, H, W]
    masks     of the batch, on the host; masks(step=1) are others
    flops     of one step, a multiply-add being two
    rivals    what is timed: "reference", "sdpa" (the same around SDPA), "compile" (that with compiled blocks),
              "published" (the network as its authors compute it)
    named     rivals that are timed only when their row is asked for: compiling takes most of a minute on a CPU
    published published() -> the network of the rival of that name; all else is as of "reference"
    cut       the masks of rivals, where ours are not truncated; every time in a row is then that of a step divided by
              the context and target tokens of the step: `ours_us` by `tokens`, `baseline_us` by `baseline_tokens`
    dtypes    float32; or bfloat16: under autocast to it
    tuned     ours is as a GPU wants it: compiled blocks, and an AdamWEMA that moves the target and its shadows
    small     a step of the same kind on which parity is checked, where this one does not fit into memory in fp64
    smoke     part of the one-minute run
    """

    name: str
    model: Callable[..., nn.Module]
    pixels: Callable[[], Tensor]
    masks: Callable[..., MaskBatch]
    flops: Callable[[MaskBatch], float]
    rivals: tuple[str, ...] = ("reference", "sdpa")
    named: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu",)
    tuned: bool = False
    published: Callable[[], nn.Module] | None = None
    cut: Callable[..., MaskBatch] | None = None
    small: "Step | None" = None
    smoke: bool = False
    stages: ClassVar[tuple[str, ...]] = ("step",)


def event() -> torch.cuda.Event:
    """Now, on the GPU's clock and without waiting for it."""
    found = torch.cuda.Event(enable_timing=True)
    found.record()
    return found


class Parts:
    """Splits a step's time at the ends of its parts: hooks of modules and optimiser, a wrapper around the loss."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str):
        self.steps: list[list[tuple[str, Any]]] = []
        self.cuda = device == "cuda"
        for module, part in (
            (model.context_encoder.patch_embed, "patch embedding"),
            (model.context_encoder, "encoder"),
            (model.predictor, "predictor"),
        ):
            module.register_forward_hook(lambda *_, part=part: self.end(part))
        targets, compare = model.targets, model.compare
        model.targets = lambda *inputs: (targets(*inputs), self.end("target encoder"))[0]
        model.compare = lambda *inputs: (compare(*inputs), self.end("loss"))[0]
        optimizer.register_step_pre_hook(lambda *_: self.end("backward"))
        optimizer.register_step_post_hook(lambda *_: self.end("optimiser"))

    def begin(self) -> None:
        self.steps.append([])
        self.end("begin")

    def end(self, part: str) -> None:
        self.steps[-1].append((part, event() if self.cuda else time.perf_counter()))

    def medians_us(self, rounds: int) -> dict[str, float]:
        """Median of each part over the last `rounds` steps, in microseconds."""
        seconds: dict[str, list[float]] = {}
        for marks in self.steps[-rounds:]:
            for (_, before), (part, now) in itertools.pairwise(marks):
                taken = before.elapsed_time(now) / 1e3 if self.cuda else now - before
                seconds.setdefault(part, []).append(taken)
        return {part: float(np.median(times) * 1e6) for part, times in seconds.items()}


class Inputs:
    """The batch and the masks of a step on a device, and the type that it runs under autocast to, if any."""

    def __init__(self, workload: Step, device: str, dtype: str, draw: int = 0, cut: bool = False):
        masks = workload.cut if cut and workload.cut is not None else workload.masks
        self.host_masks = masks(step=draw)
        self.masks, self.pixels = self.host_masks.to(device), workload.pixels().to(device)
        self.low = None if dtype == "float32" else getattr(torch, dtype)

    @property
    def tokens(self) -> int:
        """Of contexts and targets."""
        return int(self.host_masks.context_lengths.sum() + self.host_masks.target_lengths.sum())


class Stepper:
    """One contestant: its own model and optimiser, and the backends it runs on. A call is a training step."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, backend: Callable[[], AbstractContextManager], tuned: bool = False
    ):
        self.model, self.inputs, self.backend = model, inputs, backend
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if tuned:
            pairs, shadow = model.ema.pairs(), (None, model.ema.shadow_copies())
            self.optimizer = jk.AdamWEMA(trained, pairs, lr=LEARNING_RATE, weight_decay=0.04, shadow=shadow)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.04, fused=True)
        self.parts = Parts(model, self.optimizer, inputs.pixels.device.type)

    def __call__(self) -> None:
        given = self.inputs
        self.parts.begin()
        with self.backend():
            train_step(self.model, self.optimizer, given.pixels, given.masks, MOMENTUM, dtype=given.low)
        self.parts.end("moving average")


class StepRun(ModelRun):
    """Automatic backends against the plain PyTorch reference. Of a workload that is cut, times are those of a token."""

    def __init__(self, name: str, workload: Step, stage: str, dtype: str, settings: Settings):
        super().__init__(name, workload, stage, dtype, settings)
        self.rivals = self.chosen()
        self.kind = "model" if workload.cut is None else "model, per token"
        self.fewest = max(3, settings.min_rounds // 2)
        self.inputs = Inputs(workload, settings.device, dtype)
        self.given = Inputs(workload, settings.device, dtype, cut=True)  # the rivals'

    def model(self, workload: Step, **options: Any) -> nn.Module:
        with torch.device(self.settings.device):
            return workload.model(**options)

    def ours(self, workload: Step) -> nn.Module:
        if not workload.tuned:
            return self.model(workload)
        model = self.model(workload, shadow_dtype=self.inputs.low)
        compile_blocks(model)
        return model

    def parity(self) -> dict[str, Any]:
        """Loss and gradient of every parameter, within the error budget of the plain PyTorch step.

        Under autocast of DRAWS masks together, and without the loss: few rounded numbers may be exact by luck.
        """
        step, low = self.workload.small or self.workload, self.inputs.low
        ours, eager, exact = self.ours(step), self.model(step), self.model(step).double()
        sides: tuple[list[dict[str, Tensor]], ...] = ([], [], [])
        for draw in range(1 if low is None else DRAWS):
            given = Inputs(step, self.settings.device, self.dtype, draw)
            sides[0].append(gradients(ours, given.pixels, given.masks, low))
            with jk.use_backend("reference"):
                sides[1].append(gradients(exact, given.pixels.double(), given.masks))
                sides[2].append(gradients(eager, given.pixels, given.masks, low))
        names = [n for n in sides[0][0] if n != "loss" or low is None]
        joined = ((torch.cat([found[n].flatten() for found in side]) for side in sides) for n in names)
        return verdict([testing.hold(n, *tensors) for n, tensors in zip(names, joined, strict=True)])

    def chosen(self) -> list[str]:
        """The rivals, or the one that is asked for."""
        workload, wanted = self.workload, self.settings.baseline
        names = workload.rivals if wanted is None else workload.rivals + workload.named
        return [name for name in names if wanted in (None, name)]

    def steppers(self) -> dict[str, Stepper]:
        reference = partial(jk.use_backend, "reference")
        sdpa = partial(jk.use_backend, "reference", masked_attention="sdpa")
        workload = self.workload
        found = {OURS: Stepper(self.ours(workload), self.inputs, nullcontext, workload.tuned)}
        for name in self.rivals:
            model = self.published(workload) if name == "published" else self.model(workload)
            if name == "compile":  # block by block: a whole step would compile for minutes
                compile_blocks(model, dynamic=False)
            found[name] = Stepper(model, self.given, sdpa if name in ("sdpa", "compile") else reference)
        return found

    def published(self, workload: Step) -> nn.Module:
        assert workload.published is not None
        with torch.device(self.settings.device):
            return workload.published()

    def rival_error(self) -> str | None:
        """Why the published form's time would mean nothing: on its own masks its loss is another than ours."""
        step = self.workload.small or self.workload
        if step.published is None:
            return None
        given = Inputs(step, self.settings.device, "float32", cut=True)
        with torch.no_grad(), jk.use_backend("reference"):
            theirs, ours = (m.loss(given.pixels, given.masks) for m in (self.published(step), self.model(step)))
        error = ((theirs - ours) / ours).abs()
        return None if error <= RIVAL_TOLERANCE[torch.float32] else f"the loss differs by {error:.2g} of it"

    def counted(self) -> dict[str, Any]:
        masks = self.inputs.host_masks
        return dict(flops=self.workload.flops(masks), images=masks.batch, tokens=self.inputs.tokens)

    def functions(self) -> dict[str, Callable[[], object]]:
        self.made = self.steppers()
        for step in self.made.values():  # compiles, and makes the optimiser's state
            step()
        return self.made

    def tokens_of_call(self, name: str) -> float:
        if self.workload.cut is None:
            return 1
        return (self.inputs if name == OURS else self.given).tokens

    def rates(self, common: Row, name: str, times: timing.Times) -> dict[str, Any]:
        ours_s, theirs_s = (float(np.median(times.of(n))) for n in (OURS, name))
        found = {
            "baseline_tokens": self.given.tokens,
            "tokens_per_s": self.inputs.tokens / ours_s,
            "baseline_tokens_per_s": self.given.tokens / theirs_s,
            "share_of_peak": share_of_fma(self.settings, common["flops"] / ours_s),
        }
        if name == "reference":
            pair = {"ours": OURS, "reference": name}
            found["parts"] = {who: self.made[n].parts.medians_us(times.rounds) for who, n in pair.items()}
        return found


def gradients(model: nn.Module, pixels: Tensor, masks: Any, low: torch.dtype | None = None) -> dict[str, Tensor]:
    """The loss, and the gradient of every trained parameter by name; masks: what else `loss` takes."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.autocast(pixels.device.type, dtype=low, enabled=low is not None):
        loss = model.loss(pixels, masks)
    found = torch.autograd.grad(loss, list(trained.values()))
    return {"loss": loss.detach(), **{f"d{n}": g for n, g in zip(trained, found, strict=True)}}
