"""The probe: finds separable features, is at chance on noise, intervals, and runs on an encoder."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from jepa_kernels import data, probe, video
from tests.videos import write

pytest.importorskip("sklearn")
PIL = pytest.importorskip("PIL.Image")


def labelled(rng, signal, n=200, classes=10):
    y = np.arange(n) % classes
    return signal * np.eye(16)[y] + rng.normal(size=(n, 16)), y


@pytest.mark.parametrize("kind", probe.PROBES)
@pytest.mark.parametrize("signal, least, most", [(8.0, 0.99, 1.0), (0.0, 0.0, 0.25)])
def test_separable_features_are_told_apart_and_noise_is_at_chance(kind, signal, least, most):
    rng = np.random.default_rng(0)
    accuracy = probe.correct(kind, *labelled(rng, signal), *labelled(rng, signal)).mean()
    assert least <= accuracy <= most


def test_bootstrap_interval_covers_the_mean_and_shrinks():
    rng = np.random.default_rng(0)
    values = (rng.random((5, 400)) < 0.7).astype(float)
    low, high = probe.bootstrap(values)
    assert low < values.mean() < high and high - low < 0.1
    assert probe.bootstrap(values) == (low, high)
    assert probe.bootstrap(np.ones((5, 10))) == (1.0, 1.0)
    wide = probe.bootstrap(values[:, :20])
    assert wide[1] - wide[0] > high - low


def test_the_interval_holds_95_percent():
    values = (np.arange(400) % 10 < 7).astype(float)[None]  # one seed: the mean of 400 independent crops
    low, high = probe.bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 400), rel=0.06)


def test_seeds_that_disagree_widen_the_interval():
    same, apart = np.full((5, 50), 0.5), np.repeat([[0.0], [0.25], [0.5], [0.75], [1.0]], 50, axis=1)
    assert probe.bootstrap(same) == (0.5, 0.5)
    low, high = probe.bootstrap(apart)
    assert low < 0.3 and high > 0.7


def drawn(monkeypatch, ask, **options):
    """What a probe would fit and score on: {question: {part: (inputs, labels)}}."""
    found = {}

    def compare(question, encoder, fresh, draw, classes, seeds):
        found[question] = {part: draw(part, 0) for part in ("train", "held_out")}

    with monkeypatch.context() as patched:
        patched.setattr(probe, "compare", compare)
        ask(None, None, **options)
    return found


def denormalized(pixels):
    shape = 3, *[1] * (pixels.dim() - 2)
    return pixels * torch.tensor(data.IMAGENET_STD).view(shape) + torch.tensor(data.IMAGENET_MEAN).view(shape)


def test_photo_crops_are_grey_and_balanced(monkeypatch):
    (parts,) = drawn(monkeypatch, probe.photos, size=16, per_photo=2).values()
    pixels, labels = parts["held_out"]
    grey = denormalized(pixels)
    assert pixels.shape == (40, 3, 16, 16)
    assert (grey[:, 0] - grey[:, 1]).abs().max() < 1e-5 and (grey[:, 0] - grey[:, 2]).abs().max() < 1e-5
    assert np.bincount(labels).tolist() == [2] * len(data.PHOTOS)


def test_a_probe_is_scored_on_halves_that_it_was_not_fitted_on(monkeypatch):
    shades = {"train": 50, "held_out": 200}
    monkeypatch.setattr(data, "load_half", lambda name, half: PIL.new("RGB", (32, 32), (shades[half],) * 3))
    (parts,) = drawn(monkeypatch, probe.photos, size=16, per_photo=1).values()
    for part, shade in shades.items():
        assert (denormalized(parts[part][0]) * 255 - shade).abs().max() < 1e-3


def ramps(folder, *starts):
    """A video for each start: frame t has brightness start + t everywhere."""
    for start in starts:
        frames = np.broadcast_to((start + np.arange(60, dtype=np.uint8))[:, None, None, None], (60, 32, 32, 3))
        yield write(folder / f"{start}.mp4", np.ascontiguousarray(frames))


def test_clips_are_grey_and_balanced_and_half_of_each_video_is_turned_round(monkeypatch, tmp_path):
    make = partial(video.VideoClips, 16, 4, videos=list(ramps(tmp_path, 0, 70, 140)))
    which, arrow = drawn(monkeypatch, probe.clips, make=make, per_video=4).values()
    for part in ("train", "held_out"):
        pixels, labels = which[part]
        assert pixels.shape == (12, 3, 4, 16, 16) and np.bincount(labels).tolist() == [4, 4, 4]
        grey = denormalized(pixels)
        assert (grey - grey[:, :1]).abs().max() < 1e-5
        pixels, backwards = arrow[part]
        brighter = (pixels[:, 0, -1].mean((1, 2)) > pixels[:, 0, 0].mean((1, 2))).numpy()
        assert (brighter == ~backwards).all()
        assert [backwards[n::3].tolist() for n in range(3)] == [[False, True, False, True]] * 3
    for asked in (which, arrow):  # frames grow brighter: those that are held out come last
        seen, held_out = (asked[part][0][:, 0].mean((1, 2, 3)).view(4, 3) for part in ("train", "held_out"))
        assert (seen.amax(0) < held_out.amin(0)).all()


def test_one_video_is_asked_for_its_direction_alone(monkeypatch, tmp_path):
    make = partial(video.VideoClips, 16, 4, videos=list(ramps(tmp_path, 0)))
    assert list(drawn(monkeypatch, probe.clips, make=make)) == ["Is a held-out grey clip played forwards or backwards?"]


class Patches(nn.Module):
    """An encoder of patches of 8 pixels, each to 8 numbers."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 8, stride=8)

    def forward(self, pixels):
        return self.proj(pixels).flatten(2).mT


class Brightness(Patches):
    """An encoder of clips, to one token: which quarter of the range their brightness lies in, and what it grows by."""

    def forward(self, pixels):
        grey = denormalized(pixels)[:, 0].mean((2, 3))
        quarter = (grey.mean(1) * 255 / 65).long().clamp(0, 3)
        return torch.cat([nn.functional.one_hot(quarter, 4), (grey[:, -1:] - grey[:, :1])], 1)[:, None]


class Frames(Patches):
    """An encoder of clips that does not know one frame from another."""

    def forward(self, pixels):
        return super().forward(pixels.mean(2))


def test_photos_compares_trained_random_and_pixels():
    before = torch.get_rng_state()
    (scores,) = probe.photos(Patches(), Patches, 32, seeds=2, per_photo=3)
    state = torch.get_rng_state()
    for kind in probe.PROBES:
        for name in probe.FEATURES:
            low, high = scores[kind][name]["ci95"]
            assert 0 <= low <= scores[kind][name]["mean"] <= high <= 1
        gap = scores[kind]["trained"]["mean"] - scores[kind]["random_init"]["mean"]
        assert scores[kind]["trained_minus_random_init"]["mean"] == pytest.approx(gap)
    assert scores["chance"] == 1 / len(data.PHOTOS) and scores["per_seed"] == 3 * len(data.PHOTOS)
    torch.set_rng_state(before)
    (again,) = probe.photos(Patches(), Patches, 32, seeds=2, per_photo=3)
    assert again == scores
    assert torch.equal(torch.get_rng_state(), state)  # fresh encoders draw from a generator of their own


def test_brightness_tells_the_video_and_its_growth_the_arrow_of_time(tmp_path):
    make = partial(video.VideoClips, 16, 4, videos=list(ramps(tmp_path, 0, 65, 130, 195)))
    which, arrow = probe.clips(Brightness(), Frames, make, seeds=2, per_video=20)
    assert which["knn"]["trained"]["mean"] == 1.0 == arrow["linear"]["trained"]["mean"]
    assert 0.3 < arrow["linear"]["random_init"]["mean"] < 0.7
    assert which["chance"] == 0.25 and arrow["chance"] == 0.5 and which["per_seed"] == arrow["per_seed"] == 80
