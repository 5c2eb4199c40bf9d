"""`python -m jepa_kernels verify`: the conformance cases of every op, on this machine."""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from jepa_kernels._core import check
from jepa_kernels._core.select import short
from jepa_kernels.files import replacing
from jepa_kernels.ops import OPS
from jepa_kernels.testing import DTYPES
from jepa_kernels.verify import files, table
from jepa_kernels.verify.rows import BACKENDS, Row, prepare, rows, run_row

PASSED, MISMATCH, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 128 + signal.SIGINT
DESCRIPTION = """Holds every kernel to its error budget and to what is exact, on this machine.
Exit codes: 0 all pass, 1 a mismatch, 2 usage, 3 a backend or device asked for is missing, 130 interrupted."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        chosen = _chosen(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    if options.device is not None:
        try:
            check.usable_device("verify", "--device", options.device)
        except ValueError as error:
            print(error, file=sys.stderr)
            return MISSING
    prepare()
    complete = _run(chosen)
    _report(chosen, complete, options)
    return _code(chosen, complete, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jepa_kernels verify", description=DESCRIPTION)
    parser.add_argument("--op", nargs="+", default=OPS, metavar="OP", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--backend", nargs="+", metavar="B", help=f"of {', '.join(BACKENDS)}; must be there when named")
    names = [short(d) for d in DTYPES]
    parser.add_argument("--dtype", nargs="+", default=names, metavar="D", help=f"of {', '.join(names)}")
    parser.add_argument("--device", metavar="{cpu,cuda}", help="left out: the CPU, and the GPU where there is one")
    parser.add_argument("--json", metavar="FILE", help="every number, as JSON; - for the standard output")
    parser.add_argument("--junit", metavar="FILE", help="a test case each, as JUnit's XML")
    return parser


def _chosen(options: argparse.Namespace) -> list[Row]:
    _known("--op", options.op, OPS)
    _known("--backend", options.backend or (), BACKENDS)
    _known("--dtype", options.dtype, [short(d) for d in DTYPES])
    _known("--device", [options.device] if options.device is not None else [], ("cpu", "cuda"))
    for option, name in (("--json", options.json), ("--junit", options.junit)):
        if name is not None and (option, name) != ("--json", "-"):
            _writable(option, Path(name))
    dtypes = [getattr(torch, name) for name in options.dtype]
    return rows(options.op, options.backend or BACKENDS, dtypes, options.device)


def _known(option: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1, 0.4)
            remedy = f"did you mean {near[0]}?" if near else "leave it out for all"
            check.fail("verify", option, f"be one of {', '.join(allowed)}", repr(name), remedy)


def _writable(option: str, path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        what = "a folder" if path.is_dir() else "a folder that is not there, or not writable"
        check.fail("verify", option, "name a file in a writable folder", f"{path} ({what})", "choose another place")


def _run(chosen: Sequence[Row]) -> bool:
    """Whether every row was run to its end: Ctrl-C leaves what is done."""
    try:
        for row in chosen:
            if row.reason is None:
                table.progress(row)
            run_row(row)
        return True
    except KeyboardInterrupt:
        return False
    finally:
        table.progress_ends()


def _report(chosen: Sequence[Row], complete: bool, options: argparse.Namespace) -> None:
    piped = options.json == "-"
    table.show(chosen, sys.stderr if piped else sys.stdout)
    if not complete:
        print("interrupted: the rows above are partial", file=sys.stderr)
    if piped:
        print(files.as_json(chosen, complete), end="")
    elif options.json is not None:
        _write(Path(options.json), files.as_json(chosen, complete))
    if options.junit is not None:
        _write(Path(options.junit), files.as_junit(chosen))


def _write(path: Path, content: str) -> None:
    with replacing(path) as beside:
        beside.write_text(content)


def _code(chosen: Sequence[Row], complete: bool, options: argparse.Namespace) -> int:
    if any(row.verdict == "fail" for row in chosen):
        return MISMATCH if complete else INTERRUPTED
    if not complete:
        return INTERRUPTED
    missing = [name for name in options.backend or () if not any(r.backend == name and r.results for r in chosen)]
    for name in missing:
        why = next((r.reason for r in chosen if r.backend == name), f"no kernel of {', '.join(options.op)} has it")
        print(f"verify: --backend must be able to run here, got {name} ({why}); leave it out", file=sys.stderr)
    return MISSING if missing else PASSED
