"""embed_patches: values by hand, equivalences, and messages."""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing


@pytest.fixture(params=("reference", "cpu"))
def backend(request):
    return request.param


def test_by_hand(backend):
    # one channel, patches of 2 x 2: token = (a - d) of its patch [[a, b], [c, d]], and b + c in the second channel
    pixels = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    weight = torch.tensor([[1.0, 0, 0, -1], [0, 1, 1, 0]]).view(2, 1, 2, 2).requires_grad_()
    bias = torch.tensor([0.5, 0.25]).requires_grad_()
    pos = torch.tensor([[0.0, 0], [10, 20], [30, 40], [50, 60]]).requires_grad_()
    ids = torch.tensor([[1, 2], [2, 3]])  # two masks of one image
    out = jk.embed_patches(pixels, ids, weight, bias, pos, backend=backend)
    assert out.tolist() == [[[5.5, 29.25], [25.5, 61.25]], [[25.5, 61.25], [45.5, 85.25]]]
    grad = torch.tensor([[[1.0, 0], [2, 0]], [[3, 0], [0, 4]]])
    dpixels, dweight, dbias, dpos = torch.autograd.grad(out, (pixels, weight, bias, pos), grad)
    assert dbias.tolist() == [6, 4]
    assert dpos.tolist() == [[0, 0], [1, 0], [5, 0], [0, 4]]
    # 1 x patch 1 + 5 x patch 2, and 4 x patch 3
    assert dweight.flatten(1).tolist() == [[2 + 40, 3 + 45, 6 + 60, 7 + 65], [40, 44, 56, 60]]
    assert dpixels.view(4, 4).tolist() == [[0, 0, 1, 0], [0, 0, 0, -1], [5, 0, 0, 4], [0, -5, 4, 0]]


def test_packed_rows_past_the_end_are_zero(backend):
    packing = Packing.from_lengths([1, 2]).padded(5, 2, 2)
    ids = torch.tensor([3, 0, 1, 99, -7])
    out = jk.embed_patches(torch.ones(2, 1, 4, 4), ids, torch.ones(1, 1, 2, 2), packing=packing, backend=backend)
    assert out.flatten().tolist() == [4, 4, 4, 0, 0]
