"""The command with which Nsight Compute looks into our kernels while a model trains."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence

from jepa_kernels._core.check import fail
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
    if op and op not in OPS:
        near = difflib.get_close_matches(op, OPS, n=1)
        remedy = f"did you mean {near[0]}?" if near else "leave it out for all"
        fail("profile", "--ncu", f"be one of {', '.join(OPS)}", repr(op), remedy)
    name = f"{model.split('/')[-1].split('.')[0]}-{op or 'ops'}"
    tool = ["ncu", "--set", "full", "--clock-control", "none", "--target-processes", "all"]
    tool += ["--kernel-name", f"regex:{pattern(*([op] if op else OPS))}"]
    tool += ["--launch-skip", str(SKIPPED), "--launch-count", str(SEEN), "--export", name, "--force-overwrite"]
    run = ["python", "-m", "jepa_kernels", "train", model, "--device", "cuda", "--steps", "5", "--no-probe"]
    run += ["--out", f"runs/ncu-{name}", *(word for change in changes for word in ("--set", change))]
    return f"{shlex.join(tool)} \\\n  {shlex.join(run)}"
