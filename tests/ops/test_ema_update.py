"""ema_update: published roundings bit for bit, every tensor size, and errors before the first write."""

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels import _C

LEVELS = [level for level in ("avx2", "avx512", "avx512_bf16") if _C.set_isa(level)]
_C.set_isa("best")


@pytest.fixture(params=[*LEVELS, pytest.param("triton", marks=pytest.mark.interp)])
def backend(request):
    """Each instruction set of the cpu kernel, and Triton in its interpreter."""
    if request.param == "triton":
        yield "triton"
        return
    _C.set_isa(request.param)
    yield "cpu"
    _C.set_isa("best")


def tensors(seed, sizes=(1, 3, 0, 1000, 70_001)):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g) for n in sizes]


def test_by_hand():
    target = [torch.tensor([1.0, 2.0]), torch.tensor(4.0)]
    jk.ema_update(target, [torch.tensor([3.0, 0.0]), torch.tensor(8.0)], 0.75)
    assert target[0].tolist() == [1.5, 1.5] and target[1].item() == 5.0


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 0.99925, 1.0])
def test_ijepa_form_has_the_bits_of_the_published_loop(backend, momentum):
    target, online, ours = tensors(0), tensors(1), tensors(0)
    for k, q in zip(target, online, strict=True):
        k.mul_(momentum).add_((1.0 - momentum) * q)
    jk.ema_update(ours, online, momentum, form="ijepa", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, target, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 0.99925, 1.0])
def test_vjepa2_form_has_the_bits_of_the_published_loop(backend, momentum):
    target, online, ours = tensors(0), tensors(1), tensors(0)
    torch._foreach_mul_(target, momentum)
    torch._foreach_add_(target, online, alpha=1 - momentum)
    jk.ema_update(ours, online, momentum, form="vjepa2", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, target, strict=True))


def test_the_published_forms_differ_from_each_other():
    results = {}
    for form in ("ijepa", "vjepa2"):
        results[form] = tensors(0)
        jk.ema_update(results[form], tensors(1), 0.99925, form=form)
    different = (results["ijepa"][-1] != results["vjepa2"][-1]).float().mean()
    assert 1e-5 < different < 0.05


def test_momentum_as_fp64_tensor_has_a_floats_bits():
    a, b = tensors(0), tensors(0)
    jk.ema_update(a, tensors(1), 0.99925)
    jk.ema_update(b, tensors(1), torch.tensor(0.99925, dtype=torch.float64))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shadow_is_the_rounded_target(backend, dtype):
    target = tensors(0)
    shadow = [torch.full_like(t, float("nan"), dtype=dtype) for t in target]
    jk.ema_update(target, tensors(1), 0.9, shadow=shadow, backend=backend)
    assert all(torch.equal(s, t.to(dtype)) for s, t in zip(shadow, target, strict=True))


def test_memory_beyond_a_tensor_stays_as_it_is(backend):
    whole = torch.full((64,), 7.0)
    jk.ema_update([whole[5:18]], [torch.zeros(13)], 0.5, backend=backend)
    assert whole[5:18].eq(3.5).all() and whole[:5].eq(7).all() and whole[18:].eq(7).all()


@pytest.mark.parametrize("start", [1, 2, 4])
def test_tensors_may_start_at_any_address(backend, start):
    def views(seed, dtype=torch.float32):
        return [torch.randn(9000, generator=torch.Generator().manual_seed(seed)).to(dtype)[start:-start]]

    expected = views(0)[0].mul_(0.9) + torch.tensor(1 - 0.9) * views(1, torch.bfloat16)[0].float()
    target, shadow = views(0), views(2, torch.float16)
    jk.ema_update(target, views(1, torch.bfloat16), 0.9, form="ijepa", shadow=shadow, backend=backend)
    assert torch.equal(target[0], expected) and torch.equal(shadow[0], expected.half())


def test_empty_tensors_alone_are_no_work(backend):
    target = [torch.zeros(0), torch.zeros(3, 0)]
    jk.ema_update(target, [t.clone() for t in target], 0.5, backend=backend)
    assert [t.shape for t in target] == [(0,), (3, 0)]


def test_lists_may_mix_dtypes(backend):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32)
    online = [t.to(d) for t, d in zip(tensors(1), dtypes, strict=True)]
    target, ours = tensors(0), tensors(0)
    for k, q in zip(target, online, strict=True):
        k.mul_(0.996).add_((1.0 - 0.996) * q.float())
    jk.ema_update(ours, online, 0.996, form="ijepa", backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(ours, target, strict=True))


def test_the_same_list_may_hold_other_tensors_next_time(backend):
    for seed in range(3):
        target, online = tensors(seed), tensors(seed + 10)
        expected = [k * 0.5 + q * 0.5 for k, q in zip(target, online, strict=True)]
        jk.ema_update(target, online, 0.5, form="ijepa", backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_momentum_as_tensor_has_the_cpu_kernels_bits(dtype):
    a, b, momentum = tensors(0), tensors(0), torch.tensor(0.99925, dtype=dtype)
    jk.ema_update(a, tensors(1), momentum, backend="triton")
    jk.ema_update(b, tensors(1), momentum, backend="cpu")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_modules_and_lists_agree():
    online, a, b = (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)) for _ in range(3))
    b.load_state_dict(a.state_dict())
    jk.ema_update(a, online, 0.9)
    jk.ema_update(list(b.parameters()), list(online.parameters()), 0.9)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_lerp_after_many_steps_stays_near_fp64():
    target, online = torch.zeros(100), torch.ones(100)
    for _ in range(1000):
        jk.ema_update([target], [online], 0.996)
    assert abs(target[0].item() - (1 - 0.996**1000)) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("role", ["target", "shadow"])
def test_a_graph_that_saved_an_old_value_refuses_its_backward(role, compiled):
    saved, other, x = torch.ones(3), torch.ones(3), torch.ones(3, requires_grad=True)
    y = (saved * x).sum()
    target, shadow = ([saved], None) if role == "target" else ([other], [saved])
    update = torch.compile(jk.ema_update, fullgraph=True, backend="aot_eager") if compiled else jk.ema_update
    update(target, [torch.full((3,), 5.0)], torch.tensor(0.5, dtype=torch.float64), shadow=shadow)
    assert saved.tolist() == [3.0] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_online_weights_keep_their_graph():
    online, x = torch.full((3,), 5.0), torch.ones(3, requires_grad=True)
    y = (online * x).sum()
    jk.ema_update([torch.ones(3)], [online], 0.5)
    y.backward()
    assert x.grad.tolist() == [5.0] * 3


def test_inference_tensors_are_updated():
    with torch.inference_mode():
        target = [torch.ones(3)]
        jk.ema_update(target, [torch.full((3,), 5.0)], 0.5)
        assert target[0].tolist() == [3.0] * 3


def test_the_cpu_kernel_refuses_types_it_is_not_built_for():
    target, online, momentum = [torch.ones(3)], [torch.ones(3).double()], torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="tensors must be float32, bfloat16 or float16, got float64"):
        torch.ops.jepa_kernels.ema_update_forward(target, online, [], momentum, "lerp", "cpu")


ONE = torch.zeros(3)
BAD = [
    (dict(online=[]), ValueError, "online must hold 2 tensors, got 0; pass one for each target"),
    (dict(shadow=[ONE]), ValueError, "shadow must hold 2 tensors, got 1"),
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
    (dict(online=[ONE, torch.zeros(6)[::2]]), ValueError, r"target\[1\] and online\[1\] must be contiguous, got"),
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


def test_a_target_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="ema_update: target must hold tensors, got float; convert it with"):
        jk.ema_update([1.0], [ONE], 0.5)


def test_gpu_backends_say_why_they_can_not_take_cpu_tensors():
    call = ([torch.ones(3)], [torch.zeros(3)], 0.5)
    table = jk.explain("ema_update", *call)
    assert "cuda       runs on cuda tensors, got cpu" in table
    with pytest.raises(jk.BackendError, match="backend 'cuda' must be able to run this call, got: runs on cuda"):
        jk.ema_update(*call, backend="cuda")
    why = r"got: Triton takes CPU tensors only in its interpreter \(TRITON_INTERPRET=1\); leave backend out"
    with pytest.raises(jk.BackendError, match=why):
        jk.ema_update(*call, backend="triton")
