"""Pictures of committed results: how many times faster, on all machines, and the roofline of each.

The same results give the same file, byte for byte, with one version of matplotlib. What was drawn is told by a digest
in the file, by which another version's is known to be up to date.
"""

import hashlib
import io
import json
import re
from typing import Any

from benchmarks import headlines, roofline, tables
from benchmarks.tables import Document

COLOURS = ("#0a7ea4", "#d1642b", "#3f8f4f", "#8a5cc2")


def draw(documents: dict[str, Document]) -> dict[str, str]:
    """{name: SVG}; raises ImportError where matplotlib is missing."""
    machines = tables.machines(documents)
    found = {name: svg(roofline.figure(d, "light"), [roofline.points(d["rows"]), d["peaks"]]) for name, d in
             machines.items()}  # fmt: skip
    bars = {tables.machine_title(d): speedups(d) for d in headlines.on_cpus(documents)}
    return {**found, "speedups": svg(_bars(bars), bars)} if bars else found


def speedups(document: Document) -> list[tuple[str, float, float, float]]:
    """(row, ratio, its interval) of the headlines; ratio 0 where one was not measured."""
    return [
        (f"{t.name}: {t.what}", *((row["ratio"], *row["ci95"]) if row else (0.0, 0.0, 0.0)))
        for t, row in headlines.held(document)
    ]


def _bars(machines: dict[str, list[tuple[str, float, float, float]]]) -> Any:
    """Horizontal bars from 1, on a logarithmic axis."""
    from matplotlib.figure import Figure

    style = roofline.THEMES["light"]
    count, thick = len(next(iter(machines.values()))), 0.8 / len(machines)
    figure = Figure(figsize=(9, 0.9 + 0.27 * count), facecolor=style["page"], layout="constrained")
    axis = figure.add_subplot(facecolor=style["page"])
    for i, (title, rows) in enumerate(machines.items()):
        measured = [(place, *row[1:]) for place, row in enumerate(rows) if row[1]]
        y = [place + (i - (len(machines) - 1) / 2) * thick for place, *_ in measured]
        ratios = [ratio for _, ratio, _, _ in measured]
        errors = [[ratio - low for _, ratio, low, _ in measured], [high - ratio for _, ratio, _, high in measured]]
        axis.barh(y, [ratio - 1 for ratio in ratios], thick, left=1, color=COLOURS[i], label=title,
                  xerr=errors, error_kw=dict(ecolor=style["text"], elinewidth=0.7))  # fmt: skip
    axis.set(xscale="log", xlabel="times faster, with intervals", ylim=(count - 0.5, -0.5))
    axis.set_yticks(range(count), [row[0] for row in next(iter(machines.values()))], fontsize=8)
    ticks = (1, 2, 4, 8, 16, 32, 64, 128)
    axis.set_xticks(ticks, [f"{t} x" for t in ticks], minor=False)
    axis.minorticks_off()
    axis.axvline(1, color=style["roof"], linewidth=1)
    axis.grid(True, axis="x", color=style["faint"], linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def svg(figure: Any, drawn: Any) -> str:
    """Text stays text, and nothing in the file depends on the day."""
    import matplotlib

    digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jepa_kernels"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Identifier": digest})
    return re.sub(r"[ \t]+$", "", file.getvalue(), flags=re.MULTILINE)


def same(a: str, b: str) -> bool:
    """Whether two files say the same: one text, or pictures of the same results by two versions of matplotlib."""
    told = [(re.search(r"Matplotlib v[\d.]+", x), re.search(r"<dc:identifier>(\w+)<", x)) for x in (a, b)]
    if a != b and all(version and digest for version, digest in told):
        (mine, drawn), (theirs, shown) = told
        return mine.group() != theirs.group() and drawn.group() == shown.group()
    return a == b
