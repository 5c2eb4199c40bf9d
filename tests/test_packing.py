"""Packing against hand-written layouts."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from jepa_kernels import Packing, pack


def test_layout_by_hand():
    p = Packing.from_lengths([2, 0, 3])
    assert p.cu_seqlens.tolist() == [0, 2, 2, 5] and p.cu_seqlens.dtype == torch.int32
    assert (p.tokens, p.max_seqlen, p.pairs, p.sequences, p.lengths) == (5, 3, 13, 3, (2, 0, 3))
    assert p.sequence_of_token().tolist() == [0, 0, 2, 2, 2]
    assert p.dense_mask().int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
    ]


def test_tiles_by_hand():
    # Blocks of 64 tokens, by the pairs they meet: 64 * 200, 8 * 200, 64 * 70, 6 * 70, 5 * 5.
    p = Packing.from_lengths([70, 0, 200, 5])
    assert p.tiles.tolist() == [[2, 0], [2, 1], [2, 2], [0, 0], [2, 3], [0, 1], [3, 0], [-1, 0]]
    assert p.tiles.dtype == torch.int32 and p.tiles.is_contiguous()


@pytest.mark.parametrize("lengths", [[], [0, 0], [64], [65, 63, 1, 128], [1] * 300])
def test_tiles_hold_every_block_once_and_fit_every_way_to_share_out_the_tokens(lengths):
    p = Packing.from_lengths(lengths)
    blocks = [[s, b] for s, n in enumerate(lengths) for b in range(-(-n // 64))]
    assert sorted(p.tiles[: len(blocks)].tolist()) == blocks
    assert p.tiles[len(blocks) :].tolist() == [[-1, 0]] * (p.tokens // 64 + len(lengths) - len(blocks))
    padded = p.padded(p.tokens + 70, len(lengths) + 2, 500)
    assert padded.tiles.shape == ((p.tokens + 70) // 64 + len(lengths) + 2, 2)
    assert torch.equal(padded.tiles[: len(blocks)], p.tiles[: len(blocks)])


def test_pad_and_unpad_are_inverse_and_differentiable():
    p = Packing.from_lengths([2, 0, 3])
    x = torch.arange(10.0).view(5, 2).requires_grad_()
    padded = p.pad(x, value=-1.0)
    assert padded[:, :, 0].tolist() == [[0, 2, -1], [-1, -1, -1], [4, 6, 8]]
    assert torch.equal(p.unpad(padded), x)
    weights = torch.randn(5, 2)
    assert torch.equal(torch.autograd.grad(p.unpad(p.pad(x)), x, weights)[0], weights)


def test_split_pack_and_nested_agree():
    parts = [torch.randn(n, 4) for n in (3, 1, 0, 2)]
    x, p = pack(parts)
    assert all(torch.equal(a, b) for a, b in zip(p.split(x), parts, strict=True))
    nested = p.to_nested(x)
    assert all(torch.equal(a, b) for a, b in zip(nested.unbind(), parts, strict=True))


def test_from_ids_and_from_mask_agree():
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    ids, p = Packing.from_mask(keep)
    assert ids.tolist() == [0, 2, 3, 1] and p.lengths == (3, 0, 1)
    again, q = Packing.from_ids([torch.tensor([0, 2, 3]), torch.tensor([], dtype=torch.long), torch.tensor([1])])
    assert torch.equal(ids, again) and torch.equal(p.cu_seqlens, q.cu_seqlens)


def test_padded_keeps_the_sequences_in_a_bigger_shape():
    p = Packing.from_lengths([2, 3]).padded(8, 4, 5)
    assert p.cu_seqlens.tolist() == [0, 2, 5, 5, 5] and (p.tokens, p.max_seqlen) == (8, 5)
    assert p.sequence_of_token().tolist() == [0, 0, 1, 1, 1, 4, 4, 4]
    assert not p.dense_mask()[5:].any()
    x = torch.ones(8, 1)
    assert p.unpad(p.pad(x)).flatten().tolist() == [1] * 5 + [0] * 3
    assert [len(s) for s in p.split(x)] == [2, 3, 0, 0]


def test_block_mask_is_the_dense_mask():
    p = Packing.from_lengths([100, 30])
    blocks = p.block_mask()
    assert blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum() >= 1
    from torch.nn.attention.flex_attention import create_mask

    dense = create_mask(blocks.mask_mod, None, None, 130, 130, device="cpu")
    assert torch.equal(dense[0, 0], p.dense_mask())


def test_is_a_pytree_and_immutable():
    p = Packing.from_lengths([2, 3])
    leaves, spec = pytree.tree_flatten(p)
    q = pytree.tree_unflatten(leaves, spec)
    assert (q.lengths, q.tokens, q.max_seqlen) == (p.lengths, p.tokens, p.max_seqlen)
    assert torch.equal(q.cu_seqlens, p.cu_seqlens)
    with pytest.raises(AttributeError, match="Packing: tokens must stay as it is, got an assignment; build a new"):
        p.tokens = 3


def test_copies_and_pickles():
    p = Packing.from_lengths([2, 3]).padded(8, 3, 5)
    for q in (copy.copy(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert (q.lengths, q.tokens, q.max_seqlen) == (p.lengths, p.tokens, p.max_seqlen)
        assert torch.equal(q.cu_seqlens, p.cu_seqlens) and torch.equal(q.tiles, p.tiles)


def test_lengths_that_hold_more_than_the_axis_are_refused():
    with pytest.raises(ValueError, match="Packing: lengths must sum to at most tokens = 14, got 905; count the rows"):
        Packing(torch.tensor([0, 5, 14], dtype=torch.int32), (5, 900), 14, 9)


def test_no_sequences_and_many():
    assert Packing.from_lengths([]).cu_seqlens.tolist() == [0]
    p = Packing.uniform(100_000, 1)
    assert p.tokens == 100_000 and torch.equal(p.cu_seqlens, torch.arange(100_001, dtype=torch.int32))


def test_pytree_leaves_may_be_anything_but_a_wrong_tensor():
    p = Packing.from_lengths([2, 3])
    assert pytree.tree_map(lambda leaf: None, p).cu_seqlens is None
    with pytest.raises(TypeError, match="Packing: cu_seqlens must be of dtype int32, got int64; convert it"):
        pytree.tree_map_only(torch.Tensor, torch.Tensor.long, p)


def test_is_built_from_fake_tensors_and_inside_compiled_code():
    with FakeTensorMode():
        assert Packing.uniform(2, 3).cu_seqlens.shape == (3,)

    def ends(cu_seqlens):
        return Packing(cu_seqlens, (2, 3), 5, 3).cu_seqlens.diff()

    cu_seqlens = Packing.from_lengths([2, 3]).cu_seqlens
    assert torch.compile(ends, fullgraph=True, backend="aot_eager")(cu_seqlens).tolist() == [2, 3]


@pytest.mark.parametrize(
    "cu_seqlens, error, message",
    [
        ([0, 2], TypeError, "be a tensor, got list; convert it"),
        (torch.tensor([0, 2]), TypeError, "be of dtype int32, got int64; convert it"),
        (torch.zeros(1, 2, dtype=torch.int32), ValueError, r"have shape \[S\+1\], got \(1, 2\); reshape it"),
        (torch.zeros(4, dtype=torch.int32)[::2], ValueError, r"be contiguous, got strides \(2,\); call .contiguous"),
    ],
)
def test_only_int32_lines_are_taken_as_cu_seqlens(cu_seqlens, error, message):
    with pytest.raises(error, match="Packing: cu_seqlens must " + message):
        Packing(cu_seqlens, (2,), 2, 2)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Packing.from_lengths([3, -1]), ValueError, "Packing: lengths must be at least 0, got -1; count"),
        (lambda: Packing.from_lengths([3, 0.3 * 196]), ValueError, "Packing: lengths must be whole numbers, got 58.8;"),
        (
            lambda: Packing.from_lengths([2**31]),
            ValueError,
            "Packing: lengths must sum to less than 2.31, got .+; split",
        ),
        (
            lambda: Packing.from_mask(torch.ones(2, 3)),
            ValueError,
            r"Packing: keep must be bool \[B, N\], got .+float32",
        ),
        (lambda: Packing.from_lengths([2]).padded(1, 1, 2), ValueError, "Packing: tokens must be at least 2, got 1"),
        (lambda: Packing.from_lengths([2]).split(torch.ones(3)), ValueError, "Packing: x must have 2 tokens, got 3"),
        (lambda: Packing.from_lengths([2]).unpad(torch.ones(1, 3)), ValueError, r"Packing: x must start with \[1, 2\]"),
        (lambda: pack([]), ValueError, "pack: tensors must hold at least one tensor, got none"),
        (lambda: pack([torch.ones(2, 3), torch.ones(2, 4)]), ValueError, "pack: tensors must agree in all but"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
