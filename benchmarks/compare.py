"""What changed between two results of `python -m benchmarks`: each run's time, after / before.

`python -m benchmarks compare A.json B.json` reads bench-results/latest.json or committed files. A machine is not as
fast every day: `ratio` is the change of our time over that of the rivals timed in turns with it, and speaks of our
code where theirs is the same in both. Its interval holds the noise within each of the two.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import rows, stats, text
from benchmarks.rows import Row

SCHEMA = "jepa-bench-compare/1"
COLUMNS = ("run", "before", "after", "ours", "rivals", "ratio", "95 %", "")


def load(path: Path) -> dict[str, Any]:
    """Raises ValueError for what is no result."""
    try:
        document = json.loads(path.read_text())
        wrong = rows.problems(document)
        if not wrong and not document["machine"]:
            wrong = ["a run that ended before it said on what machine"]
    except (OSError, ValueError, AttributeError) as error:
        wrong = [str(error)]
    if wrong:
        raise ValueError(f"{path} must be a result of python -m benchmarks, got: {wrong[0]}")
    return document


def runs(document: dict[str, Any]) -> dict[str, dict[str, Row]]:
    """{op/workload/pass/dtype: {baseline: row}}, of rows with a number."""
    found: dict[str, dict[str, Row]] = {}
    for row in document["rows"]:
        if row["ours_us"]:
            found.setdefault(rows.key(row).rpartition("/")[0], {})[row["baseline"]] = row
    return found


def compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The document of a comparison."""
    a, b = runs(before), runs(after)
    return {
        "schema": SCHEMA,
        "before": about(before),
        "after": about(after),
        "rows": [one(key, a[key], b[key]) for key in a if {*a[key]} & {*b.get(key, ())}],
        "only_before": [f"{key}/{name}" for key in a for name in a[key] if name not in b.get(key, ())],
        "only_after": [f"{key}/{name}" for key in b for name in b[key] if name not in a.get(key, ())],
    }


def about(document: dict[str, Any]) -> dict[str, Any]:
    return {"machine": rows.slug(document["machine"]), "commit": document["git"].get("sha"),
            "changed": document["git"].get("dirty"), "torch": document["versions"].get("torch"),
            "status": document.get("status")}  # fmt: skip


def one(key: str, before: dict[str, Row], after: dict[str, Row]) -> dict[str, Any]:
    """A run's change; `ours` and `rivals` are what `ratio` is the quotient of."""
    sides = [[side[name] for name in before if name in after] for side in (before, after)]
    ratio, (low, high) = stats.change(*sides)
    mine, theirs = (_change(sides, f"{who}_us") for who in ("ours", "baseline"))
    verdict = "slower" if low > 1 else "faster" if high < 1 else "no difference"
    times = {f"{name}_us": side[0]["ours_us"]["p50"] for name, side in zip(("before", "after"), sides, strict=True)}
    return {"run": key, **times, "ours": mine, "rivals": theirs, "ratio": ratio, "ci95": [low, high],
            "verdict": verdict}  # fmt: skip


def _change(sides: list[list[Row]], field: str) -> float:
    """Geometric mean over rows of median after / before."""
    return math.exp(np.mean([math.log(b[field]["p50"] / a[field]["p50"]) for a, b in zip(*sides, strict=True)]))


def regressions(found: dict[str, Any], percent: float) -> list[dict[str, Any]]:
    """Runs whose whole interval is past `percent` more time."""
    return [row for row in found["rows"] if row["ci95"][0] > 1 + percent / 100]


def show(found: dict[str, Any]) -> None:
    for side in ("before", "after"):
        told = found[side]
        changed = " with changes" if told["changed"] else ""
        status = "" if told["status"] == "ok" else f", {told['status']}"
        commit = f"commit {(told['commit'] or 'unknown')[:10]}{changed}"
        print(f"{side + ':':<7} {told['machine']}, {commit}, torch {told['torch']}{status}")
    if found["rows"]:
        text.show(
            "After / before: our time, the rivals', and ours over theirs",
            COLUMNS,
            [cells(row) for row in found["rows"]],
            (1, 2, 3, 4, 5, 6),
        )
    for side in ("before", "after"):
        for key in found[f"only_{side}"]:
            print(f"only {side}: {key}")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["ci95"]
    times = (text.duration(row[f"{side}_us"]) for side in ("before", "after"))
    changes = (f"{row[name]:.2f}" for name in ("ours", "rivals", "ratio"))
    return (row["run"], *times, *changes, f"{low:.2f}-{high:.2f}", row["verdict"])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks compare", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--across", action="store_true", help="though they were measured on different machines")
    parser.add_argument("--fail-on-regression", type=float, metavar="PERCENT",
                        help="exit 1 where the whole interval of a run is past so much more time")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison there too")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        found = compared(load(args.before), load(args.after))
        if found["before"]["machine"] != found["after"]["machine"] and not args.across:
            raise ValueError(f"both results must be of one machine, got {found['before']['machine']} and "
                             f"{found['after']['machine']}; pass --across to compare them anyway")  # fmt: skip
        if args.json:
            rows.write(args.json, found)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    show(found)
    if not found["rows"]:
        print("compare: the results must have a run in common, got none", file=sys.stderr)
        return 2
    bad = [] if args.fail_on_regression is None else regressions(found, args.fail_on_regression)
    for row in bad:
        print(f"regression of more than {args.fail_on_regression:g} %: {row['run']}, {row['ratio']:.3f}",
              file=sys.stderr)  # fmt: skip
    return int(bool(bad))
