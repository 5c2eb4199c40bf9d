"""`python -m benchmarks compare`: what changed is told from what the machine did, and what fails is what got slower."""

import copy
import json
import re

import numpy as np
import pytest

from benchmarks import __main__ as front
from benchmarks import compare, rows, stats
from tests.test_benchmarks import document, red_row, row

NOISE = 1 + 0.01 * np.random.default_rng(0).standard_normal(40)


def timed(ours_s, its_s, **changes):
    """A row whose rounds differ by about 1 %, both times of a round alike."""
    made = row(**changes)
    made.update(rows.timed_row({}, made["baseline"], ours_s * NOISE, its_s * NOISE))
    return made


def compared(before, after):
    return compare.compared(document(*before), document(*after))


def test_a_slow_day_is_no_change():
    (found,) = compared([timed(1e-3, 2e-3)], [timed(2e-3, 4e-3)])["rows"]
    assert found["run"] == "ema_update/vit_s16/forward/float32" and found["verdict"] == "no difference"
    assert (found["ours"], found["rivals"], found["ratio"]) == pytest.approx((2, 2, 1))
    assert found["ci95"] == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("factor, verdict", [(1.2, "slower"), (0.8, "faster")])
@pytest.mark.parametrize("kept", [True, False])
def test_a_change_of_ours_alone_is_told(factor, verdict, kept):
    before, after = ([timed(f * 1e-3, 2e-3), timed(f * 1e-3, 3e-3, baseline="loop")] for f in (1.0, factor))
    before[0]["ci95"], after[0]["ci95"] = [1.98, 2.02], [1.98 / factor, 2.02 / factor]
    if not kept:
        for one in (*before, *after):
            del one["samples_us"]
    (found,) = compared(before, after)["rows"]
    assert found["verdict"] == verdict and found["ratio"] == pytest.approx(factor)
    low, high = found["ci95"]
    assert low <= factor * (1 + 1e-9) and factor <= high * (1 + 1e-9)
    assert (found["before_us"], found["after_us"]) == pytest.approx((1e3, factor * 1e3), rel=0.01)


def test_without_samples_the_interval_comes_from_the_rows_own_by_hand():
    before, after = row(), row()
    for one in (before, after):
        del one["samples_us"]
    before["ci95"], after["ci95"] = [2 / 1.03, 2 * 1.03], [2 / 1.04, 2 * 1.04]
    ratio, (low, high) = stats.change([before], [after])
    far = np.exp(np.hypot(np.log(1.03), np.log(1.04)))
    assert ratio == 1 and (low, high) == pytest.approx((1 / far, far))


def test_rows_of_one_result_alone_are_named():
    found = compared([row(), row(workload="gone"), red_row()], [row(), row(baseline="loop")])
    assert [r["run"] for r in found["rows"]] == ["ema_update/vit_s16/forward/float32"]
    assert found["only_before"] == ["ema_update/gone/forward/float32/lerp"]
    assert found["only_after"] == ["ema_update/vit_s16/forward/float32/loop"]


@pytest.fixture
def write(tmp_path):
    def written(name, *found, **changes):
        (tmp_path / name).write_text(json.dumps(document(*found, **changes)))
        return str(tmp_path / name)

    return written


def test_a_regression_fails_when_its_whole_interval_is_past_the_limit(write, tmp_path, capsys):
    before, after, out = write("a", timed(1e-3, 2e-3)), write("b", timed(1.2e-3, 2e-3)), tmp_path / "c.json"
    assert front.main(["compare", before, after, "--fail-on-regression", "25", "--json", str(out)]) == 0
    assert front.main(["compare", before, after]) == front.main(["compare", after, before]) == 0
    capsys.readouterr()
    assert front.main(["compare", before, after, "--fail-on-regression", "15"]) == 1
    said = capsys.readouterr()
    assert "regression of more than 15 %: ema_update/vit_s16/forward/float32, 1.200" in said.err
    assert "before: a-processor-avx2-2-threads, commit 0123456789, torch 2.13.0" in said.out and "slower" in said.out
    kept = json.loads(out.read_text())
    assert kept["schema"] == "jepa-bench-compare/1" and kept["rows"][0]["verdict"] == "slower"


@pytest.mark.parametrize("columns", ["40", "80", "160"])
def test_all_is_readable_in_any_width(columns, write, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    assert front.main(["compare", write("a", timed(1e-3, 2e-3)), write("b", timed(1.2e-3, 2e-3))]) == 0
    said = capsys.readouterr().out
    table = said.split("ours over theirs")[1]
    assert all(len(line) <= int(columns) for line in table.splitlines()) and "\x1b" not in said
    for shown in ("ema_update/vit_s16/forward/float32", "1.2", "1.20-1.20", "slower", "ms"):
        assert shown in re.sub(r"\s+", " ", table)


def test_what_can_not_be_compared_is_refused(write, tmp_path, capsys):
    other = copy.deepcopy(document()["machine"]) | {"isa": "avx512"}
    mine, theirs = write("a", row()), write("b", row(), machine=other)
    assert front.main(["compare", mine, theirs]) == 2
    assert "got a-processor-avx2-2-threads and a-processor-avx512-2-threads; pass --across" in capsys.readouterr().err
    assert front.main(["compare", mine, theirs, "--across"]) == 0
    (tmp_path / "broken").write_text('{"schema": "jepa-bench/')
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path / "broken", "Unterminated string"),
                      (write("early", machine={}), "ended before it said on what machine"),
                      (write("old", schema="jepa-bench/0"), "schema is 'jepa-bench/0'")):  # fmt: skip
        assert front.main(["compare", mine, str(path)]) == 2
        assert f"{path} must be a result of python -m benchmarks, got: " in (said := capsys.readouterr().err)
        assert why in said
    assert front.main(["compare", mine, write("c", row(workload="new"))]) == 2
    assert "must have a run in common, got none" in capsys.readouterr().err
