"""Adaptive layer norm: its numbers by hand, its start, its names, and frames that share one condition."""

import math

import torch

from jepa_kernels.nn import Modulation, modulate


def test_numbers_by_hand():
    net = Modulation(1, parts=3)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
        net[1].bias.copy_(torch.tensor([0.0, 0.5, 1.0]))
        shift, scale, gate = net(torch.tensor([2.0]))
    silu = 2 / (1 + math.exp(-2))
    torch.testing.assert_close(torch.cat([shift, scale, gate]), torch.tensor([silu, 2 * silu + 0.5, 1 - silu]))
    assert modulate(torch.tensor([3.0]), torch.tensor([0.5]), torch.tensor([-2.0])).tolist() == [3 * (1 - 2) + 0.5]


def test_start_and_names():
    zero, wide = Modulation(64), Modulation(64, std=0.2)
    assert list(zero.state_dict()) == ["1.weight", "1.bias"] and zero[1].weight.shape == (6 * 64, 64)
    assert not zero[1].weight.any() and not zero[1].bias.any() and not wide[1].bias.any()
    assert 0.19 < wide[1].weight.std() < 0.21
    parts = zero(torch.randn(2, 64))
    assert len(parts) == 6 and all(p.shape == (2, 64) and not p.any() for p in parts)


def test_tokens_of_a_frame_share_its_condition_exactly():
    torch.manual_seed(0)
    x, (shift, scale) = torch.randn(2, 3, 5, 8), Modulation(8, 2, std=0.2)(torch.randn(2, 3, 1, 8))
    shared = modulate(x, shift, scale)
    assert torch.equal(shared, modulate(x, shift.expand_as(x), scale.expand_as(x)))
    torch.testing.assert_close(shared[1, 2, 4], x[1, 2, 4] * (1 + scale[1, 2, 0]) + shift[1, 2, 0])


def test_gradients():
    torch.manual_seed(0)
    x, shift, scale = (torch.randn(2, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 1, 1))
    assert torch.autograd.gradcheck(modulate, (x, shift, scale))
