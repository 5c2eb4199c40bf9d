"""Whether the processes of a group hold the same bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.nn.pairing import buffer_tables, state_buffers


def one_batch(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Ranks whose rows count as one batch: this group, or all ranks, where a default group has been initialised; None:
    this process alone."""
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


def check_same(op: str, module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Raise ValueError on every rank, naming the first parameter or buffer that is not the same on all of them.

    A DTensor is compared along the dimensions of its mesh that hold replicas: shards differ by design.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    tensors = {**dict(module.named_parameters()), **state_buffers(buffer_tables(module))}
    _check_layout(op, tensors, group)
    differs = [_differs(t, group) for t in tensors.values()]
    found = torch.stack(differs) if differs else torch.zeros(0, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    names = [name for name, bad in zip(tensors, found.tolist(), strict=True) if bad]
    if names:
        actual = f"other bits ({len(names)} of {len(tensors)} tensors differ)"
        fail(op, names[0], "be the same on all ranks", actual, "load one state on all of them")


def _check_layout(op: str, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """The comparisons below are collective: all ranks must make the same ones, or they would wait for each other."""
    own = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    layouts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(layouts, own, group=group)
    for name in {name: None for layout in layouts for name in layout}:
        found = {layout.get(name) for layout in layouts}
        if len(found) > 1:
            fail(op, name, "have the same shape and dtype on all ranks", found, "build the same network on all")


def _differs(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """int32 scalar, 1 where a bit of this rank's tensor is not that of the group's first rank."""
    sharded: Any = t.detach()
    if not hasattr(sharded, "device_mesh"):
        return _differs_from_first(sharded, group)
    local = sharded.to_local()
    replicas = [i for i, placement in enumerate(sharded.placements) if placement.is_replicate()]
    found = [_differs_from_first(local, sharded.device_mesh.get_group(i)) for i in replicas]
    return torch.stack(found).amax() if found else torch.zeros((), dtype=torch.int32, device=local.device)


def _differs_from_first(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if t.numel() == 0:
        return torch.zeros((), dtype=torch.int32, device=t.device)
    own = t.contiguous().view(-1).view(torch.uint8)  # bits: NaN equals itself, -0 does not equal 0
    first = own.clone()
    dist.broadcast(first, group=group, group_src=0)
    return (first != own).any().int()
