"""Short training runs by the command's own parts, and what they leave."""

import json
import signal
import tempfile
import threading
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from jepa_kernels import train
from jepa_kernels.configs import flat
from jepa_kernels.training import disk, saves
from jepa_kernels.training import log as logs

LOGGED = {"step", "loss", "std", "rank", "grad_norm", "skipped", "lr", "weight_decay"}  # of every model, but for times


def fit(path, out, *words, stop=None):
    """The trainer of a config's run in `out`, trained to its last step or to `stop`."""
    trainer, out = train.prepare(train._parser().parse_args([str(path), "--out", str(out), *words]))
    train.fit(trainer, out, stop=stop)
    return trainer


def rows(out, counted):
    """The metrics, without what is a time, such as "images", `counted`, a second, and what the run was on."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop(f"{counted}_per_s") > 0 and row.pop("tokens_per_s") > 0 for row in found)
    assert all(row.pop("step_s") > row.pop("data_wait_s") >= 0 and row.pop("share_of_peak") > 0 for row in found)
    assert all(row.pop("save_s", 1) > 0 for row in found)
    assert "run" in found[0], "the first row since a start tells of the run"
    return [{key: value for key, value in row.items() if key != "run"} for row in found]


def left(out):
    """The names of what a run has left, but for TensorBoard's event files."""
    return sorted(path.name for path in out.iterdir() if path.name != "tensorboard")


def newest(out):
    """The folder of the last checkpoint."""
    return saves.place(out, saves.steps(out)[-1])


def held(path):
    """All tensors of a checkpoint, {name: tensor}, read by torch's own converter."""
    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(path, Path(folder, "whole.pt"))
        return flat(torch.load(Path(folder, "whole.pt")))


def held_writers(patched):
    """Saves are not written until the event is set that this returns."""
    may_write, write = threading.Event(), disk.Writer.write_data

    def wait(writer, plan, planner):
        assert may_write.wait(60)
        return write(writer, plan, planner)

    patched.setattr(disk.Writer, "write_data", wait)
    return may_write


def weights(path):
    """The model's state dict in a checkpoint."""
    return {n.removeprefix("model."): x for n, x in held(path).items() if n.startswith("model.")}


def signal_after(patched, step, number):
    """This process gets a signal as soon as its log has this step."""

    def append_and_signal(log, row):
        append(log, row)
        if row["step"] == step:
            signal.raise_signal(number)

    append = logs._append
    patched.setattr(logs, "_append", append_and_signal)
