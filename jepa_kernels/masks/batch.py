"""Masks of a batch: on the host as samplers draw them, and on a device as models take them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from jepa_kernels.packing import Packing
from jepa_kernels.pairs import Pairs


@dataclass(frozen=True)
class Masks:
    """Masks of B images on a device, mask-major: contexts and targets in the order of a MaskBatch.

    context_ids, target_ids: int64, packed [T] with a Packing beside them, or rectangular [rows, K] with None.
    pairs: the predictor's sequences [context | target]; None when rectangular.
    """

    batch: int
    context_ids: Tensor
    target_ids: Tensor
    context_packing: Packing | None = None
    target_packing: Packing | None = None
    pairs: Pairs | None = None


@dataclass(frozen=True)
class MaskBatch:
    """Masks of B images (or clips) on the host, mask-major: context s and target s are patches of image s % B.

    There are as many contexts as images, or several times as many; target s is predicted from context s % contexts.

    context_ids, target_ids: int64, sorted in each row: packed [T], or rectangular [rows, K] (`truncate=True`).
    context_lengths [contexts], target_lengths [targets]: int64, patches per row. contexts is a multiple of B,
        targets one of contexts.
    """

    batch: int
    context_ids: np.ndarray
    context_lengths: np.ndarray
    target_ids: np.ndarray
    target_lengths: np.ndarray

    @property
    def packed(self) -> bool:
        return self.context_ids.ndim == 1

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Masks:
        """Copy to `device`: ids and, when packed, the Packings that every layer and both passes share."""
        context_ids, target_ids = (
            torch.from_numpy(ids).to(device, non_blocking=non_blocking) for ids in (self.context_ids, self.target_ids)
        )
        if not self.packed:
            return Masks(self.batch, context_ids, target_ids)
        context, target = self.context_lengths.tolist(), self.target_lengths.tolist()
        return Masks(
            self.batch,
            context_ids,
            target_ids,
            Packing.from_lengths(context, device=device),
            Packing.from_lengths(target, device=device),
            Pairs.from_lengths(context, target, device=device),
        )

    def pin_memory(self) -> MaskBatch:
        """The same in page-locked memory (what DataLoader(pin_memory=True) calls)."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "batch"}
        pinned = {name: torch.from_numpy(a).pin_memory().numpy() for name, a in arrays.items()}
        return MaskBatch(self.batch, **pinned)
