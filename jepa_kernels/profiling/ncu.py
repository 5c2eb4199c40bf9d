"""The command with which Nsight Compute looks into our kernels while a model trains."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from jepa_kernels.names import check_known
from jepa_kernels.ops import OPS

SKIPPED, SEEN = 20, 10  # launches of these kernels: the first ones compile and warm up; that many are replayed


def pattern(*ops: str) -> str:
    """Matches the names of all kernels of these ops, in Triton and in CUDA, and no others."""
    return f"^_?({'|'.join(ops)})_([a-z0-9_]+_)?kernel"


def command(model: str, op: str = "", changes: Sequence[str] = ()) -> str:
    """For a shell, in lines. op: one op, or all.

    The model is trained, not profiled: torch's profiler and Nsight Compute can't both hold the GPU's counters. Clocks
    stay as they are in training. Raises ValueError for an unknown op.
    """
    if op:
        check_known("profile", "--ncu", op, OPS, "leave it out for all")
    name = f"{model.split('/')[-1].split('.')[0]}-{op or 'ops'}"
    tool = ["ncu", "--set", "full", "--clock-control", "none", "--target-processes", "all"]
    tool += ["--kernel-name", f"regex:{pattern(*([op] if op else OPS))}"]
    tool += ["--launch-skip", str(SKIPPED), "--launch-count", str(SEEN), "--export", name, "--force-overwrite"]
    run = ["python", "-m", "jepa_kernels", "train", model, "--device", "cuda", "--steps", "5", "--no-probe"]
    run += ["--out", f"runs/ncu-{name}", *(word for change in changes for word in ("--set", change))]
    return f"{shlex.join(tool)} \\\n  {shlex.join(run)}"
