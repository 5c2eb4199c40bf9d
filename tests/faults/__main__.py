"""Runs the seeded faults and keeps what was found: `python -m tests.faults [--op OP ...] [--backend B]`."""

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.faults.copy import Copy
from tests.faults.fault import ROOT, Fault
from tests.faults.page import PAGE, RESULTS, load, page
from tests.faults.seeded_cpu import CPU
from tests.faults.seeded_triton import TRITON

OPS = sorted({f.op for f in CPU + TRITON})


def main() -> int:
    """Exit code 1 where a chosen fault is missed that the results before did not list as missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, metavar="OP")
    parser.add_argument("--backend", choices=("cpu", "triton"))
    parser.add_argument("--page", action="store_true", help="write the page anew from results.json, run nothing")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(load()))
        return 0
    chosen = [f for f in CPU + TRITON if f.op in options.op and options.backend in (None, f.backend)]
    for fault in CPU + TRITON:
        fault.applied((ROOT / fault.path).read_text())  # before any work
    listed, surprising = {_key(f) for f in load()["faults"] if not f["caught"]}, 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder), compiled=any(f.backend == "cpu" for f in chosen))
        for fault in chosen:
            found = run(copy, fault)
            said = found["by"] or "MISSED"
            print(f"{fault.op} {fault.backend}: {fault.what}: {said} ({found['seconds']} s)", flush=True)
            keep(found)
            surprising += not found["caught"] and fault.key not in listed
    return int(surprising > 0)


def run(copy: Copy, fault: Fault) -> dict[str, Any]:
    """What the cases say of one fault. The case that catches it must pass without it."""
    started = time.monotonic()
    with copy.with_fault(fault):
        found = copy.first_failure(fault.op, fault.backend)
    if (found.case or found.crash) and (whole := copy.fails_clean(fault.op, fault.backend, found)):
        raise SystemExit(f"faults: {fault.op} must pass its cases without a fault, got {whole}; repair it first")
    by = f"{found.case}, {found.dtype}: {_what(found.problem)}" if found.case else found.crash
    return {
        **{name: getattr(fault, name) for name in ("op", "backend", "kind", "what")},
        "file": str(fault.path),
        "text": fault.text,
        "caught": bool(by),
        "by": by,
        "ran": found.ran,
        "cases": found.cases,
        "seconds": round(time.monotonic() - started, 1),
        "commit": copy.commit,
    }


def _what(problem: str) -> str:
    """The tensor and the bound that broke, or the exact check, or the exception."""
    bounds = r"max error (\S+) \(budget (\S+)\), rms (\S+) \(budget (\S+)\)"
    found = re.match(rf"(\S+): {bounds}", problem)
    if found is None:
        return problem.replace("|", "/")[:80]
    name, error, allowed, rms, rms_allowed = found.groups()
    if not float(error) <= float(allowed):
        return f"{name} errs by {error}, budget {allowed}"
    return f"{name} errs by rms {rms}, budget {rms_allowed}"


def keep(found: dict[str, Any]) -> None:
    """Write results and page, faults in the order of their lists."""
    results = load()
    kept = {_key(f): f for f in [*results["faults"], found]}
    results["faults"] = [kept[f.key] for f in CPU + TRITON if f.key in kept]
    results["machine"] = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


def _key(found: dict[str, Any]) -> tuple[str, str, str]:
    return found["op"], found["backend"], found["what"]


if __name__ == "__main__":
    sys.exit(main())
