"""latent_loss: powers, the encoder's norm, levels and weights, by hand and against plain PyTorch."""

import math

import pytest
import torch
from torch.nn import functional as F

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels._core.case import Case
from jepa_kernels.testing import check_case
from tests.ops.test_latent_loss import TRITON, draw, value_and_grad


@pytest.fixture(params=["reference", "cpu", TRITON])
def backend(request):
    return request.param


@pytest.fixture(params=["cpu", TRITON])
def kernel(request):
    return request.param


def equal(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1].flatten(), b[1].flatten())


@pytest.mark.parametrize(
    "power, loss, grad",
    [(1, (1 + 4) / 2, (1, -1)), (2, (1 + 16) / 4, (1, -4)), (3, (1 + 64) / 6, (1, -16)), (1.5, (1 + 8) / 3, (1, -2))],
)
def test_powers_by_hand(backend, power, loss, grad):
    pred, target = torch.tensor([[[1.0, -4.0]]]), torch.zeros(1, 1, 2)
    got, gradient = value_and_grad(pred, target, kind="l1", power=power, normalize=False, backend=backend)
    assert got.item() == pytest.approx(loss, rel=1e-6)
    assert (2 * gradient).flatten().tolist() == pytest.approx(grad, rel=1e-6)


def test_a_power_has_all_its_digits(kernel):
    def make(generator):
        pred = 1e-12 * torch.randn(1, 5, 40, generator=generator, dtype=torch.float64)
        return dict(pred=pred, target=torch.zeros_like(pred), kind="l1", power=1.7, normalize=False)

    for parity in check_case("latent_loss", kernel, Case("", make, ("pred",)), torch.float32):
        assert parity.ok, parity


def test_power_1_is_l1_and_power_2_half_of_l2_exactly(kernel):
    pred, target, ids = draw()
    l1, l2 = (value_and_grad(pred, target, ids, kind=kind, backend=kernel) for kind in ("l1", "l2"))
    assert equal(value_and_grad(pred, target, ids, kind="l1", power=1, backend=kernel), l1)
    half = value_and_grad(pred, target, ids, kind="l1", power=2.0, backend=kernel)
    assert equal(half, (l2[0] / 2, l2[1] / 2))


@pytest.mark.parametrize("power", [1.0, 1.25, 2.0, 3.0])
def test_equal_latents_have_no_gradient_at_any_power(backend, power):
    pred, target = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)
    loss, grad = value_and_grad(pred, target, kind="l1", power=power, normalize=False, backend=backend)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_powers_propagate_nan_and_infinity(backend):
    pred, target, ids = draw()
    pred[1, 2, 3] = float("nan")
    loss, grad = value_and_grad(pred, target, ids, kind="l1", power=1.5, backend=backend)
    assert math.isnan(loss.item()) and grad[1, 2, 3].isnan() and grad.isnan().sum() == 1
    pred[1, 2, 3] = -float("inf")
    loss, grad = value_and_grad(pred, target, ids, kind="l1", power=1.5, backend=backend)
    assert loss.item() == float("inf") and grad[1, 2, 3] == -float("inf")


def test_norm_by_hand(backend):
    # (1, 3): mean 2, deviation 1 -> (-1, 1); gains (2, 4), biases (1, 3) -> (-1, 7); its norm -> (-1, 1) again
    target, norm = torch.tensor([[[1.0, 3.0]]]), (torch.tensor([2.0, 4.0]), torch.tensor([1.0, 3.0]), 1e-12)
    pred, common = torch.zeros(1, 1, 2), dict(kind="l1", eps=1e-12, backend=backend)
    once = value_and_grad(pred, target, norm=norm, normalize=False, **common)
    assert once[0].item() == pytest.approx((1 + 7) / 2) and once[1].flatten().tolist() == [0.5, -0.5]
    assert jk.latent_loss(pred, target, norm=norm, **common).item() == pytest.approx((1 + 1) / 2)


def test_norm_is_the_two_layer_norms(backend):
    pred, target, ids = draw()
    module = torch.nn.LayerNorm(24, eps=1e-6)
    torch.nn.init.normal_(module.weight), torch.nn.init.normal_(module.bias)
    norm = (module.weight, module.bias, module.eps)
    found = value_and_grad(pred, target * 7 + 3, ids, norm=norm, backend=backend)
    expected = value_and_grad(pred, module(target * 7 + 3).detach(), ids, backend="reference")
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    loss = jk.latent_loss(pred.requires_grad_(), target, ids, norm=norm, backend=backend)
    assert torch.autograd.grad(loss, list(module.parameters()), allow_unused=True) == (None, None)


def test_a_norm_of_unit_weight_and_no_bias_changes_only_eps(backend):
    pred, target, ids = draw()
    unit = (torch.ones(24), torch.zeros(24), 1e-12)
    found = value_and_grad(pred, target, ids, norm=unit, normalize=False, eps=3.0, backend=backend)
    torch.testing.assert_close(found, value_and_grad(pred, target, ids, eps=1e-12, backend=backend))
    twice = value_and_grad(pred, target, ids, norm=unit, eps=1e-12, backend=backend)
    torch.testing.assert_close(twice, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_may_have_a_dtype_and_strides_of_its_own(kernel, dtype):
    pred, target, ids = draw()
    gain, shift = torch.randn(2, 24, 3).to(dtype).unbind(0)
    plain = value_and_grad(pred, target, ids, norm=(gain[:, 1].float(), shift[:, 1].contiguous(), 1e-6), backend=kernel)
    assert equal(value_and_grad(pred, target, ids, norm=(gain[:, 1], shift[:, 1], 1e-6), backend=kernel), plain)


def test_one_level_is_none(kernel):
    pred, target, ids = draw()
    assert equal(
        value_and_grad(pred, target, ids, levels=1, backend=kernel), value_and_grad(pred, target, ids, backend=kernel)
    )


def test_each_level_is_normalised_by_itself(backend):
    pred, target, ids = draw(channels=40)
    found = value_and_grad(pred, target, ids, kind="l1", levels=4, backend=backend)
    parts = [
        value_and_grad(x, y, ids, kind="l1", backend=backend)
        for x, y in zip(pred.chunk(4, -1), target.chunk(4, -1), strict=True)
    ]
    assert found[0].item() == pytest.approx(sum(loss.item() for loss, _ in parts) / 4, rel=1e-6)
    torch.testing.assert_close(found[1], torch.cat([grad for _, grad in parts], -1) / 4)


def test_a_level_has_the_encoders_norm_first_then_its_own(backend):
    """Four layer norms of the encoder, one a level, then one without affine each: the order of V-JEPA 2.1."""
    pred, target, ids = draw(channels=40)
    modules = [torch.nn.LayerNorm(10, eps=1e-6) for _ in range(4)]
    [torch.nn.init.normal_(p) for m in modules for p in m.parameters()]
    latents = torch.cat([F.layer_norm(m(t), (10,)) for m, t in zip(modules, target.chunk(4, -1), strict=True)], -1)
    norm = (torch.cat([m.weight for m in modules]), torch.cat([m.bias for m in modules]), 1e-6)
    found = value_and_grad(pred, target, ids, norm=norm, levels=4, backend=backend)
    expected = value_and_grad(pred, latents.detach(), ids, normalize=False, backend="reference")
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


def test_weights_multiply_and_the_divisor_stays_the_count(backend):
    # distances 4 and 1 of one mask: (4 * 3 + 1 * 0.5) / 2
    pred = torch.tensor([4.0, 1.0])[:, None].expand(2, 8)
    loss, grad = value_and_grad(
        pred, torch.zeros(1, 5, 8), torch.tensor([0, 3]), packing=Packing.from_lengths([2]), kind="l1",
        normalize=False, weight=torch.tensor([3.0, 0.5]), backend=backend,
    )  # fmt: skip
    assert loss.item() == pytest.approx(12.5 / 2)
    torch.testing.assert_close(grad, torch.tensor([3.0, 0.5])[:, None].expand(2, 8) / 16)


@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "l2"])
def test_weights_of_one_are_none(kernel, kind):
    pred, target, ids = draw()
    ones = value_and_grad(pred, target, ids, kind=kind, weight=torch.ones(6, 4), backend=kernel)
    assert equal(ones, value_and_grad(pred, target, ids, kind=kind, backend=kernel))


@pytest.mark.parametrize("levels", [1, 3])
def test_packed_equals_rectangular_with_every_option(kernel, levels):
    pred, target, ids = draw()
    options = dict(norm=(torch.rand(24), torch.rand(24), 1e-6), levels=levels, kind="l1", power=1.5, backend=kernel)
    weight = torch.rand(6, 4)
    rectangular = value_and_grad(pred, target, ids, weight=weight, **options)
    packed = value_and_grad(
        pred.flatten(0, 1), target, ids.flatten(), packing=Packing.uniform(6, 4), weight=weight.flatten(), **options
    )
    assert equal(rectangular, packed)
    wide = torch.full((4, 12), float("nan"))
    wide[:, ::2] = weight.T
    assert equal(value_and_grad(pred, target, ids, weight=wide[:, ::2].T, **options), rectangular)


def test_weights_of_unused_rows_are_not_read(kernel):
    packing = Packing.from_lengths([3]).padded(5, 1, 3)
    pred, weight = torch.randn(5, 8), torch.tensor([1.0, 2.0, 3.0, float("nan"), float("nan")])
    loss, grad = value_and_grad(
        pred, torch.randn(1, 9, 8), torch.arange(5), packing=packing, weight=weight, backend=kernel
    )
    assert loss.isfinite() and torch.equal(grad[3:], torch.zeros(2, 8)) and grad[:3].any()


def test_constant_rows_are_their_bias(backend):
    bias = torch.linspace(-1, 1, 8)
    norm, target = (torch.full((8,), 5.0), bias, 1e-6), torch.full((1, 3, 8), 1e4)
    loss = jk.latent_loss(bias.expand(1, 3, 8), target, norm=norm, normalize=False, kind="l1", backend=backend)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_wide_types_are_for_the_reference(kernel):
    pred, target, ids = draw()
    for options, reason in (
        (dict(weight=torch.ones(6, 4, dtype=torch.float64)), "takes weights of float32, got float64"),
        (
            dict(norm=(torch.ones(24).double(), torch.ones(24), 1e-6)),
            "takes a norm of float32, .+, got float64 and float32",
        ),
    ):
        assert jk.latent_loss(pred, target, ids, **options, backend="reference").isfinite()
        with pytest.raises(jk.BackendError, match=reason):
            jk.latent_loss(pred, target, ids, **options, backend=kernel)


PRED, TARGET, IDS = draw()
ONES = torch.ones(24)
BAD = [
    (dict(power=2.0), ValueError, "power must be 1 with kind 'smooth_l1', got 2.0; use kind='l1'"),
    (dict(power=0.5, kind="l1"), ValueError, "power must be at least 1 and finite, got 0.5; use 1"),
    (dict(power=float("nan"), kind="l1"), ValueError, "power must be at least 1 and finite, got nan"),
    (dict(power=float("inf"), kind="l1"), ValueError, "power must be at least 1 and finite, got inf"),
    (dict(power="2", kind="l1"), TypeError, "power must be a number, got str"),
    (dict(levels=0), ValueError, "levels must be at least 1 and divide the 24 channels, got 0; leave it out"),
    (dict(levels=5), ValueError, "levels must be at least 1 and divide the 24 channels, got 5"),
    (dict(levels=2.0), TypeError, "levels must be an integer, got float; pass how many"),
    (dict(norm=torch.nn.LayerNorm(24)), TypeError, r"norm must be \(weight, bias, eps\), got LayerNorm; pass \(n.wei"),
    (dict(norm=(ONES, ONES)), TypeError, r"norm must be \(weight, bias, eps\), got 2 values"),
    (dict(norm=(ONES, None, 1e-6)), TypeError, "norm bias must be a tensor, got NoneType"),
    (dict(norm=(ONES[:9], ONES, 1e-6)), ValueError, "norm weight must have 24 channels like pred, got 9; concatenate"),
    (dict(norm=(ONES, ONES[None], 1e-6)), ValueError, r"norm bias must have shape \[E\], got \(1, 24\)"),
    (dict(norm=(ONES, ONES, 0.0)), ValueError, "norm eps must be greater than 0 and finite, got 0.0; use the enc"),
    (dict(norm=(ONES, ONES, float("inf"))), ValueError, "norm eps must be greater than 0 and finite, got inf"),
    (dict(norm=(ONES, ONES, "x")), TypeError, "norm eps must be a number, got str"),
    (dict(weight=torch.ones(24)), ValueError, r"weight must have shape \[M, K\], got \(24,\)"),
    (dict(weight=torch.ones(6, 3)), ValueError, r"weight must have shape \(6, 4\) like pred, got \(6, 3\); pass one"),
    (dict(weight=torch.ones(6, 4).bfloat16()), TypeError, "weight must be of dtype float32, float64, got bfloat16"),
    (dict(weight=torch.ones(6, 4, requires_grad=True)), ValueError, "weight must not require grad, got requires_grad"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_options_are_named(change, error, message):
    with pytest.raises(error, match="latent_loss: " + message):
        jk.latent_loss(**{**dict(pred=PRED, target=TARGET, ids=IDS), **change})
