"""The cross-entropy method."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_kernels.models.world import Context, World
from jepa_kernels.planning.costs import Cost
from jepa_kernels.planning.graphs import PlanGraph
from jepa_kernels.planning.plan import Plan
from jepa_kernels.planning.problem import Problem
from jepa_kernels.planning.search import Distribution, Search, Update
from jepa_kernels.planning.space import ActionSpace, Numbers


def cem(
    world: World,
    context: Context,
    goal: Tensor | None = None,
    *,
    cost: Cost | None = None,
    horizon: int,
    samples: int,
    iterations: int,
    elites: int,
    momentum_mean: Numbers = 0.0,
    momentum_std: Numbers = 0.0,
    space: ActionSpace = ActionSpace(),  # noqa: B008 (immutable)
    sampling: str = "joint",
    include_mean: bool = False,
    returns: str = "mean",
    mean: Tensor | None = None,
    seed: int = 0,
    noise: Tensor | None = None,
    batch: int | None = None,
    graph: bool | PlanGraph = False,
) -> Plan:
    """Search the actions whose imagined future costs least, by the cross-entropy method.

    `iterations` times: draw S sequences of actions, imagine them all, and move the distribution to the K that cost
    least:

        a[s] = clip(mean + std * noise[s]),   mean <- m mean + (1 - m) mean_K(a),   std <- m' std + (1 - m') std_K(a)

    std_K is unbiased. Everything happens on the world's device, in float32 (float64 for float64 latents), with no wait
    for it. The same seed, on the same device, gives the same plan.

    world, context: what imagines, and what it has seen so far (`jepa_kernels.models.world`).
    goal [N, E]: a frame's latents to arrive at, by `costs.goal_distance`, L1 of the last frame. Or
    cost: any function of imagined latents [S, H, N, E] and actions [S, H, A] -> [S] (`planning.costs`).
    horizon H, iterations: at least 1. samples S: at least 2. elites K: 2..S.
    momentum_mean, momentum_std: m and m' in 0..1, a number or one for each dimension.
    space: how actions are drawn, clipped and shown to the world (`ActionSpace`).
    sampling: "joint": noise is drawn for an iteration at a time, as by JEPA-WMs; "steps": for a step at a time, as by
        V-JEPA 2-AC: from the same seed the same numbers as theirs. All of it before the first iteration.
    include_mean: the first sample of each iteration is the mean itself (JEPA-WMs, LeWorldModel).
    returns: "mean": the last mean, as published; "best": the sample that cost least of all iterations.
    mean [H, D]: the first one; None: 0. `Plan.shifted` gives that of the previous plan.
    seed: an int; or noise [iterations, S, H, D], used as it is.
    batch: so many samples are imagined at a time; None: all at once.
    graph: on CUDA. True: the first iteration records a CUDA graph, which the others replay. A `PlanGraph`: the whole
        plan is one, replayed by every later call.

    A sample of NaN or infinite energy, of either sign, loses. Where fewer than K are finite, mean_K and std_K are those
    of the finite ones alone, std_K with their number less 1; where one or none is, std or both stay. `Plan.invalid`
    counts NaN and -inf: what no cost should give.

    No gradient: `gradient` plans with one. Raises ValueError for options that are out of range or do not fit each
    other, for a goal, cost or world of other shapes; and what the world raises, as for a horizon beyond its frames.
    Published settings: `PUBLISHED`. Source: V-JEPA 2 (arXiv:2506.09985) section 4; JEPA-WMs (arXiv:2512.24497).
    """
    problem = Problem("cem", world, context, goal, cost, space, horizon, samples, batch)
    momenta = momentum_mean, momentum_std

    def update(problem: Problem) -> Update:
        return _towards_elites(problem, elites, *momenta)

    search = Search(problem, iterations, elites, update, momenta, sampling, include_mean, returns)
    return search.run(mean, noise, seed, graph)


def _towards_elites(problem: Problem, elites: int, momentum_mean: Numbers, momentum_std: Numbers) -> Update:
    of_mean = _momentum(problem, "momentum_mean", momentum_mean)
    of_std = _momentum(problem, "momentum_std", momentum_std)
    # By how many lost: from a mean, and a std, over all K places to those of the others. For none exactly 1.
    left = torch.arange(elites, -1, -1, dtype=problem.empty.dtype, device=problem.empty.device)
    to_mean, to_std = left[:1] / left, ((left[:1] - 1) / (left - 1)).sqrt()

    def update(best: Tensor, energies: Tensor, lost: Tensor, count: Tensor, old: Distribution) -> tuple[Tensor, Tensor]:
        mean = best.mean(0) * to_mean[count]
        best = torch.where(lost[:, None, None], mean, best)  # nothing to the sum of squares
        std = best.std(0) * to_std[count]
        return _mixed(mean, old.mean, of_mean), _mixed(std, old.std, of_std)

    return update


def _momentum(problem: Problem, name: str, values: Numbers) -> tuple[Tensor, Tensor] | None:
    """m and 1 - m of each dimension; None for 0."""
    momenta = problem.numbers(name, values, most=1.0)
    if not any(momenta):
        return None
    return problem.vector(momenta), problem.vector([1 - m for m in momenta])


def _mixed(new: Tensor, old: Tensor, momentum: tuple[Tensor, Tensor] | None) -> Tensor:
    return new if momentum is None else new * momentum[1] + old * momentum[0]
