"""The log of a run, metrics.jsonl: a line for each step, written and shown by the first process."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from jepa_kernels import report
from jepa_kernels._core.check import fail
from jepa_kernels.data import extra
from jepa_kernels.training import measures, page, saves
from jepa_kernels.training.measures import Meter
from jepa_kernels.training.ranks import Agreed, Ranks
from jepa_kernels.training.trainer import Trainer


@contextmanager
def alone(out: Path, ranks: Ranks) -> Iterator[None]:
    """Within it no other run writes in this folder: ValueError on all ranks where one does."""
    held = os.open(out, os.O_RDONLY)
    try:
        with ranks.together():
            if ranks.first:
                _lock(out, held)
        yield
    finally:
        os.close(held)


def _lock(out: Path, held: int) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail("train", "--out", "be a folder that no other run writes in", out, "wait for it, or pass another --out")
    except OSError:  # a file system without locks
        pass


@contextmanager
def opened(
    out: Path, trainer: Trainer, meter: Meter, kept: saves.Saves
) -> Iterator[Callable[[Iterable[dict[str, Any]]], bool]]:
    """What checks rows, and on the first rank writes and shows them; whether any rank had asked to stop before them."""
    with _writer(out, trainer, meter) if trainer.ranks.first else nullcontext(lambda row: None) as write:

        def show(rows: Iterable[dict[str, Any]]) -> bool:
            ended = False
            for row in rows:
                ended |= row.pop("asked") > 0
                _check_finite(row, trainer.config.optimization.nonfinite)
                write(row)
                kept.seen(row)
            return ended

        yield show


def _check_finite(row: dict[str, Any], what: str) -> None:
    """A step without finite gradients, whose weights are as before: the run ends, or goes on."""
    if row["skipped"] and what == "stop":
        raise Agreed(
            f"train: the norm of gradients must be finite, got {row['grad_norm']} at step {row['step']} "
            f"(loss {row['loss']}); --resume with --set optimization.nonfinite=skip, or begin with a lower rate"
        )


@contextmanager
def _writer(out: Path, trainer: Trainer, meter: Meter) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Into metrics.jsonl, whose first row since a start says what is run and on what, and wherever it is looked at."""
    metrics, total = out / page.METRICS, trainer.config.optimization.steps
    _drop_rows_after(metrics, trainer.step)
    first = {"run": about(trainer) | {"peak_flops": meter.peak}}
    board = measures.board(out, trainer.step)
    with _progress(total, trainer.step) as show, board as plot, open(metrics, "ab", buffering=0) as log:

        def write(row: dict[str, Any]) -> None:
            _append(log, row | first)
            first.clear()
            plot(row)
            show(row)

        yield write


def about(trainer: Trainer) -> dict[str, Any]:
    """What is needed to repeat a run."""
    return {
        "world": trainer.ranks.world,
        "config": trainer.config.plain(),
        "machine": report.machine(trainer.device),
        "commit": report.commit(),
    }


def _append(log: io.FileIO, row: dict[str, Any]) -> None:
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}  # JSON has no NaN
    line = (json.dumps(known) + "\n").encode()
    try:
        if log.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise report.unwritable(Path(log.name), error, len(line)) from error


def _drop_rows_after(metrics: Path, step: int) -> None:
    """Steps after the checkpoint are about to be done again; a crash may have torn the last row."""
    if metrics.exists():
        rows = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        report.write(metrics, "".join(row for row in rows if json.loads(row)["step"] <= step).encode())


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    rich = extra("rich.progress")
    text = rich.TextColumn("loss {task.fields[loss]:.4f}  std {task.fields[std]:.3f}  rank {task.fields[rank]:.1f}")
    columns = ("step", rich.BarColumn(), rich.MofNCompleteColumn(), text, rich.TimeRemainingColumn())
    with rich.Progress(*columns) as bar:
        task = bar.add_task("train", total=total, completed=done, loss=math.nan, std=math.nan, rank=math.nan)
        yield lambda row: bar.update(task, completed=row["step"], **{k: row[k] for k in ("loss", "std", "rank")})
