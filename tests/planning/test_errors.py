"""Whatever does not fit is refused before anything is computed, with what to do."""

import re

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.models.world import Context
from jepa_kernels.planning import ActionSpace, PlanGraph, costs, without_rotation
from tests.planning.worlds import Bent, Point

GOAL = torch.zeros(2, 3, dtype=torch.float64)


class Unasked(Bent):
    """A world that must not be asked for anything."""

    def imagine(self, context, samples, horizon):
        raise AssertionError("asked")

    unroll = imagine


def plan(planner="cem", world=None, goal=GOAL, context=None, **changes):
    world = Unasked() if world is None else world
    options = dict(horizon=2, samples=8, iterations=2)
    options |= {"lr": 0.1} if planner == "gradient" else {"elites": 4}
    context = Bent().context() if context is None else context
    return getattr(jk.planning, planner)(world, context, goal, **{**options, **changes})


def flat(latents, actions):
    return latents


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(horizon=0), "cem: horizon must be a whole number of at least 1, got 0; 1 is the least"),
        (dict(horizon=1.5), "cem: horizon must be a whole number of at least 1, got 1.5; 1 is the least"),
        (dict(horizon=True), "cem: horizon must be a whole number of at least 1, got True; 1 is the least"),
        (dict(samples=0), "cem: samples must be a whole number of at least 2, got 0; 2 is the least"),
        (
            dict(planner="mppi", samples=1, elites=None),
            "mppi: samples must be a whole number of at least 2, got 1; 2 is the least",
        ),
        (
            dict(planner="gradient", samples=0),
            "gradient: samples must be a whole number of at least 1, got 0; 1 is the least",
        ),
        (dict(iterations=0), "cem: iterations must be a whole number of at least 1, got 0; 1 is the least"),
        (dict(batch=0), "cem: batch must be a whole number of at least 1, got 0; 1 is the least"),
        (dict(elites=9), "cem: elites must lie in 2..8, got 9; 2 is the least"),
        (dict(elites=1), "cem: elites must lie in 2..8, got 1; 2 is the least"),
        (dict(planner="mppi", elites=9), "mppi: elites must lie in 2..8, got 9; 2 is the least"),
        (dict(goal=None), "cem: goal must be given, or a cost, not both, got neither; pass a goal"),
        (
            dict(cost=flat),
            "cem: goal must be given, or a cost, not both, got both; put goal_distance(goal) into costs.weighted",
        ),
        (dict(sampling="all"), "cem: sampling must be joint or steps, got 'all'; leave it out for joint"),
        (dict(returns="elite"), "cem: returns must be mean or best, got 'elite'; leave it out for the mean"),
        (dict(momentum_mean=1.5), "cem: momentum_mean must lie in 0..1, got 1.5; it is a size, of either sign"),
        (
            dict(momentum_mean=None),
            "cem: momentum_mean must be a number or 3 of them, got None; pass one for each dimension",
        ),
        (
            dict(momentum_mean=(0.5, None, 0.5)),
            "cem: momentum_mean must lie in 0..1, got (0.5, None, 0.5); it is a size, of either sign",
        ),
        (
            dict(momentum_std=(0.5, 0.5)),
            "cem: momentum_std must be a number or 3 of them, got 2; pass one for each dimension",
        ),
        (
            dict(space=ActionSpace((1.0, 1.0))),
            "cem: space must have world.action_dim = 3 numbers a step, got 2; give it to_world, or as many numbers",
        ),
        (
            dict(space=ActionSpace((1.0, 1.0, -1.0))),
            "cem: space.std must lie in 0..inf, got (1.0, 1.0, -1.0); it is a size, of either sign",
        ),
        (
            dict(space=ActionSpace((1.0, 1.0, 1.0), (1.0, 1.0))),
            "cem: space.limit must be a number or 3 of them, got 2; pass one for each dimension",
        ),
        (
            dict(mean=torch.zeros(3, 3)),
            "cem: mean must be a tensor of shape (2, 3), got (3, 3); leave it out for the usual one",
        ),
        (
            dict(noise=torch.zeros(2, 8, 3)),
            "cem: noise must be a tensor of shape (2, 8, 2, 3), got (2, 8, 3); leave it out for the usual one",
        ),
        (
            dict(planner="gradient", noise=torch.zeros(2, 8, 2, 3)),
            "gradient: noise must be a tensor of shape (8, 2, 3), got (2, 8, 2, 3); leave it out for the usual one",
        ),
        (
            dict(context=Context(torch.zeros(4, 5))),
            "cem: context.latents must have shape [T, N, E], got (4, 5); reshape it",
        ),
        (dict(graph=True), "cem: graph must be False where there is no CUDA, got True on cpu; leave it out"),
        (
            dict(graph=PlanGraph()),
            "cem: graph must be False where there is no CUDA, got PlanGraph on cpu; leave it out",
        ),
        (
            dict(planner="mppi", temperature=0),
            "mppi: temperature must be finite and greater than 0, got 0; 1.0 is usual",
        ),
        (
            dict(planner="mppi", std_range=(2, 1)),
            "mppi: std_range must be two numbers, 0 or more, in order, got (2, 1); leave it out for no bounds",
        ),
        (
            dict(planner="mppi", std_range=0.5),
            "mppi: std_range must be two numbers, 0 or more, in order, got 0.5; leave it out for no bounds",
        ),
        (
            dict(planner="mppi", std_range=(0.5,)),
            "mppi: std_range must be two numbers, 0 or more, in order, got (0.5,); leave it out for no bounds",
        ),
        (
            dict(planner="gradient", optimizer="lbfgs"),
            "gradient: optimizer must be adam or sgd, got 'lbfgs'; leave it out for adam",
        ),
        (
            dict(planner="gradient", lr=0),
            "gradient: lr must be finite and greater than 0, got 0; try 0.1 of the actions' std",
        ),
        (
            dict(planner="gradient", betas=(0.9, 1.0)),
            "gradient: betas must be two numbers in [0, 1), got (0.9, 1.0); (0.9, 0.999) is usual",
        ),
        (dict(planner="gradient", eps=-1e-8), "gradient: eps must be at least 0, got -1e-08; 1e-8 is usual"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_world_is_asked(changes, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        plan(**changes)


def test_gradients_are_not_asked_for_where_there_are_none():
    world = Bent()
    with torch.inference_mode():
        assert plan("cem", world).energy.isfinite()
        with pytest.raises(RuntimeError, match=r"^gradient: torch.inference_mode must be off, .* under torch.no_grad"):
            plan("gradient")


@pytest.mark.parametrize("planner", ["cem", "mppi", "gradient"])
def test_latents_alone_are_no_context(planner):
    message = rf"^{planner}: context must be a Context, got Tensor; pass models.world.Context\(latents\)"
    with pytest.raises(TypeError, match=message):
        plan(planner, context=torch.zeros(1, 2, 3))


class Wrong(Bent):
    """A world that imagines a frame too many."""

    def unroll(self, context, actions):
        return super().unroll(context, torch.cat((actions, actions[:, :1]), 1))

    def imagine(self, context, samples, horizon):
        return lambda actions: self.unroll(context, actions)


@pytest.mark.parametrize("planner", ["cem", "mppi", "gradient"])
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(goal=torch.zeros(3, 3)),
            "goal_distance: goal must have the shape of an imagined frame, (2, 3), got (3, 3); encode it with this "
            "world",
        ),
        (
            dict(goal=None, cost=flat),
            "cost must give one energy a sample, (8,), got (8, 2, 2, 3); reduce over the rest",
        ),
        (
            dict(goal=None, cost=lambda latents, actions: 0.0),
            "cost must give one energy a sample, (8,), got float; reduce over the rest",
        ),
        (
            dict(world=Wrong()),
            "world must imagine latents (8, 2, 2, 3), got (8, 3, 2, 3); one frame for each step",
        ),
        (
            dict(space=ActionSpace((1.0,) * 4, to_world=without_rotation)),
            "space.to_world must give (8, 2, 3), got (8, 2, 7); one action for each step",
        ),
        (
            dict(space=ActionSpace(to_world=lambda a: a[:5])),
            "space.to_world must give (8, 2, 3), got (5, 2, 3); one action for each step",
        ),
        (
            dict(space=ActionSpace(constrain=(lambda a: a[:5],))),
            "space.constrain must give (8, 2, 3), got (5, 2, 3); change values alone",
        ),
        (
            dict(space=ActionSpace(finish=lambda a: a[:1])),
            "space.finish must give (2, 3), got (1, 3); change values alone",
        ),
        (
            dict(space=ActionSpace(finish=lambda a: None)),
            "space.finish must give (2, 3), got NoneType; change values alone",
        ),
    ],
)
def test_worlds_goals_and_costs_that_do_not_fit_are_refused(planner, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(planner, **{"world": Bent(), **changes})


def test_what_the_world_refuses_reaches_the_caller():
    class Short(Bent):
        def imagine(self, context, samples, horizon):
            raise ValueError("World: horizon must leave the context's frames room among 4, got 9; plan fewer steps")

    with pytest.raises(ValueError, match=r"^World: horizon must"):
        plan(world=Short(), horizon=9)


def test_a_world_of_another_dtype_is_told_actions_of_its_own():
    """Latents in bf16: the search is in fp32, the world gets bf16."""

    class Low(Point):
        def unroll(self, context, actions):
            assert actions.dtype == torch.bfloat16
            return super().unroll(context, actions)

    context, goal = Context(torch.zeros(1, 1, 2).bfloat16()), torch.ones(1, 2).bfloat16()
    options = dict(horizon=2, samples=50, iterations=8, elites=5)
    found = jk.planning.cem(Low(), context, goal, **options)
    assert found.actions.dtype == torch.float32 and found.latents.dtype == torch.bfloat16 and found.energy < 0.05
    cost = costs.weighted((1.0, costs.goal_distance(goal)), (0.1, costs.effort))
    jk.planning.gradient(Low(), context, cost=cost, horizon=2, iterations=2, lr=0.1)
