"""Instructions of the CPU kernels, counted under valgrind: what CI holds them to, since wall clock depends on the day.

`python -m benchmarks.instructions` records the calls that each op's SMALL workloads make into `_C`, plays them in one
process of valgrind's (benchmarks/replay.py), and compares what it counts with benchmarks/results/instructions.json:
more than 2 % above fails. `--adopt` writes the new counts there. valgrind knows no AVX-512: the AVX2 kernels are
counted, on one thread, their own code alone, without libc's and torch's. The floor: an instruction for every 32 bytes
that have to be moved, or for every 16 operations, whichever is more.
"""

import argparse
import importlib
import json
import math
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import jepa_kernels as jk
from benchmarks import measure, replay, rows, text
from jepa_kernels import report, testing
from jepa_kernels._core import define, extension
from jepa_kernels._core.select import short
from jepa_kernels.ops import OPS

COMMITTED = Path(__file__).parent / "results" / "instructions.json"
TOLERANCE = 0.02
KERNELS = "jepa::avx2::*_cpu(*Params const&)"  # entries of the kernels: nothing else is counted
MARK = "jepa::set_isa(char const*)"  # replay.py calls it before each row
WIDTH, OPERATIONS = 32, 16  # bytes that an instruction moves; a multiply-add of 8 fp32 numbers
TORCH_MULTIPLIES = ("collapse_stats",)  # its floor is not that of what is counted
SCHEMA = "jepa-instructions/1"
Call = tuple[str, list[Any]]
_C: Any = extension.load()  # or why it is not there: measured() says so


class NoValgrind(RuntimeError):
    """Nothing can be counted here."""


def small() -> Iterator[measure.Run]:
    """Each op's SMALL workloads, in every dtype and pass."""
    for op in OPS:
        for workload in importlib.import_module(f"benchmarks.ops.bench_{op}").SMALL:
            for dtype in workload.dtypes:
                for stage in workload.stages:
                    yield measure.Run(op, workload, stage, dtype, measure.Settings(threads=1))


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Calls of `_C`'s functions, with copies of what they were given."""
    calls: list[Call] = []
    lists: dict[int, Any] = {}
    functions = {name: f for name, f in vars(_C).items() if callable(f) and not isinstance(f, type)}
    prepared = dict(define._implementations)
    define._implementations.clear()
    for name, function in functions.items():
        setattr(_C, name, recorder(name, function, calls, lists))
    try:
        yield calls
    finally:
        for name, function in functions.items():
            setattr(_C, name, function)
        define._implementations.clear()
        define._implementations.update(prepared)


def recorder(name: str, function: Callable[..., Any], calls: list[Call], lists: dict[int, Any]) -> Callable[..., Any]:
    """lists: what each TensorLists was read from, by id; kept alive with it."""

    def call(*args: Any, **options: Any) -> Any:
        if name == "read_lists":
            found = function(*args, **options)
            lists[id(found)] = found, args[0]
            return found
        calls.append((name, [written(a, lists) for a in args]))
        return function(*args, **options)

    return call


def written(value: Any, lists: dict[int, Any]) -> tuple[str, Any]:
    """(kind, what replay.argument makes the argument from)."""
    if isinstance(value, torch.Tensor):
        span = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
        memory = value.detach().as_strided((span if value.numel() else 0,), (1,))
        data = memory.view(torch.uint8).numpy().tobytes()
        return "tensor", (short(value.dtype), tuple(value.shape), value.stride(), data)
    if isinstance(value, torch.dtype):
        return "dtype", short(value)
    if isinstance(value, _C.TensorLists):
        return "lists", [written(x, lists) for x in lists[id(value)][1]]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [written(x, lists) for x in value]
    return "plain", value


def record(runs: list[measure.Run]) -> dict[str, list[Call]]:
    """The calls of every row; raises RuntimeError where parity is red."""
    found = {}
    for run in runs:
        parity, _ = run.parity()
        if not parity["pass"]:
            raise RuntimeError(f"{run.group}: parity is red, nothing is counted: {parity}")
        inputs = run.checked()
        with jk.use_backend("cpu"), recorded() as calls:
            testing.run(run.public, inputs, run.case)
        found[run.group] = [call for call in calls if call[0] not in ("isa", "set_isa")]
    return found


def count(calls: dict[str, list[Call]]) -> dict[str, int]:
    """Instructions of every row."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "calls", Path(folder) / "out"
        given.write_bytes(pickle.dumps(list(calls.values())))
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--collect-atstart=no",
            f"--toggle-collect={KERNELS}", f"--dump-before={MARK}", "--compress-strings=no", "--compress-pos=no",
            sys.executable, "-I", "-S", replay.__file__, _C.__file__, str(given),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"valgrind must play the calls, got {done.stderr[-2000:]}")
        parts = sorted(Path(folder).glob("out.*"), key=lambda p: int(p.suffix[1:]))
        counts = [own(part.read_text()) for part in parts[1:]]  # the first: before any row
    if len(counts) != len(calls) or not all(counts):
        raise RuntimeError(f"{_C.__file__} must have its symbols, got no {KERNELS}; build it without stripping")
    return dict(zip(calls, counts, strict=True))


def own(dump: str) -> int:
    """Instructions of the functions of `_C` themselves, of one of callgrind's files."""
    total, ours, inclusive = 0, False, False
    for line in dump.splitlines():
        if line.startswith("ob="):
            ours = line == f"ob={_C.__file__}"
        elif line.startswith("calls="):
            inclusive = True  # the next line is the callee's
        elif line[:1].isdigit():
            total += 0 if inclusive or not ours else int(line.split()[1])
            inclusive = False
    return total


def floor(run: measure.Run) -> int | None:
    """The least instructions that could do it."""
    if run.op in TORCH_MULTIPLIES:
        return None
    with jk.use_backend("cpu"):  # what a small call would leave to torch states nothing
        moved, computed = run.cost(run.checked())
    return math.ceil(max(moved / WIDTH, computed / OPERATIONS))


def measured() -> dict[str, Any]:
    """The document that is committed; raises RuntimeError where it can't be counted."""
    if why := extension.reason("cpu"):
        raise RuntimeError(f"the CPU kernels must run here, got: {why}")
    if not shutil.which("valgrind"):
        raise NoValgrind("valgrind must be on PATH, got none; apt-get install valgrind")
    torch.set_num_threads(1)
    runs = list(small())
    counts = count(record(runs))
    return {
        "schema": SCHEMA,
        "compiler": _C.build_info()["compiler"],
        "commit": report.commit(),
        "rows": {run.group: {"instructions": counts[run.group], "floor": floor(run)} for run in runs},
    }


def judge(found: dict[str, Any], committed: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(what fails, what is only said), a line for each row that differs by more than TOLERANCE."""
    if found["compiler"] != committed["compiler"]:
        theirs = committed["compiler"]
        return [], [f"not compared: built by compiler {found['compiler']}, counts are committed of {theirs}"]
    failing, said = [], []
    for key in sorted({*found["rows"], *committed["rows"]}):
        now, before = (document["rows"].get(key, {}).get("instructions") for document in (found, committed))
        if before is None:
            failing.append(f"{key}: {now} instructions, none are committed; run with --adopt")
        elif now is None:
            failing.append(f"{key}: committed, but not counted any more; run with --adopt")
        elif now > before * (1 + TOLERANCE):
            failing.append(f"{key}: {now} instructions, {now / before - 1:.1%} more than the committed {before}")
        elif now < before * (1 - TOLERANCE):
            said.append(f"{key}: {now} instructions, {1 - now / before:.1%} fewer than {before}; keep it by --adopt")
    return failing, said


def cells(row: tuple[str, dict[str, Any]]) -> tuple[str, ...]:
    key, one = row
    share = text.times(one["floor"] and one["instructions"] / one["floor"])
    return key, f"{one['instructions']:,}", share


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--adopt", action="store_true", help=f"write what is counted to {COMMITTED.name}")
    args = parser.parse_args(argv)
    try:
        return compare(measured(), args.adopt)
    except KeyboardInterrupt:
        print("instructions: interrupted, nothing is written", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"instructions: {COMMITTED} must be a file to read, and to write with --adopt, got {error.strerror}; "
              "run from a checkout of your own", file=sys.stderr)  # fmt: skip
        return 2
    except RuntimeError as error:
        print(f"instructions: {error}", file=sys.stderr)
        return 2


def compare(found: dict[str, Any], adopt: bool) -> int:
    """Show what is counted; write it, or hold it to what is committed. The exit code."""
    text.show("Instructions", ("row", "instructions", "of the floor"), list(map(cells, found["rows"].items())), (1, 2))
    if adopt:
        rows.write(COMMITTED, found)
        return 0
    failing, said = judge(found, json.loads(COMMITTED.read_text()))
    print(*said, sep="\n")
    print(*failing, sep="\n", file=sys.stderr)
    return bool(failing)


if __name__ == "__main__":
    sys.exit(main())
