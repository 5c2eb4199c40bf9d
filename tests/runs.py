"""Short training runs by the command's own parts, and what they leave."""

import json

from jepa_kernels import train


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
    assert "run" in found[0], "the first row since a start tells of the run"
    return [{key: value for key, value in row.items() if key != "run"} for row in found]


def left(out):
    """The names of what a run has left, but for TensorBoard's event files."""
    return sorted(path.name for path in out.iterdir() if path.name != "tensorboard")
