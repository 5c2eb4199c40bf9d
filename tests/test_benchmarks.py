"""The benchmark suite itself: statistics, order of timing, red parity, documents, pages, and one run end to end."""

import itertools
import json
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import jepa_kernels as jk
from benchmarks import __main__ as front
from benchmarks import machine, report, rows, stats, step, text, timing
from benchmarks.answering import AnsweringRun, Padded
from benchmarks.crops import CropsRun
from benchmarks.encoding import EncodingRun
from benchmarks.host import Host, HostRun
from benchmarks.measure import Interrupted, Run, Settings, floor_seconds, with_backward
from benchmarks.memory import peak_bytes
from benchmarks.models import (
    bench_encoder,
    bench_huggingface,
    bench_ijepa,
    bench_lejepa,
    bench_vjepa2,
    bench_vjepa2_ac,
    bench_vl_jepa,
    published_vjepa2_ac,
)
from benchmarks.models.published_vjepa2 import Published
from benchmarks.patched import PatchedRun
from benchmarks.planning import PlanningRun, Task
from benchmarks.selection import only_baseline
from benchmarks.workload import Workload
from jepa_kernels._core import select
from jepa_kernels.masks import MultiBlock3d, Spec3d
from jepa_kernels.models.ijepa import vit_tiny
from jepa_kernels.ops import OPS
from jepa_kernels.ops.gather_tokens import cases

ROOT = Path(__file__).resolve().parent.parent
PEAKS = {
    "copy_gbs": 40.0, "read_gbs": 30.0, "rmw_gbs": 35.0,
    "fma_gflops": {"float32": 200.0, "bfloat16": 400.0}, "gemm_gflops": {"float32": 160.0, "bfloat16": 300.0},
}  # fmt: skip
QUICK = Settings(budget_s=0.0, min_rounds=3, peaks=PEAKS)
PARTS = {"ours": {"encoder": 1e5, "backward": 2e5}, "reference": {"encoder": 2e5, "backward": 3e5}}


def row(ours_s=1e-3, its_s=2e-3, **changes):
    """A good row: 1 ms against 2 ms."""
    common = {
        "kind": "op", "name": "ema_update", "workload": "vit_s16", "pass": "forward", "dtype": "float32",
        "device": "cpu", "backend": "cpu", "bytes": 1e6, "flops": 1e5, "share_of_peak": 0.5, "peak_bytes": 64,
        "parity": {"pass": True, "max_err": 1e-7, "budget": 1e-6, "tensor": "output0"}, "threads": 2,
    }  # fmt: skip
    made = rows.timed_row(common, "lerp", np.full(7, ours_s), np.full(7, its_s))
    made.update(changes)
    return {**made, "repro": rows.repro(rows.key(made), "cpu", 2)}


def model_row(**changes):
    kind = {"kind": "model", "name": "ijepa", "workload": "vit_small_16_truncated", "pass": "step", "bytes": None}
    rest = {"baseline": "reference", "tokens_per_s": 500.0, "baseline_tokens_per_s": 400.0, "images": 4, "parts": PARTS}
    return row(**kind, **rest, **changes)


def red_row():
    common = {k: v for k, v in row().items() if k in ("kind", "name", "workload", "pass", "dtype", "device", "backend")}
    parity = {"pass": False, "max_err": None, "budget": 1e-9, "tensor": "output0"}
    common.update(workload="red", bytes=1, flops=1, parity=parity)
    found = rows.failed(common, "loop", "parity: outside the error budget")
    return {**found, "repro": rows.repro(rows.key(found), "cpu", 2)}


def document(*found, **changes):
    about = {"cpu": "A Processor", "isa": "avx2", "threads": 2, "cores": 2, "gpu": None, "host": "h", "env": {"A": "1"}}
    made = {
        "schema": rows.SCHEMA, "status": "ok", "started": "2025-01-02T03:04:05Z", "seconds": 12.0, "machine": about,
        "git": {"sha": "0123456789abcdef", "branch": "b", "dirty": False}, "peaks": PEAKS,
        "versions": {"torch": "2.13.0", "python": "3.11"}, "rows": list(found),
    }  # fmt: skip
    return {**made, **changes}


EMPTY = document(status="partial", machine={}, git={}, versions={}, peaks={})


def small(**options):
    """A workload that takes microseconds."""
    ones = {"bytes": lambda inputs, stage: 1.0, "flops": lambda inputs, stage: 1.0}
    return Workload("small", cases.rectangular(2, 9, 16, 2, 4), **ones, **options)


def test_statistics_by_hand():
    ours, baseline = np.array([1.0, 2.0, 3.0]) * 1e-6, np.array([4.0, 4.0, 4.0]) * 1e-6
    assert stats.quantiles(ours) == pytest.approx({"p10": 1.2, "p50": 2.0, "p90": 2.8})
    assert stats.ratio(ours, baseline) == pytest.approx(2.0)
    low, high = stats.ratio_ci95(ours, baseline)
    assert low == pytest.approx(4 / 3) and high == pytest.approx(4.0)
    assert stats.ratio_ci95(baseline, baseline) == [1.0, 1.0]


def test_the_interval_of_a_ratio_holds_95_percent_and_keeps_rounds_together():
    rng = np.random.default_rng(1)
    ours, noise = np.ones(400), 1 + rng.random(400)  # the median of n numbers in 0..1 has a deviation of 1 / (2 sqrt n)
    low, high = stats.ratio_ci95(ours, noise)
    assert high - low == pytest.approx(2 * 1.96 / (2 * 20), rel=0.2)
    assert stats.ratio_ci95(noise, 2 * noise) == [2.0, 2.0], "what slows a round down slows both"


def test_the_floor_is_the_longer_of_bytes_and_operations():
    assert floor_seconds(80e9, 100e9, "float32", "copy", PEAKS) == 2.0
    assert floor_seconds(80e9, 800e9, "float32", "copy", PEAKS) == 4.0
    assert floor_seconds(60e9, 100e9, "float32", "read", PEAKS) == 2.0
    assert floor_seconds(70e9, 0, "float32", "rmw", PEAKS) == 2.0
    assert floor_seconds(0, 800e9, "bfloat16", "copy", PEAKS) == 2.0
    assert floor_seconds(0, 800e9, "float16", "copy", PEAKS) == 4.0, "of no rate of its own: that of fp32"


@pytest.mark.parametrize("rounds, said", [(5, "1.50 to 2.50, 5 rounds"), (6, "1.50 to 2.50")])
def test_an_interval_of_few_rounds_says_how_many(rounds, said):
    found = row(rounds=rounds, ci95=[1.5, 2.5])
    assert text.interval(found) == said and f"[{said}]" in text.row_line(found) and said in text.row_cells(found)


@pytest.mark.parametrize(
    ("us", "shown"), [(None, "-"), (0.5, "0.5 us"), (999.4, "999 us"), (999.6, "1 ms"), (2.5e6, "2.5 s")]
)
def test_durations_have_three_digits_and_a_unit(us, shown):
    assert text.duration(us) == shown


class FakeClock:
    """Every call takes as long as its function returns; notes the order."""

    def __init__(self, stop_after=None):
        self.order, self.stop_after = [], stop_after

    def __call__(self, function, calls):
        name, seconds = function()
        self.order.append(name)
        if len(self.order) == self.stop_after:
            raise KeyboardInterrupt
        return seconds


def fake(**seconds):
    return {name: lambda name=name, s=s: (name, s) for name, s in seconds.items()}


def test_rivals_take_turns_in_an_order_that_rotates():
    clock = FakeClock()
    times = timing.interleave(fake(ours=0.5, a=0.25, b=0.25), budget_s=3.0, rounds=(2, 9), clock=clock)
    warm = 3 * 3
    assert clock.order[warm:] == ["a", "b", "ours", "b", "a", "ours", "a", "b", "ours"]
    assert times.rounds == 3 and times.calls == {"ours": 1, "a": 1, "b": 1} and not times.interrupted
    assert times.of("a").tolist() == [0.25] * 3


def test_short_functions_are_repeated_within_a_sample():
    assert timing.interleave(fake(ours=1e-5), rounds=(2, 2), clock=FakeClock()).calls == {"ours": 20}


def test_an_interrupt_keeps_complete_rounds():
    times = timing.interleave(fake(ours=0.5, a=0.5), rounds=(9, 9), clock=FakeClock(stop_after=6 + 7))
    assert times.interrupted and times.rounds == 3


def test_a_loss_is_differentiated_with_gradient_one():
    x = torch.tensor([3.0], requires_grad=True)
    assert with_backward(lambda: x.square().sum(), [x])()[0].item() == 6.0


def test_an_interrupted_run_hands_over_partial_rows(monkeypatch):
    clock = timing.Clock()
    count = itertools.count()

    def stopping(device):
        def timed(function, calls):
            if next(count) == 20:
                raise KeyboardInterrupt
            return clock(function, calls)

        return timed

    monkeypatch.setattr(timing, "Clock", stopping)
    run = Run("gather_tokens", small(), "forward", "float32", Settings(budget_s=9.0, min_rounds=50, peaks=PEAKS))
    with pytest.raises(Interrupted) as stopped:
        run.rows()
    (found,) = stopped.value.rows
    assert found["status"] == "partial" and found["ratio"] > 0 and found["rounds"] >= 3
    assert not rows.problems(document(found))


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_good_run_fills_the_schema(stage):
    run = Run("gather_tokens", small(grads=("x",)), stage, "float32", QUICK)
    found = run.rows()
    assert [r["baseline"] for r in found] == ["reference"] and found[0]["status"] == "ok"
    assert found[0]["share_of_peak"] == pytest.approx(1 / 40 / 1e9 / (found[0]["ours_us"]["p50"] / 1e6))
    assert rows.problems(document(*found)) == []


def test_parity_of_a_huge_call_is_checked_on_a_small_one():
    full, few = (small(grads=("x",)), small(grads=("x",)))
    run = Run("gather_tokens", replace(full, small=few.make), "backward", "float32", QUICK)
    assert run.rows() == []  # the reference is not timed, and there is no rival
    drawn = []
    counting = replace(full, small=lambda generator: drawn.append(1) or few.make(generator))
    Run("gather_tokens", counting, "backward", "float32", QUICK).parity()
    assert len(drawn) == 3, "exact, eager and ours"


def test_red_parity_prints_no_number(monkeypatch):
    real = jk.gather_tokens
    monkeypatch.setattr(jk, "gather_tokens", lambda *a, **k: real(*a, **k) + 1e-3)
    (found,) = Run("gather_tokens", small(), "forward", "float32", QUICK).rows()
    assert found["status"] == "failed" and not found["parity"]["pass"]
    assert all(found[f] is None for f in ("ours_us", "baseline_us", "ratio", "ci95", "share_of_peak"))
    assert "parity" in text.row_line(found) and rows.problems(document(found)) == []


@pytest.mark.parametrize(
    ("rival", "error"),
    [
        (lambda x, ids: x[:, :4].repeat(2, 1, 1), "output0 differs from the exact result by"),
        (lambda x, ids: 1.002 * x[torch.arange(4)[:, None] % 2, ids], "output0 differs from the exact result by 0.002"),
        (lambda x, ids: x[:, :4], "output0 has shape (2, 4, 16), ours (4, 4, 16)"),
        (lambda x, ids: x[7], "IndexError: index 7 is out of bounds"),
    ],
)
def test_a_rival_that_computes_something_else_has_no_number(rival, error):
    rivals = {"rivals": lambda inputs: {"wrong": lambda: rival(inputs["x"], inputs["ids"])}}
    reference, wrong = Run("gather_tokens", small(**rivals), "forward", "float32", QUICK).rows()
    assert reference["status"] == "ok" and wrong["status"] == "failed" and error in wrong["error"]


TINY = vit_tiny(crop_size=128, embed_dim=32, depth=2, num_heads=2, predictor_embed_dim=32, predictor_depth=2)


def tiny_step(truncate):
    workload = bench_ijepa.workload("tiny", TINY, 2, truncate=truncate)
    return step.StepRun("ijepa", workload, "step", "float32", QUICK)


STEP_PARTS = ["patch embedding", "encoder", "predictor", "target encoder", "loss", "backward", "optimiser",
              "moving average"]  # fmt: skip


@pytest.mark.parametrize("truncate", [True, False])
def test_a_step_fills_the_schema(truncate):
    found, sdpa = tiny_step(truncate).rows()
    assert [found["baseline"], sdpa["baseline"]] == ["reference", "sdpa"] and rows.problems(document(sdpa)) == []
    assert found["status"] == "ok" and rows.problems(document(found)) == []
    assert list(found["parts"]["ours"]) == list(found["parts"]["reference"]) == STEP_PARTS
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["ours_us"]["p50"] * 1e6)
    assert found["share_of_peak"] == pytest.approx(found["flops"] / found["ours_us"]["p50"] / 1e3 / 200.0)


def test_parts_of_a_step_leave_no_time_out(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    for stepper in tiny_step(True).steppers().values():
        stepper()
        assert stepper.parts.medians_us(1) == dict.fromkeys(STEP_PARTS, 1e6)


def test_a_wrong_step_prints_no_number(monkeypatch):
    real = jk.latent_loss
    fault = lambda *a, **k: real(*a, **k) * (1.0 if select._override else 1.0001)  # noqa: E731
    monkeypatch.setattr(jk, "latent_loss", fault)
    for found in tiny_step(True).rows():
        assert found["status"] == "failed" and found["ratio"] is None and not found["parity"]["pass"]


def one_spec():
    """Of equal lengths: the plain form of the predictor pads to the longest sequence, and torch counts that too."""
    masks = MultiBlock3d(bench_vjepa2.grid_of(bench_vjepa2.SMALL), specs=(Spec3d(),), truncate=True)
    workload = replace(bench_vjepa2.WORKLOADS[-1], masks=partial(masks, 2, step=0))
    return step.StepRun("vjepa2", workload, "step", "float32", QUICK)


@pytest.mark.parametrize("run", [partial(tiny_step, True), one_spec], ids=["ijepa", "vjepa2"])
def test_step_flops_are_those_that_torch_counts(run):
    run = run()
    with jk.use_backend("reference"), FlopCounterMode(display=False) as counter:
        step.gradients(run.ours(run.workload), run.inputs.pixels, run.inputs.masks)
    assert run.common({})["flops"] == counter.get_total_flops()


def video_step(packed):
    workload = bench_vjepa2.workload("small", bench_vjepa2.SMALL, 2, packed=packed)
    return step.StepRun("vjepa2", workload, "step", "float32", QUICK)


def test_a_video_step_is_timed_against_the_published_form_of_the_same_loss(monkeypatch):
    (found,) = video_step(packed=False).rows()
    assert (found["baseline"], found["status"], found["kind"]) == ("published", "ok", "model")
    assert found["tokens"] == found["baseline_tokens"] and rows.problems(document(found)) == []
    honest = Published.compare
    monkeypatch.setattr(Published, "compare", lambda *given: 1.01 * honest(*given))
    (found,) = video_step(packed=False).rows()
    assert found["status"] == "failed" and "the loss differs by 0.01 of it" in found["error"]


def test_a_packed_video_step_shows_times_of_one_token_of_each_side():
    run = video_step(packed=True)
    times = timing.Times({"ours": [2.0] * 3, "published": [3.0] * 3})
    found = run.row(run.common({"pass": True}), "published", times, {})
    assert found["tokens"] > found["baseline_tokens"] > 0, "truncation drops tokens"
    assert found["ours_us"]["p50"] * found["tokens"] == pytest.approx(2e6)
    assert found["baseline_us"]["p50"] * found["baseline_tokens"] == pytest.approx(3e6)
    assert found["share_of_peak"] == pytest.approx(found["flops"] / 2.0 / 200e9)


def test_an_encoder_shows_measured_times_of_one_token_of_each_side():
    run = EncodingRun("encoder", bench_encoder.WORKLOADS[-1], "backward", "float32", QUICK)
    times = timing.Times({"ours": [2.0] * 3, "loop": [3.0] * 3})
    found = run.row(run.common({"pass": True}), "loop", times, {})
    assert found["tokens"] > found["baseline_tokens"] > 0, "truncation drops tokens"
    assert found["ours_us"]["p50"] * found["tokens"] == pytest.approx(2e6)
    assert found["baseline_us"]["p50"] * found["baseline_tokens"] == pytest.approx(3e6)
    assert found["share_of_peak"] == pytest.approx(run.workload.flops(run.lengths) / 2.0 / 200e9)
    assert rows.problems(document(found)) == [] and "_per_token/" in rows.key(found)


def test_a_predictor_is_timed_against_padding_that_predicts_the_same(monkeypatch):
    run = AnsweringRun("vl_jepa", bench_vl_jepa.WORKLOADS[-1], "backward", "float32", QUICK)
    (found,) = run.rows()
    assert found["status"] == "ok" and rows.problems(document(found)) == []
    lengths = [len(v) + len(q) for v, q in zip(run.visual, run.questions, strict=True)]
    assert (found["tokens"], found["baseline_tokens"]) == (sum(lengths), 3 * max(lengths))
    honest = Padded.turn
    monkeypatch.setattr(Padded, "turn", lambda *given: 1.1 * honest(*given))
    (found,) = run.rows()
    assert found["status"] == "failed" and "its embeddings differ by" in found["error"]


def test_a_patched_model_is_timed_against_itself_unless_it_gives_other_numbers():
    def wrong(model):
        model.encoder.layernorm.weight.data.mul_(1.001)

    smoke = bench_huggingface.WORKLOADS[-1]
    for workload, status in ((smoke, "ok"), (replace(smoke, patch=wrong), "failed")):
        (found,) = PatchedRun("huggingface", workload, "forward", "float32", QUICK).rows()
        assert (found["baseline"], found["status"]) == ("unpatched", status) and rows.problems(document(found)) == []


def test_a_step_on_crops_is_timed_against_a_recipe_of_equal_gradients_alone():
    def biased(*views):
        return original(*views) + 0.001 * recipe.backbone.norm.weight.sum()  # as much loss, another gradient

    smoke = bench_lejepa.WORKLOADS[-1]
    (found,) = CropsRun("lejepa", smoke, "step", "float32", QUICK).rows()
    assert (found["baseline"], found["status"], found["images"]) == ("recipe", "ok", 16)
    assert rows.problems(document(found)) == [] and found["tokens"] == 16 * (2 * 4 + 6)
    recipe = smoke.small.recipe()
    original, recipe.loss = recipe.loss, biased
    biased_one = replace(smoke, small=replace(smoke.small, recipe=lambda: recipe))
    (found,) = CropsRun("lejepa", biased_one, "step", "float32", QUICK).rows()
    assert found["status"] == "failed" and " differs by " in found["error"] and found["ratio"] is None


@pytest.mark.parametrize("expected, status", [((1, 2), "ok"), ((2, 1), "failed")])
def test_host_code_has_a_number_only_where_its_result_is_equal(expected, status):
    workload = Host(
        "small", lambda: [1, 2], lambda: expected, tuple, {"loop": lambda: None, "other": lambda: None}, 8.0
    )
    found = HostRun("masks", workload, "forward", "int64", QUICK).rows()
    assert [(r["baseline"], r["status"]) for r in found] == [("loop", status), ("other", status)]
    assert rows.problems(document(*found)) == [] and all((r["ratio"] is None) == (status == "failed") for r in found)
    assert found[0]["repro"].startswith("python -m benchmarks --row masks/small/forward/int64/loop ")


def test_schema_is_the_published_one():
    assert set(rows.FIELDS) == {
        "kind", "name", "workload", "pass", "dtype", "device", "backend", "baseline", "ours_us", "baseline_us", "ratio",
        "parity", "bytes", "flops", "share_of_peak", "peak_bytes", "ci95", "status", "repro",
    }  # fmt: skip
    assert rows.problems(document(row(), model_row(), red_row())) == rows.problems(EMPTY) == []


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (document(schema="jepa-bench/2"), "schema is 'jepa-bench/2', not 'jepa-bench/1'"),
        ({"schema": rows.SCHEMA, "machine": {}, "versions": {}, "peaks": {}, "rows": []}, "git is missing"),
        (document(rows={}), "rows is not a list"),
        (document({k: v for k, v in row().items() if k != "bytes"}), "row 0: bytes is missing"),
        (document(row(), row(ratio="fast")), "row 1: ratio is a str"),
        (document(row(**{"pass": "sideways"})), "row 0: pass is 'sideways'"),
        (document(row(status="good")), "row 0: status is 'good'"),
        (document(row(parity={"pass": False})), "row 0: ok without parity"),
        (document(row(ours_us=None, ratio=None)), "row 0: ok without ours_us"),
        (document(row(status="failed")), "row 0: failed with a number"),
        (document(row(ratio=2.1)), "row 0: ratio is not baseline p50 / ours p50"),
    ],
)
def test_schema_problems_are_named(bad, problem):
    assert problem in rows.problems(bad)


def test_a_rivals_plan_of_fewer_iterations_is_stated_as_a_whole_one(monkeypatch):
    planner, iterations = published_vjepa2_ac.Published, []
    rollout = planner.rollout
    monkeypatch.setattr(planner, "rollout", lambda *given: iterations.append(1) or rollout(*given))
    short = replace(bench_vjepa2_ac.CHECKED, rival_iterations=1)  # of 2
    run = PlanningRun("vjepa2_ac", short, "forward", "float32", Settings())
    Task(short, "cpu").published()()
    assert len(iterations) == 1
    times = timing.Times({"ours": [1.0] * 3, "published": [3.0] * 3})
    found = run.row(run.common({"pass": True, "max_err": 0, "budget": 1, "tensor": "x"}), "published", times, {})
    assert (found["ours_us"]["p50"], found["baseline_us"]["p50"], found["ratio"]) == (1e6, 6e6, 6)


def test_peak_memory_is_what_torch_and_our_blocks_hold():
    x, ids = torch.ones(1, 4096, 512), torch.arange(4096)[None]  # 8 MiB, more than the least block
    whole = x.numel() * 4

    def ours():
        return jk.gather_tokens(x, ids, backend="cpu")

    for call, held in ((lambda: x + 1, 1), (ours, 1), (lambda: (x + 1, ours()), 2), (lambda: (x + 1).add_(1).sum(), 1)):
        call()
        assert held * whole <= peak_bytes(call) < (held + 0.1) * whole


def test_a_copy_without_its_repository_names_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("JEPA_COMMIT", "abc")
    assert machine.git() == {"sha": "abc", "branch": None, "dirty": None}


def test_every_op_has_a_benchmark():
    assert {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks/ops").glob("bench_*.py")} == set(OPS)


def test_page_needs_nothing_else(tmp_path):
    done = document(row(), row(baseline="loop"), model_row(), red_row(), row(status="partial", workload="cut"))
    page = report.write_all(done, tmp_path).read_text()
    assert "<link" not in page and "http" not in page and 'src="data:image/png;base64,' in page
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert "✗ parity is red: no number" in page and "2 of 5 rows without a full result" in page
    assert row()["repro"] in page and "✓ reached" in page and "500 tokens/s against 400" in page
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize(
    "unfinished", [EMPTY, document(status="failed"), document(red_row()), document(row(), peaks={})]
)
def test_page_of_an_unfinished_run(unfinished, tmp_path):
    page = report.write_all(unfinished, tmp_path).read_text()
    assert "not measured" in page and not (tmp_path / "roofline.png").exists()
    assert ("No row was measured." in page) == (not unfinished["rows"])
    text.terminal(unfinished)


def test_repro_command_measures_that_row():
    program, *argv = shlex.split(row()["repro"])
    assert program == "python" and argv[:2] == ["-m", "benchmarks"]
    args = front.parse(argv[2:])
    assert args.row == ["ema_update/vit_s16/forward/float32/lerp"] and args.threads == 2
    assert f"--row={args.row[0]}" in front.command(args)


def test_ctrl_c_keeps_the_rows_so_far(tmp_path, monkeypatch):
    events, latest = tmp_path / "events.jsonl", tmp_path / "latest.json"
    write = "import json, sys, time; print(json.dumps({'event': 'rows', 'rows': json.loads(sys.argv[1])}), flush=True)"
    with events.open("w") as stream:
        child = subprocess.Popen([sys.executable, "-c", f"{write}; time.sleep(60)", json.dumps([row()])], stdout=stream)
    seen = lambda self, found: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    monkeypatch.setattr(text.Progress, "rows", seen)
    kept = document()
    assert front.watch(child, events, kept, latest) == front.INTERRUPTED
    assert [r["name"] for r in kept["rows"]] == ["ema_update"] and child.returncode == -signal.SIGINT
    assert 0 < kept["first_row_s"] < 60


def test_one_row_end_to_end(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--smoke", "--budget", "0.05", "--out", str(tmp_path), "--row"]
    done = subprocess.run(
        [*command, "ema_update/vit_s16/forward/float32/lerp"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "latest.json").read_text())
    assert rows.problems(found) == [] and found["status"] == "ok" and found["selection"] == "chosen"
    assert [rows.key(r) for r in found["rows"]] == ["ema_update/vit_s16/forward/float32/lerp"]
    assert {*found["peaks"]} >= {*PEAKS} and all(rate > 0 for rate in found["peaks"]["gemm_gflops"].values())
    page = (tmp_path / "report.html").read_text()
    assert "<h1>jepa_kernels benchmarks</h1>" in page and "<small>first row after</small>" in page
    assert 0 < found["first_row_s"] <= found["seconds"]


def test_a_baseline_is_taken_where_every_row_names_it_and_an_unknown_one_is_refused(tmp_path):
    rope, ema = "rope/a/forward/float32", "ema_update/b/forward/float32"
    assert only_baseline([f"{rope}/loop", f"{ema}/loop"]) == "loop"
    assert only_baseline([f"{rope}/loop", f"{ema}/lerp"]) is only_baseline([f"{rope}/loop", ema]) is None
    asked = "collapse_stats/vit_s16_b4/forward/float32/eagre"
    command = [sys.executable, "-m", "benchmarks", "--budget", "0.05", "--out", str(tmp_path), "--row", asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "measured against, got 'eagre'; leave it out for all" in done.stderr


def test_a_file_as_output_folder_is_named(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert front.main(["--out", str(tmp_path / "taken")]) == 2
    assert "bench: --out" in (said := capsys.readouterr().err) and "must be a folder with room to write, got" in said
