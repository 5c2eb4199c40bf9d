"""Crops of the bundled photos: seeded, the same in workers, halves that share no pixel, errors."""

import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from jepa_kernels import data

PIL = pytest.importorskip("PIL.Image")


def test_every_photo_is_bundled_and_gives_two_halves():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    for name in data.PHOTOS:
        width, height = data.load_photo(name).size
        parts = data.halves(data.load_photo(name))
        assert parts[0].width * parts[0].height + parts[1].width * parts[1].height == width * height
        assert min(min(p.size) for p in parts) >= 96


@pytest.mark.parametrize("size", [(7, 4), (4, 7), (6, 6), (1200, 300)])
@pytest.mark.parametrize("half, value", [("train", 50), ("held_out", 200)])
def test_held_out_pixels_are_never_in_a_train_crop(monkeypatch, size, half, value):
    width, height = size
    array = np.full((height, width, 3), 200, dtype=np.uint8)
    if width >= height:
        array[:, : width // 2] = 50
    else:
        array[: height // 2] = 50
    monkeypatch.setattr(data, "load_photo", lambda name: PIL.fromarray(array))
    monkeypatch.setattr(data, "load_half", data.load_half.__wrapped__)
    crops = data.PhotoCrops(16, half=half, names=("astronaut",))
    assert all((crops[i][0] == value).all() for i in range(50))


def test_crops_depend_on_seed_epoch_and_index_alone():
    crops = data.PhotoCrops(24, length=40, seed=3)
    again = data.PhotoCrops(24, length=40, seed=3)
    backwards = [again[i] for i in reversed(range(45))][::-1]
    assert all(torch.equal(crops[i][0], backwards[i][0]) and crops[i][1] == backwards[i][1] for i in range(45))
    other = data.PhotoCrops(24, length=40, seed=4)
    assert not torch.equal(crops[0][0], other[0][0])
    assert not torch.equal(crops[0][0], crops[40][0])  # the next epoch's first
    assert not torch.equal(crops[0][0], data.PhotoCrops(24, length=40, seed=3, half="held_out")[0][0])


def test_photos_take_turns_in_every_epoch():
    crops = data.PhotoCrops(8, length=40)
    labels = [crops[i][1] for i in range(80)]
    assert labels == list(range(20)) * 4


def test_workers_give_the_same_crops():
    crops = data.PhotoCrops(16, length=30, seed=1)
    batches = [list(DataLoader(crops, batch_size=6, num_workers=workers)) for workers in (0, 2)]
    for (a, i), (b, j) in zip(*batches, strict=True):
        assert torch.equal(a, b) and torch.equal(i, j)


def test_boxes_keep_to_scale_and_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array([data.random_box(rng, (300, 300), (0.2, 0.4), (0.5, 2.0)) for _ in range(500)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = width * height / 300**2
    assert boxes.min() >= 0 and boxes.max() <= 300
    assert 0.19 < share.min() < 0.22 and 0.38 < share.max() < 0.41
    assert 0.49 < (width / height).min() < 0.55 and 1.8 < (width / height).max() < 2.05


def test_grey_and_flip():
    colour = data.PhotoCrops(16, flip=False, seed=2)
    grey = data.PhotoCrops(16, flip=False, seed=2, grey=1.0)
    flipped = data.PhotoCrops(16, flip=True, seed=2)
    assert all((grey[i][0][0] == grey[i][0][1]).all() for i in range(20))
    assert any((colour[i][0][0] != colour[i][0][1]).any() for i in range(20))
    mirrored = [torch.equal(flipped[i][0], colour[i][0].flip(-1)) for i in range(20)]
    kept = [torch.equal(flipped[i][0], colour[i][0]) for i in range(20)]
    assert any(mirrored) and any(kept) and all(m or k for m, k in zip(mirrored, kept, strict=True))


def test_photo_batch_is_normalised():
    batch = data.photo_batch(20, 32, seed=0)
    assert batch.shape == (20, 3, 32, 32) and batch.dtype == torch.float32
    assert -0.8 < batch.mean() < 0.8 and 0.5 < batch.std() < 1.5
    white = data.normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    expected = [(1 - m) / s for m, s in zip(data.IMAGENET_MEAN, data.IMAGENET_STD, strict=True)]
    assert white.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"half": "test"}, "PhotoCrops: half must be one of train, held_out, got 'test'; check the spelling"),
        ({"scale": (0.0, 1.0)}, "PhotoCrops: scale must satisfy 0 < least <= most <= 1, got (0.0, 1.0)"),
        ({"ratio": (2.0, 1.0)}, "PhotoCrops: ratio must satisfy 0 < least <= most, got (2.0, 1.0)"),
        ({"grey": 2.0}, "PhotoCrops: grey must lie in [0, 1], got 2.0"),
        ({"length": 0}, "PhotoCrops: size and length must be at least 1, got (8, 0)"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError) as error:
        data.PhotoCrops(8, **options)
    assert str(error.value).startswith(message)


def test_an_unknown_photo_lists_the_shipped_ones():
    with pytest.raises(ValueError, match=r"photo must be one of astronaut, .*, got 'cat'"):
        data.load_photo("cat")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ModuleNotFoundError, match=r"PIL must be installed.*pip install 'jepa_kernels\[train\]'"):
        data.extra("PIL.Image")
    with pytest.raises(ModuleNotFoundError, match="nosuchmodule must be installed"):
        data.extra("nosuchmodule")
