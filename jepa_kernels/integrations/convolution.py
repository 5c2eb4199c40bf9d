"""Patch embedding by a convolution that other libraries own."""

from typing import Any

from torch import Tensor, nn

import jepa_kernels as jk

WHAT = "patches embedded by one product over pixels read in place"


def why_not(conv: Any) -> str | None:
    """Why `embed` can't stand for this convolution; None where it can."""
    if type(conv) not in (nn.Conv2d, nn.Conv3d):
        return f"its convolution is a {type(conv).__name__}"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "hooks on its convolution would not run"
    *_, height, width = conv.kernel_size
    plain = conv.groups == 1 and set(conv.dilation) == {1} and not any(conv.padding)
    if conv.stride != conv.kernel_size or height != width or not plain:
        return "its convolution is not one product for each square patch"
    return None


def embed(conv: nn.Conv2d | nn.Conv3d, pixels: Tensor, pos_embed: Tensor | None = None) -> Tensor | None:
    """pixels [B, C, (T,) H, W], pos_embed [N, E] -> [B, N, E]; None where patches don't divide the sides."""
    if pixels.dim() != 2 + len(conv.kernel_size):
        return None
    if any(n % size for n, size in zip(pixels.shape[2:], conv.kernel_size, strict=True)):
        return None
    return jk.embed_patches(pixels, None, conv.weight, conv.bias, pos_embed)
