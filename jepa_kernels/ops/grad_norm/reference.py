"""Specification of `grad_norm`."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def forward(grads: Sequence[Tensor | None]) -> Tensor:
    """The square root of the sum of all squares, in fp32 (fp64 for fp64)."""
    given = [g for g in grads if g is not None]
    if not given:
        return torch.zeros(())
    wide = torch.float64 if given[0].dtype == torch.float64 else torch.float32
    return torch.stack([g.to(wide).norm() for g in given]).norm()
