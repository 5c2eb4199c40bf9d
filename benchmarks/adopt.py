"""Takes a result into benchmarks/results/: a complete run of the benchmarks, or of what tables.py can show."""

import json
from pathlib import Path
from typing import Any

from benchmarks import rows, tables, targets

KEPT = (
    "schema",
    "status",
    "started",
    "seconds",
    "selection",
    "first_row_s",
    "machine",
    "git",
    "versions",
    "peaks",
    "rows",
)
PRIVATE = {"machine": ("host", "env", "load_before"), "git": ("branch",)}


def adopt(source: Path, results: Path = tables.RESULTS) -> Path:
    """Copy a result into `results`, without what only its machine's owner needs; raises ValueError for a bad one."""
    try:
        name, kept = named(json.loads(source.read_text()))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} can't be adopted: the README can't show it, {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{source} can't be adopted: {error}") from error
    path = results / f"{name}.json"
    rows.write(path, kept)
    return path


def named(document: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of its file, and what is kept of it."""
    if "probes" in document:
        model = trained(document["config"])
        tables.probe(model, document)
        return f"{model}-probe", document
    if "problem" in document:
        return of_plan(document)
    for name, (key, _, show) in tables.ALONE.items():
        if key in document:
            show(document)
            return name, document
    return of_machine(document)


def trained(config: dict[str, Any]) -> str:
    """Name of the shipped config that a run is of: LeJEPA has one for each source of views."""
    architecture = config["architecture"]
    source = config.get("data", {}).get("source", "mnist")
    return architecture if source == "mnist" else f"{architecture}_{source}"


def of_plan(document: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A closed loop's summary, with where each episode ended in place of its whole course."""
    if not document["complete"]:
        raise ValueError("it was interrupted")
    kept = {key: value for key, value in document.items() if key != "episodes"}
    kept["final_distances"] = {
        name: [e["policies"][name]["total"][-1] for e in document["episodes"]] for name in document["summary"]
    }
    tables.plan(kept)
    return f"{document['problem']}-plan", kept


def of_machine(document: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A complete run of the benchmarks: every target measured."""
    wrong = rows.problems(document)
    if document.get("status") != "ok":
        wrong.insert(0, f"status is {document.get('status')!r}, not 'ok'")
    if document.get("selection", "full") != "full":
        wrong.insert(0, f"it has the {document['selection']} selection alone; run make bench FULL=1")
    if not wrong:
        checked = targets.check(document["rows"])
        wrong = [f"{t.name} against {t.what} was not measured" for t, row, _ in checked if row is None]
    if wrong:
        raise ValueError(wrong[0])
    kept = {name: document[name] for name in KEPT if name in document}
    kept["rows"] = [{k: v for k, v in row.items() if k != "samples_us"} for row in kept["rows"]]
    for name, private in PRIVATE.items():
        kept[name] = {k: v for k, v in kept[name].items() if k not in private}
    return rows.slug(kept["machine"]), kept
