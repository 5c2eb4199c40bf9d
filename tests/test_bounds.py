"""Wrong values in cu_seqlens: results as of the nearest valid ones, and no access outside any tensor."""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels._core import extension

BIG = 60_000_000
WRONG = (
    [0, 3, BIG],
    [0, BIG, 7],
    [0, -BIG, 7],
    [BIG, 3, 7],
    [-BIG, 3, 7],
    [0, 5, 3],
    [0, 2**31 - 1, -(2**31)],
)


def valid(values, tokens):
    """From 0, never falling, never past the tokens."""
    return [0, *torch.tensor(values[1:]).clamp(0, tokens).cummax(0).values.tolist()]


def packing_of(values):
    """Two sequences in nine rows, two of them unused, whose cu_seqlens have since been overwritten."""
    packing = Packing.from_lengths([3, 4]).padded(9, 2, 4)
    packing.cu_seqlens.copy_(torch.tensor(values))
    return packing


def gather_tokens(packing):
    x = torch.randn(2, 9, 6, requires_grad=True)
    return jk.gather_tokens(x, torch.arange(9), packing, backend="cpu"), (x,)


def embed_patches(packing):
    leaves = pixels, weight, pos = (torch.randn(2, 3, 6, 6), torch.randn(5, 3, 2, 2), torch.randn(9, 5))
    [x.requires_grad_() for x in leaves]
    return jk.embed_patches(pixels, torch.arange(9), weight, None, pos, packing=packing, backend="cpu"), leaves


def latent_loss(packing, reduction="mask"):
    pred, target = torch.randn(9, 24, requires_grad=True), torch.randn(1, 9, 24)
    ids = torch.arange(9)
    return jk.latent_loss(pred, target, ids, packing=packing, reduction=reduction, backend="cpu"), (pred,)


def latent_loss_per_token(packing):
    return latent_loss(packing, "token")


def distance_weights(packing):
    pad = Packing.from_lengths([3, 4])
    weights = jk.distance_weights(
        torch.arange(9), torch.arange(9, 16), (1, 4, 4), packing=packing, target_packing=pad, backend="cpu"
    )
    return weights.requires_grad_(), (weights,)


def distance_weights_of_targets(packing):
    context = Packing.from_lengths([3, 4])
    weights = jk.distance_weights(
        torch.arange(9, 16), torch.arange(9), (1, 4, 4), packing=context, target_packing=packing, backend="cpu"
    )
    return weights.requires_grad_(), (weights,)


def masked_attention(packing):
    qkv = [torch.randn(9, 2, 8, requires_grad=True) for _ in range(3)]
    return jk.masked_attention(*qkv, packing, backend="cpu"), qkv


def masked_attention_across(packing):
    qkv = [torch.randn(n, 2, 8, requires_grad=True) for n in (7, 9, 9)]
    return jk.masked_attention(*qkv, Packing.from_lengths([3, 4]), k_packing=packing, backend="cpu"), qkv


CALLS = (
    distance_weights,
    distance_weights_of_targets,
    gather_tokens,
    embed_patches,
    latent_loss,
    latent_loss_per_token,
    masked_attention,
    masked_attention_across,
)


def results(call, values):
    torch.manual_seed(0)
    out, leaves = call(packing_of(values))
    return out, *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize("values", WRONG, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_wrong_cu_seqlens_mean_the_nearest_valid_ones(call, values):
    expected = results(call, valid(values, 9))
    assert all(x.isfinite().all() for x in expected)
    assert all(torch.equal(a, b) for a, b in zip(results(call, values), expected, strict=True))


@pytest.mark.parametrize("built", [True, False], ids=["extension", "no_extension"])
def test_ids_are_checked_inside_the_tensor_only(built, monkeypatch):
    if not built:
        monkeypatch.setattr(extension, "load", lambda: "not built")
    x, ids = torch.randn(2, 9, 6), torch.tensor([0, 1, 2, 0, 1, 2, 3, BIG, BIG])
    assert jk.gather_tokens(x, ids, packing_of([0, 3, 7]), backend="reference").shape == (9, 6)
    for values, place, value in (([0, BIG, 7], 3, 0), ([0, 3, BIG], 7, BIG), ([0, -BIG, 7], 3, 0)):
        with pytest.raises(ValueError, match=rf"gather_tokens: ids must lie in .+, got {value} at position {place}; "):
            jk.gather_tokens(x, ids, packing_of(values), backend="reference")


@pytest.mark.parametrize(
    "op, call, wanted, found",
    [
        ("gather_tokens", (torch.randn(1, 4, 3), torch.zeros(1, 2, dtype=torch.int32), None), "int64", "int32"),
        ("linear", (torch.randn(3, 4).half(), torch.randn(2, 4).half(), None, False, False), "float32", "float16"),
    ],
)
def test_kernels_read_no_numbers_as_others(op, call, wanted, found):
    message = rf"a kernel's tensor must be torch\.{wanted}, got torch\.{found}; call the public function"
    with pytest.raises(TypeError, match=message):
        getattr(torch.ops.jepa_kernels, f"{op}_forward")(*call, "cpu")


def test_rows_of_no_image_stand_for_nothing():
    ids, pixels, weight = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(0, 3, 4, 4), torch.randn(5, 3, 2, 2)
    ops = torch.ops.jepa_kernels
    assert not ops.gather_tokens_forward(torch.randn(0, 4, 8), ids, None, "cpu").any()
    assert not ops.embed_patches_forward(pixels, ids, weight, None, None, None, [], [], "cpu").any()
    pred, rest = torch.ones(2, 3, 8), ("l1", 1.0, True, 1e-5, "mask", 1.0, 1, None, None, 0.0, None, True, "cpu")
    assert not any(x.any() for x in ops.latent_loss_forward(pred, torch.randn(0, 4, 8), ids, None, *rest))


def test_kernels_take_int32_only():
    forward, cu_seqlens = torch.ops.jepa_kernels.gather_tokens_forward, torch.tensor([0, 2])
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32 .+, got torch\.int64 with 1 dim.+; build"):
        forward(torch.randn(1, 4, 3), torch.tensor([0, 1]), cu_seqlens, "cpu")
