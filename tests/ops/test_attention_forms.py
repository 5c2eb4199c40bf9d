"""masked_attention's forms: one qkv, parts joined by their lse; what PyTorch counts, compiles and computes again."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import jepa_kernels as jk
from jepa_kernels import Packing, Rope

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (0, 5, 70, 64)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def packed_qkv(width=24, heads=2, dtype=torch.float32):
    return torch.randn(sum(LENGTHS), 3, heads, width, dtype=dtype), Packing.from_lengths(LENGTHS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [True, False])
def test_one_qkv_gives_the_bits_of_its_views_and_one_gradient(packed, dtype, backend):
    if packed:
        qkv, packing = packed_qkv(dtype=dtype)
        views = qkv.requires_grad_().unbind(1)
        rope = Rope(torch.rand(len(qkv), 3) * 9)
    else:
        qkv, packing = torch.randn(2, 30, 3, 2, 24, dtype=dtype), None
        views = [x.transpose(1, 2) for x in qkv.requires_grad_().unbind(2)]
        rope = Rope(torch.rand(30, 3) * 9, pairing="tiled")
    expected = jk.masked_attention(*views, packing, rope=rope, backend=backend)
    out = jk.masked_attention_qkv(qkv, packing, rope=rope, backend=backend)
    weights = torch.randn_like(out)
    assert torch.equal(out, expected)
    wanted, got = (torch.autograd.grad((x * weights).sum(), qkv)[0] for x in (expected, out))
    assert torch.equal(got, wanted) and got.is_contiguous()


def test_the_qkv_form_passes_opcheck():
    qkv, packing = packed_qkv()
    cu, tiles = packing.cu_seqlens, packing.tiles
    turns = Rope(torch.rand(len(qkv), 1), pairing="half").turns(24)
    call = (qkv.requires_grad_(), cu, cu, tiles, tiles, 70, 70, 0, None, *turns, True, 0.2, "cpu")
    torch.library.opcheck(torch.ops.jepa_kernels.masked_attention_qkv.default, call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["packed", "dense"])
def test_parts_of_the_keys_join_to_the_whole(shape, dtype, backend):
    if shape == "packed":
        q, k, v = (torch.randn(20, 2, 16, dtype=dtype) for _ in range(3))
        queries, whole = Packing.from_lengths([8, 12]), Packing.from_lengths([8, 12])
        rows = torch.arange(20)
        parts = [
            (rows < 8) | (rows % 2 == 0),
            (rows >= 8) & (rows % 2 == 1),
        ]  # none of sequence 0 in the second
        packings = [Packing.from_lengths([8, 6]), Packing.from_lengths([0, 6])]
        calls = [(q, k[p], v[p], queries) for p in parts]
        found = [
            jk.masked_attention_lse(*c, k_packing=p, backend=backend) for c, p in zip(calls, packings, strict=True)
        ]
        expected = jk.masked_attention_lse(q, k, v, whole, backend=backend)
    else:
        q, k, v = (torch.randn(2, 2, n, 16, dtype=dtype) for n in (5, 9, 9))
        found = [
            jk.masked_attention_lse(q, k[:, :, part], v[:, :, part], backend=backend)
            for part in (slice(0, 4), slice(4, 9), slice(9, 9))
        ]
        expected = jk.masked_attention_lse(q, k, v, backend=backend)
    out, lse = jk.merge_attention(*zip(*found, strict=True))
    low = dtype == torch.bfloat16
    torch.testing.assert_close(out, expected[0], rtol=2e-2 if low else 1e-5, atol=1e-2 if low else 1e-6)
    torch.testing.assert_close(lse, expected[1], rtol=1e-5, atol=1e-5)


def test_queries_that_no_part_serves_merge_to_0():
    out, lse = jk.merge_attention([torch.randn(3, 2, 8)] * 2, [torch.full((2, 3), -torch.inf)] * 2)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()


OUT, LSE = torch.randn(3, 2, 8), torch.randn(2, 3)


@pytest.mark.parametrize(
    "outs, lses, error, message",
    [
        ([], [], ValueError, "lses must hold one tensor for each of outs, at least one, got 0 and 0; pass pairs"),
        ([OUT], [LSE, LSE], ValueError, "lses must hold one tensor for each of outs, at least one, got 1 and 2"),
        ([OUT, OUT[:2]], [LSE, LSE], ValueError, r"outs\[1\] must be like outs\[0\], \(3, 2, 8\), got \(2, 2, 8\)"),
        ([OUT], [LSE.T], ValueError, r"lses\[0\] must have shape \(2, 3\), got \(3, 2\); pass what"),
        (OUT, LSE, TypeError, "outs and lses must be lists of tensors, got a tensor; pass one entry for each part"),
        ([OUT, OUT.half()], [LSE, LSE], TypeError, r"outs\[1\] must be float32 like outs\[0\], got float16; cast them"),
        ([OUT.clone().requires_grad_()], [LSE], ValueError, r"outs\[0\] must need no gradient, got .+; merge under"),
        ([OUT], [LSE.half()], TypeError, r"lses\[0\] must be of dtype float32, float64, got float16"),
    ],
)
def test_merging_bad_parts_is_named(outs, lses, error, message):
    with pytest.raises(error, match="merge_attention: " + message):
        jk.merge_attention(outs, lses)


def test_lse_has_no_gradient_and_disturbs_none():
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    out, lse = jk.masked_attention_lse(q, k, v, backend="cpu")
    assert not lse.requires_grad
    wanted = torch.autograd.grad(jk.masked_attention(q, k, v, backend="cpu").sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), wanted, strict=True))


def test_torch_kernels_that_give_no_lse_are_refused():
    q = torch.randn(1, 1, 3, 8)
    with pytest.raises(jk.BackendError, match=r"masked_attention: backend 'sdpa' .+ got: gives no lse"):
        jk.masked_attention_lse(q, q, q, backend="sdpa")


def test_qkv_of_another_shape_is_named():
    with pytest.raises(
        ValueError, match="masked_attention_qkv: qkv must have 3 as its third last dimension, got 2; use"
    ):
        jk.masked_attention_qkv(torch.randn(4, 2, 2, 8), Packing.from_lengths([4]))
    with pytest.raises(ValueError, match=r"masked_attention_qkv: qkv must have shape \[B, N, 3, H, D\], got \(4, 3, 2"):
        jk.masked_attention_qkv(torch.randn(4, 3, 2, 8))


def test_flops_are_counted_from_the_pairs():
    qkv, packing = packed_qkv()
    with FlopCounterMode(display=False) as forward:
        out = jk.masked_attention_qkv(qkv.requires_grad_(), packing, backend="cpu")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert packing.pairs == 5 * 5 + 70 * 70 + 64 * 64
    assert forward.get_total_flops() == 2 * 2 * packing.pairs * 2 * 24
    assert backward.get_total_flops() == 5 * 2 * packing.pairs * 2 * 24


def test_flops_are_counted_whichever_import_comes_first():
    code = (
        "import jepa_kernels as jk, torch; from torch.utils.flop_counter import FlopCounterMode as F\n"
        "q = torch.zeros(1, 1, 4, 8)\n"
        "with F(display=False) as counter: jk.masked_attention(q, q, q, backend='cpu')\n"
        "print(counter.get_total_flops())"
    )
    for swap in (False, True):
        lines = code.split("; ", 1) if swap else [code]
        done = subprocess.run(
            [sys.executable, "-c", "import torch.utils.flop_counter\n" * swap + "; ".join(lines)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == str(2 * 2 * 4 * 4 * 8)


def self_attention(lengths):
    packing = Packing.from_lengths(lengths)
    return torch.randn(packing.tokens, 3, 2, 16), packing, torch.rand(packing.tokens, 3)


def cross_attention(lengths):
    q, k = (Packing.from_lengths(n) for n in (lengths, [2 * n for n in reversed(lengths)]))
    return torch.randn(q.tokens, 2, 16), torch.randn(k.tokens, 2, 16), q, k


def call_self(qkv, packing, positions):
    return jk.masked_attention_qkv(qkv, packing, rope=Rope(positions), backend="cpu")


def call_cross(q, kv, packing, k_packing):
    return jk.masked_attention(q, kv, kv, packing, k_packing=k_packing, backend="cpu")


@pytest.mark.parametrize("call, make", [(call_self, self_attention), (call_cross, cross_attention)])
def test_lengths_that_change_at_random_compile_at_most_twice_more(call, make):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, generator = torch.compile(call, fullgraph=True, backend=counter), torch.Generator().manual_seed(0)
    for _ in range(50):
        inputs = make(torch.randint(1, 40, (4,), generator=generator).tolist())
        assert torch.equal(compiled(*inputs), call(*inputs))
    assert counter.frame_count <= 3


def test_checkpointed_activations_give_the_same_gradients():
    qkv, packing = packed_qkv()
    grads = []
    for again in (False, True):
        leaf = qkv.detach().requires_grad_()
        call = partial(jk.masked_attention_qkv, leaf, packing, backend="cpu")
        out = checkpoint(call, use_reentrant=False) if again else call()
        out.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("lengths", [(1,) * 100_000, (20_000,)], ids=["100000 sequences", "one of 20000 tokens"])
def test_many_and_long_sequences(lengths):
    packing = Packing.from_lengths(lengths)
    q, k, v = torch.randn(3, packing.tokens, 1, 8).unbind(0)
    q[-1], q[0] = 0, 0  # sees all keys alike
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = jk.masked_attention_lse(*leaves, packing, backend="cpu")
    n = lengths[0]
    for s, row in ((0, 0), (-1, -1)):
        torch.testing.assert_close(out[row], packing.split(v)[s].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse[0, [0, -1]].exp(), torch.tensor([float(n)] * 2), rtol=1e-4, atol=0)
    _, _, dv = torch.autograd.grad(out.sum(), leaves)
    torch.testing.assert_close(dv.sum(), torch.tensor(float(packing.tokens * 8)), rtol=1e-4, atol=0)


def test_explain_knows_the_forms():
    qkv, packing = packed_qkv()
    assert jk.explain("masked_attention_qkv", qkv, packing).startswith("masked_attention_qkv: cpu (automatic)")
    lines = jk.explain("masked_attention_lse", *qkv.unbind(1), packing).splitlines()
    assert [line.split(None, 1)[1] for line in lines if line.split()[0] == "sdpa"] == ["gives no lse"]


RAW = torch.randn(14, 2, 16)
CU, TURNS = Packing.from_lengths([5, 9]).cu_seqlens, torch.zeros(14, 2, 12)


def test_a_head_dim_that_compiled_code_does_not_know():
    """Of weights that FSDP2 gathers it is a symbol: no check may ask for a number."""
    attend = torch.compile(jk.masked_attention, dynamic=True, fullgraph=True, backend="aot_eager")
    for width in (16, 24):
        qkv = torch.randn(3, 1, 2, 5, width)
        assert attend(*qkv).equal(jk.masked_attention(*qkv))


@pytest.mark.parametrize(
    "change, message",
    [
        ({3: None, 4: None}, "q, k and v must have 3 dimensions with cu_seqlens, 4 without"),
        ({4: None}, "cu_seqlens and k_cu_seqlens must be given together"),
        ({4: CU[:2]}, "cu_seqlens and k_cu_seqlens must have one length"),
        ({2: RAW[:3]}, "v must have k's shape"),
        ({1: RAW.half()}, "q, k and v must have one dtype"),
        ({10: torch.zeros(2, 2, dtype=torch.int32)}, "a table must have a row for every token"),
        ({10: torch.zeros(14, 2, dtype=torch.int64)}, "a table must have its dtype and rank"),
        ({11: TURNS}, "turns and k_turns must be given together"),
        ({11: torch.zeros(14, 2, 300), 12: TURNS}, "turns must hold the cosine and sine of an even number"),
    ],
)
def test_the_raw_op_touches_no_memory_that_is_not_its_own(change, message):
    call = [RAW, RAW, RAW, CU, CU, None, None, 9, 9, 0, None, None, None, False, 0.2, "cpu"]
    torch.ops.jepa_kernels.masked_attention_forward(*call)
    for position, value in change.items():
        call[position] = value
    with pytest.raises(ValueError, match=f"masked_attention: {message}.*; call the public function"):
        torch.ops.jepa_kernels.masked_attention_forward(*call)


@pytest.mark.parametrize(
    "position, wrong, message",
    [
        (0, RAW.half(), "grad and out must have q's shape and dtype"),
        (0, RAW[:13], "grad and out must have q's shape and dtype"),
        (0, RAW[None], "grad and out must have q's shape and dtype"),
        (5, RAW[:, :, 0], "lse must be what forward gave"),
        (5, RAW.double()[:, :, 0].t(), "lse must be what forward gave"),
    ],
)
def test_the_raw_backward_touches_no_memory_that_is_not_its_own(position, wrong, message):
    rest = [CU, CU, None, None, 9, 9, 0, None, None, None, False, 0.2]
    out, lse = torch.ops.jepa_kernels.masked_attention_forward(RAW, RAW, RAW, *rest, "cpu")
    call = [RAW, RAW, RAW, RAW, out, lse, *rest, False, "cpu"]
    torch.ops.jepa_kernels.masked_attention_backward(*call)
    call[position] = wrong
    with pytest.raises(ValueError, match=f"masked_attention: {message}; call the public function"):
        torch.ops.jepa_kernels.masked_attention_backward(*call)


@pytest.mark.parametrize("count", [70, 6000])
def test_the_raw_backward_asks_nothing_of_how_lse_lies(count):
    """Long sequences keep statistics of every row in memory of the kernel's own."""
    q, grad = torch.randn(2, 1, 2, count, 8)
    options = (None, None, None, None, count, count, 0, None, None, None, False, 0.3)
    out, lse = torch.ops.jepa_kernels.masked_attention_forward(q, q, q, *options, "cpu")

    def backward(lse, grad=grad):
        return torch.ops.jepa_kernels.masked_attention_backward(grad, q, q, q, out, lse, *options, False, "cpu")

    expected = backward(lse)
    turned = lse.transpose(1, 2).contiguous().transpose(1, 2)
    apart = torch.empty(1, 2, 3_000_000)[:, :, :count].copy_(lse)
    for other in (turned, apart):
        assert all(torch.equal(a, b) for a, b in zip(backward(other), expected, strict=True))
    with pytest.raises(ValueError, match="grad and out must have q's shape and dtype"):
        backward(lse, grad.bfloat16())
