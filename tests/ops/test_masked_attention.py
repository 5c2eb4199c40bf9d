"""masked_attention: values by hand, exact equalities, and messages."""

import math
from unittest import mock

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels._core import select
from jepa_kernels._core.info import kernels
from jepa_kernels.testing import poisoned_memory
from tests.ops.attention import OURS, equal, with_gradients


@pytest.fixture(params=("reference", "cpu", "sdpa"))
def backend(request):
    return request.param


def rows(*values):
    """[T, 1, 8]: each value in the first channel, zeros behind it."""
    x = torch.zeros(len(values), 1, 8)
    x[:, 0, 0] = torch.tensor(values)
    return x


def test_by_hand(backend):
    # Weights of keys 0 and ln 3 for query 1 are 1/4 and 3/4; query 0 sees them alike. The second sequence has one key.
    q, k, v = rows(0.0, 1.0, 5.0), rows(0.0, math.log(3), 2.0), rows(4.0, 8.0, 7.0)
    out = jk.masked_attention(q, k, v, Packing.from_lengths([2, 1]), scale=1.0, backend=backend)
    torch.testing.assert_close(out, rows(6.0, 7.0, 7.0), rtol=1e-6, atol=0)


def test_gradients_by_hand(backend):
    # One query, weights 1/4 and 3/4, out = 7: dv = w, dscore = w (v - out) = (-3/4, 3/4).
    q, k, v = (x.requires_grad_() for x in (rows(1.0), rows(0.0, math.log(3)), rows(4.0, 8.0)))
    packing, k_packing = Packing.from_lengths([1]), Packing.from_lengths([2])
    out = jk.masked_attention(q, k, v, packing, k_packing=k_packing, scale=1.0, backend=backend)
    dq, dk, dv = torch.autograd.grad(out[0, 0, 0], (q, k, v))
    torch.testing.assert_close(dv, rows(0.25, 0.75), rtol=1e-6, atol=0)
    torch.testing.assert_close(dk, rows(-0.75, 0.75), rtol=1e-6, atol=0)
    torch.testing.assert_close(dq, rows(0.75 * math.log(3)), rtol=1e-6, atol=0)


def test_default_scale_is_the_root_of_the_head_dim(backend):
    q, k, v = torch.randn(3, 1, 2, 5, 64).unbind(0)
    default, given = (jk.masked_attention(q, k, v, scale=s, backend=backend) for s in (None, 0.125))
    assert torch.equal(default, given)


def test_query_heads_share_key_heads_in_order(backend):
    q, (k, v) = torch.randn(1, 4, 3, 8), torch.randn(2, 1, 2, 5, 8).unbind(0)
    grouped = jk.masked_attention(q, k, v, backend=backend)
    repeated = jk.masked_attention(q, *(x.repeat_interleave(2, 1) for x in (k, v)), backend=backend)
    torch.testing.assert_close(grouped, repeated)


def test_a_sequence_without_keys_gives_0_and_gets_gradient_0(backend):
    q, k, v = torch.randn(4, 2, 8, requires_grad=True), *torch.randn(2, 3, 2, 8).unbind(0)
    packing, k_packing = Packing.from_lengths([1, 3]), Packing.from_lengths([0, 3])
    out = jk.masked_attention(q, k, v, packing, k_packing=k_packing, backend=backend)
    (dq,) = torch.autograd.grad(out.sum() + out.square().sum(), q)
    assert out[0].eq(0).all() and dq[0].eq(0).all()
    assert out[1:].ne(0).all() and dq[1:].ne(0).all()


def test_dense_and_packed_agree(backend):
    q, k, v = torch.randn(3, 2, 2, 9, 16).unbind(0)
    dense = jk.masked_attention(q, k, v, backend=backend)
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = jk.masked_attention(*packed, Packing.uniform(2, 9), backend=backend)
    torch.testing.assert_close(out, dense.transpose(1, 2).flatten(0, 1))


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


LENGTHS = (0, 1, 63, 64, 65, 130, 301)
KEY_LENGTHS = (3, 130, 0, 64, 1, 65, 70)
# Of queries and keys. Interpreted: what stays on chip, and a sequence that streams.
OF_BOTH = {"cpu": (LENGTHS, KEY_LENGTHS), "triton": ((0, 1, 7, 20), (3, 33, 0, 260))}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def ragged(lengths, heads, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), heads, width, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 24, 80, 128])
@pytest.mark.parametrize("name", OURS)
def test_packed_equals_each_sequence_alone_exactly(name, width, dtype):
    lengths, key_lengths = OF_BOTH[name]
    q, k, v = ragged(lengths, 4, width, dtype), *(ragged(key_lengths, 2, width, dtype, s) for s in (1, 2))
    packing, keys = Packing.from_lengths(lengths), Packing.from_lengths(key_lengths)
    results = with_gradients(q, k, v, packing, keys, backend=name)
    split = [p.split(x) for p, x in zip((packing, packing, keys, keys), results, strict=True)]
    inputs = zip(packing.split(q), keys.split(k), keys.split(v), strict=True)
    for s, (one_q, one_k, one_v) in enumerate(inputs):
        own = (Packing.from_lengths([len(x)]) for x in (one_q, one_k))
        alone = with_gradients(one_q, one_k, one_v, *own, backend=name)
        assert equal(alone, [parts[s] for parts in split]), f"sequence {s}"
        dense = with_gradients(*(x.transpose(0, 1)[None] for x in (one_q, one_k, one_v)), backend=name)
        assert equal(alone, [x[0].transpose(0, 1) for x in dense]), f"sequence {s}, dense"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OURS)
def test_permuted_sequences_give_permuted_results_exactly(name, dtype):
    lengths, key_lengths = OF_BOTH[name]
    q, k, v = ragged(lengths, 2, 64, dtype), *(ragged(key_lengths, 1, 64, dtype, s) for s in (1, 2))
    packings = [Packing.from_lengths(n) for n in OF_BOTH[name]]
    order = [4, 0, 6, 2, 1, 5, 3] if len(lengths) == 7 else [2, 0, 3, 1]
    turned = [Packing.from_lengths([n[i] for i in order]) for n in OF_BOTH[name]]

    def turn(x, axis):
        parts = packings[axis].split(x)
        return torch.cat([parts[i] for i in order])

    out, dq, dk, dv = with_gradients(q, k, v, *packings, backend=name)
    found = with_gradients(turn(q, 0), turn(k, 1), turn(v, 1), *turned, backend=name)
    assert equal(found, (turn(out, 0), turn(dq, 0), turn(dk, 1), turn(dv, 1)))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(threads):
    packing, qkv = Packing.from_lengths(LENGTHS), [ragged(LENGTHS, 3, 24, seed=s) for s in range(3)]
    assert equal(with_gradients(*qkv, packing), with_gradients(*qkv, packing, threads=threads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unused_rows_are_never_read_and_get_0(dtype):
    packing = Packing.from_lengths(LENGTHS)
    longer = packing.padded(packing.tokens + 5, len(LENGTHS) + 2, 400)
    qkv = [ragged(LENGTHS, 2, 32, dtype, s) for s in range(3)]
    poisoned = [torch.cat([x, x.new_full((5, *x.shape[1:]), float("nan"))]) for x in qkv]
    with poisoned_memory():
        results = with_gradients(*poisoned, longer)
    assert equal(with_gradients(*qkv, packing), [x[:-5] for x in results])
    assert all(x[-5:].eq(0).all() for x in results)


def test_views_of_a_qkv_product_are_read_in_place():
    packing = Packing.from_lengths(LENGTHS)
    qkv = torch.randn(packing.tokens, 3, 2, 80)
    views = qkv.unbind(1)
    assert not views[0].is_contiguous()
    assert equal(with_gradients(*views, packing), with_gradients(*(x.contiguous() for x in views), packing))


@pytest.mark.parametrize(
    "lengths, shape, strides", [((4, 5), (9, 2, 8), (2**28, 8, 1)), (None, (2, 2, 9, 8), (2**31, 8, 16, 1))]
)
def test_rows_further_apart_than_32_bits_reach(lengths, shape, strides):
    memory = torch.empty(2**31 + 1000, dtype=torch.bfloat16)  # reserved; few of its pages are touched
    packing = None if lengths is None else Packing.from_lengths(lengths)
    qkv = [memory.as_strided(shape, strides, 200 * i).copy_(torch.randn(shape)) for i in range(3)]
    assert equal(with_gradients(*qkv, packing), with_gradients(*(x.contiguous() for x in qkv), packing))


def test_dense_queries_without_keys_give_0_even_where_they_are_nan(backend):
    q = torch.full((2, 3, 5, 8), float("nan"), requires_grad=True)
    k, v = torch.zeros(2, 2, 3, 0, 8, requires_grad=True).unbind(0)
    out = jk.masked_attention(q, k, v, backend=backend)
    assert out.eq(0).all() and out.transpose(1, 2).is_contiguous()
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert dq.shape == q.shape and dq.eq(0).all() and dk.shape == k.shape


@pytest.mark.parametrize("grad", [False, True])
def test_dense_outputs_of_any_backend_are_views_of_token_major_memory(backend, grad):
    q, k, v = (torch.randn(2, heads, n, 16, requires_grad=grad) for heads, n in ((4, 5), (2, 7), (2, 7)))
    assert jk.masked_attention(q, k, v, backend=backend).transpose(1, 2).is_contiguous()


def test_dense_results_are_views_of_token_major_memory():
    results = with_gradients(*(torch.randn(2, 3, n, 16) for n in (5, 7, 7)))
    assert all(x.transpose(1, 2).is_contiguous() for x in results)


def test_a_nan_reaches_its_own_sequence_and_head_only():
    packing, qkv = Packing.from_lengths([4, 4]), [torch.randn(8, 2, 8) for _ in range(3)]
    qkv[1][1, 0, 3] = float("nan")
    out = jk.masked_attention(*qkv, packing, backend="cpu")
    assert out[:4, 0].isnan().all() and not out[:4, 1].isnan().any() and not out[4:].isnan().any()


def test_logits_far_beyond_the_range_of_exp_stay_finite():
    q = torch.full((1, 1, 3, 8), 300.0)
    k = torch.stack([q[0, 0, 0], -q[0, 0, 0], q[0, 0, 0] * 0.5])[None, None]
    v = torch.arange(1.0, 4.0).view(1, 1, 3, 1).expand(1, 1, 3, 8)
    out, *grads = with_gradients(q, k, v)
    assert out.eq(1).all() and all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("size", [1e5, 1e15])
def test_huge_logits_choose_one_key_as_the_reference_does(size):
    q, k, v = torch.randn(1, 2, 60, 8) * size, torch.randn(1, 2, 50, 8) * size, torch.randn(1, 2, 50, 8)
    out = jk.masked_attention(q, k, v, backend="cpu")
    best = (q.double() @ k.double().mT).argmax(-1)
    assert torch.equal(out, v.gather(2, best[..., None].expand(-1, -1, -1, 8)))
    torch.testing.assert_close(out, jk.masked_attention(q, k, v, backend="reference"), rtol=0, atol=0)


@pytest.mark.parametrize("width", [8, 80, 128])
def test_one_key_takes_all_weight_and_leaves_no_gradient(width):
    q, k, v = torch.randn(1, 3, 49, width), *torch.randn(2, 1, 3, 1, width).unbind(0)
    out, dq, dk, _ = with_gradients(q, k, v)
    assert torch.equal(out, v.expand_as(out)) and dq.eq(0).all() and dk.eq(0).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("argument", range(3))
def test_infinities_and_nan_come_out_as_in_the_reference(argument, value):
    qkv = [torch.randn(1, 2, 20, 8) for _ in range(3)]
    qkv[argument][0, 1, 7, 3] = value
    out, expected = (jk.masked_attention(*qkv, backend=b) for b in ("cpu", "reference"))
    assert not out[0, 0].isnan().any() and not out[0, 1].isfinite().all()
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_no_sequences_and_no_tokens():
    for packing in (Packing.from_lengths([]), Packing.from_lengths([0, 0])):
        results = with_gradients(*(torch.randn(0, 2, 8) for _ in range(3)), packing)
        assert all(x.shape == (0, 2, 8) for x in results)
    assert jk.masked_attention(*(torch.randn(2, 3, 0, 8),) * 3, backend="cpu").shape == (2, 3, 0, 8)


def test_autocast_casts_the_inputs_and_returns_the_low_type(backend):
    q, k, v = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = jk.masked_attention(q, k, v, backend=backend)
    assert torch.equal(out, jk.masked_attention(*(x.bfloat16() for x in (q, k, v)), backend=backend))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


Q, K = torch.randn(5, 4, 16), torch.randn(5, 2, 16)
P = Packing.from_lengths([2, 3])
DENSE = torch.randn(2, 4, 3, 16)
BAD = [
    (dict(q=[1.0]), TypeError, "q must be a tensor, got list"),
    (dict(q=Q.int()), TypeError, "q must be of dtype .+, got int32"),
    (dict(q=Q[0]), ValueError, r"q must have shape \[T, H, D\], got \(4, 16\)"),
    (dict(packing=None), ValueError, r"q must have shape \[B, H, N, D\], got \(5, 4, 16\)"),
    (dict(v=K[:, 0]), ValueError, r"v must have shape \[Tk, Hk, D\], got \(5, 16\)"),
    (dict(k=K.half()), TypeError, "k must be of dtype float32 like q, got float16; cast all three alike"),
    (dict(k=K.to("meta")), ValueError, "k must be on cpu, got meta"),
    (dict(q=torch.randn(5, 4, 12)), ValueError, "q must have a head dim D that is a multiple of 8 in 8..128, got 12"),
    (dict(q=torch.randn(5, 4, 136)), ValueError, "q must have a head dim D that is a multiple of 8 .+, got 136"),
    (dict(k=torch.randn(5, 2, 8)), ValueError, "k must have a head dim of 16 like q, got 8"),
    (dict(v=K[:4]), ValueError, r"v must have shape \(5, 2, 16\) like k, got \(4, 2, 16\)"),
    (dict(k=Q[:, :3], v=Q[:, :3]), ValueError, "k must have a number of heads that divides q's 4, got 3"),
    (dict(q=DENSE, k=DENSE[:1], v=DENSE[:1], packing=None), ValueError, "k must hold 2 sequences like q, got 1"),
    (dict(scale=0.0), ValueError, "scale must be finite and greater than 0 in fp32, got 0.0; leave it out"),
    (dict(scale=float("nan")), ValueError, "scale must be finite and greater than 0 in fp32, got nan"),
    (dict(scale="x"), TypeError, "scale must be a number, got str; pass a float"),
    (dict(packing=Q), TypeError, "packing must be a Packing, got Tensor; build one with Packing.from_lengths"),
    (dict(k_packing=Q), TypeError, "k_packing must be a Packing, got Tensor; build one with Packing.from_lengths"),
    (dict(q=Q[:4]), ValueError, "q must hold 5 rows like its packing, got 4; pack it with the same lengths"),
    (dict(k=K[:4], v=K[:4]), ValueError, "k must hold 5 rows like its packing, got 4; pass k_packing"),
    (dict(k_packing=Packing.from_lengths([5])), ValueError, "k_packing must hold 2 sequences like packing, got 1"),
    (dict(packing=P.to("meta")), ValueError, "packing must be on cpu, got meta; build it there"),
    (dict(k_packing=P.to("meta")), ValueError, "k_packing must be on cpu, got meta"),
    (
        dict(q=DENSE, k=DENSE, v=DENSE, packing=None, k_packing=P),
        TypeError,
        "packing must be given with k_packing, got None",
    ),
]


def test_there_is_no_dropout():
    for form in (jk.masked_attention, jk.masked_attention_lse, jk.masked_attention_qkv):
        with pytest.raises(TypeError, match=rf"{form.__name__}\(\) got an unexpected keyword argument 'dropout_p'"):
            form(Q, K, K, P, dropout_p=0.1)


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match="masked_attention: " + message):
        jk.masked_attention(**{**dict(q=Q, k=K, v=K, packing=P), **change})
