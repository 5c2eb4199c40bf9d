"""Specification of `embed_patches`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kernels.packing import Packing


def forward(
    pixels: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    packing: Packing | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """out[m, k] = W patch(pixels[m % B], ids[m, k]) + b + pos[ids[m, k]]; rows past the packing's end are 0."""
    if weight.dim() > pixels.dim():  # an image stands for Pt equal frames
        weight = weight.sum(2)
    if mean is not None and std is not None:
        pixels = _normalised(pixels, weight.dtype, mean, std)
    patches = _patches(pixels, weight.shape[2:])
    if ids is None:
        out = F.linear(patches, weight.flatten(1), bias)
        return out if pos_embed is None else out + pos_embed
    image, ids, inside = _kept(ids, packing, pixels.shape[0])
    out = F.linear(patches[image, ids], weight.flatten(1), bias)
    if pos_embed is not None:
        out = out + pos_embed[ids]
    return out if inside is None else torch.where(inside[:, None], out, out.new_zeros(()))


def _normalised(pixels: Tensor, dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std with x = pixels / 255 for bytes, in fp32 or wider, then rounded to the layer's dtype."""
    x = pixels.to(torch.promote_types(dtype, torch.float32))
    x = x / 255 if pixels.dtype == torch.uint8 else x
    centre, width = (x.new_tensor(v).view(-1, *(1,) * (x.dim() - 2)) for v in (mean, std))
    return ((x - centre) / width).to(dtype)


def _patches(pixels: Tensor, sizes: Sequence[int]) -> Tensor:
    """[B, C, (T,) H, W] -> [B, N, C * (Pt *) P * P], each patch in the order of the convolution's weight."""
    axes, grid = len(sizes), [side // size for side, size in zip(pixels.shape[2:], sizes, strict=True)]
    tiles = pixels
    for axis in reversed(range(axes)):
        tiles = tiles.unflatten(2 + axis, (grid[axis], sizes[axis]))  # in the end [B, C, (Gt, Pt,) Gh, P, Gw, P]
    outer, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return tiles.permute(0, *outer, 1, *inner).flatten(1 + axes).flatten(1, axes)


def _kept(ids: Tensor, packing: Packing | None, images: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Image and id of each row (0 past the packing's end), and which rows are inside the packing."""
    if packing is None:
        row = torch.arange(ids.shape[0], device=ids.device)
        return (row % max(images, 1))[:, None], ids, None
    sequence = packing.sequence_of_token()
    inside = sequence < packing.sequences
    return torch.where(inside, sequence % max(images, 1), 0), torch.where(inside, ids, 0), inside
