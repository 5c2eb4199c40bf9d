"""Your own images: a folder of them, of any depth, whose subfolders may be classes. Nothing is downloaded."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from jepa_kernels._core.check import fail
from jepa_kernels.data import HALVES, check_crops, check_part, extra, random_crop

SUFFIXES = ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"
WHOLE = 256 / 224  # the shorter side over that of a central crop, as evaluations on ImageNet have it


class Folder:
    """The images of a folder, in one order: shuffled anew in every epoch, by (seed + epoch), as published samplers do.

    root: searched to any depth for files with SUFFIXES. Where all of them lie in its subfolders, and in 2 at least,
        these are their classes.
    part: "held_out": the last `share` of each class's images, by name; "train": the others.
    .classes: names, or none. .labels: int64, of each image; -1 without classes.

    An image that PIL does not decode is named in a warning, and the next one of the epoch takes its place.
    Raises ValueError for a folder without images.
    """

    def __init__(self, root: str, part: str = "train", share: float = 0.0) -> None:
        check_part("data", "part", part, HALVES)
        if not 0 <= share < 1:
            fail("data", "held_out", "lie in [0, 1)", share, "pass the share of images that the probe is asked about")
        paths, labels, self.classes = _found(os.path.abspath(os.path.expanduser(root)))
        held = _held_out(labels, share) if self.classes else np.zeros(len(paths), bool)
        own = held if part == "held_out" else ~held
        self.paths, self.labels = paths[own], labels[own]

    def __len__(self) -> int:
        return len(self.paths)

    def pick(self, seed: int, index: int) -> tuple[Any, int]:
        """Image index % len of epoch index // len, RGB by PIL, and its label."""
        epoch, i = divmod(index, len(self))
        order = shuffled(len(self), seed + epoch)
        for n in range(len(self)):
            at = int(order[(i + n) % len(self)])
            image = self.load(at)
            if image is not None:
                return image, int(self.labels[at])
        fail("data", "root", "hold an image that decodes", f"{len(self)} that do not", "encode them again")

    def load(self, at: int) -> Any:
        """The image as RGB; None, and a warning that names it, for one that does not decode."""
        path = os.fsdecode(bytes(self.paths[at]))
        try:
            with extra("PIL.Image").open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # decoders meet foreign bytes with errors of nearly every type
            warnings.warn(f"data: leaves out {path}: {error or type(error).__name__}", stacklevel=2)
            return None


class ImageCrops(Dataset[tuple[Tensor, int]]):
    """Random resized crops of a folder's images: `crops[i]` -> (pixels uint8 [3, size, size], label).

    Item i depends on (seed, i) and the files alone. Options as of `data.PhotoCrops`.
    """

    def __init__(
        self,
        folder: Folder,
        size: int,
        *,
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = False,
        grey: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_crops("ImageCrops", size, scale, ratio, grey, len(folder))
        self.folder, self.size, self.scale, self.ratio = folder, size, scale, ratio
        self.flip, self.grey, self.seed = flip, grey, seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.folder.pick(self.seed, index)
        rng = np.random.default_rng([self.seed, index])
        pixels = random_crop(rng, image, self.size, self.scale, self.ratio, grey=self.grey, flip=self.flip)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), label


def labelled(folder: Folder, size: int, per_class: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Central crops, uint8 [n, 3, size, size], of at most `per_class` images of each class; labels [n]."""
    rng = np.random.default_rng([seed, 0])
    chosen = [rng.permutation(np.flatnonzero(folder.labels == c))[:per_class] for c in range(len(folder.classes))]
    kept = [(image, at) for at in np.concatenate(chosen).tolist() if (image := folder.load(at)) is not None]
    if not kept:
        count = sum(map(len, chosen))
        fail("data", "root", "hold an image that decodes", f"{count} chosen that do not", "encode them again")
    pixels = np.stack([np.asarray(_central(image, size)) for image, _ in kept])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), folder.labels[[at for _, at in kept]]


def _central(image: Any, size: int) -> Any:
    side = min(image.size) / WHOLE
    left, top = ((length - side) / 2 for length in image.size)
    box = left, top, left + side, top + side
    return image.resize((size, size), extra("PIL.Image").Resampling.BILINEAR, box=box, reducing_gap=2.0)


@lru_cache(maxsize=4)
def _found(root: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Paths as bytes, sorted, their labels, the classes: a million of them are a few arrays, which workers share."""
    if not os.path.isdir(root):
        fail("data", "root", "be a folder of images", repr(root), "pass the folder that they lie under")
    paths = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES)
    )
    if not paths:
        fail("data", "root", f"hold files with {', '.join(SUFFIXES)}", f"none under {root}", "pass another folder")
    parts = [os.path.relpath(path, root).split(os.sep) for path in paths]
    classes = tuple(sorted({part[0] for part in parts}))
    if len(classes) < 2 or any(len(part) < 2 for part in parts):
        classes = ()
    places = {name: n for n, name in enumerate(classes)}
    labels = [places[part[0]] if classes else -1 for part in parts]
    return np.array([os.fsencode(path) for path in paths]), np.array(labels, np.int64), classes


def _held_out(labels: np.ndarray, share: float) -> np.ndarray:
    """bool, of each image: the last `share` of its class; one at least that stays."""
    held = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        own = np.flatnonzero(labels == c)
        kept = max(1, len(own) - round(share * len(own)))
        held[own[kept:]] = True
    return held


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int) -> np.ndarray:
    """As torch.utils.data.DistributedSampler shuffles an epoch of its seed + epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
