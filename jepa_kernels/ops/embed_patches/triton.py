"""Triton `embed_patches`: matrix products that gather the pixels of kept patches as they go.

Forward is one launch. dweight is summed over parts of the rows, then over the parts; how many there are depends on the
number of rows alone. No buffer is larger than the parts, and nothing is read twice but from a cache.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from jepa_kernels._core.triton import device_of
from jepa_kernels.ops.embed_patches.triton_backward import (
    _embed_patches_backward_pixels_kernel,
    _embed_patches_backward_pos_kernel,
    _embed_patches_backward_rows_kernel,
    _embed_patches_backward_sum_kernel,
    _embed_patches_backward_weight_kernel,
)
from jepa_kernels.ops.embed_patches.triton_forward import _embed_patches_fold_kernel, _embed_patches_forward_kernel

Gradient = tuple[Tensor, int, int, int, int, int]  # itself, rows in a run, strides of run, row and channel, channels
Factors = tuple[float, ...] | None

BLOCK, RUNS = 256, 32
ROWS = 128  # of a part of dbias
PART, MOST_PARTS = 2048, 16  # rows of a part of dweight, until there are too many parts


class Tile(NamedTuple):
    """A program's share of a product [height, width], taken `step` of the summed dimension at a time."""

    height: int
    width: int
    step: int
    warps: int
    stages: int

    def programs(self, height: int, width: int) -> int:
        return triton.cdiv(height, self.height) * triton.cdiv(width, self.width)

    @property
    def options(self) -> dict[str, int]:
        return dict(STEP=self.step, num_warps=self.warps, num_stages=self.stages)


LOW, FULL = Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 2)  # tensor cores; fp32, which uses none
SCATTERED = Tile(64, 128, 32, 8, 3)  # of dpixels, whose stores hold an address for every few pixels


class Layer(NamedTuple):
    """What kernels are compiled for: patches of C channels, PT frames, P x P pixels."""

    C: int
    PT: int
    P: int

    @property
    def size(self) -> int:
        return self.C * self.PT * self.P**2


class Kept(NamedTuple):
    """The patches of a batch, and which of them the rows stand for."""

    ids: Tensor | None
    cu_seqlens: Tensor | None
    rows: int
    runs: int
    run_length: int  # 0 where runs differ
    batch: int
    count: int
    grid_h: int
    grid_w: int

    @property
    def search(self) -> int:
        """Steps that find a token in a run."""
        return min(self.rows, self.count).bit_length()


def _tile(dtype: torch.dtype, low: Tile = LOW) -> Tile:
    return FULL if dtype == torch.float32 else low


def _clips(x: Tensor) -> Tensor:
    """Images as clips of one frame, weights of images as those of clips."""
    return x.unsqueeze(2) if x.dim() == 4 else x


def _layer(pixels: Tensor, weight: Tensor) -> Layer:
    return Layer(weight.shape[1], weight.shape[2] if pixels.dim() == 5 else 1, weight.shape[-1])


def _align(clips: Tensor, layer: Layer) -> int:
    """Pixels, a power of two up to 16, that lie side by side in every line of a patch and begin at a multiple of it."""
    *outer, column = clips.stride()
    return math.gcd(16, layer.P, *outer) if column == 1 else 1


def _kept(pixels: Tensor, ids: Tensor | None, cu_seqlens: Tensor | None, layer: Layer) -> Kept:
    frames, height, width = _clips(pixels).shape[2:]
    batch, grid = pixels.shape[0], (height // layer.P, width // layer.P)
    count = frames // layer.PT * grid[0] * grid[1]
    if ids is None:
        return Kept(None, None, batch * count, batch, count, batch, count, *grid)
    runs, run_length = ids.shape if cu_seqlens is None else (cu_seqlens.shape[0] - 1, 0)
    return Kept(ids, cu_seqlens, ids.numel(), runs, run_length, batch, count, *grid)


def _folded(weight: Tensor, layer: Layer) -> Tensor:
    """weight as [E, K]: itself, or a copy where its strides differ or equal frames share a sum."""
    numel, clips = weight.shape[0] * layer.size, _clips(weight)
    if weight.numel() == numel and weight.is_contiguous():
        return weight
    out = weight.new_empty(weight.shape[0], layer.size)
    _embed_patches_fold_kernel[(triton.cdiv(numel, BLOCK),)](
        clips, out, numel, *clips.stride(), *layer, COPIES=clips.shape[2] // layer.PT, BLOCK=BLOCK, num_warps=4
    )
    return out


def forward(
    pixels: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: Sequence[float],
    shift: Sequence[float],
) -> Tensor:
    """[M, K, E], [T, E] or [B, N, E]."""
    layer, tile, embed_dim = _layer(pixels, weight), _tile(weight.dtype), weight.shape[0]
    at, clips = _kept(pixels, ids, cu_seqlens, layer), _clips(pixels)
    out = weight.new_empty(*((at.batch, at.count) if ids is None else ids.shape), embed_dim)
    if not out.numel():
        return out
    tables = (0 if bias is None else bias.stride(0), *((0, 0) if pos_embed is None else pos_embed.stride()))
    with device_of(pixels):
        _embed_patches_forward_kernel[(tile.programs(at.rows, embed_dim),)](
            pixels, _folded(weight, layer), bias, pos_embed, tuple(scale) or None, tuple(shift) or None, out,
            *at, at.runs.bit_length(), embed_dim, *clips.stride(), *tables, *layer, _align(clips, layer),
            ROWS=tile.height, CHANNELS=tile.width, **tile.options,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    pixels: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    cu_seqlens: Tensor | None,
    scale: Sequence[float],
    shift: Sequence[float],
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dpixels, dweight, dbias, dpos_embed); what is not wanted is empty."""
    layer, embed_dim, clips = _layer(pixels, weight), weight.shape[0], _clips(pixels)
    at = _kept(pixels, ids, cu_seqlens, layer)
    shapes = (pixels.shape, weight.shape, weight.shape[:1], (at.count, embed_dim))
    found = [weight.new_empty(shape if asked else 0) for shape, asked in zip(shapes, wanted, strict=True)]
    dpixels, dweight, dbias, dpos = found
    if not grad.numel():
        return dpixels.zero_(), dweight.zero_(), dbias.zero_(), dpos.zero_()
    gradient = (grad, grad.shape[-2], grad.stride(0), grad.stride(-2), grad.stride(-1), embed_dim)
    factors = (tuple(scale) or None, tuple(shift) or None)
    with device_of(pixels):
        if wanted[0]:
            _pixels(gradient, at, _folded(weight, layer), factors[0], dpixels, layer)
        if wanted[1] or wanted[2]:
            places = _places(gradient, at, clips, layer, dbias if wanted[2] else None)
        if wanted[1]:
            _weight(gradient, at.rows, clips, places, factors, dweight, layer)
        if wanted[3]:
            _embed_patches_backward_pos_kernel[at.count, triton.cdiv(embed_dim, BLOCK)](
                *gradient, ids, cu_seqlens, at.runs, at.run_length, at.search, dpos,
                RUNS=RUNS, CHANNELS=BLOCK, num_warps=4,
            )  # fmt: skip
    return dpixels, dweight, dbias, dpos


def _pixels(gradient: Gradient, at: Kept, weight: Tensor, scale: Factors, dpixels: Tensor, layer: Layer) -> None:
    tile, clips = _tile(weight.dtype, SCATTERED), _clips(dpixels)
    _embed_patches_backward_pixels_kernel[(tile.programs(at.batch * at.count, layer.size),)](
        *gradient, *at, at.search, weight, scale, *clips.stride()[:4], dpixels, *layer, _align(clips, layer),
        TOKENS=tile.height, PIXELS=tile.width, **tile.options,
    )  # fmt: skip


def _places(gradient: Gradient, at: Kept, clips: Tensor, layer: Layer, dbias: Tensor | None) -> Tensor:
    """Where the patch of each row begins; dbias, if there is one, from the same walk over the rows."""
    (grad, *_, embed_dim), (image, _, *strides) = gradient, clips.stride()
    places = grad.new_empty(at.rows, dtype=torch.int64)
    parts, programs = triton.cdiv(at.rows, ROWS), 1 if dbias is None else triton.cdiv(embed_dim, ROWS)
    sums = None if dbias is None else grad.new_empty(parts, embed_dim, dtype=torch.float32)
    _embed_patches_backward_rows_kernel[parts, programs](
        *gradient, *at, at.runs.bit_length(), image, *strides, places, sums, *layer[1:],
        ROWS=ROWS, CHANNELS=ROWS, num_warps=4,
    )  # fmt: skip
    if sums is not None and dbias is not None:
        _sum(sums, dbias)
    return places


def _weight(
    gradient: Gradient,
    rows: int,
    clips: Tensor,
    places: Tensor,
    factors: tuple[Factors, Factors],
    dweight: Tensor,
    layer: Layer,
) -> None:
    tile, embed_dim = _tile(dweight.dtype), dweight.shape[0]
    parts = min(triton.cdiv(rows, PART), MOST_PARTS)
    share = triton.cdiv(rows, parts * tile.step) * tile.step
    sums = dweight.new_empty(parts, embed_dim, layer.size, dtype=torch.float32)
    _embed_patches_backward_weight_kernel[tile.programs(embed_dim, layer.size), parts](
        *gradient, clips, places, *factors, rows, share, *clips.stride()[1:], sums, *layer, _align(clips, layer),
        CHANNELS=tile.height, PIXELS=tile.width, **tile.options,
    )  # fmt: skip
    _sum(sums, dweight, frames=_clips(dweight).shape[2] // layer.PT, inner=layer.P**2)


def _sum(parts: Tensor, out: Tensor, frames: int = 1, inner: int = 1) -> None:
    """Adds up the first dimension; each `inner` elements appear once for each of `frames` equal frames."""
    numel, inner = parts[0].numel(), inner if frames > 1 else 1
    _embed_patches_backward_sum_kernel[(triton.cdiv(numel, BLOCK),)](
        parts, out, len(parts), numel, COPIES=frames, INNER=inner, PARTS=MOST_PARTS, BLOCK=BLOCK, num_warps=4
    )
