"""The roofline: what each kernel reached, under the bandwidth and the arithmetic that were measured here."""

import io
import itertools
import math
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

THEMES = {
    "light": {"page": "#ffffff", "text": "#1f2328", "faint": "#d0d7de", "roof": "#57606a"},
    "dark": {"page": "#0d1117", "text": "#e6edf3", "faint": "#30363d", "roof": "#8b949e"},
}
COLOURS = (
    "#0a7ea4", "#d1642b", "#3f8f4f", "#8a5cc2", "#c23b6b", "#9a7b12", "#2aa198", "#5b6b7b", "#e39a2d", "#4464c4",
    "#8fb83a", "#b08968", "#d77fc0",
)  # fmt: skip
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}
SLOPES = ("copy_gbs", "read_gbs")


def points(found: list[Row]) -> list[dict[str, Any]]:
    """One point a run: operations per byte, and GFLOP/s. Runs without bytes, operations or a time have none."""
    seen: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in found:
        if row["ours_us"] and row["bytes"] and row["flops"] and row["dtype"] in MARKERS:
            rate = row["flops"] / row["ours_us"]["p50"] / 1e3
            run = tuple(row[f] for f in ("name", "workload", "pass", "dtype"))
            seen.setdefault(
                run, {"name": row["name"], "dtype": row["dtype"], "x": row["flops"] / row["bytes"], "y": rate}
            )
    return list(seen.values())


def draw(document: dict[str, Any], theme: str) -> bytes | None:
    """The picture as PNG; None where nothing can be drawn."""
    if not points(document["rows"]) or not document["peaks"]:
        return None
    try:
        drawn = figure(document, theme)
    except ImportError:
        return None
    picture = io.BytesIO()
    drawn.savefig(picture, format="png", dpi=160)
    return picture.getvalue()


def figure(document: dict[str, Any], theme: str) -> Any:
    """Of matplotlib's; raises ImportError where that is missing."""
    from matplotlib.figure import Figure

    found, style = points(document["rows"]), THEMES[theme]
    drawn = Figure(figsize=(9, 4.6), facecolor=style["page"], layout="constrained")
    axis = drawn.add_subplot(facecolor=style["page"])
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s")
    _roofs(axis, document["peaks"], found, style)
    _scatter(axis, found, style)
    axis.grid(True, which="major", color=style["faint"], linewidth=0.6)
    axis.tick_params(colors=style["text"], which="both")
    axis.xaxis.label.set_color(style["text"])
    axis.yaxis.label.set_color(style["text"])
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(style["faint"])
    return drawn


def _roofs(axis: Any, peaks: dict[str, Any], found: list[dict[str, Any]], style: dict[str, str]) -> None:
    fma = peaks["fma_gflops"]
    top = max(fma.values())
    left = min(p["x"] for p in found) / 3
    right = max(10 * top / peaks["copy_gbs"], 3 * max(p["x"] for p in found))
    for name, dashes, above in zip(SLOPES, ("-", "--"), (True, False), strict=True):
        axis.plot([left, top / peaks[name]], [left * peaks[name], top], dashes, color=style["roof"], linewidth=1.2)
        label = f"{name.removesuffix('_gbs')} {peaks[name]:.0f} GB/s"
        place = (
            {"y": 2.2 * left * peaks[name], "va": "bottom"} if above else {"y": 1.7 * left * peaks[name], "va": "top"}
        )
        # The text follows the slope of the line, which the logarithmic axes turn.
        axis.text(
            2 * left, s=label, color=style["roof"], fontsize=8, rotation=math.degrees(math.atan(peaks[name])),
            rotation_mode="anchor", transform_rotates_text=True, **place,
        )  # fmt: skip
    roofs = {f"multiply-add {d} {rate:.0f}": rate for d, rate in fma.items()}
    roofs[f"matrix product float32 {peaks['gemm_gflops']['float32']:.0f}"] = peaks["gemm_gflops"]["float32"]
    drawn: list[float] = []
    for name, rate in roofs.items():
        if any(abs(rate / other - 1) < 0.1 for other in drawn):  # two types of one rate
            continue
        drawn.append(rate)
        multiply = name.startswith("multiply")
        axis.plot(
            [rate / peaks["copy_gbs"], right],
            [rate, rate],
            "-" if multiply else ":",
            color=style["roof"],
            linewidth=1.2,
        )
        place = {"y": rate * 1.06, "va": "bottom"} if multiply else {"y": rate / 1.06, "va": "top"}
        axis.text(right, s=name, color=style["roof"], fontsize=8, ha="right", **place)


def _scatter(axis: Any, found: list[dict[str, Any]], style: dict[str, str]) -> None:
    """A colour for each op, a shape for each dtype; the legend stands beside, where nothing is drawn."""
    from matplotlib.lines import Line2D

    names = sorted({p["name"] for p in found})
    dtypes = [dtype for dtype in MARKERS if any(p["dtype"] == dtype for p in found)]
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    for p in found:
        axis.scatter(p["x"], p["y"], s=38, marker=MARKERS[p["dtype"]], color=colours[p["name"]],
                     edgecolor=style["page"], linewidth=0.8, zorder=3)  # fmt: skip
    entries = [(name, "o", colours[name]) for name in names] + [(d, MARKERS[d], style["roof"]) for d in dtypes]
    handles = [Line2D([], [], linestyle="", marker=m, color=colour, label=name) for name, m, colour in entries]
    axis.figure.legend(handles=handles, fontsize=8, frameon=False, loc="outside right upper", labelcolor=style["text"])


def save(picture: bytes, path: Path) -> None:
    """Write beside and rename."""
    beside = path.with_suffix(".tmp")
    beside.write_bytes(picture)
    beside.replace(path)
