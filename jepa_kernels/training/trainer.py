"""One training step of a recipe on this process's part of a batch, and the state that steps change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from jepa_kernels import CollapseStats, collapse_stats, schedules
from jepa_kernels.configs import Config, TargetOptimization, same_run
from jepa_kernels.models.jepa import loss_of
from jepa_kernels.nn import EMA
from jepa_kernels.recipes import RECIPES
from jepa_kernels.training import measures, networks, optimizer, state
from jepa_kernels.training.feed import Part
from jepa_kernels.training.measures import Step
from jepa_kernels.training.ranks import Ranks

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
        self.latents: list[Tensor] = []
        watched, self._latents_of = self.recipe.watch(self.model)
        watched.register_forward_hook(self._keep_latents)
        self.network: nn.Module = self.model
        if not self.ranks.grouped:
            self.share()

    def share(self) -> None:
        """Spread the networks over the ranks, which all must call it: after what one of them may refuse."""
        with self.ranks.finishing("the start", "broadcast of weights"):
            self.network = networks.spread(self.model, self.config.parallel, self.ranks, self.device)
        self.optimizer = optimizer.build(self.model)
        torch.manual_seed(self.config.seed + self.ranks.rank)

    def _keep_latents(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Some inputs' latents, of the first parts of a step."""
        some = max(2, STAT_ROWS // output.shape[1:-1].numel()) - sum(map(len, self.latents))
        if some > 0:
            self.latents.append(self._latents_of(output[:some]))

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
        with record_function("optimizer"):
            row = self.schedule()
            statistics = [b for m in self.model.modules() if m.training for b in m.buffers(recurse=False)]
            before = [b.clone() for b in statistics]
        loss = self._gradients(parts)
        ema: EMA | None = getattr(self.model, "ema", None)
        most = self.config.optimization.max_grad_norm
        with record_function("optimizer"):
            norm, finite = optimizer.step(self.optimizer, ema, row.get("momentum"), most)
            for new, old in zip(statistics, before, strict=True):  # of batch norms, which have seen what is not finite
                new.copy_(torch.where(finite, new, old))
        self.step += 1
        with record_function("log"):
            return self._logged(parts, row, loss, (norm, finite), asked)

    def _logged(
        self, parts: Sequence[Part], row: dict[str, float], loss: Tensor, gradient: tuple[Tensor, Tensor], asked: bool
    ) -> Step:
        """What the log shows of the step that has just been taken; gradient: its norm, and whether that is finite."""
        norm, finite = gradient
        ema: EMA | None = getattr(self.model, "ema", None)
        stats = latent_stats(torch.cat(self.latents))
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
        self.latents = []
        for n, (pixels, given) in enumerate(parts):
            with record_function("data"):
                batch = self.recipe.prepare(pixels.to(self.device, non_blocking=True))
                given = given.to(self.device)
            with networks.part(self.network, last=n == len(parts) - 1):
                with self.ranks.finishing(f"the forward pass of step {step}", "all_gather of weights"):
                    loss = loss_of(self.network, batch, given, dtype=self.dtype)
                with self.ranks.finishing(f"the backward pass of step {step}", REDUCED[self.config.parallel.engine]):
                    (loss / len(parts)).backward()
            losses.append(loss.detach().float())
        return torch.stack(losses).mean()

    def gather(self) -> None:
        """Of weights in parts, all in one plain model: on the first rank, for what follows a run."""
        if not networks.shards(self.config.parallel, self.ranks):
            return
        with self.ranks.finishing("the end of the run", "all_gather of weights"):
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
