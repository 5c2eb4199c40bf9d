"""latent_loss: values by hand, equivalences, and messages."""

import math

import pytest
import torch
from torch.nn import functional as F

import jepa_kernels as jk
from jepa_kernels import Packing

TRITON = pytest.param("triton", marks=pytest.mark.interp)


@pytest.fixture(params=["reference", "cpu", TRITON])
def backend(request):
    return request.param


@pytest.fixture(params=["cpu", TRITON])
def kernel(request):
    return request.param


def draw(masks=2, images=3, count=10, kept=4, channels=24):
    ids = torch.stack([torch.randperm(count)[:kept].sort().values for _ in range(masks * images)])
    return torch.randn(masks * images, kept, channels), torch.randn(images, count, channels), ids


def value_and_grad(pred, *args, **kwargs):
    pred = pred.detach().clone().requires_grad_()
    loss = jk.latent_loss(pred, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, pred)[0]


def test_smooth_l1_by_hand(backend):
    # target row (1, 3): mean 2, deviation 1 -> (-1, 1) but for eps; differences 0.5 and 2
    target = torch.tensor([[[9.0, 9.0], [1.0, 3.0]]])
    pred, ids = torch.tensor([[[-0.5, 3.0]]]), torch.tensor([[1]])
    loss, grad = value_and_grad(pred, target, ids, backend=backend)
    assert loss.item() == pytest.approx((0.5 * 0.25 + 1.5) / 2, abs=1e-5) and loss.dtype == torch.float32
    assert grad.flatten().tolist() == pytest.approx([0.5 / 2, 1 / 2], abs=1e-5)


@pytest.mark.parametrize(
    "kind, beta, loss, grad",
    [("l1", 1.0, 2.5 / 2, (0.5, 0.5)), ("l2", 1.0, 4.25 / 2, (0.5, 2.0)), ("smooth_l1", 2.0, 1.0625 / 2, (0.125, 0.5))],
)
def test_other_kinds_by_hand(backend, kind, beta, loss, grad):
    pred, target = torch.tensor([[[0.5, 2.0]]]), torch.zeros(1, 1, 2)
    got, gradient = value_and_grad(pred, target, kind=kind, beta=beta, normalize=False, backend=backend)
    assert got.item() == pytest.approx(loss) and gradient.flatten().tolist() == pytest.approx(grad)


def test_mask_means_weigh_masks_and_token_means_tokens(backend):
    # one image, two masks of 1 and 3 tokens whose distances are 4 and 1
    packing = Packing.from_lengths([1, 3])
    pred = torch.tensor([4.0, 1.0, 1.0, 1.0])[:, None].expand(4, 8)
    target, ids = torch.zeros(1, 5, 8), torch.tensor([2, 0, 3, 4])
    common = dict(packing=packing, kind="l1", normalize=False, backend=backend)
    assert jk.latent_loss(pred, target, ids, **common).item() == pytest.approx((4 + 1) / 2)
    assert jk.latent_loss(pred, target, ids, reduction="token", **common).item() == pytest.approx(7 / 4)


def test_masks_without_tokens_do_not_count(backend):
    packing = Packing.from_lengths([0, 2])
    loss = jk.latent_loss(
        torch.ones(2, 4), torch.zeros(1, 3, 4), torch.tensor([0, 2]), packing=packing, kind="l1", normalize=False,
        backend=backend,
    )  # fmt: skip
    assert loss.item() == 1.0


def test_no_tokens_give_zero(backend):
    pred = torch.zeros(0, 4, requires_grad=True)
    packing = Packing.from_lengths([0, 0])
    loss = jk.latent_loss(
        pred, torch.randn(2, 3, 4), torch.zeros(0, dtype=torch.long), packing=packing, backend=backend
    )
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, pred)[0].shape == (0, 4)


def test_rows_of_no_sequence_give_zero(kernel):
    packing = Packing.from_lengths([]).padded(3, 0, 0)
    ids = torch.zeros(3, dtype=torch.long)
    loss, grad = value_and_grad(torch.randn(3, 4), torch.randn(2, 5, 4), ids, packing=packing, backend=kernel)
    assert loss.item() == 0.0 and torch.equal(grad, torch.zeros(3, 4))


@pytest.mark.parametrize("lengths", [(3, 0), (0, 0)])
@pytest.mark.parametrize("reduction", ["mask", "token"])
def test_unused_rows_behind_an_empty_mask_have_no_gradient(kernel, lengths, reduction):
    packing = Packing.from_lengths(lengths).padded(5, 2, 3)
    pred, ids = torch.randn(5, 4), torch.arange(5)
    loss, grad = value_and_grad(pred, torch.randn(1, 5, 4), ids, packing=packing, reduction=reduction, backend=kernel)
    used = sum(lengths)
    assert (
        loss.isfinite() and torch.equal(grad[used:], torch.zeros(5 - used, 4)) and bool(grad[:used].any()) == (used > 0)
    )


def test_equals_the_published_chain():
    pred, target, ids = draw(masks=4)
    h = F.layer_norm(target, (24,))
    rows = [torch.gather(h, 1, m[..., None].expand(-1, -1, 24)) for m in ids.chunk(4)]
    expected = F.smooth_l1_loss(pred, torch.cat(rows))
    assert jk.latent_loss(pred, target, ids).item() == pytest.approx(expected.item(), rel=1e-6)


def test_packed_equals_rectangular_exactly(kernel):
    pred, target, ids = draw()
    rectangular = value_and_grad(pred, target, ids, backend=kernel)
    packing = Packing.uniform(6, 4)
    packed = value_and_grad(pred.flatten(0, 1), target, ids.flatten(), packing=packing, backend=kernel)
    assert torch.equal(rectangular[0], packed[0]) and torch.equal(rectangular[1].flatten(0, 1), packed[1])


def test_each_packed_sequence_counts_as_if_it_were_alone(kernel):
    lengths, target = (3, 0, 5, 2), torch.randn(1, 10, 24)
    ids, packing = Packing.from_ids([torch.randperm(10)[:n].sort().values for n in lengths])
    pred = torch.randn(10, 24)
    _, grad = value_and_grad(pred, target, ids, packing=packing, reduction="token", backend=kernel)
    for rows, own in zip(packing.split(torch.arange(10)), lengths, strict=True):
        if own:
            alone = value_and_grad(pred[None, rows], target, ids[None, rows], reduction="token", backend=kernel)[1]
            assert torch.allclose(alone[0] * own / 10, grad[rows], rtol=1e-6, atol=0)


def test_rows_in_another_order_have_the_same_gradient(kernel):
    pred, target, ids = draw(masks=1)
    order = torch.tensor([2, 0, 1])
    plain = value_and_grad(pred, target, ids, backend=kernel)[1]
    moved = value_and_grad(pred[order], target[order], ids[order], backend=kernel)[1]
    assert torch.equal(plain[order], moved)


def test_no_ids_equal_all_ids_exactly(kernel):
    pred, target = torch.randn(6, 10, 24), torch.randn(3, 10, 24)
    every = torch.arange(10).expand(6, 10).contiguous()
    a, b = value_and_grad(pred, target, backend=kernel), value_and_grad(pred, target, every, backend=kernel)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_smooth_l1_with_small_beta_is_l1():
    pred, target, ids = draw()
    smooth = value_and_grad(pred, target, ids, beta=1e-7)
    plain = value_and_grad(pred, target, ids, kind="l1")
    assert smooth[0].item() == pytest.approx(plain[0].item(), abs=1e-6) and torch.allclose(smooth[1], plain[1])


def test_targets_that_are_not_chosen_are_not_read(kernel):
    pred, target, ids = draw(masks=1)
    clean = jk.latent_loss(pred, target, ids, backend=kernel)
    unread = torch.ones(3, 10, dtype=torch.bool)
    unread[torch.arange(3)[:, None], ids] = False
    target[unread] = float("nan")
    assert torch.equal(jk.latent_loss(pred, target, ids, backend=kernel), clean)


@pytest.mark.parametrize("channel", [3, 43])  # of a whole register, and of the last lanes
@pytest.mark.parametrize(
    "options, slope",
    [
        (dict(kind="smooth_l1"), 1.0),
        (dict(kind="smooth_l1", beta=1e-3), 1.0),
        (dict(kind="l1"), 1.0),
        (dict(kind="l1", power=1.5), math.inf),
        (dict(kind="l1", power=2.0), math.inf),
        (dict(kind="l2"), math.inf),
    ],
)
def test_nan_and_infinity_in_pred_propagate(backend, options, slope, channel):
    pred, target, ids = draw(channels=44)
    clean = value_and_grad(pred, target, ids, **options, backend=backend)[1]
    for value, derivative in ((math.inf, slope), (-math.inf, -slope), (math.nan, math.nan)):
        pred[1, 2, channel] = value
        loss, grad = value_and_grad(pred, target, ids, **options, backend=backend)
        assert loss.item() == pytest.approx(abs(value), nan_ok=True)
        assert grad[1, 2, channel].item() == pytest.approx(derivative / pred.numel(), rel=1e-6, nan_ok=True)
        grad[1, 2, channel] = clean[1, 2, channel]
        assert torch.equal(grad, clean)


def test_mixed_dtypes_as_under_autocast(backend):
    pred, target, ids = draw()
    loss, grad = value_and_grad(pred.bfloat16(), target, ids, backend=backend)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(jk.latent_loss(pred.bfloat16().float(), target, ids).item(), rel=1e-6)


def test_fp16_gradients_survive_many_elements():
    # 1 / count is below fp16's smallest number; scaled up as GradScaler does, the gradient must be there
    pred = torch.randn(64, 1024, 64, dtype=torch.float16).requires_grad_()
    loss = jk.latent_loss(pred, torch.randn(64, 1024, 64, dtype=torch.float16), backend="cpu")
    (loss * 65536).backward()
    assert (pred.grad != 0).float().mean() > 0.99


def test_rows_without_images_count_nothing(kernel):
    packing = Packing.from_lengths([]).padded(4, 0, 0)
    empty = torch.zeros(0, 5, 24), torch.zeros(4, dtype=torch.int64)
    loss, grad = value_and_grad(torch.randn(4, 24), *empty, packing=packing, backend=kernel)
    assert loss == 0 and grad.eq(0).all()


def test_float64_targets_are_for_the_reference(kernel):
    pred, target, ids = draw()
    expected = jk.latent_loss(pred, target.double(), ids, backend="reference")
    with pytest.warns(jk.BackendWarning, match="takes targets of float32, bfloat16, float16, got float64"):
        assert torch.equal(jk.latent_loss(pred, target.double(), ids), expected)
    with pytest.raises(jk.BackendError, match="got: takes targets of float32, bfloat16, float16, got float64; leave"):
        jk.latent_loss(pred, target.double(), ids, backend=kernel)


def test_the_cpu_kernel_refuses_types_it_is_not_built_for():
    forward, rest = torch.ops.jepa_kernels.latent_loss_forward, ("l1", 1.0, True, 1e-5, "mask", *PLAIN, True, "cpu")
    message = "tensors must be float32, bfloat16 or float16, got float64; call the public function"
    for pred, target in ((PRED, TARGET.double()), (PRED.double(), TARGET)):
        with pytest.raises(ValueError, match=message):
            forward(pred, target, IDS, None, *rest)


@pytest.mark.parametrize("beta", [1e-30, 1e-20, 1e20])
def test_any_beta_gives_a_finite_gradient(backend, beta):
    loss, grad = value_and_grad(*draw(), beta=beta, backend=backend)
    assert loss.isfinite() and grad.isfinite().all()


def test_no_gradient_reaches_the_target(backend):
    pred, target, ids = draw()
    target.requires_grad_()
    loss = jk.latent_loss(pred.requires_grad_(), target, ids, backend=backend)
    assert torch.autograd.grad(loss, target, allow_unused=True)[0] is None


PRED, TARGET, IDS = draw()
PLAIN = (1.0, 1, None, None, 0.0, None)  # power, levels, gain, shift, norm_eps, weight
BAD = [
    (dict(pred=PRED.int()), TypeError, r"pred must be of dtype .+, got int32; convert"),
    (dict(pred=PRED[0]), ValueError, r"pred must have shape \[M, K, E\], got \(4, 24\)"),
    (dict(target=TARGET[..., :5]), ValueError, "target must have 24 channels like pred, got 5"),
    (dict(ids=IDS[:, :3]), ValueError, r"ids must have shape \(6, 4\) like pred, got \(6, 3\)"),
    (dict(ids=IDS.int()), TypeError, "ids must be of dtype int64, got int32"),
    (dict(ids=IDS + 7), ValueError, r"ids must lie in \[0, 10\) and increase within each row, got \d+ at position \d+"),
    (dict(ids=IDS.flip(1).contiguous()), ValueError, r"ids must lie in \[0, 10\) and increase within each row"),
    (dict(ids=None), ValueError, "pred must hold 10 tokens like target, got 4; pass ids"),
    (dict(pred=PRED[:5], ids=IDS[:5]), ValueError, "pred must hold a multiple of the 3 images, got 5; order rows mask"),
    (dict(kind="huber"), ValueError, "kind must be one of smooth_l1, l1, l2, got 'huber'"),
    (dict(reduction="sum"), ValueError, "reduction must be one of mask, token, got 'sum'"),
    (dict(beta=0.0), ValueError, "beta must be at least 1e-30, got 0.0; use kind='l1'"),
    (dict(beta=1e-40), ValueError, "beta must be at least 1e-30, got 1e-40; use kind='l1'"),
    (dict(beta=math.inf), ValueError, r"beta must be at most 1e\+30, got inf; use kind='l2', scaled by"),
    (dict(beta=1e39), ValueError, r"beta must be at most 1e\+30, got 1e\+39; use kind='l2', scaled by"),
    (dict(beta=None), TypeError, "beta must be a number, got NoneType; pass a float"),
    (dict(eps="small"), TypeError, "eps must be a number, got str; pass a float"),
    (dict(normalize="no"), TypeError, "normalize must be a bool, got str; pass True or False"),
    (dict(packing=IDS), TypeError, "packing must be a Packing, got Tensor; build one with Packing.from_lengths"),
    (dict(eps=-1.0), ValueError, "eps must be greater than 0 and finite, got -1.0; use 1e-5"),
    (dict(eps=math.inf), ValueError, "eps must be greater than 0 and finite, got inf; use 1e-5"),
    (dict(target=TARGET.to("meta")), ValueError, "target must be on cpu, got meta"),
    (
        dict(pred=PRED[0], ids=IDS[0], packing=Packing.from_lengths([1, 1, 1])),
        ValueError,
        "pred must hold packing.tokens = 3 rows, got 4",
    ),
    (dict(pred=PRED[0], ids=None, packing=Packing.from_lengths([4])), TypeError, "ids must be given with a packing"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match="latent_loss: " + message):
        jk.latent_loss(**{**dict(pred=PRED, target=TARGET, ids=IDS), **change})
