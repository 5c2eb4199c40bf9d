"""`make gpu` and the rivals: orchestration with stub parts, and the path without a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, rivals
from benchmarks.rival_forms import Form, forms

ROOT = Path(__file__).parents[1]


def stub(name: str, code: str, limit_s: float = 20.0) -> gpu.Part:
    return gpu.Part(name, (sys.executable, "-c", code), limit_s)


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, capfd):
    hang = "import time; print('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('kept')"
    parts = [stub("first", "print('one')"), stub("bad", "raise SystemExit('broken')"), stub("hung", hang, 1.0),
             stub("last", "print('two')")]  # fmt: skip
    began = time.monotonic()
    outcomes = gpu.run_all(parts, tmp_path)
    assert time.monotonic() - began < 30
    assert [o.status for o in outcomes] == ["ok", "failed", "stopped at its limit", "ok"]
    assert [o.last for o in outcomes] == ["one", "broken", "kept", "two"]
    assert [p["name"] for p in json.loads((tmp_path / "gpu.json").read_text())["parts"]] == [p.name for p in parts]
    assert "broken" in (tmp_path / "gpu.log").read_text() and "broken" in capfd.readouterr().out
    assert "stopped at its limit" in gpu.summary(outcomes, tmp_path)


def test_a_part_that_ignores_the_signal_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    (outcome,) = gpu.run_all([stub("deaf", child, 1.5)], tmp_path)
    assert outcome.status == "stopped at its limit" and outcome.code == -9 and outcome.last == "on"


def test_the_whole_stays_under_ten_minutes(tmp_path):
    parts = gpu.parts(tmp_path)
    assert [p.name for p in parts] == ["tests", "sanitizer", "benchmarks", "rivals"]
    assert sum(p.limit_s + gpu.GRACE_S for p in parts) <= 540  # a minute is left for the build


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert "make gpu: this machine must have a CUDA device that torch sees, got torch" in done.stderr


def test_rivals_write_a_row_for_every_form_and_a_reason_for_every_failure(tmp_path, capsys):
    out = tmp_path / "rivals.json"
    assert rivals.main(["--device", "cpu", "--budget", "120", "--only", "context_70", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["schema"] == "jepa-rivals/1" and document["peaks"]["copy_gbs"] > 0
    rows = {(r["name"], r["pass"]): r for r in document["rows"]}
    assert len(rows) == 8
    for row in rows.values():
        assert row["bytes"] > 0 and row["flops"] > 0 and row["dtype"] == "float32"
        assert row["status"] == "ok" or row["reason"]
    ours = rows["sdpa", "forward"]
    assert ours["us"]["p10"] <= ours["us"]["p50"] <= ours["us"]["p90"] and ours["share"] > 0
    assert rows["sdpa_cudnn", "forward"]["status"] == "failed" and "Error" in rows["sdpa_cudnn", "forward"]["reason"]
    assert "sdpa_cudnn" in capsys.readouterr().out


def test_rivals_skip_what_the_budget_leaves_no_time_for(tmp_path):
    out = tmp_path / "rivals.json"
    assert rivals.main(["--device", "cpu", "--budget", "1e-6", "--only", "rope", "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert {r["status"] for r in rows} == {"skipped"} and all("--budget" in r["reason"] for r in rows)


ELSEWHERE = ("varlen", "sdpa_efficient", "sdpa_cudnn")  # need a GPU
QUICK = [f for f in forms(small=True) if not f.compiles and f.name not in (*ELSEWHERE, "flex_create_block_mask")]


@pytest.mark.parametrize("form", QUICK, ids=[f"{f.workload}-{f.stage}-{f.name}" for f in QUICK])
def test_every_form_that_a_cpu_can_run_runs(form: Form):
    form.make("cpu", torch.float32)()


def test_forms_at_full_size_have_names_of_their_own():
    names = [(f.workload, f.stage, f.name) for f in forms(small=False)]
    assert len(names) == len(set(names)) and len(names) > 100
