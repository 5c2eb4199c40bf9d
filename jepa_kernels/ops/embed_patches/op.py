"""Public face of `embed_patches`."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jepa_kernels._core.autocast import autocast
from jepa_kernels._core.check import fail
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.kept import check_kept
from jepa_kernels.ops.embed_patches import reference
from jepa_kernels.ops.embed_patches.check import check_layer, normalisation
from jepa_kernels.packing import Packing

OP = "embed_patches"

KERNELS = (Kernel("triton"), Kernel("cpu"))


def embed_patches(
    pixels: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    packing: Packing | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Embed the patches that `ids` name: a convolution with stride = kernel, evaluated at the kept patches only.

    out[m, k] = W x + b + pos[n], with x the pixels of patch n = ids[m, k] of image or clip m % B, in the order of the
    convolution's kernel; packed: out[t] with n = ids[t] and image s % B, for row t of sequence s. With mean and std,
    x = (p - mean[c]) / std[c] for floating pixels p, (p / 255 - mean[c]) / std[c] for uint8. Dropped patches are
    never read.

    pixels: [B, C, H, W] or clips [B, C, T, H, W], fp32, bf16, fp16 or uint8, any strides; H and W multiples of P, T
        of Pt.
    ids: int64 in [0, N), increasing within each row: [M, K] with M = masks * B (mask-major), or [T] with a packing of
        masks * B sequences. Patch (t, h, w) of a grid [Gt, Gh, Gw] has id (t * Gh + h) * Gw + w; N = Gt * Gh * Gw.
        None: every patch, out is [B, N, E].
    weight: [E, C, P, P], or [E, C, Pt, P, P] for clips, bias: [E], as the convolution's. Images with a weight for
        clips: each is shown as Pt equal frames, which is the weight summed over Pt, in fp32, and 1 / Pt of the work.
    pos_embed: [N, E], one position per patch.
    mean, std: C numbers each, std positive, in units of 0..1 for uint8 pixels (which must have them) and of the pixels
        for floating ones; applied in fp32.
    Floating tensors share a dtype; autocast casts them all to its own.

    Returns [M, K, E], [T, E] or [B, N, E], contiguous, in weight's dtype, accumulated in fp32; rows past the packing's
    last sequence are 0. Gradient: of floating pixels, weight, bias and pos_embed, summed over rows in fp32 in a fixed
    order: the same bits on every run and for any number of threads; pixels of dropped patches get 0.
    Raises ValueError and TypeError for arguments that do not fit.
    Source: ViT (arXiv:2010.11929) section 3.1; tubelets: ViViT (arXiv:2103.15691) section 3.2; only the context's
    patches: I-JEPA (arXiv:2301.08243) section 3.
    """
    pixels, weight, bias, pos_embed = autocast(pixels, weight, bias, pos_embed)
    count = check_layer(OP, pixels, weight, bias, pos_embed)
    scale, shift = normalisation(OP, pixels, mean, std)
    if ids is not None:
        check_kept(OP, ids, packing, images=pixels.shape[0], count=count, like=pixels)
    elif packing is not None:
        fail(OP, "ids", "be given with a packing", "None", "pass the packed ids [T]", TypeError)
    backend = select(OP, KERNELS, backend, pixels, None, weight.dtype)
    if backend == "reference":
        return reference.forward(pixels, ids, weight, bias, pos_embed, packing=packing, mean=mean, std=std)
    cu_seqlens = None if packing is None else packing.cu_seqlens
    return _embed(pixels, ids, weight, bias, pos_embed, cu_seqlens, scale, shift, backend)


# Kernels see x = fma(pixel, scale[c], shift[c]) in fp32; empty lists: the pixels as they are.
FORWARD = (
    "(Tensor pixels, Tensor? ids, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? cu_seqlens,"
    " float[] scale, float[] shift, str backend) -> Tensor"
)
BACKWARD = (
    "(Tensor grad, Tensor pixels, Tensor? ids, Tensor weight, Tensor? cu_seqlens,"
    " float[] scale, float[] shift, bool[4] wanted, str backend)"
    " -> (Tensor dpixels, Tensor dweight, Tensor dbias, Tensor dpos_embed)"
)


def _fake(pixels: Tensor, ids: Tensor | None, weight: Tensor, *_: Any) -> Tensor:
    rows = (pixels.shape[0], _count(pixels, weight)) if ids is None else ids.shape
    return weight.new_empty(*rows, weight.shape[0])


def _count(pixels: Tensor, weight: Tensor) -> int:
    sizes = weight.shape[2 - pixels.dim() :]  # without Pt for images
    return math.prod(side // size for side, size in zip(pixels.shape[2:], sizes, strict=True))


def _backward_fake(
    grad: Tensor,
    pixels: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    cu_seqlens: Tensor | None,
    scale: list[float],
    shift: list[float],
    wanted: list[bool],
    _: str,
) -> tuple[Tensor, ...]:
    channels = weight.shape[0]
    shapes = (pixels.shape, weight.shape, (channels,), (_count(pixels, weight), channels))
    return tuple(grad.new_empty(shape if asked else (0,)) for shape, asked in zip(shapes, wanted, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pixels, ids, weight, _, _, cu_seqlens, ctx.scale, ctx.shift, ctx.backend = inputs
    ctx.save_for_backward(pixels, ids, weight, cu_seqlens)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pixels, ids, weight, cu_seqlens = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    found = _backward(grad, pixels, ids, weight, cu_seqlens, ctx.scale, ctx.shift, wanted, ctx.backend)
    dpixels, dweight, dbias, dpos = (g if asked else None for g, asked in zip(found, wanted, strict=True))
    return dpixels, None, dweight, dbias, dpos, *[None] * 4


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(OP, "backward", BACKWARD, _backward_fake)
_embed = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)
