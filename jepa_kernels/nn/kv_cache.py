"""Keys and values of the frames so far, of every layer: in memory that is allocated once, or with their gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import jepa_kernels as jk


class KVCache:
    """Keys, turned by their positions, and values of sequences that grow by whole frames; grown in place.

    [L, 2, S, M, H, D] for L layers and S sequences of at most M tokens: 2 L S M H D numbers, and never more. For
    inference: what is written is not recorded for a gradient.
    """

    def __init__(self, layers: int, sequences: int, tokens: int, heads: int, width: int, like: Tensor) -> None:
        self._kept = like.new_empty(layers, 2, sequences, tokens, heads, width)

    def attend(self, layer: int, begin: int, q: Tensor, k: Tensor, v: Tensor, frame_size: int | None = None) -> Tensor:
        """Of q [S, H, n, D] to all tokens up to its own, which stand at `begin` on and whose k and v are kept.

        frame_size: as of `masked_attention`.
        """
        return jk.masked_attention(q, *self.extend(layer, begin, k, v), frame_size=frame_size)

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
    """The same with a gradient: the tensors themselves are kept, each once, and joined for every attention.

    What is joined is not kept for backward, which joins and attends again: memory is linear in the frames.
    """

    def __init__(self, layers: int) -> None:
        self._kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(layers)]

    def attend(self, layer: int, begin: int, q: Tensor, k: Tensor, v: Tensor, frame_size: int | None = None) -> Tensor:
        """As of `KVCache`; begin: how many tokens were given so far."""
        self.extend(layer, begin, k, v)
        parts = [x for pair in self._kept[layer] for x in pair]
        return checkpoint(_attend_joined, q, frame_size, *parts, use_reentrant=False, preserve_rng_state=False)

    def extend(self, layer: int, begin: int, k: Tensor, v: Tensor) -> None:
        """Keep k and v of further tokens."""
        self._kept[layer].append((k, v.clone()))  # a view would keep the whole product that v is a third of

    def share(self, tokens: int) -> None:
        """Nothing: what is of one sequence is joined for as many as attend."""


def _attend_joined(q: Tensor, frame_size: int | None, *parts: Tensor) -> Tensor:
    """parts: k, v, k, v, ..., of one sequence or of as many as q."""
    keys, values = (torch.cat([x.expand(len(q), -1, -1, -1) for x in parts[i::2]], 2) for i in (0, 1))
    return jk.masked_attention(q, keys, values, frame_size=frame_size)
