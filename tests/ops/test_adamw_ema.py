"""adamw_ema: values by hand, torch's own AdamW and ema_update, every layout, and errors before the first write."""

import math

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.ops.adamw_ema import check
from jepa_kernels.testing import hold
from tests.ops.conftest import DEVICE, LEVELS, on_a_device

SIZES = (1, 3, 0, 1000, 70_001)


def tensors(seed, scale=1.0, sizes=SIZES):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=g) * scale for n in sizes]


def call(sizes=SIZES, **changed):
    """Arguments of a step in the midst of training."""
    zero = [torch.tensor(4.0) for _ in sizes]
    inputs = dict(params=tensors(0, sizes=sizes), grads=tensors(1, 1e-2, sizes), exp_avgs=tensors(2, 1e-3, sizes))
    inputs |= dict(
        exp_avg_sqs=[x.square() for x in tensors(3, 1e-2, sizes)], steps=zero, targets=tensors(4, sizes=sizes)
    )
    return inputs | dict(lr=1e-3, weight_decay=0.05, momentum=0.996) | changed


def copied(inputs):
    return {k: [None if t is None else t.clone() for t in v] if isinstance(v, list) else v for k, v in inputs.items()}


def equal(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_first_step_by_hand():
    p, m, v, k, step = torch.tensor([2.0]), torch.zeros(1), torch.zeros(1), torch.tensor([1.0]), torch.zeros(())
    jk.adamw_ema([p], [torch.tensor([0.5])], [m], [v], [step], [k], lr=0.25, weight_decay=0.5, momentum=0.75)
    assert step.item() == 1.0
    assert m.item() == pytest.approx(0.05, rel=1e-6) and v.item() == pytest.approx(0.00025, rel=1e-6)
    assert p.item() == pytest.approx(2 * (1 - 0.125) - 0.25, rel=1e-6)  # m / sqrt(v), both corrected, is the sign
    assert k.item() == pytest.approx(1 + 0.25 * (1.5 - 1), rel=1e-6)


def test_the_second_step_by_hand():
    p, m, v, step = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.25]), torch.ones(())
    jk.adamw_ema([p], [torch.tensor([1.0])], [m], [v], [step], lr=0.1, weight_decay=0.0, betas=(0.5, 0.75), eps=0.5)
    assert (m.item(), v.item()) == (0.75, 0.4375)
    corrected_m, corrected_v = 0.75 / (1 - 0.25), 0.4375 / (1 - 0.5625)
    assert p.item() == pytest.approx(1 - 0.1 * corrected_m / (math.sqrt(corrected_v) + 0.5), rel=1e-6)


def test_a_hundred_steps_are_as_near_to_fp64_as_torchs_own(backend):
    """Held to the budget with the worse of torch's fused and foreach AdamW, then lerp, as the same-dtype reference."""
    sizes = (257, 5000, 3)
    runs = {name: ours_or_torchs(name, sizes) for name in ("exact", "foreach", "fused", "ours")}
    assert not equal(runs["foreach"]["params"], runs["fused"]["params"]), "torch's own differ from each other"
    for i, size in enumerate(sizes):
        for role in runs["exact"]:
            exact = runs["exact"][role][i]
            errors = {n: (runs[n][role][i].double() - exact).norm() for n in ("foreach", "fused")}
            rival = runs[max(errors, key=errors.get)][role][i]
            parity = hold(f"{role} {size}", runs["ours"][role][i], exact, rival)
            assert parity.ok, parity


def ours_or_torchs(name, sizes):
    dtype = torch.float64 if name == "exact" else torch.float32
    params = [t.to(dtype).requires_grad_() for t in tensors(0, 0.1, sizes)]
    targets = [t.to(dtype) for t in tensors(4, 0.1, sizes)]
    options = {} if name in ("exact", "ours") else {name: True}
    adamw = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.05, **options)
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.zeros(()) for _ in params]
    for i in range(100):
        grads = [g.to(dtype) for g in tensors(100 + i, 1e-2 * 3 ** math.sin(i), sizes)]
        if name == "ours":
            jk.adamw_ema(params, grads, *zeros, steps, targets, lr=1e-2, weight_decay=0.05, momentum=0.99)
            continue
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        adamw.step()
        torch._foreach_lerp_(targets, [p.detach() for p in params], 1 - 0.99)
    state = zeros if name == "ours" else [[adamw.state[p][k] for p in params] for k in ("exp_avg", "exp_avg_sq")]
    return dict(params=[p.detach() for p in params], m=state[0], v=state[1], targets=targets)


def test_the_average_has_ema_updates_bits(backend):
    inputs = call()
    expected = [k.clone() for k in inputs["targets"]]
    jk.adamw_ema(**inputs, backend=backend)
    jk.ema_update(expected, inputs["params"], 0.996)
    assert equal(inputs["targets"], expected)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_shadows_are_the_rounded_results(backend, dtypes):
    inputs = call()
    shadows = [[torch.full_like(p, float("nan"), dtype=d) for p in inputs["params"]] for d in dtypes]
    alone = copied(inputs)
    jk.adamw_ema(**inputs, online_shadow=shadows[0], target_shadow=shadows[1], backend=backend)
    jk.adamw_ema(**alone, backend=backend)
    for role, shadow, dtype in zip(("params", "targets"), shadows, dtypes, strict=True):
        assert equal(inputs[role], alone[role]) and equal(shadow, [t.to(dtype) for t in alone[role]])


@pytest.mark.parametrize("backend", LEVELS, indirect=True)
@pytest.mark.parametrize("start", [0, 1, 8])
def test_large_shadows_are_streamed_to_the_same_bits(backend, start):
    sizes = (3, 6_300_001, 1, 77)  # 25 MB of parameters; shadows begin on a boundary, or anywhere
    inputs = call(sizes)
    shadow = [torch.zeros(n + start, dtype=torch.bfloat16)[start:] for n in sizes]
    jk.adamw_ema(**inputs, online_shadow=shadow, backend=backend)
    assert equal(shadow, [p.bfloat16() for p in inputs["params"]])


def test_an_entry_without_gradient_only_follows(backend):
    inputs = call()
    inputs["grads"][3] = None
    inputs["exp_avgs"][3] = inputs["exp_avg_sqs"][3] = inputs["steps"][3] = None
    before, expected = copied(inputs), call()
    jk.adamw_ema(**inputs, backend=backend)
    jk.adamw_ema(**expected, backend=backend)
    assert torch.equal(inputs["params"][3], before["params"][3])
    assert torch.equal(inputs["targets"][3], before["targets"][3].lerp(before["params"][3], 1 - 0.996))
    for role in ("params", "exp_avgs", "steps", "targets"):
        assert equal(inputs[role][:3] + inputs[role][4:], expected[role][:3] + expected[role][4:])


def test_infinite_gradients_move_the_average_alone(backend):
    inputs = call(found_inf=torch.tensor(1.0), grad_scale=torch.tensor(1024.0))
    inputs["grads"][1][0] = float("inf")
    before = copied(inputs)
    jk.adamw_ema(**inputs, backend=backend)
    for role in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        assert equal(inputs[role], before[role])
    jk.ema_update(before["targets"], before["params"], 0.996)
    assert equal(inputs["targets"], before["targets"]) and not inputs["targets"][3].isnan().any()


def test_a_power_of_two_scales_to_the_same_bits(backend):
    plain, scaled = call(), call(grad_scale=1024.0, found_inf=torch.tensor(0.0))
    scaled["grads"] = [g * 1024 for g in scaled["grads"]]
    jk.adamw_ema(**plain, backend=backend)
    jk.adamw_ema(**scaled, backend=backend)
    assert all(equal(plain[role], scaled[role]) for role in ("params", "exp_avgs", "exp_avg_sqs", "steps", "targets"))


def test_maximize_is_the_step_of_the_negated_gradients(backend):
    plain, maximised = call(), call(maximize=True)
    maximised["grads"] = [-g for g in maximised["grads"]]
    jk.adamw_ema(**plain, backend=backend)
    jk.adamw_ema(**maximised, backend=backend)
    assert all(equal(plain[role], maximised[role]) for role in ("params", "exp_avgs", "exp_avg_sqs", "targets"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_give_the_bits_of_floats(backend, dtype):
    values = dict(lr=0.125, weight_decay=0.03125, momentum=0.9375)
    floats, given = call(**values), call(**{k: torch.tensor(v, dtype=dtype) for k, v in values.items()})
    jk.adamw_ema(**floats, backend=backend)
    jk.adamw_ema(**given, backend=backend)
    assert equal(floats["params"], given["params"]) and equal(floats["targets"], given["targets"])


def test_a_tensor_alone_gets_the_bits_it_gets_among_others(backend):
    together = call()
    alone = [{k: v[i : i + 1] if isinstance(v, list) else v for k, v in call().items()} for i in range(len(SIZES))]
    jk.adamw_ema(**together, backend=backend)
    for i, one in enumerate(alone):
        jk.adamw_ema(**one, backend=backend)
        assert torch.equal(one["params"][0], together["params"][i])


def test_memory_beyond_a_tensor_stays_as_it_is(backend):
    inputs = call((13,))
    whole = {role: torch.full((64,), 7.0) for role in ("params", "exp_avgs", "exp_avg_sqs", "targets")}
    for role, w in whole.items():
        w[5:18] = inputs[role][0]
        inputs[role] = [w[5:18]]
    jk.adamw_ema(**inputs, backend=backend)
    assert all(w[:5].eq(7).all() and w[18:].eq(7).all() and w[5:18].ne(7).all() for w in whole.values())


def test_channels_last_weights_have_the_bits_of_contiguous_ones(backend):
    def weights(layout):
        g = torch.Generator().manual_seed(0)
        draw = [[torch.randn(8, 3, 4, 4, generator=g).to(memory_format=layout)] for _ in range(5)]
        draw[3][0].square_()
        return dict(
            zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "targets"), draw, strict=True), steps=[torch.ones(())]
        )

    plain, last = weights(torch.contiguous_format), weights(torch.channels_last)
    jk.adamw_ema(**plain, lr=1e-3, backend=backend)
    jk.adamw_ema(**last, lr=1e-3, backend=backend)
    assert last["params"][0].is_contiguous(memory_format=torch.channels_last)
    assert equal(plain["params"], last["params"]) and equal(plain["targets"], last["targets"])


def test_a_nan_gradient_spoils_its_own_elements_alone(backend):
    inputs, clean = call(), call()
    inputs["grads"][3][17] = float("nan")
    jk.adamw_ema(**inputs, backend=backend)
    jk.adamw_ema(**clean, backend=backend)
    wrong = inputs["params"][3] != clean["params"][3]
    assert wrong.nonzero().flatten().tolist() == [17] and inputs["params"][3][17].isnan()


@pytest.mark.parametrize("role", ["params", "exp_avgs", "targets", "online_shadow"])
def test_a_graph_that_saved_an_old_value_refuses_its_backward(role):
    inputs = call((3,), online_shadow=[torch.zeros(3, dtype=torch.bfloat16)])
    x = torch.ones(3, requires_grad=True)
    y = (inputs[role][0] * x).sum()
    jk.adamw_ema(**inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_parameters_that_require_grad_are_updated_without_a_graph():
    inputs = call((3,))
    p = inputs["params"][0].requires_grad_()
    before = p.detach().clone()
    jk.adamw_ema(**inputs)
    assert p.is_leaf and not torch.equal(p, before)


def test_the_cpu_kernel_refuses_gradients_that_it_is_not_built_for(restored_threads):
    torch.set_num_threads(2)  # one that threw would end the process
    inputs = call((100_000,))
    inputs["grads"] = [g.double() for g in inputs["grads"]]
    lists = [inputs[n] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")]
    before, scalars = inputs["params"][0].clone(), torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="tensors must be float32, bfloat16 or float16, got float64"):
        torch.ops.jepa_kernels.adamw_ema_forward(
            *lists, [], [], [], scalars, None, None, 0.9, 0.999, 1e-8, False, "cpu"
        )
    assert torch.equal(inputs["params"][0], before)


def test_the_cpu_kernel_refuses_shadows_that_it_is_not_built_for():
    inputs = call((3,))
    lists = [inputs[n] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "targets")]
    scalars = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="tensors must be float32, bfloat16 or float16, got float64"):
        torch.ops.jepa_kernels.adamw_ema_forward(
            *lists, [torch.zeros(3).double()], [], scalars, None, None, 0.9, 0.999, 1e-8, False, "cpu"
        )


def replaced(role, i, value):
    def change(inputs):
        inputs[role] = list(inputs.get(role) or [None] * 2)
        inputs[role][i] = value(inputs) if callable(value) else value

    return change


def dropped(role):
    return lambda inputs: inputs[role].pop()


def option(**values):
    return lambda inputs: inputs.update(values)


def same_target(inputs):
    inputs["targets"][1] = inputs["targets"][0]


def overlapping(inputs):
    whole = torch.zeros(5)
    inputs["params"][0], inputs["targets"][1] = whole[:3], whole[2:]


THREE = torch.zeros(3)
BAD = [
    (dropped("grads"), ValueError, r"grads must hold 2 tensors, got 1; pass one \(or None\) for params\[1\], the fir"),
    (option(grads=[THREE] * 3), ValueError, r"grads must hold 2 tensors, got 3; leave out grads\[2\], which belongs"),
    (dropped("targets"), ValueError, "targets must hold 2 tensors, got 1"),
    (option(grads=None), TypeError, "grads must be a list of tensors, got NoneType; put it into a list"),
    (option(params=THREE), TypeError, "params must be a list of tensors, got Tensor"),
    (replaced("params", 1, 1.0), TypeError, r"params\[1\] must be a tensor, got float"),
    (replaced("params", 1, None), TypeError, r"params\[1\] must be a tensor, got None; leave it out of every list"),
    (
        replaced("params", 1, THREE.bfloat16()),
        TypeError,
        r"params\[1\] must be float32, got bfloat16; keep fp32 weights",
    ),
    (replaced("params", 1, THREE.cfloat()), TypeError, r"params\[1\] must be float32, got complex64"),
    (replaced("params", 1, torch.zeros(6)[::2]), ValueError, r"params\[1\] must fill its memory without gaps, got str"),
    (
        replaced("params", 1, THREE.to_sparse()),
        TypeError,
        r"params\[1\] must be a strided tensor, got torch.sparse_coo",
    ),
    (
        replaced("params", 1, THREE.to("meta")),
        ValueError,
        r"params\[1\] must be on cpu, got meta; update each device's",
    ),
    (
        replaced("grads", 1, THREE.to_sparse()),
        TypeError,
        r"the grad of params\[1\] must be a strided tensor, got torch.s",
    ),
    (
        replaced("grads", 1, THREE.double()),
        TypeError,
        r"the grad of params\[1\] must be float32 or bfloat16 or float16",
    ),
    (replaced("grads", 1, torch.zeros(4)), ValueError, r"the grad of params\[1\] must have shape \(3,\) and strides"),
    (
        replaced("exp_avgs", 1, None),
        TypeError,
        r"exp_avgs\[1\] must be a tensor, as params\[1\] has a gradient, got None",
    ),
    (replaced("exp_avgs", 1, THREE.bfloat16()), TypeError, r"the exp_avg of params\[1\] must be float32, got bfloat16"),
    (replaced("steps", 1, torch.zeros(1)), ValueError, r"the step of params\[1\] must have shape \(\), got \(1,\)"),
    (replaced("steps", 1, torch.tensor(3)), TypeError, r"the step of params\[1\] must be float32, got int64"),
    (replaced("targets", 1, THREE.bfloat16()), TypeError, r"the target of params\[1\] must be float32, got bfloat16"),
    (replaced("targets", 1, THREE.to("meta")), ValueError, r"the target of params\[1\] must be on cpu, got meta"),
    (replaced("online_shadow", 1, THREE), TypeError, r"the online_shadow of params\[1\] must be bfloat16 or float16"),
    (
        lambda inputs: (replaced("target_shadow", 1, THREE.half())(inputs), replaced("targets", 1, None)(inputs)),
        ValueError,
        r"the target_shadow of params\[1\] must have a target to copy, got no target",
    ),
    (same_target, ValueError, r"targets\[0\] must share no memory with targets\[1\], got overlapping storage"),
    (overlapping, ValueError, r"params\[0\] must share no memory with targets\[1\]"),
    (
        replaced("targets", 1, lambda i: i["params"][1]),
        ValueError,
        r"(params|targets)\[1\] must share no memory with (p|t)",
    ),
    (replaced("grads", 0, lambda i: i["exp_avgs"][0]), ValueError, r"(grads|exp_avgs)\[0\] must share no memory with "),
    (replaced("steps", 1, lambda i: i["steps"][0]), ValueError, r"steps\[0\] must share no memory with steps\[1\]"),
    (option(lr=-1e-3), ValueError, "lr must be at least 0, got -0.001; 1e-3 is usual"),
    (option(lr=float("nan")), ValueError, "lr must be at least 0, got nan"),
    (option(lr="1"), TypeError, "lr must be a number, got str; pass a float"),
    (
        option(lr=torch.ones(2)),
        TypeError,
        r"lr must be a float or a 0-dim float32 or float64 tensor, got float32 \(2,\)",
    ),
    (option(lr=torch.ones((), device="meta")), ValueError, "lr must be on the CPU or on cpu, got meta; move it"),
    (option(weight_decay=-1.0), ValueError, "weight_decay must be at least 0, got -1.0"),
    (option(momentum=1.5), ValueError, r"momentum must lie in \[0, 1\], got 1.5"),
    (option(momentum=torch.tensor(float("nan"))), ValueError, r"momentum must lie in \[0, 1\], got nan"),
    (option(betas=(0.9, 1.0)), ValueError, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
    (option(betas=(0.9, float("nan"))), ValueError, r"betas must lie in \[0, 1\), got \(0.9, nan\)"),
    (option(betas=0.9), TypeError, "betas must be two numbers, got 0.9"),
    (option(maximize="no"), TypeError, "maximize must be a bool, got str; pass True or False"),
    (option(grad_scale="1"), TypeError, "grad_scale must be a number, got str; pass what GradScaler sets"),
    (option(eps=-1e-8), ValueError, "eps must be at least 0, got -1e-08"),
    (
        option(found_inf=torch.zeros((), dtype=torch.int32)),
        TypeError,
        "found_inf must be a float32 number on cpu, got in",
    ),
    (option(grad_scale=torch.ones(2)), TypeError, r"grad_scale must be a float32 number on cpu, got float32 \(2,\)"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:50] for *_, m in BAD])
def test_bad_input_is_named_and_changes_nothing(change, error, message):
    inputs = call((3, 3))
    change(inputs)
    written = ("params", "exp_avgs", "exp_avg_sqs", "steps", "targets", "online_shadow")
    lists = [inputs[n] for n in written if isinstance(inputs.get(n), list)]
    kept = [t for ts in lists for t in ts if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    before = [t.clone() for t in kept]
    with pytest.raises(error, match="adamw_ema: " + message):
        jk.adamw_ema(**inputs)
    assert equal([t.to_dense() for t in before], [t.to_dense() for t in kept])


def test_gpu_backends_say_why_they_can_not_take_cpu_tensors():
    with pytest.raises(jk.BackendError, match="adamw_ema: backend 'cuda' must be able to run this call, got: "):
        jk.adamw_ema(**call(), backend="cuda")


@pytest.mark.parametrize("argument", ["lr", "weight_decay", "momentum"])
def test_a_scalar_on_the_device_is_read_when_asked_to(argument, monkeypatch):
    values = dict(lr=0.1, weight_decay=0.0, momentum=0.9, betas=(0.9, 0.999), eps=1e-8, maximize=False)
    options = check.Options(**{**values, argument: on_a_device(-1.0)})
    check.check_options(options, DEVICE)
    monkeypatch.setattr("jepa_kernels._core.check.CHECK_DEVICE_VALUES", True)
    with pytest.raises(ValueError, match=f"adamw_ema: {argument} must .+, got -1.0; "):
        check.check_options(options, DEVICE)
