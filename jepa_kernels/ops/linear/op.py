"""Public face of `linear`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jepa_kernels._core import extension
from jepa_kernels._core.autocast import autocast
from jepa_kernels._core.check import check_tensor, fail, sizes_of
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.flops import flop_formula
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.cost import Cost
from jepa_kernels.ops.linear import cost, reference

OP = "linear"

LEAST = 2**26  # multiply-adds of each thread: about a millisecond
SMALL = f"has no lead below {LEAST:,} multiply-adds a thread"
ROWS = 64  # of each thread
NARROW = 64  # columns are computed 32 at a time, however few there are
AXES = 6  # that a kernel reads


def slower(call: tuple[Tensor, Tensor]) -> str | None:
    """Why PyTorch's product of x and weight, fp32 on a CPU, is the better one; None where the kernel is level or ahead.

    Asked of every layer: a product that is too small must not wait for the answer.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state():
        return "is for eager code: what is compiled, traced or transformed must name it"
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return "has no forward-mode derivative"
    (x, weight), threads = call, torch.get_num_threads()
    if x.numel() * weight.shape[0] < LEAST * threads:
        return SMALL
    if min(weight.shape) < NARROW:
        return f"has no lead below {NARROW} inputs and outputs"
    if x.numel() < ROWS * threads * weight.shape[1]:
        return f"has no lead below {ROWS} rows for each of {threads} threads"
    if x.dim() > AXES:
        return f"reads at most {AXES} axes"
    module = extension.load()
    if isinstance(module, str) or not module.is_amd():
        return "has a lead on AMD's processors alone"
    return None


KERNELS = (Kernel("cpu", (torch.float32,), automatic=slower, silent=True),)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiply every row by a layer's weights: PyTorch's linear, with a kernel for large fp32 products on CPUs.

    y = f(x W^T + b), accumulated in fp32; f is the identity or the exact GELU, f(z) = z Phi(z)

    x: [..., K] of one axis or more; fp32, bf16 or fp16, any strides.
    weight: [N, K]; bias: [N]; both of x's dtype, any strides. Autocast casts all three to its own.
    activation: f, None or "gelu". Under grad what it is of is kept for backward, as by PyTorch.

    Returns [..., N], contiguous, in that dtype. Gradient: of all three, sums in fp32. On the kernel each row has the
    same bits whatever its neighbours, and all results the same bits on every run and for any number of threads.
    The kernel is for fp32 on CPUs. By itself it takes products of 2^26 multiply-adds and 64 rows for each thread or
    more, of 64 inputs and outputs or more, on AMD's processors (measured on Zen 4), outside torch.compile, traces,
    torch.func and forward mode. All other calls are PyTorch's: no warning is drawn, and `explain` says why.
    Double backward is PyTorch's alone: name backend="reference".
    Raises ValueError and TypeError for arguments that do not fit.
    """
    x, weight, bias = autocast(x, weight, bias)
    sizes = LAYER(x, weight, bias)
    if sizes is None or not x.dim() or x.shape[-1] != sizes[1]:
        _check(x, weight, bias)
    if activation not in (None, "gelu"):
        fail(OP, "activation", "be None or gelu", repr(activation), "apply it to the result")
    backend = select(OP, KERNELS, backend, x, (x, weight))
    if backend == "reference":
        return reference.forward(x, weight, bias, activation)
    gelu = activation == "gelu"
    keep = gelu and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _linear(x, weight, bias, gelu, keep, backend)[0]


LAYER = sizes_of("... f", "N K f", "N f|None")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensor(OP, "x", x, "M " * (getattr(x, "ndim", 1) - 1) + "K")
    depth, device, same = x.shape[-1], x.device, (x.dtype,)
    check_tensor(OP, "weight", weight, "N K", dtypes=same, device=device)
    if weight.shape[1] != depth:
        fail(OP, "weight", f"have K = {depth} like x", weight.shape[1], "weight is [N, K], as of torch.nn.Linear")
    if bias is not None:
        check_tensor(OP, "bias", bias, "N", dtypes=same, device=device)
        if bias.shape[0] != weight.shape[0]:
            fail(OP, "bias", f"have N = {weight.shape[0]} like weight", bias.shape[0], "pass one value a row of weight")


FORWARD = "(Tensor x, Tensor weight, Tensor? bias, bool gelu, bool keep, str backend) -> (Tensor out, Tensor kept)"
BACKWARD = (
    "(Tensor grad, Tensor x, Tensor weight, Tensor? kept, bool[3] wanted, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape, (gelu, keep) = (*x.shape[:-1], weight.shape[0]), rest[-3:-1]
    return x.new_empty(shape), x.new_empty(shape if gelu and keep else 0)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, kept: Tensor | None, wanted: list[bool], _: str
) -> tuple[Tensor, ...]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(grad.new_empty(shape if asked else (0,)) for shape, asked in zip(shapes, wanted, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, gelu, keep, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.again = gelu and not keep  # as of a program exported without gradients
    if ctx.again:
        ctx.save_for_backward(x, weight, bias)
        return
    if not ctx.needs_input_grad[1]:
        x = x.new_empty(1).expand(x.shape)  # a frozen layer keeps no activations: only their shape is asked for
    if not ctx.needs_input_grad[0]:
        weight = weight.new_empty(1).expand(weight.shape)  # nor a first layer its weights
    ctx.save_for_backward(x, weight, output[1] if gelu else None)


def _gradient(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    wanted, (x, weight, kept) = list(ctx.needs_input_grad[:3]), ctx.saved_tensors
    if ctx.again:
        kept, _ = _forward(x, weight, kept, False, False, ctx.backend)
    found = _backward(grad, x, weight, kept, wanted, ctx.backend)
    return *(g if asked else None for g, asked in zip(found, wanted, strict=True)), None, None, None


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(OP, "backward", BACKWARD, _backward_fake)
_linear = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)


def _flops(formula: Callable[..., Cost]) -> Callable[..., int]:
    return lambda *args: int(formula(*args[:-1]).flops)


flop_formula(OP, _flops(cost.forward))
flop_formula(f"{OP}_forward", _flops(cost.forward))
flop_formula(f"{OP}_backward", _flops(cost.backward))
