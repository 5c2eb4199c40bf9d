"""Plans on the models of the library, small and untrained: they find actions whose outcome is known to be possible."""

import copy
from functools import partial

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.models.lewm import LeWMConfig, LeWorldModel
from jepa_kernels.models.vjepa2_ac import WorldModel, WorldModelConfig
from jepa_kernels.models.world import Context
from jepa_kernels.planning import ActionSpace, PlanGraph, costs
from tests.planning.test_waiting import COPIES, WAITS, Names

SMALL = dict(embed_dim=32, depth=1, num_heads=2, predictor_depth=2, predictor_num_heads=2)


def vjepa2_ac():
    torch.manual_seed(0)
    world = WorldModel(WorldModelConfig(crop_size=32, num_frames=10, predictor_embed_dim=32, **SMALL))
    with torch.no_grad():  # as after training: actions matter
        world.predictor.action_encoder.weight.mul_(20)
    return world, torch.rand(2, 7)


def lewm():
    torch.manual_seed(0)
    hidden = dict(projector_hidden=32, predictor_hidden=32, action_dim=2)
    world = LeWorldModel(LeWMConfig(crop_size=28, **hidden, **SMALL))
    with torch.no_grad():
        for name, parameter in world.named_parameters():
            if "adaLN" in name:
                parameter.normal_(std=0.3)
    return world, None


@pytest.fixture(scope="module", params=[vjepa2_ac, lewm], ids=["vjepa2_ac", "lewm"])
def question(request):
    """A world, two frames seen of it, and the latents that two actions would lead to."""
    world, states = request.param()
    world.eval().requires_grad_(False)
    size = world.config.crop_size
    frames = torch.rand(2, 3, size, size)
    context = Context(world.encode(frames), torch.zeros(1, world.action_dim), states)
    actions = torch.full((1, 2, world.action_dim), 0.4)
    return world, context, world.unroll(context, actions)[0, -1]


@pytest.mark.parametrize("planner", ["cem", "mppi", "gradient"])
def test_a_plan_finds_actions_that_lead_to_what_is_possible(question, planner):
    world, context, goal = question
    cost = costs.goal_distance(goal, "l2")
    options = {"cem": dict(elites=8), "mppi": dict(elites=8, temperature=1e-4), "gradient": dict(lr=0.1)}[planner]
    counts = dict(samples=4, iterations=15) if planner == "gradient" else dict(samples=64, iterations=8)
    plan = getattr(jk.planning, planner)(
        world, context, cost=cost, horizon=2, space=ActionSpace(0.5, 1.0), **counts, **options
    )
    idle = world.unroll(context, torch.zeros(1, 2, world.action_dim))
    assert plan.energy < 0.5 * cost(idle, None)[0]
    found = world.unroll(context, plan.actions[None])[0]
    assert (plan.latents - found).norm() < 1e-5 * found.norm()


def test_no_operation_of_a_plan_waits(question):
    world, context, goal = question
    with Names() as seen:
        jk.planning.cem(world, context, goal, horizon=3, samples=4, iterations=2, elites=2)
    assert "topk" in seen.names and sorted((WAITS | COPIES) & set(seen.names)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("planner", ["cem", "mppi"])
def test_on_a_gpu_a_plan_is_one_graph_that_waits_for_nothing(question, planner):
    """An iteration or a whole plan, caches of keys and poses included, with the bits of single launches."""
    world, context, goal = question
    world, goal = copy.deepcopy(world).cuda(), goal.cuda()
    context = Context(*(None if x is None else x.cuda() for x in vars(context).values()))
    options = dict(elites=8) if planner == "cem" else dict(elites=8, temperature=1e-4)
    plan = partial(getattr(jk.planning, planner), world, horizon=2, samples=64, iterations=4, **options)
    graph, goals = PlanGraph(), (goal, goal.flip(0))
    for n, goal in enumerate(goals):
        plain, iteration = (plan(context, goal, seed=n, graph=g) for g in (False, True))
        if n:
            torch.cuda.set_sync_debug_mode("error")
        try:
            whole = plan(context, goal, seed=n, graph=graph)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for recorded in (iteration, whole):
            assert torch.equal(recorded.actions, plain.actions) and torch.equal(recorded.energies, plain.energies)
