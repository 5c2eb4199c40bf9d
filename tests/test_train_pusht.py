"""Training runs of LeWorldModel on PushT: the command end to end, exact resume, what the probes measure."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import yaml

from jepa_kernels import configs, train
from jepa_kernels.models.lewm import LeWorldModel
from jepa_kernels.plan import SHIPPED
from jepa_kernels.pusht.episodes import collect
from jepa_kernels.pusht.probes import explained, one_step, told
from jepa_kernels.pusht.simulator import FRAME_SKIP
from tests import runs
from tests.models.weights import same as same_weights
from tests.test_train import same

TINY = {
    "architecture": "lewm",
    "model": {
        "size": "pusht",
        "crop_size": 16,
        "embed_dim": 32,
        "depth": 1,
        "projector_hidden": 32,
        "predictor_depth": 1,
        "predictor_hidden": 32,
        "dropout": 0.1,
        "rollout_steps": 2,
        "inverse_weight": 0.5,
    },
    "data": {"batch_size": 4, "episodes": 3, "steps": 6},
    "optimization": {"steps": 4},
    "probe": {"fitted_on": 3, "held_out": 2},
}


pytestmark = pytest.mark.usefixtures("one_thread")
fit, rows = runs.fit, partial(runs.rows, counted="windows")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of collected episodes."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(tmp_path, cache, monkeypatch):
    """The path of a config that trains in a second."""
    pytest.importorskip("gym_pusht", reason="the simulator, extra plan, is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def test_the_command_trains_saves_weights_and_probes(config, tmp_path, capsys):
    assert train.main([str(config), "--out", str(tmp_path / "run"), "--steps", "2"]) == 0
    files = ["checkpoints", "metrics.jsonl", "model.safetensors", "probe.json", "run.html"]
    assert runs.left(tmp_path / "run") == files
    assert set(rows(tmp_path / "run")[0]) == runs.LOGGED  # no momentum
    model, _ = LeWorldModel.from_checkpoint(tmp_path / "run/model.safetensors")
    trained = runs.weights(runs.newest(tmp_path / "run"))
    assert model.config.embed_dim == 32 and same_weights(model.state_dict(), trained)
    state, ahead = json.loads((tmp_path / "run/probe.json").read_text())["probes"]
    assert set(state["block angle"]) == {"trained", "random_init", "raw_pixels"}
    assert ahead["prediction"]["trained"]["mean"] > 0 and "One step ahead" in capsys.readouterr().out


def test_a_resumed_run_is_the_whole_run_bit_for_bit(config, tmp_path):
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "halves", stop=2)
    torch.manual_seed(999)  # a new process starts from another global state; dropout draws from it
    resumed = fit(config, tmp_path / "halves", "--resume", "--set", "data.num_workers=1")
    assert resumed.step == whole.step == 4 and whole.model.sigreg.global_step == 4
    assert same(resumed.state(), whole.state())
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


def test_windows_reach_as_far_as_rollouts(config):
    [(frames, actions)] = next(iter(train.batches(configs.read(str(config)))))
    assert frames.shape == (4, 5, 3, 16, 16) and actions.shape == (4, 4, 2)  # history 3, and two steps beyond


def test_a_run_of_before_goes_on_with_the_defaults_of_what_came_later(config, tmp_path):
    plain = ("--set", "model.rollout_steps=1", "--set", "model.inverse_weight=0")
    fit(config, tmp_path, *plain, stop=1)
    path = runs.newest(tmp_path) / "state.json"
    about = json.loads(path.read_text())
    for key in ("rollout_steps", "inverse_weight", "inverse_hidden"):
        del about["config"]["model"][key]
    path.write_text(json.dumps(about))
    assert fit(config, tmp_path, *plain, "--resume", stop=2).step == 2
    with pytest.raises(ValueError, match=r"model.inverse_weight = 0.0 in the checkpoint, 0.5 now"):
        fit(config, tmp_path, "--set", "model.rollout_steps=1", "--resume")


def test_configs_that_are_off(config):
    for change, message in (
        ("model.action_dim=3", r"model.action_dim must be 2, got 3"),
        ("mask.min_keep=3", r"must use known keys"),
        ("optimization.ema=[0.9, 1.0]", r"must use known keys .*got 'optimization.ema'"),
        ("data.grey=1.0", r"must use known keys .*got 'data.grey'"),
    ):
        with pytest.raises(ValueError, match=message):
            train.batches(configs.read(str(config), [change]))


def test_what_is_linear_in_the_state_is_explained_whole_and_noise_not_at_all():
    rng = np.random.default_rng(0)
    states = rng.uniform(0, 512, (600, 10))
    mixed = told(states) / [512, 512, 512, 512, 1, 1] @ rng.standard_normal((6, 6))
    seen = np.c_[mixed, rng.standard_normal((600, 4))]
    scores = explained(seen[:400], states[:400], seen[400:], states[400:])
    assert scores.shape == (200, 3) and (scores.mean(0) > 0.99).all()
    noise = explained(rng.standard_normal((400, 4)), states[:400], rng.standard_normal((200, 4)), states[400:])
    assert (abs(noise.mean(0)) < 0.1).all()


def test_the_shipped_model_foresees_held_out_frames(config):
    """On an episode that no training saw: its error is below that of taking the last latent for the next."""
    assert SHIPPED.stat().st_size < 5e6
    world, report = LeWorldModel.from_checkpoint(SHIPPED)
    episode = collect("held_out", 7, steps=24, size=world.config.crop_size, frame_skip=FRAME_SKIP, seed=0)
    latents = world.encode(torch.from_numpy(episode.frames))
    assert one_step(world, latents[None], torch.from_numpy(episode.actions)[None]) < 0.9 and not report.missing
