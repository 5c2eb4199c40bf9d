"""Every test of the project, as `make test` runs them: three pytest processes, one summed line.

Triton reads TRITON_INTERPRET when a kernel is decorated, so interpreted and compiled kernels need processes of
their own. Each of these two keeps one core busy: they run side by side, after the plain tests, which take every core.
`python -m tests ARGS` hands ARGS to each process (say, `-k rope`). `python -m tests --gpu ARGS` runs the GPU tests, in
as many processes as compile kernels side by side.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).parent
SHARDS = min(8, os.cpu_count() or 1)
ONE_CORE = {"OMP_NUM_THREADS": "1"}
# Which tests, in which environment, with which arguments more.
STAGES = {
    "plain": ("not interp and not compile and not gpu", {}, []),
    "interpreter": ("interp and not gpu", {"TRITON_INTERPRET": "1", **ONE_CORE}, []),
    "compile": ("compile and not gpu", ONE_CORE, []),
}
GPU_STAGES = {f"gpu {i + 1} of {SHARDS}": ("gpu", ONE_CORE, [f"--shard={i}/{SHARDS}"]) for i in range(SHARDS)}


def start(name: str, args: list[str], report: Path, log: Path | None = None) -> subprocess.Popen[bytes]:
    marker, extra, more = (STAGES | GPU_STAGES)[name]
    command = [sys.executable, "-m", "pytest", str(ROOT), "-q", "-m", marker, f"--junitxml={report}", *more, *args]
    stream = None if log is None else log.open("wb")
    return subprocess.Popen(
        command, env={**os.environ, **extra}, cwd=ROOT.parent, stdout=stream, stderr=subprocess.STDOUT if log else None
    )


def alone(name: str, args: list[str], report: Path) -> int:
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    code = start(name, args, report).wait()
    print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    return code


def side_by_side(names: list[str], args: list[str], reports: dict[str, Path]) -> list[int]:
    """Their output comes as each ends."""
    started = time.monotonic()
    logs = {name: reports[name].with_suffix(".log") for name in names}
    children = {name: start(name, args, reports[name], logs[name]) for name in names}
    print(f"\n== {' and '.join(names)}, side by side", flush=True)
    while logs:
        time.sleep(1)
        for name in [n for n in logs if children[n].poll() is not None]:
            print(f"\n== {name}\n{logs.pop(name).read_text(errors='replace')}", end="")
            print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    return [child.returncode for child in children.values()]


def count(report: Path) -> tuple[int, int, int]:
    """Passed, failed, skipped of one process; a process that died counts as one failure."""
    if not report.exists():
        return 0, 1, 0
    suite = xml.parse(report).getroot()[0]
    total, bad, skipped = (int(suite.get(k, 0)) for k in ("tests", "failures", "skipped"))
    bad += int(suite.get("errors", 0))
    return total - bad - skipped, bad, skipped


def main(args: list[str]) -> int:
    with_gpu = args[:1] == ["--gpu"]
    stages, args = (GPU_STAGES, args[1:]) if with_gpu else (STAGES, args)
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: Path(folder) / f"{name}.xml" for name in stages}
        codes = [] if with_gpu else [alone("plain", args, reports["plain"])]
        codes += side_by_side([name for name in stages if name != "plain"], args, reports)
        if args or with_gpu:  # 5: nothing selected, as ARGS (say, -k) or a shard may cause
            codes = [0 if code == 5 else code for code in codes]
        passed, failed, skipped = (sum(n) for n in zip(*(count(r) for r in reports.values()), strict=True))
    failed = max(failed, sum(code != 0 for code in codes))  # a crash after the report still counts
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
