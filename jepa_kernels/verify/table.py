"""A verification as text: by rich where it is installed, in plain columns elsewhere; both as wide as the terminal."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from jepa_kernels._core.select import short
from jepa_kernels.verify.rows import Row

COLUMNS = ("op", "backend", "device", "dtype", "cases", "max", "rms", "verdict", "s")
EXPENDABLE = ("s", "cases", "device")  # left out in this order where the terminal is narrow
NUMBERS = ("cases", "max", "rms", "s")
COLORS = {"pass": "32", "fail": "1;31", "partial": "33"}
LEGEND = "max, rms: the worst error over its budget; 1 is the limit"


def show(rows: Sequence[Row], out: TextIO) -> None:
    """The table of what ran, every failing case with its numbers, and why the other rows did not run."""
    ran = [row for row in rows if row.results]
    if ran and importlib.util.find_spec("rich") is not None:
        _rich(ran, out)
    elif ran:
        _plain(ran, out)
    for line in (*([LEGEND] if ran else []), *failures(rows), *absences(rows)):
        print(_in_encoding(line, out), file=out)


def _in_encoding(line: str, out: TextIO) -> str:
    """A kernel's or compiler's message may have letters that the terminal lacks."""
    encoding = getattr(out, "encoding", None) or "utf-8"
    return line.encode(encoding, "backslashreplace").decode(encoding)


def cells(row: Row) -> dict[str, str]:
    """A row's text by column."""
    refused = sum(r.refused is not None for r in row.results)
    return {
        "op": row.op,
        "backend": row.backend,
        "device": row.device,
        "dtype": short(row.dtype),
        "cases": f"{len(row.results) - refused}/{len(row.cases)}",
        "max": f"{row.worst('max'):.2f}",
        "rms": f"{row.worst('rms'):.2f}",
        "verdict": row.verdict,
        "s": f"{row.seconds:.1f}",
    }


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each thing that is wrong with a case."""
    return [
        f"FAIL {row.op} {row.backend} {row.device} {short(row.dtype)} {result.case}: {problem}"
        for row in rows
        for result in row.results
        for problem in result.problems
    ]


def absences(rows: Sequence[Row]) -> list[str]:
    """A line for each backend that can't run here, and one for each of the cases that a kernel states to refuse."""
    missing = dict.fromkeys((row.backend, row.device, row.reason) for row in rows if row.reason is not None)
    lines = [f"not run: {backend} on {device}: {reason}" for backend, device, reason in missing]
    refused = dict.fromkeys(f"{r.case}: {r.refused}" for row in rows for r in row.results if r.refused is not None)
    return lines + [f"not run: {line}" for line in refused]


def _rich(rows: Sequence[Row], out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=out)
    names = columns(console.width)
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True, overflow="crop")
    styles = {"pass": "green", "fail": "bold red", "partial": "yellow"}
    for row in rows:
        table.add_row(*(f"[{styles[t]}]{t}[/]" if n == "verdict" else t for n, t in cells(row).items() if n in names))
    console.print(table)


def _plain(rows: Sequence[Row], out: TextIO) -> None:
    names = columns(shutil.get_terminal_size().columns)
    color = out.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    lines = [dict(zip(COLUMNS, COLUMNS, strict=True)), *map(cells, rows)]
    widths = {n: max(len(line[n]) for line in lines) for n in names}
    for line in lines:
        texts = {n: line[n].rjust(widths[n]) if n in NUMBERS else line[n].ljust(widths[n]) for n in names}
        if color and line["verdict"] in COLORS:
            texts["verdict"] = f"\x1b[{COLORS[line['verdict']]}m{texts['verdict']}\x1b[0m"
        print("  ".join(texts.values()).rstrip(), file=out)


def columns(width: int) -> list[str]:
    """The columns for which a terminal has room: of 80 characters all."""
    widest = dict(zip(COLUMNS, (16, 8, 6, 8, 5, 4, 4, 7, 5), strict=True))
    names = list(COLUMNS)
    for name in EXPENDABLE:
        if sum(widest[n] + 2 for n in names) - 2 > width:
            names.remove(name)
    return names


def progress(row: Row) -> None:
    """Which row runs, where a person looks on."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{row.op} {row.backend} {short(row.dtype)}".ljust(42))
        sys.stderr.flush()


def progress_ends() -> None:
    """Take the line back."""
    if sys.stderr.isatty():
        sys.stderr.write("\r" + " " * 42 + "\r")
        sys.stderr.flush()
