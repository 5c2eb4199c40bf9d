"""`collapse_stats` on the CPU: C++ reads z once; torch.mm multiplies the few rows that the rank is taken from."""

from types import ModuleType

import torch
from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels.ops.collapse_stats.rank import effective_rank


def _kernels() -> ModuleType:
    module = extension.load()
    assert not isinstance(module, str)  # selection has asked
    return module


def forward(z: Tensor) -> Tensor:
    """(std, min_std, rank, cosine) of z [N, E]."""
    out = z.new_empty(4, dtype=torch.float32)
    _kernels().collapse_stats(z, out)
    out[2] = effective_rank(z)
    return out
