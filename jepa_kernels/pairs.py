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
    """Where the tokens of B contexts and masks * B targets lie in the sequences [context | target].

    packing: the masks * B sequences, mask-major: [context b | target (mask, b)].
    context_rows: int64 [masks, T context], the row of every context token in the sequences of each mask.
    target_rows: int64 [T target], the row of every target token.
    """

    packing: Packing
    context_rows: Tensor
    target_rows: Tensor

    @classmethod
    def from_lengths(
        cls, context: Sequence[int], target: Sequence[int], *, device: torch.device | str | None = None
    ) -> Pairs:
        """Build from the lengths of the B contexts and of the masks * B targets, on the host."""
        batch = len(context)
        if len(target) % batch if batch else len(target):
            fail(
                "Pairs",
                "target lengths",
                f"be a multiple of the {batch} contexts in number",
                len(target),
                "pack the targets mask-major, one per mask and image",
            )
        c, t = np.asarray(context, dtype=np.int64), np.asarray(target, dtype=np.int64)
        masks = len(t) // batch if batch else 1
        both = np.tile(c, masks) + t
        start = np.cumsum(both) - both
        context_rows = _rows(start, np.tile(c, masks)).reshape(masks, -1)
        target_rows = _rows(start + np.tile(c, masks), t)
        rows = torch.from_numpy(np.concatenate([context_rows.reshape(-1), target_rows]))
        if device is not None and torch.device(device).type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        split = context_rows.size
        packing = Packing.from_lengths(both.tolist(), device=device)
        return cls(packing, rows[:split].view(masks, -1), rows[split:])


def _rows(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start[s], start[s] + 1, ... for lengths[s] rows of every s, one after another."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(start - before, lengths) + np.arange(lengths.sum())
