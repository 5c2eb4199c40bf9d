"""Rows as text: units, the one-line form, the live progress and the tables in the terminal."""

import os
import shutil
import sys
import textwrap
from types import TracebackType
from typing import Any

from benchmarks import stats, targets
from benchmarks.rows import Row, key

try:
    import rich.box
    from rich.console import Console
    from rich.table import Table
except ImportError:
    rich = None


FILE_WIDTH = 160  # of tables that go to no terminal


def duration(us: float | None) -> str:
    """Three digits and the unit that suits them."""
    if us is None:
        return "-"
    for factor, unit in ((1, "us"), (1e3, "ms"), (1e6, "s")):
        if us < 999.5 * factor or unit == "s":
            break
    return f"{us / factor:.3g} {unit}"


def size(n: float | None) -> str:
    """Bytes in the unit that suits them."""
    if n is None:
        return "-"
    for factor, unit in ((1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB")):
        if n < 999.5 * factor or unit == "GB":
            break
    return f"{n / factor:.3g} {unit}"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} x"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def interval(row: Row) -> str:
    """That of a ratio; with the number of rounds where these are too few for one of 95 %."""
    low, high = row["ci95"]
    few = f", {row['rounds']} rounds" if row.get("rounds", stats.ENOUGH) < stats.ENOUGH else ""
    return f"{low:.2f} to {high:.2f}{few}"


def row_line(row: Row) -> str:
    """One row in one line."""
    parity = "parity ok" if row["parity"].get("pass") else "PARITY RED"
    if row["ratio"] is None:
        return f"{key(row)}: {row['status']}, {row.get('error', parity)}"
    return (
        f"{key(row)}: {duration(row['ours_us']['p50'])} against {duration(row['baseline_us']['p50'])}, "
        f"{row['ratio']:.2f} x [{interval(row)}], {parity}"
    )


class Progress:
    """What is being measured, how far it is, and every row as it comes; plain lines where there is no terminal."""

    def __init__(self) -> None:
        self.console = Console(highlight=False) if rich else None
        self.live = None
        if self.console is not None and self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (SpinnerColumn(), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
            self.live = Bar(*columns, TextColumn("{task.description}"), console=self.console, transient=True)
            self.task = self.live.add_task("starting", total=None)

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def note(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, soft_wrap=True, markup=False)
        else:
            print(text, flush=True)

    def header(self, document: dict[str, Any]) -> None:
        self.note(machine_lines(document))

    def total(self, count: int) -> None:
        if self.live:
            self.live.update(self.task, total=count)

    def start(self, name: str) -> None:
        if self.live:
            self.live.update(self.task, description=name)

    def rows(self, found: list[Row]) -> None:
        for row in found:
            self.note("  " + row_line(row))
        if self.live:
            self.live.advance(self.task)


class Silent:
    """A progress that shows nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def machine_lines(document: dict[str, Any]) -> str:
    """The machine, its peaks and the versions."""
    about, peaks, versions = document["machine"], document["peaks"], document["versions"]
    if not about:
        return "no machine line: the run ended before it"
    gpu = f" · {about['gpu']['name']}" if about.get("gpu") else ""
    fma, gemm = peaks["fma_gflops"], peaks["gemm_gflops"]
    return (
        f"{about['cpu']} · {about['threads']} of {about['cores']} cores · {about['isa']}{gpu}\n"
        f"copy {peaks['copy_gbs']:.0f} GB/s · read {peaks['read_gbs']:.0f} · read-modify-write {peaks['rmw_gbs']:.0f}"
        f" · multiply-add fp32 {fma['float32']:.0f} GFLOP/s, bf16 {fma['bfloat16']:.0f}"
        f" · matrix product fp32 {gemm['float32']:.0f}, bf16 {gemm['bfloat16']:.0f}\n"
        f"torch {versions['torch']} · python {versions['python']} · commit {(document['git'].get('sha') or '?')[:10]}"
        f"{' with changes' if document['git'].get('dirty') else ''}"
    )


ROW_COLUMNS = ("op", "workload", "pass", "dtype", "ours", "baseline", "its time", "ratio", "95 %", "peak", "memory")


def row_cells(row: Row) -> tuple[str, ...]:
    """The cells of ROW_COLUMNS."""
    span = interval(row) if row["ci95"] else "-"
    mine, other = (row[f] and row[f]["p50"] for f in ("ours_us", "baseline_us"))
    mark = {"ok": "", "partial": " (partial)", "failed": " (failed)"}[row["status"]]
    return (
        row["name"], row["workload"], row["pass"], row["dtype"], duration(mine), row["baseline"] + mark,
        duration(other), times(row["ratio"]), span, percent(row["share_of_peak"]), size(row["peak_bytes"]),
    )  # fmt: skip


def asked(target: targets.Target) -> str:
    """A ratio, a time, shares of the baseline's memory and of the machine's peak: what is asked of these."""
    found = [f"{target.least:g} x"] if target.least else []
    found += [] if target.most_us is None else [duration(target.most_us)]
    found += [] if target.most_memory is None else [f"{percent(target.most_memory)} memory"]
    found += [] if target.least_share is None else [f"{percent(target.least_share)} of the peak"]
    return ", ".join(found)


def reached(target: targets.Target, row: Row) -> str:
    """What was measured of what is asked."""
    found = [times(row["ratio"])] if target.least else []
    found += [] if target.most_us is None else [duration(row[target.timed]["p50"])]
    found += [] if target.most_memory is None else [percent(targets.memory_share(row))]
    found += [] if target.least_share is None else [percent(row["share_of_peak"])]
    return ", ".join(found)


VERDICTS = {None: "not measured", True: "reached", False: "missed"}


def target_cells(found: list[Row]) -> list[tuple[str, str, str, str]]:
    """What must be reached: row, asked, measured, verdict."""
    cells = []
    for target, row, holds in targets.check(found):
        where = f"{target.name} {row['workload'] if row else target.workload} {target.stage}"
        measured = reached(target, row) if row else times(None)
        cells.append((f"{where}: {target.what}", asked(target), measured, VERDICTS[holds]))
    return cells


def terminal(document: dict[str, Any]) -> None:
    """All tables of a document."""
    found = document["rows"]
    if document.get("selection") == "brief":
        print("\nThe rows of ops and of two models that README shows; `make bench FULL=1` measures all.")
    show("Rows (backward = forward + backward)", ROW_COLUMNS, [row_cells(r) for r in found], right=(4, 6, 7, 8, 9, 10))
    for row in found:
        if row.get("parts"):
            cells = [(name, *(duration(row["parts"][who].get(name)) for who in ("ours", "reference"))) for name in
                     row["parts"]["ours"]]  # fmt: skip
            show(f"{row['name']} {row['workload']}: the step by part", ("part", "ours", "reference"), cells, (1, 2))
    cells = target_cells(found)
    measured = [c for c in cells if c[-1] != VERDICTS[None]]
    if not measured:
        print(f"\nMust reach: none of {len(cells)} was measured")
        return
    rest = f" (and {len(cells) - len(measured)} that were not measured)" if len(measured) < len(cells) else ""
    show(f"Must reach{rest}", ("row", "asked", "measured", ""), measured, right=(1, 2))


def show(title: str, columns: tuple[str, ...], cells: list[tuple[str, ...]], right: tuple[int, ...] = ()) -> None:
    """A table; where the terminal is too narrow for it, a few short lines for each row."""
    told = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = None if rich is None else Console(width=None if told else FILE_WIDTH)
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    if console is None or sum(widths) + 3 * len(widths) + 1 > console.width:
        print(f"\n{title}", *(stacked(columns, row) for row in cells), sep="\n")
        return
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", header_style="bold", box=rich.box.SIMPLE
    )
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", no_wrap=True)
    colours = {"reached": "green", "missed": "red"}
    for row in cells:
        table.add_row(*row, style=colours.get(row[-1]))
    console.print(table)


def stacked(columns: tuple[str, ...], row: tuple[str, ...]) -> str:
    """A row without its columns: each value after its name, where it has one, as many on a line as fit."""
    named = [f"{name} {value}".strip() for name, value in zip(columns[1:], row[1:], strict=True)]
    width = shutil.get_terminal_size().columns
    return textwrap.fill(f"{row[0]}: {', '.join(named)}", width, subsequent_indent="  ", break_on_hyphens=False)
