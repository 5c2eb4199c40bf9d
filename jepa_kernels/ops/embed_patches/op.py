"""Public face of `embed_patches`."""

from typing import Any

from torch import Tensor

from jepa_kernels._core.autocast import autocast
from jepa_kernels._core.check import check_kept, check_tensor, fail
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.ops.embed_patches import reference
from jepa_kernels.packing import Packing

OP = "embed_patches"

KERNELS = (Kernel("cpu"),)


def embed_patches(
    pixels: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    packing: Packing | None = None,
    backend: str | None = None,
) -> Tensor:
    """Embed the patches that `ids` name: a convolution with stride = kernel = P, evaluated at the kept patches only.

    out[m, k] = W x + b + pos[n], with x the C * P * P pixels of patch n = ids[m, k] of image m % B; packed: out[t]
    with n = ids[t] and image s % B, for row t of sequence s. Dropped patches are never read.

    pixels: [B, C, H, W], fp32, bf16 or fp16, any strides; H and W multiples of P.
    ids: int64 in [0, N), N = H / P * W / P row by row, increasing within each row: [M, K] with M = masks * B
        (mask-major), or [T] with a packing of masks * B sequences. None: every patch, out is [B, N, E].
    weight: [E, C, P, P], bias: [E], as the convolution's. pos_embed: [N, E], one position per patch. All in the
        pixels' dtype; autocast casts all four to its own.

    Returns [M, K, E], [T, E] or [B, N, E], contiguous, in pixels' dtype, accumulated in fp32; rows past the packing's
    last sequence are 0. Gradient: of pixels, weight, bias and pos_embed, summed over rows in fp32 in a fixed order:
    the same bits on every run and for any number of threads; pixels of dropped patches get 0.
    Raises ValueError and TypeError for arguments that do not fit.
    Source: ViT (arXiv:2010.11929) section 3.1; only the context's patches: I-JEPA (arXiv:2301.08243) section 3.
    """
    pixels, weight, bias, pos_embed = autocast(pixels, weight, bias, pos_embed)
    count = _check_layer(pixels, weight, bias, pos_embed)
    if ids is not None:
        check_kept(OP, ids, packing, images=pixels.shape[0], count=count, device=pixels.device)
    elif packing is not None:
        fail(OP, "ids", "be given with a packing", "None", "pass the packed ids [T]", TypeError)
    backend = select(OP, KERNELS, backend, pixels)
    if backend == "reference":
        return reference.forward(pixels, ids, weight, bias, pos_embed, packing=packing)
    return _embed(pixels, ids, weight, bias, pos_embed, None if packing is None else packing.cu_seqlens, backend)


def _check_layer(pixels: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None) -> int:
    """The number of patches of an image."""
    check_tensor(OP, "pixels", pixels, "B C H W")
    same, device = (pixels.dtype,), pixels.device
    check_tensor(OP, "weight", weight, "E C P P", dtypes=same, device=device)
    (embed_dim, channels, size, width), (_, own_channels, height, row) = weight.shape, pixels.shape
    if channels != own_channels:
        fail(OP, "weight", f"have {own_channels} channels like pixels", channels, "pass images of one kind")
    if size != width or size == 0:
        fail(OP, "weight", "have square patches of at least one pixel", (size, width), "pass [E, C, P, P]")
    if height % size or row % size:
        down, across = height - height % size, row - row % size
        remedy = f"crop to {down} x {across}: pixels[..., :{down}, :{across}]"
        fail(OP, "pixels", f"have sides divisible by the patch size {size}", f"{height} x {row}", remedy)
    count = (height // size) * (row // size)
    if bias is not None:
        check_tensor(OP, "bias", bias, "E", dtypes=same, device=device)
        if bias.shape[0] != embed_dim:
            fail(OP, "bias", f"have shape ({embed_dim},) like weight", tuple(bias.shape), "pass one value a channel")
    if pos_embed is not None:
        check_tensor(OP, "pos_embed", pos_embed, "N E", dtypes=same, device=device)
        if pos_embed.shape != (count, embed_dim):
            remedy = "interpolate the table to the grid of these pixels"
            fail(OP, "pos_embed", f"have shape {(count, embed_dim)}", tuple(pos_embed.shape), remedy)
    return count


FORWARD = (
    "(Tensor pixels, Tensor? ids, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? cu_seqlens, str backend)"
    " -> Tensor"
)
BACKWARD = (
    "(Tensor grad, Tensor pixels, Tensor? ids, Tensor weight, Tensor? cu_seqlens, bool[4] wanted, str backend)"
    " -> (Tensor dpixels, Tensor dweight, Tensor dbias, Tensor dpos_embed)"
)


def _fake(pixels: Tensor, ids: Tensor | None, weight: Tensor, *_: Any) -> Tensor:
    rows = (pixels.shape[0], _count(pixels, weight)) if ids is None else ids.shape
    return pixels.new_empty(*rows, weight.shape[0])


def _count(pixels: Tensor, weight: Tensor) -> int:
    return (pixels.shape[2] // weight.shape[2]) * (pixels.shape[3] // weight.shape[2])


def _backward_fake(
    grad: Tensor,
    pixels: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    cu_seqlens: Tensor | None,
    wanted: list[bool],
    _: str,
) -> tuple[Tensor, ...]:
    channels = weight.shape[0]
    shapes = (pixels.shape, weight.shape, (channels,), (_count(pixels, weight), channels))
    return tuple(grad.new_empty(shape if asked else (0,)) for shape, asked in zip(shapes, wanted, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pixels, ids, weight, _, _, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(pixels, ids, weight, cu_seqlens)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pixels, ids, weight, cu_seqlens = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
    found = _backward(grad, pixels, ids, weight, cu_seqlens, wanted, ctx.backend)
    dpixels, dweight, dbias, dpos = (g if asked else None for g, asked in zip(found, wanted, strict=True))
    return dpixels, None, dweight, dbias, dpos, None, None


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(OP, "backward", BACKWARD, _backward_fake)
_embed = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)
