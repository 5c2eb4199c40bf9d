"""What checkpoints cost a run: seconds that a save keeps the loop, and that a killed run takes to its next step.

`python -m benchmarks.saves [CONFIG ...]` trains a shipped config in a process of its own, kills it after its second
checkpoint, resumes it, and prints JSON: of a save, its share of the steps between two; of the step beside which the
thread writes, how much longer it takes than the others.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jepa_kernels import report

EVERY, KILLED, STEPS = 50, 105, 160
TIMEOUT = 1800.0  # seconds
Row = dict[str, Any]


def rows(out: Path) -> list[Row]:
    """The whole lines of the log."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def train(words: list[str], out: Path, until: int) -> tuple[subprocess.Popen[bytes], float]:
    """The process, once the log holds step `until`, and the seconds since its start."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "jepa_kernels", "train", *words, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not any(row["step"] >= until for row in rows(out)):
        if process.poll() is not None or time.perf_counter() - began > TIMEOUT:
            process.kill()
            raise SystemExit(f"benchmarks.saves: {' '.join(command)} must reach step {until}, got {process.poll()}")
        time.sleep(0.01)
    return process, time.perf_counter() - began


def measure(config: str) -> Row:
    words = [config, "--steps", str(STEPS), "--no-probe", "--set", f"logging.checkpoint_every={EVERY}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        process, _ = train(words, out, KILLED)
        process.kill()
        process.wait()
        before = rows(out)
        (out / "metrics.jsonl").unlink()  # the next row is the resumed run's first one
        process, seconds = train([*words, "--resume"], out, 1)
        first = rows(out)[0]["step"]
        process.wait()
        after = rows(out)
        size = sum(p.stat().st_size for p in (out / "checkpoints" / f"step-{STEPS:08d}").iterdir())
    took = [(row["step_s"], row.get("save_s")) for row in before + after]
    saves = [save for _, save in took if save is not None]
    alone = statistics.median(step for step, save in took if save is None)
    beside = statistics.median(step for step, save in took if save is not None)
    return {
        "config": config,
        "step_s": alone,
        "save_s": saves,
        "share_of_steps": max(saves) / (EVERY * alone),
        "step_beside_a_save_s": beside,
        "checkpoint_mb": size / 1e6,
        "resume_s": seconds,
        "resumed_at": first,
        "machine": report.machine(),
        "commit": report.commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.saves", description=__doc__.split("\n")[0])
    parser.add_argument("configs", nargs="*", default=["ijepa"])
    print(json.dumps({"saves": [measure(config) for config in parser.parse_args().configs]}, indent=1))


if __name__ == "__main__":
    main()
