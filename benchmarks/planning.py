"""A plan into rows: the cross-entropy method in a world model, against its authors' form with the same weights."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import jepa_kernels as jk
from benchmarks.measure import OURS, RIVAL_TOLERANCE, Settings, as_published, verdict
from benchmarks.modelrun import ModelRun
from benchmarks.models.published_vjepa2_ac import Published
from jepa_kernels import planning, testing
from jepa_kernels.models.vjepa2_ac import WorldModel
from jepa_kernels.models.world import Context

OPTIONS = {name: value for name, value in planning.PUBLISHED["vjepa2_ac"].items() if name != "elites"}


@dataclass(frozen=True)
class Planning:
    """A plan of one size, with the published settings of V-JEPA 2-AC but for the counts.

    name      as in the row
    model     model() -> the world, with the same weights at every call
    flops     flops(workload), those of our form, a multiply-add being two
    rival_iterations  of the rivals' plans, where whole ones take half a minute; their iterations are all alike, and the
              time is stated as if of all
    rivals    "published": in fp32, as its authors run it; "published_autocast": under autocast to the row's dtype
    small     a plan of the same kind on which parity is checked
    """

    name: str
    model: Callable[[], WorldModel]
    samples: int
    horizon: int
    iterations: int
    flops: Callable[["Planning"], float]
    elites: int = 10
    rival_iterations: int | None = None
    rivals: tuple[str, ...] = ("published",)
    small: "Planning | None" = None
    dtypes: tuple[str, ...] = ("float32",)
    devices: tuple[str, ...] = ("cpu",)
    smoke: bool = False
    stages: ClassVar[tuple[str, ...]] = ("forward",)


class Task:
    """A world with one frame seen, a goal and the noise of a plan, on a device."""

    def __init__(self, workload: Planning, device: str):
        w, generator = workload, torch.Generator().manual_seed(0)
        self.rival_iterations = w.rival_iterations
        draw = partial(torch.randn, generator=generator)
        self.model = w.model().to(device).eval()
        frame = 2, self.model.grid[0] * self.model.grid[1], self.model.config.embed_dim
        now, self.goal = torch.nn.functional.layer_norm(draw(frame), frame[-1:]).to(device)
        self.context = Context(now[None], None, (draw(1, 7) * 0.3).to(device))
        self.noise = draw(w.iterations, w.samples, w.horizon, 4).to(device)
        counts = dict(samples=w.samples, horizon=w.horizon, iterations=w.iterations, elites=w.elites)
        self.options = {**OPTIONS, **counts}

    def plan(self) -> Tensor:
        return planning.cem(self.model, self.context, self.goal, noise=self.noise, **self.options).actions

    def published(self) -> Callable[[], Tensor]:
        rival, noise = Published(self.model), self.noise[: self.rival_iterations]
        return as_published(lambda: rival.cem(self.context, self.goal, noise, self.options["elites"]))

    def latents(self, double: bool = False) -> Tensor:
        """What the noise's actions, all small, lead to."""
        model, c = self.model, self.context
        actions = planning.without_rotation(self.noise[0] * 0.05)
        if double:
            model, actions = copy.deepcopy(model).double(), actions.double()
            c = Context(c.latents.double(), None, None if c.states is None else c.states.double())
        return model.imagine(c, len(actions), actions.shape[1])(actions)


class PlanningRun(ModelRun):
    """Our planner, against its authors'."""

    kind = "planning"

    def __init__(self, name: str, workload: Planning, stage: str, dtype: str, settings: Settings):
        super().__init__(name, workload, stage, dtype, settings)
        self.rivals = workload.rivals
        self.checked = Task(workload.small or workload, settings.device)

    def low(self) -> AbstractContextManager:
        """Autocast to the row's dtype, where that is not fp32."""
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.settings.device, dtype=dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def parity(self) -> dict[str, Any]:
        """Imagined latents, within the error budget of plain PyTorch."""
        with self.low():
            ours = self.checked.latents()
            with jk.use_backend("reference"):
                eager = self.checked.latents()
        with jk.use_backend("reference"):
            exact = self.checked.latents(double=True)
        return verdict([testing.hold("latents", ours, exact, eager)])

    @torch.no_grad()
    def rival_error(self) -> str | None:
        """Why the rival's time would mean nothing: from the same noise it plans other actions."""
        ours, theirs = self.checked.plan(), self.checked.published()()
        error = (theirs - ours).norm() / ours.norm()
        return None if error <= RIVAL_TOLERANCE[torch.float32] else f"its actions differ by {error:.2g} of their norm"

    def functions(self) -> dict[str, Callable[[], object]]:
        """Ours and the rivals, or the one that is asked for."""
        task, wanted = Task(self.workload, self.settings.device), self.settings.baseline
        published = task.published()

        def under(function: Callable[[], object]) -> object:
            with torch.no_grad(), self.low():
                return function()

        found = {"published": torch.no_grad()(published), "published_autocast": partial(under, published)}
        rivals = {n: found[n] for n in self.rivals if wanted in (None, n)}
        return {OURS: partial(under, task.plan), **rivals}

    def tokens_of_call(self, name: str) -> float:
        """The part of a plan that a call is."""
        w = self.workload
        return 1 if name == OURS or w.rival_iterations is None else w.rival_iterations / w.iterations

    def counted(self) -> dict[str, Any]:
        return dict(flops=self.workload.flops(self.workload))
