"""Nothing in a plan waits for a device, shown with no device.

No value of a tensor reaches the host, and no number of the host becomes a tensor by a copy.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jepa_kernels as jk
from jepa_kernels.models.world import Context
from jepa_kernels.planning import PUBLISHED, ActionSpace, clip_norm, costs, dead_zone, fixed, without_rotation
from tests.planning.worlds import Bent, Point

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique", "_unique2"}
# torch.tensor(number), and the scalars of torch.where: written on the host, then copied to the device.
COPIES = {"lift", "lift_fresh", "lift_fresh_copy", "scalar_tensor"}


class Names(TorchDispatchMode):
    """Every operation by its name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.names.append("nonzero")  # how many are chosen decides the shape
        return func(*args, **(kwargs or {}))


def space():
    constrain = (clip_norm((slice(0, 3), 0.5)), fixed({1: 0.0}), fixed({-1: 1.0}, first_step=1))
    return ActionSpace((0.1, 0.1, 0.1, 1.0), 0.3, constrain, without_rotation, dead_zone(-1, 0.25))


def rail(goal):
    far = costs.guardrail(lambda z: z.flatten(2).norm(dim=-1), margin=0.1, hard=True)
    return costs.weighted((1.0, costs.goal_distance(goal, "cosine", frames="all")), (0.1, costs.effort), (1.0, far))


def plans(world, context, goal):
    """Of every planner with every option that computes something."""
    common = dict(horizon=2, samples=8, iterations=3, space=space())
    cost = rail(goal)
    drawn = dict(elites=3, returns="best", include_mean=True, batch=5)
    yield "cem", lambda **o: jk.planning.cem(world, context, cost=cost, momentum_std=0.5, **common, **drawn, **o)
    yield "mppi", lambda **o: jk.planning.mppi(world, context, cost=cost, std_range=(0.1, 1.0), **common, **drawn, **o)
    yield "gradient", lambda **o: jk.planning.gradient(world, context, goal, lr=0.1, batch=5, **common, **o)
    yield "published", lambda **o: jk.planning.cem(world, context, goal, **{**PUBLISHED["vjepa2_ac"], "samples": 12})


@pytest.mark.parametrize("planner", ["cem", "mppi", "gradient", "published"])
def test_no_operation_of_a_plan_waits(planner):
    world = Bent(7)
    context, goal = world.context(), torch.ones(2, 3, dtype=torch.float64)
    plan = dict(plans(world, context, goal))[planner]
    with Names() as seen:
        plan()
    assert (len(seen.names) > 50 and "topk" in seen.names) or planner == "gradient"
    assert sorted((WAITS | COPIES) & set(seen.names)) == []


def test_the_names_above_are_those_of_what_waits():
    x = torch.arange(3.0)
    with Names() as seen:
        x.sum().item(), bool(x[0] > 1), x[x > 1], torch.equal(x, x), x[torch.tensor(1)], torch.where(x > 1, x, 0)
    assert {"_local_scalar_dense", "nonzero", "equal", "lift_fresh", "scalar_tensor"} <= set(seen.names)
    assert seen.names.count("_local_scalar_dense") == 3  # an index of no dimension waits too


@pytest.mark.parametrize("planner", ["cem", "mppi"])
def test_a_plan_of_tensors_without_values(planner):
    """On the meta device there is nothing to read."""
    world = Bent(7, dtype=torch.float32)
    world.w, world.v = world.w.to("meta"), world.v.to("meta")
    context, goal = Context(torch.empty(1, 2, 3, device="meta")), torch.empty(2, 3, device="meta")
    plan = dict(plans(world, context, goal))[planner](noise=torch.empty(3, 8, 2, 4, device="meta"))
    assert plan.actions.is_meta and plan.actions.shape == (2, 7) and plan.latents.shape == (2, 2, 3)
    assert plan.energies.shape == (3, 8) and plan.invalid.shape == (3,) and plan.energy.shape == ()


@pytest.mark.parametrize("planner, most", [("cem", 24), ("mppi", 30)])
def test_an_iteration_is_few_operations(planner, most):
    """Kernels that a GPU launches, besides the world's and the cost's: here they compute nothing."""
    context, views = Context(torch.zeros(1, 1, 2)), {"select", "unsqueeze", "slice", "expand", "split"}
    world = Point()
    world.imagine = lambda context, samples, horizon: lambda actions: actions[:, :, None]
    options, counts = dict(cost=lambda latents, actions: actions[:, 0, 0], horizon=2, samples=8, elites=4), []
    for iterations in (2, 12):
        noise = torch.randn(iterations, 8, 2, 2)
        with Names() as seen:
            getattr(jk.planning, planner)(world, context, noise=noise, iterations=iterations, **options)
        counts.append(sum(name not in views for name in seen.names))
    assert (counts[1] - counts[0]) / 10 <= most
