"""`python -m jepa_kernels verify`: the conformance cases of every op, on this machine."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_kernels._core import check
from jepa_kernels._core.select import short
from jepa_kernels.files import check_writable, replacing
from jepa_kernels.names import check_known
from jepa_kernels.ops import OPS
from jepa_kernels.testing import DTYPES
from jepa_kernels.verify import files, table
from jepa_kernels.verify.rows import BACKENDS, Row, prepare, rows, run_row

PASSED, MISMATCH, USAGE, MISSING, INTERRUPTED = 0, 1, 2, 3, 128 + signal.SIGINT
DESCRIPTION = """Holds every kernel to its error budget and to what is exact, on this machine.
Exit codes: 0 all pass, 1 a mismatch, 2 usage or a file that can't be written, 3 a backend or device asked for is
missing or there is nothing to verify, 130 interrupted."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code. Ctrl-C keeps what is done."""
    options = _parser().parse_args(argv)
    try:
        return _verify(options)
    except KeyboardInterrupt:
        return INTERRUPTED


def _verify(options: argparse.Namespace) -> int:
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
    try:
        prepare()
        _run(chosen)
    finally:
        written = _report(chosen, options)
    return _code(chosen, options) if written else USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jepa_kernels verify", description=DESCRIPTION)
    names: dict[str, Any] = dict(nargs="+", action="extend")
    dtypes = ", ".join(map(short, DTYPES))
    parser.add_argument("--op", **names, metavar="OP", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--backend", **names, metavar="B", help=f"of {', '.join(BACKENDS)}; must be there when named")
    parser.add_argument("--dtype", **names, metavar="D", help=f"of {dtypes}; all by default")
    parser.add_argument("--device", metavar="{cpu,cuda}", help="left out: the CPU, and the GPU where there is one")
    parser.add_argument("--json", metavar="FILE", help="every number, as JSON; - for the standard output")
    parser.add_argument("--junit", metavar="FILE", help="a test case each, as JUnit's XML")
    return parser


def _chosen(options: argparse.Namespace) -> list[Row]:
    dtypes = {short(d): d for d in DTYPES}
    ops, backends = (_names(options, name, known) for name, known in (("op", OPS), ("backend", BACKENDS)))
    asked = [dtypes[name] for name in _names(options, "dtype", tuple(dtypes))]
    if options.device is not None:
        check_known("verify", "--device", options.device, ("cpu", "cuda"), "leave it out for all")
    for option, path in _files(options):
        if option == "--junit" and options.json not in (None, "-") and path.resolve() == Path(options.json).resolve():
            check.fail("verify", option, "name a file of its own", f"{path}, that of --json", "choose another place")
        try:
            check_writable(path)
        except OSError as error:
            actual = f"{path} ({error.strerror})"
            check.fail("verify", option, "name a file in a writable folder", actual, "choose another place")
    return rows(ops, backends, asked, options.device)


def _names(options: argparse.Namespace, name: str, known: Sequence[str]) -> list[str]:
    """Those given, each once; all where none is."""
    given = dict.fromkeys(getattr(options, name) or known)
    for one in given:
        check_known("verify", f"--{name}", one, known, "leave it out for all")
    return list(given)


def _files(options: argparse.Namespace) -> list[tuple[str, Path]]:
    named = ("--json", options.json if options.json != "-" else None), ("--junit", options.junit)
    return [(option, Path(name)) for option, name in named if name is not None]


def _run(chosen: Sequence[Row]) -> None:
    try:
        for row in chosen:
            if row.reason is None:
                table.progress(row)
            run_row(row)
    finally:
        table.progress_ends()


def _report(chosen: Sequence[Row], options: argparse.Namespace) -> bool:
    """Files first, then the table, whatever becomes of the files; whether all could be written."""
    complete, written = _complete(chosen), True
    contents = {"--json": files.as_json(chosen, complete), "--junit": files.as_junit(chosen)}
    for option, path in _files(options):
        try:
            with replacing(path) as beside:
                beside.write_text(contents[option], encoding="utf-8")
        except OSError as error:
            written = False
            print(f"verify: {option} must be writable, got {path} ({error.strerror}); free space", file=sys.stderr)
    piped = options.json == "-"
    try:
        table.show(chosen, sys.stderr if piped else sys.stdout)
        if piped:
            print(contents["--json"], end="")
        sys.stdout.flush()
    except OSError as error:  # a full disk or a pipe that nobody reads; what is left of it is not told at exit
        written = False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"verify: the output must be writable, got {error.strerror}; free space, or name a file", file=sys.stderr)
    if not complete:
        print("interrupted: the rows above are partial", file=sys.stderr)
    return written


def _complete(chosen: Sequence[Row]) -> bool:
    return all(row.complete for row in chosen)


def _code(chosen: Sequence[Row], options: argparse.Namespace) -> int:
    if any(row.verdict == "fail" for row in chosen):
        return MISMATCH
    ran = {row.backend for row in chosen if row.results}
    # Our own kernels must be there, named or not: without the extension little else runs on a CPU.
    asked = options.backend or [row.backend for row in chosen if row.backend == "cpu"]
    place = f" on {options.device}" if options.device is not None else ""
    of = ", ".join(options.op or ["any op"])
    remedy = "leave it out" if options.backend else "see `python -m jepa_kernels info`"
    missing = [name for name in dict.fromkeys(asked) if name not in ran]
    for name in missing:
        why = next((r.reason for r in chosen if r.backend == name), f"no kernel of {of} has it{place}")
        print(f"verify: --backend must be able to run here, got {name} ({why}); {remedy}", file=sys.stderr)
    if not ran and not missing:
        print(f"verify: there must be a kernel to verify, got none of {of}{place}; leave options out", file=sys.stderr)
    return PASSED if ran and not missing else MISSING
