"""Bytes and FLOPs of `info_nce`."""

from typing import Any

from jepa_kernels.cost import Cost, nbytes


def forward(x: Any, y: Any, temperature: Any, items: Any, column_items: Any, *options: Any) -> Cost:
    """Both sides read once, statistics of rows and columns written in fp64; one product."""
    rows, columns = x.shape[0], y.shape[0]
    statistics = 8 * (rows + columns) + 4 * rows
    return Cost(nbytes(x, y, items, column_items) + statistics, 2 * rows * columns * x.shape[1])


def backward(
    weight: Any, x: Any, y: Any, temperature: Any, items: Any, column_items: Any, row_lse: Any, col_lse: Any,
    row_share: Any, col_share: Any, shift: Any, kept: Any, normalize: Any, wide: bool,
) -> Cost:  # fmt: skip
    """Both sides and the statistics read, gradients written (wide ones in fp32); a product for each side."""
    rows, columns = x.shape[0], y.shape[0]
    read = nbytes(x, y, items, column_items, row_lse, col_lse, row_share, col_share)
    written = (rows + columns) * x.shape[1] * (4 if wide else x.dtype.itemsize)
    return Cost(read + written, 4 * rows * columns * x.shape[1])
