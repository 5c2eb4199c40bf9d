"""CEM against the published planners, written plainly, with the same noise: exactly."""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.models.world import Context
from jepa_kernels.planning import PUBLISHED, ActionSpace, costs, fixed
from tests.planning import equations
from tests.planning.worlds import Bent, Point


def normals(seed, *shapes):
    """A source of [*shape] normal numbers, drawn one after another as published code draws them."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*(shape or shapes), generator=g, dtype=torch.float64)


def goal_of(world, seed=7):
    return torch.randn(world.v.shape[:2], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


AC = {
    "vjepa2_ac": dict(maxnorm=0.05, momentum_mean=0.15, momentum_std=0.15),
    "vjepa2_ac_notebook": dict(maxnorm=0.075, momentum_mean=0.15, momentum_std=0.75),
    "vjepa2_ac_cem": dict(maxnorm=0.05, momentum_mean=0.25, momentum_std=0.95),
}
COUNTS = {  # horizon, samples, iterations (of 100 the first 12)
    "vjepa2_ac": (2, 400, 10),
    "vjepa2_ac_notebook": (2, 25, 2),
    "vjepa2_ac_cem": (1, 100, 12),
}


@pytest.mark.parametrize("name", AC)
@pytest.mark.parametrize("changed", [False, True], ids=["plain", "axis and gripper"])
def test_the_planner_of_vjepa2_ac_exactly(name, changed):
    """From the same seed: noise a step at a time, four numbers to a pose's seven, momenta of gripper and hand apart."""
    world, (horizon, samples, iterations) = Bent(7), COUNTS[name]
    settings, plain = {**PUBLISHED[name], "iterations": iterations}, AC[name]
    if changed:
        closing = (fixed({1: 0.02}), fixed({-1: 1.0}, first_step=horizon - 1))
        space = settings["space"]
        settings = {**settings, "space": ActionSpace(space.std, space.limit, closing, space.to_world, space.finish)}
        plain = {**plain, "axis": {1: 0.02}, "close_gripper": horizon - 1}
    context, goal, draw = world.context(), goal_of(world), normals(3)
    plan = jk.planning.cem(world, context, goal, **settings, seed=3)
    actions, mean, std = equations.cem_of_vjepa2_ac(
        lambda actions: world.unroll(context, actions)[:, -1],
        goal,
        lambda count: draw(count, 4),
        horizon=horizon,
        samples=samples,
        iterations=iterations,
        elites=10,
        **plain,
    )
    assert plan.mean.abs().max() > 0.01
    for found, expected in ((plan.actions, actions), (plan.mean, mean), (plan.std, std)):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "name, counts, groups",
    [
        ("jepa_wm_droid", (3, 300, 10), True),
        ("jepa_wm_metaworld", (6, 300, 10), False),
        ("jepa_wm_pusht", (6, 300, 10), False),
        ("lewm", (5, 300, 30), False),
    ],
)
def test_the_planner_of_jepa_wms_exactly(name, counts, groups):
    """From the same seed: noise an iteration at a time, the mean as first sample, L2, clipping by groups.

    LeWorldModel's, with more elites and a horizon of the caller, is the same.
    """
    horizon, samples, elites = counts
    settings, world = {"horizon": horizon, **PUBLISHED[name], "iterations": 5}, Bent(7)
    context, goal = world.context(), goal_of(world)
    draw = normals(4, horizon, samples, 7)
    plan = jk.planning.cem(world, context, cost=costs.goal_distance(goal, "l2"), **settings, seed=4)
    mean, std, energies = equations.cem_of_jepa_wms(
        lambda actions: world.unroll(context, actions),
        goal,
        draw,
        samples=samples,
        iterations=5,
        elites=elites,
        var_scale=0.1 if groups else 1.0,
        groups=((slice(0, 6), 0.1), (slice(6, 7), 0.75)) if groups else (),
    )
    assert torch.equal(plan.mean, mean) and torch.equal(plan.std, std) and torch.equal(plan.energies, energies)
    assert torch.equal(plan.actions, mean)
    assert torch.equal(plan.latents, world.unroll(context, mean[None])[0])
    assert plan.energy == (plan.latents[-1] - goal).square().mean()


def test_the_planner_of_eb_jepa():
    """From the same seed: no mean among the samples, actions shortened, a sum over frames in place of our mean."""
    settings, world = {**PUBLISHED["eb_jepa"], "iterations": 2}, Bent(2)
    context, goal = world.context(), goal_of(world)
    cost = costs.goal_distance(goal, "l2", frames="all")
    plan = jk.planning.cem(world, context, cost=cost, **settings, seed=4)
    mean, std, energies = equations.cem_of_eb_jepa(
        lambda actions: world.unroll(context, actions),
        goal,
        normals(4, 90, 200, 2),
        samples=200,
        iterations=2,
        elites=20,
        longest=2.45,
    )
    assert mean.abs().max() > 0.5
    for found, expected in ((plan.mean, mean), (plan.std, std), (plan.energies * 90, energies)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("elites", [5, 49, 50])  # 49 / 49 is 1, 49 * (1 / 49) is not
def test_given_noise_is_used_as_it_is_and_left_as_it_was(elites):
    world = Bent()
    noise = normals(0)(4, 60, 2, 3)
    kept = noise.clone()
    options = dict(horizon=2, samples=60, iterations=4, elites=elites, include_mean=True)
    plan = jk.planning.cem(world, world.context(), goal_of(world), noise=noise, **options)
    mean, std, energies = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64), []
    for z in kept:
        actions = z * std + mean
        actions[0] = mean
        energies.append((world.unroll(world.context(), actions)[:, -1] - goal_of(world)).abs().mean((1, 2)))
        best = actions[energies[-1].argsort()[:elites]]
        mean, std = best.mean(0), best.std(0)
    assert (
        torch.equal(noise, kept) and torch.equal(plan.mean, mean) and torch.equal(plan.energies, torch.stack(energies))
    )


def test_the_best_sample_of_all_iterations_is_returned():
    world, noise = Bent(), normals(0)(3, 40, 2, 3)
    options = dict(horizon=2, samples=40, iterations=3, elites=8, noise=noise, returns="best")
    plan = jk.planning.cem(world, world.context(), goal_of(world), **options)
    assert plan.energy == plan.energies.min()
    mean = jk.planning.cem(world, world.context(), goal_of(world), **{**options, "returns": "mean"})
    assert torch.equal(mean.energies, plan.energies) and torch.equal(mean.mean, plan.mean)
    assert not torch.equal(mean.actions, plan.actions)


def test_plans_are_functions_of_the_seed():
    world = Bent(dtype=torch.float32)
    options = dict(horizon=3, samples=20, iterations=2, elites=4)
    goal = goal_of(world).float()
    a, b, other = (jk.planning.cem(world, world.context(), goal, seed=s, **options) for s in (5, 5, 6))
    assert a.actions.dtype == torch.float32
    assert torch.equal(a.actions, b.actions) and torch.equal(a.energies, b.energies)
    assert not torch.equal(a.actions, other.actions)


@pytest.mark.parametrize("batch", [1, 7, 30, 100])
def test_samples_imagined_in_parts_give_the_same_plan(batch):
    world = Bent()
    options = dict(horizon=2, samples=30, iterations=3, elites=5)
    whole = jk.planning.cem(world, world.context(), goal_of(world), **options)
    world.seen = 0
    parts = jk.planning.cem(world, world.context(), goal_of(world), **options, batch=batch)
    assert world.seen == min(batch, 30)
    assert torch.equal(whole.actions, parts.actions) and torch.equal(whole.energies, parts.energies)


def test_a_warm_start_goes_on_where_the_last_plan_ended():
    """A point that can't arrive within a plan's iterations: the next plan, from the shifted mean, costs less."""
    world, goal = Point(), torch.tensor([[5.0, 0.0]])
    space = ActionSpace(std=0.3, limit=1.0)
    options = dict(horizon=5, samples=60, iterations=2, elites=6, space=space)
    first = jk.planning.cem(world, Context(torch.zeros(1, 1, 2)), goal, **options)
    assert torch.equal(first.shifted(2), torch.cat((first.mean[2:], torch.zeros(2, 2))))
    arrived = Context(first.latents[1:2])
    warm = jk.planning.cem(world, arrived, goal, mean=first.shifted(2), **options)
    cold = jk.planning.cem(world, arrived, goal, **options)
    assert warm.energy < 0.8 * cold.energy
    assert torch.equal(first.shifted(0), first.mean) and not first.shifted(5).any()
    with pytest.raises(
        ValueError, match=r"Plan.shifted: steps must lie in 0..5, got 6; pass the number of actions taken"
    ):
        first.shifted(6)


def nan_for(samples_of):
    """A cost that is NaN for those samples whose first action is above the threshold."""
    return lambda latents, actions: torch.where(actions[:, 0, 0] > samples_of, torch.nan, latents[:, -1, 0, 0].abs())


def test_samples_of_nan_energy_lose_and_are_counted():
    """As if they had never been drawn."""
    world, noise = Point(), normals(1)(1, 40, 2, 2)
    context = Context(torch.zeros(1, 1, 2, dtype=torch.float64))
    options = dict(horizon=2, iterations=1, elites=5)
    plan = jk.planning.cem(world, context, cost=nan_for(0.5), samples=40, noise=noise, **options)
    fine = noise[:, noise[0, :, 0, 0] <= 0.5]
    lost = 40 - fine.shape[1]
    without = jk.planning.cem(world, context, cost=nan_for(9), samples=40 - lost, noise=fine, **options)
    assert lost > 5 and plan.invalid.tolist() == [lost]
    assert torch.equal(plan.mean, without.mean) and torch.equal(plan.std, without.std)
    assert plan.energies.isposinf().sum() == lost and not plan.energies.isnan().any()


def test_fewer_valid_samples_than_elites_move_the_distribution_alone():
    world, noise = Point(), normals(1)(1, 40, 1, 2)
    context = Context(torch.zeros(1, 1, 2, dtype=torch.float64))
    few = noise[0, :, 0, 0].sort().values
    options = dict(horizon=1, samples=40, iterations=1, elites=10, noise=noise)
    for valid in (9, 6, 5, 2, 1):
        threshold = (few[valid - 1] + few[valid]).item() / 2
        plan = jk.planning.cem(world, context, cost=nan_for(threshold), **options)
        chosen = noise[0][noise[0, :, 0, 0] < threshold]
        assert plan.invalid.tolist() == [40 - valid]
        torch.testing.assert_close(plan.mean, chosen.mean(0), rtol=0, atol=1e-15)
        if valid > 1:
            unbiased = ((chosen - sum(chosen) / valid) ** 2).sum(0) / (valid - 1)
            torch.testing.assert_close(plan.std, unbiased.sqrt(), rtol=0, atol=1e-15)
        else:
            assert torch.equal(plan.std, torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("planner", ["cem", "mppi"])
@pytest.mark.parametrize("returns", ["mean", "best"])
@pytest.mark.parametrize("lost", [torch.nan, torch.inf, -torch.inf])
def test_samples_of_no_finite_energy_lose_with_numbers_of_any_kind(planner, returns, lost):
    """As if they had never been drawn, be they the first, and NaN themselves."""
    noise, plan = normals(1)(1, 8, 1, 2), getattr(jk.planning, planner)
    context, options = (
        Context(torch.zeros(1, 1, 2, dtype=torch.float64)),
        dict(horizon=1, iterations=1, returns=returns),
    )

    def cost(latents, actions):
        return actions.square().sum((1, 2)).nan_to_num(lost)

    noise[0, :5] = torch.nan
    found = plan(Point(), context, cost=cost, samples=8, elites=8, noise=noise, **options)
    fine = plan(Point(), context, cost=cost, samples=3, elites=3, noise=noise[:, 5:], **options)
    assert found.invalid.tolist() == [0 if lost == torch.inf else 5] and found.energies[0, :5].isposinf().all()
    assert found.actions.isfinite().all()
    for name in ("actions", "mean", "std"):
        torch.testing.assert_close(getattr(found, name), getattr(fine, name), rtol=0, atol=1e-15)


def test_a_plan_of_nothing_but_nan_stays_at_its_mean_and_says_so():
    world, mean = Point(), torch.tensor([[0.25, -1.0]])
    context, goal = Context(torch.full((1, 1, 2), torch.nan)), torch.zeros(1, 2)
    options = dict(horizon=1, samples=8, iterations=3, elites=4, mean=mean, momentum_mean=0.5)
    for returns in ("mean", "best"):
        plan = jk.planning.cem(world, context, goal, returns=returns, **options)
        assert plan.invalid.tolist() == [8, 8, 8] and plan.energy.isnan()
        assert torch.equal(plan.actions, mean) and torch.equal(plan.std, torch.ones(1, 2))


def test_nan_of_a_sample_reaches_no_other():
    """A world that breaks for large actions: the plan is made of the others."""

    class Breaking(Point):
        def unroll(self, context, actions):
            broken = (actions > 1).flatten(1).any(1)
            return torch.where(broken[:, None, None, None], torch.nan, super().unroll(context, actions))

    context, goal = Context(torch.zeros(1, 1, 2)), torch.tensor([[1.5, 1.5]])
    plan = jk.planning.cem(Breaking(), context, goal, horizon=3, samples=200, iterations=8, elites=10)
    assert plan.invalid[0] > 20 and plan.energy < 0.05
    assert plan.actions.isfinite().all() and plan.actions.max() <= 1
