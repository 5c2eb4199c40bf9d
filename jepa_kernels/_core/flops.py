"""FLOP formulas for torch.utils.flop_counter. Its import costs more than ours: they wait until it is imported."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import torch

COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def flop_formula(op: str, formula: Callable[..., int]) -> None:
    """Let FlopCounterMode count `jepa_kernels::<op>` by formula(*arguments of the op)."""
    _formulas[op] = formula
    if COUNTER in sys.modules:
        _hand_over()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _hand_over() -> None:
    from torch.utils.flop_counter import register_flop_formula

    while _formulas:
        op, formula = _formulas.popitem()
        register_flop_formula(getattr(torch.ops.jepa_kernels, op), get_raw=True)(_raw(formula))


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out_val=None, **kwargs: formula(*args, **kwargs)


class _Watch(MetaPathFinder):
    """Notices the first import of the counter and steps aside."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_hand_over(module: ModuleType) -> None:
                execute(module)
                _hand_over()

            spec.loader.exec_module = execute_and_hand_over  # type: ignore[method-assign]
        return spec
