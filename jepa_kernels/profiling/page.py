"""profile.html: one page that needs nothing else, of a report. The timeline is drawn in the browser, to be zoomed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_kernels.data import extra
from jepa_kernels.profiling import peaks
from jepa_kernels.profiling.events import HOST, NOTED, OTHER, OURS, TORCH, Slice
from jepa_kernels.profiling.summary import Op, Summary, duration, percent

if TYPE_CHECKING:
    from jepa_kernels.profiling.report import Report

TEMPLATE = Path(__file__).with_suffix(".html.j2")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 400, 56, 16, 14, 40  # of the roofline, in SVG units
KINDS = (OURS, TORCH, HOST, NOTED)
FINEST = 20_000  # slices shorter than this part of the line are not seen, and not sent


def render(report: Report) -> str:
    """The page as a string."""
    jinja2 = extra("jinja2", "profile")
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(**strict)
    environment.filters.update(duration=duration, percent=percent, rate=rate)
    s = report.summary
    return environment.from_string(TEMPLATE.read_text()).render(
        name=report.about.get("model", "a loop"),
        about=report.about,
        s=s,
        parts=part_bars(s),
        shown=[op for op in s.ops if _shown(op, s)],
        others=[op for op in s.ops if not _shown(op, s)],
        facts=facts(report),
        roofline=roofline(s),
        line=json.dumps(line(report.one_step(), [p.name for p in s.parts])).replace("<", "\\u003c"),
    )


def _shown(op: Op, s: Summary) -> bool:
    return op.kind == OURS or op.seconds > 0.001 * s.seconds


def rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def facts(report: Report) -> list[tuple[str, str]]:
    """What the page says first: (name, value)."""
    s, machine, about = report.summary, report.machine, report.about
    found = [
        ("a step", duration(s.seconds)),
        ("steps profiled", f"{s.steps}{', interrupted' if report.about.get('interrupted') else ''}"),
        ("accounted for", percent(s.accounted)),
        ("in operations", percent(s.in_operations)),
        ("GPU", machine.get("gpu")),
        ("processor", machine["cpu"]),
        ("threads", str(machine["threads"])),
        ("torch", machine["torch"]),
        ("load of a busy machine", f"{about['load']:.1f} on {about['cores']} cores" if "load" in about else None),
        ("memory", f"{max(s.peaks[name] for name in peaks.BANDWIDTHS):.3g} GB/s"),
        *((f"product, {d}", f"{r:.3g} GFLOP/s") for d, r in s.peaks["gemm_gflops"].items()),
    ]
    return [(name, value) for name, value in found if value]


def part_bars(s: Summary) -> list[dict[str, Any]]:
    """Of each part: its place among the colours, and percent of the step by kind."""
    return [
        {"part": p, "color": color(i, p.name), "share": p.seconds / s.seconds,
         "widths": [(kind, 100 * getattr(p, kind) / s.seconds) for kind in KINDS]}
        for i, p in enumerate(s.parts)
    ]  # fmt: skip


def color(place: int, part: str) -> int:
    """Of a part: one of 8, or grey."""
    return 8 if part == OTHER else place % 8


def line(slices: Sequence[Slice], parts: Sequence[str]) -> dict[str, Any]:
    """What the script draws: slices as [start, microseconds, part, kind, name], the last three as numbers."""
    if not slices:
        return {"end": 0, "parts": [], "colors": [], "kinds": KINDS, "names": [], "slices": []}
    begin, end = slices[0].start, slices[-1].end
    names = {name: i for i, name in enumerate(dict.fromkeys(s.name for s in slices))}
    places = {name: i for i, name in enumerate(parts)}
    rows = [
        [round((s.start - begin) / 1e3, 2), round((s.end - s.start) / 1e3, 2), places[s.part], KINDS.index(s.kind),
         names[s.name]]
        for s in slices
        if s.end - s.start > (end - begin) / FINEST
    ]  # fmt: skip
    colors = [color(i, name) for i, name in enumerate(parts)]
    return {
        "end": (end - begin) / 1e3,
        "parts": list(parts),
        "colors": colors,
        "kinds": KINDS,
        "names": list(names),
        "slices": rows,
    }


class Log:
    """A logarithmic axis from low .. high to start .. end, with a tick at every power of ten."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.high = max(self.high, self.low + 1)
        self.start, self.end = start, end

    def place(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        return [(self.place(10.0**n), f"{10.0**n:g}") for n in range(self.low, self.high + 1)]


def roofline(s: Summary) -> dict[str, Any] | None:
    """Points at FLOPs per byte and GFLOP/s, under the roofs; None where no operation has both."""
    points = [op for op in s.ops if op.flops and op.bytes and op.seconds]
    if not points:
        return None
    memory = max(s.peaks[name] for name in peaks.BANDWIDTHS)
    roofs = {d: max(s.peaks["fma_gflops"].get(d, 0.0), r) for d, r in s.peaks["gemm_gflops"].items()}
    top = max(roofs.values())
    x = Log([op.flops / op.bytes for op in points if op.flops and op.bytes] + [top / memory * 3], LEFT, WIDTH - RIGHT)
    rates = [op.rate(op.flops) or 1.0 for op in points]
    y = Log([*rates, 1.2 * top], HEIGHT - BOTTOM, TOP)
    left = max(10.0**x.low, 10.0**y.low / memory)
    slope = [x.place(left), y.place(left * memory), x.place(top / memory), y.place(top)]
    level = [
        {"y": y.place(r), "x": x.place(r / memory), "label": f"{d} at {r:.0f} GFLOP/s"}
        for d, r in roofs.items()
        if not any(other > d and abs(roofs[other] / r - 1) < 0.05 for other in roofs)
    ]
    angle = -math.degrees(math.atan2(slope[1] - slope[3], slope[2] - slope[0]))
    drawn: list[dict[str, Any]] = []
    for op in sorted(points, key=lambda op: -op.seconds):
        drawn.append(_point(op, x, y, s, drawn))
    return {
        "x": x.ticks(), "y": y.ticks(), "slope": slope, "angle": round(angle, 1), "levels": level, "points": drawn,
        "memory": f"memory at {memory:.3g} GB/s",
        "box": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP,
                "bottom": HEIGHT - BOTTOM},
    }  # fmt: skip


def _point(op: Op, x: Log, y: Log, s: Summary, drawn: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As large as its share of the step; named where that is seen, and no other name is in the way."""
    assert op.flops and op.bytes
    gflops = op.rate(op.flops) or 0.0
    share = op.seconds / s.seconds
    at, height = x.place(op.flops / op.bytes), y.place(gflops)
    free = all(abs(p["x"] - at) > 170 or abs(p["y"] - height) > 13 for p in drawn if p["named"])
    return {
        "x": at, "y": height, "left": at > 0.75 * WIDTH, "r": round(3 + 22 * math.sqrt(share), 1),
        "kind": op.kind, "label": op.label, "named": share > 0.005 and free,
        "title": f"{op.label}, {op.backend}, {op.dtype}: {gflops:.3g} GFLOP/s, {rate(op.rate(op.bytes))} GB/s, "
                 f"{percent(share)} of the step",
    }  # fmt: skip
