"""The interpreter that Triton kernels are tested in is itself exact."""

import importlib.util
import os
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.interp

if os.environ.get("TRITON_INTERPRET", "0") == "1":  # kernels are interpreted or compiled from their decoration on
    import triton
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    from jepa_kernels.verify.interpreter import TRAFFIC

    @triton.jit
    def _cast_kernel(x, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))

    @triton.jit
    def _dot_kernel(a, b, out, N: tl.constexpr):
        i = tl.arange(0, N)
        at = i[:, None] * N + i[None, :]
        tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))

    @triton.jit
    def _fma_kernel(x, y, z, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))

    @triton.jit
    def _add_kernel(x, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, tl.load(x + i) + tl.load(x + i))

    @triton.jit
    def _count_kernel(out, n, step):
        total = 0
        for i in range(0, n, step):
            total += i
        tl.store(out, total)

    @triton.jit
    def _number_kernel(out, x, y: tl.float64, pair):
        tl.store(out, x.to(tl.float64))
        tl.store(out + 1, y)
        tl.store(out + 2, pair[1].to(tl.float64))

    @triton.jit
    def _larger_kernel(x, y, out, N: tl.constexpr):
        i = tl.arange(0, N)
        a, b = tl.load(x + i), tl.load(y + i)
        tl.store(out + i, tl.maximum(a, b))
        tl.store(out + N + i, -tl.minimum(-a, -b))
        tl.store(out + 2 * N, tl.max(tl.maximum(a, b)))

    @triton.jit
    def _flag_kernel(flag, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, 1.0, mask=(i < N // 2) & (tl.load(flag) == 0))


def test_casts_to_bf16_round_to_nearest_even():
    special = [0.0, -0.0, float("inf"), float("nan"), 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, 1e-40]
    x = torch.cat([torch.randn(4096 - len(special)) * 100, torch.tensor(special)])
    out = torch.empty(4096, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, N=4096)
    expected = x.bfloat16()
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7)) and torch.equal(out.isnan(), expected.isnan())
    back = torch.empty(4096)
    _cast_kernel[(1,)](out, back, N=4096)
    assert torch.equal(back.nan_to_num(7), expected.float().nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_multiplies_values_and_adds_in_fp32(dtype):
    a, b = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, N=16)
    assert torch.allclose(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def test_fma_rounds_once():
    x, y = torch.randn(2, 1024)
    z = -(x * y)  # what a second rounding would lose
    z[::2] = torch.randn(512)
    z[1::4] *= 1 + 2**-12
    out = torch.empty(1024)
    _fma_kernel[(1,)](x, y, z, out, N=1024)
    for a, b, c, got in zip(x.tolist(), y.tolist(), z.tolist(), out.tolist(), strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        neighbours = torch.nextafter(torch.tensor(got), torch.tensor([float("-inf"), float("inf")])).tolist()
        assert all(abs(Fraction(got) - exact) <= abs(Fraction(other) - exact) for other in neighbours)


def test_arithmetic_on_bf16_raises():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="add of bf16: cast to fp32 first"):
        _add_kernel[(1,)](x, x, N=16)


def test_loops_take_run_time_bounds():
    out = torch.zeros(1, dtype=torch.int32)
    _count_kernel[(1,)](out, 10, 3)
    assert out.item() == 0 + 3 + 6 + 9


def test_the_larger_of_a_nan_and_a_number_is_the_number():
    nan, out = float("nan"), torch.empty(9)
    _larger_kernel[(1,)](torch.tensor([1.0, nan, nan, 2.0]), torch.tensor([nan, 1.0, nan, 3.0]), out, N=4)
    assert out.nan_to_num(7.0).tolist() == [1, 1, 7, 3, 1, 1, 7, 3, 3]


def test_floats_are_fp32_but_for_those_annotated_otherwise():
    out = torch.zeros(3, dtype=torch.float64)
    _number_kernel[(1,)](out, 0.1, y=0.1, pair=(1.0, 0.1))
    low = torch.tensor(0.1).item()
    assert out.tolist() == [low, 0.1, low] and low != 0.1


@pytest.mark.parametrize("flag, written", [(0.0, 8), (1.0, 0), (float("nan"), 0)])
def test_a_comparison_of_scalars_is_a_mask(flag, written):
    out = torch.zeros(16)
    _flag_kernel[(1,)](torch.tensor(flag), out, N=16)
    assert out.sum() == written


def operands(name):
    """Of a type, or of pointers: a scalar, a row and blocks."""
    dtype = tl.pointer_type(tl.float32) if name == "pointer" else getattr(tl, name)
    of_numpy = {"int1": bool, "bfloat16": np.uint16, "pointer": np.uint64}.get(name, name)
    for shape in ([], [4], [1, 4], [2, 4]):
        handle = TensorHandle(np.ones(shape or 1, of_numpy), dtype)
        yield tl.tensor(handle, tl.block_type(dtype, shape) if shape else dtype)


def outcome(function, *given):
    """Types, shapes and bits of what comes back, or the name of the error."""
    try:
        found = function(*given)
    except Exception as error:
        return type(error).__name__
    parts = found if isinstance(found, tuple) else (found,)
    return [(str(x.type), x.handle.data.dtype, x.handle.data.shape, x.handle.data.tobytes()) for x in parts]


def test_the_short_way_to_operands_leads_where_tritons_own_rules_do():
    spec = importlib.util.find_spec("triton.language.semantic")
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    own, short = (cls(interpreter_builder) for cls in (rules.TritonSemantic, TritonSemantic))
    assert own.cast.__code__ is not short.cast.__code__
    names = "int1", "int32", "int64", "uint32", "float16", "bfloat16", "float32", "float64"
    known = [x for name in (*names, "pointer") for x in operands(name)]
    numbers = [True, 0, 3, -1, 2**24 + 1, 2**31, 2**40, -0.0, 0.1, -2.5, 1e300, float("inf"), float("nan")]
    for a, b in [*product(known, known), *product(known, numbers), *product(numbers, known)]:
        for rest in ((), (True, True), (True, False), (False, False, True, True)):  # which may be pointers; a division
            expected = outcome(own.binary_op_type_checking_impl, a, b, *rest)
            assert outcome(short.binary_op_type_checking_impl, a, b, *rest) == expected, (a, b, rest)
    for x, name in product(known, names):
        assert outcome(short.cast, x, getattr(tl, name)) == outcome(own.cast, x, getattr(tl, name)), (x, name)


def test_traffic_is_counted():
    TRAFFIC.clear()
    _cast_kernel[(2,)](torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16), N=64)
    assert TRAFFIC == {"read": 2 * 64 * 4, "written": 2 * 64 * 2}


def test_what_a_scale_of_info_nce_gives_back_is_what_the_last_cut_takes():
    """Numbers of every mantissa, cut off after 24 bits as tensor cores leave their sums."""
    from jepa_kernels.ops.info_nce.triton_forward import LAST_CUT

    exact = torch.rand(100_000, dtype=torch.float64).exp2()  # in [1, 2)
    cut = (exact * 2**23).floor() / 2**23
    assert ((exact - cut) / exact).mean().item() == pytest.approx(LAST_CUT.value, rel=0.02)
    assert ((exact - cut * (1 + LAST_CUT.value)) / exact).mean().abs() < 0.02 * LAST_CUT.value
