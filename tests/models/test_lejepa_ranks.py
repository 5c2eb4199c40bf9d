"""LeJEPA's step in a process group: gradients averaged by DDP are those of one process with the whole batch."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import jepa_kernels as jk
from jepa_kernels.models.lejepa import LeJEPA, ViTConfig
from jepa_kernels.nn import BatchNorm1d
from jepa_kernels.testing import hold
from tests.processes import gloo, side_by_side

CONFIG = ViTConfig(
    embed_dim=32, proj_hidden=48, proj_dim=16, slices=64, crop_size=16, patch_size=8, depth=1, num_heads=2, weight=0.3
)
BATCH, WORLD = 8, 2


def model():
    torch.manual_seed(0)
    return LeJEPA.of(CONFIG)


def views(part=slice(None)):
    g = torch.Generator().manual_seed(0)
    return [torch.rand(BATCH, 3, side, side, generator=g)[part] for side in (16, 16, 8)]


def grads(net):
    return {f"d{name}": p.grad for name, p in net.named_parameters()}


def own_step(rank):
    torch.manual_seed(rank)
    lejepa = LeJEPA.of(CONFIG)
    if rank == 0:
        lejepa.load_state_dict(model().state_dict())  # which DDP sends
    wrapped = DistributedDataParallel(lejepa)
    share = BATCH // WORLD
    lejepa.objective(wrapped(views(slice(rank * share, (rank + 1) * share)))).backward()
    return grads(lejepa), lejepa.state_dict()


def whole_step(net, given):
    net.loss(given).backward()
    return grads(net), net.state_dict()


ROWS = (3, 6)  # of each rank
NORMS = ({}, {"momentum": None, "affine": False})


def normalized(net, x, weights):
    out = net(x)
    (out * weights).sum().backward()
    return out.detach(), x.grad, {n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers())


def rows():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, sum(ROWS), 5, generator=g, dtype=torch.float64) + 2


def unequal(rank):
    x, weights = rows()[:, slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)]
    found = [normalized(BatchNorm1d(5, **how).double(), x.clone().requires_grad_(), weights) for how in NORMS]
    net = BatchNorm1d(5)
    low = net(x.bfloat16())
    net.eval()
    # In evaluation mode nothing is sent: one rank may do it.
    alone = rank == 0 or torch.equal(net(x.float()), nn.BatchNorm1d.forward(net, x.float()))
    try:  # one row in all, none on the other rank
        refused = "nothing"
        BatchNorm1d(5)(torch.randn(1 - rank, 5))
    except ValueError as error:
        refused = str(error)
    return found, (low.dtype, net.running_var.dtype, alone), refused


def start(rank, store, results):
    with gloo(rank, WORLD, store):
        results[rank] = own_step(rank), unequal(rank)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found, of a step and of batch norms: one start of processes for both."""
    with mp.Manager() as manager:
        results = manager.dict()
        side_by_side(start, (os.fspath(tmp_path_factory.mktemp("ranks") / "store"), results), WORLD)
        return [results[rank] for rank in range(WORLD)]


def test_ddp_gives_the_gradients_of_one_process(ranks):
    with jk.use_backend("reference"):
        exact, exact_state = whole_step(model().double(), [view.double() for view in views()])
        eager, _ = whole_step(model(), views())
    (first, state), (second, other) = (step for step, _ in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(state[name], other[name]) for name in state)  # the running statistics among them
    failed = [str(r) for name in exact if not (r := hold(name, first[name], exact[name], eager[name])).ok]
    assert not failed, failed
    for name in ("projector.1.running_mean", "projector.1.running_var", "projector.4.running_var"):
        torch.testing.assert_close(state[name].double(), exact_state[name], rtol=1e-5, atol=1e-7)
    assert state["sigreg.global_step"] == 1 and state["projector.4.num_batches_tracked"] == 1


def test_batch_norm_of_unequal_ranks_is_that_of_all_rows(ranks):
    whole, weights = rows()
    results = [norms for _, norms in ranks]
    for i, how in enumerate(NORMS):
        single = nn.BatchNorm1d(5, **how).double()
        out, dx, dp, buffers = normalized(single, whole.clone().requires_grad_(), weights)
        found = [rank[0][i] for rank in results]
        torch.testing.assert_close(torch.cat([f[0] for f in found]), out)
        torch.testing.assert_close(torch.cat([f[1] for f in found]), dx)
        for name in dp:
            torch.testing.assert_close(found[0][2][name] + found[1][2][name], dp[name])
        for name in buffers:
            assert torch.allclose(found[0][3][name], buffers[name]) and torch.equal(
                found[0][3][name], found[1][3][name]
            )
    assert all(rank[1] == (torch.bfloat16, torch.float32, True) for rank in results)
    message = "BatchNorm1d: x must be at least 2 rows in all ranks, got 1; pass larger batches"
    assert [rank[2] for rank in results] == [message] * WORLD


@pytest.fixture(params=["no group", "a group of one"])
def one_process(request, tmp_path):
    if request.param == "no group":
        yield
        return
    dist.init_process_group("gloo", None, timedelta(seconds=60), 1, 0, dist.FileStore(os.fspath(tmp_path / "store"), 1))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_in_one_process_it_is_torchs_own_to_the_last_bit():
    ours, theirs = BatchNorm1d(5), nn.BatchNorm1d(5)
    x = torch.randn(7, 5) * 3 + 1
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_var, theirs.running_var)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(x[:1])
    for off in (x[:, :4], x[:, :, None], x[0]):
        with pytest.raises(ValueError, match=r"^BatchNorm1d: x must be rows \[N, 5\], got \[.+\]; flatten all "):
            ours(off)
