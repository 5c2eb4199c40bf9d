"""Probes: what frozen features of held-out photos, digits and clips tell, against random initialisation and raw pixels.

A classifier is fitted on one part of every photo or video, or on some digits, and scored on another. Pictures are grey,
since colour alone may identify a photo.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from jepa_kernels.data import PHOTOS, PhotoCrops, extra, normalize
from jepa_kernels.images import Folder, labelled
from jepa_kernels.video import VideoClips
from jepa_kernels.views import load_digits

CHUNK = 100  # images or clips per forward
PIXEL_SIDE = 16  # raw pixels are averaged to this side: fewer inputs classify better than all of them
CLIP_GRID = (4, 8, 8)  # and clips to this: as many

PROBES = ("knn", "linear")
DIGIT_PROBES = (*PROBES, "centroid")
FEATURES = ("trained", "random_init", "raw_pixels")
Fresh = Callable[[], nn.Module]
Draw = Callable[[str, int], tuple[Tensor, np.ndarray]]
Prepare = Callable[[Tensor], Tensor]


@torch.no_grad()
def encode(encoder: nn.Module, pixels: Tensor) -> np.ndarray:
    """Mean latent of every image [n, 3, H, W] or clip [n, 3, T, H, W] -> [n, E]."""
    device = next(encoder.parameters()).device
    chunks = [encoder(chunk.to(device)).float().mean(1).cpu() for chunk in pixels.split(CHUNK)]
    return torch.cat(chunks).numpy()


def raw_pixels(pixels: Tensor) -> np.ndarray:
    """The grey picture itself, averaged to PIXEL_SIDE x PIXEL_SIDE, or CLIP_GRID."""
    grey = pixels[:, :1]
    if pixels.dim() == 5:
        return nn.functional.adaptive_avg_pool3d(grey, CLIP_GRID).flatten(1).numpy()
    return nn.functional.adaptive_avg_pool2d(grey, PIXEL_SIDE).flatten(1).numpy()


def correct(probe: str, x: np.ndarray, y: np.ndarray, held_out_x: np.ndarray, held_out_y: np.ndarray) -> np.ndarray:
    """Fit a probe on (x, y): bool per held-out row, True where it is right.

    probe: of standardised features "knn", a vote of the 5 nearest by cosine, or "linear", least squares with an L2
    penalty; of features as they are "centroid", the class whose mean is nearest.
    """
    extra("sklearn")
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if probe == "centroid":
        classes = np.unique(y)
        means = np.stack([x[y == c].mean(0) for c in classes])
        return KNeighborsClassifier(1).fit(means, classes).predict(held_out_x) == held_out_y
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


def compare(
    question: str,
    encoder: nn.Module,
    fresh: Fresh,
    draw: Draw,
    classes: int,
    *,
    seeds: int,
    probes: tuple[str, ...] = PROBES,
) -> dict[str, Any]:
    """Accuracy on held-out inputs of trained features, of random initialisation and of raw pixels.

    encoder: the trained encoder, inputs -> [n, N, E]. fresh: makes one at random initialisation, a new one for every
    seed. draw: (part, seed) -> (inputs, labels), part "train" or "held_out". Returns {probe: {features: {mean, ci95}}},
    with `trained_minus_random_init` paired input by input; intervals: bootstrap, 95 %, over seeds and inputs.
    """
    hits: dict[str, dict[str, list[np.ndarray]]] = {p: {f: [] for f in FEATURES} for p in probes}
    for seed in range(seeds):
        (x, y), (held_x, held_y) = (draw(part, seed) for part in ("train", "held_out"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random = fresh()
        views: list[Callable[[Tensor], np.ndarray]] = [partial(encode, encoder), partial(encode, random), raw_pixels]
        for name, features in zip(FEATURES, views, strict=True):
            seen, held_out = features(x), features(held_x)
            for p in probes:
                hits[p][name].append(correct(p, seen, y, held_out, held_y))
    scores: dict[str, Any] = {p: _scores({f: np.stack(rows) for f, rows in hits[p].items()}) for p in probes}
    return {"question": question, "chance": 1 / classes, "seeds": seeds, "per_seed": len(held_y), **scores}


def _scores(hits: dict[str, np.ndarray]) -> dict[str, Any]:
    values = {name: rows.astype(float) for name, rows in hits.items()}
    values["trained_minus_random_init"] = values["trained"] - values["random_init"]
    return {name: mean_of(v) for name, v in values.items()}


def mean_of(values: np.ndarray) -> dict[str, Any]:
    """{mean, ci95}, as `report.show` takes them, of values [seeds, items]; see `bootstrap`."""
    return {"mean": float(values.mean()), "ci95": list(bootstrap(values))}


def draw_all(inputs: Dataset[tuple[Tensor, int]], prepare: Prepare = normalize) -> tuple[Tensor, np.ndarray]:
    """Every item of one epoch, as the encoder takes it, and the labels."""
    pixels, labels = zip(*(inputs[i] for i in range(len(inputs))), strict=True)  # type: ignore[arg-type]
    return prepare(torch.stack(pixels)), np.array(labels)


def photos(
    encoder: nn.Module, fresh: Fresh, size: int, *, seeds: int = 5, per_photo: int = 20, prepare: Prepare = normalize
) -> list[dict[str, Any]]:
    """Which photo does a crop come from? Learnt on one half of every photo, scored on the other.

    encoder, fresh: see `compare`. size: pixels per side. per_photo: grey crops of each half of each photo.
    prepare: uint8 pixels -> what the encoder takes.
    """

    def crops(half: str, seed: int) -> tuple[Tensor, np.ndarray]:
        length = per_photo * len(PHOTOS)
        return draw_all(PhotoCrops(size, half=half, grey=1.0, scale=(0.1, 0.5), length=length, seed=seed), prepare)

    question = f"Which of the {len(PHOTOS)} photos is a held-out grey crop from?"
    return [compare(question, encoder, fresh, crops, len(PHOTOS), seeds=seeds)]


def images(
    encoder: nn.Module,
    fresh: Fresh,
    seen: Folder,
    held_out: Folder,
    size: int,
    *,
    seeds: int = 5,
    per_class: int = 20,
    prepare: Prepare = normalize,
) -> list[dict[str, Any]]:
    """Which class, or subfolder, is an image of? Learnt on images that training saw, scored on those it did not.

    encoder, fresh: see `compare`. per_class: central crops of each part, in color; of raw pixels the first channel.
    """

    def draw(part: str, seed: int) -> tuple[Tensor, np.ndarray]:
        pixels, labels = labelled(seen if part == "train" else held_out, size, per_class, seed)
        return prepare(pixels), labels

    question = f"Which of the {len(seen.classes)} classes is a held-out image of?"
    return [compare(question, encoder, fresh, draw, len(seen.classes), seeds=seeds)]


def digits(encoder: nn.Module, fresh: Fresh, size: int, *, seeds: int = 5) -> list[dict[str, Any]]:
    """Which digit is it? Learnt on the 4000 of MNIST's to train on, scored on the 1000 that are held out.

    encoder, fresh: see `compare`; pixels are floating in 0..1. size: pixels per side. Each seed is asked about its own
    share of the held-out digits.
    """

    def draw(part: str, seed: int) -> tuple[Tensor, np.ndarray]:
        pixels, labels = load_digits(part)
        own = slice(None) if part == "train" else slice(seed, None, seeds)
        grey = torch.from_numpy(pixels[own, None]) / 255
        if size != grey.shape[-1]:
            grey = nn.functional.interpolate(grey, (size, size), mode="bilinear", antialias=True)
        return grey.expand(-1, 3, -1, -1), labels[own]

    asked = "Which of the 10 digits does a held-out picture show?"
    return [compare(asked, encoder, fresh, draw, 10, seeds=seeds, probes=DIGIT_PROBES)]


def clips(
    encoder: nn.Module, fresh: Fresh, make: Callable[..., VideoClips], *, seeds: int = 5, per_video: int = 50
) -> list[dict[str, Any]]:
    """Which video does a clip come from? Is it played forwards? Learnt on one span of every video, scored on another.

    encoder, fresh: see `compare`. make: VideoClips of a size and number of frames. per_video: grey clips of each span
    of each video; to ask for the arrow of time every other one is turned round, and none is mirrored.
    """
    videos = len(make().videos)

    def which(span: str, seed: int) -> tuple[Tensor, np.ndarray]:
        return draw_all(make(span=span, grey=1.0, length=per_video * videos, seed=seed))

    def arrow(span: str, seed: int) -> tuple[Tensor, np.ndarray]:
        length = per_video * videos
        pixels, _ = draw_all(make(span=span, grey=1.0, flip=False, length=length, seed=seed))
        backwards = np.arange(length) // videos % 2 == 1
        pixels[backwards] = pixels[backwards].flip(2)
        return pixels, backwards

    asked = [(f"Which of the {videos} videos is a held-out grey clip from?", which, videos)] if videos > 1 else []
    asked += [("Is a held-out grey clip played forwards or backwards?", arrow, 2)]
    return [compare(question, encoder, fresh, draw, classes, seeds=seeds) for question, draw, classes in asked]
