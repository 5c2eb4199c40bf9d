"""A plain training loop: `python -m jepa_kernels train ijepa`, `vjepa2`, `pusht`, `vl_jepa`, or `train my.yaml`.

In the output folder: metrics.jsonl (a line per step), checkpoints (see `training.saves`), model.safetensors (the
trained weights and the networks' config), run.html (its curves, see `training.page`), probe.json, a recipe's own
pictures; event files where tensorboard is installed. Crops, clips, windows, questions, masks and schedules are
functions of (seed, step), so that a resumed run continues bit for bit.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jepa_kernels import report
from jepa_kernels._core.check import fail, usable_device
from jepa_kernels._core.select import BackendError
from jepa_kernels.configs import Config, flat, read
from jepa_kernels.data import need
from jepa_kernels.recipes import RECIPES
from jepa_kernels.training import export, log, page, saves
from jepa_kernels.training.feed import batches
from jepa_kernels.training.measures import Meter
from jepa_kernels.training.ranks import TIMEOUT, Agreed, RankError, Ranks, join
from jepa_kernels.training.trainer import Trainer


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """SIGINT and SIGTERM let the running step end; a second one stops at once. The signals that came."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: nothing to catch there
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(trainer: Trainer, out: Path, *, stop: int | None = None) -> int | None:
    """Train to the last step (or to `stop`), logging and saving in `out`; the signal that ended it earlier, if one did.

    Every rank calls it; the first one writes.
    """
    config, ranks = trainer.config, trainer.ranks
    last = config.optimization.steps if stop is None else stop
    pin = trainer.device.type == "cuda"
    feed = batches(config, trainer.step, ranks, pin=pin)
    meter = Meter(trainer.device, trainer.dtype, ranks.world, trainer.model.inputs, config.data.batch_size)
    with (
        log.alone(out, ranks),
        _interruptible() as asked,
        saves.Saves(out, config, ranks, trainer.step, pin=pin) as kept,
        log.opened(out, trainer, meter, kept) as show,
    ):
        for parts in meter.timed(feed):
            if trainer.step >= last:
                break
            step = trainer.advance(parts, bool(asked))
            step.row.update(kept.took())
            ended = show(meter.rows(step))
            if ended or (asked and ranks.world == 1):
                break
            if trainer.step % config.logging.checkpoint_every == 0:
                ended = show(meter.rest())
                kept.save(trainer.step, trainer.state())
                if ended:
                    break
        show(meter.rest())
        if trainer.step == 0 or trainer.step != kept.step:
            kept.save(trainer.step, trainer.state())
    if trainer.step >= last:
        return None
    return asked[0] if asked else signal.SIGTERM  # another rank was asked


def evaluate(trainer: Trainer) -> dict[str, Any]:
    """The probes' scores with what is needed to repeat them."""
    config, recipe = trainer.config, trainer.recipe
    trainer.model.eval()
    fresh = lambda: recipe.model(config.model).to(trainer.device).eval()  # noqa: E731
    return {
        "probes": recipe.probes(config, trainer.model, fresh),
        "step": trainer.step,
        **log.about(trainer),
    }


def _pictures(trainer: Trainer) -> dict[str, bytes]:
    make = trainer.recipe.pictures
    return {} if make is None else make(trainer.config, trainer.model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jepa_kernels train", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a shipped name, such as ijepa or vjepa2_vitl, or a YAML file")
    parser.add_argument("--out", type=Path, help="folder of the run; default runs/CONFIG")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint in --out")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write a checkpoint's weights there; train nothing")
    parser.add_argument("--checkpoint", help="of --export: best, or say step-00000050; default the newest whole one")
    parser.add_argument("--steps", type=int, help="length of the run; the schedules shrink with it")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", default="cpu", help="cpu or cuda; of several processes each takes a GPU of its own")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds that processes wait for each other")
    parser.add_argument("--no-probe", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="say, optimization.lr=3e-4")
    return parser


def prepare(options: argparse.Namespace, ranks: Ranks | None = None) -> tuple[Trainer, Path]:
    """Read the config, build or resume the run, make its folder. What one rank refuses all refuse."""
    ranks = ranks or Ranks()
    out = _out(options)
    restarted = ranks.any(ranks.restarts > 0)  # agents of several machines may count otherwise
    with ranks.together():
        config = _config(options)
        begun = bool(saves.steps(out))
        resume = options.resume or (restarted and begun and not ranks.refused())
        if begun and not resume:
            fail(
                "train", "--out", "be a folder without a checkpoint", out, "pass --resume to continue, or another --out"
            )
        batches(config, 0, ranks)  # refuses impossible crops, clips and masks before anything is written
        device = usable_device("train", "--device", options.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        trainer = Trainer(config, device, ranks)
        if config.weights and not resume:
            if not Path(config.weights).is_file():
                remedy = "pass the model.safetensors of a run, or a published file"
                fail("train", "weights", "be a file", repr(config.weights), remedy)
            trainer.model.load(config.weights)
    path = saves.newest(out, ranks) if ranks.of_first(resume) else None
    ranks.same("the versions", saves.versions(), "install the same on all machines")
    ranks.same("the config", flat(config.plain()), "give all ranks the same file and options")
    if ranks.grouped:
        trainer.share()
    if path is not None:
        trainer.load(path)
    with ranks.together():
        if ranks.first:
            report.folder(out, "train")
    return trainer, out


def _out(options: argparse.Namespace) -> Path:
    return options.out or Path("runs") / Path(options.config).stem


def _export(options: argparse.Namespace) -> int:
    if options.export is None:
        fail("train", "--checkpoint", "come with --export", options.checkpoint, "--resume takes the newest whole one")
    path = export.export(_config(options), _out(options), options.export, options.checkpoint)
    print(f"{options.export} holds the weights of {path}")
    return 0


def _config(options: argparse.Namespace) -> Config:
    changes = list(options.set)
    changes += [f"optimization.steps={options.steps}"] if options.steps is not None else []
    changes += [f"seed={options.seed}"] if options.seed is not None else []
    config = read(options.config, changes)
    # What is wanted after the last step is known before the first.
    need("rich", "matplotlib", "jinja2", *RECIPES[config.architecture].needs)
    return config


def main(argv: list[str]) -> int:
    """Run the verb `train`; returns the exit code (1: the run failed, 2: bad input, 130: interrupted).

    Under torchrun or srun it is one of several processes; the first one speaks.
    """
    options = _parser().parse_args(argv)
    ranks = Ranks()
    try:
        if options.timeout <= 0:
            fail("train", "--timeout", "be greater than 0", options.timeout, "pass seconds")
        if options.export or options.checkpoint:
            return _export(options)
        ranks, options.device = join(options.device, options.timeout)
        trainer, out = prepare(options, ranks)
    except (ValueError, TypeError, OSError, ModuleNotFoundError, RankError) as error:
        if ranks.first or isinstance(error, RankError):  # what all refuse the first one says
            print(error, file=sys.stderr)
        if not isinstance(error, RankError):
            ranks.refuse()
        ranks.leave()
        return 2
    started = time.perf_counter()
    try:
        ended = fit(trainer, out)
        if ended is None:
            trainer.gather()
        ranks.leave(finished=True)
        return _finish(trainer, out, ended, started, probe=not options.no_probe) if ranks.first else _code(ended)
    except (report.SaveError, RankError, BackendError, ValueError, OSError) as error:
        if ranks.first or not isinstance(error, (Agreed, report.SaveError)):
            print(error, file=sys.stderr)
        return 1


def _code(ended: int | None) -> int:
    return report.INTERRUPTED if ended == signal.SIGINT else 0


def _finish(trainer: Trainer, out: Path, ended: int | None, started: float, *, probe: bool) -> int:
    """What a run leaves besides its checkpoints and its log."""
    if ended is not None:
        page.write(out)
        print(f"stopped at step {trainer.step}; continue with the same command and --resume (out: {out})")
        return _code(ended)
    trainer.model.save(out / report.WEIGHTS)
    if probe:
        result = evaluate(trainer)
        result["seconds"] = time.perf_counter() - started
        report.write(out / "probe.json", (json.dumps(result, indent=1) + "\n").encode())
        for name, png in _pictures(trainer).items():
            report.write(out / name, png)
        report.show(result["probes"])
    page.write(out)
    print(f"{trainer.step} steps, {time.perf_counter() - started:.0f} s; results in {out}")
    return 0
