"""What only a GPU can show: no sync, other streams, graph capture, and the bits of the CPU kernels."""

import functools
import timeit
from contextlib import contextmanager

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels.nn import EMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = (1, 3, 0, 1000, 70_001)
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


def tensors(seed, dtype=torch.float32, device="cuda", start=0):
    """Drawn on the CPU: the same values on every device."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n + start, generator=g).to(device, dtype)[start:] for n in SIZES]


@contextmanager
def no_sync():
    """Any wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_backend
@pytest.mark.parametrize("form", ["lerp", "ijepa", "vjepa2"])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("online, shadow", [(torch.float32, None), (torch.bfloat16, torch.float16)])
def test_ema_update_has_the_bits_of_the_cpu_kernel(backend, form, start, online, shadow):
    results = []
    for device, name in (("cpu", "cpu"), ("cuda", backend)):
        target = tensors(0, device=device, start=start)
        copies = None if shadow is None else tensors(2, shadow, device, start)
        jk.ema_update(target, tensors(1, online, device, start), 0.99925, form=form, shadow=copies, backend=name)
        results.append([t.cpu() for t in (*target, *(copies or ()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def online_network(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(40, 70), torch.nn.BatchNorm1d(70), torch.nn.Linear(70, 3)).to(device)


def drift(network, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))


def targets_of(ema):
    return list(ema.module.parameters())


def copies_of(ema):
    return list(ema.shadow_copies().values())


@pytest.mark.parametrize("kept_on", ["cuda", "cpu"])
def test_a_target_network_has_the_bits_of_the_cpu(kept_on):
    """On the device of the online network, or apart from it."""
    networks = [online_network(device) for device in ("cuda", "cpu")]
    averages = [
        EMA(network, 0.9, total_steps=8, device=device, shadow_dtype=torch.bfloat16)
        for network, device in zip(networks, (kept_on, "cpu"), strict=True)
    ]
    for step in range(3):
        for network, ema in zip(networks, averages, strict=True):
            drift(network, step)
            ema.update()
    for written in (targets_of, copies_of):
        ours, expected = map(written, averages)
        assert ours[0].device.type == kept_on
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


def test_a_target_network_that_moved_to_the_device_takes_its_shadow_along():
    ema = EMA(online_network("cpu"), shadow_dtype=torch.bfloat16).cuda()
    x = torch.randn(4, 40, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(ema(x), ema.module(x))
    assert {copy.device.type for copy in copies_of(ema)} == {"cuda"}


def test_updates_of_a_target_network_replay_with_a_changing_momentum():
    network = online_network("cuda")
    ema, expected = (EMA(network, shadow_dtype=torch.bfloat16) for _ in range(2))
    momentum, graph = torch.tensor(1.0, dtype=torch.float64, device="cuda"), torch.cuda.CUDAGraph()
    ema.apply_update_(network, momentum)  # builds the table
    with torch.cuda.graph(graph):
        ema.apply_update_(network, momentum)
    for step, m in enumerate((0.9, 0.99)):
        drift(network, step)
        momentum.fill_(m)
        graph.replay()
        expected.apply_update_(network, m)
        for written in (targets_of, copies_of):
            assert all(torch.equal(x, y) for x, y in zip(written(ema), written(expected), strict=True))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_momentum_on_the_device_needs_no_sync(backend, dtype):
    target, expected, online = tensors(0), tensors(0), tensors(1)
    momentum = torch.tensor(0.99925, dtype=dtype)
    jk.ema_update(expected, online, momentum, backend=backend)
    on_device = momentum.cuda()
    jk.ema_update(target, online, on_device, backend=backend)  # builds the table
    for t, first in zip(target, tensors(0), strict=True):
        t.copy_(first)
    with no_sync():
        jk.ema_update(target, online, on_device, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))


@each_backend
def test_ema_update_runs_on_the_current_stream(backend):
    target, online, stream = tensors(0), tensors(1), torch.cuda.Stream()
    jk.ema_update(target, online, 1.0, backend=backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        jk.ema_update(target, online, 0.0, form="ijepa", backend=backend)
        assert not stream.query(), "queued behind the sleep, not run on the default stream"
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(target, online, strict=True))


@each_backend
def test_ema_update_can_be_captured_once_it_ran(backend):
    target, online, momentum = tensors(0), tensors(1), torch.tensor(0.5, dtype=torch.float64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="must run before graph capture"), torch.cuda.graph(graph):
        jk.ema_update(target, online, momentum, backend=backend)
    jk.ema_update(target, online, momentum, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        jk.ema_update(target, online, momentum, backend=backend)
    expected = [t.clone() for t in target]
    for value in (0.9, 0.99):  # read at replay, not baked in
        momentum.fill_(value)
        graph.replay()
        jk.ema_update(expected, online, value, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))


@each_backend
def test_a_captured_table_replays_with_other_momenta_and_weights(backend):
    target, online, shadow = tensors(0), tensors(1), tensors(2, torch.bfloat16)
    momentum = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    table, graph = jk.EmaTable(target, online, shadow=shadow), torch.cuda.CUDAGraph()
    table.update(momentum, backend=backend)
    with torch.cuda.graph(graph):
        table.update(momentum, backend=backend)
    expected = [t.clone() for t in target]
    for value in (0.9, 0.99, 1.0):
        momentum.fill_(value)
        torch._foreach_mul_(online, 1.5)
        graph.replay()
        jk.ema_update(expected, online, value, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))
        assert all(torch.equal(s, t.bfloat16()) for s, t in zip(shadow, target, strict=True))


@each_backend
def test_a_table_names_weights_that_moved(backend):
    target, online = tensors(0), tensors(1)
    table = jk.EmaTable(target, online)
    table.update(0.5, backend=backend)
    before, online[3].data = [t.clone() for t in target], online[3].clone()
    with pytest.raises(ValueError, match=r"online\[3\] must stay as it was when the table was built"), no_sync():
        table.update(0.5, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(target, before, strict=True))


@each_backend
def test_ema_update_of_more_elements_than_int32_counts(backend):
    n = (1 << 31) + 5
    if torch.cuda.mem_get_info()[0] < 7 * n:
        pytest.skip("needs 14 GB of free GPU memory")
    target, online = torch.zeros(n, device="cuda"), torch.ones(n, device="cuda", dtype=torch.bfloat16)
    jk.ema_update([target], [online], 0.5, backend=backend)
    assert target.min() == 0.5 == target.max()


MOST_US = {"call": 200, "table": 30}  # asked; docs/tuning/memory_bound.md has what was measured
OUT_OF_REACH = pytest.mark.xfail(reason="reading every tensor alone takes 31 us", strict=True)


@each_backend
@pytest.mark.parametrize("kind", ["call", pytest.param("table", marks=OUT_OF_REACH)])
def test_an_update_costs_the_host_little(backend, kind):
    """Of ViT-H's count of tensors, with the kernel out of the way."""
    target, online = ([torch.zeros(64, device="cuda") for _ in range(390)] for _ in range(2))
    if kind == "table":
        update = functools.partial(jk.EmaTable(target, online).update, 0.996, backend=backend)
    else:
        update = functools.partial(jk.ema_update, target, online, 0.996, backend=backend)
    update()
    torch.cuda.synchronize()
    us = min(timeit.repeat(update, number=20, repeat=10)) / 20 * 1e6
    assert us <= MOST_US[kind], f"{us:.0f} us"


def test_latent_loss_needs_no_sync():
    ids, packing = Packing.from_ids([torch.arange(n) for n in (3, 5, 9, 1)], device="cuda")
    pred = torch.randn(18, 64, device="cuda", requires_grad=True)
    target = torch.randn(2, 16, 64, device="cuda")
    expected = None
    for sync in (True, False):  # the first run compiles
        with no_sync() if not sync else torch.enable_grad():
            loss = jk.latent_loss(pred, target, ids, packing=packing, backend="triton")
            (grad,) = torch.autograd.grad(loss, pred)
        expected = grad if expected is None else expected
    assert torch.equal(grad, expected)
    on_cpu = Packing.from_lengths(packing.lengths)
    here = jk.latent_loss(pred.cpu(), target.cpu(), ids.cpu(), packing=on_cpu, backend="cpu")
    assert loss.item() == pytest.approx(here.item(), rel=1e-6)


def patches_inputs(dtype=torch.bfloat16):
    """Two masks of two images; the layer and its images."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randperm(64, generator=generator)[:n].sort().values for n in (30, 5, 9, 64)]
    shapes = ((2, 3, 112, 112), (200, 3, 14, 14), (200,), (64, 200))
    return ids, [torch.randn(s, generator=generator).to("cuda", dtype).requires_grad_() for s in shapes]


def patches_step(ids, packing, leaves):
    out = jk.embed_patches(leaves[0], ids, *leaves[1:], packing=packing, backend="triton")
    tokens = jk.gather_tokens(leaves[3][None].expand(2, -1, -1), ids, packing, backend="triton")
    return out, tokens, *torch.autograd.grad([out, tokens], leaves, [torch.ones_like(out), torch.ones_like(tokens)])


def test_embed_patches_and_gather_tokens_need_no_sync_and_repeat_their_bits():
    ids, leaves = patches_inputs()
    ids, packing = Packing.from_ids(ids, device="cuda")
    expected = patches_step(ids, packing, leaves)  # compiles
    for _ in range(100):
        with no_sync():
            found = patches_step(ids, packing, leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_sequence_is_embedded_as_it_is_alone(dtype):
    ids, (pixels, *layer) = patches_inputs(dtype)
    rows, packing = Packing.from_ids(ids, device="cuda")
    together = packing.split(jk.embed_patches(pixels, rows, *layer, packing=packing, backend="triton"))
    for i, kept in enumerate(ids):
        image = pixels[i % 2 : i % 2 + 1]
        alone = jk.embed_patches(image, kept[None].cuda(), *layer, backend="triton")
        assert torch.equal(alone[0], together[i])


def attention_inputs(lengths=(70, 3, 0, 130), heads=4, width=80):
    packing = Packing.from_lengths(lengths, device="cuda")
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(packing.tokens, 3, heads, width, generator=generator).to("cuda", torch.bfloat16)
    return qkv.requires_grad_(), packing, jk.Rope(torch.rand(packing.tokens, 3, generator=generator).cuda())


@pytest.fixture(params=["triton", "triton with rope", "cuda"])
def attention_step(request):
    """Forward and backward on one backend; the Hopper kernels take no rope."""
    backend, turned = request.param.split()[0], request.param.endswith("rope")
    if backend == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its kernels need a GPU of compute capability 9.0")

    def step(qkv, packing, rope):
        out = jk.masked_attention_qkv(qkv, packing, rope=rope if turned else None, backend=backend)
        return out, *torch.autograd.grad(out, qkv, torch.ones_like(out))

    return step


def test_masked_attention_needs_no_sync_and_repeats_its_bits(attention_step):
    inputs = attention_inputs()
    expected = attention_step(*inputs)  # compiles
    for _ in range(100):
        with no_sync():
            found = attention_step(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_masked_attention_is_captured_with_lengths_padded_to_a_bucket(attention_step):
    bucket = dict(tokens=256, sequences=6, max_seqlen=256)
    qkv, packing, rope = attention_inputs()
    static = packing.padded(**bucket)
    padded = torch.zeros(256, *qkv.shape[1:], device="cuda", dtype=qkv.dtype)
    padded_rope = jk.Rope(torch.zeros(256, 3, device="cuda"))
    turns, _ = padded_rope.turns(80)

    def load(qkv, packing, rope):
        new = packing.padded(**bucket)
        static.cu_seqlens.copy_(new.cu_seqlens)
        static.tiles.copy_(new.tiles)
        padded[: len(qkv)].copy_(qkv.detach())
        turns[: len(qkv)].copy_(rope.turns(80)[0])

    def step():
        return attention_step(padded.requires_grad_(), static, padded_rope)

    load(qkv, packing, rope)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ((70, 3, 0, 130), (1, 200), (40, 40, 40)):
        call = attention_inputs(lengths)
        with torch.no_grad():
            load(*call)
        graph.replay()
        for found, wanted in zip(captured, attention_step(*call), strict=True):
            assert torch.equal(found[: len(wanted)], wanted)


def test_masked_attention_takes_more_than_2_31_elements():
    packing = Packing.from_lengths([64] * 65_600, device="cuda")
    qkv = torch.randn(packing.tokens, 3, 2, 88, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    out = jk.masked_attention_qkv(qkv, packing, backend="triton")
    last = jk.masked_attention_qkv(qkv[-64:], Packing.from_lengths([64], device="cuda"), backend="triton")
    assert torch.equal(out[-64:], last)


def rope_inputs(batch=2, tokens=50, heads=4, width=80):
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=torch.Generator().manual_seed(0))
    q, k, _ = qkv.to("cuda", torch.bfloat16).permute(2, 0, 3, 1, 4)
    return q.detach().requires_grad_(), k.detach().requires_grad_(), jk.Rope(torch.rand(tokens, 3).cuda())


@each_backend
def test_rope_needs_no_sync_and_has_the_bits_of_the_cpu_kernel(backend):
    q, k, rope = rope_inputs()
    rope.turns(80)
    for sync in (True, False):  # the first run compiles
        with no_sync() if not sync else torch.enable_grad():
            both = jk.rope_qk(q, k, rope, backend=backend)
            grads = torch.autograd.grad(both, (q, k), [q, k])
    here = rope.to("cpu")
    here._turns[80, False] = tuple(x.cpu() for x in rope.turns(80))  # cosines of a GPU differ from the CPU's
    leaves = [x.detach().cpu().requires_grad_() for x in (q, k)]
    expected = jk.rope_qk(*leaves, here, backend="cpu")
    wanted = [*expected, *torch.autograd.grad(expected, leaves, leaves)]
    assert all(torch.equal(a.cpu(), b) for a, b in zip([*both, *grads], wanted, strict=True))


@each_backend
def test_rope_takes_more_than_2_31_elements(backend):
    q = torch.randn(1, 2, 130_000, 3, 64, device="cuda", dtype=torch.bfloat16).expand(45, -1, -1, -1, -1)
    q = q.flatten(0, 1).transpose(1, 2)  # [90, 3, 130000, 64]
    assert q.numel() > 2**31
    rope = jk.Rope(torch.rand(130_000, 3, device="cuda"))
    out = jk.rope(q, rope, backend=backend)
    assert torch.equal(out[-1, :, -50:], jk.rope(q[-2:], rope, backend=backend)[-1, :, -50:])
