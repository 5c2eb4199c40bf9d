"""Training runs: the command end to end, exact resume, what a full disk or a foreign checkpoint does, messages."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from jepa_kernels import configs, report, train
from jepa_kernels.models.ijepa import IJEPA
from jepa_kernels.recipes import RECIPES
from jepa_kernels.training import log as logs
from jepa_kernels.training import saves
from jepa_kernels.training.feed import Feed
from jepa_kernels.training.ranks import Ranks
from jepa_kernels.training.trainer import Trainer, latent_stats
from tests import runs

ROOT = Path(__file__).parents[1]
TINY = {
    "model": {
        "size": "vit_tiny",
        "crop_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "predictor_embed_dim": 16,
        "predictor_depth": 1,
    },
    "data": {"batch_size": 4, "grey": 0.5},
    "mask": {"min_keep": 2},
    "optimization": {"steps": 6},
    "probe": {"seeds": 2, "per_photo": 2},
}
rows = partial(runs.rows, counted="images")


@pytest.fixture
def config(tmp_path):
    """The path of a config that trains in a second."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def command(*arguments, **options):
    """The command line in a process of its own."""
    words = [sys.executable, "-m", "jepa_kernels", "train", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, **options)


def fit(path, out, *, stop=None, resume=False, changes=()):
    words = [str(path), "--out", str(out), *(["--resume"] if resume else [])]
    words += [word for change in changes for word in ("--set", change)]
    trainer, out = train.prepare(train._parser().parse_args(words))
    train.fit(trainer, out, stop=stop)
    return trainer


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_the_command_trains_plots_and_probes(config, tmp_path):
    done = command(config, "--out", tmp_path / "run", "--steps", 3, "--set", "data.num_workers=2")
    assert done.returncode == 0, done.stderr
    files = ["checkpoints", "metrics.jsonl", "model.safetensors", "probe.json", "run.html"]
    assert runs.left(tmp_path / "run") == files
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    page = (tmp_path / "run/run.html").read_text()
    assert "3 of 3" in page and "trained minus random init" in page, "steps and probes"
    result = json.loads((tmp_path / "run/probe.json").read_text())
    assert result["step"] == 3 and result["config"]["optimization"]["steps"] == 3
    (asked,) = result["probes"]
    assert result["config"]["architecture"] == "ijepa" and asked["question"].startswith("Which of the 20 photos is ")
    for probe in ("knn", "linear"):
        assert set(asked[probe]) == {"trained", "random_init", "raw_pixels", "trained_minus_random_init"}
    assert "3 steps" in done.stdout and "trained minus random init" in done.stdout


def test_the_loss_falls(config, tmp_path):
    fit(config, tmp_path / "run", changes=["optimization.steps=40", "data.batch_size=16", "optimization.lr=3e-3"])
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_the_log_holds_loss_collapse_and_schedules(config, tmp_path):
    trainer = fit(config, tmp_path / "run")
    found = rows(tmp_path / "run")
    assert set(found[0]) == runs.LOGGED | {"ema_distance", "momentum"}
    assert set(found[0]) - set(found[1]) == {"ema_distance"}, "not at every step"
    assert found[0]["lr"] == pytest.approx(1e-3) and found[0]["momentum"] == 0.996  # a warm-up of one step
    assert found[-1]["lr"] == pytest.approx(1e-6) and found[-1]["weight_decay"] == pytest.approx(0.4)
    assert all(0 < row["std"] < 1.5 and 1 <= row["rank"] <= 32 for row in found)
    decayed, exempt = trainer.optimizer.param_groups
    assert decayed["weight_decay"] == pytest.approx(0.4) and exempt["weight_decay"] == 0
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert all(p.dim() > 1 and not names[id(p)].endswith("bias") for p in decayed["params"])
    assert all(p.dim() == 1 for p in exempt["params"])
    assert "predictor.mask_token" in {names[id(p)] for p in decayed["params"]}
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(exempt["params"]) == len(trained)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_whole_run_bit_for_bit(config, tmp_path, workers):
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "halves", stop=3)
    torch.manual_seed(999)  # a new process starts from another global state
    resumed = fit(config, tmp_path / "halves", resume=True, changes=[f"data.num_workers={workers}"])
    assert resumed.step == whole.step == 6
    assert same(resumed.state(), whole.state())
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")


def test_a_bfloat16_run_resumes_bit_for_bit_and_reads_rounded_target_weights(config, tmp_path):
    changes = ["optimization.use_bfloat16=true"]
    whole = fit(config, tmp_path / "whole", changes=changes)
    fit(config, tmp_path / "halves", stop=3, changes=changes)
    resumed = fit(config, tmp_path / "halves", resume=True, changes=changes)
    assert same(resumed.state(), whole.state())
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole") != rows_of_fp32(config, tmp_path / "fp32")
    model = whole.model
    online, target = (network.blocks[0].attn.qkv.weight for network in (model.context_encoder, model.target_encoder))
    assert torch.equal(model.ema.shadow_copies()[online], target.bfloat16())
    own = [f"model.{name}" for name in IJEPA(whole.config.model).state_dict()]
    assert [name for name in whole.state() if name.startswith("model.")] == own


def rows_of_fp32(config, out):
    fit(config, out)
    return rows(out)


def test_steps_after_the_checkpoint_are_done_again_and_torn_rows_dropped(config, tmp_path):
    whole = fit(config, tmp_path / "whole")
    fit(config, tmp_path / "crashed", stop=2)
    fit(config, tmp_path / "crashed", stop=4, resume=True)
    shutil.rmtree(tmp_path / "crashed/checkpoints/step-00000004")
    with open(tmp_path / "crashed/metrics.jsonl", "a") as log:
        log.write('{"step": 5, "lo')
    resumed = fit(config, tmp_path / "crashed", resume=True)
    assert rows(tmp_path / "crashed") == rows(tmp_path / "whole")
    assert same(resumed.state(), whole.state())


def test_an_interrupted_run_saves_and_continues(config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        runs.signal_after(patched, 3, signal.SIGINT)
        assert train.main([str(config), "--out", str(tmp_path / "run")]) == report.INTERRUPTED
    out = tmp_path / "run"
    assert f"stopped at step 3; continue with the same command and --resume (out: {out})" in capsys.readouterr().out
    assert runs.left(out) == ["checkpoints", "metrics.jsonl", "run.html"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    whole = fit(config, tmp_path / "whole")
    assert same(fit(config, out, resume=True).state(), whole.state())


def test_a_log_without_room_ends_with_the_message():
    with open("/dev/full", "ab", buffering=0) as log, pytest.raises(report.SaveError) as error:
        logs._append(log, {"step": 1})
    assert str(error.value) == (
        "train: /dev/full must be writable (0.0 MB), got No space left on device; free space or pass another --out"
    )


def test_gradients_that_are_not_finite_end_the_run_and_keeps_the_checkpoint(config, tmp_path, capsys):
    out = tmp_path / "run"
    words = [str(config), "--out", str(out), "--set", "optimization.lr=1e30", "--set", "logging.checkpoint_every=1"]
    assert train.main(words) == 1
    assert "train: the norm of gradients must be finite, got nan at step " in capsys.readouterr().err
    assert saves.steps(out)[-1] == len(rows(out)) < 6
    assert all(x.isfinite().all() for x in runs.held(runs.newest(out)).values())


@pytest.mark.parametrize(
    "changes, message",
    [
        (["optimisation.lr=1"], "train: config must use known keys (architecture, model, data, mask, opt"),
        (["optimization.Lr=1"], "train: config must use known keys (steps, warmup, "),
        (["optimization.lr=quick"], "train: optimization.lr must be float, got 'quick'; correct the config"),
        (["optimization.lr=-1"], "train: optimization.lr must be at least 0, got -1.0; correct the config"),
        (["optimization.ema=[0.9, 1.5]"], "train: optimization.ema must lie in [0, 1], got 1.5; correct the config"),
        (["optimization.ema=0.9"], "train: optimization.ema must be 2 numbers, got 0.9; correct the config"),
        (["optimization.average=sum"], "train: optimization.average must be one of mask, token, got 'sum'; check the"),
        (["parallel.balance=1"], "train: parallel.balance must be bool, got 1; correct the config"),
        (["mask.bucket=-1"], "MultiBlock2d: bucket must be at least 0, got -1; pass tokens, such as 1024"),
        (
            ["mask.bucket=64", "mask.truncate=true"],
            "MultiBlock2d: bucket must be 0 for truncated masks, which are rect",
        ),
        (["optimization.lr=.inf"], "train: optimization.lr must be finite, got inf; correct the config"),
        (["data.crop_scale=[0.5, .nan]"], "train: data.crop_scale must be finite, got [0.5, nan]; correct the config"),
        (
            ["parallel.balance=true", "mask.truncate=true"],
            "train: parallel.balance must be false with mask.truncate, where all images have as many patches, got",
        ),
        (["optimization.steps=0"], "train: optimization.steps must be at least 1, got 0; correct the config"),
        (["optimization.ipe_scale=0.5"], "train: optimization.ipe_scale must be at least 1, got 0.5; the published "),
        (["data.batch_size=1"], "train: data.batch_size must be at least 2, got 1; correct the config"),
        (["data.crop_scale=[0.5, 0.2]"], "PhotoCrops: scale must satisfy 0 < least <= most <= 1, got (0.5, 0.2); "),
        (["mask.min_keep=100"], "MultiBlock2d: min_keep must be less than the smallest context block, "),
        (["architecture=ajepa"], f"train: architecture must be one of {', '.join(configs.DEFAULTS)}, got 'ajepa'; "),
        (["model.size=vit_massive"], "train: model.size must be one of vit_tiny, vit_small, vit_base, vit_large, "),
        (["model.depth=0"], "train: model.depth must be at least 1, got 0; correct the config"),
        (["model.patch_size=0"], "train: model.patch_size must be at least 1, got 0; correct the config"),
        (["model.crop_size=33"], "Encoder: crop_size must be a multiple of patch_size 8, got 33; crop to a multiple"),
        (["seed=-1"], "train: seed must be at least 0, got -1; correct the config"),
        (["model=3"], "train: model must be a mapping, got int; see configs/ijepa.yaml"),
        (["data=[1]"], "train: data must be a mapping, got list; see configs/ijepa.yaml"),
        (["lr"], "train: --set must have the form section.key=value, got 'lr'; say, optimization.lr=3e-4"),
        (["seed.x=1"], "train: seed must be int, got {'x': 1}; correct the config"),
        (["model.depth.x=1"], "train: --set must have the form section.key=value, got 'model.depth.x=1'; say, "),
        (["data.grey=[1"], "train: --set must have the form section.key=value, got 'data.grey=[1'; say, "),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_written(config, tmp_path, capsys, changes, message):
    words = [word for change in changes for word in ("--set", change)]
    assert train.main([str(config), "--out", str(tmp_path / "run"), *words]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("model: [", "train: config {path} must be YAML, got while parsing"),
        ("- 1", "train: config {path} must be a mapping of sections, got list; see configs/ijepa.yaml"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    assert train.main([str(path), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(message.format(path=path))


@pytest.mark.parametrize("name, remedy", [("ijpea", "did you mean ijepa?"), ("absent.yaml", "check the spelling")])
def test_an_unknown_config_lists_the_shipped_ones(capsys, name, remedy):
    assert train.main([name]) == 2
    names = ", ".join(configs.shipped())
    assert capsys.readouterr().err == (
        f"train: config must be a YAML file or a shipped name ({names}), got {name!r}; {remedy}\n"
    )


def test_a_near_key_is_named(config, capsys):
    assert train.main([str(config), "--set", "optimization.step=1"]) == 2
    assert "got 'optimization.step'; did you mean steps?" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta"])
def test_a_device_that_is_not_there_is_refused(config, tmp_path, capsys, device):
    assert train.main([str(config), "--out", str(tmp_path / "run"), "--device", device]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"train: --device must name a device of this machine, got '{device}' (")
    assert said.endswith("); leave it out for the cpu\n") and said.count("\n") == 1


def test_a_folder_that_holds_a_run_is_not_overwritten(config, tmp_path, capsys):
    out = tmp_path / "run"
    fit(config, out, stop=1)
    before = (out / "checkpoints/step-00000001/state.json").read_bytes()
    assert train.main([str(config), "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        f"train: --out must be a folder without a checkpoint, got {out}; pass --resume to continue, or another --out\n"
    )
    assert (out / "checkpoints/step-00000001/state.json").read_bytes() == before


def test_resume_without_a_checkpoint_is_refused(config, tmp_path, capsys):
    for words in (["--resume"], ["--export", str(tmp_path / "weights.safetensors")]):
        assert train.main([str(config), "--out", str(tmp_path), *words]) == 2
        found = f"train: --out must hold a checkpoint, got none in {tmp_path / 'checkpoints'}; "
        assert capsys.readouterr().err == found + "pass the run's, or leave out --resume and --export\n"


@pytest.mark.parametrize(
    "change, found",
    [
        ("optimization.lr=2e-3", "optimization.lr = 0.001 in the checkpoint, 0.002 now"),
        ("model.depth=3", "model.depth = 2 in the checkpoint, 3 now"),
        ("seed=1", "seed = 0 in the checkpoint, 1 now"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(config, tmp_path, capsys, change, found):
    out = tmp_path / "run"
    fit(config, out, stop=1)
    assert train.main([str(config), "--out", str(out), "--resume", "--set", change]) == 2
    assert capsys.readouterr().err == (
        f"train: checkpoint {runs.newest(out)} must be of this config, got {found}; "
        "pass the run's options, or another --out\n"
    )


def test_signs_of_collapse_are_those_of_all_parts(config):
    found = []
    for parts in (1, 4):
        trainer = Trainer(configs.read(str(config), [f"optimization.accumulate={parts}"]))
        found.append(trainer.advance(next(iter(train.batches(trainer.config)))).measured())
    whole, apart = found
    assert whole["std"] > 0.1 and whole["rank"] > 1
    assert (apart["std"], apart["rank"]) == pytest.approx((whole["std"], whole["rank"]), rel=1e-4)


def test_logging_and_the_probe_may_change_between_parts_of_a_run(config, tmp_path):
    fit(config, tmp_path / "run", stop=1)
    changes = ["optimization.accumulate=2", "logging.checkpoint_every=2", "probe.seeds=1", "data.num_workers=1"]
    assert fit(config, tmp_path / "run", resume=True, changes=changes).step == 6


def test_a_run_that_has_not_begun_can_be_continued(config, tmp_path):
    fit(config, tmp_path / "run", stop=0)
    whole = fit(config, tmp_path / "whole")
    assert same(fit(config, tmp_path / "run", resume=True).state(), whole.state())


def test_a_folder_in_which_another_run_writes_is_refused(config, tmp_path, capsys):
    out = tmp_path / "run"
    fit(config, out, stop=2)
    before = sorted(out.rglob("*"))
    with logs.alone(out, Ranks()):
        assert train.main([str(config), "--out", str(out), "--resume"]) == 1
    said = f"train: --out must be a folder that no other run writes in, got {out}; wait for it, or pass another --out\n"
    assert capsys.readouterr().err == said and sorted(out.rglob("*")) == before
    assert fit(config, out, resume=True).step == 6


@pytest.mark.parametrize("inside", ["", "run"])
def test_a_file_as_output_folder_is_refused(config, capsys, inside):
    out = config / inside
    assert train.main([str(config), "--out", str(out)]) == 2
    why = "Not a directory" if inside else "File exists"
    assert capsys.readouterr().err == f"train: --out must be a folder, got {out} ({why}); pass another --out\n"


def test_a_backend_that_cannot_run_ends_with_its_reason(config, tmp_path):
    environment = {**os.environ, "JEPA_KERNELS_BACKEND": "triton", "TRITON_INTERPRET": "0"}
    done = command(config, "--out", tmp_path / "run", env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("embed_patches: ")


@pytest.mark.parametrize("package", ["rich", "matplotlib", "jinja2", "sklearn", "skimage", "yaml"])
def test_a_missing_package_is_named_before_the_first_step(config, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert train.main([str(config), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"train: {package} must be installed, got no such module; pip install 'jepa_kernels[train]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_every_shipped_config_is_a_config():
    others = {"vl_jepa", *configs.published()}  # its text encoder lies in a package: see test_train_vl_jepa
    for name in set(configs.shipped()) - others:
        config = configs.read(name)
        with torch.device("meta"):
            RECIPES[config.architecture].model(config.model)
        assert len(train.batches(config)) == config.optimization.steps


def test_collapse_is_seen():
    images, places, width = 16, 64, 32
    constant = torch.randn(width).expand(images, places, width)
    only_place = torch.randn(1, places, width).expand(images, places, width)
    one_direction = torch.randn(images, places, 1) * torch.randn(width)
    for latents in (constant, only_place):
        stats = latent_stats(latents)
        assert stats.std < 1e-5 and stats.rank < 1e-5
    healthy = latent_stats(torch.randn(images, places, width))
    assert healthy.std == pytest.approx(0.97, abs=0.03) and 28 < healthy.rank < 32
    stats = latent_stats(one_direction)
    assert stats.std > 0.5 and stats.rank == pytest.approx(1.0, abs=0.02)


def test_every_step_shows_the_images_after_those_of_the_step_before(config):
    class Numbers:
        def __getitem__(self, i):
            return torch.tensor(i), 0

    def shown(step, accumulate=1, **ranks):
        feed = Feed(configs.read(str(config), [f"optimization.accumulate={accumulate}"]), Ranks(**ranks))
        feed.inputs = Numbers()
        return [images.tolist() for images, _ in feed[step]]

    assert [shown(step) for step in range(3)] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]
    assert shown(1, accumulate=2) == [[4, 5], [6, 7]]
    assert [shown(1, rank=rank, world=2) for rank in range(2)] == [[[4, 5]], [[6, 7]]]
