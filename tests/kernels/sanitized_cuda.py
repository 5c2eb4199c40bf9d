"""CUDA kernels under compute-sanitizer: `python -m tests.kernels.sanitized_cuda`, on a GPU, every tool side by side.

Each tool watches a process that runs the first cases of every op with a cuda kernel, forward and backward. torch's
cache of memory is off: what lies beyond a tensor is not ours.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from jepa_kernels._core.info import kernels
from jepa_kernels.ops import OPS
from jepa_kernels.testing import cast, op_module, public, run

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
CASES = 3  # of each op


def run_op(op: str, backend: str, most: int | None = None) -> int:
    """The first `most` cases of an op in every dtype of its kernel, each once; how many calls: 0 without a kernel."""
    dtypes = next((kernel.dtypes for kernel in kernels(op) if kernel.backend == backend), ())
    calls = [(case, dtype) for case in op_module(op, "cases").CASES[:most] for dtype in dtypes]
    for case, dtype in calls:  # a backend of our own has the name of its device
        run(public(op, backend), cast(case.make(torch.Generator().manual_seed(0)), dtype, backend, case.keep), case)
    return len(calls)


def run_cases() -> None:
    for op in OPS:
        if run_op(op, "cuda", CASES):
            torch.cuda.synchronize()
            print(f"{op}: done", flush=True)


def watch(tool: str) -> subprocess.Popen[str]:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    return subprocess.Popen(
        [*command, sys.executable, "-m", "tests.kernels.sanitized_cuda", "--inside"], cwd=ROOT, text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def main() -> int:
    if shutil.which("compute-sanitizer") is None:
        print("sanitized: compute-sanitizer must be on PATH, got none; install the CUDA toolkit", file=sys.stderr)
        return 2
    watched = {tool: watch(tool) for tool in TOOLS}
    bad = 0
    for tool, process in watched.items():
        output = process.communicate()[0]
        bad += process.returncode != 0
        print(f"== {tool}: exit code {process.returncode}\n{output[-3000:]}", flush=True)
    print(f"{len(TOOLS) - bad} of {len(TOOLS)} tools found nothing")
    return int(bad > 0)


if __name__ == "__main__":
    if "--inside" in sys.argv:
        run_cases()
    else:
        sys.exit(main())
