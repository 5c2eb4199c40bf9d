"""sigreg over a process group: equal to one process that holds every rank's rows."""

import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import jepa_kernels as jk

OPTIONS = dict(slices=40, step=7, seed=3)
WIDTH = 12


def rows_of(rank):
    """Unequal numbers of rows, none on the last of three."""
    return (5, 9, 0)[rank]


def embeddings(world):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, rows_of(rank), WIDTH, generator=generator) for rank in range(world)]


def start(rank, world, store, work, results):
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    torch.set_num_threads(1)
    try:
        results[rank] = work(rank, world)
    finally:
        dist.destroy_process_group()


def spawn(world, work, tmp_path):
    """work(rank, world) on every rank of a group; what each returned."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(start, (world, os.fspath(tmp_path / "store"), work, results), nprocs=world)
        return [results[rank] for rank in range(world)]


def loss_and_gradient(rank, world):
    """Of a layer whose gradient DDP would average, by every backend; and of one compiled."""
    found = {}
    for backend in ("cpu", "reference", *(("compiled",) if world == 2 else ())):
        layer = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        ours = lambda z: jk.sigreg(z, **OPTIONS, group=dist.group.WORLD, backend=backend)  # noqa: B023, E731
        if backend == "compiled":
            ours = torch.compile(
                lambda z: jk.sigreg(z, **OPTIONS, group=dist.group.WORLD), fullgraph=True, backend="aot_eager"
            )
        loss = ours(layer(embeddings(world)[rank]))
        loss.backward()
        for parameter in layer.parameters():
            dist.all_reduce(parameter.grad)
        found[backend] = loss.item(), [p.grad / world for p in layer.parameters()]
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_unequal_ranks_equal_a_single_process(world, tmp_path):
    layer = torch.nn.Linear(WIDTH, WIDTH)
    torch.nn.init.eye_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    loss = jk.sigreg(layer(torch.cat(embeddings(world), 1)), **OPTIONS)
    loss.backward()
    for results in spawn(world, loss_and_gradient, tmp_path):
        for backend, (found, grads) in results.items():
            assert found == pytest.approx(loss.item(), rel=1e-6), backend
            for grad, parameter in zip(grads, layer.parameters(), strict=True):
                assert torch.allclose(grad, parameter.grad, rtol=1e-5, atol=1e-7), backend


def disagree(rank, world):
    z = embeddings(world)[rank]
    try:
        jk.sigreg(z, slices=16 + rank, group=dist.group.WORLD)
    except ValueError as error:
        message = str(error)
    return message, jk.sigreg(z, slices=16, group=dist.group.WORLD).item()


def test_ranks_that_disagree_raise_everywhere_and_may_go_on(tmp_path):
    results = spawn(2, disagree, tmp_path)
    message = r"sigreg: slices must be the same on every rank of the group, got \[16, 17\] by rank; .+"
    assert all(re.fullmatch(message, text) for text, _ in results)
    assert results[0][1] == results[1][1]
