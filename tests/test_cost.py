"""Bytes and FLOPs that ops state of their calls: counted by hand from the tensors, products by torch's own counter.

That Triton kernels touch as many bytes is counted in `tests/kernels/test_traffic.py`.
"""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import jepa_kernels as jk
from jepa_kernels.cost import Cost, distinct, elements, nbytes, total
from jepa_kernels.ops import OPS
from jepa_kernels.testing import cast, op_module


def counted(call):
    """{stage: cost} of what a call, and the backward pass of its sum where it has one, launches."""
    with jk.profile() as p:
        out = call()
        outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None and x.requires_grad]
        if outs:
            torch.autograd.backward(outs, [torch.randn_like(x) for x in outs])
    notes = p._notes
    stages = {note.stage for note in notes}
    return {stage: total(note.cost() for note in notes if note.stage == stage) for stage in stages}


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def every(n, *rows):
    return torch.stack([torch.arange(first, first + n) for first in rows])


def test_what_is_expanded_or_shared_counts_once():
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert (elements(x, [x, None]), nbytes(x, None), nbytes([x, x])) == (30, 30, 60)
    assert elements(x[:, None].expand(3, 7, 5)) == 15 and elements(x[:0].expand(0, 5)) == 0
    ids = every(4, 0, 0, 2, 1)  # two masks of two images: 0..5 of the first, 0..4 of the second
    assert distinct(ids, None, 2) == 6 + 5
    cu = torch.tensor([0, 1, 5, 9, 9], dtype=torch.int32)  # packed: 1 and 4 of the first, 4 and none of the second
    assert distinct(torch.tensor([0, 0, 1, 2, 3, 0, 1, 2, 3]), cu, 2) == 4 + 4


def test_attention():
    q, k, v = leaf(10, 4, 16), leaf(10, 2, 16), leaf(10, 2, 16)
    packing = jk.Packing.from_lengths([3, 7])
    found = counted(lambda: jk.masked_attention(q, k, v, packing))
    lse, pairs = 4 * 4 * 10, 9 + 49
    assert found["forward"] == Cost(4 * (2 * 640 + 2 * 320) + lse, 4 * pairs * 4 * 16)
    assert found["backward"] == Cost(4 * (4 * 640 + 4 * 320) + lse, 10 * pairs * 4 * 16)


@pytest.mark.parametrize(
    "options, pairs",
    [
        ({}, 36),
        ({"frame_size": 2}, 4 + 8 + 12),
        ({"key_ranges": torch.tensor([[0, 6], [1, 4], [2, 2], [0, 1], [5, 6], [0, 3]], dtype=torch.int32)}, 14),
        ({"frame_size": 2, "key_ranges": torch.tensor([[0, 6]] * 6, dtype=torch.int32)}, 24),
        ({"frame_size": 3, "key_ranges": torch.tensor([[2, 5]] * 6, dtype=torch.int32)}, 3 * 1 + 3 * 3),
    ],
)
def test_attention_counts_the_pairs_that_are_seen(options, pairs):
    q, k, v = torch.randn(3, 2, 3, 6, 8)  # two sequences, three heads
    found = counted(lambda: jk.masked_attention(q, k, v, **options, backend="cpu"))
    assert found["forward"].flops == 4 * 2 * pairs * 3 * 8


def test_attention_is_what_torch_counts():
    q, k, v = (leaf(2, 3, 40, 16) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        jk.masked_attention(q, k, v).sum().backward()
    found = counted(lambda: jk.masked_attention(q, k, v))
    assert counter.get_total_flops() == found["forward"].flops + found["backward"].flops


def test_embed_patches():
    pixels, weight, bias = leaf(2, 3, 16, 16), leaf(8, 3, 4, 4), leaf(8)
    pixels.requires_grad_(False)
    ids = every(4, 0, 0, 2, 1)
    found = counted(lambda: jk.embed_patches(pixels, ids, weight, bias))
    layer = 4 * (8 * 48 + 8)
    assert found["forward"] == Cost(4 * 11 * 48 + 8 * 16 + layer + 4 * 16 * 8, 2 * 16 * 48 * 8)
    assert found["backward"] == Cost(4 * 16 * 8 + 8 * 16 + 4 * 11 * 48 + layer, 2 * 16 * 48 * 8 + 16 * 8)


def test_products_of_patches_are_what_torch_counts():
    pixels, weight = torch.randn(2, 3, 16, 16), leaf(8, 3, 4, 4)
    ids = every(4, 0, 0, 2, 1)
    with FlopCounterMode(display=False) as counter:
        jk.embed_patches(pixels, ids, weight, backend="reference").sum().backward()
    found = counted(lambda: jk.embed_patches(pixels, ids, weight))
    assert total(found.values()).flops == counter.get_total_flops()


def test_latent_loss():
    pred, target, ids = leaf(4, 4, 32), torch.randn(2, 9, 32), every(4, 0, 0, 2, 1)
    found = counted(lambda: 2 * jk.latent_loss(pred, target, ids))
    assert found["forward"] == Cost(4 * 32 * (16 + 11 + 16) + 8 * 16, 16 * 32 * 13)
    assert found["backward"].bytes == 2 * 4 * 16 * 32
    with torch.no_grad():
        assert counted(lambda: jk.latent_loss(pred, target, ids))["forward"].bytes == 4 * 32 * 27 + 8 * 16


def test_gathering_and_assembling_tokens():
    x, ids = leaf(2, 9, 32, dtype=torch.bfloat16), every(4, 0, 0, 2, 1)
    found = counted(lambda: jk.gather_tokens(x, ids))
    assert found["forward"].bytes == 2 * 32 * (11 + 16) + 8 * 16
    assert found["backward"] == Cost(2 * 32 * (16 + 18) + 8 * 16, 16 * 32)
    context, token, pos = leaf(2, 5, 32), leaf(1, 32), torch.randn(9, 32)
    found = counted(lambda: jk.assemble_tokens(context, token, every(5, 0, 1), ids, pos))
    rows = 4 * 9 * 32
    assert found["forward"] == Cost(4 * (10 * 32 + 32 + 9 * 32 + rows) + 8 * (10 + 16), rows)
    assert found["backward"] == Cost(4 * (rows + 10 * 32 + 32), rows)


def test_lists_of_weights():
    params, others = [torch.randn(5, 7), torch.randn(3)], [torch.randn(5, 7), torch.randn(3)]
    copies = [torch.zeros(5, 7).bfloat16(), torch.zeros(3).bfloat16()]
    assert counted(lambda: jk.ema_update(params, others, 0.9, shadow=copies)) == {"forward": Cost(38 * 14, 38 * 3)}
    assert counted(lambda: jk.grad_norm([*params, copies[0]])) == {"forward": Cost(4 * 38 + 2 * 35, 2 * 73)}


def test_adamw_with_targets_shadows_and_a_parameter_without_gradient():
    shapes = (5, 7), (3,)
    params, targets, m, v = ([torch.zeros(s) for s in shapes] for _ in range(4))
    m[1] = v[1] = None
    copies = [torch.zeros(s).bfloat16() for s in shapes]
    steps = [torch.zeros(()), None]
    call = lambda: jk.adamw_ema(  # noqa: E731
        params, [torch.ones(5, 7), None], m, v, steps, targets, lr=0.1, momentum=0.9, target_shadow=copies
    )
    # 35 are trained: 8 bytes each of p, m, v and target, 4 of the gradient, 2 of the copy; 3 are followed.
    assert counted(call) == {"forward": Cost(35 * 38 + 3 * (4 + 8 + 2), 14 * 35 + 3 * 38)}


def test_an_optimizer_is_noted_though_it_keeps_its_lists():
    p = leaf(6, 4)
    optimizer = jk.AdamWEMA([p], [torch.zeros(6, 4)])
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = torch.ones_like(p)
    with jk.profile() as profile:
        optimizer.step()
    assert [(n.op, n.cost()) for n in profile._notes] == [("adamw_ema", Cost(24 * 36, 24 * 17))]
    assert optimizer.state[p]["step"] == 2


def test_rope():
    q, k = leaf(2, 4, 6, 16, dtype=torch.bfloat16), leaf(2, 2, 6, 16, dtype=torch.bfloat16)
    found = counted(lambda: jk.rope_qk(q, k, torch.rand(6, 2)))  # one table of both clips: a cosine and a sine each
    assert found["forward"] == found["backward"] == Cost(2 * 2 * (768 + 384) + 4 * 6 * 2 * 16, 3 * (768 + 384))
    assert found["turns"] == Cost(4 * 6 * 2 + 4 * 6 * 2 * 16, 0)


def test_pairs_of_embeddings():
    x, y = leaf(6, 16), leaf(6, 16)
    found = counted(lambda: jk.info_nce(x, y, 0.1))
    assert found["forward"] == Cost(4 * 2 * 96 + 20 * 6, 36 * (2 * 16 + 8))
    assert found["backward"] == Cost(4 * 4 * 96 + 16 * 6, 36 * (6 * 16 + 8))


def test_statistics_of_embeddings():
    z = torch.randn(3, 4, 8)
    assert counted(lambda: jk.collapse_stats(z)) == {"forward": Cost(4 * 96, 7 * 96 + 12 * 8 * 8)}
    z = leaf(3, 4, 8)
    found = counted(lambda: jk.sigreg(z, slices=10, knots=5))
    moments = 3 * 2 * 5 * 10
    assert found["moments"] == Cost(4 * (96 + moments), 2 * 96 * 10)
    assert found["forward"].bytes == 4 * moments and found["backward"] == Cost(4 * (192 + moments), 4 * 96 * 10)


def test_distances():
    contexts, targets = every(4, 0, 4), every(3, 8, 12)
    found = counted(lambda: jk.distance_weights(contexts, targets, (1, 4, 4)))
    assert found == {"forward": Cost(12 * 8 + 8 * 6, 7 * 8 * 3)}
    packings = dict(packing=jk.Packing.uniform(2, 4), target_packing=jk.Packing.uniform(2, 3))
    packed = counted(lambda: jk.distance_weights(contexts.view(-1), targets.view(-1), (1, 4, 4), **packings))
    assert packed == found


@pytest.mark.parametrize("op", OPS)
def test_every_stage_of_every_op_has_its_cost(op):
    """Of the typical case that the suites share, and of the empty one."""
    module = importlib.import_module(f"jepa_kernels.ops.{op}.cost")
    stages = {o.split("::")[1].removeprefix(f"{op}_") for o in torch._C._dispatch_get_all_op_names() if f"::{op}_" in o}
    stages -= {"qkv"}  # the twin of a form, which compiled code traces
    assert stages == {name for name in stages if callable(getattr(module, name, None))}
    first, *others = op_module(op, "cases").CASES
    for case in (first, *(c for c in others if "empty" in c.name)):
        inputs = cast(case.make(torch.Generator().manual_seed(0)), torch.float32, torch.device("cpu"), case.keep)
        for name in case.grads:
            inputs[name].requires_grad_()
        found = counted(lambda inputs=inputs: (getattr(jk, op)(**inputs), None)[1])
        for cost in found.values():
            assert cost.bytes >= 0 and cost.flops >= 0 and (cost.bytes > 0 or "empty" in case.name), case.name
