"""Runs of one batch in parts, on one to three processes and one after another: the same weights, balanced or not."""

import traceback
from pathlib import Path

import pytest
import torch
import yaml

import jepa_kernels as jk
from jepa_kernels import configs, train
from jepa_kernels.data import normalize
from jepa_kernels.training import networks
from jepa_kernels.training.feed import batches
from jepa_kernels.training.optimizer import groups
from jepa_kernels.training.ranks import Ranks
from tests.models.training import failures
from tests.processes import gloo, side_by_side
from tests.test_train import TINY as PHOTOS
from tests.test_train_clips import TINY as CLIPS
from tests.videos import stripes

pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes have

BALANCED, ALL = "parallel.balance=true", "model.predict_all=true"
RUNS = {  # processes, the config and its changes
    "two_parts": (1, "photos", ["seed=0", "optimization.accumulate=2"]),
    "three_parts": (1, "clips", ["seed=1", "optimization.accumulate=3", ALL]),
    "two_ranks": (2, "clips", ["seed=2"]),
    "two_ranks_balanced": (2, "clips", ["seed=3", "optimization.accumulate=2", BALANCED, ALL, "mask.bucket=32"]),
    "three_ranks": (3, "clips", ["seed=4", "optimization.average=token"]),
    "three_ranks_balanced": (3, "photos", ["seed=5", "optimization.accumulate=2", BALANCED]),
    "two_ranks_fsdp": (2, "photos", ["seed=6", "optimization.accumulate=3", BALANCED, "parallel.engine=fsdp"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where processes leave what each run came to, or how it failed: one start of processes for all."""
    folder = tmp_path_factory.mktemp("parts")
    for name, tiny, data in (("photos", PHOTOS, {}), ("clips", CLIPS, {"videos": stripes(folder)})):
        tree = {**tiny, "data": {**tiny["data"], **data, "batch_size": 12}, "optimization": {"steps": 3}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    side_by_side(_runs, (folder,), max(world for world, *_ in RUNS.values()))
    return folder


def _runs(rank, folder):
    for name, (world, *run) in RUNS.items():
        if world == 1 or rank >= world:
            continue
        with gloo(rank, world, Path(folder, f"{name}.store"), minutes=3):
            found = _found(folder, *run, Ranks(rank, world))
        torch.save(found, Path(folder, f"{name}.{rank}"))


def _found(*given):
    try:
        return outcome(trainer_of(*given))
    except BaseException:
        return traceback.format_exc()


def trainer_of(folder, config, changes, ranks):
    trainer = train.Trainer(configs.read(str(folder / f"{config}.yaml"), changes), "cpu", ranks)
    if ranks.grouped:
        trainer.share()
    return trainer


def outcome(trainer):
    """Losses of all steps, and the weights after them."""
    losses = [trainer.advance(parts).measured()["loss"] for parts in batches(trainer.config, 0, trainer.ranks)]
    trainer.gather()
    found = {"losses": torch.tensor(losses)}
    if networks.shards(trainer.config.parallel, trainer.ranks) and not trainer.ranks.first:
        return found  # the first rank has gathered all weights
    return {**found, "weights": weights(trainer.model)}


def weights(model):
    """All in one row: where a gradient is next to nothing, AdamW makes much of its last digits, by luck in one tensor
    and not in another."""
    return torch.cat([x.flatten() for x in model.state_dict().values()])


def at_once(folder, config, changes):
    """The same batches, each in one piece, of exact lengths."""
    kept = [change for change in changes if not change.startswith(("parallel", "optimization.accumulate", "mask"))]
    return trainer_of(folder, config, kept, Ranks())


def by_the_reference(trainer):
    with jk.use_backend("reference"):
        return outcome(trainer)


def exactly(trainer):
    """The same in float64, by torch's AdamW."""
    model, pairs, losses = trainer.model.double(), trainer.model.ema.pairs(), []
    trainer.optimizer = torch.optim.AdamW(groups(model))
    for ((pixels, masks),) in batches(trainer.config):
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
    return {"losses": torch.tensor(losses, dtype=torch.float64), "weights": weights(model)}


def test_weights_are_those_of_the_whole_batch(folder):
    """Loss of every step and all weights after the last, held side by side to the budget of the whole batch's run."""
    actual, exact, eager = [], [], []
    for name, (world, *run) in RUNS.items():
        if world == 1:
            found = [outcome(trainer_of(folder, *run, Ranks()))]
        else:
            found = [torch.load(folder / f"{name}.{rank}") for rank in range(world)]
        assert not any(isinstance(f, str) for f in found), found
        assert all(torch.equal(f["losses"], found[0]["losses"]) for f in found)
        found = [f for f in found if "weights" in f]
        actual += found
        exact += [exactly(at_once(folder, *run))] * len(found)
        eager += [by_the_reference(at_once(folder, *run))] * len(found)
    assert not failures(actual, exact, eager)
