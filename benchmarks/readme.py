"""Writes committed results into README.md and docs/measured.md, with pictures; takes new ones into benchmarks/results/.

`make results`, or `python -m benchmarks.readme`, writes them; `--adopt FILE` first takes bench-results/latest.json, a
training run's probe.json, a closed loop's plan.json, bench-results/balance.json or ranks.json, or what benchmarks.saves
prints; `--check` writes nothing and names what is out of date.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import headlines, pictures, tables
from benchmarks.adopt import adopt
from benchmarks.tables import Document

ROOT = Path(__file__).resolve().parent.parent
README, PAGE, PICTURES = ROOT / "README.md", ROOT / "docs" / "measured.md", ROOT / "docs" / "measured"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
INTRODUCTION = """# Measured

`make results` writes this page from `benchmarks/results`. Times are medians, taken in turns in one process; ratios are
those of medians, with 95 % intervals from rounds drawn again; where a number of rounds stands beside one, they were too
few for that, and it is about their span (of three rounds it holds the median three times in four). `make bench` is for
your machine, `python -m benchmarks compare` says what differs between two results."""


def page(documents: dict[str, Document]) -> str:
    """docs/measured.md: all tables."""
    parts = [INTRODUCTION]
    for name, document in tables.machines(documents).items():
        parts += [f"## {tables.machine_title(document)}", tables.measured(name, document)]
        parts += [f"![What each kernel reached, under this machine's ceilings](measured/{name}.svg)"]
    parts += ["## Training runs and their probes"]
    parts += [tables.probe(m, documents[f"{m}-probe"]) for m in tables.PROBES if f"{m}-probe" in documents]
    parts += ["## Planning", *(tables.plan(d) for name, d in documents.items() if name.endswith("-plan"))]
    for name, (_, title, show) in tables.ALONE.items():
        parts += [f"## {title}", show(documents[name])] if name in documents else []
    return "\n\n".join(parts) + "\n"


def insert(readme: str, section: str) -> str:
    """The README with `section` between its markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def written(results: Path = tables.RESULTS) -> dict[Path, str]:
    """All that is made from the results: {file: text}."""
    documents = tables.load(results)
    drawn = pictures.draw(documents)
    return {
        README: insert(README.read_text(), headlines.section(documents)),
        PAGE: page(documents),
        **{PICTURES / f"{name}.svg": picture for name, picture in drawn.items()},
    }


def stale(files: dict[Path, str]) -> list[Path]:
    """Files that are not as they would be written, or would not be written."""
    changed = [path for path, text in files.items() if not path.exists() or not pictures.same(path.read_text(), text)]
    return changed + [path for path in sorted(PICTURES.glob("*")) if path not in files]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--adopt", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--check", action="store_true", help="exit 1 where a file is out of date")
    args = parser.parse_args(argv)
    try:
        for source in args.adopt:
            print(adopt(source))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    try:
        files = written()
    except ImportError as error:
        print(f"readme: {error.name} must be installed, got none; pip install 'jepa_kernels[bench]'", file=sys.stderr)
        return 2
    old = stale(files)
    for path in old:
        print(f"{path.relative_to(ROOT)}: {'out of date; run make results' if args.check else 'written'}")
        if not args.check:
            write(path, files.get(path))
    return int(args.check and bool(old))


def write(path: Path, text: str | None) -> None:
    """None: the file is of a result that is gone."""
    if text is None:
        return path.unlink()
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
