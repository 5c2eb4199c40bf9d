"""What all planners share: the question, checked once, and the energy of an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from jepa_kernels._core.check import check_tensor, fail, is_number
from jepa_kernels.models.world import Context, World
from jepa_kernels.planning import costs
from jepa_kernels.planning.plan import Plan
from jepa_kernels.planning.space import ActionSpace, Numbers

Imagined = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Find actions [horizon, D] of `space` whose future in `world`, from `context` on, costs least."""

    planner: str
    world: World
    context: Context
    goal: Tensor | None
    cost: costs.Cost | None
    space: ActionSpace
    horizon: int
    samples: int
    batch: int | None

    def check(self, least_samples: int = 1) -> None:
        """Everything that is known before a tensor is computed."""
        if not isinstance(self.context, Context):
            actual = type(self.context).__name__
            fail(self.planner, "context", "be a Context", actual, "pass models.world.Context(latents)", TypeError)
        check_tensor(self.planner, "context.latents", self.context.latents, "T N E")
        if (self.goal is None) == (self.cost is None):
            given = "neither" if self.cost is None else "both"
            remedy = "put goal_distance(goal) into costs.weighted" if self.goal is not None else "pass a goal"
            fail(self.planner, "goal", "be given, or a cost, not both", given, remedy)
        self.check_count("horizon", self.horizon)
        self.check_count("samples", self.samples, least_samples)
        if self.batch is not None:
            self.check_count("batch", self.batch)

    def check_count(self, name: str, value: Any, least: int = 1, most: int | None = None) -> None:
        """An int of at least `least`, and at most `most`."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (most is not None and value > most):
            wanted = f"be a whole number of at least {least}" if most is None else f"lie in {least}..{most}"
            fail(self.planner, name, wanted, repr(value), f"{least} is the least")

    def check_shape(self, name: str, wanted: str, value: Any, shape: tuple[int, ...], remedy: str) -> Tensor:
        """A tensor of this shape; wanted: what is asked of it, before the shape."""
        if not isinstance(value, Tensor) or value.shape != shape:
            actual = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            fail(self.planner, name, f"{wanted} {shape}", actual, remedy)
        return value

    @property
    def dims(self) -> int:
        """D: as many as `space` has numbers for; else the world's action dim."""
        given = [len(x) for x in (self.space.std, self.space.limit) if isinstance(x, Sequence)]
        found = given[0] if given else self.world.action_dim
        if self.space.to_world is None and found != self.world.action_dim:
            wanted = f"have world.action_dim = {self.world.action_dim} numbers a step"
            fail(self.planner, "space", wanted, found, "give it to_world, or as many numbers")
        return found

    @property
    def empty(self) -> Tensor:
        """Of the dtype and device that the search takes place in: float32, for float64 latents float64."""
        latents = self.context.latents
        return latents.new_empty(0, dtype=torch.float64 if latents.dtype == torch.float64 else torch.float32)

    def numbers(self, name: str, values: Numbers, most: float = math.inf) -> list[float]:
        """One for each dimension, in 0..most."""
        each = cast(Any, [values] * self.dims if is_number(values) else values)
        numbers = [float(x) if is_number(x) else math.nan for x in each] if isinstance(each, Iterable) else []
        if len(numbers) != self.dims:
            actual = len(numbers) if isinstance(each, Iterable) else repr(values)
            fail(self.planner, name, f"be a number or {self.dims} of them", actual, "pass one for each dimension")
        if not all(0 <= x <= most for x in numbers):
            fail(self.planner, name, f"lie in 0..{most:g}", values, "it is a size, of either sign")
        return numbers

    def vector(self, numbers: list[float]) -> Tensor:
        """[D], written on the device: a copy from the host would wait for it."""
        vector = self.empty.new_empty(len(numbers))
        for dim, value in enumerate(numbers):
            vector[dim].fill_(value)
        return vector

    def std(self) -> Tensor:
        """Of the first distribution, [D]."""
        return self.vector(self.numbers("space.std", self.space.std))

    def given(self, name: str, value: Tensor | None, *shape: int) -> Tensor | None:
        """A tensor of the caller, of this shape, on the device and in the dtype of the search."""
        if value is None:
            return None
        remedy = "leave it out for the usual one"
        return self.check_shape(name, "be a tensor of shape", value, shape, remedy).to(self.empty)

    def constrained(self) -> Callable[[Tensor], Tensor]:
        """What `space` makes of samples [S, H, D]."""
        limit = None
        if self.space.limit is not None:
            limit = self.vector(self.numbers("space.limit", self.space.limit))
        lowest = None if limit is None else -limit

        def constrained(samples: Tensor) -> Tensor:
            samples = samples if limit is None else samples.clamp(lowest, limit)
            for change in self.space.constrain:
                shape = tuple(samples.shape)
                samples = self.check_shape("space.constrain", "give", change(samples), shape, "change values alone")
            return samples

        return constrained

    def imagined(self, samples: int) -> Imagined:
        """The world, prepared to imagine at most `samples` samples at once."""
        return self.world.imagine(self.context, min(samples, self.batch or samples), self.horizon)

    def energies(self, imagined: Imagined, samples: Tensor) -> Tensor:
        """[S] of samples [S, H, D]; `batch` of them are imagined at a time."""
        parts = samples.split(self.batch or len(samples))
        return torch.cat([self.energy(*self.future(imagined, part)) for part in parts])

    def future(self, imagined: Imagined, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Imagined latents [S, H, N, E], and the world's actions [S, H, A]."""
        actions = samples if self.space.to_world is None else self.space.to_world(samples)
        steps = (len(samples), self.horizon)
        wanted = (*steps, self.world.action_dim)
        actions = self.check_shape("space.to_world", "give", actions, wanted, "one action for each step")
        latents, frames = imagined(actions.to(self.context.latents.dtype)), (*steps, *self.context.latents.shape[1:])
        return self.check_shape("world", "imagine latents", latents, frames, "one frame for each step"), actions

    def energy(self, latents: Tensor, actions: Tensor) -> Tensor:
        """[S], the cost."""
        cost = costs.goal_distance(cast(Tensor, self.goal)) if self.cost is None else self.cost
        energies, wanted = cost(latents, actions), "give one energy a sample,"
        return self.check_shape("cost", wanted, energies, (len(actions),), "reduce over the rest").to(self.empty)

    def plan(self, imagined: Imagined, chosen: Tensor, energies: Tensor, *moments: Tensor) -> Plan:
        """The plan of the numbers chosen, [H, D]; energies [iterations, S] of all samples."""
        if self.space.finish is not None:
            shape = tuple(chosen.shape)
            chosen = self.check_shape("space.finish", "give", self.space.finish(chosen), shape, "change values alone")
        latents, actions = self.future(imagined, chosen[None])
        invalid = energies.isnan() | energies.isneginf()
        energies = energies.masked_fill(invalid, math.inf)
        return Plan(actions[0], latents[0], self.energy(latents, actions)[0], energies, invalid.sum(1), *moments)
