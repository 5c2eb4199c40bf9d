"""The published mask collators, stated anew from their description: images one by one, blocks as small torch tensors.

Numbers come from a `Draws`, so that the same statement says what a collator gives from torch's generators and from any
other. Rows are lists, a row an int64 tensor.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Rows = list[Tensor]
Range = tuple[float, float]


class Draws(Protocol):
    """A stream of random numbers."""

    def uniform(self) -> float: ...

    def below(self, count: int) -> int: ...


class TorchDraws:
    """torch.rand and torch.randint, from a generator or from the global one."""

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator

    def uniform(self) -> float:
        return torch.rand(1, generator=self.generator).item()

    def below(self, count: int) -> int:
        return int(torch.randint(0, count, (1,), generator=self.generator))


class PhiloxDraws:
    """Philox4x32-10 (Salmon et al., SC 2011), and unbiased numbers from its words: our own stream of a batch."""

    def __init__(self, seed: int, step: int, stream: int = 0):
        self.key, self.counter = seed, step << 64 | stream << 32
        self.words: list[int] = []

    def block(self) -> list[int]:
        c, key = [self.counter >> 32 * i & 0xFFFFFFFF for i in range(4)], self.key
        for _ in range(10):
            a, b, k0, k1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2], key & 0xFFFFFFFF, key >> 32
            c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
            key = (k1 + 0xBB67AE85) % 2**32 << 32 | (k0 + 0x9E3779B9) % 2**32
        self.counter += 1
        return c

    def word(self) -> int:
        self.words = self.words or self.block()
        return self.words.pop(0)

    def uniform(self) -> float:
        return self.word() / 2**32

    def below(self, count: int) -> int:
        while (word := self.word()) < 2**32 % count:
            pass
        return word % count


def seeded(step: int) -> TorchDraws:
    """Of a batch's block sizes."""
    return TorchDraws(torch.Generator().manual_seed(step))


def between(bounds: Range, u: float) -> float:
    return bounds[0] + u * (bounds[1] - bounds[0])


def sides(patches: int, aspect: float, most: tuple[int, int]) -> tuple[int, int]:
    height, width = round(math.sqrt(patches * aspect)), round(math.sqrt(patches / aspect))
    return max(1, min(height, most[0])), max(1, min(width, most[1]))


def cut(rows: Rows, most: int | None = None) -> Rows:
    """Every row as short as the shortest, and no longer than `most`."""
    shortest = min(len(row) for row in rows)
    return [row[: shortest if most is None else min(shortest, most)] for row in rows]


def others(rows: Rows, count: int) -> Rows:
    return [torch.tensor(sorted(set(range(count)) - set(row.tolist())), dtype=torch.int64) for row in rows]


@dataclass(frozen=True)
class Collator2d:
    """I-JEPA's. `edge` is 0 as published: the last row and column are never drawn; 1 draws them too."""

    grid: tuple[int, int]
    target_scale: Range = (0.15, 0.2)
    target_aspect_ratio: Range = (0.75, 1.5)
    context_scale: Range = (0.85, 1.0)
    context_aspect: float = 1.0
    num_targets: int = 4
    min_keep: int = 10
    edge: int = 0
    truncate: bool = True

    def size(self, u: float, scale: Range, aspect: Range) -> tuple[int, int]:
        patches = int(self.grid[0] * self.grid[1] * between(scale, u))
        return sides(patches, between(aspect, u), (self.grid[0] - 1, self.grid[1] - 1))

    def block(self, size: tuple[int, int], places: Draws) -> Tensor:
        top = places.below(self.grid[0] - size[0] + self.edge)
        left = places.below(self.grid[1] - size[1] + self.edge)
        block = torch.zeros(self.grid, dtype=torch.int32)
        block[top : top + size[0], left : left + size[1]] = 1
        return block

    def context(self, size: tuple[int, int], free: list[Tensor], places: Draws) -> Tensor:
        tries = 0
        while True:
            block = self.block(size, places)
            for region in free[: max(len(free) - tries // 20, 0)]:
                block *= region
            kept = torch.nonzero(block.flatten()).flatten()
            if len(kept) > self.min_keep:
                return kept
            tries += 1

    def __call__(self, batch: int, sizes: Draws, places: Draws) -> tuple[Rows, Rows]:
        """Contexts [B] and targets [masks * B], mask-major."""
        target = self.size(sizes.uniform(), self.target_scale, self.target_aspect_ratio)
        context = self.size(sizes.uniform(), self.context_scale, (self.context_aspect, self.context_aspect))
        contexts: Rows = []
        targets: list[Rows] = [[] for _ in range(self.num_targets)]
        for _ in range(batch):
            blocks = [self.block(target, places) for _ in range(self.num_targets)]
            for rows, block in zip(targets, blocks, strict=True):
                rows.append(torch.nonzero(block.flatten()).flatten())
            contexts.append(self.context(context, [1 - block for block in blocks], places))
        return cut(contexts) if self.truncate else contexts, [row for rows in targets for row in rows]


@dataclass(frozen=True)
class Collator3d:
    """V-JEPA's and V-JEPA 2's, of one kind of mask."""

    grid: tuple[int, int, int]
    num_blocks: int = 8
    spatial_scale: Range = (0.15, 0.15)
    temporal_scale: Range = (1.0, 1.0)
    aspect_ratio: Range = (0.75, 1.5)
    max_context_frames_ratio: float = 1.0
    max_keep: int | None = None
    full_complement: bool = False
    pred_full_complement: bool = False
    inv_block: bool = False
    truncate: bool = True

    def size(self, sizes: Draws) -> tuple[int, int, int]:
        frames, height, width = self.grid
        span = max(1, int(frames * between(self.temporal_scale, sizes.uniform())))
        patches = int(height * width * between(self.spatial_scale, sizes.uniform()))
        return (span, *sides(patches, between(self.aspect_ratio, sizes.uniform()), (height, width)))

    def outside(self, size: tuple[int, int, int], places: Draws) -> Tensor:
        """1 outside a block, in the frames that a context may have."""
        frames, height, width = self.grid
        top, left = places.below(height - size[1] + 1), places.below(width - size[2] + 1)
        start = places.below(frames - size[0] + 1)
        mask = torch.ones(self.grid, dtype=torch.int32)
        mask[start : start + size[0], top : top + size[1], left : left + size[2]] = 0
        mask[max(1, int(frames * self.max_context_frames_ratio)) :] = 0
        return mask

    def clip(self, size: tuple[int, int, int], places: Draws) -> tuple[Tensor, Tensor]:
        while True:
            mask = torch.ones(self.grid, dtype=torch.int32)
            for _ in range(self.num_blocks):
                mask *= self.outside(size, places)
            flat = mask.flatten()
            if flat.any():
                return torch.nonzero(flat).flatten(), torch.nonzero(flat == 0).flatten()

    def thinned(self, rows: Iterable[Tensor], places: Draws) -> Rows:
        """At most `max_keep` of each row: id after id is kept with the share of places that is still to be filled."""
        found = []
        for row in rows:
            kept: list[int] = []
            for seen, i in enumerate(row.tolist()):
                wanted, left = min(self.max_keep or len(row), len(row)) - len(kept), len(row) - seen
                if wanted == left or (wanted and places.below(left) < wanted):
                    kept.append(i)
            found.append(torch.tensor(kept))
        return found

    def __call__(self, batch: int, sizes: Draws, places: Draws) -> tuple[Rows, Rows]:
        """Contexts [B] and targets [B]."""
        size = self.size(sizes)
        contexts, targets = map(list, zip(*(self.clip(size, places) for _ in range(batch)), strict=True))
        if self.truncate:
            contexts, targets = cut(contexts, self.max_keep), cut(targets)
        else:
            contexts = self.thinned(contexts, places)
        if self.full_complement:
            targets = others(contexts, math.prod(self.grid))
        elif self.pred_full_complement:
            contexts = others(targets, math.prod(self.grid))
        return (targets, contexts) if self.inv_block else (contexts, targets)
