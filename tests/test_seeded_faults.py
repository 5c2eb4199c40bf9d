"""The faults seeded in the source: they fit the sources, the page tells what was found, and one of them runs here."""

import ast
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from jepa_kernels._core.info import kernels
from jepa_kernels.ops import OPS
from jepa_kernels.verify.rows import rows
from tests.faults import copy, page
from tests.faults.fault import ROOT
from tests.faults.seeded_cpu import CPU
from tests.faults.seeded_triton import TRITON

LEAST = 38 / 40  # of the faults, to be caught


@pytest.mark.parametrize("fault", CPU + TRITON, ids=lambda f: f"{f.op}-{f.backend}-{f.what}")
def test_a_fault_fits_its_source(fault):
    faulty = fault.applied((ROOT / fault.path).read_text())
    if fault.backend == "triton":
        ast.parse(faulty)


def test_a_fault_whose_text_is_gone_is_an_error():
    with pytest.raises(ValueError, match=r"faults: .+ must hold '.+' once, got 0 of .+; write the fault anew"):
        CPU[0].applied("int main() {}")


def test_every_op_and_both_backends_have_faults_of_many_kinds():
    with_triton = {op for op in OPS if any(k.backend == "triton" for k in kernels(op))}
    assert len(CPU + TRITON) >= 40 and {f.op for f in CPU} == set(OPS) and {f.op for f in TRITON} == with_triton
    assert len({f.kind for f in CPU + TRITON}) >= 15
    assert len({(f.op, f.backend, f.what) for f in CPU + TRITON}) == len(CPU + TRITON)


def test_the_results_are_of_these_faults_and_the_page_tells_them():
    results = page.load()
    known = {(str(f.path), f.op, f.backend, f.kind, f.what) for f in CPU + TRITON}
    assert {tuple(f[n] for n in ("file", "op", "backend", "kind", "what")) for f in results["faults"]} == known
    assert len(results["faults"]) == len(known), "run `python -m tests.faults`"
    assert page.PAGE.read_text() == page.page(results), "run `python -m tests.faults --page`"
    caught = sum(f["caught"] for f in results["faults"])
    assert caught >= LEAST * len(known)
    for fault in results["faults"]:
        assert fault["caught"] == (fault["by"] != "") and (fault["caught"] or fault["ran"] == fault["cases"]), fault


def test_the_results_are_of_todays_faults_and_cases():
    texts = {f.key: f.text for f in CPU + TRITON}
    cases = {(f.op, f.backend): _cases(f.op, f.backend) for f in CPU + TRITON}
    for fault in page.load()["faults"]:
        key = fault["op"], fault["backend"], fault["what"]
        assert fault.get("text") == texts[key], f"run `python -m tests.faults --op {key[0]}`"
        ended = fault["by"].startswith(("a crash", "a time-out"))  # before it told how many there are
        assert fault["cases"] == (0 if ended else cases[key[:2]]), f"run `python -m tests.faults --op {key[0]}`"


def _cases(op, backend):
    return sum(len(row.cases) for row in rows([op], [backend], device="cpu"))


def test_another_text_is_another_fault():
    assert CPU[0].text == replace(CPU[0]).text != replace(CPU[0], new=CPU[0].new + " ").text


@pytest.mark.parametrize("code, what", [(70, None), (124, "a time-out"), (-11, "a crash (exit code -11)")])
def test_how_a_run_ended_is_told_and_the_harness_is_no_kernel(code, what, tmp_path, monkeypatch):
    monkeypatch.setattr(copy, "_wait", lambda child: code)
    monkeypatch.setattr(copy.os, "fork", lambda: (tmp_path / "report.json").write_text("Traceback") and 1)
    monkeypatch.setattr(copy.sys, "modules", {})
    tree = object.__new__(copy.Copy)
    tree.folder = tmp_path
    if what is None:
        with pytest.raises(SystemExit, match="faults: the harness must run rope on cpu, got\nTraceback"):
            tree.first_failure("rope", "cpu")
    else:
        assert tree.first_failure("rope", "cpu").crash == what


RUN = """
import tempfile
from pathlib import Path
from tests.faults.__main__ import run
from tests.faults.copy import Copy
from tests.faults.seeded_triton import TRITON

with tempfile.TemporaryDirectory() as folder:
    found = run(Copy(Path(folder), compiled=False), next(f for f in TRITON if f.op == "ema_update"))
    print(found["ran"], found["by"])
"""


def test_a_fault_is_caught_here_as_the_page_says():
    """In a process of its own, which forks: the faulty copy is imported there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    kept = next(f for f in page.load()["faults"] if (f["op"], f["backend"]) == ("ema_update", "triton"))
    assert done.stdout == f"{kept['ran']} {kept['by']}\n"
