"""The result document `jepa-bench/1`: its rows, its check, and files that are never half-written."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import stats

SCHEMA = "jepa-bench/1"
STAGES = ("forward", "backward", "step")  # "backward" is forward + backward, as one training step runs it
STATUS = ("ok", "partial", "failed")
NUMBER = (int, float)
FIELDS: dict[str, tuple[type, ...]] = {
    "kind": (str,), "name": (str,), "workload": (str,), "pass": (str,), "dtype": (str,), "device": (str,),
    "backend": (str,), "baseline": (str,), "ours_us": (dict, type(None)), "baseline_us": (dict, type(None)),
    "ratio": (*NUMBER, type(None)), "parity": (dict,), "bytes": (*NUMBER, type(None)),
    "flops": (*NUMBER, type(None)), "share_of_peak": (*NUMBER, type(None)), "peak_bytes": (*NUMBER, type(None)),
    "ci95": (list, type(None)), "status": (str,), "repro": (str,),
}  # fmt: skip
Row = dict[str, Any]


def key(row: Row) -> str:
    """`op/workload/pass/dtype/baseline`: what `python -m benchmarks --row` takes."""
    return "/".join(row[f] for f in ("name", "workload", "pass", "dtype", "baseline"))


def repro(row_key: str, device: str, threads: int, backend: str | None = None) -> str:
    """The command that measures this row again."""
    extra = "" if device == "cpu" else f" --device {device}"
    extra += "" if backend is None else f" --backend {backend}"
    return f"python -m benchmarks --row {row_key} --threads {threads}{extra}"


def slug(machine: dict[str, Any]) -> str:
    """A file name for a machine: its GPU, or its processor, instruction set and threads."""
    gpu = machine.get("gpu")
    name = (
        gpu["name"].removeprefix("NVIDIA ")
        if gpu
        else f"{machine['cpu']} {machine['isa']} {machine['threads']} threads"
    )
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stated(kind: str, run: Any, parity: dict[str, Any], **more: Any) -> Row:
    """What every row of a run of a model says, whatever was measured; `more` adds to it or takes its place."""
    return {
        "kind": kind,
        "name": run.name,
        "workload": run.workload.name,
        "pass": run.stage,
        "dtype": run.dtype,
        "device": run.settings.device,
        "backend": "automatic",
        "parity": parity,
        "bytes": None,
        "flops": None,
        "threads": run.settings.threads,
        **more,
    }


def finished(row: Row, settings: Any) -> Row:
    """With what was not measured, and the command that measures it again."""
    blank = dict.fromkeys(("share_of_peak", "peak_bytes"))
    return {**blank, **row, "repro": repro(key(row), settings.device, settings.threads)}


def failed(common: Row, baseline: str, error: str) -> Row:
    """A row without a number: parity is red, or the rival can't run."""
    empty = dict.fromkeys(("ours_us", "baseline_us", "ratio", "ci95", "share_of_peak", "peak_bytes"))
    return {**common, **empty, "baseline": baseline, "status": "failed", "error": error}


def timed_row(common: Row, baseline: str, ours_s: np.ndarray, baseline_s: np.ndarray, interrupted: bool = False) -> Row:
    """A row from interleaved times; partial when Ctrl-C cut them short."""
    if len(ours_s) < 3:
        return {**failed(common, baseline, "interrupted"), "status": "partial"}
    return {
        **common,
        "baseline": baseline,
        "ours_us": stats.quantiles(ours_s),
        "baseline_us": stats.quantiles(baseline_s),
        "ratio": stats.ratio(ours_s, baseline_s),
        "ci95": stats.ratio_ci95(ours_s, baseline_s),
        "rounds": len(ours_s),
        "samples_us": {"ours": _samples(ours_s), "baseline": _samples(baseline_s)},  # for compare; not committed
        "status": "partial" if interrupted else "ok",
    }


def _samples(seconds: np.ndarray) -> list[float]:
    return [float(f"{s:.6g}") for s in seconds * 1e6]


def problems(document: dict[str, Any]) -> list[str]:
    """Every way in which a document breaks the schema; empty for a good one."""
    if document.get("schema") != SCHEMA:
        return [f"schema is {document.get('schema')!r}, not {SCHEMA!r}"]
    found = [f"{name} is missing" for name in ("machine", "git", "versions", "peaks") if name not in document]
    if not isinstance(document.get("rows"), list):
        return [*found, "rows is not a list"]
    return found + [p for i, row in enumerate(document["rows"]) for p in _row_problems(i, row)]


def _row_problems(i: int, row: Row) -> list[str]:
    found = [f"row {i}: {name} is missing" for name in FIELDS if name not in row]
    found += [
        f"row {i}: {name} is a {type(row[name]).__name__}"
        for name, types in FIELDS.items()
        if name in row and not isinstance(row[name], types)
    ]
    if found:
        return found
    found += [f"row {i}: pass is {row['pass']!r}"] if row["pass"] not in STAGES else []
    found += [f"row {i}: status is {row['status']!r}"] if row["status"] not in STATUS else []
    if row["status"] == "ok":
        found += [f"row {i}: ok without {name}" for name in ("ours_us", "baseline_us", "ratio") if row[name] is None]
        found += [] if row["parity"].get("pass") is True else [f"row {i}: ok without parity"]
    if row["status"] == "failed" and row["ratio"] is not None:
        found.append(f"row {i}: failed with a number")
    if row["ratio"] is not None and abs(row["ratio"] - row["baseline_us"]["p50"] / row["ours_us"]["p50"]) > 1e-6:
        found.append(f"row {i}: ratio is not baseline p50 / ours p50")
    return found


def write(path: Path, document: dict[str, Any]) -> None:
    """Write beside and rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(document, indent=1, default=_plain) + "\n")
    os.replace(beside, path)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON value")
