"""A plain training loop: `python -m jepa_kernels train ijepa`, `vjepa2`, `pusht`, `vl_jepa`, or `train my.yaml`.

In the output folder: metrics.jsonl (a line per step), latest.pt (checkpoint), model.safetensors (the trained weights
and the networks' config), curves.png, probe.json, and a recipe's own pictures. Crops, clips, windows, questions, masks
and schedules are functions of (seed, step), so that a resumed run continues bit for bit.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from jepa_kernels import CollapseStats, collapse_stats, report, schedules
from jepa_kernels._core.check import fail, usable_device
from jepa_kernels._core.select import BackendError
from jepa_kernels.configs import Config, TargetOptimization, flat, read, same_run
from jepa_kernels.data import extra
from jepa_kernels.masks import MaskBatch
from jepa_kernels.masks.sampler import Sampler
from jepa_kernels.models import checkpoints
from jepa_kernels.models.jepa import train_step
from jepa_kernels.models.vl_jepa import Texts
from jepa_kernels.recipes import RECIPES

FORMAT = "jepa_kernels.train/1"
STAT_ROWS = 1024


class Trainer:
    """A model, its optimiser and the number of finished steps: all that a checkpoint holds."""

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.step = config, torch.device(device), 0
        self.dtype = torch.bfloat16 if config.optimization.use_bfloat16 else None
        self.recipe = RECIPES[config.architecture]
        self.model = self.recipe.model(config.model, shadow_dtype=self.dtype).to(self.device)
        self.optimizer = torch.optim.AdamW(_groups(self.model), fused=True)
        self.latents = torch.empty(0)
        watched, self._latents_of = self.recipe.watch(self.model)
        watched.register_forward_hook(self._keep_latents)

    def _keep_latents(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Some inputs' latents."""
        some = max(2, STAT_ROWS // output.shape[1:-1].numel())
        self.latents = self._latents_of(output[:some])

    def schedule(self) -> dict[str, float]:
        """Learning rate, weight decay and, of a target encoder, momentum of the step to come; the first two are set."""
        c: Any = self.config.optimization
        total = int(c.ipe_scale * c.steps)
        warmup = round(c.warmup * c.steps)
        lr = schedules.learning_rate(
            self.step, start=c.start_lr, peak=c.lr, final=c.final_lr, warmup=warmup, total=total
        )
        decay = schedules.weight_decay(self.step, start=c.weight_decay, final=c.final_weight_decay, total=total)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr * group["lr_scale"], decay if group["decayed"] else 0.0
        row = {"lr": lr, "weight_decay": decay}
        if isinstance(c, TargetOptimization):
            row["momentum"] = schedules.momentum(self.step, start=c.ema[0], final=c.ema[1], total=total)
        return row

    def advance(self, pixels: Tensor, given: MaskBatch | Tensor | Texts) -> dict[str, Any]:
        """One step on uint8 pixels, and masks, actions or texts; returns what the log shows of it."""
        row = self.schedule()
        batch = self.recipe.prepare(pixels.to(self.device, non_blocking=True))
        on_device, momentum = given.to(self.device), row.get("momentum")
        loss = train_step(self.model, self.optimizer, batch, on_device, momentum, dtype=self.dtype)
        self.step += 1
        stats = latent_stats(self.latents)
        measured = torch.stack([loss.float(), stats.std, stats.rank]).tolist()
        return {"step": self.step, **dict(zip(("loss", "std", "rank"), measured, strict=True)), **row}

    def state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "config": self.config.plain(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same config; raises ValueError, and changes nothing, for any other."""
        state = checkpoints.read("train", path)
        if state.get("format") != FORMAT:
            found = state.get("format") or ", ".join(sorted(map(str, state))[:5]) or "nothing"
            fail("train", f"checkpoint {path}", f"be of format {FORMAT}", found, "pass the --out of a training run")
        missing = [name for name in self.state() if name not in state]
        if missing:
            fail("train", f"checkpoint {path}", f"hold {', '.join(missing)}", "a part", "pass the --out of a whole run")
        same_run(state["config"], self.config.plain(), path)
        moments = self._moments(state, path)
        self.model.load(state["model"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})  # the schedule sets the rest
        torch.set_rng_state(state["rng"])
        self.step = state["step"]

    def _moments(self, state: Mapping[str, Any], path: Path) -> Mapping[int, Any]:
        """The optimiser's state in a checkpoint, once all but the weights, which the model checks, is known to fit."""
        step, weights, optimizer = state["step"], state["model"], state["optimizer"]
        moments = optimizer.get("state") if isinstance(optimizer, Mapping) else None
        found = [] if isinstance(weights, Mapping) else [f"model is a {type(weights).__name__}"]
        if not isinstance(step, int) or step < 0:
            found.append(f"step is {step!r}")
        if not isinstance(moments, Mapping):
            found.append("optimizer holds no mapping named state")
        elif moments or step != 0:  # before the first step there are none
            found += checkpoints.problems("optimizer", self._expected_moments(), flat(moments))
        try:
            torch.Generator().set_state(state["rng"])
        except (TypeError, RuntimeError):
            found.append("rng is no state of a generator")
        if found:
            remedy = "pass the --out of a whole run"
            fail("train", f"checkpoint {path}", "hold a state of this run", checkpoints.brief(found), remedy)
        return moments  # type: ignore[return-value]

    def _expected_moments(self) -> dict[str, Tensor]:
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = {f"{i}.{name}": p for i, p in enumerate(trained) for name in ("exp_avg", "exp_avg_sq")}
        return names | {f"{i}.step": torch.zeros(()) for i in range(len(trained))}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for everything but biases, vectors and numbers, as published (so the mask token is decayed).

    A model's `parameter_groups` says what is trained at another share of the learning rate, `lr_scale`.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = getattr(model, "parameter_groups", lambda lr: [{"params": list(names), "lr": lr}])
    groups: list[dict[str, Any]] = []
    for part in own(1.0):
        trained = [p for p in part["params"] if p.requires_grad]
        exempt = {p for p in trained if p.dim() < 2 or names[p].endswith("bias")}
        decayed = [p for p in trained if p not in exempt]
        others = [p for p in trained if p in exempt]
        groups.append({"params": decayed, "decayed": True, "lr_scale": part["lr"]})
        groups.append({"params": others, "decayed": False, "weight_decay": 0.0, "lr_scale": part["lr"]})
    return groups


def latent_stats(latents: Tensor) -> CollapseStats:
    """How much target latents [B, N, E] differ between inputs.

    Latents are layer-normalised, as the loss sees them, and the mean over inputs is taken out at each place, so
    that latents which tell only the place count as collapsed.
    """
    z = F.layer_norm(latents.float(), latents.shape[-1:])
    z = z - z[0]  # inputs that are alike give 0 exactly
    return collapse_stats(z - z.mean(0))


class _Collate:
    """Stack crops or clips and draw their masks, in the worker."""

    def __init__(self, masks: Sampler) -> None:
        self.masks = masks

    def __call__(self, items: list[tuple[Tensor, int]]) -> tuple[Tensor, MaskBatch]:
        return torch.stack([pixels for pixels, _ in items]), self.masks(len(items))


def batches(config: Config, start: int = 0) -> DataLoader[Any]:
    """Load (uint8 pixels, masks, actions or texts) of the steps from `start` on: functions of (seed, step) alone."""
    d, recipe = config.data, RECIPES[config.architecture]
    inputs, masks = recipe.inputs(config)
    collate = None if recipe.collate is None else recipe.collate(config)
    if masks is not None:
        masks.step, collate = start, _Collate(masks)
    indices = range(start * d.batch_size, config.optimization.steps * d.batch_size)
    generator = torch.Generator()  # the loader would draw its workers' seed from the global one
    return DataLoader(
        inputs,
        d.batch_size,
        sampler=indices,
        collate_fn=collate,
        num_workers=d.num_workers,
        generator=generator,
    )


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    report.write(path, buffer.getbuffer())


@contextmanager
def _interruptible() -> Iterator[list[bool]]:
    """SIGINT lets the running step end; a second one stops at once."""
    asked: list[bool] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not in the main thread: nothing to catch there
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def fit(trainer: Trainer, out: Path, *, stop: int | None = None) -> bool:
    """Train to the last step (or to `stop`), logging and saving in `out`; False if interrupted, after saving."""
    config = trainer.config
    last = config.optimization.steps if stop is None else stop
    metrics = out / "metrics.jsonl"
    _drop_rows_after(metrics, trainer.step)
    with _interruptible() as asked, _progress(last, trainer.step) as show, open(metrics, "ab", buffering=0) as log:
        for pixels, masks in batches(config, trainer.step):
            if trainer.step >= last or asked:
                break
            started = time.perf_counter()
            row = trainer.advance(pixels, masks)
            if not math.isfinite(row["loss"]):
                fail("train", "loss", "be finite", f"{row['loss']} at step {trainer.step}", "lower optimization.lr")
            row[f"{trainer.model.inputs}_per_s"] = len(pixels) / (time.perf_counter() - started)
            _append(log, row)
            show(row)
            if trainer.step % config.logging.checkpoint_every == 0:
                save(out / report.CHECKPOINT, trainer.state())
    save(out / report.CHECKPOINT, trainer.state())
    return not asked or trainer.step >= last


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
        "config": config.plain(),
        "machine": report.machine(),
        "commit": report.commit(),
    }


def _pictures(trainer: Trainer) -> dict[str, bytes]:
    make = trainer.recipe.pictures
    return {} if make is None else make(trainer.config, trainer.model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jepa_kernels train", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a shipped name, such as ijepa, vjepa2, pusht or vl_jepa, or a YAML file")
    parser.add_argument("--out", type=Path, help="folder of the run; default runs/CONFIG")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--steps", type=int, help="length of the run; the schedules shrink with it")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-probe", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="say, optimization.lr=3e-4")
    return parser


def prepare(options: argparse.Namespace) -> tuple[Trainer, Path]:
    """Read the config, build or resume the run, make its folder."""
    changes = list(options.set)
    changes += [f"optimization.steps={options.steps}"] if options.steps is not None else []
    changes += [f"seed={options.seed}"] if options.seed is not None else []
    config = read(options.config, changes)
    for module in ("rich", "matplotlib", *RECIPES[config.architecture].needs):
        extra(module)  # before the first step, not after the last
    out = options.out or Path("runs") / Path(options.config).stem
    latest = out / report.CHECKPOINT
    if latest.exists() and not options.resume:
        fail("train", "--out", "be a folder without a checkpoint", out, "pass --resume to continue, or another --out")
    batches(config)  # refuses impossible crops, clips and masks before anything is written
    trainer = Trainer(config, usable_device("train", "--device", options.device))
    if options.resume:
        if not latest.exists():
            fail("train", "--resume", "find a checkpoint", f"no {latest}", "leave it out, or pass the run's --out")
        trainer.load(latest)
    report.folder(out, "train")
    return trainer, out


def main(argv: list[str]) -> int:
    """Run the verb `train`; returns the exit code (1: the run failed, 2: bad input, 130: interrupted)."""
    options = _parser().parse_args(argv)
    try:
        trainer, out = prepare(options)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    started = time.perf_counter()
    try:
        finished = fit(trainer, out)
        report.plot(out / "metrics.jsonl", out / "curves.png")
        if not finished:
            print(f"stopped at step {trainer.step}; continue with the same command and --resume (out: {out})")
            return report.INTERRUPTED
        trainer.model.save(out / report.WEIGHTS)
        if not options.no_probe:
            result = evaluate(trainer)
            result["seconds"] = time.perf_counter() - started
            report.write(out / "probe.json", (json.dumps(result, indent=1) + "\n").encode())
            for name, png in _pictures(trainer).items():
                report.write(out / name, png)
            report.show(result["probes"])
    except (report.SaveError, BackendError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{trainer.step} steps, {time.perf_counter() - started:.0f} s; results in {out}")
    return 0
