"""Every test of the project, as `make test` runs them: five pytest processes, one summed line.

Triton reads TRITON_INTERPRET when a kernel is decorated, so interpreted and compiled kernels need processes of
their own. All run side by side; plain tests and those that compile are two processes each, so that all end together.
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
# A thread that waits for another one leaves its core to a third; Inductor starts no processes to compile in.
PATIENT = {"OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
ONE_CORE = {"OMP_NUM_THREADS": "1", **PATIENT}


def without(*patterns: str) -> list[str]:
    """Arguments that leave out files of tests."""
    return [f"--ignore-glob={ROOT}/{pattern}" for pattern in patterns]


PLAIN, COMPILE = "not interp and not compile and not gpu", "compile and not gpu"
# Which tests, in which environment, with which arguments more: of two of a kind each has what the other leaves out.
STAGES = {
    "plain all but t": (PLAIN, PATIENT, without("*/*", "test_t*")),
    "plain folders and t": (PLAIN, PATIENT, without("test_[!t]*")),
    "interpreter": ("interp and not gpu", {"TRITON_INTERPRET": "1", **ONE_CORE}, []),
    "compile all but t": (COMPILE, ONE_CORE, without("kernels/test_t*")),
    "compile t": (COMPILE, ONE_CORE, without("test_*", "[!k]*/*", "kernels/test_[!t]*")),
}
LIVE = "plain all but t"  # its output is shown as it comes
GPU_STAGES = {f"gpu {i + 1} of {SHARDS}": ("gpu", ONE_CORE, [f"--shard={i}/{SHARDS}"]) for i in range(SHARDS)}


def start(name: str, args: list[str], report: Path) -> subprocess.Popen[bytes]:
    marker, extra, more = (STAGES | GPU_STAGES)[name]
    command = [sys.executable, "-m", "pytest", str(ROOT), "-q", "-m", marker, f"--junitxml={report}", *more, *args]
    with report.with_suffix(".log").open("wb") as log:
        stream = None if name == LIVE else log
        return subprocess.Popen(
            command, env={**os.environ, **extra}, cwd=ROOT.parent, stdout=stream, stderr=subprocess.STDOUT
        )


def side_by_side(reports: dict[str, Path], args: list[str]) -> list[int]:
    """The exit code of each process; the output of all but one comes as they end."""
    started = time.monotonic()
    children = {name: start(name, args, report) for name, report in reports.items()}
    print(f"== {', '.join(children)}, side by side", flush=True)
    running = set(children)
    while running:
        time.sleep(1)
        for name in [n for n in children if n in running and children[n].poll() is not None]:
            running.remove(name)
            print(f"\n== {name}\n{reports[name].with_suffix('.log').read_text(errors='replace')}", end="")
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
        codes = side_by_side(reports, args)
        if args or with_gpu:  # 5: nothing selected, as ARGS (say, -k) or a shard may cause
            codes = [0 if code == 5 else code for code in codes]
        passed, failed, skipped = (sum(n) for n in zip(*(count(r) for r in reports.values()), strict=True))
    failed = max(failed, sum(code != 0 for code in codes))  # a crash after the report still counts
    if began := os.environ.get("JEPA_CI_BEGAN"):
        print(f"\n== all stages: {time.time() - int(began):.0f} s")
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
