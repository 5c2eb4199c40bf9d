"""Sharded and replicated networks in processes that talk through gloo: updates are local and equal the whole ones."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import jepa_kernels as jk
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.jepa import train_step
from jepa_kernels.nn import EMA
from jepa_kernels.training.measures import ema_squares
from tests.processes import Checks

CONFIG = IJEPAConfig(
    crop_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, predictor_embed_dim=16, predictor_depth=1
)

CHECKS = Checks()
on = CHECKS.on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where processes that ran all checks left their failures: one start of processes for all."""
    folder = tmp_path_factory.mktemp("sharded")
    CHECKS.run(folder)
    return folder


def network():
    """Sizes that no number of ranks divides, a shared weight, a frozen one, a scalar-like one."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 1))
    net[2].weight = net[1].weight
    net[0].bias.requires_grad_(False)
    return net


def train(net, seed):
    """The same new weights on every rank, whole or sharded."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            whole = torch.randn(p.shape, generator=generator)
            if p.requires_grad:
                p.copy_(distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole)


def whole(net):
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in net.parameters()]


def shard(net, mesh):
    for layer in (net[0], net[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def assert_equal(actual, expected):
    assert len(actual) == len(expected) and all(map(torch.equal, actual, expected)), (actual, expected)


def pair(mesh=None, **arguments):
    """An online network and its EMA; both sharded over the mesh."""
    online = network()
    ema = EMA(online, 0.9, final_momentum=1.0, total_steps=8, **arguments)
    if mesh is not None:
        shard(online, mesh)
        shard(ema.module, mesh)
    return online, ema


@on(ranks=2)
def sharded_updates_are_local_and_equal_the_whole_ones(_):
    mesh = init_device_mesh("cpu", (2,))
    (online, ema), (single, expected) = pair(mesh), pair()
    x = torch.randn(4, 5)
    for step in range(3):
        for net in (online, single):
            train(net, step)
        ema(x)  # FSDP keeps the root's parameters gathered after a forward without a backward
        online(x).sum().backward()
        with CommDebugMode() as communication:
            ema.update()
        expected.update()
        assert communication.get_total_counts() == 0
        assert_equal(whole(ema.module), whole(expected.module))
    sizes = {p.to_local().shape[0] for p in ema.module.parameters()}
    assert 7 not in sizes and all(isinstance(p, DTensor) for p in ema.module.parameters())
    ema.check_sync()
    with pytest.raises(ValueError, match=r"^EMA: shadow_dtype must be None for a sharded target, got a DTensor w"):
        pair(mesh, shadow_dtype=torch.bfloat16)[1].update()
    with pytest.raises(ValueError, match=r"^EMA: online must be a whole network, got a sharded FSDP.*; build"):
        EMA(online)


@on(ranks=2)
def the_targets_distance_of_parts_is_that_of_the_whole(_):
    (online, ema), (single, expected) = pair(init_device_mesh("cpu", (2,))), pair()
    for net in (online, single):
        train(net, 0)
    sums = torch.stack(list(ema_squares(ema.pairs()).values()))
    dist.all_reduce(sums)
    alone = torch.stack(list(ema_squares(expected.pairs()).values()))
    torch.testing.assert_close(sums, alone, rtol=1e-6, atol=0)
    assert alone[0] > 0


@on(ranks=2)
def freed_shards_are_named_before_the_first_write(_):
    for side, move in (("online", EMA.set), ("target", EMA.set), ("online", EMA.update)):
        online, ema = pair(init_device_mesh("cpu", (2,)))
        train(online, 0)
        gone = {"online": online, "target": ema.module}[side][0].weight.to_local()
        kept = [p.to_local() for p in ema.module.parameters()][1:]
        before, needed = [t.clone() for t in kept], gone.numel() * 4
        gone.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=rf"^EMA: {side} 0\.weight must hold its {needed} bytes, got a storage"):
            move(ema, online)
        assert_equal(kept, before)


@on(ranks=2)
def two_ranks_save_a_checkpoint(folder):
    online, ema = pair(init_device_mesh("cpu", (2,)))
    for step in range(3):
        train(online, step)
        ema.update()
    dcp.save(ema.state_dict(), checkpoint_id=folder / "checkpoint")


def continued(online, ema, folder, **how):
    """Loads that checkpoint and takes two steps more."""
    state = ema.state_dict()
    dcp.load(state, checkpoint_id=folder / "checkpoint", **how)
    ema.load_state_dict(state)
    assert ema.step == 3
    for step in range(3, 5):
        train(online, step)
        ema.update()
    return whole(ema.module)


@on(ranks=3)
def a_checkpoint_of_two_ranks_loads_on_one_and_on_three(folder):
    online, expected = pair()
    for step in range(5):
        train(online, step)
        expected.update()
    assert_equal(continued(*pair(init_device_mesh("cpu", (3,))), folder), whole(expected.module))
    assert_equal(continued(*pair(), folder, no_dist=True), whole(expected.module))


def stepped(mesh, most):
    """Weights, targets and norms of three AdamWEMA steps with the same data on every rank."""
    online, ema = pair(mesh)
    average = {p: t for p, t in zip(online.parameters(), ema.module.parameters(), strict=True) if p.requires_grad}
    optimizer = jk.AdamWEMA(online.parameters(), average, lr=0.1, momentum=0.9, max_grad_norm=most)
    norms = []
    for step in range(3):
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        online(x).square().mean().backward()
        if mesh is not None:
            assert all(isinstance(p.grad, DTensor) for p in online.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        norms += optimizer.grad_norms.values()
        counts = {float(optimizer.state[p]["step"]) for p in online.parameters() if p.requires_grad}
        assert counts == {step + 1}, "a rank without a share of a parameter counts its steps as the others do"
    return whole(online), whole(ema.module), norms


@on(ranks=2)
def a_sharded_optimizer_steps_and_averages_as_the_whole_one(_):
    mesh = init_device_mesh("cpu", (2,))
    ours, expected = stepped(mesh, None), stepped(None, None)
    assert_equal(ours[0], expected[0])
    assert_equal(ours[1], expected[1])
    ours, expected = stepped(mesh, 0.01), stepped(None, 0.01)  # the norm is of all shards, summed in another order
    assert len(ours[2]) == 3 and all(n > 0.02 for n in expected[2])
    for part, tolerance in zip(range(3), (1e-5, 1e-5, 1e-6), strict=True):
        torch.testing.assert_close(ours[part], expected[part], rtol=tolerance, atol=tolerance * 0.1)


@on(ranks=2)
def replicas_stay_equal_and_one_that_strays_is_found(_):
    rank = dist.get_rank()
    torch.manual_seed(rank)  # DDP sends rank 0's weights
    model = DistributedDataParallel(IJEPA(CONFIG))
    torch.manual_seed(0)
    single = IJEPA(CONFIG)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, single)]
    ids = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2, 3], [0, 3]])
    for _ in range(2):
        images = torch.randn(2, 3, 16, 16)
        train_step(model, optimizers[0], images, ids, 0.9)  # the same images on each rank: the same mean gradient
        train_step(single, optimizers[1], images, ids, 0.9)
    assert_equal(whole(model.module.target_encoder), whole(single.target_encoder))
    model.module.ema.check_sync()
    weights = model.module.target_encoder.blocks[1].mlp.fc1.weight
    with torch.no_grad():
        if rank == 1:
            weights[3, 2] = torch.nextafter(weights[3, 2], torch.tensor(9.0))
            model.module.target_encoder.norm.bias[0] = -0.0
    message = (
        r"^EMA: blocks.1.mlp.fc1.weight must be the same on all ranks, got other bits \(2 of 29 tensors differ\); load"
    )
    with pytest.raises(ValueError, match=message):
        model.module.ema.check_sync()
    other = EMA(nn.Linear(2, 2 + rank))
    with pytest.raises(ValueError, match=r"^EMA: weight must have the same shape and dtype on all ranks, got "):
        other.check_sync(dist.group.WORLD)


@on(ranks=2)
def replicas_of_shards_are_compared(_):
    """A mesh of two replicas of one shard each: what is replicated is compared."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
    online, ema = pair(mesh)
    train(online, 0)
    ema.update()
    ema.check_sync()
    if dist.get_rank() == 1:
        ema.module[3].bias.to_local().add_(1.0)
    with pytest.raises(ValueError, match=r"^EMA: 3.bias must be the same on all ranks"):
        ema.check_sync()


@on(ranks=2)
def tensors_sharded_otherwise_are_refused(_):
    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    weight = torch.randn(4, 4)
    rows, columns = (distribute_tensor(weight, mesh, [Shard(i)]) for i in (0, 1))
    copies, elsewhere = distribute_tensor(weight, mesh, [Replicate()]), distribute_tensor(weight, other, [Shard(0)] * 2)
    before = rows.to_local().clone()
    for online, what in [
        (
            columns,
            r"have the placements \(Shard\(dim=0\),\) of target\[0\], got \(Shard\(dim=1\),\); shard both networks",
        ),
        (
            copies,
            r"have the placements \(Shard\(dim=0\),\) of target\[0\], got \(Replicate\(\),\); shard both networks",
        ),
        (elsewhere, r"have the mesh .+ of target\[0\], got .+; shard both networks alike"),
        (rows.to_local().clone(), r"be a DTensor as target\[0\], got a plain tensor; shard both networks alike"),
    ]:
        with pytest.raises(ValueError, match=rf"^ema_update: online\[0\] must {what}"):
            jk.ema_update([rows], [online], 0.5)
    with pytest.raises(ValueError, match=r"^ema_update: online w must be a plain tensor as target w, got a DTensor; "):
        jk.ema_update({"w": before.clone()}, {"w": rows}, 0.5)
    for given in (dict(target_params=[columns]), dict(shadow=([columns.bfloat16()], None))):
        with pytest.raises(ValueError, match=r"^adamw_ema: the (target|online_shadow) of .+ must have the placements "):
            jk.AdamWEMA([nn.Parameter(rows)], **given)
    with pytest.raises(ValueError, match=r"^ema_update: shadow\[0\] must have the placements "):
        jk.ema_update([rows], [rows.clone()], 0.5, shadow=[columns.bfloat16()])
    assert torch.equal(rows.to_local(), before)


@pytest.mark.parametrize("name", [*CHECKS])
def test_in_processes(name, folder):
    CHECKS.passed(name, folder)
