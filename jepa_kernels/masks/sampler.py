"""What the samplers share: the generator of the published code, checks."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core import extension
from jepa_kernels._core.check import fail
from jepa_kernels._core.select import BackendError
from jepa_kernels.masks.batch import MaskBatch
from jepa_kernels.masks.steps import Steps

MAX_ASPECT = 1000.0  # far beyond any grid
MAX_COUNT = 2**20  # of images, blocks and patches per side or block: products of three fit into 64 bits
MAX_SEED = 2**63 - 1
CPU = torch.device("cpu")

Range = tuple[float, float]


class Sampler:
    """Masks as a function of (seed, step), or of (seed + step, a torch generator) as the published code has it."""

    specs: Sequence[Any] = (None,)  # kinds of masks

    def __init__(self, truncate: bool, truncate_group: int, upstream: bool, seed: int, bucket: int) -> None:
        check_count(self.name, "seed", seed, 0, "pass any such number", MAX_SEED)
        check_count(self.name, "bucket", bucket, 0, "pass tokens, such as 1024")
        check_count(self.name, "truncate_group", truncate_group, 0, "pass images, 0 for all of a batch")
        self.truncate, self.upstream, self.seed, self.bucket = truncate or upstream, upstream, seed, bucket
        self.truncate_group = truncate_group
        if truncate_group and (upstream or not truncate):
            requirement = "be 0 but with truncate=True, and without upstream=True"
            fail(self.name, "truncate_group", requirement, truncate_group, "set truncate, or leave it out")
        if bucket and self.truncate and not truncate_group and len(self.specs) == 1:
            fail(
                self.name, "bucket", "be 0 for truncated masks, which are rectangular", bucket, "leave one of them out"
            )
        self._steps = Steps()

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def step(self) -> int:
        """Number of the next batch: how many were drawn, by the workers of a DataLoader too. Set it to resume."""
        return self._steps.next

    @step.setter
    def step(self, step: int) -> None:
        check_count(self.name, "step", step, 0, "pass the number of the next batch", MAX_SEED)
        self._steps.next = step

    def __call__(self, batch: int, *, step: int | None = None, generator: torch.Generator | None = None) -> MaskBatch:
        """Masks for `batch` images.

        step: overrides, and does not advance, the count of calls.
        generator: of the places, with `upstream=True`: a CPU generator, left in the state in which the published code
            leaves it. None is torch's global one.
        """
        check_count(self.name, "batch", batch, 1, "pass the number of images")
        step = self._steps.take() if step is None else step
        check_count(self.name, "step", step, 0, "leave it out to count calls", MAX_SEED)
        if self.upstream:
            return self._draw_with(torch.default_generator if generator is None else generator, batch, step)
        if generator is not None:
            fail(self.name, "generator", "be None without upstream=True", "a generator", "set seed and step instead")
        return self._draw(batch, step, None)

    def _draw_with(self, generator: torch.Generator, batch: int, step: int) -> MaskBatch:
        if not isinstance(generator, torch.Generator) or generator.device != CPU:
            actual = getattr(generator, "device", repr(generator))
            fail(self.name, "generator", "be a torch.Generator of the CPU", actual, "pass torch.Generator()", TypeError)
        state = generator.get_state()
        masks = self._draw(batch, step, state)
        generator.set_state(state)
        return masks

    def _finished(self, masks: MaskBatch) -> MaskBatch:
        """As they were drawn, cut and padded."""
        cut = masks.truncated(self.truncate_group) if self.truncate_group else masks
        return cut.padded(self.bucket)

    def _draw(self, batch: int, step: int, state: Tensor | None) -> MaskBatch:
        """The masks; with a state of torch's generator drawn from it, which then is the one after."""
        raise NotImplementedError


def native(name: str) -> ModuleType:
    """The compiled module; BackendError where there is none."""
    module = extension.load()
    if isinstance(module, str):
        fail(name, "the compiled module", "be there", module, "build it with `pip install .`", BackendError)
    return module


def sides(name: str, grid: Any, axes: str) -> tuple[int, ...]:
    """Patches per side; one number stands for both of two axes."""
    count = len(axes.split())
    found = tuple(grid) if isinstance(grid, tuple | list) else (grid,) * 2
    if len(found) != count or not all(map(_whole, found)):
        short = "G or " if count == 2 else ""
        requirement = f"be patches per side, {short}({axes})"
        fail(name, "grid", requirement, repr(grid), "pass integers", TypeError)
    if max(found) > MAX_COUNT or torch.Size(found).numel() > MAX_COUNT:
        fail(name, "grid", f"have at most {MAX_COUNT} patches", found, "use larger patches")
    return tuple(int(side) for side in found)


def check_count(name: str, argument: str, value: Any, least: int, remedy: str, most: int = MAX_COUNT) -> None:
    if type(value) is int and least <= value <= most:
        return
    if not _whole(value):
        fail(name, argument, "be an int", repr(value), remedy, TypeError)
    if value < least:
        fail(name, argument, f"be at least {least}", value, remedy)
    if value > most:
        fail(name, argument, f"be at most {most}", value, remedy)


def check_range(name: str, argument: str, bounds: Any, limit: float, remedy: str) -> None:
    pair = isinstance(bounds, tuple | list) and len(bounds) == 2
    if not (pair and all(isinstance(b, numbers.Real) for b in bounds)):
        fail(name, argument, "be two numbers (least, most)", repr(bounds), remedy, TypeError)
    if not 0 < bounds[0] <= bounds[1] <= limit:
        fail(name, argument, f"satisfy 0 < least <= most <= {limit:g}", bounds, remedy)


def _whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
