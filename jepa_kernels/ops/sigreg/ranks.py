"""Sums over the ranks of a process group, once these are known to add up the same thing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jepa_kernels._core.check import fail

_agreed: dict[dist.ProcessGroup, dict[str, Any]] = {}


def add_over_ranks(moments: Tensor, group: dist.ProcessGroup, **options: Any) -> Tensor:
    """`moments` of all ranks, added in place. Ranks that disagree on any option but the step all raise ValueError."""
    if not torch.compiler.is_compiling():
        _agree(group, options)
    dist.all_reduce(moments, group=group)
    return moments


def _agree(group: dist.ProcessGroup, options: dict[str, Any]) -> None:
    """Where sizes differ, a collective hangs: compared before the first one, and before the options change."""
    own = {name: value for name, value in options.items() if name != "step"}
    if _agreed.get(group) == own:
        return
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, own, group=group)
    for name in own:
        values = [other[name] for other in everyone]
        if any(value != values[0] for value in values):
            fail("sigreg", name, "be the same on every rank of the group", f"{values} by rank", "pass one value")
    _agreed[group] = own
