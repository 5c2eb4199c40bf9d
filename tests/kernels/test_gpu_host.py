"""What a launch asks of the host, on a GPU: a thread that did nothing on the device before, torch's default device."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing
from tests.kernels.test_gpu import each_backend, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@each_backend
def test_the_first_that_a_thread_does_may_be_a_launch(backend):
    """It has no context then, without which no tensor map is made."""
    if backend == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its kernels need a GPU of compute capability 9.0")
    x = torch.randn(2, 4, 70, 64, device="cuda", dtype=torch.bfloat16)
    expected = jk.masked_attention(x, x, x, backend=backend)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(jk.masked_attention, x, x, x, backend=backend).result()
    assert torch.equal(found, expected)


@each_backend
def test_one_graph_holds_launches_of_long_and_of_short_sequences(backend):
    """The second asks for less shared memory, which the first must not be left with."""
    if backend == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its kernels need a GPU of compute capability 9.0")
    long, short = (torch.randn(2, 4, n, 128, device="cuda", dtype=torch.bfloat16) for n in (256, 20))

    def step():
        return [jk.masked_attention(x, x, x, backend=backend) for x in (long, short)]

    expected, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@each_backend
def test_tables_and_scalars_are_made_on_the_host_whatever_the_default_device(backend):
    target, expected, online = tensors(0), tensors(0), tensors(1)
    norm = jk.grad_norm(online, backend=backend)
    jk.ema_update(expected, online, 0.9, backend=backend)
    with torch.device("cuda"):
        jk.ema_update(target, online, 0.9, backend=backend)
        assert torch.equal(jk.grad_norm([x.clone() for x in online], backend=backend), norm)
        assert Packing.from_lengths([3, 5], device="cuda").cu_seqlens.tolist() == [0, 3, 8]
    assert all(torch.equal(a, b) for a, b in zip(target, expected, strict=True))


@each_backend
@pytest.mark.parametrize("shape", [(5, 0, 16), (2, 0, 5, 16)])
def test_rope_of_no_heads(backend, shape):
    x = torch.zeros(shape, device="cuda")
    assert jk.rope(x, torch.zeros(5, 1, device="cuda"), backend=backend).shape == shape
