"""Checkpoints of several processes: what any number of them saves, whole or sharded, any other number loads."""

import errno
import os
import sys
from io import StringIO
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.tensor import DTensor

from jepa_kernels import configs, report, train
from jepa_kernels.models.ijepa import IJEPA
from jepa_kernels.training import feed, saves, state
from jepa_kernels.training.networks import whole
from jepa_kernels.training.ranks import Ranks
from tests import runs
from tests.processes import Checks
from tests.test_train import TINY, same

pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes have


def _place(rank, world):
    return Ranks(rank, world, rank, timeout=180.0)


CHECKS = Checks(_place)
on = CHECKS.on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where processes that ran all checks left their failures: one start of processes for all."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    CHECKS.run(folder)
    return folder


def trainer_of(folder, ranks, engine, *, load=None):
    config = configs.read(str(folder / "tiny.yaml"), [f"parallel.engine={engine}"])
    trainer = train.Trainer(config, "cpu", ranks)
    if ranks.grouped:
        trainer.share()
    if load is not None:
        trainer.load(saves.newest(folder / load, ranks))
    return trainer


def take_step(trainer):
    """The same batch on every rank: the same mean gradient, exactly, on 1, 2 and 4 of them."""
    parts = feed.Feed(trainer.config, Ranks())[trainer.step]
    trainer.advance([(pixels, masks) for pixels, masks in parts])


def whole_state(trainer):
    return {name: whole(x.detach()).clone() for name, x in trainer.state().items()}


def save(folder, name, ranks, engine):
    """A run that saves after its second step, and takes the third before that save is written."""
    trainer, out = trainer_of(folder, ranks, engine), folder / name
    with pytest.MonkeyPatch.context() as patched, saves.Saves(out, trainer.config, ranks) as kept:
        may_write = runs.held_writers(patched)
        for _ in range(2):
            take_step(trainer)
        before = whole_state(trainer)
        kept.save(2, trainer.state())
        take_step(trainer)
        assert saves.steps(out) == []
        may_write.set()
    torch.save(before, folder / f"{name}.{ranks.rank}.before")
    torch.save(whole_state(trainer), folder / f"{name}.{ranks.rank}.after")


def told(folder, name, rank, when):
    return torch.load(folder / f"{name}.{rank}.{when}")


def continues(folder, name, ranks, engine, saved_on):
    """The state is what `saved_on` ranks saved, and one more step makes of it what it made of theirs."""
    torch.manual_seed(999)
    trainer = trainer_of(folder, ranks, engine, load=name)
    found, drawn = whole_state(trainer), f"rng.{ranks.rank}.cpu"
    expected = told(folder, name, 0, "before")
    assert trainer.step == 2 and found.keys() - {drawn} == expected.keys() - {"rng.0.cpu"}
    assert [n for n, x in found.items() if n != drawn and not torch.equal(x, expected[n])] == []
    if ranks.rank < saved_on:
        assert torch.equal(found[drawn], told(folder, name, ranks.rank, "before")[drawn])
    else:  # a generator of its own, which the seed, the rank and the step tell
        seeds = np.random.SeedSequence((0, ranks.rank, 2)).generate_state(1, np.uint64)
        assert torch.initial_seed() == int(seeds[0])
    if ranks.world != 3:
        take_step(trainer)
        after, expected = whole_state(trainer), told(folder, name, 0, "after")
        assert [n for n, x in after.items() if n != drawn and not torch.equal(x, expected[n])] == []


@on(ranks=4)
def four_ranks_save_shards(folder, ranks):
    save(folder, "fsdp", ranks, "fsdp")
    trainer = trainer_of(folder, ranks, "fsdp")
    assert all(isinstance(x, DTensor) for n, x in trainer.state().items() if n.endswith("exp_avg"))


@on(ranks=3)
def three_ranks_load_the_shards_of_four(folder, ranks):
    continues(folder, "fsdp", ranks, "fsdp", 4)


@on(ranks=2)
def two_replicas_load_the_shards_of_four(folder, ranks):
    continues(folder, "fsdp", ranks, "ddp", 4)


@on(ranks=2)
def two_replicas_save(folder, ranks):
    save(folder, "ddp", ranks, "ddp")


@on(ranks=3)
def three_ranks_load_the_replicas_of_two_as_shards(folder, ranks):
    continues(folder, "ddp", ranks, "fsdp", 2)


@on(ranks=2)
def two_ranks_load_the_replicas_of_two_as_shards(folder, ranks):
    continues(folder, "ddp", ranks, "fsdp", 2)


@on(ranks=2)
def a_disk_without_room_on_one_rank_ends_the_save_on_all(folder, ranks):
    trainer, out = trainer_of(folder, ranks, "ddp"), folder / "full"

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with saves.Saves(out, trainer.config, ranks) as kept:
        kept.save(1, trainer.state())
        kept.wait()
        with mock.patch.object(os, "fsync", full if ranks.rank == 1 else os.fsync):
            kept.save(2, trainer.state())
            with pytest.raises(report.SaveError, match=r"step-00000002 must be writable \(.*got No space left .*whole"):
                kept.wait()
        dist.barrier()
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]
        kept.save(3, trainer.state())
    assert saves.steps(out) == [1, 3] and all(saves.damage(saves.place(out, step)) is None for step in (1, 3))


@on(ranks=2)
def ranks_that_write_to_different_disks_are_told_so(folder, ranks):
    trainer, out = trainer_of(folder, ranks, "ddp"), folder / "apart" / str(ranks.rank)
    with saves.Saves(out, trainer.config, ranks) as kept:
        kept.save(1, trainer.state())
        with pytest.raises(ValueError, match=r"^train: --out must be a folder that all ranks share, got no __1_0.dist"):
            kept.wait()
    dist.barrier()
    assert saves.steps(folder / "apart/0") == []


@on(ranks=2)
def what_the_first_rank_finds_damaged_no_rank_loads(folder, ranks):
    """The files break for one rank alone, as they seem to where file systems lag."""
    out, measure = folder / "full", saves.measure
    lagging = lambda path: [0, 0] if "step-00000003" in str(path) else measure(path)  # noqa: E731
    for broken, found in ((0, 1), (1, 3)):
        with mock.patch.object(saves, "measure", lagging if ranks.rank == broken else measure):
            said = StringIO()
            with mock.patch.object(sys, "stderr", said):
                assert saves.newest(out, ranks) == saves.place(out, found)
        assert said.getvalue().count("continuing from") == (ranks.rank == broken == 0)
    nothing = folder / "nothing"
    with pytest.raises(ValueError, match=r"^train: --out must hold a checkpoint, got none in "):
        saves.newest(nothing, ranks)


@on(ranks=2)
def what_one_rank_refuses_no_rank_takes(folder, ranks):
    trainer = trainer_of(folder, ranks, "fsdp")
    before = whole_state(trainer)
    spoiled = mock.patch.object(state, "_spoiled", lambda name, x: f"{name} is off" if ranks.rank else "")
    with (
        spoiled,
        pytest.raises(ValueError, match=r"checkpoint .* must hold a state of this run, got model.* \(rank 1\)$"),
    ):
        trainer.load(saves.newest(folder / "fsdp", ranks))
    assert same(whole_state(trainer), before) and trainer.step == 0


@pytest.mark.parametrize("name", [*CHECKS])
def test_in_processes(name, folder):
    CHECKS.passed(name, folder)


@pytest.mark.parametrize("name, saved_on", [("fsdp", 4), ("ddp", 2)])
def test_one_process_without_a_group_loads_and_exports_what_several_saved(folder, tmp_path, name, saved_on):
    assert not dist.is_initialized()
    files = {path.name for path in runs.newest(folder / name).iterdir()}
    assert files == {".metadata", "state.json", *(f"__{rank}_0.distcp" for rank in range(saved_on))}
    continues(folder, name, Ranks(), "ddp", saved_on)
    file = tmp_path / "weights.safetensors"
    assert train.main([str(folder / "tiny.yaml"), "--out", str(folder / name), "--export", str(file)]) == 0
    expected = told(folder, name, 0, "before")
    for key, x in IJEPA.from_checkpoint(file)[0].state_dict().items():
        assert torch.equal(x, expected[f"model.{key}"])
