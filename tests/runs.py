"""Short training runs by the command's own parts, and what they leave."""

import json

from jepa_kernels import train


def fit(path, out, *words, stop=None):
    """The trainer of a config's run in `out`, trained to its last step or to `stop`."""
    trainer, out = train.prepare(train._parser().parse_args([str(path), "--out", str(out), *words]))
    train.fit(trainer, out, stop=stop)
    return trainer


def rows(out, counted):
    """The metrics, without the one number that is a time: of `counted`, such as "images", a second."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop(f"{counted}_per_s") > 0 for row in found)
    return found
