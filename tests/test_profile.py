"""Profiles: who was at work when, by hand-made events; parts, floors and words; any loop; the command; the page."""

import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.profiler import record_function

import jepa_kernels as jk
from jepa_kernels import report as files
from jepa_kernels.__main__ import main
from jepa_kernels.cost import Cost
from jepa_kernels.models.lejepa import LeJEPA, ViTConfig
from jepa_kernels.ops import OPS
from jepa_kernels.profiling import command, ncu, page, peaks, products
from jepa_kernels.profiling.events import HOST, OTHER, OURS, STEP, TORCH, WINDOW, Event, Slice, timeline
from jepa_kernels.profiling.notes import Note, Shaped
from jepa_kernels.profiling.report import Report
from jepa_kernels.profiling.summary import duration, percent, summarise
from tests.test_train import TINY

ROOT = Path(__file__).parents[1]
PEAKS = {
    "copy_gbs": 10.0, "read_gbs": 8.0, "rmw_gbs": 9.0,
    "fma_gflops": {"float32": 100.0, "bfloat16": 200.0}, "gemm_gflops": {"float32": 80.0, "bfloat16": 250.0},
}  # fmt: skip
MS = 1_000_000


def event(name, start, end, thread=1, **others):
    """Of milliseconds."""
    return Event(name, thread, int(start * MS), int(end * MS), **others)


def span(name, start, end, **others):
    return event(name, start, end, range=True, **others)


def told(slices):
    return [(s.start / MS, s.end / MS, s.part, s.kind, s.name) for s in slices]


def roofs(device):
    return PEAKS


MM = dict(shapes=[[1000, 100], [100, 500]], dtypes=["float", "float"])
STEPS = [
    span(WINDOW, 0, 22),
    span("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 2),
    span("context", 2, 8),
    event("aten::linear", 3, 6),
    event("aten::addmm", 3.5, 6, shapes=[[500], [1000, 100], [100, 500]], dtypes=["float"] * 3),
    event("Eager", 6, 8),
    event("jepa_kernels::gather_tokens_forward", 6.5, 7.5),
    span("backward", 8, 16),
    event("autograd::engine::evaluate_function: MmBackward0", 9, 15),
    event("MmBackward0", 9, 15),
    event("aten::mm", 10, 14, **MM),
    span("Optimizer.step#AdamW.step", 16, 18),
    span(STEP, 20, 20),
    span(STEP, 21, 21),
]


def gathered():
    """3 images of 100 tokens of 50 channels; 2 masks of 20 tokens each, that share 10."""
    ids = torch.stack([torch.arange(20)] * 3 + [torch.arange(10, 30)] * 3)
    x = Shaped((3, 100, 50), (5000, 50, 1), torch.float32)
    return Note("gather_tokens", "forward", "cpu", (x, ids, None), int(0.25 * MS))


def test_every_moment_belongs_to_a_part_and_an_operation():
    slices, on_device = timeline(STEPS)
    assert not on_device and told(slices) == [
        (0, 2, "data", HOST, "host"),
        (2, 3, "context", HOST, "host"),
        (3, 3.5, "context", TORCH, "linear"),
        (3.5, 6, "context", TORCH, "addmm"),
        (6, 6.5, "context", HOST, "host"),
        (6.5, 7.5, "context", OURS, "gather_tokens_forward"),
        (7.5, 8, "context", HOST, "host"),
        (8, 10, "backward", HOST, "host"),
        (10, 14, "backward", TORCH, "mm"),
        (14, 16, "backward", HOST, "host"),
        (16, 18, "optimizer", HOST, "host"),
        (18, 22, OTHER, HOST, "host"),
    ]


def test_numbers_are_those_of_a_step():
    s, slices = summarise(STEPS, [gathered()], roofs)
    assert s.steps == 2 and s.seconds == pytest.approx(0.0105) and slices[-1].end == 21 * MS
    parts = {p.name: [round(1e3 * x, 6) for x in (p.ours, p.torch, p.host, p.profiling)] for p in s.parts}
    assert parts == {
        "data": [0, 0, 1, 0],
        "context": [0.375, 1.5, 1, 0.125],  # noting the call took a quarter of a millisecond
        "backward": [0, 2, 2, 0],
        "optimizer": [0, 0, 1, 0],
        OTHER: [0, 0, 1.5, 0],
    }
    assert s.accounted == pytest.approx(9 / 10.5) and s.in_operations == pytest.approx(3.875 / 10.5)
    mm, addmm, linear, gather = sorted(
        s.ops, key=lambda op: ("mm", "addmm", "linear").index(op.name) if op.kind == TORCH else 9
    )
    assert (mm.label, mm.calls, mm.seconds, mm.flops) == ("mm in backward", 0.5, 0.002, 1e8 / 2)
    assert mm.bytes == 4 * (1000 * 100 + 100 * 500 + 1000 * 500) / 2
    assert mm.floor == pytest.approx(1e8 / 100e9 / 2) and mm.bound == "GFLOP/s"  # 1 ms; its bytes would take 0.26 ms
    assert mm.rate(mm.flops) == pytest.approx(25) and mm.share() == pytest.approx(0.25)
    assert addmm.flops == mm.flops and addmm.bytes == mm.bytes + 4 * 500 / 2
    assert (linear.floor, linear.share(), linear.rate(linear.bytes)) == (None, None, None)
    bytes_ = 4 * 50 * (3 * 30 + 6 * 20) + 8 * 6 * 20
    assert (gather.label, gather.backend, gather.bytes) == ("gather_tokens forward", "cpu", bytes_ / 2)
    assert gather.floor == pytest.approx(bytes_ / 10e9 / 2) and gather.bound == "GB/s"


def test_the_greatest_gaps_are_told_in_words():
    s, _ = summarise(STEPS, [gathered()], roofs)
    assert s.words == [
        "mm in backward takes 2 ms, its floor is 500 us (arithmetic at 100 GFLOP/s): 1.5 ms, 14 % of the step",
        "addmm takes 1.25 ms, its floor is 500 us (arithmetic at 100 GFLOP/s): 750 us, 7.1 % of the step",
        "gather_tokens forward takes 375 us, its floor is 2.15 us (memory at 10 GB/s): 373 us, 3.6 % of the step",
        "no operation runs for 6.5 ms, 62 % of the step, 2 ms of it in backward",
    ]
    assert [(g.part, g.after, g.before, g.seconds) for g in s.gaps] == [
        (OTHER, "mm", "the end", 0.007),  # most of it lies there
        ("data", "the start", "linear", 0.003),
        ("backward", "gather_tokens_forward", "mm", 0.0025),
    ]


def test_the_backward_pass_of_another_thread_counts():
    """As on a GPU machine: the main thread waits, another one works for it."""
    events = [
        span(WINDOW, 0, 10),
        span("backward", 2, 8),
        event("autograd::engine::evaluate_function: X", 3, 7, thread=2),
        event("aten::mm", 4, 6, thread=2, **MM),
        event("aten::copy_", 1, 9, thread=3),  # of a thread that has nothing to do with the step
    ]
    assert told(timeline(events)[0]) == [
        (0, 2, OTHER, HOST, "host"),
        (2, 4, "backward", HOST, "host"),
        (4, 6, "backward", TORCH, "mm"),
        (6, 8, "backward", HOST, "host"),
        (8, 10, OTHER, HOST, "host"),
    ]


def test_on_a_gpu_time_is_that_of_its_kernels():
    """Kernels of two streams, which overlap; each belongs to what launched it."""
    events = [
        span(WINDOW, 0, 20),
        span("context", 0, 3),
        event("aten::mm", 1, 1.1, id=7, **MM),
        event("jepa_kernels::gather_tokens_forward", 2, 2.1, id=8),
        event("ampere_sgemm", 4, 8, device=True, linked=7, thread=70),
        event("_gather_tokens_forward_kernel", 7, 9, device=True, linked=8, thread=71),
        event("Memcpy HtoD", 12, 13, device=True, thread=70),
    ]
    slices, on_device = timeline(events)
    assert on_device and told(slices) == [
        (0, 4, "context", HOST, "idle"),
        (4, 8, "context", TORCH, "mm"),
        (8, 9, "context", OURS, "gather_tokens_forward"),
        (9, 12, "context", HOST, "idle"),
        (12, 13, "context", TORCH, "Memcpy HtoD"),
        (13, 20, OTHER, HOST, "idle"),
    ]
    s, _ = summarise(events, [gathered()], roofs)
    assert s.device == "cuda" and {op.name: op.seconds for op in s.ops}["mm"] == pytest.approx(0.004)


@pytest.mark.parametrize(
    "name, shapes, values, flops, numbers",
    [
        ("bmm", [[4, 10, 20], [4, 20, 30]], [], 2 * 4 * 10 * 20 * 30, 4 * (200 + 600 + 300)),
        ("convolution", [[2, 3, 8, 8], [5, 3, 3, 3], [5]], ["", "", "", "[1, 1]", "[1, 1]", "[1, 1]", "False"],
         2 * 2 * 5 * 64 * 27, 2 * 3 * 64 + 5 * 27 + 5 + 2 * 5 * 64),
        ("_scaled_dot_product_flash_attention_for_cpu", [[2, 4, 10, 8], [2, 4, 12, 8], [2, 4, 12, 8]], [],
         2 * 2 * 2 * 4 * 10 * 12 * 8, 8 * 8 * (10 + 12 + 12 + 10)),
    ],
)  # fmt: skip
def test_torchs_products_are_counted_by_their_shapes(name, shapes, values, flops, numbers):
    found = products.cost(event(f"aten::{name}", 0, 1, shapes=shapes, dtypes=["c10::BFloat16"] * 3, values=values))
    assert found == Cost(2 * numbers, flops)


def test_floors_take_the_fastest_that_was_seen_of_a_dtype():
    assert peaks.floor(Cost(0, 1e9), "bfloat16", PEAKS) == (1e9 / 250e9, "GFLOP/s", 250.0)
    assert peaks.floor(Cost(0, 1e9), "float16", PEAKS).rate == 100.0  # not measured here: as float32
    assert peaks.floor(Cost(1e9, 1e9), "float32", PEAKS) == (0.1, "GB/s", 10.0)


def test_numbers_are_short():
    assert [duration(x) for x in (None, 0.0, 9.996e-4, 1.5, 123.4)] == ["-", "0 us", "1 ms", "1.5 s", "123 s"]
    assert [percent(x) for x in (None, 0.004, 0.0994, 0.5)] == ["-", "0.4 %", "9.9 %", "50 %"]


class Plain(nn.Module):
    """Nothing of ours but one op."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        with record_function("mine"):
            x = self.layer(x)
        return jk.gather_tokens(x, torch.arange(4).repeat(len(x), 1))


def loop(steps, mark=None):
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        with record_function("asleep"):
            time.sleep(0.02)
        model(torch.randn(2, 8, 64)).square().mean().backward()
        optimizer.step()
        if mark:
            mark()


@pytest.fixture(scope="module")
def plain():
    """A profile of three steps of it, and the hooks that were there before."""
    hooks = dict(nn.modules.module._global_forward_pre_hooks), torch.autograd.backward
    with jk.profile() as p:
        loop(3)
    return p, hooks


def test_any_loop_is_profiled_and_left_as_it_was(plain):
    p, (hooks, backward) = plain
    assert dict(nn.modules.module._global_forward_pre_hooks) == hooks and torch.autograd.backward is backward
    s = Report(p.events(), p._notes, roofs, str, {}).summary
    parts = {part.name: part for part in s.parts}
    assert s.steps == 3 and set(parts) == {"asleep", "mine", "backward", "optimizer", OTHER}
    assert 0.02 <= parts["asleep"].seconds < 0.04 and parts["asleep"].host > 0.999 * parts["asleep"].seconds
    ops = {op.label: op for op in s.ops}
    forward, backward = ops["gather_tokens forward"], ops["gather_tokens backward"]
    assert forward.calls == 1 and forward.bytes == 4 * 64 * (2 * 4 + 8) + 8 * 8
    assert backward.calls == 1 and backward.backward and backward.bytes == 4 * 64 * (8 + 16) + 8 * 8
    assert ops["addmm"].flops == 2 * 16 * 64 * 64
    assert sum(part.seconds for part in s.parts) == pytest.approx(s.seconds)


@pytest.mark.parametrize("given", [True, False])
def test_a_model_of_ours_is_found_and_left_as_it_was(given):
    model = LeJEPA.of(
        ViTConfig(crop_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, proj_hidden=16, slices=8)
    )
    wrapped = nn.parallel.DataParallel(model)  # on the CPU it calls what it wraps
    known, objective = set(vars(model)), LeJEPA.objective
    with jk.profile(wrapped if given else None) as p:
        model.objective(wrapped(torch.rand(4, 2, 3, 32, 32))).backward()
    parts = {part.name for part in Report(p.events(), p._notes, roofs, str, {}).summary.parts}
    assert {"context", "projector", "loss", "backward"} <= parts
    assert (
        set(vars(model)) == known
        and LeJEPA.objective is objective
        and not model.projector._forward_hooks
        and not model.projector._forward_pre_hooks
    )


def test_a_report_is_printed_in_any_width(plain):
    found = Report(plain[0].events(), plain[0]._notes, roofs, str, {"model": "mine <b>"})
    assert "busy" not in found.headline()
    found.about |= {"load": 3.04, "cores": 2}
    assert found.headline().endswith("the machine was busy: load 3.0 on 2 cores")
    for width in (10, 60, 140):
        lines = found.table(width).splitlines()
        assert max(map(len, lines)) <= max(width, 30) and "\x1b" not in found.table(width)
    assert "gather_tokens forward" in found.table(140) and "GFLOP/s" in found.table(140)
    assert "mine <b>" in page.render(found).replace("&lt;", "<").replace("&gt;", ">")


def test_a_terminal_of_few_characters_gets_them(plain, monkeypatch):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    found = Report(plain[0].events(), plain[0]._notes, roofs, str, {})
    assert found.table(120).isascii() and "gather_tokens forward" in found.table(120)


def test_an_exception_leaves_what_was_recorded():
    p = jk.profile()
    with pytest.raises(ZeroDivisionError), p:
        loop(2, p.step)
        raise ZeroDivisionError
    assert Report(p.events(), p._notes, roofs, str, {}).summary.steps == 2
    with pytest.raises(RuntimeError, match="profile: a profile must be entered once, got a second time"), p:
        pass


def test_one_profile_at_a_time():
    with jk.profile() as p:
        with pytest.raises(RuntimeError, match="profile: a profile must be the only one, got another one") as inner:
            jk.profile().__enter__()
        with pytest.raises(RuntimeError, match="profile: report must come after the block, got no finished profile"):
            p.report()
    assert "end that one first" in str(inner.value)
    with torch.profiler.profile(), pytest.raises(RuntimeError, match="must be the only one"):
        jk.profile().__enter__()


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
    assert len(numbers["words"]) == 4 and numbers["machine"]["cpu"]


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


def test_a_missing_package_is_named_with_its_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "ijepa"]) == 2
    said = "profile: jinja2 must be installed, got no such module; pip install 'jepa_kernels[profile]'"
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


def test_a_full_disk_leaves_no_half_of_a_file(plain, tmp_path, monkeypatch):
    def full(path):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    found = Report(plain[0].events(), plain[0]._notes, roofs, full, {})
    with pytest.raises(files.SaveError, match=r"profile: .*trace.json must be writable, got .*No space left"):
        found.save(tmp_path)
    assert not any(path.is_file() for path in tmp_path.iterdir())


def kernels(op):
    """Names of the kernels of an op, in the sources."""
    triton = "".join(p.read_text() for p in (ROOT / "jepa_kernels" / "ops" / op).glob("triton*.py"))
    cuda = "".join(p.read_text() for p in (ROOT / "csrc" / op).glob("cuda*.cu"))
    return {*re.findall(r"def (\w+_kernel)\(", triton), *re.findall(r"(\w+_kernel)\(const __grid_constant__", cuda)}


@pytest.mark.parametrize("op", OPS)
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
