"""A step on views of several sizes into rows: parity of the loss and every gradient first, then time and memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import jepa_kernels as jk
from benchmarks import timing
from benchmarks.measure import OURS, RIVAL_TOLERANCE, Settings, as_published, verdict
from benchmarks.modelrun import ModelRun
from benchmarks.rows import Row
from benchmarks.step import gradients
from jepa_kernels import testing
from jepa_kernels.models.jepa import train_step
from jepa_kernels.models.lejepa import LeJEPA

LEARNING_RATE = 1e-4
Stacks = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Crops:
    """A training step of LeJEPA of one size.

    name      as in the row
    model     model() -> the network, with the same weights at every call
    recipe    recipe() -> the rival, an eager one with these weights
    views     views() -> uint8 [B, G, C, H, W] and [B, L, C, h, w], global and local ones
    tokens    of all views of the batch
    flops     of one step, a multiply-add being two
    small     a step of the same kind on which parity is checked: in float64 this one takes seconds
    smoke     part of the one-minute run
    """

    name: str
    model: Callable[[], LeJEPA]
    recipe: Callable[[], LeJEPA]
    views: Callable[[], Stacks]
    tokens: int
    flops: float
    small: "Crops | None" = None
    smoke: bool = False
    stages: ClassVar[tuple[str, ...]] = ("step",)
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)


class Stepper:
    """One contestant: its own model and optimiser. A call is a training step."""

    def __init__(self, model: LeJEPA, views: Stacks):
        self.model, self.views = model, views
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05, fused=True)

    def __call__(self) -> None:
        train_step(self.model, self.optimizer, *self.views)


class CropsRun(ModelRun):
    """All views in one packed pass, against a batch for each size."""

    rivals = ("recipe",)

    def __init__(self, name: str, workload: Crops, stage: str, dtype: str, settings: Settings):
        super().__init__(name, workload, stage, dtype, settings)
        self.checked = workload.small or workload

    def parity(self) -> dict[str, Any]:
        """Loss and gradient of every parameter, within the error budget of the plain PyTorch step."""
        views = self.checked.views()
        ours = gradients(self.checked.model(), *views)
        with jk.use_backend("reference"):
            eager = gradients(self.checked.model(), *views)
            exact = gradients(self.checked.model().double(), *in_double(views))
        return verdict([testing.hold(n, ours[n], exact[n], eager[n]) for n in exact])

    def rival_error(self) -> str | None:
        """Why the recipe's time would mean nothing: its loss or a gradient is another than ours."""
        views = self.checked.views()
        ours = gradients(self.checked.model(), *views)
        theirs = as_published(gradients)(self.checked.recipe(), *views)
        least = max(float(g.norm()) for g in ours.values()) * 1e-4  # biases before batch norms have none but roundings
        for name, wanted in ours.items():
            error = float((theirs[name] - wanted).norm() / wanted.norm().clamp_min(least))
            if not error <= RIVAL_TOLERANCE[torch.float32]:
                return f"{name} differs by {error:.2g} of its norm"
        return None

    def counted(self) -> dict[str, Any]:
        return dict(flops=self.workload.flops, images=len(self.workload.views()[0]), tokens=self.workload.tokens)

    def functions(self) -> dict[str, Callable[[], object]]:
        views = self.workload.views()
        ours, recipe = (Stepper(build(), views) for build in (self.workload.model, self.workload.recipe))
        found = {OURS: ours, "recipe": as_published(recipe)}
        for step in found.values():  # makes the optimiser's state
            step()
        return found

    def rates(self, common: Row, name: str, times: timing.Times) -> dict[str, Any]:
        ours, theirs = (common["tokens"] / float(np.median(times.of(n))) for n in (OURS, name))
        return {**super().rates(common, name, times), "tokens_per_s": ours, "baseline_tokens_per_s": theirs}


def in_double(views: Stacks) -> tuple[Tensor, ...]:
    return tuple(view.double() / 255 for view in views)
