"""Argument checks of `embed_patches`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import FLOATING, check_tensor, fail, is_number, sizes_of

PIXELS = (*FLOATING, torch.uint8)
PASS_STATISTICS = "pass mean and std, a number a channel in units of 0..1, ImageNet's (0.485, ...) and (0.229, ...)"


IMAGES = sizes_of("B C H W f|uint8", "E C P Q f", "E f|None", "N E f|None")
CLIPS = sizes_of("B C T H W f|uint8", "E C D P Q f", "E f|None", "N E f|None")
FRAMES = sizes_of("B C H W f|uint8", "E C D P Q f", "E f|None", "N E f|None")  # images as clips of one frame


def check_layer(op: str, pixels: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None) -> int:
    """The number of patches of an image or a clip."""
    clip, tubes = getattr(pixels, "ndim", 4) == 5, getattr(weight, "ndim", 4) == 5
    sizes = (CLIPS if clip else FRAMES if tubes else IMAGES)(pixels, weight, bias, pos_embed)
    count = -1 if sizes is None else _patches(op, pixels.shape, weight.shape)
    usual = sizes is not None and sizes[-1] in (None, count)
    return count if usual else _check_each(op, pixels, weight, bias, pos_embed, clip, clip or tubes)


def _check_each(
    op: str, pixels: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, clip: bool, tubes: bool
) -> int:
    check_tensor(op, "pixels", pixels, "B C T H W" if clip else "B C H W", dtypes=PIXELS)
    kind, shape, device = pixels.dtype, pixels.shape, pixels.device
    layer = FLOATING if kind == torch.uint8 else (kind,)
    check_tensor(op, "weight", weight, "E C Pt P P" if tubes else "E C P P", dtypes=layer, device=device)
    kernel, same = weight.shape, (weight.dtype,)
    if kernel[1] != shape[1]:
        fail(op, "weight", f"have {shape[1]} channels like pixels", kernel[1], "pass images of one kind")
    count, embed_dim = _patches(op, shape, kernel), kernel[0]
    if bias is not None:
        check_tensor(op, "bias", bias, "E", dtypes=same, device=device)
        if bias.shape[0] != embed_dim:
            fail(op, "bias", f"have shape ({embed_dim},) like weight", tuple(bias.shape), "pass one value a channel")
    if pos_embed is not None:
        check_tensor(op, "pos_embed", pos_embed, "N E", dtypes=same, device=device)
        if pos_embed.shape != (count, embed_dim):
            remedy = "interpolate the table to the grid of these pixels"
            fail(op, "pos_embed", f"have shape {(count, embed_dim)}", tuple(pos_embed.shape), remedy)
    return count


def _patches(op: str, shape: torch.Size, kernel: torch.Size) -> int:
    """Pixels are cut into whole square patches, clips into whole tubelets."""
    height, width, size = shape[-2], shape[-1], kernel[-1]
    if kernel[-2] != size or not size or not kernel[2]:
        kind, actual = "[E, C, Pt, P, P]" if len(kernel) == 5 else "[E, C, P, P]", tuple(kernel[2:])
        fail(op, "weight", "have square patches of at least one pixel", actual, f"pass {kind}")
    if height % size or width % size:
        down, right = height - height % size, width - width % size
        remedy = f"crop to {down} x {right}: pixels[..., :{down}, :{right}]"
        fail(op, "pixels", f"have sides divisible by the patch size {size}", f"{height} x {width}", remedy)
    count = (height // size) * (width // size)
    if len(shape) == 4:
        return count
    frames, tubelet = shape[2], kernel[2]
    if frames % tubelet:
        whole = frames - frames % tubelet
        remedy = f"cut the clip: pixels[:, :, :{whole}]" if whole else "pass a lone frame as an image, pixels[:, :, 0]"
        fail(op, "pixels", f"have frames divisible by the tubelet size {tubelet}", frames, remedy)
    return frames // tubelet * count


def normalisation(op: str, pixels: Tensor, mean: Any, std: Any) -> tuple[list[float], list[float]]:
    """scale and shift of each channel: (pixel / unit - mean) / std = scale * pixel + shift. None: two empty lists."""
    unit = 255.0 if pixels.dtype == torch.uint8 else 1.0
    if mean is None and std is None and unit == 1.0:
        return [], []
    floats = type(mean) is type(std) is tuple and {*map(type, mean), *map(type, std)} == {float}
    if not (floats and len(mean) == len(std) == pixels.shape[1] and min(std) > 0 and math.isfinite(sum(mean + std))):
        _check_each_statistic(op, pixels, mean, std)
    return [1.0 / (unit * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _check_each_statistic(op: str, pixels: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    for name, values, other in (("mean", mean, std), ("std", std, mean)):
        if values is None and pixels.dtype == torch.uint8:
            fail(op, name, "be given with uint8 pixels", "None", PASS_STATISTICS, TypeError)
        if values is None and other is not None:
            fail(op, name, f"be given with {'std' if name == 'mean' else 'mean'}", "None", "pass both", TypeError)
    assert mean is not None and std is not None
    _check_statistics(op, "mean", mean, pixels.shape[1])
    _check_statistics(op, "std", std, pixels.shape[1])
    if min(std, default=1.0) <= 0:
        fail(op, "std", "be positive", tuple(std), "leave out channels that never vary")


def _check_statistics(op: str, name: str, values: Sequence[float], channels: int) -> None:
    if not isinstance(values, (tuple, list)) or not all(is_number(v) for v in values):
        actual = type(values).__name__
        fail(op, name, "be a tuple of numbers", actual, "convert it with tuple(x.tolist()) once", TypeError)
    if len(values) != channels:
        fail(op, name, f"hold {channels} numbers, one a channel", len(values), "pass one of each channel of pixels")
    if not all(math.isfinite(v) for v in values):
        fail(op, name, "be finite", tuple(values), "compute it again")
