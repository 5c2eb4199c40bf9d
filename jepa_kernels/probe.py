"""Probe: from frozen features of a held-out grey crop, tell which photo it comes from.

A classifier is fitted on crops of one half of every photo and scored on crops of the other half. Crops are
grey, since colour alone may identify a photo.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jepa_kernels.data import PHOTOS, PhotoCrops, extra, normalize

CHUNK = 100  # images per forward
PIXEL_SIDE = 16  # raw pixels are averaged to this side: fewer inputs classify better than all of them

PROBES = ("knn", "linear")
FEATURES = ("trained", "random_init", "raw_pixels")


@torch.no_grad()
def encode(encoder: nn.Module, pixels: Tensor) -> np.ndarray:
    """Mean latent of every image: pixels [n, 3, H, W] -> [n, E]."""
    device = next(encoder.parameters()).device
    chunks = [encoder(chunk.to(device)).float().mean(1).cpu() for chunk in pixels.split(CHUNK)]
    return torch.cat(chunks).numpy()


def raw_pixels(pixels: Tensor) -> np.ndarray:
    """The grey image itself, averaged to PIXEL_SIDE x PIXEL_SIDE."""
    return nn.functional.adaptive_avg_pool2d(pixels[:, :1], PIXEL_SIDE).flatten(1).numpy()


def correct(probe: str, x: np.ndarray, y: np.ndarray, held_out_x: np.ndarray, held_out_y: np.ndarray) -> np.ndarray:
    """Fit a probe of standardised features on (x, y): bool per held-out row, True where it is right.

    probe: "knn", a vote of the 5 nearest by cosine, or "linear", least squares with an L2 penalty.
    """
    extra("sklearn")
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifiers = {"knn": KNeighborsClassifier(5, metric="cosine"), "linear": RidgeClassifier(alpha=10.0)}
    classifier = make_pipeline(StandardScaler(), classifiers[probe])
    return classifier.fit(x, y).predict(held_out_x) == held_out_y


def bootstrap(values: np.ndarray, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values [seeds, crops]: seeds are drawn with replacement, then crops in each."""
    rng = np.random.default_rng(seed)
    seeds, crops = values.shape
    rows = rng.integers(seeds, size=(draws, seeds, 1))
    columns = rng.integers(crops, size=(draws, seeds, crops))
    low, high = np.quantile(values[rows, columns].mean((1, 2)), [0.025, 0.975])
    return float(low), float(high)


def crops(size: int, half: str, seed: int, per_photo: int) -> tuple[Tensor, np.ndarray]:
    """`per_photo` grey, normalised crops of one half of every photo, and the photos' numbers."""
    count = per_photo * len(PHOTOS)
    dataset = PhotoCrops(size, half=half, grey=1.0, scale=(0.1, 0.5), length=count, seed=seed)
    pixels, labels = zip(*(dataset[i] for i in range(count)), strict=True)
    return normalize(torch.stack(pixels)), np.array(labels)


def run(
    encoder: nn.Module, fresh: Callable[[], nn.Module], size: int, *, seeds: int = 5, per_photo: int = 20
) -> dict[str, Any]:
    """Accuracy on held-out crops of trained features, of random initialisation and of raw pixels.

    encoder: the trained encoder, pixels [n, 3, size, size] -> [n, N, E]. fresh: makes one at random
    initialisation, a new one for every seed of crops. Returns {probe: {features: {mean, ci95}}}, with
    `trained_minus_random_init` paired crop by crop; intervals: bootstrap, 95 %, over seeds and crops.
    """
    hits: dict[str, dict[str, list[np.ndarray]]] = {p: {f: [] for f in FEATURES} for p in PROBES}
    for seed in range(seeds):
        (x, y), (held_x, held_y) = (crops(size, half, seed, per_photo) for half in ("train", "held_out"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random = fresh()
        views: list[Callable[[Tensor], np.ndarray]] = [partial(encode, encoder), partial(encode, random), raw_pixels]
        for name, features in zip(FEATURES, views, strict=True):
            seen, held_out = features(x), features(held_x)
            for p in PROBES:
                hits[p][name].append(correct(p, seen, y, held_out, held_y))
    scores: dict[str, Any] = {p: _scores({f: np.stack(rows) for f, rows in hits[p].items()}) for p in PROBES}
    return {**scores, "chance": 1 / len(PHOTOS), "photos": len(PHOTOS), "seeds": seeds, "crops_per_seed": len(y)}


def _scores(hits: dict[str, np.ndarray]) -> dict[str, Any]:
    values = {name: rows.astype(float) for name, rows in hits.items()}
    values["trained_minus_random_init"] = values["trained"] - values["random_init"]
    return {name: {"mean": float(v.mean()), "ci95": list(bootstrap(v))} for name, v in values.items()}
