"""`python -m jepa_kernels verify`: verdicts, exit codes, files, and `pytest --pyargs jepa_kernels.verify`."""

import importlib.util
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as xml

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels._core import define
from jepa_kernels._core.info import kernels
from jepa_kernels.verify import checks, command, table
from jepa_kernels.verify.rows import Row, rows, run_row
from tests.test_floors import ROOT

QUICK = ["--op", "grad_norm", "--backend", "cpu"]


@pytest.fixture
def faulty(monkeypatch):
    """rope's CPU kernel with its last head left out."""
    real = define.implementation("rope", "forward", "cpu")

    def broken(*args):
        out = real(*args)
        out[0][..., -1, :] = 0
        return out

    monkeypatch.setitem(define._implementations, ("rope", "forward", "cpu"), broken)


def test_rows_are_every_op_backend_and_dtype_of_the_tables():
    found = {(row.op, row.backend, row.dtype) for row in rows()}
    stated = {(op, k.backend, d) for op in jk.ops.OPS for k in kernels(op) for d in k.dtypes if d in checks.DTYPES}
    assert found >= stated
    # More only where a kernel's leading tensor stays fp32: then the dtype under test is that of other arguments.
    assert all(any(c.keep for c in Row(*r[:2], "cpu", r[2], None).cases) for r in found - stated)
    here = [row for row in rows() if row.backend == "cpu"]
    assert all(row.reason is None and row.device == "cpu" for row in here)
    assert {row.reason for row in rows() if row.backend == "cuda"} != {None} or torch.cuda.is_available()


def test_what_passes_says_so_in_a_table_and_in_files(tmp_path, capsys):
    files = tmp_path / "found.json", tmp_path / "found.xml"
    assert command.main([*QUICK, "--json", str(files[0]), "--junit", str(files[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(table.COLUMNS)
    assert [line.split()[:4] + line.split()[7:8] for line in lines[1:4]] == [
        ["grad_norm", "cpu", "cpu", dtype, "pass"] for dtype in ("float32", "bfloat16", "float16")
    ]
    report = json.loads(files[0].read_text())
    assert report["schema"] == 1 and report["complete"] and report["machine"]["torch"] == torch.__version__
    cases = {case["name"]: case for case in report["rows"][0]["cases"]}
    assert len(cases) == 10 and cases["infinite"]["ok"]
    tensor = cases["ordinary"]["tensors"][0]
    assert 0 <= tensor["max_err"] <= tensor["max_budget"] and tensor["cap"] is None and tensor["ok"]
    suite = xml.parse(files[1]).getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("30", "0", "0")
    assert suite[0].get("classname") == "grad_norm.cpu.cpu.float32" and suite[0].get("name") == "ordinary"


def test_a_mismatch_is_named_with_its_numbers(faulty, tmp_path, capsys):
    path = tmp_path / "found.xml"
    words = ["--op", "rope", "--backend", "cpu", "--dtype", "float32", "--json", "-", "--junit", str(path)]
    assert command.main(words) == 1
    said = capsys.readouterr()
    row = json.loads(said.out)["rows"][0]
    failed = [case["name"] for case in row["cases"] if not case["ok"]]
    assert row["verdict"] == "fail" and "packed_d16" in failed and "empty_rows" not in failed
    assert "FAIL rope cpu cpu float32 packed_d16: output0: max error " in said.err
    assert row["worst_max"] > 1e5 and said.err.splitlines()[1].split()[7] == "fail"
    assert int(xml.parse(path).getroot()[0].get("failures")) == len(failed)


def test_what_is_exact_is_asked(monkeypatch):
    case = checks.typical("masked_attention")
    arguments = ("masked_attention", "cpu", case, torch.bfloat16, "cpu")
    assert checks.exact(*arguments) == []
    real, calls = define.implementation("masked_attention", "forward", "cpu"), []

    def drifting(*args):  # another rounding in every call
        calls.append(None)
        out = real(*args)
        out[0][-1] *= 1 + len(calls) / 64
        return out

    monkeypatch.setitem(define._implementations, ("masked_attention", "forward", "cpu"), drifting)
    problems = checks.exact(*arguments)
    assert problems[:2] == ["two runs differ", "strides change the result (spread)"]
    assert problems[2].startswith("packed sequence ") and len(problems) == 3


def test_an_exception_of_a_kernel_is_a_failure(monkeypatch):
    def raising(*args):
        raise RuntimeError("the kernel broke\nmore")

    monkeypatch.setitem(define._implementations, ("grad_norm", "forward", "cpu"), raising)
    row = Row("grad_norm", "cpu", "cpu", torch.float32, None)
    run_row(row)
    assert row.verdict == "fail" and row.results[0].problems == ["RuntimeError: the kernel broke"]
    assert row.worst("max") == 0 and {r.case: r.problems for r in row.results}["empty"] == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["--op", "rop"], "verify: --op must be one of adamw_ema, .+, got 'rop'; did you mean rope\\?"),
        (["--backend", "cpuu"], "verify: --backend must be one of cuda, .+, got 'cpuu'; did you mean cpu\\?"),
        (["--dtype", "bfloat61"], "verify: --dtype must be one of .+, got 'bfloat61'; did you mean bfloat16\\?"),
        (["--dtype", "int8x"], "verify: --dtype must be one of .+, got 'int8x'; .+"),
        (["--device", "tpu"], "verify: --device must be one of cpu, cuda, got 'tpu'; .+"),
        (["--json", "/no/such/folder/a.json"], "verify: --json must name a file in a writable folder, got .+; .+"),
        (["--junit", "-"], None),
    ],
)
def test_bad_words_are_refused_before_any_work(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "run_row", lambda row: pytest.fail("work was done") if message else None)
    monkeypatch.chdir(tmp_path)
    if message is None:  # a file of that name, as anywhere else
        assert command.main([*QUICK, *words]) == 3 and (tmp_path / "-").exists()
        return
    assert command.main([*QUICK, *words]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(message + "\n", said), said


def test_a_folder_is_no_file(tmp_path, capsys):
    assert command.main([*QUICK, "--json", str(tmp_path)]) == 2
    assert "(a folder); choose another place" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that must be missing")
def test_a_backend_that_is_missing_is_an_error_only_when_named(capsys):
    assert command.main(["--op", "rope", "--backend", "cuda"]) == 3
    said = capsys.readouterr()
    assert "not run: cuda on cuda: " in said.out
    assert said.err.startswith("verify: --backend must be able to run here, got cuda (")
    assert command.main(["--op", "rope", "--backend", "sdpa"]) == 3
    assert "got sdpa (no kernel of rope has it); leave it out" in capsys.readouterr().err
    assert command.main(["--op", "grad_norm", "--dtype", "float32"]) == 0
    assert "not run: triton on cpu: " in capsys.readouterr().out
    assert command.main([*QUICK, "--device", "cuda"]) == 3


def test_ctrl_c_keeps_what_is_done(monkeypatch, tmp_path, capsys):
    real, ran = command.run_row, []

    def interrupted(row):
        if ran:
            row.results.append(ran[0].results[0])
            raise KeyboardInterrupt
        ran.append(row)
        real(row)

    monkeypatch.setattr(command, "run_row", interrupted)
    path = tmp_path / "found.json"
    assert command.main([*QUICK, "--json", str(path)]) == 130
    said, report = capsys.readouterr(), json.loads(path.read_text())
    assert not report["complete"] and [r["verdict"] for r in report["rows"]] == ["pass", "partial", "partial"]
    assert [len(r["cases"]) for r in report["rows"]] == [10, 1, 0]
    assert said.err == "interrupted: the rows above are partial\n"
    assert [line.split()[4] for line in said.out.splitlines()[1:3]] == ["10/10", "1/10"]


@pytest.mark.parametrize("rich", [True, False])
def test_the_table_fits_the_terminal(rich, monkeypatch, capsys):
    if not rich:
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "rich" else real(n))
    row = rows(["grad_norm"], ["cpu"])[0]
    run_row(row)
    for width, names in ((80, table.COLUMNS), (60, [c for c in table.COLUMNS if c not in ("s", "cases", "device")])):
        monkeypatch.setenv("COLUMNS", str(width))
        table.show([row], sys.stdout)
        head, line, *_ = capsys.readouterr().out.splitlines()
        assert head.split() == list(names) and "\x1b" not in line and len(line.rstrip()) <= width
        assert line.split()[-2 if width == 80 else -1] == "pass"


def test_color_is_for_terminals_that_want_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "rich" else real(n))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    row = rows(["grad_norm"], ["cpu"])[0]
    run_row(row)
    for unset, colored in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with monkeypatch.context() as m:
            [m.setenv(k, v) for k, v in unset.items()]
            out = Terminal()
            table.show([row], out)
            assert ("\x1b[32mpass" in out.getvalue()) == colored


def test_pytest_runs_the_same_rows_and_says_why_others_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--pyargs", "jepa_kernels.verify"]
    assert pytest.main([*words, "-k", "grad_norm"]) == 0
    said = capsys.readouterr().out
    ran, missing = ([r for r in rows(["grad_norm"]) if (r.reason is None) == here] for here in (True, False))
    last = said.splitlines()[-1]
    assert f"{sum(len(r.cases) for r in ran)} passed, {len(missing)} skipped" in last, said
    for backend, reason in {(r.backend, r.reason) for r in missing}:
        assert re.search(rf"SKIPPED \[3\] .+: {backend} on .+: {re.escape(reason)}", said), said


def test_the_command_line_does_not_need_pytest():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['pytest'] = None; from jepa_kernels.verify import command"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
