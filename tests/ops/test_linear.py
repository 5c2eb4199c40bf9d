"""linear: values by hand, what is exact, when the kernel is chosen, and messages."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import jepa_kernels as jk
from jepa_kernels import _C
from jepa_kernels.ops.linear import op as linear_op
from jepa_kernels.testing import hold


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    return request.param


def whole_numbers(*shape):
    """Small integers: sums of their products are exact in fp32, whatever the order."""
    return torch.randint(-4, 5, shape).float()


def leaves_of(rows, depth, width, make=torch.randn):
    return [make(*shape).requires_grad_() for shape in ((*rows, depth), (width, depth), (width,))]


def gradients(leaves, grad, backend="cpu", **options):
    out = jk.linear(*leaves, backend=backend, **options)
    return out, *torch.autograd.grad(out, leaves, grad)


def test_by_hand(backend):
    x = torch.tensor([[1.0, 2], [3, 4], [5, 6]]).requires_grad_()
    weight, bias = torch.tensor([[1.0, 10], [0, -1]]).requires_grad_(), torch.tensor([0.5, 0.25]).requires_grad_()
    grad = torch.tensor([[1.0, 0], [0, 2], [1, 1]])
    out, dx, dweight, dbias = gradients([x, weight, bias], grad, backend)
    assert out.tolist() == [[21.5, -1.75], [43.5, -3.75], [65.5, -5.75]]
    assert dx.tolist() == [[1, 10], [0, -2], [1, 9]]
    assert dweight.tolist() == [[1 + 5, 2 + 6], [2 * 3 + 5, 2 * 4 + 6]]
    assert dbias.tolist() == [2, 3]


def test_a_lone_row_and_no_bias(backend):
    out = jk.linear(torch.tensor([2.0, 3]), torch.tensor([[1.0, 0], [1, 1], [0, 5]]), backend=backend)
    assert out.tolist() == [2, 5, 15]


def test_gelu_by_hand(backend):
    """Of z = 1, -1, 0: Phi(1) = 0.841344746, the density there 0.241970725."""
    x = torch.tensor([[1.0], [-1], [0]]).requires_grad_()
    weight, bias = torch.tensor([[1.0]]).requires_grad_(), torch.zeros(1).requires_grad_()
    grad = torch.tensor([[1.0], [1], [2]])
    found = gradients([x, weight, bias], grad, backend, activation="gelu")
    up, down = 0.841344746 + 0.241970725, 0.158655254 - 0.241970725
    wanted = [0.841344746, -0.158655254, 0], [up, down, 2 * 0.5], [up - down], [up + down + 1]
    for actual, values in zip(found, wanted, strict=True):
        assert actual.flatten().tolist() == pytest.approx(values, rel=3e-7, abs=6e-8)


def through_identity(z):
    """gelu(z) and its slope."""
    z = z[:, None].clone().requires_grad_()
    out = jk.linear(z, torch.ones(1, 1), activation="gelu", backend="cpu")
    out.sum().backward()
    return out.detach()[:, 0], z.grad[:, 0]


def test_gelu_is_accurate_in_the_tails_where_torchs_cancels():
    z = torch.cat([torch.linspace(-8, 8, 20_001), torch.randn(20_000)])
    found, slope = (x.double() for x in through_identity(z))
    z = z.double()
    exact = z * torch.special.log_ndtr(z).exp()
    assert ((found - exact).abs() <= 4.5e-7 * exact.abs() * (1 + z.abs())).all()
    steep = torch.special.log_ndtr(z).exp() + z * (-z * z / 2).exp() / math.tau**0.5
    assert (slope - steep).abs().max() <= 2.5e-7
    theirs = F.gelu(z.float()).double()
    assert (found - exact).norm() <= 0.7 * (theirs - exact).norm()


def test_gelu_of_what_is_huge_or_not_finite():
    inf, nan = float("inf"), float("nan")
    found, slope = through_identity(torch.tensor([1e30, -1e30, 13.5, -13.5, inf, nan]))
    assert found[[0, 2, 4]].tolist() == [torch.tensor(1e30).item(), 13.5, inf]
    assert found[1] == 0 and abs(found[3]) < 1e-38 and found[5].isnan() and slope[5].isnan()
    assert slope[:4].tolist() == [1, 0, 1, pytest.approx(0, abs=1e-36)]
    assert [x.tolist() for x in through_identity(torch.tensor([0.0, -0.0]))] == [[0, 0], [0.5, 0.5]]


@pytest.mark.parametrize("rows, depth, width", [(97, 129, 65), (300, 3_200, 33), (2_100, 70, 1_040)])
def test_gelu_is_of_the_same_product_and_its_gradients_of_the_same_slopes_exactly(rows, depth, width):
    """One chunk of the depth and three, in the cache and past it; a column is as good as alone."""
    leaves, grad = leaves_of((rows,), depth, width), torch.randn(rows, width)
    found = gradients(leaves, grad, activation="gelu")
    z = jk.linear(*leaves, backend="cpu").detach()
    out, slope = (x.view(rows, width) for x in through_identity(z.flatten()))
    wanted = out, *gradients(leaves, grad * slope)[1:]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with torch.no_grad():
        assert torch.equal(jk.linear(*leaves, activation="gelu", backend="cpu"), out)


@pytest.mark.parametrize("rows", [0, 1, 13, 97])
@pytest.mark.parametrize("depth, width", [(1, 1), (7, 100), (64, 33), (385, 17), (700, 96)])
def test_equals_torch_exactly_where_sums_are_exact(rows, depth, width):
    leaves = leaves_of((rows,), depth, width, whole_numbers)
    grad = whole_numbers(rows, width)
    expected = F.linear(*leaves)
    for found, wanted in zip(
        gradients(leaves, grad), (expected, *torch.autograd.grad(expected, leaves, grad)), strict=True
    ):
        assert torch.equal(found, wanted)


VIEWS = {
    "a slice of channels": lambda: (whole_numbers(40, 90)[:, 7:68], whole_numbers(20, 61)),
    "every other row": lambda: (whole_numbers(60, 61)[::2], whole_numbers(20, 61)),
    "transposed": lambda: (whole_numbers(61, 33).t(), whole_numbers(20, 61)),
    "axes swapped": lambda: (whole_numbers(5, 3, 7, 61).permute(2, 0, 1, 3), whole_numbers(20, 61)),
    "weight transposed": lambda: (whole_numbers(33, 61), whole_numbers(61, 20).t()),
    "part of a weight": lambda: (whole_numbers(33, 61), whole_numbers(60, 70)[20:40, 9:]),
    "one row for all": lambda: (whole_numbers(61).expand(2, 9, 61), whole_numbers(20, 61)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_any_strides_are_read_exactly(name):
    x, weight = VIEWS[name]()
    leaves, grad = [x.requires_grad_(), weight.requires_grad_()], whole_numbers(*x.shape[:-1], 20)
    ours, theirs = jk.linear(*leaves, backend="cpu"), F.linear(*leaves)
    assert torch.equal(ours, theirs) and ours.is_contiguous()
    for of in (grad, grad.transpose(0, -1).contiguous().transpose(0, -1), grad[..., :1].expand(grad.shape)):
        found, wanted = (torch.autograd.grad(out, leaves, of, retain_graph=True) for out in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rows, depth, width", [(2_100, 384, 200), (1_030, 1_700, 70), (97, 100, 700)])
def test_large_products_do_not_depend_on_the_thread_count_and_keep_the_budget(rows, depth, width):
    leaves, grad, before = leaves_of((rows,), depth, width), torch.randn(rows, width), torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(gradients(leaves, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    exact = gradients([x.detach().double().requires_grad_() for x in leaves], grad.double(), "reference")
    for name, *values in zip(
        ("y", "dx", "dweight", "dbias"), runs[0], exact, gradients(leaves, grad, "reference"), strict=True
    ):
        parity = hold(name, *values)
        assert parity.ok, parity


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch multiplies by another library than MKL")
def test_sums_over_a_thousand_rows_round_no_worse_than_mkls():
    """Longer chains lose bits that steps of whole models show: at 320 terms 1.19 of MKL's error, at 192 0.98."""
    leaves, grad = leaves_of((1_056,), 384, 1_152), torch.randn(1_056, 1_152)
    exact = gradients([x.detach().double().requires_grad_() for x in leaves], grad.double(), "reference")
    for name, found, best, eager in zip(
        ("y", "dx", "dweight"), gradients(leaves, grad), exact, gradients(leaves, grad, "reference"), strict=False
    ):
        assert (found - best).norm() <= 1.1 * (eager - best).norm(), name


@pytest.mark.parametrize("width", [1_040, 1_030])
def test_outputs_that_are_written_past_the_cache_are_those_of_their_halves_exactly(width):
    x, weight, bias = (leaf.detach() for leaf in leaves_of((2_100,), 70, width))
    whole = jk.linear(x, weight, bias, backend="cpu")
    assert whole.nbytes > 2**23 > whole.nbytes / 2
    assert torch.equal(whole, torch.cat([jk.linear(half, weight, bias, backend="cpu") for half in x.chunk(2)]))


@pytest.mark.parametrize("rows, depth, width", [(97, 129, 65), (300, 700, 33)])
def test_a_row_among_others_is_that_row_alone_exactly(rows, depth, width):
    leaves, grad = leaves_of((rows,), depth, width), torch.randn(rows, width)
    out, dx, *_ = gradients(leaves, grad)
    for chosen in (slice(0, 1), slice(rows - 1, rows), slice(13, 14), slice(7, 60)):
        x = leaves[0].detach()[chosen].requires_grad_()
        alone, dalone, *_ = gradients([x, *leaves[1:]], grad[chosen])
        assert torch.equal(alone, out[chosen]) and torch.equal(dalone, dx[chosen]), chosen
    order = torch.randperm(rows)
    assert torch.equal(jk.linear(leaves[0][order], *leaves[1:], backend="cpu"), out[order])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(value):
    x, weight, bias = (leaf.detach() for leaf in leaves_of((97,), 129, 65))
    clean = jk.linear(x, weight, bias, backend="cpu")
    x[13, 128] = value
    rows = jk.linear(x, weight, bias, backend="cpu")
    assert not rows[13].isfinite().any() and torch.equal(rows[:13], clean[:13]) and torch.equal(rows[14:], clean[14:])
    weight[64, 0], x[13, 128] = value, 0.0
    found = jk.linear(x, weight, bias, backend="cpu")
    others = torch.arange(97) != 13
    assert not found[:, 64].isfinite().any() and torch.equal(found[others, :64], clean[others, :64])


def test_gradients_that_are_not_wanted_are_empty_and_share_no_tensor():
    x, weight, grad = torch.randn(4, 6), torch.randn(3, 6), torch.randn(4, 3)
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        found = torch.ops.jepa_kernels.linear_backward(grad, x, weight, None, wanted, "cpu")
        assert [g.numel() > 0 for g in found] == wanted
        assert len({g.untyped_storage()._cdata for g in found}) == 3


def test_a_frozen_layer_keeps_no_activations():
    x, weight, kept = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32), []

    def keep(t):
        kept.append(t.untyped_storage().nbytes())
        return t

    for frozen, most in ((True, weight.nbytes + 4), (False, weight.nbytes + x.nbytes)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = jk.linear(x, weight.requires_grad_(not frozen), backend="cpu")
        assert sum(kept) == most
        assert torch.allclose(torch.autograd.grad(out.sum(), x)[0], weight.sum(0).expand(64, 32), atol=1e-5)


def test_gelu_keeps_its_argument_for_a_gradient_alone():
    x, weight, kept = torch.randn(64, 32), torch.randn(16, 32), []

    def keep(t):
        kept.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        jk.linear(x, weight, activation="gelu", backend="cpu")
        assert not kept
        jk.linear(x, weight.requires_grad_(), activation="gelu", backend="cpu")
    assert sum(kept) == x.nbytes + 4 + 64 * 16 * 4
    made = torch.ops.jepa_kernels.linear_forward(x, weight.detach(), None, True, False, "cpu")
    assert [t.numel() for t in made] == [64 * 16, 0]


def test_what_a_program_did_not_keep_is_computed_again():
    """One that was exported without gradients, and is trained."""
    leaves, grad = leaves_of((40,), 56, 72), torch.randn(40, 72)
    op, frozen = torch.ops.jepa_kernels.linear, [leaf.detach() for leaf in leaves[1:]]
    for wanted, given in ((leaves, leaves), (leaves[:1], [leaves[0], *frozen])):
        ends = [op(*given, True, keep, "cpu")[0] for keep in (True, False)]
        kept, again = (torch.autograd.grad(out, wanted, grad) for out in ends)
        assert torch.equal(*ends) and all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    out, kept = torch.ops.jepa_kernels.linear_forward(*leaves, False, True, "cpu")  # nothing to keep
    assert torch.equal(out, jk.linear(*leaves, backend="cpu")) and kept.numel() == 0


def test_what_is_kept_may_come_back_with_other_strides():
    leaves, grad = leaves_of((40,), 56, 72), torch.randn(40, 72)
    wanted = gradients(leaves, grad, activation="gelu")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.t().contiguous().t()):
        found = gradients(leaves, grad, activation="gelu")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_layer_of_data_keeps_no_weights_which_may_change_before_backward():
    x, weight = torch.randn(64, 32), torch.randn(16, 32, requires_grad=True)
    out = jk.linear(x, weight, backend="cpu").sum()
    with torch.no_grad():
        weight.zero_()
    assert torch.allclose(torch.autograd.grad(out, weight)[0], x.sum(0).expand(16, 32), atol=1e-5)


AHEAD, FEW, SMALL = (2048, 256, 256), (120, 2048, 2048), (2048, 256, 255)  # rows, K, N


@pytest.fixture
def on_two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not _C.is_amd(), reason="needs a processor of AMD's")
@pytest.mark.parametrize(
    "sizes, chosen, why",
    [
        (AHEAD, "cpu", "can run this call"),
        (FEW, "reference", "has no lead below 64 rows for each of 2 threads"),
        (SMALL, "reference", "has no lead below 67,108,864 multiply-adds a thread"),
        ((0, 4, 4), "reference", "has no lead below 67,108,864 multiply-adds a thread"),
        ((150_000, 512, 2), "reference", "has no lead below 64 inputs and outputs"),
        ((70_000, 7, 512), "reference", "has no lead below 64 inputs and outputs"),
    ],
)
def test_the_automatic_choice_and_its_reasons(sizes, chosen, why, on_two_threads):
    rows, depth, width = sizes
    x = torch.zeros(1, depth).expand(rows, depth)
    first, own, last = jk.explain("linear", x, torch.zeros(width, depth)).splitlines()
    assert first == f"linear: {chosen} (automatic)" and own.split(maxsplit=1) == ["cpu", why]
    assert last.split(maxsplit=1) == ["reference", "can run this call"]


def test_more_axes_than_a_kernel_reads_and_forward_mode_are_torchs(on_two_threads):
    x, weight = torch.randn(AHEAD[:2]), torch.randn(AHEAD[2], AHEAD[1])
    assert torch.equal(jk.linear(x.view(1, 1, 1, 1, 1, *x.shape), weight).view(-1, AHEAD[2]), F.linear(x, weight))
    with forward_ad.dual_level():
        out = jk.linear(forward_ad.make_dual(x, x), weight)
        assert torch.equal(forward_ad.unpack_dual(out).tangent, F.linear(x, weight))


def test_other_makers_processors_and_other_dtypes_run_torchs_product(on_two_threads, monkeypatch):
    x, weight = torch.zeros(AHEAD[:2]), torch.zeros(AHEAD[2], AHEAD[1])
    monkeypatch.setattr(_C, "is_amd", lambda: False)
    assert "has a lead on AMD's processors alone" in jk.explain("linear", x, weight)
    assert linear_op.slower((x, weight)) is not None
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float64, "float64")):
        assert f"takes float32, got {name}" in jk.explain("linear", x.to(dtype), weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_reference_is_torchs_product_and_draws_no_warning(dtype):
    x, weight, bias = torch.randn(3, 5, 8).to(dtype), torch.randn(4, 8).to(dtype), torch.randn(4).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(jk.linear(x, weight, bias), F.linear(x, weight, bias))


def test_torch_func_and_compiled_code_run_torchs_product(on_two_threads):
    x, weight = torch.randn(2, *AHEAD[:2]), torch.randn(2, AHEAD[2], AHEAD[1])
    mapped = torch.func.vmap(jk.linear)(x, weight)
    assert torch.allclose(mapped[1], F.linear(x[1], weight[1]), atol=1e-4)
    compiled = torch.compile(jk.linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x[0], weight[0]), F.linear(x[0], weight[0]))


def test_autocast_casts_all_three():
    with torch.autocast("cpu", torch.bfloat16):
        out = jk.linear(torch.randn(5, 8), torch.randn(4, 8), torch.randn(4).bfloat16())
    assert out.dtype == torch.bfloat16


X, WEIGHT = torch.randn(2, 5, 8), torch.randn(4, 8)
BAD = [
    (dict(x=[1.0]), TypeError, "x must be a tensor, got list; convert"),
    (dict(x=torch.tensor(1.0)), ValueError, r"x must have shape \[K\], got \(\); reshape it"),
    (dict(x=X.int()), TypeError, "x must be of dtype .+, got int32; convert"),
    (dict(x=X.to_sparse()), TypeError, "x must be a strided tensor, got .+; convert"),
    (dict(weight=None), TypeError, "weight must be a tensor, got NoneType; convert"),
    (dict(weight=WEIGHT[0]), ValueError, r"weight must have shape \[N, K\], got \(8,\); reshape it"),
    (dict(weight=WEIGHT.bfloat16()), TypeError, "weight must be of dtype float32, got bfloat16; convert"),
    (dict(weight=WEIGHT.t()), ValueError, r"weight must have K = 8 like x, got 4; weight is \[N, K\], as of torch"),
    (dict(weight=WEIGHT.to("meta")), ValueError, "weight must be on cpu, got meta; move"),
    (dict(bias=torch.randn(4, 1)), ValueError, r"bias must have shape \[N\], got \(4, 1\); reshape it"),
    (dict(bias=torch.randn(8)), ValueError, "bias must have N = 4 like weight, got 8; pass one value a row of weight"),
    (dict(bias=torch.randn(4).double()), TypeError, "bias must be of dtype float32, got float64; convert"),
    (dict(bias=torch.randn(4).to("meta")), ValueError, "bias must be on cpu, got meta; move"),
    (dict(activation="relu"), ValueError, "activation must be None or gelu, got 'relu'; apply it to the result"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:44] for *_, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match="linear: " + message):
        jk.linear(**{**dict(x=X, weight=WEIGHT), **change})
