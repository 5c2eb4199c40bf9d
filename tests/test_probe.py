"""The probe: finds separable features, is at chance on noise, intervals, and runs on an encoder."""

import numpy as np
import pytest
import torch
from torch import nn

from jepa_kernels import data, probe

pytest.importorskip("sklearn")


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


def test_seeds_that_disagree_widen_the_interval():
    same, apart = np.full((5, 50), 0.5), np.repeat([[0.0], [0.25], [0.5], [0.75], [1.0]], 50, axis=1)
    assert probe.bootstrap(same) == (0.5, 0.5)
    low, high = probe.bootstrap(apart)
    assert low < 0.3 and high > 0.7


def test_crops_are_grey_and_balanced():
    pixels, labels = probe.crops(16, "held_out", 0, 2)
    grey = pixels * torch.tensor(data.IMAGENET_STD).view(3, 1, 1) + torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1)
    assert (grey[:, 0] - grey[:, 1]).abs().max() < 1e-5 and (grey[:, 0] - grey[:, 2]).abs().max() < 1e-5
    assert np.bincount(labels).tolist() == [2] * len(data.PHOTOS)


def test_run_compares_trained_random_and_pixels():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(3, 8, 8, stride=8)

        def forward(self, pixels):
            return self.proj(pixels).flatten(2).mT

    before = torch.get_rng_state()
    scores = probe.run(Patches(), Patches, 32, seeds=2, per_photo=3)
    state = torch.get_rng_state()
    for kind in probe.PROBES:
        for name in probe.FEATURES:
            low, high = scores[kind][name]["ci95"]
            assert 0 <= low <= scores[kind][name]["mean"] <= high <= 1
        gap = scores[kind]["trained"]["mean"] - scores[kind]["random_init"]["mean"]
        assert scores[kind]["trained_minus_random_init"]["mean"] == pytest.approx(gap)
    assert scores["chance"] == 1 / len(data.PHOTOS) and scores["crops_per_seed"] == 3 * len(data.PHOTOS)
    torch.set_rng_state(before)
    again = probe.run(Patches(), Patches, 32, seeds=2, per_photo=3)
    assert again == scores
    assert torch.equal(torch.get_rng_state(), state)  # fresh encoders draw from a generator of their own
