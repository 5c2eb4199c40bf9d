"""The tensors of an online network and its target, paired once and looked up again while they stay in place."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.chunks import read
from jepa_kernels.lists import Passed, check_held
from jepa_kernels.nn.shadow import Shadow

Pair = tuple[Tensor, Tensor]  # target, online
BufferTable = tuple[str, dict[str, Tensor | None], set[str]]  # of a module: its name, buffers, and which are caches


def unwrap(module: nn.Module) -> nn.Module:
    """The network in the wrappers of DDP and torch.compile."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, DistributedDataParallel) else cast(nn.Module, module._orig_mod)
    return module


class Pairing:
    """Parameters and buffers of two networks of one structure, in order; a shared tensor comes once.

    averaged: fp32 buffers move as parameters do; others, or all, are to be copied.
    """

    def __init__(self, online: nn.Module, target: nn.Module, shadow: Shadow | None, *, averaged: bool) -> None:
        self.online, self.target = online, target
        networks = (*online.modules(), *target.modules())
        self._sharded = [m for m in networks if hasattr(m, "reshard")]
        self._reshard()
        self._buffers = buffer_tables(target), buffer_tables(online)
        kinds = ("_modules", "_parameters", "_buffers")[: 3 if averaged else 2]
        self._tables = [table for m in networks for kind in kinds if (table := getattr(m, kind))]
        self._entries = list(self._found())
        self.parameters = _named_pairs(target, online)
        self._onlines = [o for _, o in self.parameters.values()]
        self._trained = [o.requires_grad for o in self._onlines]
        self._low: Mapping[Any, Tensor] = {} if shadow is None else shadow.copies
        self._averaged, self._passed = averaged, Passed()
        self._prepare()

    def _prepare(self) -> None:
        """The table of what moves; online tensors of another device have a place on the target's."""
        moving = self.moving()
        apart = {name: pair for name, pair in moving.items() if pair[0].device != pair[1].device}
        places = {name: torch.empty_like(o, device=t.device) for name, (t, o) in apart.items()}
        self._staged = {name: (places[name], o) for name, (_, o) in apart.items()}
        self._table = jk.EmaTable(
            {name: t for name, (t, _) in moving.items()},
            {name: places.get(name, o) for name, (_, o) in moving.items()},
            shadow={name: self._low.get(t) for name, (t, _) in moving.items()} if self._low else None,
        )

    def holds(self, online: nn.Module) -> bool:
        """Whether every module and parameter is where it was, as trainable as it was."""
        self._reshard()
        return (
            online is self.online
            and sum(map(len, self._tables)) == len(self._entries)
            and all(map(operator.is_, self._found(), self._entries))
            and [o.requires_grad for o in self._onlines] == self._trained
        )

    def trained(self) -> list[Pair]:
        return [pair for pair, is_trained in zip(self.parameters.values(), self._trained, strict=True) if is_trained]

    def moving(self) -> dict[str, Pair]:
        """What an update moves: trained parameters, and averaged buffers."""
        trained = zip(self.parameters.items(), self._trained, strict=True)
        moving = self._fitting({name: pair for (name, pair), is_trained in trained if is_trained})
        return moving | self.averaged()

    def averaged(self) -> dict[str, Pair]:
        """The buffers that move."""
        return {name: pair for name, pair in self.buffers().items() if self._moves(pair)}

    def check_moved_by(self, targets: Mapping[Tensor, Tensor | None]) -> None:
        """Whether an optimizer with these targets, each with its copy, moves all trained ones."""
        for (name, (target, _)), is_trained in zip(self.parameters.items(), self._trained, strict=True):
            if is_trained and target not in targets:
                remedy = "build it with target_params=ema.pairs()"
                fail("EMA", "optimizer", f"move the target of {name}", "none of its targets is that", remedy)
            if is_trained and targets[target] is not self._low.get(target):
                remedy = "build it with shadow=(None, ema.shadow_copies())"
                fail("EMA", "optimizer", f"write the copy of {name}", "another target shadow or none", remedy)

    def update(self, momentum: float | Tensor, form: str) -> None:
        """Move the targets of trained parameters."""
        try:
            return self._update(momentum, form)
        except ValueError:  # other memory behind the same parameters, after a `.to` or `.data =`: all is checked anew
            self._prepare()
        self._update(momentum, form)

    def _update(self, momentum: float | Tensor, form: str) -> None:
        for place, online in self._fitting(self._staged).values():
            place.copy_(online)
        self._table.update(momentum, form=form)

    def copied(self) -> list[Pair]:
        """The buffers that do not move, checked; looked up at each call: code may put new tensors in their places."""
        return [pair for pair in self.buffers().values() if not self._moves(pair)]

    def _moves(self, pair: Pair) -> bool:
        return self._averaged and pair[0].dtype == torch.float32

    def all(self) -> list[Pair]:
        """All parameters and buffers, checked."""
        return list((self._fitting(self.parameters) | self.buffers()).values())

    def buffers(self) -> dict[str, Pair]:
        """All buffers of the state dicts."""
        targets, onlines = map(state_buffers, self._buffers)
        if targets.keys() != onlines.keys():
            odd = min(targets.keys() ^ onlines.keys())
            fail("EMA", "online", "have the target's buffers", f"{odd} in one alone", "register it in both")
        return self._fitting({name: (t, onlines[name]) for name, t in targets.items()})

    def _fitting(self, pairs: dict[str, Pair]) -> dict[str, Pair]:
        """Of one shape, and with the memory that torch's copies take for granted; of a DTensor its local shard's."""
        known = read([[pair[side] for pair in pairs.values()] for side in (0, 1)], plain=True)
        if known in self._passed:
            return pairs
        for name, pair in _shaped_alike(pairs).items():
            for side, t in zip(("target", "online"), pair, strict=True):
                t = getattr(t, "_local_tensor", t)
                if t.layout is torch.strided and not t.is_meta:
                    check_held("EMA", f"{side} {name}", t)
        self._passed.add(known)
        return pairs

    def _found(self) -> Iterator[object]:
        return chain.from_iterable(map(dict.values, self._tables))

    def _reshard(self) -> None:
        # After a forward, FSDP may leave the gathered parameters in place of the shards.
        for module in self._sharded:
            cast(Any, module).reshard()


def buffer_tables(module: nn.Module) -> list[BufferTable]:
    return [(name, m._buffers, m._non_persistent_buffers_set) for name, m in module.named_modules()]


def state_buffers(tables: Iterable[BufferTable]) -> dict[str, Tensor]:
    """The buffers of the state dict: others are caches, of each network's own inputs."""
    found: dict[str, Tensor] = {}
    for prefix, table, caches in tables:
        if table:
            named = {f"{prefix}.{name}".lstrip("."): x for name, x in table.items() if name not in caches}
            found |= {name: x for name, x in named.items() if x is not None}
    return found


def _named_pairs(target: nn.Module, online: nn.Module) -> dict[str, Pair]:
    named, onlines = dict(target.named_parameters()), list(online.parameters())
    if len(onlines) != len(named):
        wanted = f"have {len(named)} parameters as the target"
        fail("EMA", "online", wanted, len(onlines), "pass the network that the target was copied from")
    return _shaped_alike(dict(zip(named, zip(named.values(), onlines, strict=True), strict=True)))


def _shaped_alike(pairs: dict[str, Pair]) -> dict[str, Pair]:
    for name, (t, o) in pairs.items():
        if t.shape != o.shape:
            wanted = f"have the target's shape {tuple(t.shape)}"
            fail("EMA", f"online {name}", wanted, tuple(o.shape), "pass the network that the target was copied from")
    return pairs
