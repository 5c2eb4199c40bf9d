"""A linear layer whose large fp32 products on CPUs are those of `jepa_kernels.linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import jepa_kernels as jk
from jepa_kernels.ops.linear.op import slower

PLAIN = (Tensor, nn.Parameter)


class Linear(nn.Linear):
    """y = x W^T + b, as `torch.nn.Linear`, of which it is one: parameters, start and state dict are the same.

    By `jepa_kernels.linear` where that takes its kernel by itself, by torch.nn.functional.linear everywhere else: off
    the CPU, in other dtypes, under autocast, torch.compile, traces and torch.func, for small products, of sharded
    weights. What the kernel computes has no second derivative: `use_backend(linear="reference")` gives PyTorch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N], as of `Linear`."""
    return jk.linear(x, weight, bias) if _leads(x, weight) else F.linear(x, weight, bias)


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)): in the kernel's pass where that leads and calling the layer is its product and nothing else."""
    if type(layer) is Linear and _leads(x, layer.weight) and plain(layer) and not _has_any_global_hook():
        return jk.linear(x, layer.weight, layer.bias, activation="gelu")
    return F.gelu(layer(x))


def plain(layer: nn.Module) -> bool:
    """Whether calling this `Linear` is its product and nothing else, but for hooks on all modules."""
    return not ("forward" in vars(layer) or layer._compiled_call_impl is not None or hooked(layer))


def hooked(module: nn.Module) -> bool:
    """Whether hooks run where the module is called."""
    of_forward = module._forward_hooks or module._forward_pre_hooks
    return bool(of_forward or module._backward_hooks or module._backward_pre_hooks)


def _leads(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` would take its kernel; on a GPU the second question is last, of small products the fourth."""
    return (
        type(x) in PLAIN
        and x.is_cpu
        and type(weight) in PLAIN
        and slower((x, weight)) is None
        and x.dtype == weight.dtype == torch.float32
        and x.layout == weight.layout == torch.strided
        and not x.is_nested
        and not torch.is_autocast_enabled("cpu")
    )
