"""A recorded iteration and a recorded plan: on a stand-in that replays by calling again, and on a GPU."""

from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

import jepa_kernels as jk
from jepa_kernels.models.world import Context
from jepa_kernels.planning import ActionSpace, Plan, PlanGraph, costs, graphs
from tests.planning.worlds import Bent

OPTIONS = dict(horizon=2, samples=24, iterations=6, elites=5, include_mean=True, returns="best")
PLANNERS = {
    "cem": partial(jk.planning.cem, momentum_mean=0.1, momentum_std=(0.2, 0.3, 0.1), **OPTIONS),
    "mppi": partial(jk.planning.mppi, temperature=0.1, space=ActionSpace(0.5, 1.0), **OPTIONS),
}
each_planner = pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
FIELDS = ("actions", "latents", "energy", "energies", "invalid", "mean", "std")


def differences(a, b):
    return [name for name in FIELDS if not torch.equal(getattr(a, name), getattr(b, name))]


def questions(world, count=3):
    """Contexts of three frames and goals, other ones each time."""
    for n in range(count):
        g = torch.Generator().manual_seed(n)
        latents = torch.randn(3, 2, 3, generator=g, dtype=torch.float64)
        actions = torch.randn(2, 3, generator=g, dtype=torch.float64)
        goal = torch.randn(2, 3, generator=g, dtype=torch.float64)
        yield Context(latents.to(world.w), actions.to(world.w)), goal.to(world.w)


def tensors(results):
    return [getattr(results, name) for name in FIELDS] if isinstance(results, Plan) else tree_leaves(results)


@pytest.fixture
def recordings(monkeypatch):
    """What a CUDA graph does, without one: the same code on the same memory, results into the same memory.

    Recording computes nothing: what it changed is put back.
    """
    made = []

    def recorded(function):
        captured = [cell.cell_contents for cell in function.__closure__]
        before = [(x, x.clone()) for x in tree_leaves(captured) if isinstance(x, torch.Tensor)]
        results = function()
        for x, value in before:
            x.copy_(value)
        for x in tensors(results):
            x.fill_(-7)
        made.append(function)

        def replay():
            for old, new in zip(tensors(results), tensors(function()), strict=True):
                old.copy_(new)

        return replay, results

    monkeypatch.setattr(graphs, "recorded", recorded)
    monkeypatch.setattr(graphs, "check_graph", lambda *_: None)
    return made


@each_planner
def test_a_recorded_iteration_gives_the_plan_of_single_ones(planner, recordings):
    world = Bent()
    for seed, (context, goal) in enumerate(questions(world)):
        plain, replayed = (planner(world, context, goal, seed=seed, graph=g) for g in (False, True))
        assert differences(plain, replayed) == []
    assert len(recordings) == 3


@each_planner
def test_a_recorded_plan_answers_other_questions(planner, recordings):
    """Other contexts, goals, first means and seeds go in by copy; results of earlier calls stay as they are."""
    world, graph, plans = Bent(), PlanGraph(), []
    for seed, (context, goal) in enumerate(questions(world)):
        mean = torch.full((2, 3), 0.1 * seed, dtype=torch.float64)
        plain, replayed = (planner(world, context, goal, mean=mean, seed=seed, graph=g) for g in (False, graph))
        plans.append((plain, replayed))
    assert [differences(*pair) for pair in plans] == [[], [], []] and len(recordings) == 1
    assert differences(plans[0][0], plans[1][0]) == list(FIELDS)[:4] + list(FIELDS)[5:]


def test_a_recorded_plan_is_not_used_for_another(recordings):
    world, graph = Bent(), PlanGraph()
    (context, goal), cost = next(questions(world)), costs.goal_distance(torch.zeros(2, 3, dtype=torch.float64))
    plan, longer = PLANNERS["cem"], Context(torch.zeros(4, 2, 3, dtype=torch.float64))
    plan(world, context, goal, graph=graph)
    for other in (
        lambda: plan(world, context, goal, graph=graph, samples=25),
        lambda: plan(world, context, goal, graph=graph, iterations=7),
        lambda: plan(world, context, goal, graph=graph, elites=6),
        lambda: plan(world, context, goal, graph=graph, momentum_mean=0.2),
        lambda: plan(world, context, goal, graph=graph, include_mean=False),
        lambda: plan(world, context, goal, graph=graph, space=ActionSpace(0.5)),
        lambda: plan(world, context, goal, graph=graph, batch=6),
        lambda: plan(world, context, cost=cost, graph=graph),
        lambda: plan(world, longer, goal, graph=graph),
        lambda: plan(Bent(), context, goal, graph=graph),
        lambda: PLANNERS["mppi"](world, context, goal, graph=graph),
    ):
        with pytest.raises(ValueError, match="graph must be used with the options it was made for, got others; take"):
            other()
    assert len(recordings) == 1
    plan(world, context, goal, graph=graph, seed=8)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(dtype=torch.float32):
    world = Bent(dtype=dtype)
    world.w, world.v = world.w.cuda(), world.v.cuda()
    return world


@pytest.mark.gpu
@needs_gpu
@each_planner
def test_graphs_of_a_gpu_give_the_plans_of_single_launches(planner):
    """An iteration and a whole plan, with nothing that waits after the recording."""
    world, graph = on_gpu(), PlanGraph()
    for seed, (context, goal) in enumerate(questions(world)):
        plain, iteration = (planner(world, context, goal, seed=seed, graph=g) for g in (False, True))
        if seed:
            torch.cuda.set_sync_debug_mode("error")
        try:
            whole = planner(world, context, goal, seed=seed, graph=graph)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert differences(plain, iteration) == [] and differences(plain, whole) == []


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["cem", "mppi", "gradient"])
def test_plans_of_a_gpu_wait_for_nothing(name):
    world = on_gpu()
    context, goal = next(questions(world))
    options = dict(horizon=2, samples=24, iterations=4, space=ActionSpace(0.5, 1.0))
    options |= {"lr": 0.1} if name == "gradient" else {"elites": 5}
    plan = partial(getattr(jk.planning, name), **options)
    plan(world, context, goal)
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan(world, context, goal)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@each_planner
def test_a_gpu_finds_the_plan_of_the_cpu(planner):
    """In fp64, from the same noise, where the cost of some samples is NaN."""
    plans = []
    for world in (Bent(), on_gpu(torch.float64)):
        context, goal = next(questions(world))
        noise = torch.randn(6, 24, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        cost = costs.goal_distance(goal)

        def broken(latents, actions, cost=cost):
            return cost(latents, actions).masked_fill(actions[:, 0, 0] > 0.6, torch.nan)

        plans.append(planner(world, context, cost=broken, noise=noise.to(goal.device)))
    assert plans[0].invalid[0] > 2 and torch.equal(plans[1].invalid.cpu(), plans[0].invalid)
    torch.testing.assert_close(plans[1].actions.cpu(), plans[0].actions, rtol=0, atol=1e-12)
    torch.testing.assert_close(plans[1].energies.cpu(), plans[0].energies, rtol=0, atol=1e-12)
