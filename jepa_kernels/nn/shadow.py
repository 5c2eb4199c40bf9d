"""Low-precision twins of modules: what autocast casts at each forward is cast once, and kept."""

from __future__ import annotations

import copy
from itertools import zip_longest
from typing import NamedTuple, cast

import torch
from torch import nn

from jepa_kernels._core.check import fail

# Their forwards hand weight and bias to functions that autocast runs in its low type, and to nothing else.
LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
FORWARDS = {layer.forward for layer in LAYERS}


class Copy(NamedTuple):
    """A low-precision copy of the parameter `name` of a module's table of parameters."""

    table: dict[str, nn.Parameter | None]
    name: str
    low: nn.Parameter

    def source(self) -> nn.Parameter:
        p = cast(nn.Parameter, self.table[self.name])
        if type(p) is not nn.Parameter and hasattr(p, "to_local"):
            remedy = "let MixedPrecisionPolicy(param_dtype=...) cast the shards"
            fail("EMA", "shadow_dtype", "be None for a sharded target", f"a {type(p).__name__} {self.name}", remedy)
        return p


class Shadow:
    """A twin of `module` whose forward under autocast to `dtype` gives the module's bits and casts no weight.

    .module: the twin. It holds copies of the weights and biases of linear and convolution layers, and of what a module
        names in `autocast_casts`; other parameters, buffers and hooks are the module's own. A tensor that another kind
        of layer uses too (an embedding tied to a head) is not copied.
    .copies: the low-precision copies, one for each tensor.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.dtype, self.members = dtype, list(module.modules())
        self.copies = _copies(module, dtype)
        self.module = _twin(module, self.copies)
        self._seen: list[tuple[int, int]] = []
        self.refresh()

    def serves(self) -> bool:
        """Whether autocast is on to this dtype, on the device of the weights."""
        device = self.copies[0].source().device.type if self.copies else "meta"
        if device == "meta" or not torch.is_autocast_enabled(device):
            return False
        return torch.get_autocast_dtype(device) == self.dtype

    @torch.no_grad()
    def refresh(self) -> None:
        """Round again what was written since it was rounded last: by a load of weights, a move, by hand."""
        seen = self._look()
        if seen == self._seen:
            return
        for kept, now, before in zip_longest(self.copies, seen, self._seen):
            if now != before:
                _round(kept)
        self._seen = seen

    def written(self) -> None:
        """Somebody who wrote the parameters has written their copies too."""
        self._seen = self._look()

    def _look(self) -> list[tuple[int, int]]:
        """Address and number of in-place writes of each source."""
        sources = [kept.source() for kept in self.copies]
        return [(p.data_ptr(), p._version) for p in sources]


def _copies(module: nn.Module, dtype: torch.dtype) -> list[Copy]:
    lowered: dict[nn.Parameter, Copy] = {}
    read: set[nn.Parameter] = set()  # by something that autocast leaves alone
    for owner in module.modules():
        names = ("weight", "bias") if type(owner).forward in FORWARDS else getattr(owner, "autocast_casts", ())
        for name, p in owner.named_parameters(recurse=False, remove_duplicate=False):
            if name in names and p.dtype == torch.float32:
                low = nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=False)
                lowered.setdefault(p, Copy(owner._parameters, name, low))
            else:
                read.add(p)
    return [kept for p, kept in lowered.items() if p not in read]


def _twin(module: nn.Module, copies: list[Copy]) -> nn.Module:
    """A copy of the modules; dictionaries are shared, not copied, so that what is put there later is seen in both."""
    replaced = {kept.source(): kept.low for kept in copies}
    twins: dict[int, object] = {id(p): low for p, low in replaced.items()}
    for member in module.modules():
        parameters = member._parameters
        shared = [v for name, v in vars(member).items() if name == "_buffers" or "_hooks" in name]
        shared += [p for p in parameters.values() if p is not None and p not in replaced]
        shared += [] if any(p in replaced for p in parameters.values() if p is not None) else [parameters]
        twins |= {id(x): x for x in shared}
    return copy.deepcopy(module, twins)


def _round(kept: Copy) -> None:
    source, low = kept.source(), kept.low
    if low.device != source.device:
        low.data = torch.empty_like(source, dtype=low.dtype)
    low.copy_(source)
