"""Schedules against values worked out by hand from the published formulas."""

import math

import pytest

from jepa_kernels import schedules

LR = dict(start=2e-4, peak=1e-3, final=1e-6, warmup=4, total=12)


@pytest.mark.parametrize(
    "step, value",
    [
        (0, 4e-4),  # the published scheduler advances before the forward: the first step uses 1/4 of the way
        (1, 6e-4),
        (2, 8e-4),
        (3, 1e-3),  # step 4 of 4: the peak
        (7, 1e-6 + (1e-3 - 1e-6) / 2),  # halfway through the cosine
        (9, 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(0.75 * math.pi)) / 2),
        (11, 1e-6),
    ],
)
def test_learning_rate(step, value):
    assert schedules.learning_rate(step, **LR) == pytest.approx(value, rel=1e-12)


def test_learning_rate_without_warm_up_starts_below_the_peak():
    value = schedules.learning_rate(0, start=0.0, peak=1.0, final=0.0, warmup=0, total=4)
    assert value == pytest.approx((1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("step, value", [(0, 0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2), (1, 0.22), (3, 0.4)])
def test_weight_decay(step, value):
    assert schedules.weight_decay(step, start=0.04, final=0.4, total=4) == pytest.approx(value)


@pytest.mark.parametrize("step, value", [(0, 0.996), (5, 0.998), (10, 1.0)])
def test_momentum_starts_at_its_first_value(step, value):
    assert schedules.momentum(step, start=0.996, final=1.0, total=10) == pytest.approx(value, rel=1e-12)


def test_a_stretched_run_ends_before_its_schedules():
    # ipe_scale 1.25: 8 steps of schedules 10 long, as published
    assert schedules.momentum(7, start=0.996, final=1.0, total=10) == pytest.approx(0.9988)
    assert schedules.learning_rate(7, start=0.0, peak=1.0, final=0.0, warmup=0, total=10) > 0.09


@pytest.mark.parametrize("step, value", [(0, 0.0), (15000, 0.0), (18000, 0.1), (30000, 0.5), (10**6, 0.5)])
def test_context_weight_waits_rises_and_holds(step, value):
    assert schedules.context_weight(step) == pytest.approx(value)


def test_context_weight_without_a_rise_steps_up():
    assert [schedules.context_weight(step, start=3, end=3) for step in (2, 3, 4)] == [0.0, 0.5, 0.5]
