"""What each step of a run shows to one of its processes, a function of (seed, step, rank, world) alone."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jepa_kernels._core.check import fail
from jepa_kernels.configs import Config
from jepa_kernels.masks import MaskBatch
from jepa_kernels.recipes import RECIPES
from jepa_kernels.training import balance
from jepa_kernels.training.ranks import Ranks

Part = tuple[Tensor, Any]  # uint8 pixels; masks, actions or texts


class Feed(Dataset[list[Part]]):
    """Item `step`: the parts of that step's batch which this rank takes, one after another.

    Inputs of step n are n * batch_size, n * batch_size + 1, ...; its masks are those of step n. Every rank draws the
    masks of the whole batch, so that a batch and its loss are the same whatever the number of ranks and parts, and
    which images each one takes: in order, or with as much to do for all (`balance`).
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        recipe, self.batch, self.ranks = RECIPES[config.architecture], config.data.batch_size, ranks
        self.accumulate, self.steps = config.optimization.accumulate, config.optimization.steps
        self.balance, self.model = config.parallel.balance, config.model
        self.inputs, self.masks = recipe.inputs(config)
        self.collate = None if recipe.collate is None else recipe.collate(config)
        self._check(config)

    def _check(self, config: Config) -> None:
        parts = self.ranks.world * self.accumulate
        if self.batch % parts:
            of = f"{self.ranks.world} ranks, {self.accumulate} parts each"
            fail("train", "data.batch_size", f"be a multiple of {parts}, for {of}", self.batch, "change one of them")
        if self.batch < 2 * self.ranks.world:
            least = 2 * self.ranks.world
            fail("train", "data.batch_size", f"be at least {least}, two on each rank", self.batch, "use fewer ranks")
        if self.accumulate > 1 and self.masks is None:
            requirement = f"be 1 for {config.architecture}, whose loss compares all inputs of a batch"
            remedy = "use more ranks, or parallel.activation_checkpointing"
            fail("train", "optimization.accumulate", requirement, self.accumulate, remedy)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Part]:
        if self.masks is None:
            mine = balance.in_order(self.batch, self.ranks.world)[self.ranks.rank]
            return [self._stacked(self._items(step, mine))]
        parts = self._parts(self.masks(self.batch, step=step))
        return [(torch.stack([pixels for pixels, _ in self._items(step, mine)]), given) for mine, given in parts]

    def given(self, step: int) -> list[MaskBatch]:
        """The masks of a step's parts, of a model that has masks, without what they show."""
        assert self.masks is not None
        return [masks for _, masks in self._parts(self.masks(self.batch, step=step))]

    def _items(self, step: int, images: np.ndarray) -> list[Any]:
        return [self.inputs[step * self.batch + image] for image in images.tolist()]

    def _parts(self, masks: MaskBatch) -> list[tuple[np.ndarray, MaskBatch]]:
        """Which images of the batch each part of this rank has, and their masks."""
        parts = self.ranks.world * self.accumulate
        if parts == 1:
            return [(np.arange(self.batch), masks)]
        found = balance.in_order(self.batch, parts)
        if self.balance:
            found = balance.balanced(balance.costs(masks, self.model), parts)
        first = self.ranks.rank * self.accumulate
        return [(images, masks.part(images, parts)) for images in found[first : first + self.accumulate]]

    def _stacked(self, items: list[Any]) -> Part:
        if self.collate is not None:
            return self.collate(items)
        pixels, given = (torch.stack(column) for column in zip(*items, strict=True))
        return pixels, given


def batches(config: Config, start: int = 0, ranks: Ranks | None = None, *, pin: bool = False) -> DataLoader[Any]:
    """Load the parts of the steps from `start` on."""
    feed = Feed(config, ranks or Ranks())
    return DataLoader(
        feed,
        batch_size=None,
        sampler=range(start, len(feed)),
        collate_fn=_as_it_is,
        num_workers=config.data.num_workers,
        worker_init_fn=_leave_signals_to_the_loop,
        generator=torch.Generator(),  # the loader would draw its workers' seed from the global one
        pin_memory=pin,
    )


def _leave_signals_to_the_loop(worker: int) -> None:
    """A whole group of processes may be asked to end: the loop does, after it has saved, and workers with it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(parts: list[Part]) -> list[Part]:
    return parts
