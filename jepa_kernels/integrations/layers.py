"""What patches of several libraries have in common: layers that the kernels can stand for, and why they can't."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels.integrations.patching import Replacement, own_forward, within
from jepa_kernels.nn.linear import Linear, hooked

EMBEDS = "patches embedded by one product over pixels read in place"


def against_kernel(width: int, dropout: float) -> str | None:
    """Why attention with heads of `width` channels must keep its own forward; None: it need not."""
    if dropout > 0:
        return f"attention dropout is {dropout}, which the kernel has not: 0 allows it"
    if width % 8 or not 8 <= width <= 128:
        return f"the kernel takes head dims that are multiples of 8 up to 128, not {width}"
    return None


def against_product(conv: Any) -> str | None:
    """Why `embed`, which reads the weights of the convolution and does not call it, can't stand for it."""
    if type(conv) not in (nn.Conv2d, nn.Conv3d):
        return f"{type(conv).__name__} is no plain convolution"
    if own := own_forward(conv, type(conv).__name__):
        return f"{type(conv).__name__} {own}"
    if hooked(conv):
        return f"hooks on {type(conv).__name__} would not run"
    *_, height, width = conv.kernel_size
    plain = conv.groups == 1 and set(conv.dilation) == {1} and not any(conv.padding)
    if conv.stride != conv.kernel_size or height != width or not plain:
        return "the convolution is not one product for each square patch"
    return None


def stands_for(conv: Any, pixels: Tensor) -> bool:
    """Whether `embed` still gives what the convolution would: since the patch it may be watched, pruned or adapted."""
    return against_product(conv) is None and pixels.dim() == conv.weight.dim()


def embed(conv: nn.Conv2d | nn.Conv3d, pixels: Tensor, ids: Tensor | None = None) -> Tensor:
    """pixels [B, C, (T,) H, W] -> [B, N, E], or [M, K, E] of the patches `ids`; a rest that fills no patch is left out,
    as by a convolution."""
    for dim, size in enumerate(conv.kernel_size, 2):
        side = pixels.shape[dim]
        pixels = pixels.narrow(dim, 0, side - side % size)
    return jk.embed_patches(pixels, ids, conv.weight, conv.bias)


LINEAR = Replacement(Linear.forward, "large products by linear", ("input",))


def linear_layers(model: nn.Module, attention: Iterable[str]) -> dict[str, Replacement]:
    """Plain linear layers with fp32 weights on the CPU, in the blocks that hold the modules `attention`, by name.

    Those of adapters, and what these wrap, stay as they are.
    """
    blocks = {name.rpartition(".")[0] or name for name in attention}  # attention of the model itself is its own block
    adapters = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    layers = (name for name, module in model.named_modules() if _is_plain(module))
    inside = (name for name in layers if any(within(name, block) for block in blocks))
    return {name: LINEAR for name in inside if not any(within(name, adapter) for adapter in adapters)}


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or own_forward(module, "Linear"):
        return False
    return module.weight.is_cpu and module.weight.dtype == torch.float32
