"""MPPI against its equations, one sample after another."""

import math

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.models.world import Context
from jepa_kernels.planning import ActionSpace
from tests.planning import equations
from tests.planning.worlds import Bent, Point


@pytest.mark.parametrize("elites, std_range", [(None, (1.0, 1.0)), (64, (0.05, 2.0)), (20, (0.0, math.inf))])
def test_mppi_is_its_equations(elites, std_range):
    """Each iteration by itself and all together: sums in another order, so within rounding of fp64."""
    world, goal = Bent(), torch.zeros(2, 3, dtype=torch.float64)
    context = world.context()
    noise = torch.randn(6, 100, 2, 3, dtype=torch.float64)
    options = dict(horizon=2, samples=100, iterations=6, elites=elites, temperature=0.05, std_range=std_range)
    plan = jk.planning.mppi(world, context, goal, noise=noise, **options)
    mean, std = equations.mppi(
        lambda actions: world.unroll(context, actions),
        goal,
        noise,
        temperature=0.05,
        elites=elites or 100,
        std_range=std_range,
    )
    assert mean.abs().max() > 0.1
    torch.testing.assert_close(plan.mean, mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(plan.std, std, rtol=0, atol=1e-13)
    if std_range[0] == std_range[1]:
        assert torch.equal(plan.std, torch.ones_like(std))


def test_two_samples_by_hand():
    """Energies 1 and 2, temperature 1 / ln 3: weights 3/4 and 1/4."""
    context, goal = Context(torch.zeros(1, 1, 2, dtype=torch.float64)), torch.zeros(1, 2, dtype=torch.float64)
    noise = torch.tensor([[[[1.0, -1]], [[2.0, 2]]]], dtype=torch.float64)
    options = dict(horizon=1, samples=2, iterations=1, temperature=1 / math.log(3))
    plan = jk.planning.mppi(Point(), context, goal, noise=noise, **options)
    close = dict(rtol=0, atol=1e-15)
    torch.testing.assert_close(plan.mean, torch.tensor([[1.25, -0.25]], dtype=torch.float64), **close)
    expected = torch.tensor([[3 / 16, 27 / 16]], dtype=torch.float64).sqrt()  # variances of 3/4 and 1/4
    torch.testing.assert_close(plan.std, expected, **close)


def test_a_low_temperature_is_the_best_sample_and_a_high_one_the_mean_of_all():
    world, noise = Bent(), torch.randn(1, 50, 2, 3, dtype=torch.float64)
    options = dict(horizon=2, samples=50, iterations=1, noise=noise)
    goal = torch.zeros(2, 3, dtype=torch.float64)
    cold, hot = (jk.planning.mppi(world, world.context(), goal, temperature=t, **options) for t in (1e-9, 1e12))
    assert torch.equal(cold.mean, noise[0, cold.energies[0].argmin()])
    torch.testing.assert_close(hot.mean, noise[0].mean(0), rtol=0, atol=1e-12)


def test_samples_of_nan_energy_have_no_weight():
    noise = torch.randn(2, 40, 1, 2, dtype=torch.float64)
    noise[0, :5] = torch.inf  # the world gives NaN for them: 0 times infinity
    context, goal = Context(torch.zeros(1, 1, 2, dtype=torch.float64)), torch.zeros(1, 2, dtype=torch.float64)

    class Breaking(Point):
        def unroll(self, context, actions):
            return super().unroll(context, actions) * torch.where(actions.isinf(), 0.0, 1.0)[:, :, None]

    options = dict(horizon=1, space=ActionSpace(1.0), iterations=1)
    plan = jk.planning.mppi(Breaking(), context, goal, samples=40, noise=noise[:1], **options, elites=30)
    fine = jk.planning.mppi(Point(), context, goal, samples=35, noise=noise[:1, 5:], **options, elites=30)
    assert plan.invalid.tolist() == [5]
    assert torch.equal(plan.mean, fine.mean) and torch.equal(plan.std, fine.std)
    broken = Context(torch.full((1, 1, 2), torch.nan, dtype=torch.float64))
    plan = jk.planning.mppi(Point(), broken, goal, samples=40, noise=noise[1:], **options)
    assert plan.invalid.tolist() == [40] and not plan.actions.any() and torch.equal(plan.std, torch.ones_like(plan.std))
