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
from jepa_kernels.__main__ import main
from jepa_kernels._core import define
from jepa_kernels._core.info import kernels
from jepa_kernels.testing import Parity
from jepa_kernels.verify import checks, command, files, table
from jepa_kernels.verify import rows as verify_rows
from jepa_kernels.verify.rows import Result, Row, rows, run_case, run_row
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


def test_two_files_need_two_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([*QUICK, "--json", "a", "--junit", str(tmp_path / "a")]) == 2
    assert "verify: --junit must name a file of its own, got " in capsys.readouterr().err


def test_a_folder_is_no_file(tmp_path, capsys):
    assert command.main([*QUICK, "--json", str(tmp_path)]) == 2
    assert "(Is a directory); choose another place" in capsys.readouterr().err


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


def test_what_a_kernel_broke_before_it_raised_is_kept(monkeypatch):
    errors = []

    def raising(*args):
        raise errors[-1]

    row = Row("grad_norm", "cpu", "cpu", torch.float32, None)
    case = row.cases[1]
    monkeypatch.setattr(checks, "exact", raising)
    monkeypatch.setattr(checks, "budget", lambda *args: [Parity("output0", 2.0, 1.0, 0.0, 1.0, 0.0, 1.0)])
    for error, said in ((RuntimeError("broke"), "RuntimeError: broke"), (jk.BackendError("too many"), "too many")):
        errors.append(error)
        result = run_case(row, case)
        assert result.problems[0].startswith("output0: max error 2") and result.problems[1:] == [said]
        assert result.refused is None
    monkeypatch.setattr(checks, "budget", raising)
    assert run_case(row, case).refused == "too many" and run_case(row, case).problems == []


def test_explain_names_the_nearest_too(capsys):
    for words, said in (
        (["rop"], "op must be one of .+, got 'rop'; did you mean rope\\?"),
        (["rope", "--dtype", "float61"], "--dtype must be .+, got 'float61'; did you mean float16\\?"),
    ):
        assert main(["explain", *words]) == 2
        assert re.fullmatch(f"explain: {said}\n", capsys.readouterr().err)


def test_options_given_twice_add_up(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(command, "run_row", lambda row: (ran.append(row), setattr(row, "complete", True)))
    command.main(["--op", "rope", "--op", "sigreg", "rope", "--backend", "cpu", "--dtype", "float32"])
    assert [(row.op, row.backend) for row in ran] == [("rope", "cpu"), ("sigreg", "cpu")]


def test_nothing_verified_is_an_error(monkeypatch, capsys):
    assert command.main(["--op", "distance_weights", "--dtype", "float16"]) == 3
    assert capsys.readouterr().err == (
        "verify: there must be a kernel to verify, got none of distance_weights; leave options out\n"
    )
    assert command.main(["--op", "rope", "--backend", "cuda", "--device", "cpu"]) == 3
    assert "got cuda (no kernel of rope has it on cpu); leave it out" in capsys.readouterr().err
    real = verify_rows.unavailable
    monkeypatch.setattr(verify_rows, "unavailable", lambda b, d: "_C is broken" if b == "cpu" else real(b, d))
    assert command.main(["--op", "masked_attention", "--dtype", "float32"]) == 3  # sdpa alone ran
    assert "verify: --backend must be able to run here, got cpu (_C is broken); see" in capsys.readouterr().err


def test_the_table_is_told_even_if_the_files_can_not_be_written(tmp_path, monkeypatch, capsys):
    name = "x" * 252  # and .part
    assert command.main([*QUICK, "--json", str(tmp_path / name)]) == 2
    assert "(File name too long); choose" in capsys.readouterr().err
    real = command.run_row

    def removing(row):
        (tmp_path / "gone").rmdir() if (tmp_path / "gone").exists() else None
        real(row)

    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(command, "run_row", removing)
    assert command.main([*QUICK, "--junit", str(tmp_path / "gone" / "a.xml")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("verify: --junit must be writable, got ") and said.out.count(" pass ") == 3


@pytest.mark.parametrize("words", [[], ["--json", "-"]])
def test_output_that_nobody_takes_is_no_mismatch(words):
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "jepa_kernels", "verify", *QUICK, *words]
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "verify: the output must be writable, got No space left on device; free space, or name a file\n"
    assert done.returncode == 2 and done.stderr.endswith(said)


def test_ctrl_c_anywhere_is_130(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    for name in ("_chosen", "prepare", "_report"):
        with monkeypatch.context() as patched:
            patched.setattr(command, name, interrupted)
            assert command.main(["--op", "distance_weights", "--backend", "cpu"]) == 130


@pytest.mark.parametrize("rich", [True, False])
def test_a_narrow_ascii_terminal_gets_a_table(rich, monkeypatch):
    if not rich:
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "rich" else real(n))
    monkeypatch.setenv("COLUMNS", "24")
    row = Row("masked_attention", "cpu", "cpu", torch.bfloat16, None)
    row.results.append(Result("a", [], ["a kernel\u2019s \u2264"], 0.0))
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    table.show([row], out)
    out.flush()
    assert b"masked_attention cpu cpu bfloat16 a: a kernel\\u2019s \\u2264\n" in out.buffer.getvalue()


def test_junit_has_only_what_xml_allows():
    row = Row("grad_norm", "cpu", "cpu", torch.float32, None)
    row.results.append(Result(row.cases[0].name, [], ["\x1b[31m<bad>\x00 \ud800\u2264\ttab"], 0.0))
    text = files.as_junit([row])
    failure = xml.fromstring(text.encode())[0][0][0]
    assert failure.get("message") == failure.text == "[31m<bad> \u2264\ttab"


def test_the_command_line_does_not_need_pytest():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['pytest'] = None; from jepa_kernels.verify import command"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
