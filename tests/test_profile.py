"""Profiles: who was at work when, by hand-made events; parts, floors and words; any loop."""

import io
import time

import pytest
import torch
from torch import nn
from torch.profiler import record_function

import jepa_kernels as jk
from jepa_kernels.cost import Cost
from jepa_kernels.models.lejepa import LeJEPA, ViTConfig
from jepa_kernels.profiling import page, parts, peaks, products, recorder
from jepa_kernels.profiling.events import HOST, OTHER, OURS, STEP, TORCH, WINDOW, Event, marks, timeline
from jepa_kernels.profiling.notes import Note, Notes, Shaped
from jepa_kernels.profiling.report import Report
from jepa_kernels.profiling.summary import duration, percent, summarise

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
        "the longest waits for an operation: 7 ms after mm, before the end (outside of parts); "
        "3 ms after the start, before linear (data); 2.5 ms after gather_tokens_forward, before mm (backward)",
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


def queued(steps, kernel, host):
    """Steps that the host marks every `host` ms, and whose kernels take `kernel` ms each on the GPU, one by one."""
    found = [span(WINDOW, 0, 1 + max(kernel, host) * steps)]
    for i in range(steps):
        at, runs = host * i, 1 + max(kernel, host) * i
        found += [
            event("aten::mm", at + 0.1, at + 0.2, id=i + 1, **MM),
            event("sgemm", runs, runs + kernel, device=True, linked=i + 1, thread=70),
            span(STEP, at + host - 0.1, at + host - 0.1),
        ]
    return found


@pytest.mark.parametrize(
    "kernel, host, ended",
    [
        (19.0, 0.5, [20, 39, 58, 77, 96]),  # the host runs ahead: a step ends with its kernel
        (1.0, 8.0, [7.9, 15.9, 23.9, 31.9, 39.9]),  # the GPU waits for the host, until the mark
    ],
)
def test_a_step_of_a_gpu_ends_with_the_kernels_that_it_launched(kernel, host, ended):
    events = queued(5, kernel, host)
    assert [end / MS for end in marks(events)] == ended
    s, slices = summarise(events, [], roofs)
    (mm,) = s.ops
    assert (s.steps, slices[-1].end / MS) == (5, ended[-1])
    assert mm.calls == pytest.approx(1) and mm.seconds == pytest.approx(kernel / 1e3)
    assert s.seconds == pytest.approx(ended[-1] / 5e3)
    one = Report(events, [], roofs, str, {}).one_step()
    assert sum(x.end - x.start for x in one if x.owner) == kernel * MS
    assert one[-1].end - one[0].start == max(kernel, host) * MS


@pytest.mark.parametrize(
    "name, shapes, values, flops, numbers",
    [
        ("bmm", [[4, 10, 20], [4, 20, 30]], [], 2 * 4 * 10 * 20 * 30, 4 * (200 + 600 + 300)),
        ("addmm", [[30], [10, 20], [20, 30], [], []], [], 2 * 10 * 20 * 30, 30 + 200 + 600 + 300),
        ("addmm", [[10, 30], [10, 20], [20, 30], [], []], [], 2 * 10 * 20 * 30, 300 + 200 + 600 + 300),
        ("mm", [[10, 20], [20, 30], [10, 30]], [], 2 * 10 * 20 * 30, 200 + 600 + 300),  # compiled code, into the last
        ("addmm", [[30], [10, 20], [20, 30], [], [], [10, 30]], [], 2 * 10 * 20 * 30, 30 + 200 + 600 + 300),
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
    """Of each step the seconds asleep, which on a busy machine are any number from 0.02 on."""
    model, slept = Plain(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        with record_function("asleep"):
            began = time.perf_counter()
            time.sleep(0.02)
            slept.append(time.perf_counter() - began)
        model(torch.randn(2, 8, 64)).square().mean().backward()
        optimizer.step()
        if mark:
            mark()
    return slept


@pytest.fixture(scope="module")
def plain():
    """A profile of three steps of it, and the hooks that were there before."""
    hooks = dict(nn.modules.module._global_forward_pre_hooks), torch.autograd.backward
    with jk.profile() as p:
        slept = loop(3)
    return p, hooks, sum(slept) / 3


def test_any_loop_is_profiled_and_left_as_it_was(plain):
    p, (hooks, backward), slept = plain
    assert dict(nn.modules.module._global_forward_pre_hooks) == hooks and torch.autograd.backward is backward
    s = Report(p.events(), p._notes, roofs, str, {}).summary
    parts = {part.name: part for part in s.parts}
    assert s.steps == 3 and set(parts) == {"asleep", "mine", "backward", "optimizer", OTHER}
    assert parts["asleep"].seconds == pytest.approx(slept, rel=0.1) and slept >= 0.02
    assert parts["asleep"].host > 0.999 * parts["asleep"].seconds
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


def test_a_start_that_fails_is_undone(monkeypatch):
    backward, objective = torch.autograd.backward, LeJEPA.objective

    def broken(*_):
        raise ZeroDivisionError

    p = jk.profile()
    for where in ("register_module_forward_pre_hook", "Notes.begin"):
        with monkeypatch.context() as patch:
            owner, name = (parts, where) if "." not in where else (Notes, "begin")
            patch.setattr(owner, name, broken)
            with pytest.raises(ZeroDivisionError):
                p.__enter__()
        assert torch.autograd.backward is backward and LeJEPA.objective is objective
        assert not torch.autograd._profiler_enabled()
    with p:
        loop(1)
    assert p.events()


def test_the_load_is_left_out_where_nobody_tells_it(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert recorder._busy() == {"load": 99.0, "cores": 3}
    monkeypatch.delattr("os.getloadavg")
    assert recorder._busy() == {}


def test_one_profile_at_a_time():
    with jk.profile() as p:
        with pytest.raises(RuntimeError, match="profile: a profile must be the only one, got another one") as inner:
            jk.profile().__enter__()
        with pytest.raises(RuntimeError, match="profile: report must come after the block, got no finished profile"):
            p.report()
    assert "end that one first" in str(inner.value)
    with torch.profiler.profile(), pytest.raises(RuntimeError, match="must be the only one"):
        jk.profile().__enter__()


def test_bandwidths_through_torch_count_what_is_read_and_what_is_written(monkeypatch):
    monkeypatch.setattr(peaks, "_seconds", lambda function, device, passes: 1e-3)
    monkeypatch.setattr(peaks, "gemm_gflops", lambda dtype, passes: 1.0)
    found, gigabytes = peaks.by_torch("cpu", quick=True), 4 * 2**25 / 1e9
    assert found["read_gbs"] == round(gigabytes / 1e-3, 1)
    assert found["copy_gbs"] == found["rmw_gbs"] == round(2 * gigabytes / 1e-3, 1)
