"""The tensors of an online network and its target, paired once and looked up again while they stay in place."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.nn.shadow import Shadow

Pair = tuple[Tensor, Tensor]  # target, online


def unwrap(module: nn.Module) -> nn.Module:
    """The network in the wrappers of DDP and torch.compile."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, DistributedDataParallel) else cast(nn.Module, module._orig_mod)
    return module


class Pairing:
    """Parameters and buffers of two networks of one structure, in order; a shared tensor comes once."""

    def __init__(self, online: nn.Module, target: nn.Module, shadow: Shadow | None) -> None:
        self.online, self.target = online, target
        networks = (*online.modules(), *target.modules())
        self._sharded = [m for m in networks if hasattr(m, "reshard")]
        self._reshard()
        self._tables = [d for m in networks for d in (m._modules, m._parameters) if d]
        self._entries = list(self._found())
        self.names, self.parameters = _named_pairs(target, online)
        self._shards = [(p, p._local_tensor) for p in chain(*self.parameters) if hasattr(p, "_local_tensor")]
        self._trained = [o.requires_grad for _, o in self.parameters]
        moving = [(t, o) for (t, o), trained in zip(self.parameters, self._trained, strict=True) if trained]
        self._staged = [(torch.empty_like(o, device=t.device), o) for t, o in moving if o.device != t.device]
        places = {o: place for place, o in self._staged}
        low: dict[Tensor, Tensor] = {} if shadow is None else {kept.source(): kept.low for kept in shadow.copies}
        rows = [(t, places.get(o, o), low.get(t)) for t, o in moving]
        self._lists = [r for r in rows if r[2] is None], [r for r in rows if r[2] is not None]

    def holds(self, online: nn.Module) -> bool:
        """Whether every module, parameter and shard is where it was, as trainable as it was."""
        self._reshard()
        return (
            online is self.online
            and all(map(operator.is_, self._found(), self._entries))
            and all(p._local_tensor is shard for p, shard in self._shards)
            and [o.requires_grad for _, o in self.parameters] == self._trained
        )

    def update(self, momentum: float | Tensor, form: str) -> None:
        """Move the targets of trained parameters."""
        for place, online in self._staged:
            place.copy_(online, non_blocking=True)
        for rows in self._lists:
            targets, onlines, low = zip(*rows, strict=True) if rows else ((), (), ())
            shadow = low if rows and low[0] is not None else None
            jk.ema_update(targets, onlines, momentum, shadow=shadow, form=form)

    def buffers(self) -> list[Pair]:
        """Looked up at each call: code may put new tensors in their places."""
        targets, onlines = dict(self.target.named_buffers()), dict(self.online.named_buffers())
        if targets.keys() != onlines.keys():
            odd = sorted(targets.keys() ^ onlines.keys())[0]
            fail("EMA", "online", "have the target's buffers", f"{odd} in one alone", "register it in both")
        for name, t in targets.items():
            if t.shape != onlines[name].shape:
                shapes = tuple(t.shape), tuple(onlines[name].shape)
                fail("EMA", name, f"have the target's shape {shapes[0]}", shapes[1], "resize both")
        return [(t, onlines[name]) for name, t in targets.items()]

    def _found(self) -> Iterator[object]:
        return chain.from_iterable(table.values() for table in self._tables)

    def _reshard(self) -> None:
        # After a forward, FSDP may leave the gathered parameters in place of the shards.
        for module in self._sharded:
            cast(Any, module).reshard()


def _named_pairs(target: nn.Module, online: nn.Module) -> tuple[list[str], list[Pair]]:
    named, onlines = dict(target.named_parameters()), list(online.parameters())
    if len(onlines) != len(named):
        wanted = f"have {len(named)} parameters as the target"
        fail("EMA", "online", wanted, len(onlines), "pass the network that the target was copied from")
    return list(named), list(zip(named.values(), onlines, strict=True))
