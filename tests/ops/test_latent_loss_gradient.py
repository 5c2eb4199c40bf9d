"""latent_loss: the gradient that forward wrote is given away at most once, and never changed before anyone's eyes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jepa_kernels as jk
from jepa_kernels.testing import poisoned_memory
from tests.ops.test_latent_loss import TRITON, draw, value_and_grad


@pytest.fixture(params=["reference", "cpu", TRITON])
def backend(request):
    return request.param


@pytest.fixture(params=["cpu", TRITON])
def kernel(request):
    return request.param


class Ops(TorchDispatchMode):
    """Names of our ops that ran, in order."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "jepa_kernels":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_backward_twice_gives_the_same_gradient():
    pred, target, ids = draw()
    pred.requires_grad_()
    loss = jk.latent_loss(pred, target, ids)
    first = torch.autograd.grad(loss, pred, retain_graph=True)[0].clone()
    half = torch.autograd.grad(loss, pred, torch.tensor(0.5), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, pred)[0], first) and torch.equal(half, first / 2)


def plain_and_compiled(function):
    return (function, torch.compile(function, fullgraph=True, backend="aot_eager"))


def test_a_gradient_is_its_owners_to_change(backend):
    pred, target, ids = draw()
    pred.requires_grad_()
    expected = value_and_grad(pred, target, ids, backend=backend)[1]
    for function in plain_and_compiled(jk.latent_loss):
        loss = function(pred, target, ids, backend=backend)
        first = torch.autograd.grad(loss, pred, retain_graph=True)[0]
        first.mul_(3)
        second = torch.autograd.grad(loss, pred, retain_graph=True)[0]
        second.mul_(5)
        third = torch.autograd.grad(loss, pred)[0]
        for got, factor in ((first, 3), (second, 5), (third, 1)):
            assert torch.equal(got, expected * factor) and got.grad_fn is None and not got.requires_grad


def test_backward_accumulates_over_a_kept_graph(backend):
    pred, target, ids = draw()
    expected = value_and_grad(pred, target, ids, backend=backend)[1]
    for function in plain_and_compiled(jk.latent_loss):
        leaf = pred.clone().requires_grad_()
        loss = function(leaf, target, ids, backend=backend)
        for count in (1, 2, 3):
            loss.backward(retain_graph=count < 3)
            torch.testing.assert_close(leaf.grad, count * expected, rtol=1e-6, atol=0)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@pytest.mark.parametrize("scale, bound", [(4.0, 2**-8), (0.66015625, 2**-7 + 2**-16)])
def test_in_bf16_a_scale_rounds_a_second_time_unless_it_is_a_power_of_two(kernel, scale, bound):
    pred, target, ids = draw()
    grads = []
    for dtype, backend in ((torch.float64, "reference"), (torch.bfloat16, kernel)):
        leaf = pred.bfloat16().to(dtype).requires_grad_()
        loss = jk.latent_loss(leaf, target.bfloat16().to(dtype), ids, kind="l1", backend=backend)
        grads.append(torch.autograd.grad(loss, leaf, torch.tensor(scale, dtype=loss.dtype))[0].double())
    assert (grads[1] - grads[0]).abs().le(bound * grads[0].abs()).all() and grads[0].abs().min() > 0


def test_a_hook_may_change_the_gradient_in_place(backend):
    pred, target, ids = draw()
    expected = value_and_grad(pred, target, ids, backend=backend)[1]
    for function in plain_and_compiled(jk.latent_loss):
        leaf = pred.clone().requires_grad_()
        inner = leaf * 1.0
        inner.register_hook(lambda grad: grad.mul_(2))
        loss = function(inner, target, ids, backend=backend)
        for last in (False, True):
            leaf.grad = None
            loss.backward(retain_graph=not last)
            assert torch.equal(leaf.grad, 2 * expected)


def test_the_gradient_of_a_graph_used_once_is_not_copied():
    pred, target, ids = draw()
    pred.requires_grad_()
    with Ops() as seen:
        jk.latent_loss(pred, target, ids, backend="cpu").backward()
    assert seen.names == ["latent_loss_forward"]
    with Ops() as seen:
        jk.latent_loss(pred, target, ids, backend="cpu").backward(torch.tensor(2.0))
    assert seen.names == ["latent_loss_forward", "latent_loss_backward"]


def test_what_backward_reads_is_not_changed(kernel):
    """Seen from outside, as saved tensors are: by whoever asks the graph for them, and by hooks that pack them."""
    pred, target, ids = draw()
    expected = value_and_grad(pred, target, ids, backend=kernel)[1]
    leaf, packed = pred.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        loss = jk.latent_loss(leaf, target, ids, backend=kernel)
    seen = [*packed, *loss.grad_fn.saved_tensors]
    before = [x.clone() for x in seen]
    (got,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0))
    assert torch.equal(got, 2 * expected) and seen and all(map(torch.equal, seen, before))


def test_a_loss_used_twice_scales_its_gradient_once(backend):
    pred, target, ids = draw()
    expected = value_and_grad(pred, target, ids, backend=backend)[1]
    for function in plain_and_compiled(lambda *args: (2 * (x := jk.latent_loss(*args, backend=backend)), 2 * x)):
        leaf = pred.clone().requires_grad_()
        first, second = function(leaf, target, ids)
        (first + second).backward()
        assert torch.equal(leaf.grad, 4 * expected)


def test_a_prediction_used_twice_gathers_both_gradients(backend):
    pred, target, ids = draw()
    expected = value_and_grad(pred, target, ids, backend=backend)[1]
    leaf = pred.clone().requires_grad_()
    inner = leaf * 1.0
    total = jk.latent_loss(inner, target, ids, backend=backend) + 2 * jk.latent_loss(
        inner, target, ids, backend=backend
    )
    total.backward()
    torch.testing.assert_close(leaf.grad, 3 * expected, rtol=1e-6, atol=0)


def test_a_large_gradient_may_lie_at_any_address(monkeypatch):
    """Stores past the cache go to aligned addresses alone; torch's outputs are, a C++ program's need not be."""
    pred, target = torch.randn(1, 2_301, 1024), torch.randn(1, 2_301, 1024)
    expected = value_and_grad(pred, target, backend="cpu")
    own, starts = torch.Tensor.new_empty, []

    def shifted(self, shape, dtype=None):
        made = own(self, torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)
        starts.append(made.data_ptr() % 64)
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", shifted)
    with poisoned_memory():  # every output is torch's
        found = value_and_grad(pred, target, backend="cpu")
    assert 4 in starts and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
