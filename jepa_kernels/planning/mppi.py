"""Model-predictive path integral control."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from jepa_kernels._core.check import fail, is_number, is_positive
from jepa_kernels.models.world import Context, World
from jepa_kernels.planning.costs import Cost
from jepa_kernels.planning.graphs import PlanGraph
from jepa_kernels.planning.plan import Plan
from jepa_kernels.planning.problem import Problem
from jepa_kernels.planning.search import Distribution, Search
from jepa_kernels.planning.space import ActionSpace


def mppi(
    world: World,
    context: Context,
    goal: Tensor | None = None,
    *,
    cost: Cost | None = None,
    horizon: int,
    samples: int,
    iterations: int,
    elites: int | None = None,
    temperature: float = 1.0,
    std_range: tuple[float, float] = (0.0, float("inf")),
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
    """Search the actions whose imagined future costs least, by averages weighted with what samples cost.

    As `cem`, whose other arguments it takes, but of the K that cost least, with energies J:

        w = exp(-(J - min J) / temperature) / sum,   mean <- sum w a,   std <- sqrt(sum w (a - mean)^2), clipped

    elites K: 2..S; None: all samples, as in the original.
    temperature: > 0; the lower, the more the best sample counts. TD-MPC2 and JEPA-WMs multiply by theirs instead: their
        0.5 is 2.0 here.
    std_range: that std is clipped to; (s, s) keeps it at s, as in the original. TD-MPC2: (0.05, 2.0).

    A sample of NaN or infinite energy, of either sign, has no weight; with one or none left std or both stay.
    Source: Williams et al. (arXiv:1707.02342); with elites, TD-MPC2 (arXiv:2310.16828).
    """
    problem = Problem("mppi", world, context, goal, cost, space, horizon, samples, batch)
    if not is_positive(temperature):
        fail("mppi", "temperature", "be finite and greater than 0", temperature, "1.0 is usual")
    pair = isinstance(std_range, Sequence) and len(std_range) == 2 and all(map(is_number, std_range))
    if not pair or not 0 <= std_range[0] <= std_range[1]:
        fail("mppi", "std_range", "be two numbers, 0 or more, in order", std_range, "leave it out for no bounds")

    def update(best: Tensor, energies: Tensor, lost: Tensor, count: Tensor, old: Distribution) -> tuple[Tensor, Tensor]:
        weights = ((energies[0] - energies) / temperature).exp()
        weights = (weights / weights.sum())[:, None, None]
        mean = (weights * best).sum(0)
        return mean, (weights * (best - mean).square()).sum(0).sqrt().clamp(*std_range)

    kept = samples if elites is None else elites
    settings = temperature, std_range
    search = Search(problem, iterations, kept, lambda _: update, settings, sampling, include_mean, returns)
    return search.run(mean, noise, seed, graph)
