"""Times every rival of JEPA kernels at JEPA's exact shapes, on whatever device is there. Needs torch alone.

`python -m benchmarks.rivals --out rivals.json` writes a row for each form, pass and workload; one that can't run is a
row with its reason. On the CPU the shapes are small: that run says that the forms work, not how fast a GPU is.
"""

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.rival_forms import Form, forms

SCHEMA = "jepa-rivals/1"
FLUSH_BYTES = 256 << 20  # more than any L2
Row = dict[str, Any]


class Timer:
    """Seconds of single calls: events around the call on a GPU, after the cache was overwritten."""

    def __init__(self, device: str):
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None

    def once(self, function: Callable[[], Any]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def repeat(self, function: Callable[[], Any], budget_s: float, calls: tuple[int, int] = (5, 200)) -> list[float]:
        """At least calls[0] samples after two calls to warm up; more while the budget lasts."""
        for _ in range(2):
            self.once(function)
        began, samples = time.perf_counter(), []
        while len(samples) < calls[0] or (time.perf_counter() - began < budget_s and len(samples) < calls[1]):
            samples.append(self.once(function))
        return samples


def quantiles(seconds: list[float]) -> dict[str, float]:
    values = torch.tensor(seconds, dtype=torch.float64) * 1e6
    return {f"p{p}": round(torch.quantile(values, p / 100).item(), 2) for p in (10, 50, 90)}


def peaks(device: str, timer: Timer, budget_s: float) -> dict[str, float]:
    """Copy bandwidth in GB/s (read and written), and matrix products in GFLOP/s per dtype."""
    big, size = (1 << 28, 8192) if device == "cuda" else (1 << 23, 1024)
    a = torch.randn(big, device=device)
    b = torch.empty_like(a)
    found = {"copy_gbs": 2 * a.numel() * 4 / min(timer.repeat(lambda: b.copy_(a), budget_s)) / 1e9}
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(timer.repeat(lambda x=x, y=y: x @ y, budget_s))
        found[f"gemm_gflops_{str(dtype).removeprefix('torch.')}"] = 2 * size**3 / seconds / 1e9
    return {name: round(value, 1) for name, value in found.items()}


def dtype_of(form: Form, device: str) -> torch.dtype:
    return torch.float32 if form.fp32 or device == "cpu" else torch.bfloat16


def skipped(form: Form, device: str, reason: str, status: str = "skipped") -> Row:
    """A row without a time."""
    dtype = str(dtype_of(form, device)).removeprefix("torch.")
    return {"name": form.name, "workload": form.workload, "pass": form.stage, "dtype": dtype, "device": device,
            "us": None, "bytes": form.bytes, "flops": form.flops, "floor_us": None, "share": None, "samples": 0,
            "status": status, "reason": reason}  # fmt: skip


def measure(form: Form, device: str, timer: Timer, ceilings: dict[str, float], budget_s: float) -> Row:
    try:
        samples = timer.repeat(form.make(device, dtype_of(form, device)), budget_s)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return skipped(form, device, f"{type(error).__name__}: {lines[0]}", "failed")
    row = skipped(form, device, "")
    floor = max(form.bytes / ceilings["copy_gbs"], form.flops / ceilings[f"gemm_gflops_{row['dtype']}"]) / 1e3
    us = quantiles(samples)
    return {**row, "us": us, "floor_us": round(floor, 2), "share": round(floor / us["p50"], 4), "samples": len(samples),
            "status": "ok", "reason": None}  # fmt: skip


def release(device: str) -> None:
    """Free a form's inputs before the next ones come."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def machine(device: str) -> dict[str, Any]:
    about: dict[str, Any] = {"device": device, "arch": platform.machine(), "threads": torch.get_num_threads()}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        about["gpu"] = {"name": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count}
    return about


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}


def write(path: Path, document: dict[str, Any]) -> None:
    """Beside, then renamed: an interrupted run leaves the rows so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(beside, path)


def line(row: Row) -> str:
    place = f"{row['workload']}/{row['pass']}/{row['name']}"
    if row["status"] != "ok":
        return f"  {place:<64} {row['status']}: {row['reason'][:90]}"
    return f"  {place:<64} {row['us']['p50']:>12.1f} us  {100 * row['share']:>5.1f} % of the floor's rate"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.rivals", description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("bench-results/rivals.json"))
    parser.add_argument("--budget", type=float, help="seconds in all (default 240 on a GPU, 45 on a CPU)")
    parser.add_argument("--only", default="", help="measure only rows whose workload/pass/name holds this text")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    began, budget = time.monotonic(), args.budget or (240.0 if args.device == "cuda" else 45.0)
    chosen = [f for f in forms(args.device == "cpu") if args.only in f"{f.workload}/{f.stage}/{f.name}"]
    timer = Timer(args.device)
    each_s = min(0.3, budget / (4 * len(chosen) + 1))
    document: dict[str, Any] = {"schema": SCHEMA, "machine": machine(args.device), "versions": versions(),
                                "peaks": peaks(args.device, timer, each_s), "rows": []}  # fmt: skip
    for form in chosen:
        if time.monotonic() - began > budget:
            row = skipped(form, args.device, f"the budget of {budget:g} s is spent; give more with --budget")
        else:
            row = measure(form, args.device, timer, document["peaks"], each_s)
            release(args.device)
        document["rows"].append(row)
        print(line(row), flush=True)
        write(args.out, document)
    print(args.out)
    return int(not any(row["status"] == "ok" for row in document["rows"]))


if __name__ == "__main__":
    sys.exit(main())
