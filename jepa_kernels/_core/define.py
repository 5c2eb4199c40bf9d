"""Registering ops with torch: one schema for all backends, the backend being its last argument.

`define` makes a plain op (no autograd rule). `differentiable` pairs a forward op with its gradient in the two ways
that are fast and safe: eager runs a thin autograd.Function around the plain op; torch.compile traces the
twin `jepa_kernels::<op>`, registered with `register_autograd` from the same two functions.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jepa_kernels._core import extension
from jepa_kernels._core.check import fail

REMEDY = "use backend='reference'"
library = torch.library.Library("jepa_kernels", "DEF")
_implementations: dict[tuple[str, str, str], Callable[..., Any]] = {}
_wrap: list[Callable[..., Any]] = []  # at most one: wrap(op, stage, backend, kernel) -> what is called in its place


def wrap_kernels(*wrap: Callable[..., Any]) -> None:
    """Call every kernel from now on through wrap(op, stage, backend, kernel); with no argument: itself."""
    _wrap[:] = wrap
    _implementations.clear()


def implementation(op: str, stage: str, backend: str) -> Callable[..., Any]:
    """`ops/<op>/<backend>.py: <stage>`, or `_C.<op>_<stage>_<backend>`."""
    key = (op, stage, backend)
    if key not in _implementations:
        file = f"jepa_kernels.ops.{op}.{backend}"
        try:
            found = getattr(importlib.import_module(file), stage)
        except ModuleNotFoundError as error:
            if error.name != file:  # the file is there; what it imports is not
                raise
            found = getattr(extension.load(), f"{op}_{stage}_{backend}")
        _implementations[key] = _wrap[0](*key, found) if _wrap else found
    return _implementations[key]


def define(op: str, stage: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `jepa_kernels::<op>_<stage>` with this schema and return it. `fake` states the outputs' shapes."""
    name = f"{op}_{stage}"

    def run(*args: Any) -> Any:
        return implementation(op, stage, args[-1])(*args[:-1])

    library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    library.impl(name, run, "CPU")
    library.impl(name, run, "CUDA")
    torch.library.register_fake(f"jepa_kernels::{name}", fake, lib=library)
    return getattr(torch.ops.jepa_kernels, name).default


def _refuse_duals(op: str, args: tuple[Any, ...]) -> None:
    """A kernel would drop the tangents."""
    for x in args:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            fail(op, "inputs", "carry no forward-mode tangent", "a dual tensor", REMEDY, RuntimeError)


def differentiable(
    op: str,
    forward: Callable[..., Any],
    schema: str,
    fake: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Sequence[Tensor | None]],
) -> Callable[..., Any]:
    """The differentiable form of a plain forward op.

    setup(ctx, inputs, output) saves what backward(ctx, *grads) needs; backward returns a gradient per input.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # outputs kept for backward alone have no gradient
        setup(ctx, inputs, output)

    def first_order(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            remedy = f"{REMEDY} for double backward"
            fail(op, "backward", "run without create_graph=True", "grad mode enabled", remedy, RuntimeError)
        return backward(ctx, *grads)

    library.define(op + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    library.impl(op, lambda *args: forward(*args), "CPU")
    library.impl(op, lambda *args: forward(*args), "CUDA")
    torch.library.register_fake(f"jepa_kernels::{op}", fake, lib=library)
    torch.library.register_autograd(f"jepa_kernels::{op}", first_order, setup_context=setup_context, lib=library)
    twin = getattr(torch.ops.jepa_kernels, op).default

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return first_order(ctx, *grads)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return twin(*args)
        if forward_ad._current_level >= 0:  # type: ignore[attr-defined]  # inside a dual level of forward mode
            _refuse_duals(op, args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            if torch._C._are_functorch_transforms_active():
                fail(op, "gradients", "be autograd's", "a call inside a torch.func transform", REMEDY, RuntimeError)
            return Eager.apply(*args)
        return forward(*args)

    return call
