"""masked_attention: values by hand, exact equalities, and messages."""

import math

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing


@pytest.fixture(params=("reference", "sdpa"))
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


def test_automatic_choice_takes_sdpa_only_without_gradients():
    q = torch.randn(1, 1, 3, 8)
    lines = jk.explain("masked_attention", q, q, q).splitlines()
    assert lines[0] == "masked_attention: sdpa (automatic)"
    with pytest.warns(jk.BackendWarning, match="sdpa: not automatic"):
        out = jk.masked_attention(*(q.clone().requires_grad_() for _ in range(3)))
    assert out.requires_grad


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
    (dict(scale=0.0), ValueError, "scale must be finite and greater than 0, got 0.0; leave it out"),
    (dict(scale=float("nan")), ValueError, "scale must be finite and greater than 0, got nan"),
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


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match="masked_attention: " + message):
        jk.masked_attention(**{**dict(q=Q, k=K, v=K, packing=P), **change})
