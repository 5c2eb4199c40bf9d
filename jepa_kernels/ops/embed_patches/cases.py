"""Inputs that the conformance suite, the command line and the benchmarks share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jepa_kernels._core.case import Case
from jepa_kernels.packing import Packing

Make = Callable[[torch.Generator], dict[str, Any]]
MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)  # ImageNet's, and a fourth channel


@dataclass(frozen=True)
class Images:
    """`batch` images of grid (Gh, Gw) or clips of grid (Gt, Gh, Gw), and the layer that embeds them.

    With a tubelet the weight is one for clips; images are then shown as `tubelet` equal frames.
    """

    batch: int
    channels: int
    grid: tuple[int, ...]
    patch: int
    embed_dim: int
    bias: bool = True
    pos: bool = True
    tubelet: int = 0
    uint8: bool = False
    normalise: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.grid)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the weight: (P, P) or (Pt, P, P)."""
        return (*(self.tubelet,) * bool(self.tubelet), self.patch, self.patch)

    def draw(self, generator: torch.Generator) -> dict[str, Any]:
        """Pixels of unit variance, or bytes; weights of the convolution's initial size."""

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        sides = [g * size for g, size in zip(self.grid, self.kernel[-len(self.grid) :], strict=True)]
        shape, kernel = (self.batch, self.channels, *sides), (self.channels, *self.kernel)
        drawn = dict(
            pixels=torch.randint(256, shape, generator=generator, dtype=torch.uint8) if self.uint8 else randn(*shape),
            weight=randn(self.embed_dim, *kernel) / math.prod(kernel) ** 0.5,
            bias=randn(self.embed_dim) if self.bias else None,
            pos_embed=randn(self.count, self.embed_dim) if self.pos else None,
        )
        if self.uint8 or self.normalise:
            drawn |= dict(mean=MEAN[: self.channels], std=STD[: self.channels])
        return drawn


def _ids(generator: torch.Generator, count: int, kept: int) -> torch.Tensor:
    return torch.randperm(count, generator=generator)[:kept].sort().values


def packed(images: Images, lengths: Sequence[int], rows: int = 0) -> Make:
    """`lengths` of masks * batch sequences; `rows` > their sum leaves unused rows at the end."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        ids, packing = Packing.from_ids([_ids(generator, images.count, n) for n in lengths])
        if rows:
            packing = packing.padded(rows, len(lengths), packing.max_seqlen)
            ids = torch.cat([ids, torch.full((rows - len(ids),), 2**40)])  # must never be read
        return dict(**images.draw(generator), ids=ids, packing=packing)

    return make


def rectangular(images: Images, masks: int, kept: int) -> Make:
    """masks * batch rows of `kept` ids."""

    def make(generator: torch.Generator) -> dict[str, Any]:
        ids = [_ids(generator, images.count, kept) for _ in range(masks * images.batch)]
        rows = torch.stack(ids) if ids else torch.zeros(0, kept, dtype=torch.int64)
        return dict(**images.draw(generator), ids=rows)

    return make


def whole(images: Images) -> Make:
    """Every patch of every image."""
    return lambda generator: dict(**images.draw(generator), ids=None)


def dynamic(generator: torch.Generator, size: int) -> dict[str, Any]:
    images = Images(2, 3, (4, 4 + size), patch=4, embed_dim=20)
    return packed(images, [3 + size, 5, 9 + size, 1])(generator)


EVERY, LAYER = ("pixels", "weight", "bias", "pos_embed"), ("weight", "bias", "pos_embed")
DIFFERENTIABLE = (0, 2, 3, 4)
AUTOCAST = EVERY
SMALL = Images(2, 3, (4, 4), patch=4, embed_dim=20)
CLIPS = Images(2, 3, (3, 2, 4), 4, 20, tubelet=2, normalise=True)
CASES = (
    Case("packed_two_masks", packed(SMALL, [3, 5, 9, 1]), EVERY, gradcheck=True),
    Case("rectangular_four_masks_p14", rectangular(Images(3, 3, (5, 6), 14, 72), 4, 7), EVERY),
    Case("packed_p16", packed(Images(2, 3, (6, 6), 16, 130), [20, 11, 3, 36]), EVERY),
    Case("every_patch", whole(Images(2, 3, (3, 5), 14, 48)), EVERY),
    Case("one_channel_odd_sizes", rectangular(Images(2, 1, (7, 3), 5, 33), 3, 4), EVERY),
    Case("one_pixel_patches", rectangular(Images(2, 1, (3, 3), 1, 1), 1, 2), EVERY),
    Case("no_bias", packed(Images(1, 3, (4, 4), 8, 40, bias=False), [6, 2]), ("pixels", "weight", "pos_embed")),
    Case("no_positions", whole(Images(2, 3, (2, 2), 8, 40, pos=False)), ("pixels", "weight", "bias")),
    Case("frozen_pixels", packed(SMALL, [4, 4]), LAYER),
    Case("empty_sequences", packed(SMALL, [0, 3, 0, 0]), EVERY),
    Case("empty_batch", rectangular(Images(0, 3, (2, 4), 4, 16), 2, 3), EVERY),
    Case("unused_rows", packed(SMALL, [2, 3], rows=9), EVERY),
    Case("clips_normalised", packed(CLIPS, [7, 24, 3, 11], rows=50), EVERY),
    Case("tiny_clips", packed(Images(1, 2, (2, 1, 2), 1, 3, tubelet=2, normalise=True), [2, 3]), EVERY, gradcheck=True),
    Case("tiny_duplicated", packed(Images(2, 1, (2, 2), 2, 3, tubelet=2), [2, 1]), EVERY, gradcheck=True),
    Case("clips_two_masks_p16", rectangular(Images(2, 3, (2, 4, 3), 16, 96, tubelet=2), 2, 9), EVERY),
    Case("clips_of_three_frames", whole(Images(2, 1, (2, 2, 3), 3, 33, tubelet=3)), EVERY),
    Case("clips_uint8", packed(Images(2, 3, (2, 2, 3), 8, 40, tubelet=2, uint8=True), [5, 12]), LAYER),
    Case("duplicated_frames", packed(Images(2, 3, (3, 4), 14, 40, tubelet=2), [5, 9]), EVERY),
    Case("duplicated_uint8", rectangular(Images(2, 3, (3, 3), 4, 24, tubelet=3, uint8=True), 2, 5), LAYER),
    Case("uint8_p14", rectangular(Images(2, 3, (4, 3), 14, 72, uint8=True), 2, 6), LAYER),
    Case("uint8_four_channels", whole(Images(2, 4, (2, 3), 5, 17, uint8=True)), LAYER),
    Case("floats_normalised", packed(Images(2, 3, (4, 4), 7, 40, normalise=True), [5, 9]), EVERY),
    Case("empty_clips", rectangular(Images(0, 3, (2, 2, 4), 4, 16, tubelet=2, uint8=True), 2, 3), LAYER),
)
