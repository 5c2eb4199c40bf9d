"""Sequences that stream and sequences that stay on chip, side by side in 16 bits, in Triton's interpreter."""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing, Rope
from jepa_kernels._core.case import Case
from jepa_kernels.ops.masked_attention.cases import GRADS, packed
from jepa_kernels.testing import check_case

pytestmark = pytest.mark.interp
LENGTHS = (270, 20, 130)
CASES = (
    Case("plain", packed(LENGTHS, (2, 1), 16, unused=5), GRADS),
    Case("frames", packed(LENGTHS, (1, 1), 16, frame_size=10), GRADS),
    Case("cross", packed((20, 270), (1, 1), 16, key_lengths=(270, 20)), GRADS),
    Case("rope", packed((270, 20), (1, 1), 24, rope=Rope(torch.arange(870.0).view(290, 3) % 17)), GRADS),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_kinds_are_within_the_error_budget(case):
    for parity in check_case("masked_attention", "triton", case, torch.bfloat16):
        assert parity.ok, parity


def attend(x, packing):
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    out = jk.masked_attention(*leaves, packing, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, leaves, x)]


def test_packed_equals_alone():
    x = torch.randn(sum(LENGTHS), 1, 16).bfloat16()
    packing = Packing.from_lengths(LENGTHS)
    together = [packing.split(part) for part in attend(x, packing)]
    for i, n in enumerate(LENGTHS):
        alone = attend(packing.split(x)[i], Packing.from_lengths([n]))
        assert all(torch.equal(part[i], own) for part, own in zip(together, alone, strict=True)), n


def test_dense_equals_packed():
    x = torch.randn(140, 1, 16).bfloat16()
    expected = attend(x, Packing.from_lengths([140]))
    leaves = [x.transpose(0, 1)[None].clone().requires_grad_() for _ in range(3)]
    out = jk.masked_attention(*leaves, backend="triton")
    for own, wanted in zip([out, *torch.autograd.grad(out, leaves, x.transpose(0, 1)[None])], expected, strict=True):
        assert torch.equal(own[0].transpose(0, 1), wanted)
