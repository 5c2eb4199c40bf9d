"""Masks of a batch: on the host as samplers draw them, and on a device as models take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.masks.shares import Shares, Whole
from jepa_kernels.packing import Packing, round_up
from jepa_kernels.pairs import Pairs, rows_of


@dataclass(frozen=True)
class Masks:
    """Masks of B images on a device, mask-major: contexts and targets in the order of a MaskBatch.

    context_ids, target_ids: int64, packed [T] with a Packing beside them, or rectangular [rows, K] with None.
    pairs: the predictor's sequences [context | target]; None when rectangular.
    shares: of a part of a batch, what it counts for in the whole batch's loss; None: these are the whole.
    """

    batch: int
    context_ids: Tensor
    target_ids: Tensor
    context_packing: Packing | None = None
    target_packing: Packing | None = None
    pairs: Pairs | None = None
    shares: Shares | None = None

    def weights(self, of: str, reduction: str) -> Tensor | None:
        """What multiplies the losses of `of`, "context" or "target": see `Shares`. None: nothing."""
        if self.shares is None:
            return None
        ids, packing = getattr(self, f"{of}_ids"), getattr(self, f"{of}_packing")
        return getattr(self.shares, of).weights(reduction, ids, packing, self.batch)


@dataclass(frozen=True)
class MaskBatch:
    """Masks of B images (or clips) on the host, mask-major: context s and target s are patches of image s % B.

    There are as many contexts as images, or several times as many; target s is predicted from context s % contexts.

    context_ids, target_ids: int64, sorted in each row: packed [T], or rectangular [rows, K] (`truncate=True`).
    context_lengths [contexts], target_lengths [targets]: int64, patches per row. contexts is a multiple of B,
        targets one of contexts.
    whole: of a part of a batch, what the whole one holds.
    bucket: not 0: packed token axes of contexts, targets and pairs are padded up to multiples of it, bounds of lengths
        to powers of two, so that compiled code and CUDA graphs see few shapes. Ids past the end are 0; no network reads
        them, no loss counts them.
    """

    batch: int
    context_ids: np.ndarray
    context_lengths: np.ndarray
    target_ids: np.ndarray
    target_lengths: np.ndarray
    whole: Whole | None = None
    bucket: int = 0

    @property
    def packed(self) -> bool:
        return self.context_ids.ndim == 1

    def part(self, images: Sequence[int] | np.ndarray, parts: int) -> MaskBatch:
        """The masks of these images, one of `parts` parts of the batch; image i of the part is images[i] of the batch.

        It knows its share of the whole batch's loss: the mean of all parts' losses (of gradients accumulated over
        parts of one process, or averaged by DDP or FSDP over processes) is that loss, and likewise its gradients,
        whatever the sizes of parts, with no communication. Every image must be in one part.
        """
        rows = np.asarray(images)
        if self.whole is not None:
            fail("MaskBatch", "part", "be one of a whole batch", "a part", "divide the batch at once")
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or not len(rows) or len(np.unique(rows)) < len(rows):
            fail("MaskBatch", "images", "be numbers of different images", repr(images), "pass a list of ints")
        if rows.min() < 0 or rows.max() >= self.batch:
            fail("MaskBatch", "images", f"lie in [0, {self.batch})", repr(images), "pass those of this batch")
        if parts < 1:
            fail("MaskBatch", "parts", "be at least 1", parts, "pass how many parts the batch is divided into")
        context = self._of(rows, self.context_ids, self.context_lengths)
        target = self._of(rows, self.target_ids, self.target_lengths)
        whole = Whole(parts, self.batch, *(_tokens(x, self.batch) for x in (self.context_lengths, self.target_lengths)))
        return MaskBatch(len(rows), *context, *target, whole).padded(self.bucket)

    def truncated(self, group: int) -> MaskBatch:
        """Packed rows, of which those of `group` images that follow one another are cut to their shortest, from behind.

        Contexts of one number are cut together, and so are all targets predicted from them, as published code does.
        """
        kinds = len(self.context_lengths) // self.batch
        context = self.context_lengths.reshape(kinds, self.batch)
        target = self.target_lengths.reshape(-1, kinds, self.batch)
        starts = range(0, self.batch, group)
        counts = np.diff([*starts, self.batch])
        shortest = (np.minimum.reduceat(x, starts, 1).repeat(counts, 1) for x in (context, target.min(0)))
        own, theirs = next(shortest), np.broadcast_to(next(shortest), target.shape)
        parts = ((self.context_ids, context, own), (self.target_ids, target, theirs))
        cut = ((ids[rows_of(before.cumsum() - before.ravel(), n.ravel())], n.ravel()) for ids, before, n in parts)
        return MaskBatch(self.batch, *next(cut), *next(cut), self.whole, self.bucket)

    def padded(self, bucket: int) -> MaskBatch:
        """Packed ids padded with 0 up to a multiple of `bucket`, 0: not at all; see above."""
        if not bucket or not self.packed:
            return self
        context, target = (
            np.pad(ids[:used], (0, round_up(used, bucket) - used))
            for ids, used in (
                (self.context_ids, int(self.context_lengths.sum())),
                (self.target_ids, int(self.target_lengths.sum())),
            )
        )
        return replace(self, context_ids=context, target_ids=target, bucket=bucket)

    def _of(self, images: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and lengths of the rows of these images, mask after mask."""
        rows = (np.arange(0, len(lengths), self.batch)[:, None] + images).ravel()
        own = lengths[rows]
        if not self.packed:
            return ids[rows], own
        return ids[rows_of(np.cumsum(lengths)[rows] - own, own)], own

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Masks:
        """Copy to `device`: ids and, when packed, the Packings that every layer and both passes share."""
        context_ids, target_ids = (
            torch.from_numpy(ids).to(device, non_blocking=non_blocking) for ids in (self.context_ids, self.target_ids)
        )
        shares = None
        if self.whole is not None:
            tokens = (_tokens(x, self.batch) for x in (self.context_lengths, self.target_lengths))
            shares = Shares.of(self.whole, self.batch, *tokens, device=device)
        if not self.packed:
            return Masks(self.batch, context_ids, target_ids, shares=shares)
        context, target = self.context_lengths.tolist(), self.target_lengths.tolist()
        given: Any = dict(bucket=self.bucket, device=device)
        rows = len(context_ids), len(target_ids)
        return Masks(
            self.batch,
            context_ids,
            target_ids,
            Packing.from_lengths(context, tokens=rows[0], **given),
            Packing.from_lengths(target, tokens=rows[1], **given),
            Pairs.from_lengths(context, target, context_tokens=rows[0], target_tokens=rows[1], **given),
            shares,
        )

    def pin_memory(self) -> MaskBatch:
        """The same in page-locked memory (what DataLoader(pin_memory=True) calls)."""
        arrays = self.context_ids, self.context_lengths, self.target_ids, self.target_lengths
        context_ids, context_lengths, target_ids, target_lengths = (
            torch.from_numpy(a).pin_memory().numpy() for a in arrays
        )
        pinned = context_ids, context_lengths, target_ids, target_lengths
        return MaskBatch(self.batch, *pinned, self.whole, self.bucket)


def _tokens(lengths: np.ndarray, batch: int) -> np.ndarray:
    """Of every mask, over all images: lengths [masks * B] -> [masks]."""
    return lengths.reshape(-1, batch).sum(1)
