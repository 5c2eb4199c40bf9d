"""sigreg over a process group: equal to one process that holds every rank's rows."""

import os
import re
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import jepa_kernels as jk
from tests.processes import gloo, side_by_side

OPTIONS = dict(slices=40, step=7, seed=3)
WIDTH = 12


def rows_of(rank):
    """Unequal numbers of rows, none on the last of three."""
    return (5, 9, 0)[rank]


def embeddings(world):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, rows_of(rank), WIDTH, generator=generator) for rank in range(world)]


def start(rank, world, store, work, results):
    with gloo(rank, world, store):
        results[rank] = work(rank, world)


def spawn(world, work, tmp_path):
    """work(rank, world) on every rank of a group; what each returned."""
    with mp.Manager() as manager:
        results = manager.dict()
        side_by_side(start, (world, os.fspath(tmp_path / "store"), work, results), world)
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
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        jk.sigreg(layer(embeddings(world)[rank]), **OPTIONS, group=dist.group.WORLD).backward()
    numbers = [call.args[0].numel() for call in reduced.call_args_list]
    assert numbers == [2 * OPTIONS["slices"] * 17 * 2], numbers  # once, of both views
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


CHANGES = {
    "slices": dict(slices=17),
    "knots": dict(knots=9),
    "t_max": dict(t_max=2.0),
    "seed": dict(seed=1),
    "step": dict(step=torch.tensor(1)),
    "backend": dict(backend="reference"),
    "dtype": dict(dtype=torch.bfloat16),
    "views": dict(views=3),
    "E": dict(width=5),
}


def message_of(rank, views=2, width=4, dtype=torch.float32, **options):
    z = torch.ones(views, rank, width, dtype=dtype)
    try:
        jk.sigreg(z, **{"slices": 16, **options}, group=dist.group.WORLD)
    except (TypeError, ValueError) as error:
        return str(error)


def disagree(rank, world):
    """What is raised where one rank differs, then where one fails, each after a call that all agreed on."""
    found = {}
    for name, change in CHANGES.items():
        assert message_of(rank) is None
        found[name] = message_of(rank, **(change if rank == 1 else {}))
    found["reference"] = message_of(rank, slices=16 + rank, backend="reference")
    for name, bad in dict(z=dict(width=0), step=dict(step=-1), t_max=dict(t_max=10**400)).items():
        found["bad " + name] = message_of(rank, **(bad if rank == 1 else {}))
    return found, jk.sigreg(embeddings(2)[rank], slices=16, group=dist.group.WORLD).item()


def gradient_on_one_rank(rank, world, backend):
    z = embeddings(2)[rank].requires_grad_(rank == 0)
    loss = jk.sigreg(z, slices=8, group=dist.group.WORLD, backend=backend)
    return torch.autograd.grad(loss, z)[0] if rank == 0 else None


def disagree_and_go_on(rank, world):
    gradients = [gradient_on_one_rank(rank, world, backend) for backend in ("cpu", "reference")]
    return *disagree(rank, world), gradients


def test_ranks_that_disagree_raise_everywhere_and_may_go_on(tmp_path):
    (first, one, gradients), (second, other, _) = spawn(2, disagree_and_go_on, tmp_path)
    assert one == other and torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
    for name in [*CHANGES, "reference"]:
        fact = "slices" if name == "reference" else name
        message = rf"sigreg: group must agree on {fact}, got another on rank 1 than on rank 0; .+"
        assert re.fullmatch(message, first[name]) and re.fullmatch(message, second[name]), name
    elsewhere = "sigreg: group must have fitting arguments on every rank, got an error on rank 1; see its message"
    for name in ("z", "step", "t_max"):
        assert first["bad " + name] == elsewhere and second["bad " + name].startswith(f"sigreg: {name} must"), name
