"""A plain training loop: `python -m jepa_kernels train ijepa`, `vjepa2`, `pusht`, `vl_jepa`, or `train my.yaml`.

In the output folder: metrics.jsonl (a line per step), checkpoints (see `training.saves`), model.safetensors (the
trained weights and the networks' config), run.html (its curves, see `training.page`), probe.json, a recipe's own
pictures; event files where tensorboard is installed. Crops, clips, windows, questions, masks and schedules are
functions of (seed, step), so that a resumed run continues bit for bit.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kernels import CollapseStats, collapse_stats, report, schedules
from jepa_kernels._core.check import fail, usable_device
from jepa_kernels._core.select import BackendError
from jepa_kernels.configs import Config, TargetOptimization, read, same_run
from jepa_kernels.data import extra
from jepa_kernels.models.jepa import loss_of
from jepa_kernels.nn import EMA
from jepa_kernels.recipes import RECIPES
from jepa_kernels.training import export, measures, networks, optimizer, page, saves, state
from jepa_kernels.training.feed import Part, batches
from jepa_kernels.training.measures import Meter, Step
from jepa_kernels.training.ranks import TIMEOUT, RankError, Ranks, join

STAT_ROWS = 1024
REDUCED = {"ddp": "all_reduce of gradients", "fsdp": "reduce_scatter of gradients"}


class Trainer:
    """A model, its optimiser and the number of finished steps: all that a checkpoint holds."""

    def __init__(self, config: Config, device: torch.device | str = "cpu", ranks: Ranks | None = None) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.step, self.ranks = config, torch.device(device), 0, ranks or Ranks()
        self.dtype = torch.bfloat16 if config.optimization.use_bfloat16 else None
        self.recipe = RECIPES[config.architecture]
        sharded = networks.shards(config.parallel, self.ranks)
        self.model = self.recipe.model(config.model, shadow_dtype=None if sharded else self.dtype).to(self.device)
        if config.mask is not None:
            self.model.average = config.optimization.average
        self.latents = torch.empty(0)
        watched, self._latents_of = self.recipe.watch(self.model)
        watched.register_forward_hook(self._keep_latents)
        self.network: nn.Module = self.model
        if not self.ranks.grouped:
            self.share()

    def share(self) -> None:
        """Spread the networks over the ranks, which all must call it: after what one of them may refuse."""
        self.network = networks.spread(self.model, self.config.parallel, self.ranks, self.device)
        self.optimizer = optimizer.build(self.model)
        torch.manual_seed(self.config.seed + self.ranks.rank)

    def _keep_latents(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Some inputs' latents."""
        some = max(2, STAT_ROWS // output.shape[1:-1].numel())
        self.latents = self._latents_of(output[:some])

    def schedule(self) -> dict[str, float]:
        """Learning rate, weight decay and, of a target encoder, momentum of the step to come; the first two are set."""
        c: Any = self.config.optimization
        total = int(c.ipe_scale * c.steps)
        warmup = round(c.warmup * c.steps)
        rates: Any = dict(start=c.start_lr, peak=c.lr, final=c.final_lr, warmup=warmup, total=total)
        if c.schedule == "wsd":
            lr = schedules.warmup_stable_decay(self.step, anneal=round(c.anneal * total), **rates)
        else:
            lr = schedules.learning_rate(self.step, **rates)
        decay = schedules.weight_decay(self.step, start=c.weight_decay, final=c.final_weight_decay, total=total)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr * group["lr_scale"], decay if group["decayed"] else 0.0
        row = {"lr": lr, "weight_decay": decay}
        if isinstance(c, TargetOptimization):
            row["momentum"] = schedules.momentum(self.step, start=c.ema[0], final=c.ema[1], total=total)
        return row

    def advance(self, parts: Sequence[Part], asked: bool = False) -> Step:
        """One step on this rank's parts of the batch; returns what the log shows of it, the same on all ranks.

        asked: whether this rank wants to stop; the row's "asked": whether any does.
        """
        row = self.schedule()
        loss = self._gradients(parts)
        ema: EMA | None = getattr(self.model, "ema", None)
        most = self.config.optimization.max_grad_norm
        norm, finite = optimizer.step(self.optimizer, ema, row.get("momentum"), most)
        self.step += 1
        stats = latent_stats(self.latents)
        skipped = 1.0 - finite.float()
        found = {"loss": loss, "std": stats.std, "rank": stats.rank, "grad_norm": norm, "skipped": skipped}
        if ema is not None and (self.step - 1) % self.config.logging.every == 0:
            found |= measures.ema_squares(ema.pairs())
        works = [self.recipe.work(self.model, *part) for part in parts]
        host = {"asked": asked, "tokens": sum(w.tokens for w in works), "flops": sum(w.flops for w in works)}
        known = torch.tensor(list(host.values()), dtype=torch.float32).to(self.device, non_blocking=True)
        numbers = self._averaged(torch.cat([torch.stack(list(found.values())), known]))
        return Step({"step": self.step, **row}, [*found, *host], numbers)

    def _gradients(self, parts: Sequence[Part]) -> Tensor:
        """Add up those of all parts, averaged over ranks; the mean loss of the parts."""
        losses, step = [], self.step + 1
        for n, (pixels, given) in enumerate(parts):
            batch = self.recipe.prepare(pixels.to(self.device, non_blocking=True))
            with networks.part(self.network, last=n == len(parts) - 1):
                with self.ranks.finishing(f"the forward pass of step {step}", "all_gather of weights"):
                    loss = loss_of(self.network, batch, given.to(self.device), dtype=self.dtype)
                with self.ranks.finishing(f"the backward pass of step {step}", REDUCED[self.config.parallel.engine]):
                    (loss / len(parts)).backward()
            losses.append(loss.detach().float())
        return torch.stack(losses).mean()

    def gather(self) -> None:
        """Of weights in parts, all in one plain model: on the first rank, for what follows a run."""
        if not networks.shards(self.config.parallel, self.ranks):
            return
        state = {name: networks.whole(x) for name, x in self.model.state_dict().items()}
        if self.ranks.first:
            self.model = self.recipe.model(self.config.model).to(self.device)
            self.model.load_state_dict(state)

    def _averaged(self, measured: Tensor) -> Tensor:
        """Over ranks."""
        if self.ranks.world > 1:
            with self.ranks.finishing(f"the log of step {self.step}", "all_reduce"):
                torch.distributed.all_reduce(measured)
        return measured / self.ranks.world

    def state(self) -> dict[str, Tensor]:
        """What this rank saves, by public names: not copies."""
        return state.tensors(self.model, self.optimizer) | state.generators(self.ranks.rank, self.device)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same config; ValueError, and no change, on all ranks if one refuses it."""
        with self.ranks.together():
            about = state.about(path)
            same_run(about["config"], self.config.plain(), path)
            values = state.read(path, self.state())
        state.put(values, self.model, self.optimizer)
        self.step = about["step"]
        state.put_generators(values, self.ranks.rank, self.device, seed=self.config.seed, step=self.step)


def latent_stats(latents: Tensor) -> CollapseStats:
    """How much target latents [B, N, E] differ between inputs.

    Latents are layer-normalised, as the loss sees them, and the mean over inputs is taken out at each place, so
    that latents which tell only the place count as collapsed.
    """
    z = F.layer_norm(latents.float(), latents.shape[-1:])
    z = z - z[0]  # inputs that are alike give 0 exactly
    return collapse_stats(z - z.mean(0))


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
    kept = saves.Saves(out, config, ranks, trainer.step, pin=pin)
    with _interruptible() as asked, kept, _log(out, trainer, meter, kept) as show:
        for parts in meter.timed(feed):
            if trainer.step >= last:
                break
            step = trainer.advance(parts, bool(asked))
            step.row.update(kept.took())
            ended = show(meter.rows(step))
            if ended or (asked and ranks.world == 1):
                break
            if trainer.step % config.logging.checkpoint_every == 0:
                show(meter.rest())
                kept.save(trainer.step, trainer.state())
        show(meter.rest())
        if trainer.step == 0 or trainer.step != kept.step:
            kept.save(trainer.step, trainer.state())
    if trainer.step >= last:
        return None
    return asked[0] if asked else signal.SIGTERM  # another rank was asked


def _check_finite(row: dict[str, Any], what: str) -> None:
    """A step without finite gradients, whose weights are as before: the run ends, or goes on."""
    if row["skipped"] and what == "stop":
        actual = f"{row['grad_norm']} at step {row['step']} (loss {row['loss']})"
        remedy = "lower optimization.lr, or set optimization.nonfinite to skip"
        fail("train", "the norm of gradients", "be finite", actual, remedy)


@contextmanager
def _log(
    out: Path, trainer: Trainer, meter: Meter, kept: saves.Saves
) -> Iterator[Callable[[Iterable[dict[str, Any]]], bool]]:
    """What checks rows, and on the first rank writes and shows them; whether any rank had asked to stop before them."""
    with _writer(out, trainer, meter) if trainer.ranks.first else nullcontext(lambda row: None) as write:

        def show(rows: Iterable[dict[str, Any]]) -> bool:
            ended = False
            for row in rows:
                ended |= row.pop("asked") > 0
                _check_finite(row, trainer.config.optimization.nonfinite)
                write(row)
                kept.seen(row)
            return ended

        yield show


@contextmanager
def _writer(out: Path, trainer: Trainer, meter: Meter) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Into metrics.jsonl, whose first row since a start says what is run and on what, and wherever it is looked at."""
    metrics, total = out / page.METRICS, trainer.config.optimization.steps
    _drop_rows_after(metrics, trainer.step)
    about = {"run": _about(trainer) | {"peak_flops": meter.peak}}
    board = measures.board(out, trainer.step)
    with _progress(total, trainer.step) as show, board as plot, open(metrics, "ab", buffering=0) as log:

        def write(row: dict[str, Any]) -> None:
            _append(log, row | about)
            about.clear()
            plot(row)
            show(row)

        yield write


def _about(trainer: Trainer) -> dict[str, Any]:
    """What is needed to repeat a run."""
    return {
        "world": trainer.ranks.world,
        "config": trainer.config.plain(),
        "machine": report.machine(trainer.device),
        "commit": report.commit(),
    }


def _append(log: io.FileIO, row: dict[str, Any]) -> None:
    line = (json.dumps(row) + "\n").encode()
    try:
        if log.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise report.unwritable(Path(log.name), error, len(line)) from error


def _drop_rows_after(metrics: Path, step: int) -> None:
    """Steps after the checkpoint are about to be done again; a crash may have torn the last row."""
    if metrics.exists():
        rows = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        report.write(metrics, "".join(row for row in rows if json.loads(row)["step"] <= step).encode())


@contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    rich = extra("rich.progress")
    text = rich.TextColumn("loss {task.fields[loss]:.4f}  std {task.fields[std]:.3f}  rank {task.fields[rank]:.1f}")
    columns = ("step", rich.BarColumn(), rich.MofNCompleteColumn(), text, rich.TimeRemainingColumn())
    with rich.Progress(*columns) as bar:
        task = bar.add_task("train", total=total, completed=done, loss=math.nan, std=math.nan, rank=math.nan)
        yield lambda row: bar.update(task, completed=row["step"], **{k: row[k] for k in ("loss", "std", "rank")})


def evaluate(trainer: Trainer) -> dict[str, Any]:
    """The probes' scores with what is needed to repeat them."""
    config, recipe = trainer.config, trainer.recipe
    trainer.model.eval()
    fresh = lambda: recipe.model(config.model).to(trainer.device).eval()  # noqa: E731
    return {
        "probes": recipe.probes(config, trainer.model, fresh),
        "step": trainer.step,
        **_about(trainer),
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
    with ranks.together():
        config = _config(options)
        begun = bool(saves.steps(out))
        resume = options.resume or (ranks.restarts > 0 and begun)
        if begun and not resume:
            fail(
                "train", "--out", "be a folder without a checkpoint", out, "pass --resume to continue, or another --out"
            )
        batches(config, 0, ranks)  # refuses impossible crops, clips and masks before anything is written
        trainer = Trainer(config, usable_device("train", "--device", options.device), ranks)
        if config.weights and not resume:
            if not Path(config.weights).is_file():
                remedy = "pass the model.safetensors of a run, or a published file"
                fail("train", "weights", "be a file", repr(config.weights), remedy)
            trainer.model.load(config.weights)
    path = saves.newest(out, ranks) if ranks.of_first(resume) else None
    ranks.same("the versions", saves.versions(), "install the same on all machines")
    ranks.same("the config", config.plain(), "give all ranks the same file and options")
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
    for module in ("rich", "matplotlib", "jinja2", *RECIPES[config.architecture].needs):
        extra(module)  # before the first step, not after the last
    return config


def main(argv: list[str]) -> int:
    """Run the verb `train`; returns the exit code (1: the run failed, 2: bad input, 130: interrupted).

    Under torchrun or srun it is one of several processes; the first one speaks.
    """
    options = _parser().parse_args(argv)
    ranks = Ranks()
    try:
        if options.export or options.checkpoint:
            return _export(options)
        ranks, options.device = join(options.device, options.timeout)
        trainer, out = prepare(options, ranks)
    except (ValueError, TypeError, OSError, ModuleNotFoundError, RankError) as error:
        _complain(error, ranks)
        ranks.leave()
        return 2
    started = time.perf_counter()
    try:
        ended = fit(trainer, out)
        trainer.gather()
        ranks.leave()
        return _finish(trainer, out, ended, started, probe=not options.no_probe) if ranks.first else _code(ended)
    except (report.SaveError, RankError, BackendError, ValueError, OSError) as error:
        _complain(error, ranks)
        return 1


def _complain(error: Exception, ranks: Ranks) -> None:
    """What all ranks refuse the first one says; of each other, those that are left speak."""
    if ranks.first or isinstance(error, RankError):
        print(error, file=sys.stderr)


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
