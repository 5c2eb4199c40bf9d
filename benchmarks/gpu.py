"""`make gpu`: GPU tests, benchmarks and rivals, one after another, in one command of under ten minutes.

Each part is a process with a time limit of its own: one that fails or hangs does not stop the others. Results and one
log go to $OUT (or bench-results/gpu). Installs nothing and downloads nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 10.0  # after the limit: time to write down what is there


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # "ok", "failed" or "stopped at its limit"
    seconds: float
    code: int
    last: str  # line of its output


def parts(out: Path) -> tuple[Part, ...]:
    python = (sys.executable, "-m")
    return (
        Part("tests", (*python, "tests", "--gpu"), 150),
        Part("sanitizer", (*python, "tests.kernels.sanitized_cuda"), 60),
        Part(
            "benchmarks",
            (*python, "benchmarks", "--device", "cuda", "--budget", "0.4", "--out", str(out / "bench")),
            220,
        ),
        Part("rivals", (*python, "benchmarks.rivals", "--budget", "60", "--out", str(out / "rivals.json")), 70),
    )


def run(part: Part, log: Path) -> Outcome:
    """The part's output goes to the terminal and to the end of the log."""
    began = time.monotonic()
    with log.open("ab") as stream:
        stream.write(f"== {part.name}: {' '.join(part.command)}\n".encode())
        stream.flush()
        start = stream.tell()
        child = subprocess.Popen(
            part.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        status = wait(child, part.limit_s)
    output = log.read_bytes()[start:].decode(errors="replace")
    print(output, end="", flush=True)
    lines = [line for line in output.splitlines() if line.strip()]
    seconds = round(time.monotonic() - began, 1)
    return Outcome(part.name, status, seconds, child.returncode, lines[-1].strip() if lines else "")


def wait(child: subprocess.Popen[bytes], limit_s: float) -> str:
    """Past the limit the whole process group is asked to stop, then made to."""
    try:
        return "ok" if child.wait(limit_s) == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGINT)
    except KeyboardInterrupt:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return "stopped at its limit"


def run_all(chosen: Sequence[Part], out: Path) -> list[Outcome]:
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.unlink(missing_ok=True)
    outcomes = []
    for part in chosen:
        print(f"\n== {part.name}, at most {part.limit_s:.0f} s", flush=True)
        outcomes.append(run(part, log))
        document = {"schema": "jepa-gpu/1", "parts": [asdict(o) for o in outcomes]}
        (out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    return outcomes


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    lines = [f"{o.name:<12} {o.status:<22} {o.seconds:>6.1f} s  {o.last[:90]}" for o in outcomes]
    return "\n".join(["", *lines, f"results in {out}"])


def no_gpu() -> str | None:
    """Why nothing can be measured here; None where it can."""
    if torch.cuda.is_available():
        return None
    return (
        f"make gpu: this machine must have a CUDA device that torch sees, got torch {torch.__version__} without one; "
        f"run it on a GPU machine whose python3 has a CUDA build of torch (`make test` checks the kernels without one)"
    )


def main() -> int:
    why = no_gpu()
    if why is not None:
        print(why, file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "bench-results" / "gpu").resolve()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    outcomes = run_all(parts(out), out)
    print(summary(outcomes, out))
    return int(any(o.status != "ok" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
