"""`sigreg` on the CPU: torch.mm on tiles of slices, C++ before and after.

A product that writes to `out=` stays in fp32 under autocast.
"""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from jepa_kernels._core import extension

TILE = 2**18  # projections at a time: what the caches hold
LEAST = 64  # slices at a time


def _kernels() -> ModuleType:
    module = extension.load()
    assert not isinstance(module, str)  # selection has asked
    return module


def _rows(z: Tensor) -> Tensor:
    """z as fp32 rows side by side: a BLAS may round otherwise for other strides."""
    return z.reshape(-1, z.shape[-1]).to(torch.float32).contiguous()


def _tiles(rows: Tensor, slices: int, step: Tensor, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first slice, directions [slices of the tile, E], projections [rows, slices of the tile]), buffers used again."""
    count = min(max(TILE // max(len(rows), 1) // LEAST, 1) * LEAST, slices)
    at, directions, y = int(step), rows.new_empty(count, rows.shape[1]), rows.new_empty(len(rows) * count)
    for first in range(0, slices, count):
        a = directions[: slices - first]
        _kernels().sigreg_directions(a, first, at, seed)
        tile = y[: len(rows) * len(a)].view(len(rows), len(a))
        yield first, a, torch.mm(rows, a.T, out=tile)


def directions(like: Tensor, slices: int, step: Tensor, seed: int) -> Tensor:
    """Unit vectors fp32 [slices, E] on the device of `like` [.., E]: the bits of the reference."""
    out = like.new_empty((slices, like.shape[-1]), dtype=torch.float32)
    _kernels().sigreg_directions(out, 0, int(step), seed)
    return out


def moments(z: Tensor, slices: int, knots: int, t_max: float, step: Tensor, seed: int) -> Tensor:
    """Sums of cosines less their expectation, and of sines, over the rows: fp32 [V, 2, knots, slices].

    Those at the first knot are 0; in their place stands the number of rows.
    """
    out = z.new_empty((len(z), 2, knots, slices), dtype=torch.float32)
    for first, _, y in _tiles(_rows(z), slices, step, seed):
        _kernels().sigreg_moments(y, out, first, t_max)
    return out


def forward(z: Tensor, moments: Tensor, t_max: float, step: Tensor, seed: int, world: int) -> Tensor:
    """The statistic, from the moments alone."""
    loss = moments.new_empty(())
    _kernels().sigreg_forward(moments, loss, t_max)
    return loss


def backward(grad: Tensor, z: Tensor, moments: Tensor, t_max: float, step: Tensor, seed: int, world: int) -> Tensor:
    """dz: projections again, their derivative in place, and back along the directions."""
    slices, rows = moments.shape[-1], _rows(z)
    dz = torch.zeros_like(rows)
    scale = float(grad) * world / max(len(z) * slices, 1)
    for first, a, y in _tiles(rows, slices, step, seed):
        _kernels().sigreg_backward(y, moments, first, t_max, scale)
        torch.addmm(dz, y, a, out=dz)
    return dz.view(z.shape).to(z.dtype)
