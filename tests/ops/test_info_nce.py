"""info_nce: values a person can check, equalities, bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

import jepa_kernels as jk
from benchmarks.memory import peak_bytes
from benchmarks.ops.bench_info_nce import published
from jepa_kernels._core.case import Case
from jepa_kernels.ops.info_nce.cases import ALL, KEPT, pairs
from jepa_kernels.testing import check_case

ULP = 10 * 2**-24  # the rounding of logits of 10
BACKENDS = ["reference", "cpu", pytest.param("triton", marks=pytest.mark.interp)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=BACKENDS[1:])
def kernel(request):
    return request.param


def draw(batch=6, channels=24):
    x, noise = torch.randn(2, batch, channels)
    return x, x + noise


def value_and_grads(x, y, temperature=0.1, **options):
    leaves = [t.clone().requires_grad_() for t in (x, y, torch.as_tensor(temperature, dtype=x.dtype))]
    loss = jk.info_nce(*leaves, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def test_two_orthogonal_pairs_by_hand(backend):
    # S = [[2, 0], [0, 2]]: every row and column gives log(1 + e^-2), whatever the lengths of the embeddings
    x, y = torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([[1.0, 0.0], [0.0, 7.0]])
    loss, dx, dy, heat = value_and_grads(x, y, 0.5, backend=backend)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2)), rel=1e-6)
    # dS_ii = -2 q / 4 with q = e^-2 / (1 + e^-2), dS_ij = 2 q / 4; d loss / d temperature = -sum dS S / temperature
    q = math.exp(-2) / (1 + math.exp(-2))
    assert heat.item() == pytest.approx(2 * 2 * q / 2 / 0.5, rel=1e-5)
    # across the embedding, over its length: q / 2 of the other's direction, over the temperature
    assert torch.allclose(dx, torch.tensor([[0.0, q / 2 / 0.5 / 3], [q / 2 / 0.5 / 0.5, 0.0]]), rtol=1e-5, atol=1e-8)
    assert torch.allclose(dy, torch.tensor([[0.0, q / 2 / 0.5], [q / 2 / 0.5 / 7, 0.0]]), rtol=1e-5, atol=1e-8)


def test_one_pair_has_nothing_to_tell_apart(backend):
    x, y = draw(1)
    for smoothing in (0.0, 0.3):
        loss, *grads = value_and_grads(x, y, label_smoothing=smoothing, backend=backend)
        assert loss.item() == pytest.approx(0, abs=1e-6) and all(g.abs().max() < 1e-6 for g in grads)


def test_no_pairs_give_zero(backend):
    loss, dx, dy, heat = value_and_grads(torch.zeros(0, 5), torch.zeros(0, 5), backend=backend)
    assert loss.item() == 0 and loss.dtype == torch.float32 and dx.shape == dy.shape == (0, 5) and heat.item() == 0


def test_equals_torchs_cross_entropy(backend):
    x, y = draw()
    scores = F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T / 0.1
    for smoothing in (0.0, 0.1, 1.0):
        labels = torch.arange(6)
        rows, columns = (F.cross_entropy(s, labels, label_smoothing=smoothing) for s in (scores, scores.T))
        loss = jk.info_nce(x, y, 0.1, label_smoothing=smoothing, backend=backend)
        assert loss.item() == pytest.approx(((rows + columns) / 2).item(), abs=ULP)


def test_duplicates_are_neither_positives_nor_negatives(backend):
    # rows 0 and 2 are one item: row 0 sees columns 0 and 1 alone
    x, y = draw(3)
    scores = F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T / 0.1
    scores[0, 2] = scores[2, 0] = -torch.inf
    expected = (F.cross_entropy(scores, torch.arange(3)) + F.cross_entropy(scores.T, torch.arange(3))) / 2
    labels = torch.tensor([-(2**62), 5, -(2**62)])
    loss, dx, *_ = value_and_grads(x, y, duplicates=labels, backend=backend)
    assert loss.item() == pytest.approx(expected.item(), abs=ULP)
    # what row 2 looks like is nothing to row 0
    other = y.clone()
    other[2] = torch.randn(24)
    assert torch.allclose(value_and_grads(x, other, duplicates=labels, backend=backend)[1][0], dx[0], rtol=1e-4)


def test_smoothing_is_spread_over_the_candidates_that_are_left(backend):
    x, y = draw(3)
    labels = torch.tensor([4, 4, 9])
    scores = F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T / 0.1
    total = 0.0
    for s in (scores, scores.T):
        for i, seen in enumerate(([0, 2], [1, 2], [0, 1, 2])):
            log = s[i, seen].log_softmax(0)
            total -= 0.8 * log[seen.index(i)] + 0.2 * log.mean()
    loss = jk.info_nce(x, y, 0.1, duplicates=labels, label_smoothing=0.2, backend=backend)
    assert loss.item() == pytest.approx(total.item() / 6, abs=ULP)


def test_little_smoothing_keeps_its_digits(kernel):
    options = dict(temperature=0.01, noise=0.1, label_smoothing=1e-4)  # small losses: smoothing is most of the gradient
    for parity in check_case("info_nce", kernel, Case("", pairs(24, 33, **options), ALL, keep=KEPT), torch.float32):
        assert parity.ok, parity


def test_items_of_their_own_equal_no_labels_exactly(kernel):
    x, y = draw(40)
    plain = value_and_grads(x, y, backend=kernel)
    labelled = value_and_grads(x, y, duplicates=torch.randperm(40) * 10**15, backend=kernel)
    assert all(map(torch.equal, plain, labelled))


def test_permuted_pairs(backend):
    x, y = draw(70)
    order = torch.randperm(70)
    loss, dx, dy, heat = value_and_grads(x, y, backend=backend)
    moved = value_and_grads(x[order], y[order], backend=backend)
    assert torch.allclose(moved[0], loss, rtol=1e-6) and torch.allclose(moved[3], heat, rtol=1e-5)
    for a, b in ((moved[1], dx[order]), (moved[2], dy[order])):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


def test_sides_exchanged(backend):
    x, y = draw(30)
    loss, dx, dy, heat = value_and_grads(x, y, backend=backend)
    other = value_and_grads(y, x, backend=backend)
    for a, b in zip(other, (loss, dy, dx, heat), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


def test_lengths_of_embeddings_do_not_count(kernel):
    x, y = draw(20)
    lengths = 2.0 ** torch.randint(-20, 20, (20, 1))
    loss, dx, *_ = value_and_grads(x, y, backend=kernel)
    scaled = value_and_grads(x * lengths, y, backend=kernel)
    assert torch.allclose(scaled[0], loss, rtol=1e-6) and torch.allclose(scaled[1] * lengths, dx, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_large_logits(kernel, normalize):
    """1 / 0.01, and embeddings as they are with logits of thousands: no overflow, the exact loss."""
    x, y = draw(50)
    temperature, x = (0.01, x) if normalize else (0.005, 3 * x)
    exact = value_and_grads(x.double(), y.double(), temperature, normalize=normalize, backend="reference")
    found = value_and_grads(x, y, temperature, normalize=normalize, backend=kernel)
    for a, b in zip(found, exact, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_squares_beyond_fp32(backend):
    x, y = draw()
    size = 2.0**70  # exact: directions stay, and gradients shrink by as much
    plain, huge = (value_and_grads(x * f, y, backend=backend) for f in (1.0, size))
    torch.testing.assert_close(huge[0], plain[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(huge[1] * size, plain[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(huge[2:], plain[2:], rtol=1e-5, atol=1e-6)


def test_rows_without_a_direction(backend):
    x, y = draw(4)
    x[2] = 0
    loss, dx, dy, heat = value_and_grads(x, y, backend=backend)
    assert all(t.isfinite().all() for t in (loss, dx, dy, heat))
    assert loss.item() == pytest.approx(jk.info_nce(x.double(), y.double(), 0.1, backend="reference").item(), rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_propagate(backend, value):
    x, y = draw()
    x[3, 5] = value
    loss, dx, dy, heat = value_and_grads(x, y, backend=backend)
    assert loss.isnan() and dx.isnan().any() and dy.isnan().any() and heat.isnan()


def test_gradient_reaches_what_needs_it(kernel):
    x, y = draw()
    full = value_and_grads(x, y, backend=kernel)
    leaf = y.clone().requires_grad_()
    jk.info_nce(x, leaf, 0.1, backend=kernel).backward()
    assert torch.equal(leaf.grad, full[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_temperatures_gradient_has_its_dtype(kernel, dtype):
    x, y = draw()
    heat = torch.tensor(0.125, dtype=dtype, requires_grad=True)
    jk.info_nce(x, y, heat, backend=kernel).backward()
    assert heat.grad.dtype == dtype
    assert heat.grad.item() == pytest.approx(value_and_grads(x, y, 0.125)[3].item(), rel=1e-2)


def test_a_learned_logarithm_of_the_temperature(kernel):
    x, y = draw()
    log = torch.tensor(2.0, requires_grad=True)
    jk.info_nce(x, y, (-log).exp(), backend=kernel).backward()
    heat = value_and_grads(x, y, math.exp(-2.0))[3]
    assert log.grad.item() == pytest.approx(-math.exp(-2.0) * heat.item(), rel=1e-5)


def test_temperatures_in_a_tensor_compile_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    (x, y), counter = draw(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, y, heat: jk.info_nce(x, y, heat), fullgraph=True, backend=counter)
    for heat in torch.linspace(0.05, 1, 12):
        assert torch.equal(compiled(x, y, heat.clone()), jk.info_nce(x, y, heat))
    assert counter.frame_count == 1


def test_autocast_lowers_nothing(backend):
    x, y = draw(20)
    plain = value_and_grads(x, y, backend=backend)
    leaves = [t.requires_grad_() for t in (x, y, torch.tensor(0.1))]
    with torch.autocast("cpu", torch.bfloat16):
        loss = jk.info_nce(*leaves, backend=backend)
    assert all(map(torch.equal, plain, (loss, *torch.autograd.grad(loss, leaves))))


def test_memory_between_tiles_is_not_read():
    x, y = draw(300, 40)
    plain = value_and_grads(x, y, backend="cpu")
    wide_x, wide_y = torch.full((2, 300, 50), torch.nan)
    wide_x[:, 3:43], wide_y[:, 3:43] = x, y
    assert all(map(torch.equal, plain, value_and_grads_of_views(wide_x[:, 3:43], wide_y[:, 3:43])))


def value_and_grads_of_views(x, y):
    heat = torch.tensor(0.1, requires_grad=True)
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = jk.info_nce(x, y, heat, backend="cpu")
    return loss.detach(), *torch.autograd.grad(loss, [x, y, heat])


def test_peak_memory_beyond_the_outputs_is_a_twentieth_of_the_eager_chains():
    x, y = (t.requires_grad_() for t in draw(4096, 512))
    heat = torch.tensor(0.07, requires_grad=True)

    def peak(function):
        return peak_bytes(lambda: torch.autograd.grad(function(x, y, heat), [x, y, heat]))

    beyond = peak(lambda *inputs: jk.info_nce(*inputs, backend="cpu")) - 2 * x.numel() * 4
    assert 0 < beyond <= 0.05 * peak(published)


X, Y, LABELS = torch.zeros(3, 4), torch.zeros(3, 4), torch.arange(3)
BAD = [
    (dict(x=torch.zeros(3)), ValueError, r"x must have shape \[B, E\], got \(3,\)"),
    (dict(x=X.long()), TypeError, "x must be of dtype .+, got int64"),
    (dict(y=Y.half()), TypeError, "y must be of dtype float32, got float16"),
    (dict(y=torch.zeros(2, 4)), ValueError, r"y must have shape \(3, 4\) like x, got \(2, 4\)"),
    (dict(temperature=0), ValueError, "temperature must be positive and finite, got 0"),
    (dict(temperature=10**400), ValueError, "temperature must be positive and finite, got 10+"),
    (dict(temperature=-0.1), ValueError, "temperature must be positive and finite, got -0.1"),
    (dict(temperature=math.nan), ValueError, "temperature must be positive and finite, got nan"),
    (dict(temperature=math.inf), ValueError, "temperature must be positive and finite, got inf"),
    (dict(temperature=torch.tensor(0.0)), ValueError, "temperature must be positive and finite, got 0.0"),
    (dict(temperature=torch.ones(1)), ValueError, r"temperature must be a number or 0-dim, got shape \(1,\)"),
    (dict(temperature=torch.tensor(1)), TypeError, "temperature must be of dtype .+, got int64"),
    (dict(temperature="warm"), TypeError, "temperature must be a number or a tensor, got str"),
    (dict(normalize=None), TypeError, "normalize must be a bool, got NoneType"),
    (dict(group="all"), TypeError, "group must be a process group of this rank, got str"),
    (dict(label_smoothing=1.5), ValueError, r"label_smoothing must lie in \[0, 1\], got 1.5"),
    (dict(label_smoothing="some"), TypeError, "label_smoothing must be a number, got str"),
    (dict(duplicates=LABELS.int()), TypeError, "duplicates must be of dtype int64, got int32"),
    (dict(duplicates=LABELS[:2]), ValueError, "duplicates must hold 3 labels like x, got 2"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=f"^info_nce: {message}; .+"):
        jk.info_nce(**{**dict(x=X, y=Y, temperature=0.1), **change})


def test_too_many_labels():
    x = torch.zeros(2**24 + 1, 1).bfloat16()
    with pytest.raises(ValueError, match=r"info_nce: duplicates must label at most 16777216 rows, got 16777217; .+"):
        jk.info_nce(x, x, 0.1, duplicates=torch.zeros(2**24 + 1, dtype=torch.int64))


def test_a_temperature_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"info_nce: temperature must be on cpu, got meta; move it"):
        jk.info_nce(X, Y, torch.ones((), device="meta"))


def test_a_group_is_refused_under_compile():
    with pytest.raises(ValueError, match=r"info_nce: group must be None under torch.compile, got a group; .+"):
        from jepa_kernels.ops.info_nce import distributed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            distributed.over_ranks(X, Y, 0.1, True, 0.0, None, object(), None)
