"""rope: angles by hand, the published precision modes, exact transposes, queries and keys in one pass, and errors."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jepa_kernels as jk
from jepa_kernels import _C, Packing, Rope
from jepa_kernels._core.define import _implementations
from tests.ops.conftest import LEVELS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def turned(x, turns, half):
    """One fused multiply-add after a rounded product, from the table; x token-major [..., H, D]."""
    cos, sin = turns.unsqueeze(-3).unbind(-2)
    i = torch.arange(turns.shape[-1])
    partner = (i + len(i) // 2) % len(i) if half else i ^ 1
    second = x[..., partner].float() * sin
    y = (x[..., : len(i)].double() * cos.double() + second.double()).float()
    return torch.cat([y.to(x.dtype), x[..., len(i) :]], -1)


def test_three_axes_by_hand(backend):
    # D = 6: one pair for each axis, frequency 1
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]]])
    out = jk.rope(x, torch.tensor([[1, 2, 3]]), backend=backend)[0, 0]
    s, c = [math.sin(p) for p in (1, 2, 3)], [math.cos(p) for p in (1, 2, 3)]
    torch.testing.assert_close(out, torch.tensor([c[0], s[0], -s[1], c[1], c[2] - s[2], s[2] + c[2]]))


def test_positions_between_patches_by_hand(backend):
    x = torch.tensor([[[1.0, 0.0]]] * 2)
    out = jk.rope(x, torch.tensor([[0.5], [-2.25]]), backend=backend)[:, 0]
    torch.testing.assert_close(out, torch.tensor([[math.cos(p), math.sin(p)] for p in (0.5, -2.25)]))


def test_integer_positions_equal_floats(backend):
    x, places = torch.randn(4, 2, 12), torch.tensor([[0, 1, 2], [7, 15, 3], [1, 1, 1], [3, 0, 9]])
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.bfloat16):
        assert torch.equal(jk.rope(x, places.to(dtype), backend=backend), jk.rope(x, places.float(), backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing, axes", [("interleaved", 3), ("tiled", 3), ("tiled", 2), ("half", 1)])
def test_any_head_dim_has_the_bits_of_the_formula(dtype, pairing, axes):
    for width in range(2 * axes, 257):
        x, rope = torch.randn(2, 2, width).to(dtype), Rope(torch.randint(-40, 40, (2, axes)), pairing=pairing)
        assert torch.equal(jk.rope(x, rope, backend="cpu"), turned(x, rope.turns(width)[0], rope.half)), width


@pytest.mark.parametrize("pairing, axes, width", [("interleaved", 3, 31), ("tiled", 2, 24), ("half", 1, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_has_the_bits_of_the_formula(backend, dtype, pairing, axes, width):
    x, rope = torch.randn(5, 3, width).to(dtype), Rope(torch.rand(5, axes) * 30, pairing=pairing)
    assert torch.equal(jk.rope(x, rope, backend=backend), turned(x, rope.turns(width)[0], rope.half))


def unit(width):
    """[1, width, width]: a head for each unit vector."""
    return torch.eye(width)[None]


@pytest.mark.parametrize("pairing, axes, width", [("interleaved", 3, 26), ("tiled", 3, 32), ("half", 1, 21)])
def test_the_gradient_is_the_exact_transpose(backend, pairing, axes, width):
    rope = Rope(torch.tensor([[3.5, 7.0, 11.0]])[:, :axes], pairing=pairing)
    x = unit(width).requires_grad_()
    forward = jk.rope(x, rope, backend=backend)  # row i: the matrix applied to unit vector i
    (back,) = torch.autograd.grad(forward, x, unit(width))
    assert torch.equal(back[0], forward.detach()[0].T)
    x, g = torch.randn(1, 4, width, requires_grad=True), torch.randn(1, 4, width)
    out = jk.rope(x, rope, backend=backend)
    (dx,) = torch.autograd.grad(out, x, g)
    assert ((out * g).double().sum() - (x * dx).double().sum()).abs() < 1e-5


def scores(pairing, pairs):
    q, k = (1.0 - torch.arange(20.0) / 10, torch.cos(torch.arange(20.0)))  # one axis, D = A = 20
    q, k = (x.view(1, 1, 20) for x in (q, k))
    turn = lambda x, p: jk.rope(x, torch.tensor([[p]]), pairing=pairing, backend="cpu").double()  # noqa: E731
    return [float((turn(q, p) * turn(k, r)).sum()) for p, r in pairs]


def test_interleaved_keeps_norms_and_sees_differences_only():
    x, places = torch.randn(50, 2, 64), torch.randint(0, 40, (50, 3))
    out = jk.rope(x, places, backend="cpu")
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
    near, far = scores("interleaved", [(3.0, 1.0), (13.0, 11.0)])
    assert abs(near - far) < 1e-5


def test_tiled_does_neither_as_published():
    # A pair's channels turn by 7 w[0] = 7 and 7 w[1] = 7 / 100: of the unit vector, cos 7 and sin 0.07 remain.
    x = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    out = jk.rope(x, torch.tensor([[7.0]]), pairing="tiled", backend="cpu")[0, 0]
    torch.testing.assert_close(out, torch.tensor([math.cos(7.0), math.sin(0.07), 0.0, 0.0]))
    assert out.norm().item() == pytest.approx(0.757143, abs=1e-5)
    near, far = scores("tiled", [(3.0, 1.0), (13.0, 11.0)])
    assert abs(near - far) > 0.1


def published(x, places, exponent, power, angle):
    """(turned x, cosines and sines of its channels, frequencies) as a precision mode of the published code computes
    them: the types of exponents, of powers, and of angles with their cosines; products in the type that results."""
    exponents = torch.arange(10, dtype=exponent) / torch.tensor(10.0).to(exponent)
    frequencies = (1.0 / 10000 ** exponents.to(power)).to(power)
    angles = places.to(angle)[..., None] * frequencies.to(angle)
    cos, sin = (f.repeat(1, 1, 2).flatten(1) for f in (angles.cos(), angles.sin()))  # 20 channels an axis
    even, odd = x[..., :60].unflatten(-1, (-1, 2)).unbind(-1)
    y = x[..., :60] * cos[:, None] + torch.stack((-odd, even), -1).flatten(-2) * sin[:, None]
    return torch.cat([y, x[..., 60:].to(y.dtype)], -1), (cos, sin), frequencies.float()


F32, BF16 = torch.float32, torch.bfloat16
# mode, dtypes of x, exponents, powers and angles: without autocast; under CUDA's; a bf16 module; under the CPU's, whose
# powers are low, with integer and with float positions.
MODES = [
    ("fp32 module", F32, F32, F32, F32),
    ("CUDA autocast", BF16, BF16, F32, F32),
    ("bf16 module", BF16, BF16, BF16, BF16),
    ("CPU autocast, integer positions", BF16, BF16, BF16, BF16),
    ("CPU autocast, float positions", BF16, BF16, BF16, F32),
    ("fp16 module, float positions", torch.float16, torch.float16, torch.float16, F32),
]


@pytest.mark.parametrize("mode, dtype, exponent, power, angle", MODES, ids=[m[0] for m in MODES])
def test_each_published_precision_mode_is_reproduced(backend, mode, dtype, exponent, power, angle):
    places = torch.stack([torch.arange(32), torch.arange(32) % 24, 31 - torch.arange(32)], 1)
    x = torch.randn(32, 2, 64).to(dtype)
    expected, (cos, sin), frequencies = published(x, places, exponent, power, angle)
    options = dict(frequencies=frequencies, angle_dtype=angle)
    found = jk.rope(x, places, pairing="tiled", backend=backend, **options)
    # What is left: how often a sum of two products, here up to 4, is rounded to x's type.
    assert (found.float() - expected.float()).abs().max() < 4 * 4 * torch.finfo(dtype).eps
    table, default = (Rope(places, pairing="tiled", **o).turns(64)[0] for o in (options, {}))
    ulp = 0 if angle == BF16 else 6e-8
    assert (table[:, 0] - cos).abs().max() <= ulp and (table[:, 1].abs() - sin.abs()).abs().max() <= ulp
    apart = (default[:, 0] - cos).abs().max()
    assert apart < 1e-6 if mode == "fp32 module" else apart > 1e-3, "the default is fp32 throughout"


def test_autocast_frequencies_differ_as_published():
    exponents = (torch.arange(10) / 10).bfloat16().float()
    low, full = 10000.0**-exponents, 10000.0 ** -(torch.arange(10) / 10)
    percent = (100 * (low / full - 1)).tolist()
    assert [round(percent[j], 2) for j in (3, 6, 7, 9)] == [-0.72, -1.43, 0.72, 1.45]


def qkv_of(batched, dtype=torch.float32):
    if batched:
        return torch.randn(2, 9, 3, 4, 32).to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return torch.randn(9, 3, 4, 32).to(dtype).unbind(1)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_and_keys_together_equal_each_alone(backend, batched, dtype):
    q, k, _ = qkv_of(batched, dtype)
    rope = Rope(torch.rand(9, 3) * 9, pairing="tiled")
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    both = jk.rope_qk(*leaves, rope, backend=backend)
    grads = torch.autograd.grad(both, leaves, [q, k])
    for x, out, grad in zip((q, k), both, grads, strict=True):
        leaf = x.detach().requires_grad_()
        alone = jk.rope(leaf, rope, backend=backend)
        assert torch.equal(out, alone) and torch.equal(grad, torch.autograd.grad(alone, leaf, x)[0])


def test_keys_may_have_tokens_heads_and_positions_of_their_own(backend):
    q, k, places, k_places = torch.randn(5, 4, 16), torch.randn(8, 2, 16), torch.rand(5, 2), torch.rand(8, 2)
    options = dict(pairing="tiled", theta=100.0, backend=backend)
    found = jk.rope_qk(q, k, places, k_positions=k_places, **options)
    assert torch.equal(found[0], jk.rope(q, places, **options))
    assert torch.equal(found[1], jk.rope(k, k_places, **options))


def test_a_gradient_of_one_alone(backend):
    q, k, places = torch.randn(3, 2, 8), torch.randn(3, 1, 8, requires_grad=True), torch.rand(3, 1)
    one, other = jk.rope_qk(q, k, places, backend=backend)
    expected = torch.autograd.grad(jk.rope(k, places, backend=backend), k, torch.ones_like(k))
    assert one.requires_grad and torch.equal(torch.autograd.grad(other, k, torch.ones_like(k))[0], expected[0])


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batched", [False, True])
def test_views_of_a_qkv_product_are_read_in_place(backend, batched):
    q, k, _ = qkv_of(batched)
    leaves = [x.detach().requires_grad_() for x in (q, k)]  # views still
    rope = Rope(torch.rand(9, 3))
    rope.turns(32)
    with _Ops() as ops:
        both = jk.rope_qk(*leaves, rope, backend=backend)
        torch.autograd.grad(both, leaves, [q, k])
    views = {"aten::transpose", "aten::expand", "aten::detach", "aten::view", "aten::t"}
    allocations = {"aten::new_empty"}
    launched = [n for n in ops.names if n not in views | allocations]
    assert launched == ["jepa_kernels::rope_forward", "jepa_kernels::rope_backward"]
    assert not leaves[0].is_contiguous() and all(x.transpose(-2, -3).is_contiguous() or not batched for x in both)


def test_the_result_is_fresh_and_the_input_as_before(backend):
    x, places = torch.randn(2, 3, 4, 20), torch.zeros(4, 3)
    before = x.clone()
    out = jk.rope(x, places, backend=backend)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()
    out.zero_()
    assert torch.equal(x, before)


def test_channels_that_stay_are_copied_bit_by_bit(backend):
    x = torch.zeros(1, 1, 17)
    x[..., 12:] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45, -3.0])
    x[..., 0] = float("nan")
    out = jk.rope(x, torch.ones(1, 3), backend=backend)
    assert torch.equal(out[..., 12:].view(torch.int32), x[..., 12:].view(torch.int32))
    assert out[..., :2].isnan().all() and out[..., 2:12].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing, axes", [("interleaved", 3), ("tiled", 3), ("half", 1), ("tiled", 2)])
@pytest.mark.parametrize("name", ["cpu", pytest.param("triton", marks=pytest.mark.interp), "reference", "sdpa"])
def test_attention_with_a_rope_equals_attention_behind_rope_exactly(name, pairing, axes, dtype):
    packing = Packing.from_lengths([5, 0, 70, 21])
    width = 64 if (name, pairing) == ("triton", "half") else 40  # else its attention adds products in another order
    q, k, v = torch.randn(96, 3, 4, width).to(dtype).unbind(1)
    rope = Rope(torch.randint(0, 30, (96, axes)), torch.rand(96, axes) * 9, pairing=pairing)
    turned = jk.rope_qk(q, k, rope, backend=name if name != "sdpa" else "reference")
    fused = jk.masked_attention(q, k, v, packing, rope=rope, backend=name)
    assert torch.equal(fused, jk.masked_attention(*turned, v, packing, backend=name))


def test_dense_attention_with_a_rope_equals_attention_behind_rope_exactly(backend):
    q, k, v = qkv_of(True)
    rope = Rope(torch.rand(2, 9, 3) * 20, pairing="tiled")
    fused = jk.masked_attention(q, k, v, rope=rope, backend=backend)
    assert torch.equal(fused, jk.masked_attention(*jk.rope_qk(q, k, rope, backend=backend), v, backend=backend))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "pairing, axes, width", [("interleaved", 3, 64), ("tiled", 3, 80), ("tiled", 3, 33), ("half", 1, 40)]
)
def test_the_table_of_the_kernel_holds_rounded_cosines_and_sines(level, pairing, axes, width):
    places = torch.cat([torch.randint(0, 300, (60, axes)).float(), torch.rand(400, axes) * 2e5 - 1e5])
    places[::7] = places[0]  # positions that repeat
    _C.set_isa(level)
    table = torch.ops.jepa_kernels.rope_turns(places, None, 10000.0, pairing, width, "cpu")
    _C.set_isa("best")
    (cos, sin), pairs = table.double().unbind(1), width // axes // 2
    frequencies = torch.tensor([10000.0 ** -(j / pairs) for j in range(pairs)])
    i = torch.arange(2 * pairs)
    angles = (places[..., None] * frequencies[i // 2 if pairing == "interleaved" else i % pairs]).flatten(1).double()
    sign = torch.where(i < pairs if pairing == "half" else i % 2 == 0, -1.0, 1.0).repeat(axes)
    for found, exact in ((cos, angles.cos()), (sin, sign * angles.sin())):
        half_ulp = 2.0 ** (exact.frexp().exponent - 25)
        assert ((found - exact).abs() <= half_ulp + 1e-12).all()


def test_the_plain_table_is_within_an_ulp():
    rope = Rope(torch.rand(50, 3) * 100, pairing="tiled")
    assert (rope.turns(32, plain=True)[0] - rope.turns(32)[0]).abs().max() <= 6e-8


@pytest.mark.parametrize("compiled", [False, True])
def test_the_reference_computes_its_table_in_plain_pytorch(monkeypatch, compiled):
    x, rope = torch.randn(1, 2, 4, 16), Rope(torch.rand(4, 3), torch.rand(4, 3))
    kernels = torch.stack(rope.turns(16))  # a table that the kernels have left

    def refuse(*_):
        raise AssertionError("the reference must call no kernel")

    def call():
        rotated = (
            jk.rope(x, rope),
            *jk.rope_qk(x, x, rope),
            *jk.rope_qk(x, x, rope.positions, k_positions=rope.k_positions),
        )
        return *rotated, jk.masked_attention(x, x, x, rope=rope)

    monkeypatch.setitem(_implementations, ("rope", "turns", "cpu"), refuse)
    rope._turns[16, False] = tuple(torch.full_like(kernels, math.nan))
    with jk.use_backend("reference"):
        found = torch.compile(call, backend="aot_eager", fullgraph=True)() if compiled else call()
    assert all(y.isfinite().all() for y in found)


def test_angles_that_are_no_numbers_or_very_large(backend):
    x, far = torch.tensor([[[1.0, 0.0]]] * 4), torch.tensor([[1e7], [-3e8], [math.inf], [math.nan]])
    out = jk.rope(x, far, backend=backend)[:, 0]
    wanted = [[math.cos(p), math.sin(p)] for p in far[:2, 0].tolist()]
    torch.testing.assert_close(out[:2], torch.tensor(wanted))
    assert out[2:].isnan().all()


def test_a_rope_in_place_of_positions(backend):
    x, places = torch.randn(2, 3, 4, 16), torch.rand(2, 4, 2)
    rope = Rope(places, pairing="tiled", theta=50.0)
    expected = jk.rope(x, places, pairing="tiled", theta=50.0, backend=backend)
    assert torch.equal(jk.rope(x, rope, backend=backend), expected)
    assert torch.equal(jk.rope_qk(x, x, rope, backend=backend)[1], expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_the_pair_compiles_once_static_and_once_dynamic(compiler):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def call(qkv, places):
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        return jk.rope_qk(q, k, places, pairing="tiled", backend="cpu")

    function = torch.compile(call, fullgraph=True, backend=counter)
    for tokens in (5, 7, 16, 3):
        qkv, places = torch.randn(2, tokens, 3, 2, 24, requires_grad=True), torch.rand(2, tokens, 3) * 9
        results = []
        for f in (function, call):
            out = f(qkv, places)
            results.append([*out, *torch.autograd.grad([x.sum() for x in out], qkv)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count <= 2


def test_opcheck_of_the_pair():
    q, k, turns = torch.randn(5, 4, 32), torch.randn(5, 2, 32), ROPE.turns(32)[0]
    torch.library.opcheck(torch.ops.jepa_kernels.rope_forward.default, (q, k, turns, turns, False, "cpu"))
    leaves = [x.requires_grad_() for x in (q, k)]
    torch.library.opcheck(torch.ops.jepa_kernels.rope.default, (*leaves, turns, turns, False, "cpu"))


@pytest.mark.parametrize("given", [True, False])
def test_a_rope_made_before_serves_compiled_code(given):
    torch._dynamo.reset()
    function = torch.compile(lambda x, rope: jk.rope(x, rope, backend="cpu"), fullgraph=True, backend="aot_eager")
    for tokens in (4, 6, 9):
        x, rope = torch.randn(tokens, 2, 12), Rope(torch.rand(tokens, 3) * 30, pairing="tiled")
        if given:
            rope.turns(12)
        with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
            assert torch.equal(function(x, rope), jk.rope(x, rope, backend="cpu"))


def test_explain_knows_the_pair():
    q = torch.zeros(3, 2, 8)
    assert jk.explain("rope_qk", q, q, torch.zeros(3, 1)).splitlines()[0] == "rope_qk: cpu (automatic)"


X, P = torch.randn(5, 4, 32), torch.rand(5, 3)
DENSE, ROPE = torch.randn(2, 4, 6, 32), Rope(torch.rand(5, 3))
BAD = [
    (dict(x=[1.0]), TypeError, "rope: x must be a tensor, got list"),
    (dict(x=X.int()), TypeError, "rope: x must be of dtype .+, got int32"),
    (dict(x=X[0]), ValueError, r"rope: x must have shape \[T, H, D\], got \(4, 32\); reshape it"),
    (dict(x=X.to_sparse()), TypeError, r"rope: x must be a strided tensor, got torch.sparse_coo; convert it with"),
    (dict(positions=P[:4]), ValueError, r"rope: positions must be of x's tokens \(5,\), got \(4,\); pass a position"),
    (dict(x=DENSE), ValueError, r"rope: positions must be of x's tokens \(6,\), got \(5,\)"),
    (dict(x=DENSE, positions=torch.rand(3, 6, 3)), ValueError, r"rope: .+ x's tokens \(2, 6\), got \(3, 6\)"),
    (dict(positions=torch.rand(1, 5, 3)), ValueError, r"rope: positions must be of x's tokens \(5,\), got \(1, 5\)"),
    (dict(positions=P.to("meta")), ValueError, "rope: positions must be on cpu like x, got meta; move it"),
    (dict(x=X[..., :5]), ValueError, r"rope: x must have a head dim D in 6..256 for 3 axes, got 5; give every axis"),
    (dict(x=torch.zeros(5, 1, 257)), ValueError, r"rope: x must have a head dim D in 6..256 for 3 axes, got 257"),
    (dict(positions=[1]), TypeError, "Rope: positions must be a tensor, got list"),
    (dict(positions=P.bool()), TypeError, "Rope: positions must be integers or floats, got torch.bool"),
    (dict(positions=torch.rand(5, 4)), ValueError, r"Rope: positions must have shape .+ 1 to 3 axes, got \(5, 4\)"),
    (dict(pairing="neox"), ValueError, "Rope: pairing must be one of interleaved, tiled, half, got 'neox'"),
    (dict(theta=-1.0), ValueError, "Rope: theta must be finite and greater than 0, got -1.0"),
    (dict(frequencies=torch.ones(4)), ValueError, "Rope: frequencies must hold A / 2 = 5 numbers .+, got 4"),
    (dict(angle_dtype=torch.int8), TypeError, "Rope: angle_dtype must be float32, .+, got torch.int8"),
    (dict(positions=ROPE, pairing="tiled"), ValueError, r"rope: pairing must be left out where positions is a Rope, g"),
    (dict(positions=ROPE, theta=5.0), ValueError, r"rope: theta must be left out .+; give it to Rope\(theta=...\)"),
    (dict(positions=ROPE, frequencies=torch.ones(5)), ValueError, "rope: frequencies must be left out where"),
    (dict(positions=ROPE, angle_dtype=torch.bfloat16), ValueError, "rope: angle_dtype must be left out where"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:50] for *_, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        jk.rope(**{**dict(x=X, positions=P), **change})


BAD_PAIRS = [
    (dict(k=X.half()), TypeError, "k must be of dtype float32 like q, got float16; cast both alike"),
    (dict(k=X[..., :16]), ValueError, r"k must fit q's shape \(5, 4, 32\) but for tokens and heads, got \(5, 4, 16\)"),
    (dict(k=X[:3]), ValueError, r"k_positions must be of k's tokens \(3,\), got \(5,\); pass a position"),
    (dict(k_positions=P[:4]), ValueError, r"k_positions must be of k's tokens \(5,\), got \(4,\)"),
    (dict(k=DENSE), ValueError, r"k_positions must be of k's tokens \(6,\), got \(5,\)"),
    (dict(positions=ROPE, k_positions=P), ValueError, "k_positions must be left out where positions is a Rope"),
    (dict(q=X[0]), ValueError, r"q must have shape \[T, H, D\], got \(4, 32\)"),
]


@pytest.mark.parametrize("change, error, message", BAD_PAIRS, ids=[m[:50] for *_, m in BAD_PAIRS])
def test_bad_input_of_the_pair_is_named(change, error, message):
    with pytest.raises(error, match="rope_qk: " + message):
        jk.rope_qk(**{**dict(q=X, k=X, positions=P), **change})


def test_the_torch_op_reads_nothing_outside_its_tensors():
    forward, turns = torch.ops.jepa_kernels.rope_forward, ROPE.turns(32)[0]
    for wrong, message in (
        (turns[:4], "turns must have a row for every token"),
        (turns.double(), "turns must be fp32"),
        (torch.zeros(5, 2, 34), "turns must hold an even number of channels, at most D"),
        (turns.transpose(1, 2).contiguous().transpose(1, 2), "turns must have contiguous rows"),
    ):
        with pytest.raises(ValueError, match=f"rope: {message}.*; call the public function"):
            forward(X, None, wrong, None, False, "cpu")
    with pytest.raises(ValueError, match="rope: keys must have turns"):
        forward(X, X, turns, None, False, "cpu")
