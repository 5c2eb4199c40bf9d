"""ema_update and EmaTable: published roundings bit for bit, every tensor size, compiled and recorded steps."""

import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import jepa_kernels as jk


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


@pytest.mark.parametrize("kind", [list, dict])
def test_a_tensor_may_have_no_shadow(backend, kind):
    target, plain = tensors(0), tensors(0)
    shadow = [None if i % 2 else torch.full_like(t, float("nan"), dtype=torch.bfloat16) for i, t in enumerate(target)]
    lists = [target, tensors(1), shadow]
    if kind is dict:
        lists = [{f"w{i}": t for i, t in enumerate(tensors)} for tensors in lists]
    jk.ema_update(*lists[:2], 0.9, shadow=lists[2], backend=backend)
    jk.ema_update(plain, tensors(1), 0.9, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(target, plain, strict=True))
    assert all(torch.equal(s, t.bfloat16()) for s, t in zip(shadow, target, strict=True) if s is not None)


def test_channels_last_weights_are_updated_where_they_are(backend):
    def weights(seed):
        (values,) = tensors(seed, sizes=(5 * 3 * 4 * 4,))
        return values.view(5, 3, 4, 4)

    lists = [weights(0), weights(1), weights(2).bfloat16()]
    target, online, shadow = (t.to(memory_format=torch.channels_last) for t in lists)
    jk.ema_update([lists[0]], [lists[1]], 0.9, shadow=[lists[2]], backend=backend)
    jk.ema_update([target], [online], 0.9, shadow=[shadow], backend=backend)
    assert not target.is_contiguous() and torch.equal(target, lists[0]) and torch.equal(shadow, lists[2])
    with pytest.raises(
        ValueError, match=r"target\[0\] and online\[0\] must fill their memory, in one order, got strides"
    ):
        jk.ema_update([target], [lists[1]], 0.9, backend=backend)


def test_errors_tell_the_names_of_a_mapping():
    with pytest.raises(
        ValueError, match=r"^ema_update: online b must have the shape \(3,\) of target a, got \(4,\); pair"
    ):
        jk.ema_update({"a": torch.ones(3)}, {"b": torch.ones(4)}, 0.5)
    with pytest.raises(TypeError, match=r"^ema_update: target a must be float32 "):
        jk.EmaTable({"a": torch.ones(3).half()}, {"b": torch.ones(3)})


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


def test_the_op_refuses_lists_of_different_length():
    momentum = torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(IndexError):
        torch.ops.jepa_kernels.ema_update_forward([torch.ones(3)], [], [], momentum, "lerp", "cpu")


def test_the_cpu_kernel_refuses_types_it_is_not_built_for():
    target, online, momentum = [torch.ones(3)], [torch.ones(3).double()], torch.tensor(0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="tensors must be float32, bfloat16 or float16, got float64"):
        torch.ops.jepa_kernels.ema_update_forward(target, online, [], momentum, "lerp", "cpu")


def test_a_target_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="ema_update: target must hold tensors, got float; convert it with"):
        jk.ema_update([1.0], [torch.zeros(3)], 0.5)


def test_gpu_backends_say_why_they_can_not_take_cpu_tensors():
    call = ([torch.ones(3)], [torch.zeros(3)], 0.5)
    table = jk.explain("ema_update", *call)
    assert "cuda       runs on cuda tensors, got cpu" in table
    with pytest.raises(jk.BackendError, match="backend 'cuda' must be able to run this call, got: runs on cuda"):
        jk.ema_update(*call, backend="cuda")
    why = r"got: Triton takes CPU tensors only in its interpreter \(TRITON_INTERPRET=1\); leave backend out"
    with pytest.raises(jk.BackendError, match=why):
        jk.ema_update(*call, backend="triton")


@pytest.mark.parametrize("form", ["lerp", "ijepa", "vjepa2"])
@pytest.mark.parametrize("shadow", [None, torch.bfloat16])
def test_a_table_has_the_bits_of_the_call(backend, form, shadow):
    a, b, online = tensors(0), tensors(0), [t.bfloat16() for t in tensors(1)]
    copies = [None if shadow is None else [torch.zeros_like(t, dtype=shadow) for t in a] for _ in range(2)]
    table = jk.EmaTable(a, online, shadow=copies[0])
    for momentum in (0.9, torch.tensor(0.99, dtype=torch.float64)):
        table.update(momentum, form=form, backend=backend)
        jk.ema_update(b, online, momentum, form=form, shadow=copies[1], backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert shadow is None or all(torch.equal(x, y) for x, y in zip(*copies, strict=True))


def test_a_table_of_modules_sees_the_optimizers_steps():
    online, target = nn.Linear(3, 5), nn.Linear(3, 5)
    table, optimizer = jk.EmaTable(target, online), torch.optim.SGD(online.parameters(), lr=0.1)
    for _ in range(3):
        online(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = [t.detach().lerp(o, 0.5) for t, o in zip(target.parameters(), online.parameters(), strict=True)]
        table.update(0.5)
        torch.testing.assert_close(list(target.parameters()), expected)


def test_a_table_runs_the_reference_where_it_is_named():
    a, b = tensors(0), tensors(0)
    jk.EmaTable(a, tensors(1)).update(0.9, backend="reference")
    jk.ema_update(b, tensors(1), 0.9, backend="reference")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Nothing(TorchDispatchMode):
    """Counts the calls of our op, and changes nothing."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.namespace == "jepa_kernels"
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op_and_changes_no_bit():
    a, b = tensors(0), tensors(0)
    table = jk.EmaTable(a, tensors(1))
    with Nothing() as mode:
        jk.ema_update(a, tensors(1), 0.9)
        table.update(0.9)
    for _ in range(2):
        jk.ema_update(b, tensors(1), 0.9)
    assert mode.calls == 2 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_fake_tensors_are_traced():
    with FakeTensorMode():
        target, online = tensors(0), tensors(1)
        jk.ema_update(target, online, 0.9)
        jk.EmaTable(target, online).update(0.9)
    meta = [t.to("meta") for t in tensors(0)]
    jk.EmaTable(meta, [t.clone() for t in meta]).update(0.9, backend="reference")


def test_a_table_keeps_its_lists_when_the_caller_changes_theirs():
    target, online = tensors(0), tensors(1)
    table = jk.EmaTable(target, online)
    target.append(torch.zeros(1))
    online.clear()
    table.update(0.0, form="ijepa")
    assert all(torch.equal(a, b) for a, b in zip(target[:-1], tensors(1), strict=True))


def test_a_table_holds_its_tensors_as_long_as_it_lives():
    target, online = tensors(0), tensors(1)
    table, seen = jk.EmaTable(target, online), [weakref.ref(t) for t in (*target, *online)]
    del target, online
    table.update(0.5)
    assert all(ref() is not None for ref in seen)
    del table
    assert all(ref() is None for ref in seen)


def test_the_profiler_sees_the_op():
    with torch.profiler.profile() as profile:
        jk.ema_update(tensors(0), tensors(1), 0.9)
    assert [e.name for e in profile.events()].count("jepa_kernels::ema_update_forward") == 1


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shadows_larger_than_the_cache_are_streamed(start, dtype):
    sizes = (5, (26 << 20) // dtype.itemsize, 1, 40_003)
    shadow = [torch.full((n + start,), float("nan"), dtype=dtype)[start:] for n in sizes]
    target, online = ([torch.randn(n) for n in sizes] for _ in range(2))
    jk.ema_update(target, online, 0.9, shadow=shadow)
    assert all(torch.equal(s, t.to(dtype)) for s, t in zip(shadow, target, strict=True))
    assert all(s._base is None or s._base[:start].isnan().all() for s in shadow)


def test_an_update_of_modules_compiles():
    target, online, expected = (nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)) for _ in range(3))
    expected.load_state_dict(target.state_dict())
    momentum = torch.tensor(0.9, dtype=torch.float64)
    torch.compile(jk.ema_update, fullgraph=True, backend="aot_eager")(target, online, momentum)
    jk.ema_update(expected, online, momentum)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("prepared", [False, True])
def test_a_step_that_contains_an_update_compiles_whole_and_once(prepared):
    def trained(compiled):
        target, online = tensors(0), tensors(1)
        table, counter = jk.EmaTable(target, online), CompileCounterWithBackend("aot_eager")

        def step(grads, momentum):
            torch._foreach_add_(online, grads, alpha=-0.1)
            if prepared:
                table.update(momentum, form="ijepa")
            else:
                jk.ema_update(target, online, momentum, form="ijepa")
            return torch.cat(target).square().mean()

        run = torch.compile(step, fullgraph=True, backend=counter) if compiled else step
        frames = []
        for seed, m in ((2, 0.9), (3, 0.99), (4, 0.999)):
            run(tensors(seed), torch.tensor(m, dtype=torch.float64))
            frames.append(counter.frame_count)
        assert bool(frames[0]) == compiled and frames == frames[:1] * 3, "compiled again"
        return [*target, *online]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_accumulated_gradients_are_one_update():
    whole, parts = (nn.Linear(3, 5) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    targets, x = [], torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    for online, micro in ((whole, 1), (parts, 4)):
        target, optimizer = nn.Linear(3, 5), torch.optim.SGD(online.parameters(), lr=0.1)
        target.load_state_dict(online.state_dict())
        table = jk.EmaTable(target, online)
        for _ in range(3):
            for part in x.chunk(micro):
                (online(part).square().sum() / len(x)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            table.update(0.9)
        targets.append(list(target.parameters()))
    torch.testing.assert_close(*targets, rtol=1e-6, atol=1e-7)
