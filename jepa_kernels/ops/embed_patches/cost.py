"""Bytes and FLOPs of `embed_patches`."""

from math import prod
from typing import Any

from torch import Tensor

from jepa_kernels.cost import Cost, distinct, elements, nbytes


def forward(
    pixels: Any, ids: Tensor | None, weight: Any, bias: Any, pos_embed: Any, cu_seqlens: Tensor | None, *options: Any
) -> Cost:
    """The pixels of each kept patch once, the layer, ids and positions; the rows written. One product."""
    rows, kept, depth = _rows(pixels, ids, weight, cu_seqlens)
    written = rows * weight.shape[0] * weight.dtype.itemsize
    read = kept * depth * pixels.dtype.itemsize + nbytes(ids, weight, bias, pos_embed)
    return Cost(read + written, 2 * rows * depth * weight.shape[0])


def backward(
    grad: Any, pixels: Any, ids: Tensor | None, weight: Any, cu_seqlens: Tensor | None, scale: Any, shift: Any,
    wanted: Any,
) -> Cost:  # fmt: skip
    """The gradient of the rows read; for the weight's also the kept pixels, for the pixels' the weight. Each is as
    large as what it is of, and a product."""
    rows, kept, depth = _rows(pixels, ids, weight, cu_seqlens)
    channels, size = weight.shape[0], weight.dtype.itemsize
    moved, products = nbytes(grad, ids), 0
    if wanted[0]:
        moved, products = moved + nbytes(weight) + elements(pixels) * pixels.dtype.itemsize, products + 1
    if wanted[1]:
        moved, products = moved + kept * depth * pixels.dtype.itemsize + nbytes(weight), products + 1
    patches = elements(pixels) // (depth * pixels.shape[0])
    moved += (channels * size if wanted[2] else 0) + (patches * channels * size if wanted[3] else 0)
    return Cost(moved, 2 * products * rows * depth * channels)


def _rows(pixels: Any, ids: Tensor | None, weight: Any, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """(rows of the result, patches that are read, pixels of a patch)."""
    depth = prod(weight.shape[1:])
    if len(pixels.shape) < len(weight.shape):  # images and a kernel of clips, which is summed over its frames
        depth //= weight.shape[2]
    if ids is None:
        rows = elements(pixels) // depth
        return rows, rows, depth
    return ids.numel(), distinct(ids, cu_seqlens, pixels.shape[0]), depth
