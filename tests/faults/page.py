"""What was found, kept in results.json, and docs/faults.md made of it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.fault import ROOT

RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# The suite tested by faults

Does the conformance suite notice a wrong kernel? {total} faults, slips of the kinds that kernels are known for, were
put one at a time into copies of our own sources, C++ and Triton; the copy was built, and the cases of
`python -m jepa_kernels verify` for that op and backend were run on it, in their order, until one failed: error budget
and exact checks. The case that fails passes without the fault.
**{caught} of {total} were caught**, {missed}.

`python -m tests.faults` does it again (C++ needs a build, Triton runs in its interpreter; {minutes} minutes on a shared
core). {machine}; C++ faults are in the AVX2 build. `tests/faults/seeded_cpu.py` and `seeded_triton.py` hold the faults
as text, old and new. `tests/test_faults.py` puts others around the calls of the CPU kernels, in every run of the tests.

| op | backend | kind | fault | caught by | as case |
|---|---|---|---|---|---|
"""


def load() -> dict[str, Any]:
    """What was found so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": "", "faults": []}


def page(results: dict[str, Any]) -> str:
    """The page's text."""
    faults = results["faults"]
    caught = sum(f["caught"] for f in faults)
    lines = [
        f"| `{f['op']}` | {f['backend']} | {f['kind']} | {f['what']} (`{f['file']}`) "
        f"| {f['by'] if f['caught'] else '**missed**'} | {f['ran'] or '?'} of {f['cases'] or '?'} |"
        for f in faults
    ]
    head = HEAD.format(
        total=len(faults),
        caught=caught,
        missed=_missed([f for f in faults if not f["caught"]]),
        minutes=max(round(sum(f["seconds"] for f in faults) / 60), 1),
        machine=results["machine"],
    )
    kinds = Counter(f["kind"] for f in faults)
    tail = "\nKinds: " + ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())) + ".\n"
    return head + "\n".join(lines) + "\n" + tail


def _missed(faults: list[dict[str, Any]]) -> str:
    if not faults:
        return "none missed"
    return "missed: " + "; ".join(f"`{f['op']}` {f['backend']}, {f['what']}" for f in faults)
