"""`python -m jepa_kernels profile MODEL`: where the time of a training step goes, on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from jepa_kernels import report
from jepa_kernels._core.check import fail, usable_device
from jepa_kernels._core.select import BackendError
from jepa_kernels.configs import read
from jepa_kernels.data import need
from jepa_kernels.profiling import ncu
from jepa_kernels.profiling.recorder import profile
from jepa_kernels.profiling.report import TRACE, Report, check_writable
from jepa_kernels.training.feed import batches
from jepa_kernels.training.trainer import Trainer

OP, WARM = "profile", 2  # steps before the first that is recorded: kernels are compiled, memory is taken
DTYPES = {"float32": "false", "bfloat16": "true"}
FEW = ("data.episodes=8",)
QUICK = {"pusht": FEW, "lewm_pusht": FEW}  # collecting all episodes takes minutes; --set has the last word


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jepa_kernels profile", description=__doc__)
    parser.add_argument("config", metavar="MODEL", help="a shipped config, such as ijepa, or a YAML file")
    parser.add_argument("--steps", type=int, default=5, help="steps that are recorded, after two that are not")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as the config says; bfloat16 is under autocast")
    parser.add_argument("--out", type=Path, help="folder of profile.html, profile.json, trace.json; default runs/…")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="another place for the trace")
    parser.add_argument(
        "--ncu", nargs="?", const="", metavar="OP", help="print the Nsight Compute command; run nothing"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="say, data.batch_size=8")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb `profile`; returns the exit code (1: it failed, 2: bad input, 130: interrupted)."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print(f"{OP}: interrupted before a step was recorded; nothing is written", file=sys.stderr)
        return report.INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    out = options.out or Path("runs") / f"profile-{Path(options.config).stem}"
    try:
        if options.steps < 1:
            fail(OP, "--steps", "be at least 1", options.steps, "5 is usual")
        need("yaml", *(("rich", "jinja2") if options.ncu is None else ()), of=OP)
        changes = _changes(options)
        config = read(options.config, [*changes, f"optimization.steps={options.steps + WARM}"])
        if options.ncu is not None:
            print(ncu.command(options.config, options.ncu, changes))
            return 0
        device = usable_device(OP, "--device", options.device)
        check_writable(out, options.trace)
        feed = batches(config)
        trainer = Trainer(config, device)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        found = record(trainer, feed, options.steps, model=options.config)
        return _show(found, out, options.trace or out / TRACE)
    except (report.SaveError, BackendError, ValueError, OSError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1


def _show(found: Report, out: Path, trace: Path) -> int:
    """Print and save the report, for which peaks are measured first."""
    try:
        print(found)
        print(f"{found.save(out, trace)}\n{trace}: for https://ui.perfetto.dev")
    except KeyboardInterrupt:
        said = "interrupted after the steps, before the report was complete; what is written of it is whole"
        print(f"{OP}: {said}", file=sys.stderr)
        return report.INTERRUPTED
    return report.INTERRUPTED if found.about.get("interrupted") else 0


def record(trainer: Trainer, feed: torch.utils.data.DataLoader, steps: int, **about: object) -> Report:
    """Profile `steps` steps after WARM others. Ctrl-C ends it early: the steps so far are reported, and marked so."""
    step = iter(feed)
    for _ in range(WARM):
        trainer.advance(next(step))
    recorded = profile(trainer.model)
    done = 0
    try:
        with recorded:
            for _ in range(steps):
                trainer.advance(next(step))
                recorded.step()
                done += 1
    except KeyboardInterrupt:
        if not done:
            raise
        about["interrupted"] = True
    dtype = "float32" if trainer.dtype is None else str(trainer.dtype).removeprefix("torch.")
    return recorded.report(**about, dtype=dtype, batch=trainer.config.data.batch_size, commit=report.commit())


def _changes(options: argparse.Namespace) -> list[str]:
    """Of the config, whether it is profiled here or by Nsight Compute."""
    dtype = [f"optimization.use_bfloat16={DTYPES[options.dtype]}"] if options.dtype else []
    return [*QUICK.get(options.config, ()), *options.set, *dtype]
