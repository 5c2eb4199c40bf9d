"""A verification as JSON and as JUnit's XML."""

import json
import math
import re
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jepa_kernels._core.select import short
from jepa_kernels.about import info
from jepa_kernels.testing import Parity
from jepa_kernels.verify.rows import Result, Row

FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # by XML 1.0, escaped or not
SCHEMA = 1  # raised when a field changes its meaning or goes


def as_json(rows: Sequence[Row], complete: bool) -> str:
    """Every number of every row, and the machine. complete: false where the run was broken off.

    Numbers that JSON lacks are strings ("inf", "nan"); no cap is null.
    """
    report = {
        "schema": SCHEMA,
        "complete": complete,
        "machine": info(),
        "rows": [
            {
                **{name: getattr(row, name) for name in ("op", "backend", "device")},
                "dtype": short(row.dtype),
                **{name: getattr(row, name) for name in ("verdict", "reason")},
                "seconds": round(row.seconds, 4),
                "worst_max": _number(row.worst("max")),
                "worst_rms": _number(row.worst("rms")),
                "cases": [_case(result) for result in row.results],
            }
            for row in rows
        ],
    }
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def _case(result: Result) -> dict[str, Any]:
    return {
        "name": result.case,
        "ok": not result.problems,
        "problems": result.problems,
        "refused": result.refused,
        "seconds": round(result.seconds, 4),
        "tensors": [_tensor(parity) for parity in result.parities],
    }


def _tensor(parity: Parity) -> dict[str, Any]:
    numbers = {k: _number(v) if isinstance(v, float) else v for k, v in asdict(parity).items()}
    return numbers | {"cap": parity.cap if math.isfinite(parity.cap) else None, "ok": parity.ok}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def as_junit(rows: Sequence[Row]) -> str:
    """A testcase per op x backend x dtype x case; skipped where the row can't run or was not reached. For UTF-8."""
    suite = xml.Element("testsuite", name="jepa_kernels.verify")
    counts = dict(tests=0, failures=0, errors=0, skipped=0)
    for row in rows:
        found = {result.case: result for result in row.results}
        for case in row.cases:
            result = found.get(case.name)
            place = f"{row.op}.{row.backend}.{row.device}.{short(row.dtype)}"
            test = xml.SubElement(suite, "testcase", classname=place, name=case.name)
            test.set("time", f"{result.seconds if result else 0:.4f}")
            counts["tests"] += 1
            if result is not None and result.problems:
                counts["failures"] += 1
                xml.SubElement(test, "failure", message=result.problems[0]).text = "\n".join(result.problems)
            elif result is None or result.refused is not None:
                counts["skipped"] += 1
                why = result.refused if result else row.reason
                xml.SubElement(test, "skipped", message=why or "the run was broken off before this case")
    for name, count in counts.items():
        suite.set(name, str(count))
    root = xml.Element("testsuites")
    root.append(suite)
    xml.indent(root)
    text = xml.tostring(root, encoding="unicode")
    return f"<?xml version='1.0' encoding='utf-8'?>\n{FORBIDDEN.sub('', text)}\n"
