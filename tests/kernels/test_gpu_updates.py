"""adamw_ema and grad_norm on a GPU: the bits of the CPU kernels, no sync, replays that read new scalars."""

import pytest
import torch

import jepa_kernels as jk
from tests.kernels.test_gpu import each_backend, no_sync, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "steps", "targets", "online_shadow", "target_shadow")


def lists(device="cuda", grad=torch.float32, start=0):
    """The tensors of a call. One parameter has no gradient, another no average."""
    drawn = {
        name: tensors(seed, dtype, device, start)
        for seed, (name, dtype) in enumerate(
            dict(
                params=torch.float32,
                grads=grad,
                exp_avgs=torch.float32,
                exp_avg_sqs=torch.float32,
                targets=torch.float32,
                online_shadow=torch.bfloat16,
                target_shadow=torch.float16,
            ).items()
        )
    }
    drawn["exp_avg_sqs"] = [v.square_() for v in drawn["exp_avg_sqs"]]
    drawn["steps"] = [torch.tensor(5.0 + i, device=device) for i in range(len(drawn["params"]))]
    drawn["grads"][1] = drawn["targets"][3] = drawn["target_shadow"][3] = None
    return drawn


def written(inputs):
    return [t.cpu() for name in WRITTEN for t in inputs[name] if t is not None]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(written(a), written(b), strict=True))


@each_backend
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, dict(grad_scale=3.0, maximize=True), dict(found_inf=1.0), dict(betas=(0, 0.9))]
)
def test_adamw_ema_has_the_bits_of_the_cpu_kernel(backend, start, grad, options):
    here, there = lists("cpu", grad, start), lists("cuda", grad, start)
    for inputs, device, name in ((here, "cpu", "cpu"), (there, "cuda", backend)):
        given = {k: torch.tensor(v, device=device) if k == "found_inf" else v for k, v in options.items()}
        jk.adamw_ema(**inputs, lr=0.01, weight_decay=0.1, momentum=0.9, **given, backend=name)
    assert equal(here, there)


@each_backend
def test_adamw_ema_needs_no_sync(backend):
    inputs, expected = lists(), lists()
    scaler = dict(grad_scale=torch.tensor(2.0, device="cuda"), found_inf=torch.tensor(0.0, device="cuda"))
    scalars = dict(lr=0.01, weight_decay=0.1, momentum=0.9)
    on_device = {k: torch.tensor(v, dtype=torch.float64, device="cuda") for k, v in scalars.items()}
    for given in (scalars, on_device):
        for step in range(2):  # the first builds the table
            with no_sync() if step else torch.enable_grad():
                jk.adamw_ema(**inputs, **given, **scaler, backend=backend)
    for _ in range(4):
        jk.adamw_ema(**expected, **scalars, **scaler, backend=backend)
    assert equal(inputs, expected)


@each_backend
def test_a_replay_reads_new_scalars(backend):
    inputs, expected = lists(), lists()
    values = [dict(lr=0.1 / (i + 1), weight_decay=0.1 * i, momentum=0.9 + 0.03 * i) for i in range(3)]
    infinite = [0.0, 1.0, 0.0]
    scalars = {k: torch.tensor(v, dtype=torch.float64, device="cuda") for k, v in values[0].items()}
    found_inf, scale = torch.zeros((), device="cuda"), torch.tensor(4.0, device="cuda")
    call = dict(**inputs, **scalars, found_inf=found_inf, grad_scale=scale, backend=backend)
    jk.adamw_ema(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        jk.adamw_ema(**call)
    first = dict(found_inf=torch.zeros((), device="cuda"), grad_scale=4.0)
    jk.adamw_ema(**expected, **values[0], **first, backend=backend)
    for new, inf in zip(values, infinite, strict=True):
        for name, value in new.items():
            scalars[name].fill_(value)
        found_inf.fill_(inf)
        graph.replay()
        jk.adamw_ema(**expected, **new, found_inf=found_inf.clone(), grad_scale=4.0, backend=backend)
        assert equal(inputs, expected)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("start", [0, 1])
def test_grad_norm_needs_no_sync_and_repeats_its_bits(backend, dtype, start):
    grads = tensors(0, dtype, start=start)
    expected = jk.grad_norm([g.cpu() for g in grads], backend="cpu")
    first = jk.grad_norm(grads, backend=backend)
    assert first.item() == pytest.approx(expected.item(), rel=1.2e-7)
    for _ in range(100):
        with no_sync():
            found = jk.grad_norm(grads, backend=backend)
        assert torch.equal(found, first)
    grads[-1][-1] = float("nan")
    assert jk.grad_norm(grads, backend=backend).isnan()


@each_backend
def test_more_than_2_31_elements(backend):
    size = 2**31 + 5
    param, grad = torch.zeros(size, device="cuda"), torch.ones(size, dtype=torch.bfloat16, device="cuda")
    assert jk.grad_norm([grad], backend=backend).item() == pytest.approx(size**0.5, rel=1e-7)
    moments = [torch.zeros_like(param)], [torch.zeros_like(param)], [torch.zeros((), device="cuda")]
    jk.adamw_ema([param], [grad], *moments, lr=0.5, weight_decay=0.0, eps=0.0, backend=backend)
    assert param[0].item() == pytest.approx(-0.5, rel=1e-6) and param.eq(param[0]).all()
