"""Recipes whose loss compares all inputs of a batch, on two processes with DDP and FSDP2: the runs of one process."""

import os
import traceback
from pathlib import Path

import pytest
import torch
import yaml

from jepa_kernels import configs, train
from jepa_kernels.training.feed import batches
from jepa_kernels.training.ranks import Ranks, join
from tests import test_train_lejepa, test_train_pusht, test_train_vl_jepa
from tests.processes import side_by_side
from tests.torchrun import free_port

ENGINES, STEPS = ("ddp", "fsdp"), 3
RECIPES = {
    "lejepa": (test_train_lejepa.TINY, []),
    "lewm": (test_train_pusht.TINY, ["model.dropout=0.0"]),  # which is drawn on each rank by itself
    "vl_jepa": (test_train_vl_jepa.TINY, ["model.learn_temperature=true", "model.text_scale=0.05"]),
}

pytestmark = pytest.mark.usefixtures("one_thread")  # as the processes have


def run(folder, recipe, engine, ranks):
    """Losses, and the weights before and after."""
    changes = [*RECIPES[recipe][1], f"parallel.engine={engine}"]
    trainer = train.Trainer(configs.read(str(folder / f"{recipe}.yaml"), changes), ranks=ranks)
    before = row(trainer.model)
    if ranks.grouped:
        trainer.share()
    losses = [trainer.advance(parts).measured()["loss"] for parts in batches(trainer.config, 0, ranks)]
    trainer.gather()
    return {"losses": losses, "before": before, "after": row(trainer.model) if ranks.first else None}


def row(model):
    return torch.cat([x.detach().flatten().double() for x in model.state_dict().values()])


def runs(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    for n, (recipe, engine) in enumerate((r, e) for r in RECIPES for e in ENGINES):
        os.environ["MASTER_PORT"] = str(port + n)
        ranks, _ = join("cpu", 120.0)
        try:
            found = run(folder, recipe, engine, ranks)
        except BaseException:
            found = traceback.format_exc()
        torch.save(found, folder / f"{recipe}.{engine}.{rank}")
        ranks.leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes left each run: one start of processes for all."""
    folder = tmp_path_factory.mktemp("recipes")
    for recipe, (tiny, _) in RECIPES.items():
        tree = {**tiny, "optimization": {"steps": STEPS}}
        if recipe == "vl_jepa":
            (folder / "text").mkdir()
            tree["model"] = {**tiny["model"], "text": str(test_train_vl_jepa.write_text(folder / "text"))}
        Path(folder, f"{recipe}.yaml").write_text(yaml.safe_dump(tree))
    side_by_side(runs, (free_port(len(RECIPES) * len(ENGINES)), folder), 2)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_are_one(folder, recipe, engine):
    first, second = (torch.load(folder / f"{recipe}.{engine}.{rank}") for rank in range(2))
    assert isinstance(first, dict) and isinstance(second, dict), (first, second)
    one = run(folder, recipe, "ddp", Ranks())
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert torch.equal(first["before"], one["before"])
    moved = (one["after"] - one["before"]).norm()
    assert (first["after"] - one["after"]).norm() < 2e-3 * moved  # AdamW makes much of gradients next to nothing
