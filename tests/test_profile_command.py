"""What `python -m jepa_kernels profile` leaves and says: the page, the trace, refusals, Nsight Compute's command."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import jepa_kernels as jk
from jepa_kernels import report as files
from jepa_kernels.__main__ import main
from jepa_kernels._core.info import kernels as table
from jepa_kernels.ops import OPS
from jepa_kernels.profiling import command, ncu, page, peaks
from jepa_kernels.profiling.events import HOST, OURS, Slice
from jepa_kernels.profiling.report import Report
from tests.test_profile import PEAKS, roofs
from tests.test_train import TINY

ROOT = Path(__file__).parents[1]


def test_nothing_is_a_report_too():
    with jk.profile() as p:
        pass
    found = Report(p.events(), p._notes, roofs, str, {})
    assert found.summary.steps == 1 and not found.summary.ops and found.summary.accounted == 0
    assert Page(page.render(found)).seen.count("svg") == 0 and "the step" in found.table()
    with pytest.raises(TypeError, match="profile: model must be a module, got dict; leave it out"):
        jk.profile({})


class Page(HTMLParser):
    """What opens closes; counts of tags."""

    VOID = ("meta", "line")

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """What the command leaves of a small run, and what it prints."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peaks, "of", lambda device, threads: PEAKS)
        code = main(["profile", str(folder / "tiny.yaml"), "--steps", "2", "--out", str(folder / "out")])
    return folder, code


def test_the_command_accounts_for_the_step(profiled):
    folder, code = profiled
    numbers = json.loads((folder / "out" / "profile.json").read_text())
    assert code == 0 and numbers["steps"] == 2 and numbers["device"] == "cpu"
    assert numbers["accounted"] >= 0.95, "must reach"
    parts = {p["name"] for p in numbers["parts"]}
    assert {"data", "target", "context", "predictor", "loss", "backward", "optimizer + EMA", "log"} <= parts
    assert sum(p["share"] for p in numbers["parts"]) == pytest.approx(1)
    ops = {op["label"] for op in numbers["ops"] if op["kind"] == OURS and op["floor"] > 0}
    both = {"masked_attention", "embed_patches", "assemble_tokens"}
    assert {f"{op} {stage}" for op in both for stage in ("forward", "backward")} <= ops
    assert {"latent_loss forward", "adamw_ema forward", "grad_norm forward", "collapse_stats forward"} <= ops
    assert all(op["floor"] is not None for op in numbers["ops"] if op["kind"] == OURS)
    assert len(numbers["words"]) == 5 and numbers["words"][-1].startswith("the longest waits for an operation: ")
    assert numbers["machine"]["cpu"]


def test_the_page_is_one_file(profiled):
    text = (profiled[0] / "out" / "profile.html").read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text), "nothing is fetched"
    seen = Page(text).seen
    assert seen.count("svg") == seen.count("canvas") == 1 and seen.count("circle") > 8
    drawn = json.loads(re.search(r"const line = (.*);", text).group(1))
    assert drawn["parts"][0] == "data" and len(drawn["slices"]) > 100
    for (start, lasts, part, kind, name), (after, *_) in zip(drawn["slices"], drawn["slices"][1:], strict=False):
        assert start + lasts <= after + 0.02 and kind < 4
        assert part < len(drawn["parts"]) and name < len(drawn["names"])


def test_the_trace_names_parts_and_operations(profiled):
    trace = json.loads((profiled[0] / "out" / "trace.json").read_text())
    names = {e.get("name") for e in trace["traceEvents"]}
    assert {"context", "predictor", "target", "backward", "jepa_kernels::adamw_ema_forward"} <= names
    assert not list((profiled[0] / "out").glob("*.tmp*"))


def test_slices_shorter_than_a_pixel_are_left_out():
    slices = [Slice(0, 10**9, "data", HOST, "host"), Slice(10**9, 10**9 + 10, "loss", OURS, "x")]
    drawn = page.line(slices, ["data", "loss"])
    assert drawn["slices"] == [[0.0, 1e6, 0, 2, 0]] and page.line([], [])["end"] == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["ijeppa"], "did you mean ijepa?"),
        (["ijepa", "--steps", "0"], "profile: --steps must be at least 1, got 0"),
        (["ijepa", "--device", "xpu"], "profile: --device must name a device of this machine, got 'xpu'"),
        (["ijepa", "--out", "{file}/x"], "profile: --out must be a folder, got {file}/x (Not a directory)"),
        (["ijepa", "--out", "/proc"], "profile: --out must be a place to write, got /proc"),
        (["ijepa", "--trace", "{file}.d/t.json"], "profile: --trace must be a place to write, got {file}.d (No such"),
        (["ijepa", "--ncu", "masked_atention"], "profile: --ncu must be one of"),
        (["ijepa", "--set", "model.depht=1"], "did you mean depth?"),
    ],
)
def test_bad_words_are_refused_before_the_work(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "Trainer", None)
    words = [word.format(file=tmp_path / "file") for word in words]
    assert main(["profile", *words]) == 2
    assert said.format(file=tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("package", ["yaml", "rich", "jinja2"])
def test_a_missing_package_is_named_with_its_extra(package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "ijepa"]) == 2
    said = f"profile: {package} must be installed, got no such module; pip install 'jepa_kernels[profile]'"
    assert capsys.readouterr().err.strip() == said and not (tmp_path / "runs").exists()


class Interrupted:
    """A trainer that Ctrl-C meets in its n-th step."""

    def __init__(self, n):
        self.left, self.model, self.dtype = n, nn.Linear(1, 1), None
        self.config = type("Config", (), {"data": type("Data", (), {"batch_size": 1})})

    def advance(self, batch):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        torch.ones(3, 3).mm(torch.ones(3, 3))


def test_ctrl_c_keeps_the_steps_so_far(monkeypatch):
    monkeypatch.setattr(peaks, "of", lambda device, threads: PEAKS)
    found = command.record(Interrupted(command.WARM + 3), range(9), 5, model="x")
    assert found.summary.steps == 2 and "2 profiled, interrupted" in found.headline()
    with pytest.raises(KeyboardInterrupt):
        command.record(Interrupted(command.WARM + 1), range(9), 5)


@pytest.mark.parametrize("stage", ["record", "peaks", "save"])
def test_ctrl_c_says_what_is_kept(stage, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "batches", lambda config: range(9))
    monkeypatch.setattr(command, "Trainer", lambda *_: Interrupted(1 if stage == "record" else 99))
    monkeypatch.setattr(peaks, "of", interrupt if stage == "peaks" else lambda device, threads: PEAKS)
    monkeypatch.setattr(page, "render", interrupt)
    assert main(["profile", "ijepa", "--steps", "1", "--out", "out"]) == files.INTERRUPTED
    said = capsys.readouterr().err
    assert ("before a step was recorded; nothing is written" in said) == (stage == "record")
    assert ("after the steps, before the report was complete" in said) == (stage != "record")
    kept = {p.name for p in (tmp_path / "out").iterdir()}
    assert kept == ({"trace.json", "profile.json"} if stage == "save" else set())


def full(path):
    Path(path).write_text("half")
    raise OSError(28, "No space left on device")


def silently_full(path):  # as torch's own
    Path(path + ".tmp").write_text("half")


@pytest.mark.parametrize("export, why", [(full, "No space left"), (silently_full, "nothing from torch's profiler")])
def test_a_full_disk_leaves_no_half_of_a_file(export, why, tmp_path):
    with jk.profile() as p:
        torch.ones(3).sum()
    found = Report(p.events(), p._notes, roofs, export, {})
    with pytest.raises(files.SaveError, match=rf"profile: .*trace.json must be writable, got .*{why}"):
        found.save(tmp_path)
    assert not [*tmp_path.iterdir()]


def kernels(op):
    """Names of the kernels of an op, in the sources."""
    triton = "".join(p.read_text() for p in (ROOT / "jepa_kernels" / "ops" / op).glob("triton*.py"))
    cuda = "".join(p.read_text() for p in (ROOT / "csrc" / op).glob("cuda*.cu"))
    return {*re.findall(r"def (\w+_kernel)\(", triton), *re.findall(r"(\w+_kernel)\(const __grid_constant__", cuda)}


@pytest.mark.parametrize("op", [op for op in OPS if {"triton", "cuda"} & {k.backend for k in table(op)}])
def test_nsight_compute_sees_all_kernels_of_an_op_and_no_others(op):
    assert kernels(op) and all(re.search(ncu.pattern(op), name) for name in kernels(op))
    others = {name for other in OPS if other != op for name in kernels(other)}
    assert not [name for name in others if re.search(ncu.pattern(op), name)]


def test_the_command_for_nsight_compute_is_printed_and_nothing_runs(capsys, monkeypatch):
    monkeypatch.setattr(command, "Trainer", None)
    assert main(["profile", "ijepa", "--ncu", "rope", "--set", "data.batch_size=8"]) == 0
    assert capsys.readouterr().out == (
        "ncu --set full --clock-control none --target-processes all --kernel-name "
        "'regex:^_?(rope)_([a-z0-9_]+_)?kernel' --launch-skip 20 --launch-count 10 --export ijepa-rope "
        "--force-overwrite \\\n  python -m jepa_kernels train ijepa --device cuda --steps 5 --no-probe "
        "--out runs/ncu-ijepa-rope --set data.batch_size=8\n"
    )


def test_nsight_compute_sees_what_would_be_profiled(capsys, monkeypatch):
    """With the dtype, and the few episodes; no package of the report's is needed."""
    monkeypatch.setattr(command, "Trainer", None)
    for package in ("rich", "jinja2"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    for name in ("pusht", "lewm_pusht"):
        assert main(["profile", name, "--ncu", "--dtype", "bfloat16", "--set", "data.episodes=9"]) == 0
        said = "--set data.episodes=8 --set data.episodes=9 --set optimization.use_bfloat16=true\n"
        assert capsys.readouterr().out.endswith(said)
