"""Pairs: the predictor's packed sequences [context | target], one per mask and image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.packing import Packing


@dataclass(frozen=True)
class Pairs:
    """The sequences [context | target] of targets that each look at one context: target s at context s % contexts.

    I-JEPA: B contexts, masks * B targets. V-JEPA: one context for each target, masks * B of both.

    packing: one sequence for each target, in the targets' order.
    source: int64 [T], which row of [all contexts; all targets] stands at each row of these sequences.
    target_rows: int64 [T target], the row of every target token; rising.
    context_rows: int64, likewise, the row of every context token of every sequence.
    """

    packing: Packing
    source: Tensor
    target_rows: Tensor
    context_rows: Tensor

    @classmethod
    def from_lengths(
        cls, context: Sequence[int], target: Sequence[int], *, device: torch.device | str | None = None
    ) -> Pairs:
        """Build from the lengths of the contexts and of the targets, on the host."""
        c, t = np.asarray(context, dtype=np.int64), np.asarray(target, dtype=np.int64)
        if len(t) % len(c) if len(c) else len(t):
            requirement = f"be a multiple of the {len(c)} contexts in number"
            remedy = "pack the targets mask-major, one per mask and image"
            fail("Pairs", "target lengths", requirement, len(t), remedy)
        uses = len(t) // len(c) if len(c) else 1
        before = np.tile(c, uses)
        start = np.cumsum(before + t) - before - t
        target_rows = rows_of(start + before, t)
        context_rows = rows_of(start, before)
        source = np.empty(int((before + t).sum()), dtype=np.int64)
        source[context_rows] = np.tile(np.arange(c.sum()), uses)
        source[target_rows] = c.sum() + np.arange(t.sum())
        rows = torch.from_numpy(np.concatenate([source, target_rows, context_rows]))
        if device is not None and torch.device(device).type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        packing = Packing.from_lengths((before + t).tolist(), device=device)
        source_rows, *both = rows.split([len(source), len(target_rows), len(context_rows)])
        return cls(packing, source_rows, *both)


def rows_of(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start[s], start[s] + 1, ... for lengths[s] rows of every s, one after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(start - before, lengths) + np.arange(lengths.sum())
