"""Turns latest.json into pictures and pages."""

from pathlib import Path
from typing import Any


def write_all(document: dict[str, Any], out: Path) -> Path:
    return out
