"""Every Triton kernel, compiled through its ordinary launch path for GPUs that are not here; machine code inspected."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels._core import define
from jepa_kernels._core.info import kernels
from jepa_kernels.ops import OPS
from jepa_kernels.training.warmup import compiling
from tests.kernels.expected import CALLS
from tests.kernels.target import REGISTERS, SHARED_BYTES

pytestmark = pytest.mark.compile


@pytest.mark.parametrize("op", [op for op in OPS if any(k.backend == "triton" for k in kernels(op))])
def test_every_op_with_a_triton_kernel_says_what_to_expect(op):
    assert CALLS.get(op), f"{op}: add its calls to tests/kernels/expected.py"


CASES = [(c, call) for calls in CALLS.values() for call in calls for c in call.capabilities]


@pytest.mark.parametrize("capability, call", CASES, ids=[f"sm_{c}-{call.launches[0]}-{call.name}" for c, call in CASES])
def test_machine_code(target, capability, call):
    target.reset(capability)
    call.make()
    assert tuple(target.launches) == call.launches
    for binary in target.binaries:  # a kernel that an earlier call loaded was inspected there
        assert binary.stack <= call.spilled and (call.spilled or not binary.count(r"(LDL|STL).*")), f"spills: {binary}"
        assert binary.shared <= SHARED_BYTES[capability]
        threads = call.blocks * target.threads[binary.name]
        assert binary.registers * threads <= REGISTERS, f"{call.blocks} blocks must fit: {binary}"
        if binary.name in call.wide:
            assert binary.count(r"LDG(STS)?\.E.*\.128") and binary.count(r"STG\.E.*\.(64|128)"), binary.instructions
        for pattern in call.holds.get(binary.name, ()):
            assert binary.count(pattern), f"{pattern}: {binary.instructions}"
        for pattern, count in call.counts.get(binary.name, {}).items():
            assert binary.count(pattern) == count, f"{pattern}: {binary.instructions}"
    call.make()
    assert tuple(target.launches) == 2 * call.launches, "the second call must launch what the first compiled"


@pytest.mark.parametrize("op", CALLS)
def test_the_device_of_the_tensors_is_current_where_one_is_asked_for_or_launched_on(target, monkeypatch, op):
    current = []

    @contextmanager
    def device_of(x):
        current.append(x)
        yield
        current.pop()

    def of_current(name):
        asked = getattr(target, name)
        return lambda: asked() if current else pytest.fail(f"{op}: {name} outside device_of")

    call = next(call for call in CALLS[op] if 90 in call.capabilities)
    target.reset(90)
    call.make()  # imports
    for module in [
        m for name, m in sys.modules.items() if name.startswith("jepa_kernels.ops") and hasattr(m, "device_of")
    ]:
        monkeypatch.setattr(module, "device_of", device_of)
    for name in ("get_current_device", "get_current_target"):
        monkeypatch.setattr(target, name, of_current(name))
    call.make()
    assert tuple(target.launches) == 2 * call.launches and not current


# Layers that no other call has: what it compiled would not be seen here.
def loss_of(ids):
    pred = torch.zeros(*ids.shape, 64, requires_grad=True)
    out = jk.latent_loss(pred, torch.zeros(2, 50, 64), ids, weight=torch.ones(ids.shape), backend="triton")
    torch.autograd.grad(out, pred, torch.tensor(2.0))


def tokens_of(ids):
    x, packing = torch.zeros(2, 50, 40, dtype=torch.float16, requires_grad=True), Packing.uniform(*ids.shape)
    out = jk.gather_tokens(x, ids.flatten(), packing, backend="triton")
    torch.autograd.grad(out, x, torch.ones_like(out))


def patches_of(ids):
    leaves = [torch.zeros(s, requires_grad=True) for s in ((2, 3, 80, 160), (64, 3, 16, 16), (64,), (50, 64))]
    out = jk.embed_patches(leaves[0], ids, *leaves[1:], backend="triton")
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def weights_of(ids):
    packing = Packing.uniform(*ids.shape)
    packings = dict(packing=packing, target_packing=packing)
    jk.distance_weights(ids.flatten(), ids.flatten() + 50, (2, 5, 10), **packings, backend="triton")


def sequences_of(ids):
    kept, both = (Packing.uniform(4, n * ids.shape[1]) for n in (1, 2))
    leaves = [torch.zeros(n, 40, requires_grad=True) for n in (kept.tokens, 2)]
    packings = dict(context_packing=kept, target_packing=kept, packing=both)
    out = jk.assemble_tokens(*leaves, ids.flatten(), ids.flatten(), torch.zeros(50, 40), **packings, backend="triton")
    torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize(
    "op, call",
    [
        ("assemble_tokens", sequences_of),
        ("distance_weights", weights_of),
        ("latent_loss", loss_of),
        ("gather_tokens", tokens_of),
        ("embed_patches", patches_of),
    ],
)
def test_lengths_that_change_compile_nothing_new(target, op, call):
    target.reset(90)
    for kept in (5, 7, 16, 48, 3, 1):
        call(torch.arange(kept).expand(4, kept).contiguous())
    names = [binary.name for binary in target.binaries]  # none of a kernel that an earlier test has compiled
    assert target.launches.count(f"_{op}_forward_kernel") >= 6
    assert len(names) == len(set(names)), f"compiled again: {names}"


def test_sigreg_takes_more_views_than_an_axis_has_programs(target):
    target.reset(90)
    z = torch.zeros(65_600, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.grad(jk.sigreg(z, slices=1, knots=2, backend="triton"), z)  # no page of its workspace is touched
    assert target.launches.count("_sigreg_derivative_kernel") == 1


def test_adamw_ema_takes_scalars_of_the_host_by_value(target):
    """They are elsewhere than the parameters, as on a GPU; values that change compile nothing new."""
    forward = define.implementation("adamw_ema", "forward", "triton")
    lists = [[torch.zeros(100)] for _ in range(4)] + [[torch.zeros(())], [torch.zeros(100)], [], []]
    target.reset(90)
    for values in ([1e-3, 0.05, 0.996], [0.0, 0.0, 1.0], [1.0, 0.5, 0.0]):
        scalars = SimpleNamespace(device="elsewhere", tolist=values.copy)
        forward(*lists, scalars, None, None, 0.9, 0.999, 1e-8, False)
    (binary,) = target.binaries
    assert len(target.launches) == 3 and binary.stack == 0 and binary.registers <= 64, binary


def test_warmup_hears_of_every_kernel_that_is_compiled(target):
    target.reset(90)
    x, ids = torch.zeros(2, 50, 24, dtype=torch.float16), torch.arange(7).repeat(2, 1)
    heard = []
    for _ in range(2):
        with compiling() as kernels:
            jk.gather_tokens(x, ids, backend="triton")
        heard.append([name for name, _ in kernels])
    assert heard == [target.launches[:1], []] and len(target.launches) == 2
