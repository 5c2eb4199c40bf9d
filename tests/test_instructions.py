"""CI's gate on the speed of CPU kernels: instructions counted under valgrind, held to the committed ones."""

import copy
import json

import pytest
import torch

from benchmarks import instructions
from jepa_kernels import _C
from jepa_kernels._core import extension
from jepa_kernels.ops import OPS

COMMITTED = json.loads(instructions.COMMITTED.read_text())
ROW = "ema_update/small/forward/float32"


def test_kernels_take_no_more_instructions_than_committed():
    try:
        found = instructions.measured()
    except instructions.NoValgrind as error:
        pytest.skip(str(error))
    failing, said = instructions.judge(found, COMMITTED)
    print(*said, sep="\n")
    assert failing == []
    if found["compiler"] != COMMITTED["compiler"]:
        pytest.skip(said[0])
    assert all(row["floor"] is None or 0 < row["floor"] < row["instructions"] for row in found["rows"].values())


def test_every_op_is_counted():
    assert {key.split("/")[0] for key in COMMITTED["rows"]} == set(OPS)


def changed(by):
    found = copy.deepcopy(COMMITTED)
    found["rows"][ROW]["instructions"] = round(found["rows"][ROW]["instructions"] * by)
    return found


def test_two_percent_more_fails_and_fewer_is_said():
    assert instructions.judge(COMMITTED, COMMITTED) == instructions.judge(changed(1.019), COMMITTED) == ([], [])
    (failing,), said = instructions.judge(changed(1.03), COMMITTED)
    assert failing.startswith(f"{ROW}: ") and "3.0% more than the committed" in failing and said == []
    failing, (said,) = instructions.judge(changed(0.9), COMMITTED)
    assert failing == [] and said.startswith(f"{ROW}: ") and "10.0% fewer" in said and "--adopt" in said


def test_rows_that_come_and_go_fail_and_another_compiler_is_not_compared():
    fewer = copy.deepcopy(COMMITTED)
    del fewer["rows"][ROW]
    assert "none are committed" in instructions.judge(COMMITTED, fewer)[0][0]
    assert "not counted any more" in instructions.judge(fewer, COMMITTED)[0][0]
    failing, (said,) = instructions.judge({**changed(2), "compiler": "99"}, COMMITTED)
    assert failing == [] and said.startswith("not compared: built by compiler 99")


def test_without_valgrind_the_reason_is_printed(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert instructions.main([]) == 2
    assert "valgrind must be on PATH, got none; apt-get install valgrind" in capsys.readouterr().err


def test_what_stops_it_is_a_line_and_an_exit_code(monkeypatch, capsys, tmp_path):
    def stopped(error):
        def measured():
            raise error

        monkeypatch.setattr(instructions, "measured", measured)
        return instructions.main(["--adopt"]), capsys.readouterr().err

    assert stopped(KeyboardInterrupt()) == (130, "instructions: interrupted, nothing is written\n")
    monkeypatch.setattr(instructions, "measured", lambda: COMMITTED)
    (tmp_path / "file").touch()
    monkeypatch.setattr(instructions, "COMMITTED", tmp_path / "file" / "instructions.json")  # in no folder
    assert instructions.main(["--adopt"]) == 2
    assert "instructions.json must be a file to read, and to write with --adopt, got" in capsys.readouterr().err


def test_without_the_compiled_module_the_reason_is_printed(monkeypatch, capsys):
    monkeypatch.setitem(extension._state, "C", "jepa_kernels._C is not built")
    assert instructions.main([]) == 2
    why = "jepa_kernels._C is not built; build it with `pip install .`"
    assert capsys.readouterr().err == f"instructions: the CPU kernels must run here, got: {why}\n"


def test_own_instructions_are_those_of_the_extension_alone():
    dump = [f"ob={_C.__file__}", "fn=kernel", "10 5", "cob=libc", "calls=1 0", "11 100", "12 7", "ob=libc", "3 99"]
    assert instructions.own("\n".join(dump)) == 12


def test_what_is_recorded_is_the_memory_of_a_view():
    given = torch.arange(12, dtype=torch.float32).view(3, 4)[:, 1:3]
    kind, (dtype, shape, stride, data) = instructions.written(given, {})
    assert (kind, dtype, shape, stride) == ("tensor", "float32", (3, 2), (4, 1))
    assert torch.frombuffer(bytearray(data), dtype=torch.float32).tolist() == list(range(1, 11))
