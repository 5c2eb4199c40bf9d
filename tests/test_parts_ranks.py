"""Runs of one batch in parts, on one to three processes and one after another: the same weights, balanced or not."""

import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

import jepa_kernels as jk
from jepa_kernels import configs, train
from jepa_kernels.data import normalize
from jepa_kernels.testing import compare
from jepa_kernels.training.feed import batches
from jepa_kernels.training.optimizer import groups
from jepa_kernels.training.ranks import Ranks
from tests.test_train import TINY

pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes have

RUNS = {  # processes, changes of the config
    "two_parts": (1, ["optimization.accumulate=2"]),
    "three_parts_balanced": (1, ["optimization.accumulate=3", "parallel.balance=true"]),
    "two_ranks": (2, []),
    "two_ranks_balanced": (2, ["parallel.balance=true", "optimization.accumulate=2"]),
    "three_ranks": (3, ["optimization.average=token"]),
    "three_ranks_balanced": (3, ["parallel.balance=true", "optimization.accumulate=2"]),
    "two_ranks_fsdp": (2, ["parallel.engine=fsdp", "parallel.balance=true", "optimization.accumulate=3"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where processes leave what each run came to, or how it failed: one start of Python for each rank."""
    folder = tmp_path_factory.mktemp("parts")
    tree = {**TINY, "data": {**TINY["data"], "batch_size": 12}, "optimization": {"steps": 3}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    torch.multiprocessing.spawn(_runs, (folder,), nprocs=max(world for world, _ in RUNS.values()))
    return folder


def _runs(rank, folder):
    torch.set_num_threads(1)
    for name, (world, changes) in RUNS.items():
        if world == 1 or rank >= world:
            continue
        limit, store = timedelta(minutes=3), f"file://{folder}/{name}.store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
        try:
            found = outcome(trainer_of(folder, changes, Ranks(rank, world)))
        except BaseException:
            found = traceback.format_exc()
        torch.save(found, Path(folder, f"{name}.{rank}"))
        dist.destroy_process_group()


def trainer_of(folder, changes, ranks):
    trainer = train.Trainer(configs.read(str(folder / "tiny.yaml"), changes), "cpu", ranks)
    if ranks.grouped:
        trainer.share()
    return trainer


def outcome(trainer):
    """Losses of all steps, and the weights after them."""
    losses = [trainer.advance(parts)["loss"] for parts in batches(trainer.config, 0, trainer.ranks)]
    trainer.gather()
    return torch.tensor(losses), trainer.model.state_dict()


def whole(folder, changes):
    """The batch at once, by the reference."""
    with jk.use_backend("reference"):
        return outcome(trainer_of(folder, [c for c in changes if "average" in c], Ranks()))


def exactly(folder, changes):
    """The same in float64, by torch's AdamW."""
    trainer, losses = trainer_of(folder, [c for c in changes if "average" in c], Ranks()), []
    model, pairs = trainer.model.double(), trainer.model.ema.pairs()
    trainer.optimizer = torch.optim.AdamW(groups(model))
    for ((pixels, masks),) in batches(trainer.config, 0, trainer.ranks):
        row = trainer.schedule()
        with jk.use_backend("reference"):
            loss = model.loss(normalize(pixels).double(), masks.to("cpu"))
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        for online, target in pairs.items():
            target.mul_(row["momentum"]).add_(online.detach(), alpha=1 - row["momentum"])
        trainer.step += 1
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), model.state_dict()


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_those_of_the_whole_batch(folder, name):
    world, changes = RUNS[name]
    if world == 1:
        found = [outcome(trainer_of(folder, changes, Ranks()))]
    else:
        found = [torch.load(folder / f"{name}.{rank}") for rank in range(world)]
    assert not any(isinstance(f, str) for f in found), found
    (exact_losses, exact), (losses, eager) = exactly(folder, changes), whole(folder, changes)
    for own, weights in found if "fsdp" not in name else found[:1]:  # of parts the first rank gathers all
        parity = [compare("losses", own, exact_losses, losses)]
        parity += [compare(key, x, exact[key], eager[key]) for key, x in weights.items()]
        assert not [str(p) for p in parity if not p.ok]
