"""A copy of the sources and of their build, in which one file at a time is faulty."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.faults.fault import ROOT, Fault

BUILD = ROOT / "build" / str(sys.implementation.cache_tag)
LEVEL = "avx2"  # the instruction set whose objects are built anew: every processor that runs the kernels has it
HARNESS, TIMEOUT, ALL = 70, 124, sys.maxsize  # exit codes; as many cases as there are
PATIENCE = 1200  # seconds, after which a run counts as one that hangs


class Copy:
    """The tree in `folder`. compiled: with the objects of the CPU kernels, linked anew for each fault."""

    def __init__(self, folder: Path, compiled: bool):
        self.folder = folder
        self.commit = _commit()
        self._clean: dict[tuple[str, str], tuple[int, Found]] = {}
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "jepa_kernels", folder / "jepa_kernels", ignore=ignored)
        if compiled:
            if not (BUILD / "build.ninja").exists():
                raise SystemExit(f"faults: the kernels must be built, got no {BUILD}; run `make build`")
            subprocess.run(["cmake", "--build", BUILD, "--target", "_C"], check=True, capture_output=True)
            shutil.copytree(ROOT / "csrc", folder / "csrc")
            shutil.copytree(BUILD, folder / "build")
            module = next((BUILD / "out").glob("_C*.so"))
            self.module = module.name
            self._place(BUILD / "out")

    @contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        """Inside the block the copy has the fault."""
        path = self.folder / fault.path
        whole = path.read_text()
        path.write_text(fault.applied(whole))
        try:
            if fault.backend == "cpu":
                with self._compiled(fault.op):
                    yield
            else:
                yield
        finally:
            path.write_text(whole)

    @contextmanager
    def _compiled(self, op: str) -> Iterator[None]:
        command = self._command(op)
        built = self.folder / "build" / command["output"]
        whole = built.read_bytes()
        text = command["command"].replace(str(ROOT / "csrc"), str(self.folder / "csrc"))
        text = text.replace(" -O3 ", " -O1 ")  # compiles in half the time, to the same roundings
        try:
            self._run(text)
            self._link()
            self._place(self.folder / "build" / "out")
            yield
        finally:
            built.write_bytes(whole)
            self._place(BUILD / "out")

    def _command(self, op: str) -> dict[str, str]:
        found = json.loads((self.folder / "build" / "compile_commands.json").read_text())
        return next(c for c in found if f"jepa_{LEVEL}.dir/csrc/{op}/cpu.cpp" in c["output"])

    def _link(self) -> None:
        for made in ("libjepa_kernels.a", f"out/{self.module}"):
            asked = ["ninja", "-C", str(BUILD), "-t", "commands", "-s", made]
            self._run(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)

    def _place(self, out: Path) -> None:
        shutil.copy2(out / self.module, self.folder / "jepa_kernels" / self.module)

    def _run(self, command: str) -> None:
        done = subprocess.run(command, shell=True, cwd=self.folder / "build", capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"faults: the faulty source must compile, got\n{done.stderr}\nwrite the fault anew")

    def first_failure(self, op: str, backend: str, most: int = ALL) -> Found:
        """Runs the first `most` cases of `python -m jepa_kernels verify --op OP --backend B` until one fails.

        In a process forked off this one, which has torch: its import takes longer than most ops' cases.
        """
        assert "jepa_kernels" not in sys.modules, "a forked process must import the copy"
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._run_and_exit(op, backend, most, report)
        code = _wait(child)
        if code == HARNESS:
            raise SystemExit(f"faults: the harness must run {op} on {backend}, got\n{report.read_text()}")
        what = "a time-out" if code == TIMEOUT else f"a crash (exit code {code})"
        return Found(**json.loads(report.read_text())) if code == 0 else Found(crash=what)

    def fails_clean(self, op: str, backend: str, found: Found) -> Found | None:
        """What the sources without a fault fail, where it explains what was found; else None.

        It runs the cases up to the one that failed, all where the process ended, once for all of an op's faults.
        """
        needed = found.ran or ALL
        ran, clean = self._clean.get((op, backend), (0, Found()))
        if needed > ran:
            clean = self.first_failure(op, backend, needed)
            self._clean[op, backend] = (needed, clean)
        return clean if clean.case or clean.crash else None

    def _run_and_exit(self, op: str, backend: str, most: int, report: Path) -> NoReturn:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os.environ["TRITON_INTERPRET"] = "1" if backend == "triton" else "0"
            sys.path.insert(0, str(self.folder))
            verify = importlib.import_module("jepa_kernels.verify.rows")
            assert verify.__file__.startswith(str(self.folder))
            if backend == "cpu":
                importlib.import_module("jepa_kernels._C").set_isa(LEVEL)
            verify.prepare()
            report.write_text(json.dumps(_until_one_fails(verify, verify.rows([op], [backend], device="cpu"), most)))
            os._exit(0)
        except BaseException:  # of the harness, since a kernel's is a case that fails; a crash has the signal's number
            report.write_text(traceback.format_exc())
        finally:
            os._exit(HARNESS)


@dataclass
class Found:
    """What running the cases found: the first that fails, its dtype and what is wrong; or how the process ended."""

    ran: int = 0
    cases: int = 0
    case: str = ""
    dtype: str = ""
    problem: str = ""
    crash: str = ""


def _until_one_fails(verify: Any, rows: Any, most: int) -> dict[str, Any]:
    runs = [(row, case, str(row.dtype).removeprefix("torch.")) for row in rows for case in row.cases]
    for ran, (row, case, dtype) in enumerate(runs[:most], 1):
        if problems := verify.run_case(row, case).problems:
            return dict(ran=ran, cases=len(runs), case=case.name, dtype=dtype, problem=problems[0])
    return dict(ran=len(runs), cases=len(runs))


def _wait(child: int) -> int:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIMEOUT


def _commit() -> str:
    """Of the sources, short."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
