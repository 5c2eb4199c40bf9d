"""Planning by gradients against PyTorch's optimisers and autograd, one start after another."""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.models.world import Context
from jepa_kernels.planning import ActionSpace, costs
from tests.planning.worlds import Bent, Point


@pytest.mark.parametrize("optimizer, make", [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
@pytest.mark.parametrize("limit", [None, 0.4])
def test_each_start_goes_the_way_of_torchs_optimizer(optimizer, make, limit):
    world, goal = Bent(), torch.zeros(2, 3, dtype=torch.float64)
    context, cost = world.context(), costs.goal_distance(goal, "l2")
    noise = torch.randn(3, 2, 3, dtype=torch.float64)
    options = dict(horizon=2, samples=3, iterations=12, lr=0.1, optimizer=optimizer, include_mean=False)
    space = ActionSpace(0.5, limit)
    plan = jk.planning.gradient(world, context, cost=cost, noise=noise, space=space, **options)
    energies, ways = [], []
    for start in noise:
        a = (start * 0.5).clip(*((-limit, limit) if limit else (None, 9))).requires_grad_()
        taken, way, step = [], [], make([a], lr=0.1)
        for _ in range(12):
            step.zero_grad()
            energy = (world.unroll(context, a[None])[0, -1] - goal).square().mean()
            energy.backward()
            taken.append(energy.detach())
            way.append(a.detach().clone())
            step.step()
            if limit:
                a.data.clamp_(-limit, limit)
        energies.append(torch.stack(taken))
        ways.append(torch.stack(way))
    energies, ways = torch.stack(energies, 1), torch.stack(ways, 1)
    torch.testing.assert_close(plan.energies, energies, rtol=0, atol=1e-13)
    best = ways.flatten(0, 1)[energies.argmin()]
    torch.testing.assert_close(plan.actions, best, rtol=0, atol=1e-13)
    torch.testing.assert_close(plan.energy, energies.min(), rtol=0, atol=1e-15)
    assert plan.energies[-1].max() < plan.energies[0].min()


def test_starts_are_the_mean_and_draws_around_it_and_parts_change_nothing():
    world, goal = Bent(), torch.zeros(2, 3, dtype=torch.float64)
    mean = torch.full((2, 3), 0.3, dtype=torch.float64)
    options = dict(horizon=2, samples=7, iterations=3, lr=0.05, mean=mean, seed=1)
    plan, parts = (jk.planning.gradient(world, world.context(), goal, batch=b, **options) for b in (None, 3))
    assert torch.equal(plan.actions, parts.actions) and torch.equal(plan.energies, parts.energies)
    at_mean = (world.unroll(world.context(), mean[None])[0, -1] - goal).abs().mean()
    assert plan.energies[0, 0] == at_mean and (plan.energies[0, 1:] != at_mean).all()
    assert not plan.actions.requires_grad
    alone = jk.planning.gradient(world, world.context(), goal, **{**options, "samples": 1})
    assert not alone.std.any() and plan.std.all()


def test_a_start_that_is_nan_loses_alone():
    class Breaking(Point):
        def unroll(self, context, actions):
            away = (actions > 1).flatten(1).any(1)[:, None, None, None]
            return torch.where(away, torch.nan, super().unroll(context, actions))

    context, goal = Context(torch.zeros(1, 1, 2)), torch.tensor([[1.0, -1.0]])
    noise = torch.tensor([[[2.0, 0.0]], [[0.5, 0.0]], [[0.0, 0.0]]])
    options = dict(horizon=1, samples=3, iterations=4, lr=0.1, optimizer="sgd", include_mean=False)
    cost = costs.goal_distance(goal, "l2")
    plan = jk.planning.gradient(Breaking(), context, cost=cost, noise=noise, **options)
    fine = jk.planning.gradient(Point(), context, cost=cost, noise=noise[1:], **{**options, "samples": 2})
    assert plan.invalid.tolist() == [1] * 4
    assert torch.equal(plan.energies[:, 1:], fine.energies) and torch.equal(plan.actions, fine.actions)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("lost", [torch.nan, -torch.inf])
def test_a_start_that_becomes_nan_stays_there_without_momentum(optimizer, lost):
    """Its way goes below 0.75, where energies are lost; the best of its way before that counts."""
    context, noise = Context(torch.zeros(1, 1, 2)), torch.tensor([[[1.0, 1.0]], [[4.0, 4.0]]])
    shown = []

    def cost(latents, actions):
        shown.append(actions.detach())
        energies = actions.square().sum((1, 2))
        return torch.where(actions[:, 0, 0] < 0.75, torch.full_like(energies, lost), energies)

    options = dict(horizon=1, samples=2, iterations=7, lr=0.1, optimizer=optimizer, include_mean=False)
    plan = jk.planning.gradient(Point(), context, cost=cost, noise=noise, **options)
    way = torch.stack(shown[:7])[:, 0, 0, 0]
    first = int((way < 0.75).nonzero()[0])
    assert first < 5 and (way[first:] == way[first]).all()
    assert plan.invalid.tolist() == [int(i >= first) for i in range(7)]
    assert torch.equal(plan.actions[0, 0], way[first - 1])


def test_a_start_of_one_nan_slope_stays_whole_and_loses():
    """The energy is the lowest and finite, and the other number has a slope."""
    context, noise = Context(torch.zeros(1, 1, 2)), torch.tensor([[[0.0, 0.5]], [[1.0, 1.0]]])
    shown = []

    def cost(latents, actions):
        shown.append(actions.detach())
        x, y = actions[:, 0].unbind(1)
        return (x * x).sqrt() + y.square()  # at x = 0 of slope 0 / 0

    options = dict(horizon=1, samples=2, iterations=3, lr=0.01, include_mean=False)
    plan = jk.planning.gradient(Point(), context, cost=cost, noise=noise, **options)
    assert all(torch.equal(starts[0], noise[0]) for starts in shown[:3])
    assert plan.invalid.tolist() == [1, 1, 1] and plan.energies[:, 0].isposinf().all()
    assert torch.equal(plan.actions, shown[2][1])


def test_a_start_of_infinite_energy_is_not_chosen():
    context, noise = Context(torch.zeros(1, 1, 2)), torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])
    forbidden = costs.guardrail(lambda z: z[:, :, 0, 0] - 2, hard=True)
    cost = costs.weighted((1.0, costs.effort), (1.0, forbidden))
    options = dict(horizon=1, samples=2, iterations=1, lr=0.1, include_mean=False)
    plan = jk.planning.gradient(Point(), context, cost=cost, noise=noise, **options)
    assert plan.energies.tolist() == [[torch.inf, 9.0]] and plan.invalid.tolist() == [0]
    assert torch.equal(plan.actions, noise[1])
    nothing = jk.planning.gradient(Point(), context, cost=cost, noise=noise[:1], **{**options, "samples": 1})
    assert torch.equal(nothing.actions, noise[0]) and nothing.energy.isinf()


def test_several_starts_find_what_one_does_not():
    """Two valleys of the cost; the one at the mean is the worse."""

    def cost(latents, actions):
        x = latents[:, -1, 0, 0]
        return torch.minimum((x - 0.5).square() + 1, (x - 4).square())

    context, options = Context(torch.zeros(1, 1, 2)), dict(cost=cost, horizon=2, iterations=200, lr=0.05)
    one = jk.planning.gradient(Point(), context, samples=1, **options)
    many = jk.planning.gradient(Point(), context, samples=20, space=ActionSpace(2.0), **options)
    assert one.energy > 0.999 and many.energy < 1e-3
