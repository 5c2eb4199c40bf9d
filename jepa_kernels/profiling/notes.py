"""What kernels of ours were called with, noted while a profile runs; from it, after it, what each call costs."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jepa_kernels._core.define import wrap_kernels
from jepa_kernels._core.select import short
from jepa_kernels.cost import Cost


class Shaped(NamedTuple):
    """What a formula needs of a tensor: it holds no memory of it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    place: int = 0

    def data_ptr(self) -> int:
        return self.place

    def stride(self) -> tuple[int, ...]:
        return self.strides


class Note(NamedTuple):
    """One call. delay_ns: how long the kernel waited for it to be noted."""

    op: str
    stage: str
    backend: str
    args: tuple[Any, ...]
    delay_ns: int

    @property
    def event(self) -> str:
        """The name of the call in torch's profiler."""
        return f"jepa_kernels::{self.op}_{self.stage}"

    @property
    def dtype(self) -> str:
        """Of the first floating tensor; of none: float32, which weights and statistics are in."""
        flat = (x for arg in self.args for x in (arg if isinstance(arg, list) else (arg,)))
        dtypes = (x.dtype for x in flat if isinstance(x, Shaped) and x.dtype.is_floating_point)
        return short(next(dtypes, torch.float32))

    def cost(self) -> Cost | None:
        """None where the op states no formula of this stage."""
        file = f"jepa_kernels.ops.{self.op}.cost"
        try:
            formula = getattr(importlib.import_module(file), self.stage, None)
        except ModuleNotFoundError as error:
            if error.name != file:
                raise
            return None
        return None if formula is None else formula(*self.args)


class Notes(list[Note]):
    """Of every call of a kernel between `begin` and `end`, in order."""

    def begin(self) -> None:
        wrap_kernels(self._wrap)

    def end(self) -> None:
        wrap_kernels()

    def _wrap(self, op: str, stage: str, backend: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter_ns()
            seen = tuple(_seen(x, placed=True) for x in args)
            self.append(Note(op, stage, backend, seen, time.perf_counter_ns() - started))
            return kernel(*args, **kwargs)

        return noted


_shapes: dict[tuple[Any, ...], Shaped] = {}  # one object for all tensors alike: lists of thousands make no garbage


def _seen(x: Any, placed: bool = False) -> Any:
    """Floating tensors by shape; placed: and address, by which a shared one is known. Whole numbers, such as lengths,
    are read after the profile: no GPU is waited for."""
    if isinstance(x, Tensor):
        if not x.dtype.is_floating_point and x.dtype != torch.uint8:
            return x
        key = x.shape, x.stride(), x.dtype
        if placed:
            return Shaped(*key, x.data_ptr())
        return _shapes.get(key) or _shapes.setdefault(key, Shaped(*key))
    return [_seen(t) for t in x] if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor) else x
