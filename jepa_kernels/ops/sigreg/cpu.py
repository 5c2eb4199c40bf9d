"""`sigreg` on the CPU: C++ on fp32 embeddings, whatever autocast says.

For a gradient the forward pass keeps projections and directions: 4 bytes where the eager chain has some 400, and one
product of three that backward does without.
"""

from types import ModuleType

import torch
from torch import Tensor

from jepa_kernels._core import extension

PANEL = 32  # columns of what is kept: csrc/sigreg/sigreg.h


def _kernels() -> ModuleType:
    module = extension.load()
    assert not isinstance(module, str)  # selection has asked
    return module


def directions(like: Tensor, slices: int, step: Tensor, seed: int) -> Tensor:
    """Unit vectors fp32 [slices, E] on the device of `like` [.., E]: the bits of the reference."""
    out = like.new_empty((slices, like.shape[-1]), dtype=torch.float32)
    _kernels().sigreg_directions(out, int(step), seed)
    return out


def kept_size(z: Tensor, slices: int) -> int:
    """Numbers that forward keeps of z [V, N, E], in fp32: projections and directions, in whole panels."""
    views, rows, width = z.shape
    return _padded(slices) * (views * rows + _padded(width))


def _padded(count: int) -> int:
    return (count + PANEL - 1) // PANEL * PANEL


def moments(
    z: Tensor, slices: int, knots: int, t_max: float, step: Tensor, seed: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """Sums of cosines less their expectation, and of sines, over the rows: fp32 [V, 2, knots, slices].

    Those at the first knot are 0; in their place stands the number of rows. And what backward reads, where kept.
    """
    out = z.new_empty((len(z), 2, knots, slices), dtype=torch.float32)
    z = z.to(torch.float32).contiguous()
    return out, _kernels().sigreg_moments(z, out, t_max, int(step), seed, keep)


def forward(z: Tensor, moments: Tensor, t_max: float, step: Tensor, seed: int, world: int, kept: Tensor) -> Tensor:
    """The statistic, from the moments alone."""
    loss = moments.new_empty(())
    _kernels().sigreg_forward(moments, loss, t_max)
    return loss


def backward(
    grad: Tensor, z: Tensor, moments: Tensor, t_max: float, step: Tensor, seed: int, world: int, kept: Tensor
) -> Tensor:
    """dz: the derivative of the kept projections, and back along the directions."""
    slices, dz = moments.shape[-1], z.new_empty(z.shape)
    if len(kept) != kept_size(z, slices):  # a program that was exported without a gradient
        kept = _project_again(z, moments, t_max, step, seed)
    _kernels().sigreg_backward(dz, moments, kept, t_max, float(grad) * world / max(len(z) * slices, 1))
    return dz


def _project_again(z: Tensor, like: Tensor, t_max: float, step: Tensor, seed: int) -> Tensor:
    """What a forward pass would have kept."""
    _, _, knots, slices = like.shape
    return moments(z, slices, knots, t_max, step, seed, True)[1]
