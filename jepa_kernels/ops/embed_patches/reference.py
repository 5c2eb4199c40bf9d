"""Specification of `embed_patches`."""

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
) -> Tensor:
    """out[m, k] = W patch(pixels[m % B], ids[m, k]) + b + pos[ids[m, k]]; rows past the packing's end are 0."""
    patches = _patches(pixels, weight.shape[2])
    if ids is None:
        out = F.linear(patches, weight.flatten(1), bias)
        return out if pos_embed is None else out + pos_embed
    image, ids, inside = _kept(ids, packing, pixels.shape[0])
    out = F.linear(patches[image, ids], weight.flatten(1), bias)
    if pos_embed is not None:
        out = out + pos_embed[ids]
    return out if inside is None else torch.where(inside[:, None], out, out.new_zeros(()))


def _patches(pixels: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * P * P], each patch in the order of the convolution's weight."""
    tiles = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, Gh, P, Gw, P]
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _kept(ids: Tensor, packing: Packing | None, images: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Image and id of each row (0 past the packing's end), and which rows are inside the packing."""
    if packing is None:
        row = torch.arange(ids.shape[0], device=ids.device)
        return (row % max(images, 1))[:, None], ids, None
    sequence = packing.sequence_of_token()
    inside = sequence < packing.sequences
    return torch.where(inside, sequence % max(images, 1), 0), torch.where(inside, ids, 0), inside
