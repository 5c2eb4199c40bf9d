"""Rotary positions that the layers of a foreign model share, in the precision that the model itself has."""

from __future__ import annotations

import torch
from torch import Tensor

from jepa_kernels._core.select import FLOATS
from jepa_kernels.rotary import Rope, patch_positions, published_frequencies


class Ropes:
    """The `Rope` of a forward, made by the first layer that asks. Copies and pickles start empty.

    angle_dtype: of the products of positions and frequencies; None: as the published expression rounds them for
        queries of that type, under that autocast.
    """

    def __init__(self, angle_dtype: torch.dtype | None) -> None:
        self.angle_dtype = angle_dtype
        self._last: tuple[tuple[object, ...], Tensor | None, Rope] | None = None

    def __reduce__(self) -> tuple[type[Ropes], tuple[torch.dtype | None]]:
        return Ropes, (self.angle_dtype,)

    def of(self, qkv: Tensor, mask: Tensor | None, grid: tuple[int, int], pairing: str) -> Rope:
        """For qkv [B, N, 3, H, D] of the patches `mask` [B, N]; None: of the first N patches of the grid.

        grid: (Gh, Gw) of a frame.
        """
        if not self._keeps(qkv, mask):
            return self._made(qkv, mask, grid, pairing)
        version = None if mask is None else mask._version  # a mask may have been filled anew
        autocast = torch.is_autocast_enabled(qkv.device.type)
        key = (version, qkv.shape[1], qkv.shape[-1], qkv.dtype, qkv.device, autocast, grid, pairing)
        last = self._last  # another thread may put its own there meanwhile
        if last is None or last[0] != key or last[1] is not mask:
            last = self._last = key, mask, self._made(qkv, mask, grid, pairing)
        return last[2]

    @staticmethod
    def _keeps(qkv: Tensor, mask: Tensor | None) -> bool:
        """Compiled code makes equal tables once by itself; the memory of a CUDA graph is its own; a mask made in
        inference mode has no version."""
        if torch.compiler.is_compiling() or (qkv.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        return mask is None or not mask.is_inference()

    def _made(self, qkv: Tensor, mask: Tensor | None, grid: tuple[int, int], pairing: str) -> Rope:
        ids = torch.arange(qkv.shape[1], device=qkv.device) if mask is None else mask
        return published_rope(ids, grid, qkv.shape[-1] // 3 // 2, pairing, qkv.dtype, self.angle_dtype)


def published_rope(
    ids: Tensor, grid: tuple[int, int], pairs: int, pairing: str, dtype: torch.dtype, angle_dtype: torch.dtype | None
) -> Rope:
    """How queries and keys of type `dtype`, of patches `ids`, turn `pairs` pairs of channels an axis, as published.

    Frequencies are computed in the type of the queries, and angles in the type of these, but for an angle_dtype given.
    """
    positions = patch_positions(ids.long(), (1, *grid))
    if angle_dtype is not None:
        return Rope(positions, pairing=pairing, angle_dtype=angle_dtype)
    frequencies = published_frequencies(pairs, dtype, ids.device)
    rounded = frequencies.dtype if frequencies.dtype in FLOATS else torch.float32
    return Rope(positions, pairing=pairing, frequencies=frequencies.float(), angle_dtype=rounded)
