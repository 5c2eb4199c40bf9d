"""gather_tokens: values by hand, equivalences, and messages."""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing

TRITON = pytest.param("triton", marks=pytest.mark.interp)


@pytest.fixture(params=["reference", "cpu", TRITON])
def backend(request):
    return request.param


@pytest.fixture(params=["cpu", TRITON])
def kernel(request):
    return request.param


def test_by_hand(backend):
    x = torch.arange(12.0).view(2, 3, 2).requires_grad_()
    ids = torch.tensor([[0, 2], [1, 2], [2, 0], [0, 1]])  # two masks of two images
    ids[2] = torch.tensor([0, 2])
    out = jk.gather_tokens(x, ids, backend=backend)
    assert out.tolist() == [[[0, 1], [4, 5]], [[8, 9], [10, 11]], [[0, 1], [4, 5]], [[6, 7], [8, 9]]]
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert dx[..., 0].tolist() == [[2, 0, 2], [1, 2, 1]]


def test_packed_equals_rectangular_exactly(backend):
    x, ids = torch.randn(3, 8, 5), torch.stack([torch.randperm(8)[:4].sort().values for _ in range(6)])
    packed = jk.gather_tokens(x, ids.flatten(), Packing.uniform(6, 4), backend=backend)
    assert torch.equal(packed.view(6, 4, 5), jk.gather_tokens(x, ids, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_torch_gather_exactly(dtype, backend):
    x, ids = torch.randn(2, 50, 37).to(dtype), torch.stack([torch.randperm(50)[:9].sort().values for _ in range(2)])
    assert torch.equal(jk.gather_tokens(x, ids, backend=backend), x.gather(1, ids[..., None].expand(-1, -1, 37)))


def test_repeated_gradients_are_summed_in_fp32(kernel):
    # 300 masks choose one token: bf16 sums would stop growing at 256
    x = torch.zeros(1, 1, 16, dtype=torch.bfloat16, requires_grad=True)
    out = jk.gather_tokens(x, torch.zeros(300, 1, dtype=torch.long), backend=kernel)
    assert torch.autograd.grad(out, x, torch.ones_like(out))[0].eq(300).all()


def test_large_outputs_take_the_streaming_path():
    x, ids = torch.randn(4, 64, 512), torch.arange(64).expand(256, 64).contiguous()
    out = jk.gather_tokens(x, ids, backend="cpu")  # 32 MB
    assert torch.equal(out, x.repeat(64, 1, 1))


def test_ids_out_of_range_read_nothing_when_unchecked(kernel):
    forward = torch.ops.jepa_kernels.gather_tokens_forward
    out = forward(torch.ones(1, 4, 3), torch.tensor([[0, 4, -1]]), None, kernel)
    assert out[0].tolist() == [[1] * 3, [0] * 3, [0] * 3]
    grad = torch.where(out > 0, 2.0, float("nan"))  # of what no token's row holds nothing may be used
    dx = torch.ops.jepa_kernels.gather_tokens_backward(grad, torch.tensor([[0, 4, -1]]), None, 1, 4, kernel)
    assert dx[0, :, 0].tolist() == [2, 0, 0, 0]


X, IDS = torch.randn(2, 6, 4), torch.tensor([[0, 2], [1, 5]])
BAD = [
    (dict(x=X[0]), ValueError, r"x must have shape \[B, N, E\], got \(6, 4\)"),
    (dict(x=X.int()), TypeError, "x must be of dtype .+, got int32"),
    (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    (dict(ids=IDS.float()), TypeError, "ids must be of dtype int64, got float32"),
    (dict(ids=IDS[0]), ValueError, r"ids must have shape \[M, K\], got \(2,\)"),
    (dict(ids=IDS + 1), ValueError, r"ids must lie in \[0, 6\) .+, got 6 at position 3; sort"),
    (dict(ids=IDS - 1), ValueError, r"ids must lie in \[0, 6\) .+, got -1 at position 0"),
    (
        dict(ids=torch.tensor([[0, 2], [3, 3]])),
        ValueError,
        r"ids must .+ increase within each row, got 3 at position 3",
    ),
    (dict(ids=IDS[:1]), ValueError, "ids must hold a multiple of the 2 images, got 1"),
    (dict(ids=IDS.t()), ValueError, "ids must be contiguous, got strides"),
    (dict(ids=IDS[0], packing=Packing.from_lengths([1, 2])), ValueError, "ids must hold packing.tokens = 3 ids, got 2"),
    (dict(ids=IDS[0], packing=Packing.from_lengths([2])), ValueError, "packing must hold a multiple of the 2 images"),
    (dict(x=X.to("meta")), ValueError, "ids must be on meta, got cpu"),
    (
        dict(x=X.to_sparse()),
        TypeError,
        r"x must be a strided tensor, got torch.sparse_coo; convert it with .to_d",
    ),
    (
        dict(x=torch.nested.nested_tensor([X[0], X[1, :3]], layout=torch.jagged)),
        TypeError,
        "x must be a strided tensor, got a nested tensor; pack it with jepa_kernels.pack",
    ),
    (dict(packing=IDS), TypeError, "packing must be a Packing, got Tensor; build one with Packing.from_lengths"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match="gather_tokens: " + message):
        jk.gather_tokens(**{**dict(x=X, ids=IDS), **change})
