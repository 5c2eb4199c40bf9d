"""sigreg: values by hand, statistics, directions, ranks, and messages."""

import math

import numpy as np
import pytest
import torch

import jepa_kernels as jk
from benchmarks.memory import peak_bytes
from jepa_kernels import _C
from jepa_kernels._core import define
from jepa_kernels.ops.sigreg import reference

TRITON = pytest.param("triton", marks=pytest.mark.interp)


@pytest.fixture(params=["reference", "cpu", TRITON])
def backend(request):
    return request.param


@pytest.fixture(params=["cpu", TRITON])
def kernel(request):
    return request.param


def value_and_grad(z, **options):
    z = z.detach().clone().requires_grad_()
    loss = jk.sigreg(z, **options)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def test_one_number_by_hand(backend):
    # one feature: the direction is 1 or -1. Knots 0 and 2, the last of weight 2: w = 2, phi = exp(-2).
    phi = math.exp(-2)
    loss, grad = value_and_grad(torch.tensor([[0.7]]), slices=3, knots=2, t_max=2.0, backend=backend)
    cosine, sine = math.cos(1.4), math.sin(1.4)
    assert loss.item() == pytest.approx(2 * phi * ((cosine - phi) ** 2 + sine**2), rel=1e-6)
    slope = 2 * 2 * phi * 2 * (sine * cosine - (cosine - phi) * sine)
    assert grad.item() == pytest.approx(slope, rel=1e-6)
    assert loss.dtype == torch.float32 and loss.shape == ()


def test_collapse_costs_0_4020_a_row(backend):
    for rows in (50, 200):
        assert jk.sigreg(torch.zeros(rows, 16), slices=8, backend=backend).item() == pytest.approx(
            0.4020 * rows, rel=2e-4
        )


def expected_under_the_normal(knots=17, t_max=3.0):
    """E N |mean exp(i t y) - phi(t)|^2 = 1 - phi(t)^2, summed with the weights."""
    t = torch.linspace(0, t_max, knots, dtype=torch.float64)
    weight = torch.full_like(t, 2 * t_max / (knots - 1))
    weight[0] = weight[-1] = t_max / (knots - 1)
    return ((1 - (-t * t).exp()) * (-t * t / 2).exp() * weight).sum().item()


def test_expectation_under_the_normal_is_1_0525():
    assert expected_under_the_normal() == pytest.approx(1.0525, abs=5e-5)
    z = torch.randn(400, 64, 128)
    drawn = torch.stack([jk.sigreg(view, slices=16, step=i) for i, view in enumerate(z)])
    error = drawn.std() / math.sqrt(len(drawn))
    assert error < 0.02 and abs(drawn.mean() - 1.0525) < 4 * error


def test_the_mean_over_views(backend):
    z = torch.randn(2, 3, 20, 12)
    alone = [jk.sigreg(view, slices=40, step=3, backend=backend) for view in z.flatten(0, 1)]
    together = jk.sigreg(z, slices=40, step=3, backend=backend)
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-6)


def test_rows_in_another_order_have_the_same_gradient(kernel):
    z = torch.randn(16, 12)  # one tile: sums differ by their order alone
    order = torch.randperm(16)
    loss, grad = value_and_grad(z, slices=24, backend=kernel)
    moved, turned = value_and_grad(z[order], slices=24, backend=kernel)
    assert moved.item() == pytest.approx(loss.item(), rel=1e-5) and torch.allclose(turned, grad[order], atol=1e-6)


@pytest.mark.parametrize("width, slices, step, seed", [(130, 70, 3, 5), (1, 9, 0, 0), (7, 3, 2**40 + 7, 2**62 + 5)])
def test_directions_are_the_same_bits_everywhere(kernel, width, slices, step, seed):
    """z = unit vectors make y the directions themselves; the kernels' own are compared bit for bit."""
    expected = reference.directions(width, slices, step, seed, torch.device("cpu"))
    found = define.implementation("sigreg", "directions", kernel)(expected, slices, torch.tensor(step), seed)
    assert torch.equal(found, expected)


def test_directions_are_unit_normal_and_change_with_seed_step_and_slice():
    draw = lambda step, seed: reference.directions(64, 2048, step, seed, torch.device("cpu")).double()  # noqa: E731
    first = draw(1, 0)
    assert torch.allclose(first.norm(dim=1), torch.ones(2048, dtype=torch.float64), atol=3e-7)
    count = first.numel()
    assert abs(first.mean()) * 8 < 5 / math.sqrt(count)  # 8 = sqrt(64): to unit variance
    assert abs((first * 8).pow(4).mean() - 3 * 64 / 66) < 0.1  # of a coordinate of the sphere
    gram = first.T @ first / 2048 * 64
    assert (gram - torch.eye(64)).abs().max() < 0.15
    for other in (draw(2, 0), draw(1, 1), draw(1 + 2**32, 0), draw(1, 2**32), first.roll(1, 0), first.roll(1, 1)):
        assert abs((first * other).sum(1).mean()) < 5 / math.sqrt(count)


def test_more_slices_or_features_keep_what_there_was():
    few = reference.directions(8, 5, 1, 2, torch.device("cpu"))
    assert torch.equal(reference.directions(8, 9, 1, 2, torch.device("cpu"))[:5], few)
    wider = reference.directions(12, 5, 1, 2, torch.device("cpu"))[:, :8]
    assert torch.allclose(wider / wider.norm(dim=1, keepdim=True), few, atol=1e-6)


def test_words_are_the_published_generators():
    """Philox4x32-10's known answer for a counter and a key of zeros."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = reference._words(zero, zero, 0, reference.SALT << 32)
    assert [int(w) for w in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_a_step_may_be_a_tensor(backend):
    z = torch.randn(20, 8)
    number, tensor = (value_and_grad(z, slices=6, step=step, backend=backend) for step in (5, torch.tensor(5)))
    assert torch.equal(number[0], tensor[0]) and torch.equal(number[1], tensor[1])


@pytest.mark.parametrize("knots", [17, 64, 257])
def test_turns_do_not_drift(knots):
    """One row: the moments are cosines and sines, each within an ulp of 1 a turn of those of y itself."""
    a = reference.directions(1, 2, 0, 0, torch.device("cpu"))
    delta, limit = 3.0 / (knots - 1), knots * 2**-23
    for y in (0.0, 1e-3, 0.3, 2.9, 17.1, 1234.5, 1e4):
        z = torch.tensor([[[y]]])
        moments, _ = define.implementation("sigreg", "moments", "cpu")(z, 2, knots, 3.0, torch.tensor(0), 0, False)
        moments = moments.double()
        t = torch.arange(knots, dtype=torch.float64) * delta
        first = (torch.tensor(y) * delta).double() * a[0, 0].double()  # the rounding of y delta is not the turns'
        angle = torch.arange(knots, dtype=torch.float64) * first
        assert (moments[0, 0, 1:, 0] - (angle.cos() - (-t * t / 2).exp())[1:]).abs().max() < limit, y
        assert (moments[0, 1, 1:, 0] - angle.sin()[1:]).abs().max() < limit, y


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_the_loss_and_the_gradient(backend, bad):
    z = torch.randn(9, 5)
    z[4, 2] = bad
    loss, grad = value_and_grad(z, slices=7, backend=backend)
    assert loss.isnan() and grad.isnan().all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 3, 4)])
def test_no_embeddings_cost_nothing(backend, shape):
    loss, grad = value_and_grad(torch.zeros(shape), slices=5, backend=backend)
    assert loss.item() == 0.0 and grad.shape == shape


def test_huge_values_stay_finite(backend):
    loss, grad = value_and_grad(torch.tensor([[1e38], [-1e30], [1e9]]), slices=2, backend=backend)
    assert loss.isfinite() and grad.isfinite().all()


def test_nothing_is_lowered_under_autocast(kernel):
    z = torch.randn(64, 32)
    plain = value_and_grad(z, slices=64, backend=kernel)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = value_and_grad(z, slices=64, backend=kernel)
    assert torch.equal(plain[0], lowered[0]) and torch.equal(plain[1], lowered[1])


def test_steps_that_change_compile_nothing_new():
    from torch._dynamo.testing import CompileCounterWithBackend

    z, counter = torch.randn(20, 8, requires_grad=True), CompileCounterWithBackend("aot_eager")
    for steps, most in ((torch.arange(4), 1), (range(4), 2)):
        torch._dynamo.reset()
        counter.frame_count = 0
        compiled = torch.compile(lambda z, step: jk.sigreg(z, slices=6, step=step), fullgraph=True, backend=counter)
        for step in steps:
            assert torch.equal(compiled(z, step), jk.sigreg(z, slices=6, step=step))
        assert counter.frame_count <= most


MESSAGES = [
    (dict(z=[1.0]), TypeError, r"sigreg: z must be a tensor, got list; .+"),
    (dict(z=torch.zeros(4)), ValueError, r"sigreg: z must have shape \[N, E\], got \(4,\); .+"),
    (dict(z=torch.zeros(4, 3, dtype=torch.int64)), TypeError, r"sigreg: z must be of dtype .+, got int64; .+"),
    (dict(z=torch.zeros(4, 0)), ValueError, r"sigreg: z must have at least 1 feature, got \(4, 0\); .+"),
    (dict(slices=0), ValueError, r"sigreg: slices must be at least 1, got 0; .+"),
    (dict(slices=2.5), TypeError, r"sigreg: slices must be an int, got float; .+"),
    (dict(knots=1), ValueError, r"sigreg: knots must be at least 2, got 1; .+"),
    (dict(t_max=0.0), ValueError, r"sigreg: t_max must be greater than 0 and finite, got 0.0; .+"),
    (dict(t_max=math.inf), ValueError, r"sigreg: t_max must be greater than 0 and finite, got inf; .+"),
    (dict(t_max=np.float32("inf")), ValueError, r"sigreg: t_max must be greater than 0 and finite, got inf; .+"),
    (dict(t_max=10**400), ValueError, r"sigreg: t_max must be greater than 0 and finite, got 10+; .+"),
    (dict(group="all"), TypeError, r"sigreg: group must be a process group of this rank, got str; .+"),
    (dict(step=torch.tensor(-1)), ValueError, r"sigreg: step must lie in \[0, 2\^63\), got -1; .+"),
    (dict(seed=True), TypeError, r"sigreg: seed must be an int, got bool; .+"),
    (dict(t_max="3"), TypeError, r"sigreg: t_max must be a number, got str; .+"),
    (dict(seed=-1), ValueError, r"sigreg: seed must lie in \[0, 2\^63\), got -1; .+"),
    (dict(step=2**63), ValueError, r"sigreg: step must lie in \[0, 2\^63\), got 9223372036854775808; .+"),
    (dict(step=1.0), TypeError, r"sigreg: step must be an int, got float; .+"),
    (
        dict(step=torch.zeros(2)),
        TypeError,
        r"sigreg: step must be an int or a 0-dim int64 tensor, got float32 \(2,\); .+",
    ),
]


@pytest.mark.parametrize("wrong, error, message", MESSAGES)
def test_messages(wrong, error, message):
    with pytest.raises(error, match=message):
        jk.sigreg(**{"z": torch.zeros(4, 3), **wrong})


def test_numpy_numbers_are_numbers(backend):
    z, most = torch.randn(6, 5), 2**31 - 1
    plain = jk.sigreg(z, slices=4, knots=5, t_max=2.0, seed=most, step=most, backend=backend)
    whole = {name: np.int32(value) for name, value in dict(slices=4, knots=5, seed=most, step=most).items()}
    assert torch.equal(jk.sigreg(z, **whole, t_max=np.float32(2), backend=backend), plain)


def test_peak_memory_beyond_the_gradient_is_a_twentieth_of_the_eager_chains():
    z = torch.randn(2048, 128, requires_grad=True)

    def peak(function):
        return peak_bytes(lambda: torch.autograd.grad(function(z, slices=256), z)) - z.numel() * 4

    assert (
        0
        < peak(lambda *inputs, **options: jk.sigreg(*inputs, **options, backend="cpu"))
        <= 0.05 * peak(reference.forward)
    )


def test_peak_memory_without_a_gradient_has_no_projections():
    z = torch.randn(4096, 64)  # projections: 16.8 MB
    assert 0 < peak_bytes(lambda: jk.sigreg(z, slices=1024, backend="cpu")) <= 1.2e6


def test_what_the_forward_pass_keeps():
    """Directions [features / 32, slices, 32], projections [slices / 32, rows, 32]; of unit vectors the directions."""
    width, slices = 70, 40
    a = reference.directions(width, slices, 3, 5, torch.device("cpu"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        jk.sigreg(torch.eye(width, requires_grad=True), slices=slices, step=3, seed=5, backend="cpu")
    moments, kept = [x for x in saved if x.dim() in (1, 4)]
    assert len(saved) == 4 and moments.shape == (1, 2, 17, 40) and kept.shape == (64 * (96 + 70),)
    directions, projections = kept.split([64 * 96, 64 * 70])
    directions = directions.view(3, 64, 32).transpose(0, 1).reshape(64, 96)
    assert torch.equal(directions[:slices, :width], a) and directions[slices:].count_nonzero() == 0
    assert torch.equal(projections.view(2, width, 32).transpose(1, 2).reshape(64, width)[:slices], a)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        jk.sigreg(torch.eye(width, requires_grad=True), slices=slices, backend="cpu")


@pytest.mark.parametrize("shape, slices", [((1, 70, 33), 130), ((2, 64, 12), 40), ((3, 7, 70), 5)])
def test_a_gradient_of_what_was_not_kept_has_the_same_bits(shape, slices):
    """As of a program that was exported without a gradient; and a second one, of a graph that is retained."""
    z = torch.randn(shape, requires_grad=True)
    loss = jk.sigreg(z, slices=slices, step=2, seed=1, backend="cpu")
    first, second = (torch.autograd.grad(loss, z, retain_graph=True)[0] for _ in range(2))
    step, stage = torch.tensor(2), lambda name: define.implementation("sigreg", name, "cpu")
    moments, none = stage("moments")(z.detach(), slices, 17, 3.0, step, 1, False)
    again = stage("backward")(torch.ones(()), z.detach(), moments, 3.0, step, 1, 1, none)
    assert len(none) == 0 and torch.equal(second, first) and torch.equal(again, first)


def test_the_cpu_kernel_refuses_types_it_is_not_built_for(restored_threads):
    torch.set_num_threads(2)  # one that threw would end the process
    z, step = torch.randn(1, 600, 64), torch.tensor(0)
    moments, kept = torch.ops.jepa_kernels.sigreg_moments(z, 256, 17, 3.0, step, 0, True, "cpu")
    with pytest.raises(ValueError, match="tensors must be float32, bfloat16 or float16, got float64"):
        torch.ops.jepa_kernels.sigreg_backward(torch.ones(()), z.double(), moments, 3.0, step, 0, 1, kept, "cpu")


def test_one_instruction_set_reads_what_another_kept():
    z = torch.randn(2, 50, 45, requires_grad=True)
    whole = value_and_grad(z, slices=70, backend="cpu")[1]
    try:
        assert _C.set_isa("avx2")
        loss = jk.sigreg(z, slices=70, backend="cpu")
    finally:
        _C.set_isa("best")
    assert (torch.autograd.grad(loss, z)[0] - whole).norm() <= 1e-6 * whole.norm()


def test_the_module_takes_new_directions_each_step_and_resumes():
    from jepa_kernels.nn import SIGReg

    z, module = torch.randn(30, 8, requires_grad=True), SIGReg(num_slices=12, n_points=9)
    losses = [module(z) for _ in range(3)]
    expected = [jk.sigreg(z, slices=12, knots=9, step=step) for step in range(3)]
    assert losses == expected and len({x.item() for x in losses}) == 3
    for loss, wanted in zip(losses, expected, strict=True):  # each by its own directions, whatever came after
        assert torch.equal(*(torch.autograd.grad(x, z)[0] for x in (loss, wanted)))
    resumed = SIGReg(num_slices=12, n_points=9)
    resumed.load_state_dict(module.state_dict())
    assert resumed(z) == module(z) == jk.sigreg(z, slices=12, knots=9, step=3)
    module.eval()
    assert module(z) == module(z)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_module_refuses_a_call_that_a_checkpoint_repeats(reentrant):
    from torch.utils.checkpoint import checkpoint

    from jepa_kernels.nn import SIGReg

    module, z = SIGReg(num_slices=6), torch.randn(10, 4, requires_grad=True)
    loss = checkpoint(module, z, use_reentrant=reentrant)
    with pytest.raises(
        RuntimeError, match=r"SIGReg: forward must run outside of backward, got a call that a check.+; "
    ):
        loss.backward()
    checkpoint(module.eval(), z, use_reentrant=reentrant).backward()  # whose directions stay
    own = z.detach().requires_grad_()
    module(own).backward()
    assert torch.equal(z.grad, own.grad) and module.global_step == 1


def test_the_module_is_the_published_chain_along_its_directions():
    """lejepa's statistic of the module's default numbers, views and features many, and its gradient."""
    from benchmarks.ops.bench_sigreg import published
    from jepa_kernels.nn import SIGReg

    z = (torch.randn(3, 40, 24) * 1.5 + 0.2).requires_grad_()
    loss, stated = SIGReg()(z), published(z, 1024, reference.directions(24, 1024, 0, 0, z.device))
    assert loss.item() == pytest.approx(stated.item(), rel=1e-5)
    (grad,), (wanted,) = torch.autograd.grad(loss, z), torch.autograd.grad(stated, z)
    assert (grad - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_module_compiles_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    from jepa_kernels.nn import SIGReg

    torch._dynamo.reset()
    counter, module, z = CompileCounterWithBackend("aot_eager"), SIGReg(num_slices=6), torch.randn(10, 4)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    assert [compiled(z) for _ in range(3)] == [jk.sigreg(z, slices=6, step=step) for step in range(3)]
    assert counter.frame_count == 1
