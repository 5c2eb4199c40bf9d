"""nn.EMA of tensors whose memory was freed or shrunk: the first is named, every other stays as it was. And swapped."""

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels.nn import EMA
from tests.test_ema import equal, halfway, network, train, weights

NAMES = {"parameter": "0.weight", "buffer": "1.running_mean"}  # of 140 and 28 bytes
LEFT = {"freed": 0, "shrunk": 8}


def networks(**arguments):
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    ema = EMA(online, **arguments)
    with torch.no_grad():
        for p in (*online.parameters(), *online.buffers()):
            p.add_(1)
    return online, ema


def moved(online, ema):
    optimizer = jk.AdamWEMA(online.parameters(), ema.pairs(), shadow=(None, ema.shadow_copies()))
    for p in online.parameters():
        p.grad = torch.ones_like(p)
    with ema.moved_by(optimizer):
        optimizer.step()


MOVES = {
    "update": lambda online, ema: ema.update(),
    "decay 0": lambda online, ema: ema.apply_update_(online, 0.0),
    "warm-up": lambda online, ema: ema.update(online, step=0),
    "set": lambda online, ema: ema.set(online),
    "moved_by": moved,
}


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("side", ["online", "target"])
@pytest.mark.parametrize("shadow", [None, torch.bfloat16], ids=["plain", "shadow"])
@pytest.mark.parametrize(
    "move, kind", [(move, kind) for move in MOVES for kind in NAMES if (move, kind) != ("moved_by", "parameter")]
)
def test_memory_that_is_gone_is_named_before_the_first_write(move, kind, shadow, side, left):
    schedule = dict(decay=0.9, exclude_buffers=True) if move == "warm-up" else dict(momentum=0.5)
    online, ema = networks(shadow_dtype=shadow, **schedule)
    named = {"online": online.state_dict(keep_vars=True), "target": ema.module.state_dict(keep_vars=True)}
    gone = named[side].pop(NAMES[kind])
    kept = [t for tensors in named.values() for t in tensors.values()] + list(ema.shadow_copies().values())
    before = [(t.detach().clone(), t._version) for t in kept]
    needed = gone.numel() * gone.element_size()
    gone.untyped_storage().resize_(left)
    wanted = f"^EMA: {side} {NAMES[kind]} must hold its {needed} bytes, got a storage with {left}; do not free"
    with pytest.raises(ValueError, match=wanted):
        MOVES[move](online, ema)
    assert ema.step == 0
    assert all(torch.equal(t, old) and t._version == version for t, (old, version) in zip(kept, before, strict=True))


@pytest.mark.parametrize("side", ["online", "target"])
def test_averaged_buffers_too(side):
    online, ema = networks(momentum=0.5, exclude_buffers=False)
    gone = (online if side == "online" else ema.module)[1].running_var
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^EMA: {side} 1\.running_var must hold its 28 bytes, got a storage with 0"):
        ema.update()


def test_a_frozen_parameter_is_asked_for_by_a_copy_of_all_alone():
    online, ema = networks(momentum=0.5)
    online[0].weight.requires_grad_(False)
    online[0].weight.untyped_storage().resize_(0)
    ema.update()
    with pytest.raises(ValueError, match=r"^EMA: online 0\.weight must hold its 140 bytes, got a storage with 0"):
        ema.set(online)


def test_a_forward_rounds_no_freed_weight():
    _, ema = networks(momentum=0.5, shadow_dtype=torch.bfloat16)
    ema.module[2].weight.untyped_storage().resize_(0)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"^EMA: target 2\.weight must hold its 84"),
    ):
        ema(torch.randn(4, 5))


def test_buffers_of_gaps_of_repeats_and_of_no_elements_are_copied():
    online = nn.Module()
    online.register_buffer("gaps", torch.zeros(12)[1::2])
    online.register_buffer("turned", torch.zeros(2, 3).t())
    online.register_buffer("none", torch.zeros(4)[4:])
    online.register_buffer("sparse", torch.eye(3).to_sparse())
    ema = EMA(online, momentum=0.5)
    online.none.untyped_storage().resize_(0)
    online.gaps, online.turned = torch.arange(6.0), torch.ones(1).expand(3, 2)
    ema.update()
    assert torch.equal(ema.module.gaps, torch.arange(6.0)) and ema.module.turned.eq(1.0).all()
    assert torch.equal(ema.module.sparse.to_dense(), torch.eye(3))


def test_networks_that_swap_their_parameters_may():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        online = network()
        ema = EMA(online, 0.5)
        ema.update()
        for net in (online, ema.module):
            net.load_state_dict(network(1).state_dict())
            net.to(torch.float32, memory_format=torch.channels_last)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    train(online, 1)
    expected = [halfway(t, q) for t, q in zip(weights(ema.module), online.parameters(), strict=True)]
    ema.update()
    assert equal(weights(ema.module), expected)


def test_after_an_update_a_load_and_a_move_let_tensors_be_swapped():
    online = network()
    ema = EMA(online, 0.5)
    ema.update()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        ema.load_state_dict(ema.state_dict())
        online.to(torch.float32, memory_format=torch.channels_last)
        ema.update()
        ema.to(torch.float64)
        online.load_state_dict(network(1).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
