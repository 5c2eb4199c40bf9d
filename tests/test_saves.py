"""Checkpoints: a copy taken at once, published whole or not at all, checked, exported, kept or removed."""

import errno
import json
import os
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from jepa_kernels import configs, report, train
from jepa_kernels.models.ijepa import IJEPA
from jepa_kernels.training import disk, saves, state
from jepa_kernels.training.ranks import Ranks
from tests import runs
from tests.test_train import TINY, fit, rows, same

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_TWO = {**TINY, "logging": {"checkpoint_every": 2, "keep": 3}}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a config that trains in a second, and saves three times."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(EVERY_TWO))
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """(its folder, its trainer, its generator's last state) of a whole run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, fit(config, out), torch.get_rng_state()


@pytest.fixture
def out(finished, tmp_path):
    """A copy of that run, to damage."""
    return shutil.copytree(finished[0], tmp_path / "run", symlinks=True)


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def resume(config, out, *words):
    return train.main([str(config), "--out", str(out), "--resume", "--no-probe", *words])


def test_a_checkpoint_holds_everything_by_public_names(finished):
    out, trainer, drawn = finished
    assert names(out) == ["step-00000002", "step-00000004", "step-00000006"]
    path = runs.newest(out)
    about = json.loads((path / "state.json").read_text())
    assert about["format"] == "jepa_kernels.train/2" and about["step"] == 6 and about["world"] == 1
    assert about["versions"].keys() == {"jepa_kernels", "torch"} and about["config"] == trainer.config.plain()
    written = {p.name for p in path.iterdir()}
    assert about["files"].keys() == written - {"state.json"} == {".metadata", "__0_0.distcp"}
    assert all((path / name).stat().st_size == size for name, (size, _) in about["files"].items())
    held = runs.held(path)
    model = {f"model.{name}" for name in IJEPA(trainer.config.model).state_dict()}
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    moments = {f"optimizer.{name}.{key}" for name in trained for key in ("exp_avg", "exp_avg_sq", "step")}
    assert held.keys() == model | moments | {"rng.0.cpu"}
    assert same(held, trainer.state() | {"rng.0.cpu": drawn})
    assert held["optimizer.predictor.mask_token.step"] == 6
    mean = sum(row["loss"] for row in rows(out)[4:]) / 2
    assert about["scores"]["loss"] == pytest.approx(mean, rel=1e-12)


def test_what_the_loop_changes_right_after_a_save_is_not_in_it(config, tmp_path, monkeypatch):
    trainer, out = train.prepare(train._parser().parse_args([str(config), "--out", str(tmp_path / "run")]))
    may_write = runs.held_writers(monkeypatch)
    with saves.Saves(out, trainer.config, Ranks()) as kept:
        for step in (1, 2):  # the second copy lies in the memory of the first
            before = {name: x.clone() for name, x in trainer.state().items()}
            kept.save(step, trainer.state())
            assert not saves.place(out, step).exists() and kept.took().keys() == {"save_s"} and not kept.took()
            with torch.no_grad():
                for name, x in trainer.state().items():
                    x.zero_() if not name.startswith("rng.") else torch.rand(3)
            may_write.set()
            kept.wait()
            may_write.clear()
            assert same(runs.held(saves.place(out, step)), before)
            trainer.load(saves.place(out, step))


def test_a_save_waits_for_the_one_before(config, tmp_path, monkeypatch):
    may_write, read = runs.held_writers(monkeypatch), configs.read(str(config))
    with saves.Saves(tmp_path, read, Ranks()) as kept:
        kept.save(1, {"model.w": torch.ones(2)})
        assert saves.steps(tmp_path) == []
        threading.Timer(0.2, may_write.set).start()
        kept.save(2, {"model.w": torch.ones(2)})
        assert saves.steps(tmp_path)[0] == 1
    assert saves.steps(tmp_path) == [1, 2] and not any(name.startswith(".") for name in names(tmp_path))


@pytest.mark.parametrize(
    "best, keep, expected",
    [
        ("", 1, [5]),
        ("", 3, [3, 4, 5]),
        ("loss", 2, [2, 4, 5, "best"]),
        ("rank", 1, [3, 5, "best"]),
        ("std", 2, [1, 4, 5, "best"]),
    ],
)
def test_the_last_and_the_best_stay(config, tmp_path, monkeypatch, best, keep, expected):
    """By the mean since the checkpoint before; what is not finite is never the best; the new one is there first."""

    def seen_whole(path):
        assert saves.damage(saves.place(tmp_path, step)) is None and not path.samefile(saves.place(tmp_path, step))
        remove(path)

    remove = disk.remove
    monkeypatch.setattr(saves, "remove", seen_whole)
    read = configs.read(str(config), [f"logging.best='{best}'", f"logging.keep={keep}"])
    losses, ranks, stds = [3.0, 1.0, 2.0, float("nan"), 1.5], [1.0, 2.0, 9.0, 8.0, 3.0], [5.0, 4.0, 5.0, 1.0, 1.0]
    for part in (range(1, 4), range(4, 6)):  # the second goes on in another process
        with saves.Saves(tmp_path, read, Ranks(), part[0] - 1) as kept:
            for step in part:
                for off in (-0.75, 0.75):
                    kept.seen({"loss": losses[step - 1] + off, "rank": ranks[step - 1], "std": stds[step - 1]})
                kept.save(step, {"model.w": torch.full((2,), float(step))})
                kept.wait()
    folders = [saves.place(tmp_path, step).name for step in expected if step != "best"]
    assert names(tmp_path) == sorted(folders + ["best"] * ("best" in expected))
    if best:
        link = tmp_path / "checkpoints/best"
        assert os.readlink(link) == folders[0] and runs.held(link)["model.w"][0] == expected[0]


def spoil(path, how):
    """What happens to files."""
    data, about = path / "__0_0.distcp", path / "state.json"
    if how == "truncated":
        os.truncate(data, 1000)
    elif how == "a bit":
        with open(data, "rb+") as file:
            file.seek(5000)
            byte = file.read(1)[0]
            file.seek(5000)
            file.write(bytes([byte ^ 1]))
    elif how == "no tensors":
        data.unlink()
    elif how == "no metadata":
        (path / ".metadata").unlink()
    elif how == "torn":
        os.truncate(about, 300)
    else:
        assert how == "no state"
        about.unlink()


@pytest.mark.parametrize(
    "how, why",
    [
        ("truncated", "__0_0.distcp of 1000 bytes, not "),
        ("a bit", "__0_0.distcp of another crc32; "),
        ("no tensors", "no __0_0.distcp; "),
        ("no metadata", "no .metadata; "),
        ("torn", "a torn state.json (Unterminated string starting at: "),
        ("no state", "no state.json; "),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(out, capsys, how, why):
    last, before, first = (saves.place(out, step) for step in (6, 4, 2))
    spoil(last, how)
    assert saves.newest(out, Ranks()) == before
    said = capsys.readouterr().err
    assert said.startswith(f"train: checkpoint {last} must be whole, got {why}")
    assert said.endswith(f"; continuing from {before}\n") and said.count("\n") == 1
    spoil(before, "a bit")
    assert saves.newest(out, Ranks()) == first and capsys.readouterr().err.count(f"continuing from {first}\n") == 2
    spoil(first, "torn")
    with pytest.raises(ValueError) as error:
        saves.newest(out, Ranks())
    assert str(error.value).startswith(f"train: checkpoint {last} must be whole, got {why.removesuffix('; ')}")
    assert str(error.value).endswith(f"; no other of the 3 in {out / 'checkpoints'} is whole: pass another --out")


def test_a_run_goes_on_from_the_one_before_a_damaged_one(config, finished, out, capsys):
    spoil(saves.place(out, 6), "truncated")
    (out / "checkpoints/.step-00000009.part").mkdir()
    (out / "checkpoints/.best.part").symlink_to("step-00000009")
    assert resume(config, out) == 0
    assert f"continuing from {saves.place(out, 4)}\n" in capsys.readouterr().err
    assert names(out) == names(finished[0]) and saves.damage(saves.place(out, 6)) is None
    assert same(runs.held(saves.place(out, 6)), runs.held(saves.place(finished[0], 6)))
    assert rows(out) == rows(finished[0])


def test_damaged_ones_of_later_steps_do_not_count_as_kept(config, out):
    spoil(saves.place(out, 6), "a bit")
    fit(config, out, stop=5, resume=True, changes=["logging.keep=1", "logging.checkpoint_every=5"])
    assert names(out) == ["step-00000005"]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(config, out, capsys):
    for step in saves.steps(out):
        spoil(saves.place(out, step), "truncated")
    before = names(out)
    assert resume(config, out) == 2
    assert capsys.readouterr().err.endswith("is whole: pass another --out\n") and names(out) == before


@pytest.mark.parametrize("words", [[], ["--resume"]])
def test_what_an_older_version_left_is_not_read(config, tmp_path, capsys, words):
    (tmp_path / "latest.pt").write_bytes(b"anything")
    assert train.main([str(config), "--out", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err == (
        f"train: checkpoint {tmp_path / 'latest.pt'} must be of format {state.FORMAT}, got one of an older version; "
        "finish the run with that version, or pass another --out\n"
    )


def forge(path, change):
    """Write a checkpoint again after `change(tensors, about)`, with files as its state.json then tells them."""
    tensors, about = runs.held(path), json.loads((path / "state.json").read_text())
    change(tensors, about)
    shutil.rmtree(path)
    with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
        dcp.save(tensors, checkpoint_id=path, no_dist=True)
    if "files" in about:
        about["files"] = {p.name: disk.measure(p) for p in path.iterdir()}
    (path / "state.json").write_text(json.dumps(about))


TOKEN = "optimizer.predictor.mask_token"
STATE = "train: checkpoint {path} must hold a state of this run, got "
WHOLE = "; pass the --out of a whole run\n"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, a: a.update(format="other/1"), "train: checkpoint {path} must be of format " + state.FORMAT),
        (lambda t, a: a.pop("config"), "train: checkpoint {path} must hold config, got a part" + WHOLE),
        (lambda t, a: [a.pop("step"), a.pop("files")], "train: checkpoint {path} must hold step, files, got a part"),
        (lambda t, a: a.update(step="3"), STATE + "step is '3'" + WHOLE),
        (lambda t, a: t.update({TOKEN + ".exp_avg": torch.zeros(3)}), STATE + TOKEN + ".exp_avg has shape (3,), the "),
        (lambda t, a: t.pop(TOKEN + ".exp_avg_sq"), STATE + TOKEN + ".exp_avg_sq is missing" + WHOLE),
        (lambda t, a: t.update({"optimizer.w.step": torch.ones(())}), STATE + "optimizer.w.step is unknown" + WHOLE),
        (lambda t, a: t.update({TOKEN + ".step": 3}), STATE + TOKEN + ".step is no tensor" + WHOLE),
        (lambda t, a: t[TOKEN + ".exp_avg"].view(-1)[0].fill_(torch.nan), STATE + TOKEN + ".exp_avg holds values that"),
        (lambda t, a: t.update({"rng.0.cpu": torch.zeros(3).byte()}), STATE + "rng.0.cpu has shape (3,), the run's ("),
        (lambda t, a: t["rng.0.cpu"].zero_(), STATE + "rng.0.cpu is no state of a generator" + WHOLE),
        (lambda t, a: t.pop("model.predictor.mask_token"), STATE + "model.predictor.mask_token is missing" + WHOLE),
        (
            lambda t, a: t.update({n: x.half() for n, x in t.items() if n == "model.predictor.mask_token"}),
            STATE + "mod",
        ),
        (
            lambda t, a: t["model.predictor.mask_token"].view(-1)[-1].fill_(torch.inf),
            STATE + "model.predictor.mask_tok",
        ),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_changes_nothing(config, out, capsys, change, message):
    path = runs.newest(out)
    forge(path, change)
    assert resume(config, out) == 2
    assert capsys.readouterr().err.startswith(message.format(path=path))
    trainer = train.Trainer(configs.read(str(config)))
    before = {name: x.clone() for name, x in trainer.state().items()}
    with pytest.raises(ValueError):
        trainer.load(path)
    assert same(trainer.state(), before) and trainer.step == 0


def test_a_rank_without_a_generator_draws_one_of_its_own(config, out):
    path, trainer, drawn = runs.newest(out), train.Trainer(configs.read(str(config))), set()
    forge(path, lambda tensors, _: tensors.pop("rng.0.cpu"))
    for given in (lambda _: None, lambda about: about.update(step=5)):
        about = json.loads((path / "state.json").read_text())
        given(about)
        (path / "state.json").write_text(json.dumps(about))
        for before in (1, 2):
            torch.manual_seed(before)
            trainer.load(path)
            drawn.add(torch.initial_seed())
    assert len(drawn) == 2  # a function of the step, not of what was before


def test_a_rank_goes_on_with_its_own_generator():
    kept = state.generators(0, torch.device("cpu"))
    expected = torch.rand(3)
    state.put_generators(kept, 0, torch.device("cpu"), seed=1, step=2)
    assert torch.equal(torch.rand(3), expected)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_while_saving_leaves_the_checkpoints_before_whole(config, out, monkeypatch):
    shutil.rmtree(saves.place(out, 6))
    trainer, _ = train.prepare(train._parser().parse_args([str(config), "--out", str(out), "--resume"]))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(report.SaveError) as error, saves.Saves(out, trainer.config, Ranks(), 4) as kept:
            kept.save(6, trainer.state())
    assert str(error.value).startswith(f"train: {saves.place(out, 6)} must be writable (0.")
    assert str(error.value).endswith(
        " MB), got No space left on device; free space or pass another --out"
        "; the checkpoint before it is whole, continue with --resume"
    )
    assert names(out) == ["step-00000002", "step-00000004"]
    assert fit(config, out, resume=True).step == 6


@pytest.mark.parametrize("room", [50_000, 900_000])
def test_a_run_on_a_disk_without_room_ends_with_the_message(config, tmp_path, capsys, room):
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # files end there, as on a full disk
    try:
        words = ["--no-probe", "--set", "logging.checkpoint_every=1"]
        assert train.main([str(config), "--out", str(out), *words]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert said.startswith(f"train: {saves.place(out, 1)} must be writable (0.")
    assert said.endswith(" MB), got File too large; free space or pass another --out\n")
    assert names(out) == [] and sorted(p.name for p in out.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_any_checkpoint_is_exported(config, out, tmp_path, capsys):
    (out / "checkpoints/best").symlink_to("step-00000002")
    words = [str(config), "--out", str(out), "--steps", "99", "--export"]  # how long it trained is no matter
    for name, path in ((None, 6), ("step-00000004", 4), ("best", 2)):
        file, path = tmp_path / f"{name}.safetensors", saves.place(out, path)
        assert train.main([*words, str(file), *(["--checkpoint", name] if name else [])]) == 0
        assert capsys.readouterr().out == f"{file} holds the weights of {path}\n"
        model, _ = IJEPA.from_checkpoint(file)
        assert same(dict(model.state_dict()), runs.weights(path))


def test_an_export_that_can_not_be_is_refused(config, out, tmp_path, capsys):
    file = tmp_path / "weights.safetensors"
    spoil(saves.place(out, 6), "a bit")
    spoil(saves.place(out, 2), "torn")
    known = "step-00000002, step-00000004, step-00000006"
    for words, message in (
        (["--checkpoint", "best"], f"train: --checkpoint must be one of {known}, got 'best'; look into --out\n"),
        (
            ["--checkpoint", "step-00000006"],
            f"train: checkpoint {saves.place(out, 6)} must be whole, got __0_0.distcp ",
        ),
        (
            ["--set", "model.depth=3"],
            f"train: checkpoint {saves.place(out, 4)} must be of this config, got model.depth",
        ),
    ):
        assert train.main([str(config), "--out", str(out), "--export", str(file), *words]) == 2
        assert message in capsys.readouterr().err
    assert train.main([str(config), "--out", str(out), "--export", str(tmp_path / "weights.pt")]) == 2
    assert capsys.readouterr().err.endswith(
        "must end in .safetensors, got " + str(tmp_path / "weights.pt; ") + ("the name tells the format\n")
    )
    assert train.main([str(config), "--out", str(out), "--checkpoint", "best"]) == 2
    assert capsys.readouterr().err.startswith("train: --checkpoint must come with --export, got best; ")
    assert not file.exists() and Path(out, "checkpoints").is_dir()


def test_settings_of_checkpoints_that_are_off(config):
    for change, message in (
        ("logging.keep=0", "train: logging.keep must be at least 1, got 0; correct the config"),
        ("logging.best=lost", "train: logging.best must be one of loss, std, rank, got 'lost'; check the spelling"),
    ):
        with pytest.raises(ValueError) as error:
            configs.read(str(config), [change])
        assert str(error.value) == message
