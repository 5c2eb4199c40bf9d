"""Every test of the project, as `make test` runs them: three pytest processes, one summed line.

Triton reads TRITON_INTERPRET when a kernel is decorated, so interpreted and compiled kernels need processes of
their own. `python -m tests ARGS` hands ARGS to each process (say, `-k rope`).
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).parent
STAGES = {
    "plain": ("not interp and not compile and not gpu", {}),
    "interpreter": ("interp and not gpu", {"TRITON_INTERPRET": "1"}),
    "compile": ("compile and not gpu", {}),
}


def run(name: str, marker: str, extra: dict[str, str], args: list[str], report: Path) -> int:
    print(f"\n== {name}", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", str(ROOT), "-q", "-m", marker, f"--junitxml={report}", *args]
    code = subprocess.run(command, env={**os.environ, **extra}, cwd=ROOT.parent).returncode
    print(f"== {name}: {time.monotonic() - started:.0f} s", flush=True)
    return 0 if code == 5 and args else code  # 5: nothing selected, which only ARGS (say, -k) may cause


def count(report: Path) -> tuple[int, int, int]:
    """Passed, failed, skipped of one process; a process that died counts as one failure."""
    if not report.exists():
        return 0, 1, 0
    suite = xml.parse(report).getroot()[0]
    total, bad, skipped = (int(suite.get(k, 0)) for k in ("tests", "failures", "skipped"))
    bad += int(suite.get("errors", 0))
    return total - bad - skipped, bad, skipped


def main(args: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        reports = {name: Path(folder) / f"{name}.xml" for name in STAGES}
        codes = [run(name, *stage, args, reports[name]) for name, stage in STAGES.items()]
        passed, failed, skipped = (sum(n) for n in zip(*(count(r) for r in reports.values()), strict=True))
    failed = max(failed, sum(code != 0 for code in codes))  # a crash after the report still counts
    print(f"\n{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
