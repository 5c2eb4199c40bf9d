"""Named ranges around the parts of a step while a profile runs, and no trace of them after it.

Models of ours: their networks and methods, by the table below; networks are found when the model is first called. Any
loop: the backward pass and `nn.EMA`. torch itself names optimizers and data loaders; what a loop names by
`torch.profiler.record_function` is a part too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.profiler import record_function

# {class: {its module or method: part}}
PARTS = {
    "JEPA": {"context_encoder": "context", "targets": "target", "predictor": "predictor", "compare": "loss"},
    "LeJEPA": {"embed": "context", "projector": "projector", "objective": "loss"},
    "LeWorldModel": {
        "embed": "context",
        "action_encoder": "actions",
        "predictor": "predictor",
        "pred_proj": "predictor",
        "objective": "loss",
    },
    "VLJEPA": {"see": "context", "predict": "predictor", "answer": "target", "objective": "loss"},
}
HOME = "jepa_kernels.models."
Found = dict[str, str]


class Ranges(ExitStack):
    """The ranges that a profile has put up; closing it takes them away."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self._known: set[int] = set()
        try:
            self._put_up(model)
        except BaseException:
            self.close()
            raise

    def _put_up(self, model: nn.Module | None) -> None:
        self.wrap(torch.autograd, "backward", "backward")
        self.wrap(torch.autograd, "grad", "backward")
        ema = getattr(sys.modules.get("jepa_kernels.nn.ema"), "EMA", None)
        for method in ("update", "apply_update_") if ema is not None else ():
            self.wrap(ema, method, "EMA")
        for kind, parts in _loaded():
            for name in [name for name in parts if name in vars(kind)]:
                self.wrap(kind, name, parts[name])
        if model is None:
            self.callback(register_module_forward_pre_hook(self._look).remove)
        else:
            self._look(model)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Put a range around a function that `owner` has by this name."""
        function, own = getattr(owner, name), vars(owner).get(name)
        setattr(owner, name, _ranged(function, part))
        self.callback(delattr, owner, name) if own is None else self.callback(setattr, owner, name, own)

    def _look(self, module: nn.Module, inputs: Any = None) -> None:
        """Find the parts of a model of ours, or of what wraps one."""
        if id(module) in self._known:
            return
        parts = parts_of(type(module))  # type: ignore[arg-type]
        if parts:
            self._known.add(id(module))
            for name in [name for name in parts if isinstance(getattr(module, name), nn.Module)]:
                self._hook(getattr(module, name), parts[name])
        elif inputs is None:
            wrapped = getattr(module, "module", getattr(module, "_orig_mod", None))
            if isinstance(wrapped, nn.Module):
                self._look(wrapped)

    def _hook(self, module: nn.Module, part: str) -> None:
        """A range around the calls of a module; calls within calls are each in one of their own."""
        running: list[Any] = []

        def before(*_: Any) -> None:
            running.append(record_function(part))
            running[-1].__enter__()

        def after(*_: Any) -> None:
            running.pop().__exit__(None, None, None)

        self.callback(module.register_forward_pre_hook(before, prepend=True).remove)
        self.callback(module.register_forward_hook(after, always_call=True).remove)


def _loaded() -> Iterator[tuple[type, Found]]:
    """Classes of models that are imported, those above of which have parts: their methods get ranges."""
    for name, module in list(sys.modules.items()):
        for kind in list(vars(module).values()) if name.startswith(HOME) else ():
            if isinstance(kind, type) and kind.__module__ == name and parts_of(kind):
                yield kind, parts_of(kind)


@functools.cache
def parts_of(kind: type) -> Found:
    """Of models of this class; empty for others."""
    return next((PARTS[k.__name__] for k in kind.__mro__ if k.__name__ in PARTS and k.__module__.startswith(HOME)), {})


def _ranged(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return function(*args, **kwargs)

    return ranged
