"""Training runs of V-JEPA 2: the command end to end, exact resume, videos and checkpoints that are off."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from jepa_kernels import train
from tests import runs
from tests.test_train import TINY as TINY_PHOTOS
from tests.test_train import same
from tests.videos import stripes

TINY = {
    "architecture": "vjepa2",
    "model": {
        "crop_size": 32,
        "num_frames": 4,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 1,
        "num_heads": 2,
        "predictor_embed_dim": 48,
        "predictor_depth": 1,
        "predictor_num_heads": 2,
    },
    "data": {"batch_size": 2, "frame_step": 2, "grey": 0.5},
    "optimization": {"steps": 4},
    "probe": {"seeds": 2, "per_video": 4},
}
fit, rows = runs.fit, partial(runs.rows, counted="clips")


pytestmark = pytest.mark.usefixtures("one_thread")  # runs on photos have as many as the machine


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return stripes(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def config(tmp_path, videos):
    """The path of a config that trains in a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "data": {**TINY["data"], "videos": videos}}))
    return path


def test_the_command_trains_on_videos_plots_and_asks_both_questions(config, tmp_path, capsys):
    words = [str(config), "--out", str(tmp_path / "run"), "--steps", "3", "--set", "data.num_workers=1"]
    assert train.main(words) == 0
    files = ["checkpoints", "metrics.jsonl", "model.safetensors", "probe.json", "run.html"]
    assert runs.left(tmp_path / "run") == files
    result = json.loads((tmp_path / "run/probe.json").read_text())
    which, arrow = result["probes"]
    assert which["question"] == "Which of the 2 videos is a held-out grey clip from?" and which["per_seed"] == 8
    assert arrow["question"] == "Is a held-out grey clip played forwards or backwards?" and arrow["chance"] == 0.5
    said = " ".join(capsys.readouterr().out.split())
    assert "3 steps" in said and "played forwards or backwards?" in said and "trained minus random init" in said


def test_the_log_holds_loss_collapse_and_the_published_schedules(config, tmp_path):
    fit(config, tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for row in found[1:]:
        assert (row["lr"], row["weight_decay"], row["momentum"]) == pytest.approx((5.25e-4, 0.04, 0.99925))
    assert all(0 < row["std"] < 1.5 and 1 <= row["rank"] <= 48 for row in found)


def test_the_loss_falls(config, tmp_path):
    changes = ["optimization.lr=3e-3", "optimization.warmup=0.1", "data.batch_size=4"]
    words = [word for change in changes for word in ("--set", change)]
    fit(config, tmp_path / "run", "--steps", "40", *words)
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize(
    "changes",
    [
        ["data.num_workers=1"],
        ["mask.truncate=true"],
        ["model.rope=interleaved", "model.modality_embedding=true"],
        ["optimization.use_bfloat16=true"],
        ["model.depth=4", "model.levels=2", "model.image_tokenizer=true"],
        ["model.tubelet_size=1", "model.num_frames=1", "model.image_tokenizer=true", "model.modality_embedding=true"],
    ],
)
def test_a_resumed_run_is_the_whole_run_bit_for_bit(config, tmp_path, changes):
    words = [word for change in changes for word in ("--set", change)]
    whole = fit(config, tmp_path / "whole", *words)
    fit(config, tmp_path / "halves", *words, stop=2)
    torch.manual_seed(999)  # a new process starts from another global state
    resumed = fit(config, tmp_path / "halves", *words, "--resume")
    assert resumed.step == whole.step == 4
    assert same(resumed.state(), whole.state())
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


def test_both_published_kinds_of_masks_are_packed_in_one_batch(config):
    [(_, masks)] = next(iter(train.batches(train.read(str(config)))))
    assert masks.packed and len(masks.context_lengths) == len(masks.target_lengths) == 2 * masks.batch
    short, long = masks.target_lengths.reshape(2, 2)
    assert (masks.context_lengths + masks.target_lengths == 2 * 4 * 4).all() and short.mean() < long.mean() + 8


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_without_a_video_that_does_not_decode(config, tmp_path, videos, workers):
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(Path(videos[0]).read_bytes()[:3000])
    words = ["--set", f"data.videos=[{torn}, {', '.join(videos)}]", "--set", f"data.num_workers={workers}"]
    with pytest.warns(UserWarning, match=f"VideoClips skips a video, 1 so far: load_video: {torn} must be a video "):
        trainer = fit(config, tmp_path / "run", *words)
        assert [asked["chance"] for asked in train.evaluate(trainer)["probes"]] == [0.5, 0.5]
    assert trainer.step == 4


@pytest.mark.filterwarnings("ignore:VideoClips skips")
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["data.videos=[bike]"],
            "VideoClips: videos must be files or one of bigbuckbunny, bikes, carphone_dis",
        ),
        (["data.videos=[README.md]"], "VideoClips: videos must hold one that decodes, got ['README.md']; pass other "),
        (["data.videos=3"], "train: data.videos must be a list of names, got 3; correct the config"),
        (["data.videos=[3]"], "train: data.videos must be a list of names, got [3]; correct the config"),
        (["data.frame_step=5"], "VideoClips: num_frames x frame_step must span at most the 12 frames of the held_out "),
        (["data.frame_step=0"], "VideoClips: num_frames and frame_step must be at least 1, got (4, 0); "),
        (["model.num_frames=5"], "VJEPA2: num_frames must be a multiple of tubelet_size 2, got 5; cut the clip to one"),
        (["model.num_frames=0"], "train: model.num_frames must be at least 1, got 0; correct the config"),
        (["model.size=vit_small"], "train: model.size must be one of vit_large, vit_huge, "),
        (["mask.long_spatial_scale=[1, 1]"], "MultiBlock3d: spatial_scale must leave patches beside a block, got "),
        (["probe.per_photo=3"], "train: config must use known keys (seeds, per_video), got 'probe.per_photo'; did "),
        (["probe.per_video=0"], "train: probe.per_video must be at least 1, got 0; correct the config"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_written(config, tmp_path, capsys, changes, message):
    words = [word for change in changes for word in ("--set", change)]
    assert train.main([str(config), "--out", str(tmp_path / "run"), *words]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused(config, tmp_path, capsys):
    photos, out = tmp_path / "photos.yaml", tmp_path / "run"
    photos.write_text(yaml.safe_dump(TINY_PHOTOS))
    for first, other, found in (
        (photos, config, "architecture = ijepa in the checkpoint, vjepa2 now"),
        (config, photos, "architecture = vjepa2 in the checkpoint, ijepa now"),
    ):
        fit(first, out / first.stem, stop=1)
        assert train.main([str(other), "--out", str(out / first.stem), "--resume"]) == 2
        assert capsys.readouterr().err == (
            f"train: checkpoint {runs.newest(out / first.stem)} must be of this config, got {found}; "
            "pass the run's options, or another --out\n"
        )


def test_a_missing_decoder_is_named_before_the_first_step(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(train.sys.modules, "av", None)
    assert train.main([str(config), "--out", str(tmp_path / "run")]) == 2
    message = "train: av must be installed, got no such module; pip install 'jepa_kernels[train]'\n"
    assert capsys.readouterr().err == message and not (tmp_path / "run").exists()
