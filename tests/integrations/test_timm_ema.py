"""nn.EMA in the place of timm's own ModelEmaV3: calls that name an argument of timm's alone give the same values."""

import inspect

import pytest
import torch
from torch import nn

from jepa_kernels.nn import EMA


@pytest.fixture
def upstream(timm):
    return timm.utils.ModelEmaV3


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(dtype)


def test_its_arguments_are_ours_in_its_order(upstream):
    theirs, ours = ([*inspect.signature(c).parameters.values()] for c in (upstream, EMA))
    assert [p.name for p in theirs[2:]] == [p.name for p in ours[2 : len(theirs)]]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ours[: len(theirs)])
    assert {p.name for p in theirs} <= {p.name for p in ours}


FP32 = dict(dtype=torch.float32, stochastic_rounding=False, stochastic_rounding_seed=3)
CALLS = {
    "defaults": ((), dict(decay=0.9999)),
    "no decay": ((), dict(use_warmup=False)),
    "by position": ((0.9,), dict(use_warmup=True)),
    "all by position": ((0.9, 0.3, 1, True, 3.0, 0.75, "cpu", torch.float32, True, 7, False, True), {}),
    "model": ((), dict(model=None)),
    "all by name": ((), dict(model=None, decay=0.97, min_decay=0.1, update_after_step=2, use_warmup=True)),
    "without buffers": ((), dict(decay=0.97, exclude_buffers=True, device=torch.device("cpu"))),
    "dtype": ((0.97,), FP32),
    "seed": ((0.97,), dict(stochastic_rounding_seed=3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_gives_its_values(upstream, call, dtype):
    given, named = CALLS[call]
    online = network(dtype)
    if dtype is torch.bfloat16 and len(given) < 8:  # of which ours is fp32 in any case
        named = dict(named, dtype=torch.float32)
    given = given if "model" in named else (online, *given)
    named = {name: online if name == "model" else value for name, value in named.items()}
    theirs, ours = upstream(*given, **named), EMA(*given, **named)
    assert not ours.module.training and ours.get_decay() == theirs.get_decay()
    for step in range(6):
        train(online, step)
        for ema in (theirs, ours):
            ema.update(online, step=None if step == 5 else step)
        assert ours.get_decay(step) == theirs.get_decay(step)
    expected, found = theirs.module.state_dict(), ours.module.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2**-21, atol=2**-22, msg=name)


def train(online, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (*online.parameters(), *online.buffers()):
            t.copy_(torch.randn(t.shape, generator=generator) if t.is_floating_point() else torch.tensor(seed))


def test_calls_that_name_nothing_of_timms_are_ours():
    for arguments in ((), (0.9998,)):
        for named in ({}, {"device": "cpu"}, {"foreach": True}, {"exclude_buffers": True}):
            ema = EMA(network(), *arguments, **named)
            assert ema.get_decay() == (arguments or (0.996,))[0] and ema.module.training and not ema.average_buffers


def test_its_state_loads(upstream):
    theirs, ours = upstream(network(), 0.9), EMA(network(), decay=0.9)
    train(theirs.module, 1)
    ours.load_state_dict(theirs.state_dict())
    assert all(map(torch.equal, ours.module.state_dict().values(), theirs.module.state_dict().values()))
