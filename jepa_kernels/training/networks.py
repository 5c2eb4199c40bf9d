"""The networks of a run as its processes share them: DDP or FSDP2, blocks compiled or computed again."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from jepa_kernels.configs.sections import Parallel
from jepa_kernels.nn import Block, compile_blocks
from jepa_kernels.nn.action_predictor import ActionBlock
from jepa_kernels.nn.conditional import ConditionalBlock
from jepa_kernels.nn.decoder import DecoderBlock
from jepa_kernels.training.ranks import Ranks

BLOCKS = Block, ActionBlock, ConditionalBlock, DecoderBlock
RUN_AGAIN = "forward", "cross"  # what a block's caller calls
GATHERED = "cross", "qkv", "before", "after"  # the same, besides its forward
SIGNATURE = inspect.signature(DistributedDataParallel).parameters


def shards(how: Parallel, ranks: Ranks) -> bool:
    """Whether each rank holds a part of every weight."""
    return how.engine == "fsdp" and ranks.grouped


def compiles(how: Parallel, device: torch.device) -> bool:
    """Whether blocks are compiled: as the config says, or where the device is a GPU."""
    return device.type == "cuda" if how.compile is None else how.compile


def spread(model: nn.Module, how: Parallel, ranks: Ranks, device: torch.device) -> nn.Module:
    """What a step calls: the model itself, changed in place, or DDP around it. Every rank must call it.

    Names in the model's state dict stay. With "fsdp" its weights become DTensors.
    """
    blocks: list[Any] = [block for block in model.modules() if isinstance(block, BLOCKS)]
    if how.activation_checkpointing:
        for block in blocks:
            for method in RUN_AGAIN:
                if hasattr(block, method) and any(p.requires_grad for p in block.parameters()):
                    setattr(block, method, partial(checkpoint, getattr(block, method), use_reentrant=False))
    if compiles(how, device):
        compile_blocks(model)
    if shards(how, ranks):
        return _sharded(model, blocks, device)
    if ranks.world == 1:
        return model
    places: Any = [device] if device.type == "cuda" else None
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in SIGNATURE else "broadcast_buffers"  # to torch 2.12
    options: Any = {buffers: False, "gradient_as_bucket_view": True, "device_ids": places}
    return DistributedDataParallel(model, **options)


def _sharded(model: nn.Module, blocks: list[Any], device: torch.device) -> nn.Module:
    """A part of every weight on each rank; blocks gather theirs one after another, all else is gathered for a step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
        for method in GATHERED:
            if hasattr(block, method):
                register_fsdp_forward_method(block, method)
    numbers = {p for p in model.parameters() if p.dim() == 0}  # which have no parts: every rank keeps them
    for p in numbers:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(_average_gradient)
    fully_shard(model, mesh=mesh, ignored_params=numbers)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .+ returned a view")  # nothing is changed in place
    return model


def _average_gradient(p: Tensor) -> None:
    """Over all ranks."""
    assert p.grad is not None
    torch.distributed.all_reduce(p.grad)
    p.grad /= torch.distributed.get_world_size()


@contextmanager
def part(network: Any, *, last: bool) -> Iterator[None]:
    """Around forward and backward of a part of the batch: gradients are averaged over ranks after the last one."""
    if hasattr(network, "set_requires_gradient_sync"):
        network.set_requires_gradient_sync(last)
    waits = isinstance(network, DistributedDataParallel) and not last
    with network.no_sync() if waits else nullcontext():
        yield


def whole(x: Tensor) -> Tensor:
    """A tensor, or all of one whose parts lie on several ranks: every rank must call it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
