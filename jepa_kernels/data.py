"""Random resized crops of the photos that ship inside scikit-image and scikit-learn. Nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from jepa_kernels._core.check import fail
from jepa_kernels.nn.patch_embed import IMAGENET_MEAN, IMAGENET_STD

# The second view of the stereo pair is left out: it shows the held-out half of the first.
PHOTOS = {
    "astronaut": "skimage/data/astronaut.png",
    "brick": "skimage/data/brick.png",
    "camera": "skimage/data/camera.png",
    "cell": "skimage/data/cell.png",
    "chelsea": "skimage/data/chelsea.png",
    "china": "sklearn/datasets/images/china.jpg",
    "clock": "skimage/data/clock_motion.png",
    "coffee": "skimage/data/coffee.png",
    "coins": "skimage/data/coins.png",
    "flower": "sklearn/datasets/images/flower.jpg",
    "grass": "skimage/data/grass.png",
    "gravel": "skimage/data/gravel.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "immunohistochemistry": "skimage/data/ihc.png",
    "moon": "skimage/data/moon.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "page": "skimage/data/page.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "text": "skimage/data/text.png",
}
LARGEST_HALF = 512  # pixels on the longer side; larger halves are shrunk once, so that crops resize quickly
HALVES = ("train", "held_out")
BLUR = (0.1, 2.0)  # least and most standard deviation, in pixels, as published


def extra(module: str, of: str = "train") -> ModuleType:
    """Import a module of an extra of this package, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if (error.name or "").split(".")[0] != package:
            raise
        text = f"{of}: {package} must be installed, got no such module; pip install 'jepa_kernels[{of}]'"
        raise ModuleNotFoundError(text, name=error.name) from None


def need(*modules: str, of: str = "train") -> None:
    """Say how to install the first of these packages that is not there; none is imported, which takes seconds."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            extra(module, of)


def halves(photo: Any) -> tuple[Any, Any]:
    """Cut a PIL image across its longer side into two parts that share no pixel."""
    width, height = photo.size
    if width >= height:
        return photo.crop((0, 0, width // 2, height)), photo.crop((width // 2, 0, width, height))
    return photo.crop((0, 0, width, height // 2)), photo.crop((0, height // 2, width, height))


def bundled(file: str, of: str = "train") -> Path:
    """Where `file` of an installed package, package/folders/name, lies; the package, of extra `of`, is not imported."""
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        extra(package, of)
    return Path(spec.origin).parent / rest  # type: ignore[union-attr, arg-type]


@lru_cache
def load_photo(name: str) -> Any:
    """The whole photo as a PIL image, RGB."""
    if name not in PHOTOS:
        fail("data", "photo", f"be one of {', '.join(PHOTOS)}", repr(name), "check the spelling")
    return extra("PIL.Image").open(bundled(PHOTOS[name])).convert("RGB")


@lru_cache
def load_half(name: str, half: str) -> Any:
    """One half of a photo, a PIL image. It is cut before it is shrunk: no pixel mixes the two."""
    part = halves(load_photo(name))[HALVES.index(half)]
    part.thumbnail((LARGEST_HALF, LARGEST_HALF))
    return part


class PhotoCrops(Dataset[tuple[Tensor, int]]):
    """Random resized crops of one half of every photo: `crops[i]` -> (pixels uint8 [3, size, size], photo).

    Item i is crop i % len of epoch i // len, so that a loader runs on over epochs by counting on. It depends on
    (seed, epoch, i % len) alone: not on workers, order or any global random state. Photos take turns.

    size: pixels per side. half: "train" or "held_out"; they share no pixel of any photo.
    scale: (least, most) share of the half's area, in 0..1. ratio: (least, most) width / height, log-uniform.
    flip: mirror every second crop, at random. grey: share of crops shown in grey, in 0..1.
    length: crops per epoch.

    Source: the random resized crop of Szegedy et al. (arXiv:1409.4842), as I-JEPA (arXiv:2301.08243) uses it.
    """

    def __init__(
        self,
        size: int,
        *,
        half: str = "train",
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        grey: float = 0.0,
        length: int = 10_000,
        seed: int = 0,
        names: Sequence[str] = tuple(PHOTOS),
    ) -> None:
        check_part("PhotoCrops", "half", half, HALVES)
        check_crops("PhotoCrops", size, scale, ratio, grey, length)
        self.size, self.half, self.scale, self.ratio = size, half, (scale[0], scale[1]), (ratio[0], ratio[1])
        self.flip, self.grey, self.length, self.seed, self.names = flip, grey, length, seed, tuple(names)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        epoch, i = divmod(index, self.length)
        rng = np.random.default_rng([self.seed, HALVES.index(self.half), epoch, i])
        label = i % len(self.names)
        photo = load_half(self.names[label], self.half)
        pixels = random_crop(rng, photo, self.size, self.scale, self.ratio, grey=self.grey, flip=self.flip)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), label


def random_crop(
    rng: np.random.Generator,
    picture: Any,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    *,
    jitter: float = 0.0,
    hue: float = 0.0,
    grey: float,
    blur: float = 0.0,
    solarize: float = 0.0,
    flip: bool,
) -> np.ndarray:
    """uint8 [size, size, 3] of a PIL image; see PhotoCrops, and views.Views for what it does to colors."""
    image, box = extra("PIL.Image"), random_box(rng, picture.size, scale, ratio)
    crop = picture.resize((size, size), image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    if jitter and rng.random() < 0.8:
        enhance = extra("PIL.ImageEnhance")
        for change in (enhance.Brightness, enhance.Contrast, enhance.Color):
            crop = change(crop).enhance(rng.uniform(1 - jitter, 1 + jitter))
        crop = _turned(crop, rng.uniform(-hue, hue)) if hue else crop
    if rng.random() < grey:
        crop = crop.convert("L").convert("RGB")
    if blur and rng.random() < blur:
        crop = crop.filter(extra("PIL.ImageFilter").GaussianBlur(rng.uniform(*BLUR)))
    if solarize and rng.random() < solarize:
        crop = extra("PIL.ImageOps").solarize(crop)
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if flip and rng.random() < 0.5 else pixels


def _turned(picture: Any, share: float) -> Any:
    """Every hue, a place on a circle, moved on by a share of it."""
    colors = np.array(picture.convert("HSV"))
    colors[..., 0] += np.uint8(round(256 * share) % 256)  # modulo 256
    return extra("PIL.Image").frombytes("HSV", picture.size, colors.tobytes()).convert("RGB")


def random_box(
    rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop inside an image of `size` (width, height)."""
    area = size[0] * size[1] * rng.uniform(scale[0], scale[1])
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    width = min(size[0], max(1, round(math.sqrt(area * aspect))))
    height = min(size[1], max(1, round(math.sqrt(area / aspect))))
    left, top = int(rng.integers(size[0] - width + 1)), int(rng.integers(size[1] - height + 1))
    return left, top, left + width, top + height


def check_part(name: str, argument: str, part: str, parts: Sequence[str]) -> None:
    if part not in parts:
        fail(name, argument, f"be one of {', '.join(parts)}", repr(part), "check the spelling")


def check_crops(
    name: str,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    grey: float,
    length: int,
    called: str = "scale",
) -> None:
    """The arguments that crops of photos and of clips share; `called`: what the caller names `scale`."""
    if size < 1 or length < 1:
        fail(name, "size and length", "be at least 1", (size, length), "pass pixels and crops per epoch")
    if not 0 < scale[0] <= scale[1] <= 1:
        fail(name, called, "satisfy 0 < least <= most <= 1", scale, "pass shares of the area")
    if not 0 < ratio[0] <= ratio[1]:
        fail(name, "ratio", "satisfy 0 < least <= most", ratio, "pass width / height")
    if not 0 <= grey <= 1:
        fail(name, "grey", "lie in [0, 1]", grey, "pass the share of grey crops")


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] or [B, 3, T, H, W] -> float32, with ImageNet's mean and standard deviation taken out."""
    shape = 3, *[1] * (pixels.dim() - 2)
    mean, std = (v.view(shape) for v in _imagenet(pixels.device))
    return (pixels / 255 - mean) / std


@lru_cache
def _imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation: copied once, since a GPU is waited for at each copy."""
    return torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)


def photo_batch(batch: int, size: int, seed: int = 0, **options: Any) -> Tensor:
    """`batch` normalised crops, float32 [B, 3, size, size]. `options` are those of PhotoCrops."""
    crops = PhotoCrops(size, seed=seed, **options)
    return normalize(torch.stack([crops[i][0] for i in range(batch)]))
