"""masked_attention: what automatic choice takes, and why."""

from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend

import jepa_kernels as jk
from jepa_kernels import Packing, Rope
from jepa_kernels._core import select
from jepa_kernels._core.info import kernels
from jepa_kernels._core.select import FLOATS
from jepa_kernels.ops.masked_attention import limits


def test_automatic_choice_takes_sdpa_only_without_gradients(monkeypatch):
    q = torch.randn(1, 1, 3, 8)
    assert jk.explain("masked_attention", q, q, q).splitlines()[0] == "masked_attention: cpu (automatic)"
    monkeypatch.setitem(
        select._ready, ("masked_attention", "cpu", torch.float32), kernels("masked_attention")[-1:]
    )  # no _C
    attention = "torch.nn.functional.scaled_dot_product_attention"
    with mock.patch(attention, wraps=torch.nn.functional.scaled_dot_product_attention) as called:
        jk.masked_attention(q, q, q)
        assert called.call_count == 1
        with pytest.warns(jk.BackendWarning, match="sdpa: not automatic"):
            jk.masked_attention(*(q.clone().requires_grad_() for _ in range(3)))
        assert called.call_count == 1


def on_a_gpu_without_cuda_kernels(monkeypatch, capability):
    """Triton, of a GPU of that capability, for tensors of the CPU."""
    for backend, why in (("triton", None), ("cpu", "not built"), ("cuda", "not built")):
        monkeypatch.setitem(select._availability, (backend, "cpu"), why)
    monkeypatch.setitem(limits._capabilities, -1, capability)
    for dtype in FLOATS:
        monkeypatch.delitem(select._ready, ("masked_attention", "cpu", dtype), raising=False)


def chosen(tokens=512, width=64, heads=(2, 2), dtype=torch.bfloat16, change=lambda x: x, **options):
    q, k, v = (change(torch.zeros(1, h, tokens, width, dtype=dtype)) for h in (heads[0], heads[1], heads[1]))
    return jk.explain("masked_attention", q, k, v, **options)


def test_cudnn_is_the_automatic_choice_where_it_was_measured_faster(monkeypatch):
    on_a_gpu_without_cuda_kernels(monkeypatch, "9.0")
    reason = "cuDNN, by sdpa, is faster at D 64 and 512 tokens or more without gradient: taken only when named"
    for call in (dict(), dict(tokens=2048), dict(dtype=torch.float16)):
        first, *rows = chosen(**call).splitlines()
        assert first == "masked_attention: sdpa (automatic)" and f"  triton     {reason}" in rows
    everything = torch.tensor([[0, 512]] * 512, dtype=torch.int32)
    elsewhere = (
        *(dict(tokens=511), dict(width=32), dict(width=72), dict(heads=(2, 1)), dict(dtype=torch.float32)),
        *(dict(frame_size=256), dict(key_ranges=everything), dict(rope=Rope(torch.zeros(512, 1)))),
        *(dict(change=torch.Tensor.requires_grad_), dict(change=lambda x: x.mT.contiguous().mT)),
    )
    for call in elsewhere:
        assert chosen(**call).startswith("masked_attention: triton (automatic)"), call
    x, packing = torch.zeros(512, 2, 64).bfloat16(), Packing.uniform(1, 512)
    assert jk.explain("masked_attention", x, x, x, packing).startswith("masked_attention: triton (automatic)")
    dense = x.view(1, 2, 512, 64)
    lse = jk.explain("masked_attention_lse", dense, dense, dense)
    assert lse.startswith("masked_attention_lse: triton (automatic)")
    with torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert chosen().startswith("masked_attention: triton (automatic)")
    assert chosen(backend="triton").startswith("masked_attention: triton (named)")
    monkeypatch.setitem(limits._capabilities, -1, "8.0")
    assert chosen().startswith("masked_attention: triton (automatic)")


def test_cudnn_is_asked_first_only_in_the_calls_that_it_is_chosen_for(monkeypatch):
    on_a_gpu_without_cuda_kernels(monkeypatch, "9.0")
    before, orders = torch._C._get_sdp_priority_order(), []

    def watched(*args, **options):
        orders.append(torch._C._get_sdp_priority_order()[:3])
        return torch.zeros_like(args[0])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for tokens, backend in ((512, None), (511, "sdpa")):
        jk.masked_attention(*torch.zeros(3, 1, 2, tokens, 64).bfloat16(), backend=backend)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    assert orders == [[int(x) for x in order], before[:3]]
    assert torch._C._get_sdp_priority_order() == before


def test_the_choice_of_cudnn_is_traced_whole(monkeypatch):
    on_a_gpu_without_cuda_kernels(monkeypatch, "9.0")
    compiled = torch.compile(lambda q: jk.masked_attention(q, q, q), fullgraph=True, backend="eager")
    q = torch.randn(1, 2, 512, 64).bfloat16()
    assert torch.equal(compiled(q), jk.masked_attention(q, q, q, backend="sdpa"))
