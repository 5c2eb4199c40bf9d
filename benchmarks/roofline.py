"""The roofline: what each kernel reached, under the bandwidth and the arithmetic that were measured here."""

import io
import math
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

THEMES = {
    "light": {"page": "#ffffff", "text": "#1f2328", "faint": "#d0d7de", "roof": "#57606a"},
    "dark": {"page": "#0d1117", "text": "#e6edf3", "faint": "#30363d", "roof": "#8b949e"},
}
COLOURS = ("#0a7ea4", "#d1642b", "#3f8f4f", "#8a5cc2", "#c23b6b", "#9a7b12")
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}
SLOPES = ("copy_gbs", "read_gbs")


def points(found: list[Row]) -> list[dict[str, Any]]:
    """One point a run: operations per byte, and GFLOP/s. Runs without bytes, operations or a time have none."""
    seen: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in found:
        if row["ours_us"] and row["bytes"] and row["flops"]:
            rate = row["flops"] / row["ours_us"]["p50"] / 1e3
            run = tuple(row[f] for f in ("name", "workload", "pass", "dtype"))
            seen.setdefault(
                run, {"name": row["name"], "dtype": row["dtype"], "x": row["flops"] / row["bytes"], "y": rate}
            )
    return list(seen.values())


def draw(document: dict[str, Any], theme: str) -> bytes | None:
    """The picture as PNG; None where nothing can be drawn."""
    found = points(document["rows"])
    if not found or not document["peaks"]:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    style = THEMES[theme]
    figure = Figure(figsize=(9, 4.6), dpi=160, facecolor=style["page"], layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot(facecolor=style["page"])
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
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


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
    names = sorted({p["name"] for p in found})
    for i, name in enumerate(names):
        for dtype in MARKERS:
            chosen = [p for p in found if (p["name"], p["dtype"]) == (name, dtype)]
            if chosen:
                axis.scatter(
                    [p["x"] for p in chosen], [p["y"] for p in chosen], s=38, marker=MARKERS[dtype],
                    color=COLOURS[i % len(COLOURS)], edgecolor=style["page"], linewidth=0.8, zorder=3,
                    label=name if dtype == "float32" else f"{name} {dtype}",
                )  # fmt: skip
    legend = axis.legend(fontsize=8, frameon=False, loc="lower right")
    for entry in legend.get_texts():
        entry.set_color(style["text"])


def save(picture: bytes, path: Path) -> None:
    """Write beside and rename."""
    beside = path.with_suffix(".tmp")
    beside.write_bytes(picture)
    beside.replace(path)
