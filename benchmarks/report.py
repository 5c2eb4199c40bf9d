"""Turns a result document into one page that needs nothing else, and the roofline as a picture of its own."""

import base64
import itertools
import math
import os
from pathlib import Path
from typing import Any

from benchmarks import roofline, targets, text
from benchmarks.rows import Row

try:
    import jinja2
except ImportError:
    jinja2 = None

TEMPLATE = Path(__file__).parent / "report.html.j2"
PEAKS = (
    ("copy", "copy_gbs", "GB/s"), ("read", "read_gbs", "GB/s"), ("read-modify-write", "rmw_gbs", "GB/s"),
    ("multiply-add", "fma_gflops", "GFLOP/s"), ("matrix product", "gemm_gflops", "GFLOP/s"),
)  # fmt: skip
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)


def write_all(document: dict[str, Any], out: Path) -> Path | None:
    """Write OUT/report.html and OUT/roofline.png; the page's path, None where jinja2 is missing."""
    pictures = {theme: roofline.draw(document, theme) for theme in roofline.THEMES}
    if pictures["light"]:
        roofline.save(pictures["light"], out / "roofline.png")
    if jinja2 is None:
        return None
    beside, page = out / "report.tmp", out / "report.html"
    beside.write_text(render(document, {theme: data_uri(p) for theme, p in pictures.items() if p}))
    os.replace(beside, page)
    return page


def render(document: dict[str, Any], pictures: dict[str, str]) -> str:
    """The page as a string; pictures: {theme: data URI}."""
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **strict)
    named = ("duration", "size", "times", "percent", "interval")
    environment.filters.update({name: getattr(text, name) for name in named})
    found = document["rows"]
    scale = Scale(found)
    return environment.from_string(TEMPLATE.read_text()).render(
        document=document,
        facts=facts(document),
        peaks=peaks(document["peaks"]),
        targets=target_cells(found),
        steps=[step(row) for row in found if row.get("parts")],
        ops=ops(found, scale),
        ticks=[(f"{t:g}", scale.place(t)) for t in TICKS if scale.low <= t <= scale.high],
        bad=sum(row["status"] != "ok" for row in found),
        pictures=pictures,
    )


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


class Scale:
    """The logarithmic axis that all ratios share, in percent of its width."""

    def __init__(self, found: list[Row]):
        values = [r for row in found for r in (row["ratio"], *(row["ci95"] or ())) if r]
        self.low, self.high = min([0.5, *values]) / 1.1, max([2.0, *values]) * 1.1

    def place(self, ratio: float) -> float:
        return round(100 * math.log(ratio / self.low) / math.log(self.high / self.low), 2)


def facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What the numbers were measured on and with."""
    about, git, versions = document["machine"], document["git"], document["versions"]
    if not about:
        return []
    commit = (git.get("sha") or "unknown")[:10] + (" with changes" if git.get("dirty") else "")
    gpu = [("GPU", about["gpu"]["name"])] if about.get("gpu") else []
    return [
        ("processor", f"{about['cpu']}, {about['isa']}"),
        ("threads", f"{about['threads']} of {about['cores']} cores"),
        *gpu,
        ("commit", commit),
        ("torch", f"{versions.get('torch')}, python {versions.get('python')}"),
        ("started", document.get("started", "").replace("T", " ").replace("Z", " UTC")),
        ("took", text.duration(document["seconds"] * 1e6) if "seconds" in document else "-"),
        ("first row after", text.duration(document["first_row_s"] * 1e6) if "first_row_s" in document else "-"),
        ("selection", document.get("selection", "-")),
    ]


def peaks(measured: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, rate, unit) of every measured ceiling."""
    found = []
    for name, field, unit in PEAKS:
        rate = measured.get(field)
        rates = rate.items() if isinstance(rate, dict) else [("", rate)] if rate is not None else []
        found += [(f"{name} {dtype}".strip(), f"{value:.3g}", unit) for dtype, value in rates]
    return found


def target_cells(found: list[Row]) -> list[dict[str, Any]]:
    """What must be reached, and how far the measured ratio gets on the way (1 = reached)."""
    return [
        {
            "where": f"{t.name} · {row['workload'] if row else t.workload} · {t.stage}",
            "what": t.what,
            "asked": text.asked(t),
            "ratio": row["ratio"] if row else None,
            "measured": text.reached(t, row) if row else "",
            "verdict": text.VERDICTS[holds],
            "share": min(row["ratio"] / t.least, 2) / 2 * 100 if row and t.least else 0,
        }
        for t, row, holds in targets.check(found)
    ]


def step(row: Row) -> dict[str, Any]:
    """Two stacked bars of a training step, in percent of the longer one."""
    longest = max(sum(parts.values()) for parts in row["parts"].values())
    names = list(row["parts"]["ours"])
    bars = {
        who: [{"name": n, "us": parts.get(n), "width": 100 * parts.get(n, 0) / longest} for n in names]
        for who, parts in row["parts"].items()
    }
    return {**row, "names": names, "bars": bars}


def ops(found: list[Row], scale: Scale) -> list[dict[str, Any]]:
    """Rows by op, and in it by run: ours is stated once, each baseline has a line."""
    grouped: dict[str, dict[tuple[str, ...], list[Row]]] = {}
    for row in found:
        run = (row["workload"], row["pass"], row["dtype"])
        grouped.setdefault(row["name"], {}).setdefault(run, []).append(row)
    return [
        {
            "name": name,
            "runs": [{"ours": ours(rows), "lines": [line(r, scale) for r in rows]} for rows in runs.values()],
        }
        for name, runs in grouped.items()
    ]


def ours(rows: list[Row]) -> Row:
    """The run's first row that has a time, else its first."""
    return next(itertools.chain((row for row in rows if row["ours_us"]), rows))


def line(row: Row, scale: Scale) -> dict[str, Any]:
    """One baseline: the row and the places of its bar."""
    bar = None
    if row["ratio"] is not None:
        low, high = row["ci95"] or (row["ratio"], row["ratio"])
        start, end = scale.place(low), scale.place(high)
        bar = {"at": scale.place(row["ratio"]), "start": start, "width": round(end - start, 2)}
    optional = {"error": None, "baseline_peak_bytes": None}
    return {**optional, **row, "bar": bar, "one": scale.place(1.0)}
