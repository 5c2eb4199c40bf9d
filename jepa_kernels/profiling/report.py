"""A profile's report: tables to print, and a folder of a page, a trace and all numbers."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from jepa_kernels import files, report
from jepa_kernels._core.check import fail
from jepa_kernels.data import extra
from jepa_kernels.profiling import page
from jepa_kernels.profiling.events import NOTED, Event, Slice, marks
from jepa_kernels.profiling.notes import Note
from jepa_kernels.profiling.summary import Op, Summary, duration, percent, summarise

OP = "profile"
PAGE, TRACE, NUMBERS = "profile.html", "trace.json", "profile.json"
NARROW, SHOWN = 100, 16  # characters of a terminal below which columns are left out; operations that a table shows


class Report:
    """summary: the numbers, means over the steps (`Summary`). print(report): its tables."""

    def __init__(
        self,
        events: Sequence[Event],
        notes: Sequence[Note],
        roofs: Callable[[str], dict[str, Any]],
        export: Callable[[str], object],
        about: dict[str, Any],
    ) -> None:
        self._events, self._notes, self._roofs, self._export = events, notes, roofs, export
        self.about = about

    @cached_property
    def _found(self) -> tuple[Summary, list[Slice]]:
        return summarise(self._events, self._notes, self._roofs)

    @property
    def summary(self) -> Summary:
        return self._found[0]

    @property
    def slices(self) -> list[Slice]:
        """The line of time, without gaps."""
        return self._found[1]

    @cached_property
    def machine(self) -> dict[str, Any]:
        return report.machine(torch.device(self.summary.device))

    def headline(self) -> str:
        """The step in a line, and what it was measured on."""
        s, machine = self.summary, self.machine
        named = f"{self.about['model']}: " if "model" in self.about else ""
        ended = ", interrupted" if self.about.get("interrupted") else ""
        load = self.about.get("load")
        waits = "" if load is None else f"\nthe machine was busy: load {load:.1f} on {self.about['cores']} cores"
        return (
            f"{named}{duration(s.seconds)} a step ({s.steps} profiled{ended}), {percent(s.accounted)} accounted for, "
            f"{percent(s.in_operations)} in operations\n"
            f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}{waits}"
        )

    def table(self, width: int | None = None) -> str:
        """Parts and operations as tables, and the greatest gaps in words. width: characters; None: the terminal's."""
        width = shutil.get_terminal_size((120, 24)).columns if width is None else width
        console = extra("rich.console", OP).Console(
            file=io.StringIO(), width=max(width, 30), color_system=None, force_terminal=False, highlight=False
        )
        for line in (self.headline(), self._part_table(), self._op_table(width)):
            console.print(line, markup=False) if isinstance(line, str) else console.print(line)
        for said in self.summary.words:
            console.print(f"- {said}", markup=False)
        return console.file.getvalue()

    __str__ = table

    def _part_table(self) -> Any:
        s = self.summary
        noted = any(p.profiling > 0.001 * s.seconds for p in s.parts)
        head = ["part", "time", "share", "our ops", "torch's", "no op", *(["profiling"] if noted else [])]
        rows = [
            [p.name, duration(p.seconds), percent(p.seconds / s.seconds), duration(p.ours), duration(p.torch),
             duration(p.host), *([duration(p.profiling)] if noted else [])]
            for p in s.parts
        ]  # fmt: skip
        total = [sum(getattr(p, kind) for p in s.parts) for kind in ("seconds", "ours", "torch", "host", NOTED)]
        cells = [*map(duration, total[1:4]), *([duration(total[4])] if noted else [])]
        return _table(head, [*rows, ["the step", duration(s.seconds), "100 %", *cells]])

    def _op_table(self, width: int) -> Any:
        shown, rest = self.summary.ops[:SHOWN], self.summary.ops[SHOWN:]
        wide = width >= NARROW
        head = ["operation", *(["kernel", "dtype"] if wide else []), "calls", "time", "floor", "of peak"]
        head += ["GB/s", "GFLOP/s"] if wide else []
        rows = [self._cells(op, wide) for op in shown]
        if rest:
            label = f"{len(rest)} others"
            rows.append([label, *(["", ""] if wide else []), "", duration(sum(op.seconds for op in rest))])
        return _table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows])

    def _cells(self, op: Op, wide: bool) -> list[str]:
        rates = [_rate(op.rate(op.bytes)), _rate(op.rate(op.flops))] if wide else []
        kernel = [op.backend, op.dtype] if wide else []
        cells = [f"{op.calls:.4g}", duration(op.seconds), duration(op.floor), percent(op.share())]
        return [op.label, *kernel, *cells, *rates]

    def plain(self) -> dict[str, Any]:
        """All numbers, as profile.json has them."""
        return {"schema": 1, **self.about, "machine": self.machine, **self.summary.plain()}

    def save(self, folder: str | Path, trace: str | Path | None = None) -> Path:
        """Write profile.html, profile.json and trace.json, each whole or not at all; returns the page's path.

        trace: another place for the trace, which Perfetto and chrome://tracing show. Raises ValueError where the folder
        can't be made, `report.SaveError` where a file can't be written.
        """
        out = Path(folder)
        report.folder(out, OP)
        self.trace(out / TRACE if trace is None else trace)
        numbers = json.dumps(self.plain(), indent=1) + "\n"
        report.write(out / NUMBERS, numbers.encode(), OP)
        report.write(out / PAGE, page.render(self).encode(), OP)
        return out / PAGE

    def trace(self, path: str | Path) -> None:
        """Write what torch's profiler recorded as a trace."""
        try:
            with files.replacing(Path(path)) as beside:
                direct = beside != Path(path)  # torch puts a new file in the place of a device or a FIFO
                # In a folder of its own: on a full disk torch leaves what it had written beside, and raises nothing.
                with tempfile.TemporaryDirectory(dir=beside.parent if direct else None) as folder:
                    made = Path(folder, TRACE)
                    self._export(str(made))
                    if not made.exists():
                        raise OSError("nothing from torch's profiler, as of a full disk")
                    if direct:
                        made.replace(beside)
                    else:
                        with open(made, "rb") as found, open(beside, "wb") as to:
                            shutil.copyfileobj(found, to)
        except (OSError, RuntimeError) as error:
            raise report.SaveError(f"{OP}: {path} must be writable, got {error}; pass another --trace") from error

    def one_step(self) -> list[Slice]:
        """The slices of the step whose time is the median, where steps are marked; else all."""
        ends = marks(self._events)
        if not ends or not self.slices:
            return self.slices
        spans = sorted(zip([self.slices[0].start, *ends], ends, strict=False), key=lambda span: span[1] - span[0])
        begin, end = spans[len(spans) // 2]
        return [
            s._replace(start=max(s.start, begin), end=min(s.end, end))
            for s in self.slices
            if s.end > begin and s.start < end
        ]


def check_writable(folder: Path, trace: Path | None) -> None:
    """Before the work: the folder can be made and written to; ValueError that says why not."""
    report.folder(folder, OP)
    for path, name in ((folder / PAGE, "--out"), *([(trace, "--trace")] if trace is not None else [])):
        try:
            files.check_writable(path)
        except OSError as error:
            place = path if path.is_dir() else path.parent
            fail(OP, name, "be a place to write", f"{place} ({error.strerror})", "pass another one")


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    drawn = (getattr(sys.stdout, "encoding", None) or "ascii").lower().startswith("utf")
    box = extra("rich.box", OP)
    made = extra("rich.table", OP).Table(box=box.SIMPLE_HEAD if drawn else box.ASCII2, pad_edge=False)
    for i, name in enumerate(head):
        made.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
