"""Keys and values of the frames so far, of every layer: in memory that is allocated once, or with their gradient."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys, turned by their positions, and values of sequences that grow by whole frames; grown in place.

    [L, 2, S, M, H, D] for L layers and S sequences of at most M tokens: 2 L S M H D numbers, and never more. For
    inference: what is written is not recorded for a gradient.
    """

    def __init__(self, layers: int, sequences: int, tokens: int, heads: int, width: int, like: Tensor) -> None:
        self._kept = like.new_empty(layers, 2, sequences, tokens, heads, width)

    def extend(self, layer: int, begin: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [S, H, n, D], of the tokens from place `begin` on; all keys and values up to them."""
        end, rows = begin + k.shape[2], k.shape[0]
        keys, values = self._kept[layer, :, :rows, :end].transpose(2, 3).unbind(0)
        keys[:, :, begin:].copy_(k)
        values[:, :, begin:].copy_(v)
        return keys, values

    def share(self, tokens: int) -> None:
        """Give all sequences the first one's keys and values of the first tokens."""
        kept = self._kept[:, :, :, :tokens]
        kept[:, :, 1:].copy_(kept[:, :, :1].expand_as(kept[:, :, 1:]))


class KVHistory:
    """The same with a gradient: the tensors themselves are kept, and joined at every call."""

    def __init__(self, layers: int) -> None:
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def extend(self, layer: int, begin: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As of `KVCache`; begin: how many tokens were given so far."""
        before = self._kept[layer]
        if before is not None:
            pairs = zip(before, (k, v), strict=True)
            k, v = (torch.cat([old.expand(len(new), -1, -1, -1), new], 2) for old, new in pairs)
        self._kept[layer] = k, v
        return k, v
