"""grad_norm: values by hand, exactness where fp32 sums fail, specials, any thread count, errors."""

import math

import pytest
import torch

import jepa_kernels as jk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_by_hand(backend):
    norm = jk.grad_norm([torch.tensor([[3.0, 0.0]]), torch.tensor(4.0), torch.zeros(0)], backend=backend)
    assert norm.shape == () and norm.dtype == torch.float32 and norm.item() == 5.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 33, 16_383, 16_384, 16_385, 100_001])
def test_every_length_is_exact_to_the_last_bit(backend, dtype, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    assert jk.grad_norm([x], backend=backend) == x.double().norm().float()


def test_dtypes_may_be_mixed_and_none_is_left_out(backend):
    grads = [torch.full((9,), 2.0).to(d) for d in DTYPES]
    assert jk.grad_norm([None, *grads, None], backend=backend).item() == torch.tensor(108.0).sqrt().item()


def test_a_float64_gradient_anywhere_is_for_the_reference():
    grads = [torch.ones(100_000), torch.full((9,), 2.0, dtype=torch.float64)]
    assert jk.grad_norm(grads, backend="reference").item() == torch.tensor(100_036.0).sqrt().item()
    for _ in range(2):  # seen before, too
        with pytest.raises(jk.BackendError, match="takes float32, bfloat16, float16, got float64"):
            jk.grad_norm(grads, backend="cpu")


def test_the_cpu_kernel_refuses_types_it_is_not_built_for(restored_threads):
    torch.set_num_threads(2)  # one that threw would end the process
    grads = [torch.ones(100_000), torch.ones(100_000, dtype=torch.float64)]
    with pytest.raises(ValueError, match="tensors must be float32, bfloat16 or float16, got float64"):
        torch.ops.jepa_kernels.grad_norm_forward(grads, "cpu")


def test_no_gradients_have_norm_zero():
    assert jk.grad_norm([]).item() == 0.0 == jk.grad_norm([None]).item()


def test_many_small_values_beside_a_large_one_are_not_lost(backend):
    grads = [torch.tensor([4096.0]), torch.full((1 << 22,), 0.5)]  # each small square is below the large one's last bit
    exact = math.sqrt(4096.0**2 + (1 << 22) * 0.25)
    assert jk.grad_norm(grads, backend=backend).item() == torch.tensor(exact, dtype=torch.float64).float().item()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(backend, size):
    assert jk.grad_norm([torch.full((4,), size)], backend=backend).item() == pytest.approx(2 * size, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 20, 40, 20_000, -1])
def test_specials_propagate_from_every_place(backend, value, place, dtype):
    grads = [torch.ones(5), torch.ones(20_003, dtype=dtype)]
    grads[1][place] = value
    norm = jk.grad_norm(grads, backend=backend)
    assert norm.isnan() if math.isnan(value) else norm == float("inf")


def test_memory_beyond_a_tensor_is_not_read(backend):
    whole = torch.full((64,), float("nan"))
    whole[5:18] = 1.0
    assert jk.grad_norm([whole[5:18]], backend=backend).item() == torch.tensor(13.0).sqrt().item()


def test_torchs_clipping_finds_the_same_norm():
    params = [torch.nn.Parameter(torch.zeros(300, 70)) for _ in range(5)]
    for i, p in enumerate(params):
        p.grad = torch.randn(300, 70, generator=torch.Generator().manual_seed(i)) * 10.0**-i
    ours = jk.grad_norm([p.grad for p in params])
    assert ours.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(params, 1.0).item(), rel=1e-5)


def test_channels_last_gradients_are_taken_as_they_lie(backend):
    x = torch.randn(4, 3, 5, 5)
    last = x.to(memory_format=torch.channels_last)
    assert jk.grad_norm([last], backend=backend) == last.double().norm().float()


BAD = [
    (torch.zeros(3), TypeError, "grads must be a list of tensors, got Tensor; put it into a list"),
    (3, TypeError, "grads must be a list of tensors, got int"),
    ([1.0], TypeError, r"grads\[0\] must be a tensor, got float; convert it with torch.as_tensor"),
    ([torch.zeros(3), torch.zeros(3).int()], TypeError, r"grads\[1\] must be float32, bfloat16 or float16, got int32"),
    ([torch.zeros(3).cfloat()], TypeError, r"grads\[0\] must be float32, bfloat16 or float16, got complex64"),
    ([torch.zeros(3).to_sparse()], TypeError, r"grads\[0\] must be a strided tensor, got torch.sparse_coo; convert it"),
    ([torch.zeros(6)[::2]], ValueError, r"grads\[0\] must fill its memory without gaps, got strides \(2,\)"),
    (
        [torch.zeros(3), torch.zeros(3, device="meta")],
        ValueError,
        r"grads\[1\] must be on cpu, got meta; take the norm",
    ),
]


@pytest.mark.parametrize("grads, error, message", BAD, ids=[m[:50] for *_, m in BAD])
def test_bad_input_is_named(grads, error, message):
    with pytest.raises(error, match="grad_norm: " + message):
        jk.grad_norm(grads)


@pytest.mark.parametrize("size", [0, 8])
def test_a_gradient_whose_storage_was_freed_or_shrunk_is_refused(size):
    g = torch.ones(16)
    g.untyped_storage().resize_(size)
    with pytest.raises(ValueError, match=rf"grad_norm: grads\[1\] must hold its 64 bytes, got a storage with {size};"):
        jk.grad_norm([torch.ones(1), g])


def test_a_negated_view_is_refused():
    with pytest.raises(TypeError, match=r"grad_norm: grads\[0\] must be stored as it reads.+resolve_neg"):
        jk.grad_norm([torch._neg_view(torch.ones(4))])
