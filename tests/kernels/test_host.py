"""The CUDA kernel of rope with no GPU: its own source and binding, built for the host, thread after thread.

tests/kernels/host stands in for CUDA; vector accesses that are not aligned fault. Memory is poisoned, so that a
channel that no thread writes shows.
"""

import re

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Rope
from jepa_kernels.ops.rope.cases import CASES
from jepa_kernels.testing import DTYPES, check_case, poisoned_memory
from tests.kernels.on_host import CSRC, HERE, build, take_for_cuda

pytestmark = pytest.mark.compile
HEADERS = HERE / "host"


def host_source(source: str) -> str:
    """C++ of a .cu file: its headers are those of this folder, its launches function calls."""
    source = re.sub(r'#include (<cuda_\w+\.h>|"common/hopper_host.cuh")\n', "", source)
    source = re.sub(r"(\w+<[\w, ]+>)<<<(\w+), (\w+), 0, stream>>>\((\w+)\)", r"launch_threads(\1, \2, \3, \4)", source)
    source = re.sub(r"\*reinterpret_cast<(const float2|uint4)\*>", r"*aligned_address<\1>", source)
    assert "<<<" not in source
    return '#include "cuda.h"\n' + source


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    source = folder / "rope.cpp"
    source.write_text(host_source((CSRC / "rope" / "cuda.cu").read_text()))
    sources = dict.fromkeys((source, HEADERS / "module.cpp"), "-O1")
    return build(folder, "host", HEADERS, sources, "-ffp-contract=off", "-mfma", "-w")


@pytest.fixture(autouse=True)
def _cuda_backend_on_the_host(module, monkeypatch):
    take_for_cuda(monkeypatch, "rope", module)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shared_cases_are_within_the_error_budget(case):
    for dtype in DTYPES:
        for parity in check_case("rope", "cuda", case, dtype):
            assert parity.ok, f"{dtype} {parity}"


def results(backend, q, k, rope):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    with poisoned_memory():
        both = jk.rope_qk(*leaves, rope, backend=backend)
        return [*both, *torch.autograd.grad(both, leaves, [q, k])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [6, 16, 24, 32, 33, 64, 80, 88, 128, 250, 256])
@pytest.mark.parametrize("pairing, axes", [("interleaved", 3), ("tiled", 2), ("half", 1)])
def test_has_the_bits_of_the_cpu_kernel(dtype, width, pairing, axes):
    q, k, _ = torch.randn(2, 7, 3, 5, width).to(dtype).permute(2, 0, 3, 1, 4)
    own = Rope(torch.rand(2, 7, axes) * 9, pairing=pairing)
    other = Rope(torch.rand(7, axes) * 9, torch.rand(4, axes) * 9, pairing=pairing)
    for keys, rope in ((k, own), (k[:, ::2, ::2], other)):  # fewer heads, fewer tokens, positions of their own
        pairs = zip(results("cuda", q, keys, rope), results("cpu", q, keys, rope), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_one_narrow_head():
    x, places = torch.randn(700, 1, 2), torch.rand(700, 1)
    assert torch.equal(jk.rope(x, places, backend="cuda"), jk.rope(x, places, backend="cpu"))


@pytest.mark.parametrize("shape", [(5, 0, 16), (2, 0, 5, 16)])
def test_no_heads(shape):
    x = torch.zeros(shape, requires_grad=True)
    turned = jk.rope(x, torch.rand(5, 1), backend="cuda")
    assert turned.shape == x.shape == torch.autograd.grad(turned.sum(), x)[0].shape


def test_heads_without_channels_are_nothing_to_turn():
    """The public function refuses them, the torch op does not."""
    x = torch.zeros(5, 2, 0)
    for half in (False, True):
        turned, _ = torch.ops.jepa_kernels.rope_forward(x, None, torch.zeros(5, 2, 0), None, half, "cuda")
        assert turned.shape == x.shape


def test_rows_that_begin_anywhere():
    whole = torch.randn(4 * 3 * 64 + 1)
    x, places = whole[1:].view(4, 3, 64), torch.rand(4, 3)
    for y in (x, x.transpose(0, 2).contiguous().transpose(0, 2), x.bfloat16()[:, :, 1:41]):
        assert torch.equal(jk.rope(y, places, backend="cuda"), jk.rope(y, places, backend="cpu"))
