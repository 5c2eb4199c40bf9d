"""distance_weights: values by hand, equivalences, the dense loss of V-JEPA 2.1, and messages."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels.ops.distance_weights import cases

TRITON = pytest.param("triton", marks=pytest.mark.interp)


@pytest.fixture(params=["reference", "cpu", TRITON])
def backend(request):
    return request.param


@pytest.fixture(params=["cpu", TRITON])
def kernel(request):
    return request.param


def drawn(make, seed=0):
    return make(torch.Generator().manual_seed(seed))


def test_by_hand(backend):
    # grid of 2 frames of 3 x 4; targets (0, 0, 0) and (1, 2, 3). Context (0, 0, 3): 3 from the first, sqrt 5 from the
    # other; (0, 2, 3): 1; (1, 0, 0): 1; (1, 1, 1): sqrt 3 and sqrt 5
    context, target = torch.tensor([[3, 11, 12, 17]]), torch.tensor([[0, 23]])
    expected = torch.tensor([[5.0, 1.0, 1.0, 3.0]]) ** -0.25
    torch.testing.assert_close(jk.distance_weights(context, target, (2, 3, 4), backend=backend), expected)
    scaled = jk.distance_weights(context, target, (2, 3, 4), scale=4.0, backend=backend)
    torch.testing.assert_close(scaled, 2 * expected)
    assert scaled.dtype == torch.float32 and scaled.is_contiguous()


def test_equals_cdist(backend):
    inputs = drawn(cases.rectangular((4, 24, 24), 3, 90, 70, scale=1.5))
    places = [jk.patch_positions(inputs[n], inputs["grid"]).double() for n in ("context_ids", "target_ids")]
    expected = (torch.cdist(*places).min(-1).values / 1.5).rsqrt().float()
    torch.testing.assert_close(jk.distance_weights(**inputs, backend=backend), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_squared_distances_are_exact(kernel, case):
    found, expected = (jk.distance_weights(**drawn(case.make), backend=b) for b in (kernel, "reference"))
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
    scale = case.make(torch.Generator()).get("scale", 1.0)
    squares = scale**2 / expected[expected > 0].double() ** 4  # 4 x 3e-7 of at most 2^20: off by less than a half
    if squares.numel() and squares.max() < 2**18:
        assert torch.equal((scale**2 / found[found > 0].double() ** 4).round(), squares.round())


@pytest.mark.parametrize("lengths", [(1, 1), (7, 8), (64, 9), (130, 200), (5, 0)])
def test_packed_equals_rectangular_exactly(kernel, lengths):
    inputs = drawn(cases.rectangular((4, 10, 10), 3, *lengths))
    packings = {n: Packing.uniform(3, k) for n, k in zip(("packing", "target_packing"), lengths, strict=True)}
    flat = {n: inputs[n].flatten() for n in ("context_ids", "target_ids")}
    packed = jk.distance_weights(**flat, grid=inputs["grid"], **packings, backend=kernel)
    assert torch.equal(jk.distance_weights(**inputs, backend=kernel).flatten(), packed)


def test_each_packed_sequence_equals_itself_alone(kernel):
    contexts, targets = (70, 0, 3, 9), (5, 4, 90, 1)
    inputs = drawn(cases.packed((4, 8, 8), contexts, targets))
    found = jk.distance_weights(**inputs, backend=kernel)
    rows = zip(*(inputs[p].split(torch.arange(inputs[p].tokens)) for p in ("packing", "target_packing")), strict=True)
    for own, other in rows:
        context, target = inputs["context_ids"][own][None], inputs["target_ids"][other][None]
        assert torch.equal(jk.distance_weights(context, target, (4, 8, 8), backend=kernel)[0], found[own])


def test_no_targets_and_unused_rows_are_0(backend):
    packing, none = Packing.from_lengths([2, 1]).padded(6, 3, 2), Packing.from_lengths([0, 1, 0])
    ids = torch.tensor([0, 5, 0, 2**40, -1, 7])
    weights = jk.distance_weights(
        ids, torch.tensor([3]), (1, 3, 3), packing=packing, target_packing=none, backend=backend
    )
    assert weights.tolist() == [0, 0, 1, 0, 0, 0]


def test_a_token_that_is_a_target_has_infinite_weight(backend):
    weights = jk.distance_weights(torch.tensor([[0, 1]]), torch.tensor([[1]]), (1, 1, 2), backend=backend)
    assert weights.tolist() == [[1.0, float("inf")]]


def test_sides_of_numpy(backend):
    context, target = torch.tensor([[0, 30000]]), torch.tensor([[1]])
    sides = list(np.array([1, 200, 200], np.int16))  # their product is none
    expected = jk.distance_weights(context, target, (1, 200, 200), backend=backend)
    assert torch.equal(jk.distance_weights(context, target, sides, backend=backend), expected)


def test_the_largest_grid_is_exact(kernel):
    # the far end of the grid: 3 * 1023^2, and one frame nearer
    target, grid = torch.tensor([[0]]), (1024, 1024, 1024)
    far = torch.tensor([[1022 * 2**20 + 1023 * 2**10 + 1023, 2**30 - 1]])
    weights = jk.distance_weights(far, target, grid, backend=kernel)
    expected = torch.tensor([[3 * 1023**2 - 2045, 3 * 1023**2]], dtype=torch.float64) ** -0.25
    torch.testing.assert_close(weights.double(), expected, rtol=1e-7, atol=0)


def test_kernels_skip_ids_out_of_the_grid(kernel, monkeypatch):
    monkeypatch.setattr("jepa_kernels.ops.distance_weights.op.check_ids", lambda *_: None)
    context, target = torch.tensor([[-5, 0, 2, 99]]), torch.tensor([[-1, 1, 50]])
    assert jk.distance_weights(context, target, (1, 1, 4), backend=kernel).tolist() == [[0.0, 1.0, 1.0, 0.0]]


def nearest(ids, others, grid):
    """Distance of each id to the nearest of the others, one pair at a time."""

    def place(n):
        return torch.tensor([n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2]]).double()

    return torch.tensor([min((place(i) - place(n)).norm() for n in others) for i in ids.tolist()])  # fmt: skip


def test_the_dense_loss_of_vjepa_21_is_plain_pytorch(kernel):
    """L1 on the targets, and lambda times L1 on the context by its weights; four levels, two masks of two clips."""
    grid, levels, coefficient, channels = (2, 6, 6), 4, 0.5, 4 * 12
    inputs = drawn(cases.packed(grid, [20, 25, 9, 31], [30, 11, 40, 5], scale=1.5))
    contexts, targets = (inputs[n] for n in ("context_ids", "target_ids"))
    features = torch.randn(2, 72, channels) * 3 + 1
    pred, dense = (torch.randn(len(ids), channels, requires_grad=True) for ids in (targets, contexts))
    weights = jk.distance_weights(**inputs, backend=kernel)
    common = dict(kind="l1", levels=levels, backend=kernel)
    loss = jk.latent_loss(pred, features, targets, packing=inputs["target_packing"], **common)
    loss = loss + coefficient * jk.latent_loss(
        dense, features, contexts, packing=inputs["packing"], weight=weights, **common
    )
    found = torch.autograd.grad(loss, (pred, dense))

    latents = torch.cat([F.layer_norm(x, (12,)) for x in features.double().chunk(levels, -1)], -1)
    rows = [inputs[p].split(torch.arange(inputs[p].tokens)) for p in ("packing", "target_packing")]
    masked, context = [], []
    for s, (own, other) in enumerate(zip(*rows, strict=True)):
        ids, goals = contexts[own], targets[other]
        masked.append((pred[other] - latents[s % 2, goals]).abs().mean(-1))
        by = (nearest(ids, goals.tolist(), grid) / 1.5) ** -0.5
        context.append((dense[own] - latents[s % 2, ids]).abs().mean(-1) * by)
    means = [[torch.cat(x[2 * j : 2 * j + 2]).mean() for j in range(2)] for x in (masked, context)]
    expected = sum(means[0]) / 2 + coefficient * sum(means[1]) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (pred, dense)), rtol=1e-5, atol=1e-9)


IDS, TARGETS, GRID = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1], [0]]), (1, 2, 2)
PACKED = Packing.uniform(2, 2)
BAD = [
    (dict(context_ids=[0]), TypeError, "context_ids must be a tensor, got list"),
    (dict(context_ids=IDS.int()), TypeError, "context_ids must be of dtype int64, got int32"),
    (dict(context_ids=IDS[None]), ValueError, r"context_ids must have shape \[M, K\], got \(1, 2, 2\)"),
    (dict(target_ids=TARGETS.to("meta")), ValueError, "target_ids must be on cpu, got meta"),
    (dict(context_ids=IDS.T), ValueError, r"context_ids must be contiguous, got strides \(1, 2\); call"),
    (dict(context_ids=IDS + 1), ValueError, r"context_ids must lie in \[0, 4\) and increase within each row, got 4"),
    (dict(target_ids=TARGETS - 1), ValueError, r"target_ids must lie in \[0, 4\) and increase within each row, got -1"),
    (dict(target_ids=TARGETS[:1]), ValueError, "target_ids must hold 2 sequences like context_ids, got 1; a context"),
    (dict(grid=(2, 2)), ValueError, r"grid must be \(Gt, Gh, Gw\), each 1 to 1024, got \(2, 2\); an image has one"),
    (dict(grid=(1, 2, 1025)), ValueError, r"grid must be \(Gt, Gh, Gw\), each 1 to 1024, got \(1, 2, 1025\)"),
    (dict(grid=(1, 2, 2.0)), ValueError, r"grid must be \(Gt, Gh, Gw\), each 1 to 1024, got \(1, 2, 2.0\)"),
    (dict(grid=(True, 2, 2)), ValueError, r"grid must be \(Gt, Gh, Gw\), each 1 to 1024, got \(True, 2, 2\)"),
    (dict(grid=4), TypeError, r"grid must be \(Gt, Gh, Gw\), each 1 to 1024, got int; an image has one"),
    (dict(scale=0.0), ValueError, "scale must be greater than 0 and finite, got 0.0; leave it out"),
    (dict(scale=float("nan")), ValueError, "scale must be greater than 0 and finite, got nan"),
    (dict(scale="1"), TypeError, "scale must be a number, got str"),
    (dict(context_ids=IDS.flatten()), TypeError, r"packing must be given with context_ids \[T\], got None; pass it"),
    (dict(packing=IDS), TypeError, "packing must be a Packing, got Tensor"),
    (dict(packing=PACKED), ValueError, r"context_ids must have shape \(4,\) like packing.tokens, got \(2, 2\)"),
    (dict(packing=PACKED, context_ids=IDS.flatten()), TypeError, "target_packing must be given with the other packing"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match="distance_weights: " + message):
        jk.distance_weights(**{**dict(context_ids=IDS, target_ids=TARGETS, grid=GRID), **change})
