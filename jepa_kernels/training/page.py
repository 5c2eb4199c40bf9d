"""OUT/run.html, one page that needs nothing else, of a run's log: `python -m jepa_kernels.training.page OUT`.

Curves of every measure, with skipped steps and resumes marked; the config and the machine, which the first row since
each start holds; the probes, if probe.json lies beside.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jepa_kernels import report
from jepa_kernels._core.check import fail
from jepa_kernels.configs import flat
from jepa_kernels.data import extra

METRICS, PAGE, PROBE = "metrics.jsonl", "run.html", "probe.json"
TEMPLATE = Path(__file__).with_suffix(".html.j2")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 400, 190, 52, 22, 10, 10  # of a chart and its margins, in SVG units
POINTS = 400  # of a curve: of more steps each run of them is shown by its least and its greatest value
CURVES = {
    "loss": "loss",
    "std": "feature std",
    "rank": "effective rank",
    "ema_distance": "EMA distance",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "momentum": "EMA momentum",
    "tokens_per_s": "tokens / s",
    "share_of_peak": "share of peak",
    "step_s": "seconds per step",
    "data_wait_s": "seconds waiting for data",
    "save_s": "seconds a save kept the loop",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """From the numbers low .. high to start .. end; ticks: (place, label) at round numbers."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, count: int, *, whole: bool = False) -> list[tuple[float, str]]:
        locator = extra("matplotlib.ticker").MaxNLocator(count, integer=whole, steps=[1, 2, 2.5, 5, 10])
        values = [float(v) for v in locator.tick_values(self.low, self.high)]
        slack = 1e-9 * (self.high - self.low)
        return [(self.place(v), label(v)) for v in values if self.low - slack <= v <= self.high + slack]


def label(value: float) -> str:
    """A number in few characters: 0.35, 1.2e-05, 250, 12k, 3.4M."""
    value = float(f"{value:.6g}")
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.3g}"


def read(metrics: Path) -> list[Row]:
    """The rows of a log, but for a last one that a crash has torn; null is a number that was not finite."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def write(out: Path) -> Path | None:
    """Write OUT/run.html, whole or not at all; returns its path, None for a run without a single step."""
    metrics, probe, page = out / METRICS, out / PROBE, out / PAGE
    rows = read(metrics) if metrics.is_file() else []
    if not rows:
        return None
    found = json.loads(probe.read_text()) if probe.exists() else None
    report.write(page, render(out.resolve().name, rows, found).encode())
    return page


def render(name: str, rows: Sequence[Row], probe: dict[str, Any] | None) -> str:
    """The page as a string; probe: what probe.json holds."""
    jinja2 = extra("jinja2")
    strict = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(**strict)
    environment.filters["number"] = label
    starts = [row for row in rows if "run" in row]
    about = starts[-1]["run"] if starts else {}
    resumed = [row["step"] for row in starts[1:]]
    skipped = [row["step"] for row in rows if row.get("skipped")]
    return environment.from_string(TEMPLATE.read_text()).render(
        name=name,
        facts=facts(rows, about, len(skipped), len(resumed)),
        charts=[chart(key, title, rows, resumed, skipped) for key, title in CURVES.items() if _shown(key, rows)],
        box={"width": WIDTH, "height": HEIGHT, "left": LEFT, "top": TOP, "bottom": HEIGHT - BOTTOM},
        sections=sections(about.get("config", {})),
        probes=[scores(asked) for asked in (probe or {}).get("probes", [])],
    )


def _shown(key: str, rows: Sequence[Row]) -> bool:
    return any(math.isfinite(row.get(key, math.nan)) for row in rows)


def facts(rows: Sequence[Row], about: Row, skipped: int, resumed: int) -> list[tuple[str, str]]:
    """What the page says first: (name, value)."""
    last, config, machine = rows[-1], about.get("config", {}), about.get("machine", {})
    total = config.get("optimization", {}).get("steps")
    seconds = sum(row.get("step_s", 0.0) for row in rows)
    found: list[tuple[str, Any]] = [
        ("model", config.get("architecture")),
        ("steps", f"{last['step']} of {total}" if total else last["step"]),
        ("loss at the end", label(last["loss"])),
        ("time in steps", duration(seconds) if seconds else None),
        ("tokens / s, median", median("tokens_per_s", rows)),
        ("share of peak, median", median("share_of_peak", rows)),
        ("peak, GFLOP/s", f"{about['peak_flops'] / 1e9:.4g}" if "peak_flops" in about else None),
        ("processes", about.get("world")),
        ("skipped steps", skipped),
        ("resumed", f"{resumed} x" if resumed else None),
        ("GPU", machine.get("gpu")),
        ("processor", machine.get("cpu")),
        ("threads", machine.get("threads")),
        ("torch", machine.get("torch")),
        ("commit", (about.get("commit") or "")[:10] or None),
    ]
    return [(name, str(value)) for name, value in found if value is not None]


def median(key: str, rows: Sequence[Row]) -> str | None:
    """Of the rows that have the measure."""
    values = sorted(row[key] for row in rows if key in row)
    return label(values[len(values) // 2]) if values else None


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.1f} s"


def chart(key: str, title: str, rows: Sequence[Row], resumed: Sequence[int], skipped: Sequence[int]) -> dict[str, Any]:
    """Everything that the template draws of one measure, in SVG units; `points` in numbers too, to be pointed at."""
    known = [(row["step"], row[key]) for row in rows if key in row]
    points = thinned([(step, value) for step, value in known if math.isfinite(value)])
    values, steps = [value for _, value in points], [row["step"] for row in rows]
    least, most = min(values), max(values)
    low = 0.0 if least >= 0 and least < 0.6 * most else least
    margin = 0.06 * (most - low) or 0.06 * abs(most) or 1.0
    y = Axis(low if low == 0.0 else low - margin, most + margin, HEIGHT - BOTTOM, TOP)
    x = Axis(steps[0], max(steps[-1], steps[0] + 1), LEFT, WIDTH - RIGHT)
    place: Callable[[int, float], str] = lambda step, value: f"{x.place(step)},{y.place(value)}"  # noqa: E731
    return {
        "key": key,
        "title": title,
        "last": label(known[-1][1]),
        "line": " ".join(place(*point) for point in points),
        "points": [[x.place(step), y.place(value), step, label(value)] for step, value in points],
        "dots": [place(*point).split(",") for point in points] if len(points) <= 40 else [],
        "x": x.ticks(4, whole=True),
        "y": y.ticks(4),
        "resumed": [x.place(step) for step in resumed],
        "skipped": [x.place(step) for step in skipped],
    }


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """As many points as a curve shows, in order: the least and the greatest of each run of steps."""
    if len(points) <= POINTS:
        return points
    kept = []
    for n in range(POINTS // 2):
        run = points[n * len(points) // (POINTS // 2) : (n + 1) * len(points) // (POINTS // 2)]
        kept += sorted({min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])})
    return kept


def sections(config: Row) -> list[tuple[str, list[tuple[str, str]]]]:
    """(section, its (key, value)) of a config; what stands outside of sections comes first."""
    alone = [(key, str(value)) for key, value in config.items() if not isinstance(value, dict)]
    parts = [(name, flat(part)) for name, part in config.items() if isinstance(part, dict)]
    found = [(name, [(k, str(v)) for k, v in part.items()]) for name, part in parts]
    return [("run", [pair for pair in alone if pair[1] != "None"]), *found] if alone else found


def scores(asked: Row) -> dict[str, Any]:
    """A probe's table: (probe, features, mean, low, high)."""
    lines = [
        (probe, name.replace("_", " "), *(f"{v:.3f}" for v in (score["mean"], *score["ci95"])))
        for probe, found in asked.items()
        if isinstance(found, dict)
        for name, score in found.items()
    ]
    chance = f"{asked['chance']:.3f}" if "chance" in asked else None
    return {"question": asked["question"], "score": asked.get("score", "accuracy"), "chance": chance, "lines": lines}


def main(argv: Sequence[str]) -> int:
    """Returns the exit code (2: no run lies there)."""
    try:
        if len(argv) != 1:
            fail("page", "arguments", "be one folder", " ".join(argv) or "none", "pass the --out of a training run")
        metrics = Path(argv[0]) / METRICS
        if not metrics.is_file():
            fail("page", "OUT", "be the folder of a training run", f"no {metrics}", "pass what train had as --out")
        page = write(Path(argv[0]))
        if page is None:
            fail("page", str(metrics), "hold a step", "none", "let the run take one")
        print(page)
    except (ValueError, OSError, ModuleNotFoundError, report.SaveError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
