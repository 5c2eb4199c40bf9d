"""Token axes padded to buckets: the same losses and gradients, few shapes, few compilations."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels.masks import MaskBatch, MultiBlock2d, MultiBlock3d
from jepa_kernels.nn import Block
from jepa_kernels.pairs import Pairs
from jepa_kernels.testing import poisoned_memory
from tests.models.training import failures, results
from tests.test_parts import MODELS, SPECS, drawn


def test_axes_are_padded_by_hand():
    p = Packing.from_lengths([3, 0, 6], bucket=8)
    assert (p.tokens, p.max_seqlen, p.lengths, p.cu_seqlens.tolist()) == (16, 8, (3, 0, 6), [0, 3, 3, 9])
    p = Packing.from_lengths([4, 4], bucket=8)
    assert (p.tokens, p.max_seqlen) == (8, 4)
    assert Packing.from_lengths([], bucket=8).tokens == 0 == Packing.from_lengths([0], bucket=8).max_seqlen
    p = Packing.from_lengths([3], tokens=5)
    assert (p.tokens, p.max_seqlen, p.sequence_of_token().tolist()) == (5, 3, [0, 0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"^Packing: tokens must be at least 5, got 4; leave it out for the"):
        Packing.from_lengths([2, 3], tokens=4)


def test_pairs_of_padded_sequences_by_hand():
    # Contexts c0 c0 | c1 and three rows of none; targets t0 | t1 t1 and one row of none.
    pairs = Pairs.from_lengths([2, 1], [1, 2], context_tokens=6, target_tokens=4)
    assert pairs.packing.lengths == (3, 3) and pairs.packing.tokens == 6 + 3
    assert pairs.source.tolist() == [0, 1, 6, 2, 7, 8, 0, 0, 0]  # targets begin behind the padded contexts
    assert pairs.context_rows.tolist() == [0, 1, 3, 6, 7, 8] and pairs.target_rows.tolist() == [2, 4, 5, 6]
    assert Pairs.from_lengths([2, 1], [1, 2], bucket=8).packing.tokens == 8


def test_masks_are_padded_by_hand_and_in_parts():
    ids, lengths = np.array([1, 2, 5, 7, 8]), np.array([2, 3])
    masks = MaskBatch(2, ids, lengths, ids[:3], np.array([1, 2])).padded(4)
    assert masks.context_ids.tolist() == [1, 2, 5, 7, 8, 0, 0, 0] and masks.target_ids.tolist() == [1, 2, 5, 0]
    part = masks.part([1], 2)
    assert part.context_ids.tolist() == [5, 7, 8, 0] and part.target_ids.tolist() == [2, 5, 0, 0] and part.bucket == 4
    m = part.to("cpu")
    assert (m.context_packing.tokens, m.target_packing.tokens, m.pairs.packing.tokens) == (4, 4, 8)
    assert len(m.pairs.target_rows) == len(m.weights("target", "mask")) == 4
    for sampler in (MultiBlock2d, 8), (MultiBlock3d, (2, 4, 4), SPECS):
        kind, *given = sampler
        masks, exact = (kind(*given, bucket=bucket)(3, step=0) for bucket in (64, 0))
        for of in ("context", "target"):
            ids, own = getattr(masks, f"{of}_ids"), getattr(exact, f"{of}_ids")
            assert np.array_equal(getattr(masks, f"{of}_lengths"), getattr(exact, f"{of}_lengths"))
            assert len(ids) % 64 == 0 <= len(ids) - len(own) < 64
            assert np.array_equal(ids[: len(own)], own) and not ids[len(own) :].any()
    remedy = "be 0 for truncated masks, which are rectangular, got 64; leave one of them out"
    with pytest.raises(ValueError, match=rf"^MultiBlock2d: bucket must {remedy}"):
        MultiBlock2d(8, truncate=True, bucket=64)
    with pytest.raises(ValueError, match=r"^MultiBlock3d: bucket must be at least 0, got -1; pass tokens"):
        MultiBlock3d((2, 4, 4), bucket=-1)


@pytest.mark.parametrize("average", ["mask", "token"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_exact_lengths(name, average):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.average = average
    double = copy.deepcopy(model).double()
    actual, exact, eager = [], [], []
    for run, bucket in enumerate((32, 100, 512)):
        pixels, masks = drawn(name, run, truncate=False)
        with poisoned_memory():
            actual.append(results(model.loss(pixels, masks.padded(bucket).to("cpu")), model))
        with jk.use_backend("reference"):
            eager.append(results(model.loss(pixels, masks.to("cpu")), model))
            exact.append(results(double.loss(pixels.double(), masks.to("cpu")), double))
    assert not failures(actual, exact, eager)


def compiled_by(lengths, bucket, compiler, **options):
    """How often a block is compiled, forward and backward, for these packings; and how many shapes they have."""
    torch.manual_seed(0)
    counter = CompileCounterWithBackend(compiler)
    block = Block(32, 2)
    block.compile(backend=counter, fullgraph=True, **options)
    shapes = set()
    for row in lengths:
        packing = Packing.from_lengths(row, bucket=bucket)
        shapes.add((packing.tokens, packing.max_seqlen))
        block(torch.randn(packing.tokens, 32), packing).sum().backward()
    return counter.frame_count, len(shapes)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


CONTEXTS = [MultiBlock2d(14)(4, step=step).context_lengths.tolist() for step in range(8)]


def test_blocks_of_static_shapes_are_compiled_once_a_bucket():
    """dynamic=False, for the fastest code and for CUDA graphs. Inductor, which adds no guard to them, takes minutes."""
    compiled, shapes = compiled_by(CONTEXTS, 128, "aot_eager", dynamic=False)
    assert compiled <= shapes < len(CONTEXTS) / 2
    torch._dynamo.reset()
    compiled, shapes = compiled_by(CONTEXTS[:4], 0, "aot_eager", dynamic=False)
    assert compiled == shapes == 4  # what exact lengths cost: each step is a shape of its own


def test_blocks_of_dynamic_shapes_are_compiled_as_often_as_with_exact_lengths():
    found = []
    for bucket in (0, 128):
        found.append(compiled_by(CONTEXTS[:6], bucket, "inductor", dynamic=True)[0])
        torch._dynamo.reset()
    assert found[0] == found[1] <= 2
