"""Docstrings, which are laid out for `help()`, as Markdown: equations, lists of arguments, text."""

from __future__ import annotations

import re
from typing import Any

import griffe

SPECIAL = re.compile(r"([\\*_\[\]|#])")
PARTS = ("Returns ", "Gradient: ", "No gradient", "Raises ", "Source: ")
LABEL = re.compile(r"^(\.?[A-Za-z_][\w.]*(?:, \.?[A-Za-z_][\w.]*)*): ")
ASSIGNED = re.compile(r" (=|<-|->) ")
EQUATION = re.compile(r"^\w+ (=|<-) ")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is rendered."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            names = {p.name for p in obj.parameters} if isinstance(obj, griffe.Function) else None
            obj.docstring.value = markdown(obj.docstring.value, names)


def markdown(text: str, names: set[str] | None) -> str:
    """A docstring's paragraphs; `names`: of the arguments that may begin a list's entries, None: any labels may."""
    blocks = [block.split("\n") for block in re.split(r"\n\s*\n", text.strip("\n"))]
    return "\n\n".join(shown for i, block in enumerate(blocks) if (shown := paragraph(block, names, i == 1)))


def paragraph(lines: list[str], names: set[str] | None, second: bool) -> str:
    if any(line.lstrip().startswith("| ") for line in lines):
        return "\n".join(line.strip() for line in lines)
    entries = [is_entry(line, names) for line in lines]
    told = second and not entries[0] and (EQUATION if names is None else ASSIGNED).search("\n".join(lines))
    if lines[0].startswith(" ") or told:
        return "\n".join(["``` {.text .equation}", *lines, "```"])  # equations follow the summary, as they are set
    return listed(lines, entries)


def is_entry(line: str, names: set[str] | None) -> bool:
    """Whether the line begins what is said of an argument."""
    found = LABEL.match(line)
    if not found:
        return False
    if names is None:
        return found[1][0].islower() or found[1].startswith(".")
    return all(label in names for label in found[1].split(", "))


def listed(lines: list[str], entries: list[bool]) -> str:
    """Entries as a list; other lines as text, a paragraph from each that begins with one of PARTS on."""
    shown: list[str] = []
    for line, entry in zip(lines, entries, strict=True):
        if entry:
            label, rest = line.split(": ", 1)
            shown.append(f"- {', '.join(f'`{name}`' for name in label.split(', '))}: {escape(rest)}")
        elif shown and (line.startswith(" ") or (not line.startswith(PARTS) and goes_on(shown[-1]))):
            shown[-1] += " " + escape(line.strip())
        else:
            shown.append(escape(line))
    return "\n\n".join(shown)


def goes_on(text: str) -> bool:
    """Whether a next line that does not hang below belongs to it: to an entry, inside of a sentence alone."""
    return not (text.startswith("- ") and text.endswith("."))


def escape(text: str) -> str:
    """Markdown's own characters as they are, outside of code."""
    parts = text.split("`")
    return "`".join(part if i % 2 else SPECIAL.sub(r"\\\1", part).replace("<", "&lt;") for i, part in enumerate(parts))
