"""ema_update and EmaTable: whatever is wrong is named, before the first write."""

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels.ops.ema_update import check
from tests.ops.conftest import DEVICE, on_a_device

ONE = torch.zeros(3)
BAD = [
    (
        dict(online=[]),
        ValueError,
        r"online must hold 2 tensors, got 0; pass one for target\[0\], the first without",
    ),
    (dict(shadow=[ONE]), ValueError, r"shadow must hold 2 tensors, got 1; pass one for target\[1\], the first without"),
    (
        dict(online=[ONE] * 3),
        ValueError,
        r"online must hold 2 tensors, got 3; leave out online\[2\], the first without a target",
    ),
    (dict(shadow=[None, ONE, ONE]), ValueError, r"shadow must hold 2 tensors, got 3; leave out shadow\[2\]"),
    (
        dict(online=[ONE, torch.zeros(4)]),
        ValueError,
        r"online\[1\] must have the shape \(3,\) of target\[1\], got \(4,",
    ),
    (
        dict(target=[ONE, ONE.bfloat16()]),
        TypeError,
        r"target\[1\] must be float32 \(with momentum near 1.+\), got bfloat16",
    ),
    (dict(online=[ONE, ONE.int()]), TypeError, r"online\[1\] must be float32, .+, got int32"),
    (dict(shadow=[ONE, ONE.double()]), TypeError, r"shadow\[1\] must be float32, .+, got float64"),
    (
        dict(online=[ONE, torch.zeros(6)[::2]]),
        ValueError,
        r"target\[1\] and online\[1\] must fill their memory, in one",
    ),
    (
        dict(online=[ONE, ONE.to("meta")]),
        ValueError,
        r"target\[1\] and online\[1\] must be on cpu, got cpu and meta",
    ),
    (dict(momentum=1.5), ValueError, r"momentum must lie in \[0, 1\], got 1.5"),
    (dict(momentum=float("nan")), ValueError, r"momentum must lie in \[0, 1\], got nan"),
    (dict(momentum=torch.ones(2)), TypeError, "momentum must be a float or a 0-dim float64"),
    (
        dict(momentum=torch.ones((), device="meta")),
        ValueError,
        "momentum must be on the CPU or on the targets' device cpu, got meta",
    ),
    (dict(momentum="0.5"), TypeError, "momentum must be a float or a 0-dim float64 or float32 tensor, got str; use"),
    (dict(momentum=None), TypeError, "momentum must be a float or a 0-dim float64 or float32 tensor, got NoneType"),
    (dict(online=[ONE, None]), TypeError, "online must hold tensors, got NoneType; convert it with torch.as_tensor"),
    (dict(shadow=[ONE, 1.0]), TypeError, "shadow must hold tensors, got float; convert it with torch.as_tensor"),
    (dict(online=None), TypeError, "online must be tensors or a module, got NoneType; pass a list of tensors"),
    (dict(momentum=-0.1), ValueError, r"momentum must lie in \[0, 1\], got -0.1"),
    (dict(momentum=torch.tensor(float("nan"))), ValueError, r"momentum must lie in \[0, 1\], got nan"),
    (dict(online=[ONE, ONE.cfloat()]), TypeError, r"online\[1\] must be float32, bfloat16 or float16, got complex64"),
    (dict(form="fast"), ValueError, "form must be one of lerp, ijepa, vjepa2, got 'fast'"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_input_is_named_and_changes_nothing(change, error, message):
    call = dict(target=[torch.ones(3), torch.ones(3)], online=[torch.zeros(3), torch.zeros(3)], momentum=0.5)
    call.update(change)
    before = [t.clone() for t in call["target"]]
    with pytest.raises(error, match="ema_update: " + message):
        jk.ema_update(**call)
    assert all(torch.equal(a, b) for a, b in zip(before, call["target"], strict=True))


FAULTS = {
    "shape": lambda t: t.new_zeros(4),
    "dtype": lambda t: t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "device": lambda t: t.to("meta"),
    "strides": lambda t: t.new_zeros(6)[::2],
    "no tensor": lambda t: 1.0,
}


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("role", ["target", "online", "shadow"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_place_is_named_and_leaves_every_tensor_as_it_was(fault, role, place):
    call = {r: [torch.full((3,), float(i)) for i in range(4)] for r in ("target", "online", "shadow")}
    kept = [t for tensors in call.values() for t in tensors]
    before = [(t.clone(), t._version) for t in kept]
    call[role][place] = FAULTS[fault](call[role][place])
    with pytest.raises((ValueError, TypeError), match=role if fault == "no tensor" else rf"\[{place}\]"):
        jk.ema_update(**call, momentum=0.5)
    assert all(torch.equal(t, old) and t._version == version for t, (old, version) in zip(kept, before, strict=True))


MEMORY = torch.zeros(64)
OVERLAPS = {
    "the same tensor": (
        dict(target=[MEMORY[:8]], online=[MEMORY[:8]]),
        r"target\[0\] must share no memory with online\[0\], got 32 bytes in common; clone one of them",
    ),
    "a part of it": (
        dict(target=[MEMORY[:8]], online=[MEMORY[7:15]]),
        r"target\[0\] must share no memory with online\[0\], got 4 bytes in common",
    ),
    "a larger one around it": (
        dict(target=[MEMORY[4:6], MEMORY[40:42]], online=[torch.zeros(2), MEMORY[41:43]]),
        r"target\[1\] must share no memory with online\[1\], got 4 bytes in common",
    ),
    "two targets": (
        dict(target=[MEMORY[:8], MEMORY[4:12]], online=[torch.zeros(8), torch.zeros(8)]),
        r"target\[1\] must share no memory with target\[0\], got 16 bytes in common",
    ),
    "a shadow": (
        dict(target=[MEMORY[:8]], online=[torch.zeros(8)], shadow=[MEMORY.view(torch.bfloat16)[15:23]]),
        r"shadow\[0\] must share no memory with target\[0\], got 2 bytes in common",
    ),
    "behind a short one that lies within a long one": (
        dict(
            target=[MEMORY[:32], torch.zeros(2), MEMORY[30:34]], online=[torch.ones(32), MEMORY[40:42], torch.ones(4)]
        ),
        r"target\[2\] must share no memory with target\[0\], got 8 bytes in common",
    ),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_shared_memory_is_refused(case):
    call, message = OVERLAPS[case]
    with pytest.raises(ValueError, match="ema_update: " + message):
        jk.ema_update(**call, momentum=0.5)
    assert not MEMORY.any()


def test_online_weights_may_share_memory_and_targets_may_lie_side_by_side():
    memory, online = torch.zeros(16), torch.ones(8)
    jk.ema_update([memory[:8], memory[8:]], [online, online], 0.5)
    assert memory.eq(0.5).all()


def test_empty_tensors_share_no_memory():
    empty = torch.zeros(0)
    jk.ema_update([empty, empty], [empty, empty], 0.5)


@pytest.mark.parametrize("role", ["target", "online", "shadow"])
def test_a_tensor_whose_storage_was_freed_is_refused(role):
    call = {r: [torch.zeros(3), torch.zeros(5)] for r in ("target", "online", "shadow")}
    call[role][1].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"{role}\[1\] must hold its 20 bytes, got a storage with 0; do not free"):
        jk.ema_update(**call, momentum=0.5)


def test_a_tensor_whose_storage_was_shrunk_is_refused():
    target = torch.zeros(5)
    target.untyped_storage().resize_(16)
    with pytest.raises(ValueError, match=r"target\[0\] must hold its 20 bytes, got a storage with 16; do not free"):
        jk.ema_update([target], [torch.zeros(5)], 0.5)


def networks():
    return [nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.LayerNorm(3))) for _ in range(2)]


def test_modules_parameters_are_named():
    target, online = networks()
    online[1][0].weight.data = torch.zeros(4)
    wanted = r"online 1\.0\.weight must have the shape \(3,\) of target 1\.0\.weight, got \(4,\)"
    with pytest.raises(ValueError, match=wanted):
        jk.ema_update(target, online, 0.5)
    with pytest.raises(TypeError, match=r"target 0\.bias must be float32 .+, got float16"):
        target[0].bias.data = target[0].bias.data.half()
        jk.ema_update(target, networks()[1], 0.5)


def test_a_parameter_without_a_partner_is_named():
    target, online = networks()
    wanted = r"online must hold 4 tensors, got 2; pass one for target 1\.0\.weight, the first without"
    with pytest.raises(ValueError, match="^ema_update: " + wanted):
        jk.ema_update(target, online[0], 0.5)
    wanted = r"online must hold 2 tensors, got 4; leave out online 1\.0\.weight, the first without a target"
    with pytest.raises(ValueError, match="^ema_update: " + wanted):
        jk.EmaTable(target[0], online)


def test_a_momentum_on_the_device_is_read_when_asked_to(monkeypatch):
    check.check_options(on_a_device(1.5), "lerp", DEVICE)
    monkeypatch.setattr("jepa_kernels._core.check.CHECK_DEVICE_VALUES", True)
    check.check_options(on_a_device(1.0), "lerp", DEVICE)
    for bad in (1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"ema_update: momentum must lie in \[0, 1\], got {bad}"):
            check.check_options(on_a_device(bad), "lerp", DEVICE)


def test_shared_parameters_of_two_modules_are_named():
    target, online = networks()
    target[0].bias = online[0].bias
    with pytest.raises(ValueError, match=r"target 0\.bias must share no memory with online 0\.bias, got 12 bytes"):
        jk.ema_update(target, online, 0.5)


CHANGES = {
    "given new memory": lambda p: setattr(p, "data", p.data.clone()),
    "resized": lambda p: p.resize_(1),
    "freed": lambda p: p.untyped_storage().resize_(0),
    "of another dtype": lambda p: setattr(p, "data", p.data.half()),
    "of other strides": lambda p: setattr(p, "data", torch.zeros(6)[::2]),
}


@pytest.mark.parametrize("role", ["target", "online"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_table_names_a_parameter_that_changed(change, role):
    roles = dict(zip(("target", "online"), (m.requires_grad_(False) for m in networks()), strict=True))
    table = jk.EmaTable(**roles)
    table.update(0.5)
    CHANGES[change](roles[role][1][0].bias)
    kept = [p for m in roles.values() for n, p in m.named_parameters() if n != "1.0.bias"]
    before = [p.clone() for p in kept]
    wanted = rf"ema_update: {role} 1\.0\.bias must stay as it was when the table was built: float32 \(3,\) on cpu at 0x"
    with pytest.raises(ValueError, match=wanted + ".+; build a new EmaTable"):
        table.update(0.5)
    assert all(torch.equal(p, old) for p, old in zip(kept, before, strict=True))


def test_a_table_is_checked_when_it_is_built():
    with pytest.raises(ValueError, match="ema_update: online must hold 1 tensors, got 0"):
        jk.EmaTable([torch.zeros(3)], [])
    table = jk.EmaTable([torch.zeros(3)], [torch.ones(3)])
    with pytest.raises(ValueError, match=r"ema_update: momentum must lie in \[0, 1\], got 2.0"):
        table.update(2.0)
    with pytest.raises(ValueError, match="ema_update: form must be one of lerp, ijepa, vjepa2, got 'fast'"):
        table.update(0.5, form="fast")
    with pytest.raises(jk.BackendError, match="backend 'cuda' must be able to run this call"):
        table.update(0.5, backend="cuda")
