"""Benchmarks are pytest-benchmark tests. The `bench` fixture measures one run; rows go to the front end as events.

`pytest benchmarks/ops/bench_ema_update.py` works by itself too and prints the machine and its rows.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks import machine, rows
from benchmarks.answering import AnsweringRun
from benchmarks.crops import CropsRun
from benchmarks.encoding import EncodingRun
from benchmarks.host import HostRun
from benchmarks.measure import Interrupted, Run, Settings
from benchmarks.modelrun import ModelRun
from benchmarks.patched import PatchedRun
from benchmarks.planning import PlanningRun
from benchmarks.selection import Selection, brief, instead, only_baseline
from benchmarks.step import StepRun
from benchmarks.text import row_line
from jepa_kernels._core.select import BACKENDS
from jepa_kernels.about import cores
from jepa_kernels.profiling.peaks import measured

AnyRun = Run | ModelRun | HostRun
FIRST = "collapse_stats"  # takes two seconds: who waits for a first row has it soon


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("jepa_kernels")
    group.addoption("--smoke", action="store_true", help="the one-minute selection, fewer rounds")
    group.addoption("--brief", action="store_true", help="the six-minute selection, of what README shows")
    group.addoption("--row", action="append", default=[], help="name[/workload[/pass[/dtype[/baseline]]]]")
    for name in ("--op", "--workload", "--dtype"):
        group.addoption(name, action="append", default=[], help="measure only these; may be repeated")
    group.addoption("--backend", help="of ours, by name: ops alone, and no other backend in its place")
    group.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--threads", type=int, default=cores())
    group.addoption("--budget", type=float, default=None, help="seconds of timing per run")


def emit(**event: Any) -> None:
    """One line to the front end, if there is one."""
    path = os.environ.get("JEPA_BENCH_EVENTS")
    if path:
        with open(path, "a") as stream:
            stream.write(json.dumps(event, default=rows._plain) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    # An op without a kernel for this device is measured on its reference: a warning, not an error as in the tests.
    config.addinivalue_line("filterwarnings", "default::jepa_kernels.BackendWarning")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        emit(event="note", text=f"skipped {report.nodeid}: {report.longrepr[2]}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    option, device = config.getoption, config.getoption("--bench-device")
    selection = Selection(option("--row"), option("--op"), option("--workload"), option("--dtype"))
    here = [item.callspec.id for item in items if hasattr(item, "callspec") and device in devices(item)]
    why = (selection.problem(here) if selection else None) or unknown_backend(option("--backend"))
    chosen = [item for item in items if _wanted(item, config, selection)]
    if items and not chosen:
        narrowing = [
            f"--{name}" for name in ("row", "op", "workload", "dtype", "smoke", "backend") if option(f"--{name}")
        ]
        given = ", ".join([*narrowing, f"--device {device}"])
        why = why or f"{given} must leave at least one run to measure, got none; leave one of them out"
    if why:
        emit(event="refused", why=why)
        raise pytest.UsageError(why)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = sorted(chosen, key=lambda item: f"[{FIRST}/" not in item.nodeid)
    emit(event="collected", count=len(chosen))


def devices(item: pytest.Item) -> tuple[str, ...]:
    return item.callspec.params["workload"].devices


def unknown_backend(name: str | None) -> str | None:
    if name is None or name in BACKENDS:
        return None
    return f"--backend must name a backend of ours, {instead(name, BACKENDS)}"


def _wanted(item: pytest.Item, config: pytest.Config, selection: Selection) -> bool:
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return True
    if config.getoption("--bench-device") not in devices(item):
        return False
    if config.getoption("--backend") and "bench" not in item.fixturenames:  # a whole model has ops of several
        return False
    if config.getoption("--smoke") and not (
        callspec.params["workload"].smoke and callspec.params["dtype"] == "float32"
    ):
        return False
    if not selection:  # a stand-in of the one-minute run says nothing that the whole run doesn't
        stand_in = callspec.params["workload"].name.startswith("smoke_")
        return config.getoption("--smoke") or not (stand_in or (config.getoption("--brief") and not brief(callspec.id)))
    return selection.takes(callspec.id)


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    """The machine line is printed, and the peaks are measured, before the first row."""
    option = request.config.getoption
    device, smoke, threads = option("--bench-device"), option("--smoke"), option("--threads")
    about = machine.machine(device, threads)
    peaks = measured(device, threads, quick=smoke)
    emit(event="header", machine=about, git=machine.git(), versions=machine.versions(), peaks=peaks)
    if "JEPA_BENCH_EVENTS" not in os.environ:
        print(f"\n{machine.line(about)}")
    return Settings(
        device=device,
        threads=threads,
        budget_s=option("--budget") or (0.2 if smoke else 0.5),
        min_rounds=5 if smoke else 7,
        baseline=only_baseline(option("--row")),
        backend=option("--backend"),
        peaks=peaks,
    )


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Iterator[Callable[[list[rows.Row]], None]]:
    """Takes a run's rows: to the front end, to pytest-benchmark's extra_info, or to the terminal."""
    emit(event="start", id=request.node.callspec.id)

    def take(found: list[rows.Row]) -> None:
        emit(event="rows", rows=found)
        benchmark.extra_info["rows"] = found
        if "JEPA_BENCH_EVENTS" not in os.environ:
            print("", *map(row_line, found), sep="\n  ")

    yield take
    if "torch._dynamo" in sys.modules:  # its import takes seconds
        torch._dynamo.reset()


@pytest.fixture
def measure(benchmark: Any, record: Callable[[list[rows.Row]], None]) -> Callable[[Any], None]:
    """Measures a run of any kind: parity, then time against every rival; fails where parity is red."""

    def drive(target: Callable[[], object], setup: Callable[[], object], rounds: int) -> None:
        benchmark.pedantic(target, setup=setup, rounds=rounds, iterations=1)

    def measured(run: AnyRun) -> None:
        benchmark.group = run.group
        try:
            found = run.rows(drive)
        except Interrupted as stopped:
            record(stopped.rows)
            raise
        wanted = run.settings.baseline
        if wanted is not None and wanted not in {row["baseline"] for row in found}:
            why = f"--row must end with what {run.group} is measured against, got {wanted!r}; leave it out for all"
            emit(event="refused", why=why)
            pytest.fail(why, pytrace=False)
        record(found)
        red = [row for row in found if not row["parity"]["pass"]]
        if red:
            pytest.fail(f"{run.group}: no number, {red[0]['error']}: {red[0]['parity']}", pytrace=False)

    return measured


def measuring(kind: type[Run] | type[ModelRun] | type[HostRun]) -> Any:
    """The fixture that a benchmark calls with its parameters: (op or model, workload, stage, dtype)."""

    @pytest.fixture
    def bench(settings: Settings, measure: Callable[[AnyRun], None]) -> Callable[..., None]:
        return lambda *what: measure(kind(*what, settings))

    return bench


bench, bench_host = measuring(Run), measuring(HostRun)
bench_step, bench_encoding, bench_crops = map(measuring, (StepRun, EncodingRun, CropsRun))
bench_patched, bench_planning, bench_answering = map(measuring, (PatchedRun, PlanningRun, AnsweringRun))
