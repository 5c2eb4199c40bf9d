"""Rope: angles and pairs by hand, and the properties that the pairings have or lack."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from jepa_kernels import Rope
from jepa_kernels.rotary import turn


def turned(x, positions, **options):
    rope = Rope(torch.tensor(positions), **options)
    return turn(x, rope.turns(x.shape[-1])[0], rope.half)


def unit(channel, width=8):
    x = torch.zeros(1, 1, width)
    x[..., channel] = 1.0
    return x


@pytest.mark.parametrize(
    "pairing, frequency_of_channel",
    [("interleaved", [0, 0, 1, 1, 2, 2, 3, 3]), ("tiled", [0, 1, 2, 3] * 2), ("half", [0, 1, 2, 3] * 2)],
)
def test_one_axis_by_hand(pairing, frequency_of_channel):
    # D = A = 8 with theta = 16: frequencies 1, 1/2, 1/4, 1/8. Channel i hands cos to itself, +-sin to its partner.
    for i in range(8):
        out = turned(unit(i), [[3.0]], pairing=pairing, theta=16.0)[0, 0]
        partner = (i + 4) % 8 if pairing == "half" else i ^ 1
        own, other = (3.0 * 2.0 ** -frequency_of_channel[c] for c in (i, partner))
        expected = torch.zeros(8)
        expected[i] = math.cos(own)
        expected[partner] = math.sin(other) * (1 if i < partner else -1)
        torch.testing.assert_close(out, expected)


def test_three_axes_turn_their_own_channels_and_leave_the_rest():
    # D = 32: A = 10 for each axis, 2 channels stay.
    x = torch.randn(1, 1, 32)
    out = turned(x, [[0.0, 5.0, 0.0]], pairing="tiled")[0, 0]
    same = torch.isclose(out, x[0, 0], rtol=0, atol=0)
    assert same[:10].all() and same[20:].all() and not same[10:20].any()
    frequencies = 10000.0 ** (-torch.arange(5) / 5)
    i = torch.arange(10)
    sign = torch.where(i % 2 == 0, -1.0, 1.0)
    angle = 5.0 * frequencies[i % 5]
    expected = x[0, 0, 10:20] * angle.cos() + sign * x[0, 0, 10 + (i ^ 1)] * angle.sin()
    torch.testing.assert_close(out[10:20], expected)


def test_true_rotations_keep_norms_and_see_differences_only():
    q, k = torch.randn(2, 1, 1, 48, dtype=torch.float64).unbind(0)

    def score(p, r, pairing):
        a, b = (turned(x, [[c, c / 2, 1.0]], pairing=pairing) for x, c in ((q, p), (k, r)))
        return (a * b).sum()

    for pairing in ("interleaved", "tiled"):
        moved = (score(3.0, 1.0, pairing) - score(13.0, 11.0, pairing)).abs() < 1e-4
        kept = (turned(q, [[7.0] * 3], pairing=pairing).norm() - q.norm()).abs() < 1e-5
        assert bool(moved) == bool(kept) == (pairing == "interleaved")


def test_given_frequencies_and_low_precision_angles_are_used():
    x = torch.randn(1, 1, 8)
    frequencies = torch.tensor([1.0, 0.5, 0.25, 0.125])
    given = turned(x, [[3.0]], frequencies=frequencies)
    torch.testing.assert_close(given, turned(x, [[3.0]], theta=16.0))
    low = Rope(torch.tensor([[101.0]]), theta=16.0, angle_dtype=torch.bfloat16).turns(8)[0]
    angles = (torch.tensor([101.0]).bfloat16() * frequencies.bfloat16()).repeat_interleave(2)
    assert torch.equal(low[0, 0], angles.cos().float())
    assert torch.equal(low[0, 1].abs(), angles.sin().float().abs())


def test_tables_are_computed_once_for_all_layers():
    rope = Rope(torch.zeros(4, 3))
    turns, k_turns = rope.turns(16)
    assert rope.turns(16)[0] is turns and k_turns is turns and turns.shape == (4, 2, 12)
    assert rope.turns(24)[0].shape == (4, 2, 24)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(positions=[1]), TypeError, "positions must be a tensor, got list; convert it with torch.as_tensor"),
        (dict(positions=None), TypeError, "positions must be a tensor, got NoneType; convert it with torch.as_tensor"),
        (dict(positions=torch.zeros(3)), ValueError, r"positions must have shape .+, got \(3,\); reshape it"),
        (dict(positions=torch.zeros(3, 4)), ValueError, r"positions must have shape .+ 1 to 3 axes, got \(3, 4\)"),
        (dict(positions=torch.ones(3, 1).bool()), TypeError, "positions must be integers or floats, got torch.bool"),
        (dict(k_positions=torch.zeros(3, 2)), ValueError, "k_positions must have 1 axes like positions, got 2"),
        (dict(k_positions=torch.zeros(3, 1).to("meta")), ValueError, "k_positions must be on cpu like .+, got meta"),
        (dict(pairing="neox"), ValueError, "pairing must be one of interleaved, tiled, half, got 'neox'; leave it"),
        (dict(positions=torch.zeros(3, 2), pairing="half"), ValueError, "positions must have one axis .+, got 2"),
        (dict(theta=0.0), ValueError, "theta must be finite and greater than 0, got 0.0; 10000 is usual"),
        (dict(theta="x"), TypeError, "theta must be a number, got str"),
        (dict(angle_dtype=torch.int32), TypeError, "angle_dtype must be float32, bfloat16 .+, got torch.int32; leave"),
        (dict(angle_dtype=torch.float64), TypeError, "angle_dtype must be float32, .+ or float16, got torch.float64"),
        (dict(frequencies=torch.zeros(2, 2)), ValueError, r"frequencies must have shape \[A/2\], got \(2, 2\)"),
        (dict(frequencies=torch.ones(2, requires_grad=True)), ValueError, "frequencies must not require grad, got re"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match="Rope: " + message):
        Rope(**{**dict(positions=torch.zeros(3, 1)), **arguments})


def test_frequencies_must_fit_the_heads():
    with pytest.raises(ValueError, match="Rope: frequencies must hold A / 2 = 4 numbers for these heads, got 3; pass"):
        Rope(torch.zeros(2, 1), frequencies=torch.ones(3)).turns(8)


def test_a_table_made_while_evaluating_serves_training_and_fakes_leave_none():
    rope = Rope(torch.rand(4, 3))
    with torch.inference_mode():
        turns, _ = rope.turns(16)
    assert not turns.is_inference() and rope.turns(16)[0] is turns
    with FakeTensorMode(allow_non_fake_inputs=True):
        rope.turns(24)
    assert type(rope.turns(24)[0]) is torch.Tensor
