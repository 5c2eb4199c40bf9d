"""nn.EMA: its schedules, what moves and what does not, resuming, timm's arguments, and messages."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from jepa_kernels.nn import EMA


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Linear(7, 3, bias=False))


def train(online, seed):
    """Other weights and statistics, as after an optimiser's step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (*online.parameters(), *online.buffers()):
            t.copy_(torch.randn(t.shape, generator=generator) if t.is_floating_point() else torch.tensor(seed))


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def halfway(target, online):
    return target + 0.5 * (online.detach() - target)


def test_an_update_is_one_step_of_ema_update_and_a_copy_of_the_buffers():
    online = network()
    ema, expected = EMA(online, 0.9, form="ijepa"), weights(online)
    train(online, 1)
    ema.update()
    for k, q in zip(expected, online.parameters(), strict=True):
        k.mul_(0.9).add_((1.0 - 0.9) * q.detach())
    assert equal(weights(ema.module), expected)
    assert equal(list(ema.module.buffers()), list(online.buffers())) and ema.step == 1
    assert not any(p.requires_grad for p in ema.module.parameters())
    addresses = [{t.data_ptr() for t in net.state_dict().values()} for net in (ema.module, online)]
    assert not set.intersection(*addresses)


@pytest.mark.parametrize("mode", [True, False])
def test_the_target_keeps_the_mode_of_the_online_network(mode):
    assert EMA(network().train(mode)).module.training == mode


def test_the_online_network_is_no_part_of_the_module():
    online = network()
    ema = EMA(online)
    assert list(ema.state_dict()) == ["_extra_state", *(f"module.{name}" for name in online.state_dict())]
    assert [id(p) for p in ema.parameters()] == [id(p) for p in ema.module.parameters()]


def test_the_forward_is_the_targets():
    ema, x = EMA(network()), torch.randn(4, 5)
    assert torch.equal(ema(x), copy.deepcopy(ema.module)(x)) and ema.shadow_copies() == {}


def test_frozen_parameters_stay_and_move_once_trained():
    online = network()
    online[0].weight.requires_grad_(False)
    ema = EMA(online, 0.5)
    before = ema.module[0].weight.clone()
    train(online, 1)
    ema.update()
    assert torch.equal(ema.module[0].weight, before) and not torch.equal(ema.module[0].bias, before[:, 0])
    online[0].weight.requires_grad_(True)
    ema.update()
    assert torch.equal(ema.module[0].weight, halfway(before, online[0].weight))


def test_a_shared_parameter_moves_once():
    online = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    online[1].weight = online[0].weight
    ema = EMA(online, 0.75)
    assert ema.module[1].weight is ema.module[0].weight
    with torch.no_grad():
        ema.module[0].weight.zero_()
        online[0].weight.fill_(8.0)
    ema.update()
    assert ema.module[1].weight.eq(2.0).all()


def test_caches_outside_of_the_state_dict_are_left_alone():
    online = network()
    ema = EMA(online, 0.5)
    online.register_buffer("cache", torch.ones(3), persistent=False)
    ema.module.register_buffer("cache", torch.zeros(2), persistent=False)
    online[1].running_mean = torch.full((7,), 4.0)  # a new tensor in its place
    ema.update()
    assert ema.module.cache.tolist() == [0.0, 0.0] and ema.module[1].running_mean.eq(4.0).all()


def test_a_low_precision_network_has_an_fp32_target():
    online = network().bfloat16()
    ema = EMA(online, 0.999)
    assert {p.dtype for p in ema.module.parameters()} == {torch.float32}
    before = ema.module[0].weight.clone()
    with torch.no_grad():
        online[0].weight.add_(1.0)
    ema.update()
    moved = ema.module[0].weight - before
    assert ((moved - 0.001).abs() < 1e-5).all()  # below bf16's resolution of most of these weights


@pytest.mark.parametrize("change", ["assign", "replace", "data", "double"])
def test_tensors_put_in_the_place_of_others_are_found(change):
    online = network()
    ema = EMA(online, 0.5)
    ema.update()
    if change == "assign":
        ema.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()}, assign=True)
        ema.module.requires_grad_(False)
    elif change == "replace":
        online[3], ema.module[3] = nn.Linear(7, 2), nn.Linear(7, 2).requires_grad_(False)
    elif change == "data":
        for p in (*online.parameters(), *ema.module.parameters()):
            p.data = p.data.clone()
    else:
        other = copy.deepcopy(online)
        train(other, 5)
    train(online, 1)
    target = online if change != "double" else other
    expected = [halfway(t, q) for t, q in zip(weights(ema.module), target.parameters(), strict=True)]
    ema.update(target)
    assert equal(weights(ema.module), expected)


def test_channels_last_networks_move():
    online = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)).to(memory_format=torch.channels_last)
    ema = EMA(online, 0.5, shadow_dtype=torch.bfloat16)
    expected = weights(ema.module)
    train(online, 1)
    ema.update()
    assert equal(weights(ema.module), [halfway(t, q) for t, q in zip(expected, online.parameters(), strict=True)])
    low = ema.shadow_copies()[online[1].weight]
    assert torch.equal(low, ema.module[1].weight.bfloat16()) and not low.is_contiguous()


def test_a_compiled_step_is_not_compiled_again_for_each_update():
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    online, x = nn.Linear(3, 2), torch.randn(4, 3)
    ema, plain = (EMA(online, 0.5, total_steps=9) for _ in range(2))

    @torch.compile(backend=counter)
    def step(x):
        y = online(x)
        ema.update()
        return y + ema(x)

    for i in range(4):
        train(online, i)
        plain.update()
        torch.testing.assert_close(step(x), online(x) + plain(x))
    assert counter.frame_count == 2 and ema.step == 4  # before and after the update


def test_wrappers_of_the_online_network_are_seen_through():
    online = network()
    ema = EMA(torch.compile(online), 0.5)
    train(online, 1)
    ema.update()
    assert not equal(weights(ema.module), weights(online)) and list(ema.module.state_dict()) == list(
        online.state_dict()
    )


@pytest.mark.parametrize(
    "arguments, values",
    [
        ({}, {0: 0.996, 1000: 0.996}),
        (dict(total_steps=8), {0: 0.996, 4: 0.998, 8: 1.0}),
        (dict(momentum=0.996, final_momentum=1.0, total_steps=8), {0: 0.996, 2: 0.997, 4: 0.998, 8: 1.0, 9: 1.0}),
        (dict(momentum=0.996, total_steps=8, schedule="linear"), {0: 0.996, 6: 0.999}),
        (dict(momentum=0.99925), {0: 0.99925, 10**6: 0.99925}),
        (
            dict(momentum=0.996, total_steps=4, schedule="cosine"),
            {0: 0.996, 1: 1 - 0.004 * (1 + math.sqrt(0.5)) / 2, 2: 0.998, 4: 1.0, 7: 1.0},
        ),
        (dict(momentum=0.998, final_momentum=0.9, total_steps=2), {0: 0.998, 1: 0.949, 2: 0.9, 3: 0.9}),
    ],
    ids=["default", "default linear", "ijepa", "linear", "vjepa2", "byol", "falling"],
)
def test_schedules_of_the_papers(arguments, values):
    ema = EMA(nn.Linear(1, 1), **arguments)
    for step, value in values.items():
        assert ema.momentum_at(step) == pytest.approx(value, rel=1e-12) and ema.momentum_at(step) <= 1.0
    assert ema.get_decay() == ema.momentum_at(0) and ema.get_decay(2) == ema.momentum_at(2)


def test_updates_follow_the_schedule():
    online = nn.Linear(1, 1, bias=False)
    ema = EMA(online, 0.0, final_momentum=1.0, total_steps=4)
    with torch.no_grad():
        online.weight.fill_(16.0)
        ema.module.weight.fill_(0.0)
    seen = []
    for i in range(5):
        with torch.no_grad():
            online.weight.fill_(16.0 * (i + 1))
        ema.update()
        seen.append(ema.module.weight.item())
    # m = 0, 1/4, 1/2, 3/4, 1
    assert seen == [16.0, 28.0, 38.0, 44.5, 44.5] and ema.step == 5
    ema.update(step=2)  # a step of the caller's own
    assert ema.module.weight.item() == 62.25 and ema.step == 3


def run(ema, online, steps):
    for step in steps:
        train(online, step)
        ema.update()


def test_a_resumed_run_is_the_whole_run_bit_for_bit():
    arguments = dict(momentum=0.9, final_momentum=1.0, total_steps=10, shadow_dtype=torch.bfloat16)
    online = network()
    whole = EMA(online, **arguments)
    run(whole, online, range(6))
    online = network()
    first = EMA(online, **arguments)
    run(first, online, range(3))
    state = {k: v.clone() for k, v in first.state_dict().items()}
    resumed = EMA(network(9), **arguments)
    resumed.load_state_dict(state)
    assert resumed.step == 3
    run_on = network(9)
    run(resumed, run_on, [])
    for step in range(3, 6):
        train(run_on, step)
        resumed.update(run_on)
    assert equal(list(resumed.state_dict().values()), list(whole.state_dict().values()))
    assert equal(*(list(ema.shadow_copies().values()) for ema in (resumed, whole)))


@pytest.mark.parametrize("layout", ["plain", "timm", "nested"])
def test_states_of_other_layouts_load(layout):
    donor, online = network(1), network()
    ema = EMA(online, shadow_dtype=torch.bfloat16)
    ema.step = 7
    if layout == "plain":
        ema.load_state_dict(donor.state_dict())
    elif layout == "timm":
        ema.load_state_dict({f"module.{name}": value for name, value in donor.state_dict().items()})
    else:
        nn.ModuleDict({"ema": ema}).load_state_dict({f"ema.{k}": v for k, v in donor.state_dict().items()})
    assert equal(weights(ema.module), weights(donor)) and ema.step == 7
    assert torch.equal(ema.shadow_copies()[online[0].weight], donor[0].weight.bfloat16())


def test_a_state_that_does_not_fit_is_refused():
    with pytest.raises(RuntimeError, match=r'Missing key.*"module.1.weight"'):
        EMA(network()).load_state_dict(nn.Linear(5, 7).state_dict())


def test_copies_of_a_target_are_its_own():
    online = network()
    ema = EMA(online, 0.5, shadow_dtype=torch.bfloat16)
    ema.update()
    twin = copy.deepcopy(ema)
    before = weights(twin.module)
    train(online, 1)
    ema.update()
    assert equal(weights(twin.module), before)
    twin.update()  # it follows the same network
    assert equal(weights(twin.module), weights(ema.module))
    low, own = twin.shadow_copies()[online[0].weight], ema.shadow_copies()[online[0].weight]
    assert torch.equal(low, own) and low is not own


class Timm:
    """The published formulas of ModelEmaV3, on state dicts."""

    def __init__(self, online, decay, min_decay=0.0, after=0, warmup=False, gamma=1.0, power=2 / 3, averaged=True):
        self.state = copy.deepcopy(online.state_dict())
        self.limits, self.after, self.curve, self.averaged = (decay, min_decay), after, (warmup, gamma, power), averaged
        self.buffers = {name for name, _ in online.named_buffers()}

    def decay(self, step):
        if step is None:
            return self.limits[0]
        n, (warmup, gamma, power) = step - self.after - 1, self.curve
        if n <= 0:
            return 0.0
        return max(min(1 - (1 + n / gamma) ** -power, self.limits[0]), self.limits[1]) if warmup else self.limits[0]

    def update(self, online, step):
        for name, value in online.state_dict().items():
            mine = self.state[name]
            if mine.is_floating_point() and (self.averaged or name not in self.buffers):
                mine.lerp_(value, 1.0 - self.decay(step))
            else:
                mine.copy_(value)


@pytest.mark.parametrize(
    "arguments, own",
    [
        (dict(), dict()),
        (dict(use_warmup=True), dict(warmup=True)),
        (
            dict(use_warmup=True, warmup_gamma=3.0, warmup_power=0.75, min_decay=0.3, update_after_step=2),
            dict(warmup=True, gamma=3.0, power=0.75, min_decay=0.3, after=2),
        ),
        (dict(exclude_buffers=True, device="cpu", foreach=False), dict(averaged=False)),
    ],
    ids=["plain", "warmup", "all", "buffers"],
)
@pytest.mark.parametrize("counted", [True, False])
def test_timms_arguments_give_timms_values(arguments, own, counted):
    online = network()
    ema, timm = EMA(online, decay=0.97, **arguments), Timm(online, 0.97, **own)
    assert not ema.module.training
    for step in range(8):
        train(online, step)
        ema.update(online, step=step if counted else None)
        timm.update(online, step if counted else None)
        assert ema.get_decay(step) == timm.decay(step)
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, timm.state[name], rtol=2**-21, atol=2**-22, msg=name)
    train(online, 99)
    ema.set(online)
    assert equal(list(ema.module.state_dict().values()), list(online.state_dict().values()))


BAD = [
    (dict(momentum=1.5), ValueError, r"EMA: momentum must lie in \[0, 1\], got 1.5; 0.996 to 1 is usual"),
    (dict(momentum=float("nan")), ValueError, r"EMA: momentum must lie in \[0, 1\], got nan"),
    (dict(momentum="0.9"), TypeError, "EMA: momentum must be a number, got str; pass a float"),
    (dict(final_momentum=2.0, total_steps=4), ValueError, r"EMA: final_momentum must lie in \[0, 1\], got 2.0"),
    (dict(final_momentum=1.0), ValueError, "EMA: total_steps must be at least 1, got None; pass ipe"),
    (dict(total_steps=0), ValueError, "EMA: total_steps must be at least 1, got 0"),
    (dict(schedule="quadratic"), ValueError, "EMA: schedule must be linear, cosine or constant, got 'quadratic'"),
    (
        dict(schedule="constant", total_steps=4),
        ValueError,
        "EMA: total_steps must be left out with schedule='constant', got 4; choose one of total_steps and schedule=",
    ),
    (dict(decay=0.9, total_steps=4), ValueError, "EMA: total_steps must be left out with decay, got 4; choose one"),
    (dict(decay=-0.1), ValueError, r"EMA: decay must lie in \[0, 1\], got -0.1"),
    (dict(decay=0.9, min_decay=7), ValueError, r"EMA: min_decay must lie in \[0, 1\], got 7"),
    (dict(shadow_dtype=torch.int8), TypeError, "EMA: shadow_dtype must be bfloat16, float16 or None, got torch.int8"),
    (
        dict(use_warmup=False, final_momentum=1.0, total_steps=4),
        ValueError,
        "EMA: final_momentum must be left out with use_warmup, got 1.0; choose one of final_momentum and use_warmup",
    ),
    (dict(momentum=1.5, update_after_step=100), ValueError, r"EMA: momentum must lie in \[0, 1\], got 1.5"),
    (dict(momentum=0.996, min_decay=1.0), ValueError, "EMA: min_decay must be at most the decay 0.996, got 1.0; name"),
    (dict(decay=0.9, update_after_step="x"), TypeError, "EMA: update_after_step must be an int, got str; pass"),
    (
        dict(dtype=torch.bfloat16),
        TypeError,
        "EMA: dtype must be float32 or None, got torch.bfloat16; leave it out: small updates vanish in less, and",
    ),
    (dict(dtype=torch.float64), TypeError, "EMA: dtype must be float32 or None, got torch.float64"),
    (dict(model=nn.Linear(1, 1)), TypeError, "EMA: online must be one module, got two, online and model; pass the net"),
    (
        dict(momentum=0.5, decay=0.9),
        ValueError,
        "EMA: momentum must be left out with decay, got 0.5; choose one of momentum and decay",
    ),
    (
        dict(decay=0.9, use_warmup=True, warmup_gamma=0),
        ValueError,
        "EMA: warmup_gamma must be a positive number, got 0; timm's default is 1",
    ),
    (dict(decay=0.9, warmup_power="2"), ValueError, "EMA: warmup_power must be a positive number, got '2'; timm's"),
    (dict(form="fast"), ValueError, "EMA: form must be one of lerp, ijepa, vjepa2, got 'fast'"),
]


@pytest.mark.parametrize("arguments, error, message", BAD, ids=[m[5:40] for *_, m in BAD])
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match="^" + message):
        EMA(nn.Linear(1, 1), **arguments)


@pytest.mark.parametrize("online, kind", [(None, "NoneType"), ([nn.Linear(1, 1)], "list")])
def test_an_ema_is_of_a_module(online, kind):
    with pytest.raises(TypeError, match=f"^EMA: online must be one module, got {kind}; pass the network once"):
        EMA(online)


def test_a_model_that_is_none_is_named_as_such():
    with pytest.raises(TypeError, match=r"^EMA: model must be one module, got int; pass the network once"):
        EMA(model=3)


def test_a_step_by_position_is_no_network():
    with pytest.raises(TypeError, match=r"^EMA: online must be one module, got int; pass the network once"):
        EMA(nn.Linear(1, 1)).update(5)


def test_another_network_is_refused_before_the_first_write():
    ema = EMA(network())
    before = weights(ema.module)
    with pytest.raises(ValueError, match=r"^EMA: online must have 5 parameters as the target, got 2; pass the network"):
        ema.update(nn.Linear(5, 7))
    other = network()
    other[3] = nn.Linear(8, 3, bias=False)
    with pytest.raises(
        ValueError, match=r"^EMA: online 3.weight must have the target's shape \(3, 7\), got \(3, 8\); "
    ):
        ema.update(other)
    other = network()
    other[1].running_mean = torch.zeros(8)
    with pytest.raises(
        ValueError, match=r"^EMA: online 1.running_mean must have the target's shape \(7,\), got \(8,\); "
    ):
        ema.update(other)
    other = network()
    other[0].register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match=r"^EMA: online must have the target's buffers, got 0.extra in one alone; "):
        ema.update(other)
    assert equal(weights(ema.module), before) and ema.step == 0


@pytest.mark.parametrize("copying", [lambda ema, net: ema.apply_update_(net, 0.0), EMA.set], ids=["0.0", "set"])
def test_copies_of_another_shape_are_refused_before_the_first_write(copying):
    online = network()
    ema = EMA(online)
    ema.update()
    before = weights(ema.module)
    train(online, 1)
    online[3].weight.data = torch.ones(1, 7)
    with pytest.raises(ValueError, match=r"^EMA: online 3.weight must have the target's shape \(3, 7\), got \(1, 7\)"):
        copying(ema, online)
    assert equal(weights(ema.module), before)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0])
def test_frozen_parameters_stay_at_any_momentum(momentum):
    online = network()
    online[0].weight.requires_grad_(False)
    ema = EMA(online)
    before = ema.module[0].weight.clone()
    train(online, 1)
    ema.apply_update_(online, momentum)
    assert torch.equal(ema.module[0].weight, before)


def test_the_state_of_a_network_with_a_child_named_module_loads():
    online, donor = (nn.ModuleDict(dict(module=network(seed), head=nn.Linear(3, 2))) for seed in (0, 1))
    ema = EMA(online)
    ema.load_state_dict(donor.state_dict())
    assert equal(weights(ema.module), weights(donor))
    again = EMA(online)
    again.load_state_dict(ema.state_dict())
    assert equal(weights(again.module), weights(donor))


def test_a_momentum_out_of_range_changes_nothing():
    ema = EMA(network())
    before = weights(ema.module)
    with pytest.raises(ValueError, match=r"ema_update: momentum must lie in \[0, 1\], got 1.25"):
        ema.apply_update_(network(3), 1.25)
    assert equal(weights(ema.module), before)


def test_momentum_may_be_a_tensor():
    online = network()
    a, b = EMA(online), EMA(online)
    train(online, 1)
    a.apply_update_(online, 0.99)
    b.apply_update_(online, torch.tensor(0.99, dtype=torch.float64))
    assert equal(weights(a.module), weights(b.module)) and a.step == 0


def test_check_sync_of_one_process_is_no_question():
    EMA(network()).check_sync()
