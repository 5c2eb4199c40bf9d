"""Autocast, applied once in the public function: a rule on the torch op would give eager backward mixed dtypes."""

from typing import Any

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's low type where it is on for the device of the first; float64 stays, as in torch."""
    first = tensors[0]
    device = "cpu" if not isinstance(first, Tensor) or first.is_cpu else first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    low = torch.get_autocast_dtype(device)
    return tuple(t.to(low) if isinstance(t, Tensor) and _lowers(t) else t for t in tensors)


def _lowers(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64
