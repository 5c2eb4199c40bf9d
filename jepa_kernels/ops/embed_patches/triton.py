"""Triton `embed_patches`: the kept patches are copied side by side, in the weight's dtype, then matrix products.

A copy in long aligned rows costs less than to gather short lines of pixels once for each tile of a product; backward
makes it anew rather than keep it. dweight is summed over parts of the rows, then over the parts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from jepa_kernels._core.triton import device_of, rows_of
from jepa_kernels.ops.embed_patches.triton_backward import (
    _embed_patches_backward_bias_kernel,
    _embed_patches_backward_pixels_kernel,
    _embed_patches_backward_pos_kernel,
    _embed_patches_backward_sum_kernel,
    _embed_patches_backward_weight_kernel,
)
from jepa_kernels.ops.embed_patches.triton_forward import (
    _embed_patches_copy_kernel,
    _embed_patches_fold_kernel,
    _embed_patches_forward_kernel,
)

Gradient = tuple[Tensor, int | None, int, int, int, int]  # itself, where its rows lie, channels
Factors = tuple[float, ...] | None

FOLD, SUM = 1024, 512  # elements of a program
RUNS, WIDTH = 32, 256  # of dpos_embed: runs at a time, channels
ROWS = 128  # of a part of dbias
COPY_ROWS, COPY_PIXELS = 32, 128  # of a program
WHOLE = 256  # copied rows are a multiple, and 0 past the last one: no tile of a product needs to ask
MULTIPROCESSORS, MOST_PARTS = 132, 16  # to be filled with parts of dweight
PART = 8  # adding up a tile of a part takes as long as multiplying this many rows


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


FULL = Tile(64, 64, 32, 4, 2)  # fp32, which uses no tensor cores
LOW = Tile(256, 128, 64, 8, 3)  # widths of published models are multiples of 128
CHOSEN = LOW._replace(stages=5)  # of dweight with ids: its loads wait for those, so that twice the stages lead as far
SCATTERED = Tile(64, 128, 32, 8, 3)  # of dpixels, whose stores hold an address for every few pixels


class Layer(NamedTuple):
    """What kernels are compiled for: patches of C channels, PT frames, P x P pixels."""

    C: int
    PT: int
    P: int

    @property
    def size(self) -> int:
        return self.C * self.PT * self.P**2

    def depth(self, tile: Tile) -> int:
        """Of copied patches: whole steps of a product."""
        return triton.cdiv(self.size, tile.step) * tile.step


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


def _tile(dtype: torch.dtype, low: Tile) -> Tile:
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
    _embed_patches_fold_kernel[(triton.cdiv(numel, FOLD),)](
        clips, out, numel, *clips.stride(), *layer, COPIES=clips.shape[2] // layer.PT, BLOCK=FOLD, num_warps=4
    )
    return out


def _copied(
    pixels: Tensor, at: Kept, factors: tuple[Factors, Factors], weight: Tensor, layer: Layer, tile: Tile
) -> Tensor:
    """[rows, depth], in weight's dtype: the pixels of each row's patch."""
    clips, rows, depth = _clips(pixels), triton.cdiv(at.rows, WHOLE) * WHOLE, layer.depth(tile)
    patches = weight.new_empty(rows, depth)
    _embed_patches_copy_kernel[rows // COPY_ROWS, triton.cdiv(depth, COPY_PIXELS)](
        pixels, *factors, patches, *at, at.runs.bit_length(), *clips.stride(), *layer, _align(clips, layer),
        DEPTH=depth, ROWS=COPY_ROWS, PIXELS=COPY_PIXELS, num_warps=4,
    )  # fmt: skip
    return patches


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
    layer, tile, embed_dim = _layer(pixels, weight), _tile(weight.dtype, LOW), weight.shape[0]
    at, factors = _kept(pixels, ids, cu_seqlens, layer), (tuple(scale) or None, tuple(shift) or None)
    out = weight.new_empty(*((at.batch, at.count) if ids is None else ids.shape), embed_dim)
    if not out.numel():
        return out
    tables = (0 if bias is None else bias.stride(0), *((0, 0) if pos_embed is None else pos_embed.stride()))
    with device_of(pixels):
        patches = _copied(pixels, at, factors, weight, layer, tile)
        _embed_patches_forward_kernel[(tile.programs(at.rows, embed_dim),)](
            patches, _folded(weight, layer), bias, pos_embed, out, ids, cu_seqlens, at.rows, at.runs, at.count,
            embed_dim, *tables, layer.size, layer.depth(tile), ROWS=tile.height, CHANNELS=tile.width, **tile.options,
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
    layer, embed_dim = _layer(pixels, weight), weight.shape[0]
    tile = _tile(weight.dtype, LOW if ids is None else CHOSEN)
    at = _kept(pixels, ids, cu_seqlens, layer)
    shapes = (pixels.shape, weight.shape, weight.shape[:1], (at.count, embed_dim))
    found = [weight.new_empty(shape if asked else 0) for shape, asked in zip(shapes, wanted, strict=True)]
    dpixels, dweight, dbias, dpos = found
    if not grad.numel():
        return dpixels.zero_(), dweight.zero_(), dbias.zero_(), dpos.zero_()
    gradient = (grad, *rows_of(grad), embed_dim)
    factors = (tuple(scale) or None, tuple(shift) or None)
    with device_of(pixels):
        if dpixels.numel():
            _pixels(gradient, at, _folded(weight, layer), factors[0], dpixels, layer)
        if dbias.numel():
            _bias(gradient, at, dbias)
        if dweight.numel():
            _weight(gradient, at, _copied(pixels, at, factors, weight, layer, tile), dweight, layer, tile)
        if dpos.numel():
            _embed_patches_backward_pos_kernel[at.count, triton.cdiv(embed_dim, WIDTH)](
                *gradient, ids, cu_seqlens, at.rows, at.runs, at.run_length, at.search, dpos,
                RUNS=RUNS, CHANNELS=WIDTH, num_warps=4,
            )  # fmt: skip
    return dpixels, dweight, dbias, dpos


def _pixels(gradient: Gradient, at: Kept, weight: Tensor, scale: Factors, dpixels: Tensor, layer: Layer) -> None:
    tile, clips = _tile(weight.dtype, SCATTERED), _clips(dpixels)
    _embed_patches_backward_pixels_kernel[(tile.programs(at.batch * at.count, layer.size),)](
        *gradient, *at, at.search, weight, scale, *clips.stride()[:4], dpixels, *layer, _align(clips, layer),
        TOKENS=tile.height, PIXELS=tile.width, **tile.options,
    )  # fmt: skip


def _bias(gradient: Gradient, at: Kept, dbias: Tensor) -> None:
    parts, embed_dim = triton.cdiv(at.rows, ROWS), len(dbias)
    sums = dbias.new_empty(parts, embed_dim, dtype=torch.float32)
    _embed_patches_backward_bias_kernel[parts, triton.cdiv(embed_dim, ROWS)](
        *gradient, at.ids, at.cu_seqlens, at.rows, at.runs, at.count, sums, ROWS=ROWS, CHANNELS=ROWS, num_warps=8
    )
    _sum(sums, dbias)


def _weight(gradient: Gradient, at: Kept, patches: Tensor, dweight: Tensor, layer: Layer, tile: Tile) -> None:
    embed_dim, tiles = len(dweight), tile.programs(len(dweight), layer.size)
    parts = _parts(tiles, at.rows)
    share = triton.cdiv(at.rows, parts * tile.step) * tile.step
    sums = dweight.new_empty(parts, embed_dim, layer.size, dtype=torch.float32)
    _embed_patches_backward_weight_kernel[tiles, parts](
        *gradient, patches, at.ids, at.cu_seqlens, at.rows, at.runs, at.count, share, sums,
        layer.size, patches.shape[1], CHANNELS=tile.height, PIXELS=tile.width, **tile.options,
    )  # fmt: skip
    _sum(sums, dweight, frames=_clips(dweight).shape[2] // layer.PT, inner=layer.P**2)


def _parts(tiles: int, rows: int) -> int:
    """How many parts of dweight take the least time: they fill the multiprocessors, but must be added up."""

    def time(parts: int) -> float:
        return triton.cdiv(tiles * parts, MULTIPROCESSORS) * rows / parts + PART * tiles * parts

    return min(range(1, MOST_PARTS + 1), key=time)


def _sum(parts: Tensor, out: Tensor, frames: int = 1, inner: int = 1) -> None:
    """Adds up the first dimension; each `inner` elements appear once for each of `frames` equal frames."""
    numel, inner = parts[0].numel(), inner if frames > 1 else 1
    _embed_patches_backward_sum_kernel[(triton.cdiv(numel, SUM),)](
        parts, out, len(parts), numel, COPIES=frames, INNER=inner, PARTS=MOST_PARTS, BLOCK=SUM, num_warps=8
    )
