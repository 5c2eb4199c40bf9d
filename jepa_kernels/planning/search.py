"""Search by drawing: what CEM and MPPI share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.models.world import Context
from jepa_kernels.planning import graphs
from jepa_kernels.planning.graphs import PlanGraph
from jepa_kernels.planning.plan import Plan
from jepa_kernels.planning.problem import Problem


class Distribution(NamedTuple):
    """Of the numbers drawn; and the best sample so far [H, D] with its energy []."""

    mean: Tensor
    std: Tensor
    best: Tensor
    lowest: Tensor


# elites [K, H, D], best first, their energies [K], which of them lost [K] and how many [1], the old distribution ->
# mean, std. Those that lost come last, with zeros for numbers and an infinite energy.
Update = Callable[[Tensor, Tensor, Tensor, Tensor, Distribution], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Search:
    """Draw, imagine, and move the distribution to the elites, `iterations` times.

    update: makes the planner's own `Update` for a problem. settings: its numbers.
    """

    problem: Problem
    iterations: int
    elites: int
    update: Callable[[Problem], Update]
    settings: tuple[object, ...]
    sampling: str
    include_mean: bool
    returns: str

    def check(self) -> None:
        """All options, before anything is computed."""
        problem, name = self.problem, self.problem.planner
        problem.check(least_samples=2)
        problem.check_count("iterations", self.iterations)
        problem.check_count("elites", self.elites, 2, problem.samples)
        if self.sampling not in ("joint", "steps"):
            fail(name, "sampling", "be joint or steps", repr(self.sampling), "leave it out for joint")
        if self.returns not in ("mean", "best"):
            fail(name, "returns", "be mean or best", repr(self.returns), "leave it out for the mean")

    def noise(self, seed: int) -> Tensor:
        """[iterations, S, H, D], standard normal, all of it before the first iteration."""
        problem = self.problem
        shape = self.iterations, problem.horizon, problem.samples, problem.dims
        noise = problem.empty.new_empty(shape)
        generator = torch.Generator(noise.device).manual_seed(seed)
        for draw in noise.flatten(0, 1) if self.sampling == "steps" else noise:
            draw.normal_(generator=generator)
        return noise.transpose(1, 2)

    def run(self, mean: Tensor | None, noise: Tensor | None, seed: int, graph: bool | PlanGraph) -> Plan:
        """From the first mean [H, D] (None: 0) and the noise (None: of the seed)."""
        self.check()
        p = self.problem
        graphs.check_graph(p.planner, graph, p.context.latents.device)
        moments = p.horizon, p.dims
        mean = p.given("mean", mean, *moments)
        noise = p.given("noise", noise, self.iterations, p.samples, *moments)
        mean = p.empty.new_zeros(moments) if mean is None else mean
        noise = self.noise(seed) if noise is None else noise
        if not isinstance(graph, PlanGraph):
            return self.found(mean, noise, graph)
        settings = (p.world, p.cost, p.space, p.batch, self.elites, *self.settings, self.include_mean, self.returns)
        inputs = [getattr(p.context, name) for name in p.context.__dataclass_fields__]
        return graph.run(p.planner, settings, [*inputs, p.goal, mean, noise], self._found_from)

    def _found_from(self, *inputs: Tensor) -> Plan:
        *context, goal, mean, noise = inputs
        problem = replace(self.problem, context=Context(*context), goal=goal)
        return replace(self, problem=problem).found(mean, noise, graph=False)

    @torch.no_grad()
    def found(self, mean: Tensor, noise: Tensor, graph: bool) -> Plan:
        """The plan."""
        problem = self.problem
        noise = noise.contiguous()
        if self.include_mean:
            noise = noise.index_fill(1, noise.new_zeros(1, dtype=torch.long), 0)
        constrained, update, std = problem.constrained(), self.update(problem), problem.std().expand_as(mean)
        imagined = problem.imagined(problem.samples)

        def step(noise: Tensor, old: Distribution) -> tuple[Distribution, Tensor]:
            samples = constrained(noise * old.std + old.mean)
            energies = problem.energies(imagined, samples)
            return self._moved(samples, energies, old, update), energies

        first = Distribution(mean, std, mean, mean.new_full((), torch.inf))
        last, energies = graphs.steps(step, noise, first, graph)
        chosen = last.mean if self.returns == "mean" else last.best
        return problem.plan(imagined, chosen, energies, last.mean, last.std)

    def _moved(self, samples: Tensor, energies: Tensor, old: Distribution, update: Update) -> Distribution:
        values, order = energies.nan_to_num(*[torch.inf] * 3).topk(self.elites, largest=False)
        lost = values == torch.inf
        elites, count = samples[order].masked_fill(lost[:, None, None], 0), lost.sum(0, keepdim=True)
        mean, std = update(elites, values, lost, count, old)
        better = values[0] < old.lowest
        return Distribution(
            torch.where(count < self.elites, mean, old.mean),
            torch.where(count < self.elites - 1, std, old.std),
            torch.where(better, elites[0], old.best),
            torch.where(better, values[0], old.lowest),
        )
