"""Low-precision copies of weights: what autocast casts at each forward is cast once, and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import nn

from jepa_kernels._core.check import fail
from jepa_kernels.lists import check_held
from jepa_kernels.nn.linear import Linear

# Their forwards hand weight and bias to functions that autocast runs in its low type, and to nothing else.
LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
FORWARDS = {layer.forward for layer in LAYERS}


class Place(NamedTuple):
    """Where a module looks up a parameter that has a copy: the entry `name` of its table of parameters."""

    table: dict[str, nn.Parameter | None]
    name: str
    source: nn.Parameter
    low: nn.Parameter


class Shadow:
    """Low-precision copies of the weights of `module`, with which its forward under autocast to `dtype` casts none.

    Copied are the weights and biases of linear and convolution layers, and what a module names in `autocast_casts`;
    not a tensor that another kind of layer uses too (an embedding tied to a head).
    .copies: {parameter: its copy}, one for each tensor.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.dtype = module, dtype
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        self._lent = False
        self.renew()

    def serves(self) -> bool:
        """Whether autocast is on to this dtype, on the device of the weights."""
        device = self._places[0].source.device.type if self._places else "meta"
        if device == "meta" or not torch.is_autocast_enabled(device):
            return False
        return torch.get_autocast_dtype(device) == self.dtype

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The module looks up the copies in the places of their sources: everything else of it is as it is."""
        if self._lent:  # by a forward that runs this one
            yield
            return
        self._lent = True
        for table, name, _, low in self._places:
            table[name] = low
        try:
            yield
        finally:
            for table, name, source, _ in self._places:
                table[name] = source
            self._lent = False

    def renew(self) -> None:
        """Look for the parameters anew, and round all of them."""
        self._places = _places(self.module, self.dtype, self.copies)
        self.copies = {place.source: place.low for place in self._places}
        self._seen: list[tuple[int, int]] = []
        self._round_written()

    def refresh(self) -> None:
        """Round again what was written since it was rounded last: by a load of weights, a move, by hand."""
        if self._lent:
            return
        if all(table.get(name) is source for table, name, source, _ in self._places):
            self._round_written()
        else:
            self.renew()

    def written(self) -> None:
        """Somebody who wrote the parameters has written their copies too."""
        self._seen = self._look()

    @torch.no_grad()
    def _round_written(self) -> None:
        seen = self._look()
        if seen == self._seen:
            return
        changed = zip_longest(self.copies.items(), seen, self._seen)
        stale = dict(pair for pair, now, before in changed if now != before)
        for name, source in self.module.named_parameters():
            if source in stale:
                check_held("EMA", f"target {name}", source)
        for source, low in stale.items():
            _round(source, low)
        self._seen = seen

    def _look(self) -> list[tuple[int, int]]:
        """Address and number of in-place writes of each source."""
        return [(p.data_ptr(), p._version) for p in self.copies]


def _places(module: nn.Module, dtype: torch.dtype, kept: Mapping[nn.Parameter, nn.Parameter]) -> list[Place]:
    """All places of parameters that have copies; the copies that are there already stay."""
    lowered: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    read: set[nn.Parameter] = set()  # by something that autocast leaves alone
    for owner in module.modules():
        names = ("weight", "bias") if type(owner).forward in FORWARDS else getattr(owner, "autocast_casts", ())
        for name, p in owner.named_parameters(recurse=False, remove_duplicate=False):
            if name in names and p.dtype == torch.float32:
                lowered.append((owner._parameters, name, _whole(name, p)))
            else:
                read.add(p)
    sources = dict.fromkeys(p for _, _, p in lowered if p not in read)
    copies = {p: kept[p] if p in kept else _empty(p, dtype) for p in sources}
    return [Place(table, name, p, copies[p]) for table, name, p in lowered if p in copies]


def _whole(name: str, p: nn.Parameter) -> nn.Parameter:
    if type(p) is not nn.Parameter and hasattr(p, "to_local"):
        remedy = "let MixedPrecisionPolicy(param_dtype=...) cast the shards"
        fail("EMA", "shadow_dtype", "be None for a sharded target", f"a {type(p).__name__} {name}", remedy)
    return p


def _empty(source: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(source, dtype=dtype), requires_grad=False)


def _round(source: nn.Parameter, low: nn.Parameter) -> None:
    if (low.device, low.shape, low.stride()) != (source.device, source.shape, source.stride()):
        low.data = torch.empty_like(source, dtype=low.dtype)
    low.copy_(source)
