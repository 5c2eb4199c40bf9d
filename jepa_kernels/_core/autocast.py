"""Autocast, applied once in the public function: a rule on the torch op would give eager backward mixed dtypes."""

from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's low type where autocast is on for their device; float64 stays, as in torch's rule."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    return tuple(t.to(low) if isinstance(t, Tensor) and _lowers(t) else t for t in tensors)


def _lowers(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64
