"""A training step into rows: parity of the loss and every gradient first, then time, time by part, and memory."""

import copy
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
from benchmarks.measure import OURS, Interrupted, Settings, verdict
from benchmarks.memory import peak_bytes
from benchmarks.rows import Row, failed, key, repro, timed_row
from jepa_kernels import testing
from jepa_kernels.masks import MaskBatch
from jepa_kernels.models.ijepa import train_step
from jepa_kernels.nn import Block

LEARNING_RATE, MOMENTUM = 1e-4, 0.996


@dataclass(frozen=True)
class Step:
    """A training step of one size.

    name      as in the row, e.g. "vit_small_16_truncated"
    model     model() -> the network; every contestant gets a copy
    pixels    pixels() -> the batch, float32 [B, C, H, W]
    masks     of the batch, on the host
    flops     of one step, a multiply-add being two
    compile   offers the reference with compiled blocks as a baseline, timed only when its row is asked for: it
              compiles for most of a minute
    smoke     part of the one-minute run
    """

    name: str
    model: Callable[[], nn.Module]
    pixels: Callable[[], Tensor]
    masks: Callable[[], MaskBatch]
    flops: Callable[[MaskBatch], float]
    compile: bool = False
    smoke: bool = False
    stages: ClassVar[tuple[str, ...]] = ("step",)
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")


class Parts:
    """Splits a step's time at the ends of its parts: hooks of modules and optimiser, a wrapper around the loss."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str):
        self.seconds: dict[str, list[float]] = {}
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        for module, part in (
            (model.context_encoder.patch_embed, "patch embedding"),
            (model.context_encoder, "encoder"),
            (model.predictor, "predictor"),
            (model.target_encoder, "target encoder"),
        ):
            module.register_forward_hook(lambda *_, part=part: self.end(part))
        compare = model.compare
        model.compare = lambda *inputs: (compare(*inputs), self.end("loss"))[0]
        optimizer.register_step_pre_hook(lambda *_: self.end("backward"))
        optimizer.register_step_post_hook(lambda *_: self.end("optimiser"))

    def begin(self) -> None:
        self.last = time.perf_counter()

    def end(self, part: str) -> None:
        self.wait()
        now = time.perf_counter()
        self.seconds.setdefault(part, []).append(now - self.last)
        self.last = now

    def medians_us(self, rounds: int) -> dict[str, float]:
        """Median of each part over the last `rounds` steps, in microseconds."""
        return {part: float(np.median(times[-rounds:]) * 1e6) for part, times in self.seconds.items()}


class Stepper:
    """One contestant: its own model and optimiser, and the backends it runs on. A call is a training step."""

    def __init__(self, model: nn.Module, pixels: Tensor, masks: Any, backend: Callable[[], AbstractContextManager]):
        self.model, self.pixels, self.masks, self.backend = model, pixels, masks, backend
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.04, fused=True)
        self.parts = Parts(model, self.optimizer, pixels.device.type)

    def __call__(self) -> None:
        self.parts.begin()
        with self.backend():
            train_step(self.model, self.optimizer, self.pixels, self.masks, MOMENTUM)
        self.parts.end("moving average")


class StepRun:
    """One (model, workload): automatic backends against the plain PyTorch reference, in fp32."""

    def __init__(self, name: str, workload: Step, stage: str, dtype: str, settings: Settings):
        self.name, self.workload, self.settings = name, workload, settings
        self.group = f"{name}/{workload.name}/{stage}/{dtype}"
        self.host_masks = workload.masks()
        self.masks = self.host_masks.to(settings.device)
        self.pixels = workload.pixels().to(settings.device)
        self.network = workload.model().to(settings.device)

    def model(self) -> nn.Module:
        return copy.deepcopy(self.network)

    def parity(self) -> dict[str, Any]:
        """Loss and gradient of every parameter, within the error budget of the plain PyTorch step."""
        ours = gradients(self.model(), self.pixels, self.masks)
        with jk.use_backend("reference"):
            eager = gradients(self.model(), self.pixels, self.masks)
            exact = gradients(self.model().double(), self.pixels.double(), self.masks)
        return verdict([testing.compare(n, ours[n], exact[n].to(ours[n].device), eager[n]) for n in exact])

    def steppers(self) -> dict[str, Stepper]:
        """Ours and the rivals: the reference, the same with SDPA (its best form), or with compiled blocks if named."""
        reference = partial(jk.use_backend, "reference")
        rivals = {"reference": reference, "sdpa": partial(jk.use_backend, "reference", masked_attention="sdpa")}
        wanted, found = self.settings.baseline, {OURS: self.stepper(self.model(), nullcontext)}
        if self.workload.compile and wanted == "compile":
            return {**found, "compile": self.stepper(with_compiled_blocks(self.model()), reference)}
        chosen = {n: b for n, b in rivals.items() if wanted in (None, n)}
        return {**found, **{n: self.stepper(self.model(), b) for n, b in chosen.items()}}

    def stepper(self, model: nn.Module, backend: Callable[[], AbstractContextManager]) -> Stepper:
        return Stepper(model, self.pixels, self.masks, backend)

    def common(self, parity: dict[str, Any]) -> Row:
        masks = self.host_masks
        return {
            "kind": "model",
            "name": self.name,
            "workload": self.workload.name,
            "pass": "step",
            "dtype": "float32",
            "device": self.settings.device,
            "backend": "automatic",
            "parity": parity,
            "bytes": None,
            "flops": self.workload.flops(masks),
            "threads": self.settings.threads,
            "images": masks.batch,
            "tokens": int(masks.context_lengths.sum() + masks.target_lengths.sum()),
        }

    def rows(self, drive: Callable[..., object] = timing.loop) -> list[Row]:
        """Measure. A red parity fails every row and times nothing."""
        common, steppers = self.common(self.parity()), self.steppers()
        names = [n for n in steppers if n != OURS]
        if not common["parity"]["pass"]:
            return self.finish([failed(common, n, "parity: outside the error budget") for n in names])
        s = self.settings
        times = timing.interleave(
            steppers,
            budget_s=4 * s.budget_s,
            rounds=(max(3, s.min_rounds // 2), 50),
            clock=timing.Clock(s.device),
            drive=drive,
        )
        memory = {} if times.interrupted else {n: peak_bytes(step, s.device) for n, step in steppers.items()}
        found = self.finish([self.row(common, n, steppers, times, memory) for n in names])
        if times.interrupted:
            raise Interrupted(found)
        return found

    def row(
        self, common: Row, name: str, steppers: dict[str, Stepper], times: timing.Times, memory: dict[str, int]
    ) -> Row:
        row = timed_row(common, name, times.of(OURS), times.of(name), times.interrupted)
        if row["ours_us"] is None:
            return row
        seconds = {who: row[f"{who}_us"]["p50"] / 1e6 for who in ("ours", "baseline")}
        extra = {
            "tokens_per_s": common["tokens"] / seconds["ours"],
            "baseline_tokens_per_s": common["tokens"] / seconds["baseline"],
            "share_of_peak": self.share(common["flops"] / seconds["ours"]),
            "peak_bytes": memory.get(OURS),
            "baseline_peak_bytes": memory.get(name),
        }
        if name == "reference":
            pair = {"ours": OURS, "reference": name}
            extra["parts"] = {who: steppers[n].parts.medians_us(times.rounds) for who, n in pair.items()}
        return {**row, **extra}

    def share(self, flops_per_s: float) -> float | None:
        if self.settings.peaks is None or self.settings.device != "cpu":
            return None
        return flops_per_s / 1e9 / self.settings.peaks["fma_gflops"]["float32"]

    def finish(self, found: list[Row]) -> list[Row]:
        s = self.settings
        blank = dict.fromkeys(("share_of_peak", "peak_bytes"))
        return [{**blank, **row, "repro": repro(key(row), s.device, s.threads)} for row in found]


def gradients(model: nn.Module, pixels: Tensor, masks: Any) -> dict[str, Tensor]:
    """The loss, and the gradient of every trained parameter by name."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = model.loss(pixels, masks)
    found = torch.autograd.grad(loss, list(trained.values()))
    return {"loss": loss.detach(), **{f"d{n}": g for n, g in zip(trained, found, strict=True)}}


def with_compiled_blocks(model: nn.Module) -> nn.Module:
    """Block by block: a whole step would compile for minutes, and blocks are nearly all of its time."""
    for block in (m for m in model.modules() if isinstance(m, Block)):
        block.compile(dynamic=False)
    return model
