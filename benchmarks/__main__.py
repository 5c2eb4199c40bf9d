"""Front end of `make bench`: runs the benchmarks in a process of their own, shows each row as it comes, reports.

The rows are written to OUT/latest.json as they come, so that an interrupted or crashed run keeps what it measured.
"""

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import compare, report, rows, text

ROOT = Path(__file__).resolve().parent.parent
INTERRUPTED = 130
CHOSEN = ("row", "op", "workload", "dtype")
PATHS = ["benchmarks/ops", "benchmarks/masks", "benchmarks/models"]
NEEDED = ("pytest", "pytest_benchmark")


class Refused(Exception):
    """Nothing was measured, and why."""


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__.splitlines()[0],
        epilog="`compare A.json B.json` as first argument: what changed between two results",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="a selection that takes under a minute")
    size.add_argument("--full", action="store_true", help="every row: three times as long, and what can be committed")
    parser.add_argument("--row", action="append", default=[], metavar="KEY",
                        help="measure only name[/workload[/pass[/dtype[/baseline]]]]; may be repeated")  # fmt: skip
    for name in ("--op", "--workload", "--dtype"):
        parser.add_argument(name, action="append", default=[], help="measure only these; may be repeated")
    parser.add_argument("--backend", help="measure this backend of ours, and no other in its place; ops alone")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--budget", type=float, help="seconds of timing per run (default 0.5, smoke 0.2)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench-results")
    parser.add_argument("paths", nargs="*", default=PATHS)
    return parser.parse_args(argv)


def selection(args: argparse.Namespace) -> str:
    """Which runs these words select: smoke, full, chosen (by name or file), or brief, where they say nothing."""
    chosen = args.paths != PATHS or args.backend or any(getattr(args, name) for name in CHOSEN)
    if args.smoke or chosen:
        return "chosen" if chosen else "smoke"
    return "full" if args.full or args.device == "cuda" else "brief"


def command(args: argparse.Namespace) -> list[str]:
    found = [sys.executable, "-m", "pytest", *args.paths, "-q", "--no-header", "-o", "python_files=bench_*.py",
             "-p", "no:cacheprovider", "--import-mode=importlib", f"--bench-device={args.device}",
             f"--threads={args.threads}"]  # fmt: skip
    found += ["--smoke"] if args.smoke else []
    found += ["--brief"] if selection(args) == "brief" else []
    found += [f"--budget={args.budget}"] if args.budget else []
    found += [f"--backend={args.backend}"] if args.backend else []
    return found + [f"--{name}={key}" for name in CHOSEN for key in getattr(args, name)]


def start(args: argparse.Namespace, events: Path, log: Path) -> subprocess.Popen[bytes]:
    """The measuring process, in its own session: Ctrl-C reaches it through us, once."""
    events.unlink(missing_ok=True)
    events.touch()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "JEPA_BENCH_EVENTS": str(events.resolve()), "PYTHONPATH": path}
    env.setdefault("OMP_NUM_THREADS", str(args.threads))
    with log.open("wb") as stream:
        return subprocess.Popen(
            command(args), cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def follow(child: subprocess.Popen[bytes], events: Path) -> Iterator[dict[str, Any]]:
    """The child's events as they come, until it has ended."""
    with events.open() as stream:
        line = ""
        while True:
            ended = child.poll() is not None
            line += stream.readline()
            if line.endswith("\n"):
                yield json.loads(line)
                line = ""
            elif ended:
                return
            else:
                time.sleep(0.05)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    args = parse(argv)
    gone = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if gone:
        print(f"bench: {gone[0]} must be installed, got none; pip install 'jepa_kernels[bench]'", file=sys.stderr)
        return 2
    try:
        return measure(args, argv)
    except Refused as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        actual = f"{error.strerror or error} ({error.filename or args.out})"
        print(
            f"bench: --out {args.out} must be a folder with room to write, got {actual}; pass another", file=sys.stderr
        )
        return 2


def measure(args: argparse.Namespace, argv: list[str]) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    events, log, latest = args.out / "events.jsonl", args.out / "pytest.log", args.out / "latest.json"
    began = time.time()
    document: dict[str, Any] = {
        "schema": rows.SCHEMA,
        "status": "partial",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "command": shlex.join(["python", "-m", "benchmarks", *argv]),
        "selection": selection(args),
        **{name: {} for name in ("machine", "git", "versions", "peaks")},
        "rows": [],
    }
    child = start(args, events, log)
    try:
        code = watch(child, events, document, latest)
    finally:  # it must not outlive us
        if child.poll() is None:
            child.kill()
    document["seconds"] = round(time.time() - began, 1)
    document["status"] = "partial" if code == INTERRUPTED else ("ok" if good(document, code) else "failed")
    rows.write(latest, document)
    text.terminal(document)
    if document["rows"]:
        page = report.write_all(document, args.out)
        print(f"\n{latest}\n{page}\n")
    if document["status"] == "failed":
        print(f"some rows failed; the whole log is in {log}", file=sys.stderr)
    return {"ok": 0, "partial": INTERRUPTED}.get(document["status"], 1)


def good(document: dict[str, Any], code: int) -> bool:
    return code == 0 and bool(document["rows"]) and all(row["status"] == "ok" for row in document["rows"])


def watch(child: subprocess.Popen[bytes], events: Path, document: dict[str, Any], latest: Path) -> int:
    """Collect the child's events into the document; the exit code, or INTERRUPTED."""
    began = time.monotonic()
    with text.Progress() as progress:
        try:
            for event in follow(child, events):
                if event["event"] == "rows":
                    document.setdefault("first_row_s", round(time.monotonic() - began, 1))
                take(event, document, latest, progress)
        except KeyboardInterrupt:
            progress.note("interrupted: keeping the rows so far")
            child.send_signal(signal.SIGINT)
            try:
                child.wait(30)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                child.kill()
                child.wait()
            document["rows"] = []
            for event in follow(child, events):
                take(event, document, latest, text.Silent())
            return INTERRUPTED
    if child.returncode < 0:
        print(f"the measuring process died of {signal.Signals(-child.returncode).name}", file=sys.stderr)
    return child.returncode


def take(event: dict[str, Any], document: dict[str, Any], latest: Path, progress: Any) -> None:
    kind = event.pop("event")
    if kind == "header":
        document.update(event)
        progress.header(document)
    elif kind == "refused":
        raise Refused(event["why"])
    elif kind == "note":
        progress.note(event["text"])
    elif kind == "collected":
        progress.total(event["count"])
    elif kind == "start":
        progress.start(event["id"])
    elif kind == "rows":
        document["rows"] += event["rows"]
        progress.rows(event["rows"])
        rows.write(latest, document)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the measuring process must not outlive us
    sys.exit(main())
