"""Planning by gradients through the world."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jepa_kernels._core.check import fail, is_number, is_positive
from jepa_kernels.models.world import Context, World
from jepa_kernels.planning.costs import Cost
from jepa_kernels.planning.graphs import steps
from jepa_kernels.planning.plan import Plan
from jepa_kernels.planning.problem import Problem
from jepa_kernels.planning.space import ActionSpace


class Descent(NamedTuple):
    """All starts [S, H, D] with their moments of gradients; and the best so far [H, D] with its energy []."""

    starts: Tensor
    first: Tensor
    second: Tensor
    best: Tensor
    lowest: Tensor


def gradient(
    world: World,
    context: Context,
    goal: Tensor | None = None,
    *,
    cost: Cost | None = None,
    horizon: int,
    samples: int = 1,
    iterations: int,
    lr: float,
    optimizer: str = "adam",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    space: ActionSpace = ActionSpace(),  # noqa: B008 (immutable)
    include_mean: bool = True,
    mean: Tensor | None = None,
    seed: int = 0,
    noise: Tensor | None = None,
    batch: int | None = None,
) -> Plan:
    """Search the actions whose imagined future costs least, by gradients through `world.unroll`, from S starts.

    Each start a = mean + std * noise goes its own way, clipped after each step; the one that cost least at any time is
    the plan. As `cem`, whose other arguments it takes; the cost must be differentiable.

    optimizer: "sgd": a <- a - lr g; "adam", with betas and eps, without weight decay.
    lr: > 0. iterations: evaluations; a step is taken between each two.
    noise: [S, H, D]. include_mean: the first start is the mean itself.

    A start whose energy is NaN or -inf, or whose gradient is not finite, stays where it is and loses, as of
    infinite energy; `Plan.invalid` counts it. One of infinite energy and finite gradient goes on.
    Memory: activations of `batch` unrolls. Freeze the world's parameters (`requires_grad_(False)`): what only their
    gradients need is not kept then.
    Source: JEPA-WMs (arXiv:2512.24497).
    """
    problem = Problem("gradient", world, context, goal, cost, space, horizon, samples, batch)
    problem.check()
    problem.check_count("iterations", iterations)
    if optimizer not in ("adam", "sgd"):
        fail("gradient", "optimizer", "be adam or sgd", repr(optimizer), "leave it out for adam")
    if not is_positive(lr):
        fail("gradient", "lr", "be finite and greater than 0", lr, "try 0.1 of the actions' std")
    if not (len(betas) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in betas)):
        fail("gradient", "betas", "be two numbers in [0, 1)", betas, "(0.9, 0.999) is usual")
    if not (is_number(eps) and eps >= 0):
        fail("gradient", "eps", "be at least 0", eps, "1e-8 is usual")
    if torch.is_inference_mode_enabled():
        remedy = "encode and plan under torch.no_grad()"
        fail("gradient", "torch.inference_mode", "be off, as it has no gradients", "on", remedy, RuntimeError)
    first = _first(problem, mean, noise, seed, include_mean)
    constrained = problem.constrained()

    def step(scales: Tensor, old: Descent) -> tuple[Descent, Tensor]:
        energies, grad = _slopes(problem, old.starts)
        valid = (energies > -torch.inf) & grad.isfinite().flatten(1).all(1)
        energies = energies.masked_fill(~valid, torch.nan)
        change, m, v = grad, old.first, old.second
        if optimizer == "adam":
            m, v = torch.lerp(grad, m, betas[0]), torch.lerp(grad.square(), v, betas[1])
            change = m / scales[0] / ((v / scales[1]).sqrt() + eps)
        value, place = energies.nan_to_num(torch.inf, torch.inf).min(0, keepdim=True)
        better = value < old.lowest
        best = torch.where(better, old.starts[place][0], old.best)
        lowest = torch.where(better, value, old.lowest)
        moved = constrained(old.starts - lr * change), m, v
        starts, m, v = (torch.where(valid[:, None, None], new, was) for new, was in zip(moved, old[:3], strict=True))
        return Descent(starts, m, v, best, lowest), energies

    with torch.no_grad():
        taken = torch.arange(1, iterations + 1, device=first.device, dtype=torch.float64)[:, None]
        decays = torch.stack([1 - beta**taken for beta in betas], 1).to(first)  # [iterations, 2, 1]
        starts = constrained(first)
        zeros = torch.zeros_like(starts)
        descent = Descent(starts, zeros, zeros, starts[0], starts.new_full((1,), torch.inf))
        last, energies = steps(step, decays, descent, graph=False)
        spread = last.starts.std(0, correction=0)
        return problem.plan(problem.imagined(1), last.best, energies, last.best, spread)


def _first(problem: Problem, mean: Tensor | None, noise: Tensor | None, seed: int, include_mean: bool) -> Tensor:
    """The starts, [S, H, D]."""
    shape = problem.samples, problem.horizon, problem.dims
    mean, noise = problem.given("mean", mean, *shape[1:]), problem.given("noise", noise, *shape)
    mean = problem.empty.new_zeros(shape[1:]) if mean is None else mean
    if noise is None:
        generator = torch.Generator(mean.device).manual_seed(seed)
        noise = mean.new_empty(shape).normal_(generator=generator)
    if include_mean:
        noise = noise.clone()
        noise[0].zero_()
    return noise * problem.std() + mean


def _slopes(problem: Problem, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Energies [S] and their gradients [S, H, D]."""
    energies, grads = [], []
    for part in starts.split(problem.batch or len(starts)):
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            found = problem.energy(*problem.future(lambda a: problem.world.unroll(problem.context, a), part))
            (grad,) = torch.autograd.grad(found.sum(), part)
        energies.append(found.detach())
        grads.append(grad)
    return torch.cat(energies), torch.cat(grads)
