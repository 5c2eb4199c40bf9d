"""Costs by hand, by their gradients, and by what plans do under them."""

import math
import re

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.models.world import Context
from jepa_kernels.planning import ActionSpace, costs
from tests.planning.worlds import Point

GOAL = torch.tensor([[3.0, 4.0]])
LATENTS = torch.tensor([[[[0.0, 0.0]], [[3.0, 0.0]]], [[[3.0, 4.0]], [[6.0, 8.0]]]])  # [2 samples, 2 frames, 1, 2]
ACTIONS = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]]])


@pytest.mark.parametrize(
    "kind, frames, expected",
    [
        ("l1", "last", [2.0, 3.5]),
        ("l2", "last", [8.0, 12.5]),
        ("cosine", "last", [0.4, 0.0]),
        ("l1", "all", [2.75, 1.75]),
        ("l2", "all", [10.25, 6.25]),
    ],
)
def test_distances_by_hand(kind, frames, expected):
    found = costs.goal_distance(GOAL, kind, frames=frames)(LATENTS, ACTIONS)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_distances_are_means_over_tokens_and_channels_in_fp32():
    """bf16 latents of many channels, near the goal: the difference is not lost to rounding."""
    goal = torch.randn(50, 64).bfloat16()
    latents = goal + torch.randn(3, 2, 50, 64).bfloat16() / 8
    for kind in ("l1", "l2", "cosine"):
        found = costs.goal_distance(goal, kind)(latents, ACTIONS)
        exact = costs.goal_distance(goal.double(), kind)(latents.double(), ACTIONS)
        assert found.dtype == torch.float32 and exact.dtype == torch.float64
        torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=1e-9)


def test_effort_critic_and_sums_by_hand():
    assert costs.effort(LATENTS, ACTIONS).tolist() == [2.5, 5.0]
    value = costs.critic(lambda last: last.sum((1, 2)))
    assert value(LATENTS, ACTIONS).tolist() == [-3.0, -14.0]
    column = costs.critic(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 1)))
    assert column(LATENTS, ACTIONS).shape == (2,)
    with pytest.raises(
        ValueError, match=r"^critic: value must give one number a sample, \(2,\) or \(2, 1\), got \(2, 2\); "
    ):
        costs.critic(lambda last: last[:, 0])(LATENTS, ACTIONS)
    total = costs.weighted((2.0, costs.goal_distance(GOAL)), (0.5, costs.effort), (1.0, value))
    assert total(LATENTS, ACTIONS).tolist() == [4 + 1.25 - 3, 7 + 2.5 - 14]


def test_a_guardrail_by_hand():
    def clearance(latents):
        return latents[:, :, 0].norm(dim=-1) - 4  # a disc of radius 4 around 0

    inside = costs.guardrail(clearance)
    assert inside(LATENTS, ACTIONS).tolist() == [4 + 1, 0.0]
    assert costs.guardrail(clearance, margin=2)(LATENTS, ACTIONS).tolist() == [6 + 3, 1.0]
    assert costs.guardrail(clearance, hard=True)(LATENTS, ACTIONS).tolist() == [math.inf, 0.0]
    assert costs.guardrail(clearance, margin=2, hard=True)(LATENTS, ACTIONS).tolist() == [math.inf, math.inf]


def test_a_cost_of_weight_0_counts_nothing():
    """Infinite ones too; alone it has a gradient still, of 0."""
    actions = ACTIONS.clone().requires_grad_()
    forbidden = costs.guardrail(lambda z: -z.abs().sum((2, 3)) - 1, hard=True)
    assert forbidden(LATENTS, actions).isinf().all()
    assert costs.weighted((0.0, forbidden), (1.0, costs.effort))(LATENTS, actions).tolist() == [2.5, 5.0]
    alone = costs.weighted((0, forbidden))(LATENTS, actions)
    alone.sum().backward()
    assert alone.tolist() == [0.0, 0.0] and not actions.grad.any()


def test_costs_have_gradients():
    latents = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    actions = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    goal = torch.randn(4, 5, dtype=torch.float64)
    rail = costs.guardrail(lambda z: z.square().mean((2, 3)), margin=1.5)
    for kind in ("l1", "l2", "cosine"):
        total = costs.weighted((1.0, costs.goal_distance(goal, kind, frames="all")), (0.3, costs.effort), (2.0, rail))
        assert torch.autograd.gradcheck(total, (latents, actions))


CENTRE, RADIUS = torch.tensor([2.0, 0.1]), 0.8


def clearance(latents):
    """Of a point from a disc between start and goal."""
    return (latents[:, :, 0] - CENTRE).norm(dim=-1) - RADIUS


@pytest.mark.parametrize("planner", ["cem", "best", "mppi", "gradient"])
def test_a_plan_keeps_out_of_a_forbidden_disc(planner):
    """Without the guardrail it goes straight through; with it no step enters, and the goal is reached all the same."""
    context, goal = Context(torch.zeros(1, 1, 2)), torch.tensor([[4.0, 0.0]])
    space, distance = ActionSpace(std=0.5, limit=0.7), costs.goal_distance(goal, "l2")
    options = dict(horizon=10, iterations=30, samples=200, space=space)

    def plan(cost):
        if planner == "gradient":
            return jk.planning.gradient(Point(), context, cost=cost, lr=0.05, **{**options, "iterations": 80})
        if planner == "mppi":
            return jk.planning.mppi(Point(), context, cost=cost, elites=30, std_range=(0.05, 2.0), **options)
        return jk.planning.cem(Point(), context, cost=cost, elites=20, returns=returns, **options)

    returns = "best" if planner == "best" else "mean"
    smooth = costs.weighted((1.0, distance), (0.1, costs.effort))
    rail = costs.guardrail(clearance, margin=0.1, hard=planner == "best")
    without, within = plan(smooth), plan(costs.weighted((1.0, smooth), (20.0, rail)))
    assert clearance(without.latents[None]).min() < -0.3
    assert clearance(within.latents[None]).min() > 0
    for found in (without, within):
        assert (found.latents[-1] - goal).norm() < 0.3
        assert found.actions.abs().max() <= 0.7 + 1e-6


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: costs.goal_distance(GOAL, "l3"),
            ValueError,
            "goal_distance: kind must be one of l1, l2, cosine, got 'l3'; leave it out for l1",
        ),
        (
            lambda: costs.goal_distance(GOAL, frames="first"),
            ValueError,
            "goal_distance: frames must be last or all, got 'first'; leave it out for the last frame",
        ),
        (
            lambda: costs.goal_distance(GOAL[0]),
            ValueError,
            "goal_distance: goal must have shape [N, E], got (2,); reshape it",
        ),
        (
            lambda: costs.goal_distance(torch.zeros(2, 2))(LATENTS, ACTIONS),
            ValueError,
            "goal_distance: goal must have the shape of an imagined frame, (1, 2), got (2, 2); encode it with this "
            "world",
        ),
        (
            lambda: costs.guardrail(lambda z: z[:, :, 0])(LATENTS, ACTIONS),
            ValueError,
            "guardrail: clearance must give a number for each frame of a sample, (2, 2), got (2, 2, 2); reduce over "
            "tokens and channels",
        ),
        (
            lambda: costs.weighted(),
            ValueError,
            "weighted: terms must be one or more (weight, cost), got none; pass goal_distance(goal) alone",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
