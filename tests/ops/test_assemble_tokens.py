"""assemble_tokens: values by hand, equivalences, and messages."""

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels.ops.assemble_tokens import cases


@pytest.fixture(params=("reference", "cpu", pytest.param("triton", marks=pytest.mark.interp)))
def backend(request):
    return request.param


@pytest.fixture(params=("cpu", pytest.param("triton", marks=pytest.mark.interp)))
def kernel(request):
    return request.param


def both(contexts, targets):
    """Packings of contexts, targets and the sequences of both."""
    masks = len(targets) // len(contexts)
    sums = [c + t for c, t in zip(list(contexts) * masks, targets, strict=True)]
    lengths = dict(context_packing=contexts, target_packing=targets, packing=sums)
    return {name: Packing.from_lengths(n) for name, n in lengths.items()}


def draw(contexts, targets, channels=24, count=32, groups=1, dtype=torch.float32):
    def ids(lengths):
        return torch.cat([torch.randperm(count)[:n].sort().values for n in lengths])

    tokens = torch.randn(sum(contexts), channels), torch.randn(groups, channels)
    table = torch.randn(count, channels).to(dtype)
    return dict(
        context=tokens[0].to(dtype),
        mask_token=tokens[1].to(dtype),
        context_ids=ids(contexts),
        target_ids=ids(targets),
        pos_embed=table,
        **both(contexts, targets),
    )


def value_and_grads(inputs, weights, backend):
    leaves = [inputs[n].detach().clone().requires_grad_() for n in ("context", "mask_token")]
    out = jk.assemble_tokens(**{**inputs, "context": leaves[0], "mask_token": leaves[1]}, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, weights)


def test_packed_by_hand(backend):
    # contexts of 2 and 1 tokens; mask 0 asks for 1 and 2 places, mask 1 for 1 and 0
    inputs = dict(
        context=torch.tensor([[1.0], [2.0], [3.0]]),
        mask_token=torch.tensor([[10.0], [20.0]]),
        context_ids=torch.tensor([0, 3, 1]),
        target_ids=torch.tensor([1, 0, 2, 2]),
        pos_embed=torch.tensor([[0.0], [0.1], [0.2], [0.3]]),
        **both([2, 1], [1, 2, 1, 0]),
    )
    weights = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])[:, None]
    out, dcontext, dtoken = value_and_grads(inputs, weights, backend)
    expected = [1.0, 2.3, 10.1, 3.1, 10.0, 10.2, 1.0, 2.3, 20.2, 3.1]
    assert out.flatten().tolist() == pytest.approx(expected)
    assert dcontext.flatten().tolist() == [1 + 7, 2 + 8, 4 + 10]
    assert dtoken.flatten().tolist() == [3 + 5 + 6, 9]


def test_rectangular_by_hand(backend):
    context = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])  # two contexts of one token
    places, pos = torch.tensor([[0, 2], [1, 2]]), torch.arange(3.0)[:, None].expand(3, 2)
    inputs = dict(context=context, mask_token=torch.tensor([[10.0, 20.0]]), context_ids=torch.tensor([[1], [0]]),
                  target_ids=places, pos_embed=pos)  # fmt: skip
    out, dcontext, dtoken = value_and_grads(inputs, torch.ones(2, 3, 2), backend)
    assert out.tolist() == [[[2, 3], [10, 20], [12, 22]], [[3, 4], [11, 21], [12, 22]]]
    assert dcontext.tolist() == [[[1, 1]], [[1, 1]]] and dtoken.tolist() == [[4, 4]]


@pytest.mark.parametrize("masks", [1, 4])
def test_equals_the_published_chain(backend, masks):
    """Tokens repeated, positions gathered, concatenated; V-JEPA 2's sort by id is undone by its own inverse."""
    batch, kept, places, count, width = 3, 6, 5, 20, 16
    context, token, pos = torch.randn(batch, kept, width), torch.randn(1, width), torch.randn(count, width)
    ids = torch.stack([torch.randperm(count)[:kept].sort().values for _ in range(batch)])
    targets = torch.stack([torch.randperm(count)[:places].sort().values for _ in range(masks * batch)])
    plain = torch.cat(
        [(context + pos[ids]).repeat(masks, 1, 1), token.expand(masks * batch, places, -1) + pos[targets]], 1
    )
    assert torch.equal(jk.assemble_tokens(context, token, ids, targets, pos, backend=backend), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_positions_rows_are_copied_exactly(backend, dtype):
    """As the first layer's qkv rows are: identical for every mask token."""
    inputs = draw([3, 70], [65, 2, 9, 1], channels=1152, groups=2, dtype=dtype)
    inputs.update(context_ids=None, target_ids=None, pos_embed=None)
    out = jk.assemble_tokens(**inputs, backend=backend)
    for s, sequence in enumerate(inputs["packing"].split(out)):
        own = inputs["context_packing"].split(inputs["context"])[s % 2]
        assert torch.equal(sequence[: len(own)], own)
        assert sequence[len(own) :].eq(inputs["mask_token"][s // 2]).all()


def test_packed_equals_rectangular_exactly(kernel):
    make = cases.rectangular(3, 5, 2, 7, 40, 16, groups=2)
    inputs = {n: x.float() if x.is_floating_point() else x for n, x in make(torch.Generator().manual_seed(0)).items()}
    weights = torch.randn(6, 12, 40)
    flat = {n: inputs[n].flatten(0, 1) for n in ("context", "context_ids", "target_ids")}
    packed = {**inputs, **flat, **both([5] * 3, [7] * 6)}
    expected = value_and_grads(inputs, weights, kernel)
    for a, b in zip(expected, value_and_grads(packed, weights.flatten(0, 1), kernel), strict=True):
        assert torch.equal(a.flatten(), b.flatten())


def test_a_sequence_equals_itself_alone_exactly(kernel):
    contexts, targets = [5, 70, 3], [9, 130, 1, 64, 0, 200]
    inputs = draw(contexts, targets, count=256)
    weights = torch.randn(inputs["packing"].tokens, 24)
    out, dcontext, _ = value_and_grads(inputs, weights, kernel)
    split = {n: inputs[f"{n}_packing"].split(inputs[f"{n}_ids"]) for n in ("context", "target")}
    own = inputs["context_packing"].split(inputs["context"])
    packing = inputs["packing"]
    for c in range(3):
        sequences = [c, c + 3]
        alone = dict(
            context=own[c],
            mask_token=inputs["mask_token"],
            context_ids=split["context"][c],
            target_ids=torch.cat([split["target"][s] for s in sequences]),
            pos_embed=inputs["pos_embed"],
            **both([contexts[c]], [targets[s] for s in sequences]),
        )
        rows = torch.cat([packing.split(weights)[s] for s in sequences])
        found, grad, _ = value_and_grads(alone, rows, kernel)
        assert torch.equal(found, torch.cat([packing.split(out)[s] for s in sequences]))
        assert torch.equal(grad, inputs["context_packing"].split(dcontext)[c])


def test_any_number_of_threads_gives_the_same_bits():
    inputs, threads = draw([300, 150], [700, 40, 350, 9], channels=96, count=1024), torch.get_num_threads()
    weights, found = torch.randn(inputs["packing"].tokens, 96), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(value_and_grads(inputs, weights, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_gradients_are_summed_in_fp32(kernel):
    # 300 sequences hold one context token and 300 places: bf16 sums would stop growing at 256
    packings = both([1], [1] * 300)
    one = torch.ones(1, 16, dtype=torch.bfloat16)
    inputs = dict(context=one, mask_token=one, **packings)
    _, dcontext, dtoken = value_and_grads(inputs, one.expand(600, 16), kernel)
    assert dcontext.eq(300).all() and dtoken.eq(300).all() and dtoken.dtype == torch.bfloat16


def test_fp32_tables_are_added_before_the_only_rounding(backend):
    # Both sums lie above the middle of 1 and the next bf16 number; with a table rounded first, neither would.
    context, token = torch.ones(1, 1, 8, dtype=torch.bfloat16), torch.full((1, 8), 1 + 2.0**-9)
    pos = torch.tensor([[2.0**-8 + 2.0**-17], [3 * 2.0**-10]]).expand(2, 8)
    out = jk.assemble_tokens(context, token, torch.tensor([[0]]), torch.tensor([[1]]), pos, backend=backend)
    assert out.dtype == torch.bfloat16 and out[0, :, 0].tolist() == [1 + 2.0**-7, 1 + 2.0**-7]
    low = context + pos.bfloat16()[0], token.bfloat16() + pos.bfloat16()[1]
    assert all(x.eq(1).all() for x in low)


def test_autocast_keeps_tables_and_takes_the_projections_type(backend):
    inputs = draw([4, 2], [3, 5])
    weight = torch.randn(24, 24)
    with torch.autocast("cpu", torch.bfloat16):
        context = torch.nn.functional.linear(inputs["context"], weight)
        out = jk.assemble_tokens(**{**inputs, "context": context}, backend=backend)
    assert context.dtype == out.dtype == torch.bfloat16
    plain = jk.assemble_tokens(**{**inputs, "context": context.float()}, backend=backend)
    assert torch.equal(out, plain.to(torch.bfloat16))


def test_large_outputs_take_the_streaming_path():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = draw([500, 12], [20_000, 8_000], channels=512, count=20_000, dtype=dtype)  # over 24 MB
        out = jk.assemble_tokens(**inputs, backend="cpu")
        assert torch.equal(out, jk.assemble_tokens(**inputs, backend="reference"))


def test_rows_that_no_sequence_owns_are_never_read(kernel):
    inputs = draw([4, 2], [3, 5])
    packings = {n: inputs[n].padded(inputs[n].tokens + 2, inputs[n].sequences, 9) for n in both([1], [1])}
    filled = {n: torch.cat([inputs[n], torch.full((2,), 2**40)]) for n in ("context_ids", "target_ids")}
    context = torch.cat([inputs["context"], torch.full((2, 24), torch.nan)])
    weights = torch.cat([torch.randn(inputs["packing"].tokens, 24), torch.full((2, 24), torch.nan)])
    found = value_and_grads({**inputs, **packings, **filled, "context": context}, weights, kernel)
    expected = value_and_grads(inputs, weights[:-2], kernel)
    for name, a, b in zip(("out", "dcontext"), found, expected, strict=False):
        assert torch.equal(a[:-2], b) and a[-2:].eq(0).all(), name
    assert torch.equal(found[2], expected[2])


def test_ids_out_of_range_read_nothing_when_unchecked(kernel):
    forward = torch.ops.jepa_kernels.assemble_tokens_forward
    context, pos = torch.ones(1, 2, 4), torch.full((3, 4), 5.0)
    ids = torch.tensor([[0, 3]]), torch.tensor([[-1, 2**40, 2]])
    out = forward(context, context[0, :1] + 1, *ids, pos, None, None, None, [1, 5], kernel)
    assert out[0, :, 0].tolist() == [6, 1, 2, 2, 7]


@pytest.mark.parametrize("wanted", [("context",), ("mask_token",)])
def test_only_the_gradients_asked_for_are_computed(kernel, wanted):
    inputs = draw([4, 2], [3, 5])
    weights = torch.randn(inputs["packing"].tokens, 24)
    expected = dict(zip(("context", "mask_token"), value_and_grads(inputs, weights, kernel)[1:], strict=True))
    for name in wanted:
        inputs[name].requires_grad_()
    out = jk.assemble_tokens(**inputs, backend=kernel)
    for name, grad in zip(wanted, torch.autograd.grad(out, [inputs[n] for n in wanted], weights), strict=True):
        assert torch.equal(grad, expected[name])


PACKED, PAIR = draw([4, 2], [3, 5]), both([4, 2], [3, 5])
BAD_PACKED = [
    (dict(context=PACKED["context"].int()), TypeError, "context must be of dtype .+, got int32; convert"),
    (dict(context=PACKED["context"][None]), ValueError, r"context must have shape \[T, E\], got \(1, 6, 24\)"),
    (dict(context=PACKED["context"][:5]), ValueError, "context must hold context_packing.tokens = 6 rows, got 5; pack"),
    (dict(mask_token=PACKED["mask_token"][0]), ValueError, r"mask_token must have shape \[G, E\], got \(24,\)"),
    (dict(mask_token=torch.zeros(1, 8)), ValueError, "mask_token must have 24 channels like context, got 8; pass"),
    (dict(mask_token=torch.zeros(3, 24)), ValueError, "mask_token must hold a divisor of the 2 sequences, got 3; pass"),
    (dict(mask_token=torch.zeros(0, 24)), ValueError, "mask_token must hold a divisor of the 2 sequences, got 0; pass"),
    (
        dict(mask_token=torch.zeros(1, 24).bfloat16()),
        TypeError,
        "mask_token must be of dtype float32, got bfloat16; convert",
    ),
    (dict(pos_embed=torch.zeros(32, 9)), ValueError, "pos_embed must have 24 channels like context, got 9; pass"),
    (dict(pos_embed=torch.zeros(1, 32, 24)), ValueError, r"pos_embed must have shape \[N, E\], got \(1, 32, 24\)"),
    (dict(pos_embed=torch.zeros(32, 24).requires_grad_()), ValueError, "pos_embed must be frozen, got requires_grad=T"),
    (dict(context_ids=None), TypeError, "context_ids must be given with pos_embed, got None; pass the patch index"),
    (dict(target_ids=None), TypeError, "target_ids must be given with pos_embed, got None; pass the patch index"),
    (dict(target_ids=PACKED["target_ids"][:5]), ValueError, r"target_ids must have shape \(8,\), got \(5,\); pass the"),
    (dict(target_ids=PACKED["target_ids"].int()), TypeError, "target_ids must be of dtype int64, got int32; convert"),
    (
        dict(context_ids=torch.stack([PACKED["context_ids"]] * 2, 1)[:, 0]),
        ValueError,
        r"context_ids must be contiguous, got strides \(2,\); call .contiguous\(\)",
    ),
    (dict(context_ids=PACKED["context_ids"] + 99), ValueError, r"context_ids must lie in \[0, 32\) .+, got .+; sort"),
    (dict(target_ids=PACKED["target_ids"].flip(0).contiguous()), ValueError, "target_ids must lie in .+ and increase"),
    (dict(packing=None), TypeError, "packing must be given with the other packings, got None; pass all three or none"),
    (dict(context_packing=None), TypeError, "context_packing must be given with the other packings, got None"),
    (dict(packing=[7, 7]), TypeError, "packing must be a Packing, got list; build one with Packing.from_lengths"),
    (dict(target_packing=3), TypeError, "target_packing must be a Packing, got int; build one with"),
    (
        dict(packing=Packing.from_lengths([7, 7, 0])),
        ValueError,
        "packing must hold 2 sequences like target_packing, got 3; give each target its sequence",
    ),
    (
        dict(packing=Packing.from_lengths([6, 8])),
        ValueError,
        r"packing must have length 7 \(context and target\) in sequence 0, got 6; build it from the sums",
    ),
    (
        dict(target_packing=Packing.from_lengths([3, 5, 0]), packing=Packing.from_lengths([7, 7, 0])),
        ValueError,
        "target_packing must hold a multiple of the 2 contexts, got 3; order sequences mask-major",
    ),
    (dict(packing=PAIR["packing"].to("meta")), ValueError, "packing must be on cpu, got meta; build it there"),
    (dict(mask_token=torch.zeros(1, 24, device="meta")), ValueError, "mask_token must be on cpu, got meta; move it"),
]


@pytest.mark.parametrize("change, error, message", BAD_PACKED, ids=[m[:40] for *_, m in BAD_PACKED])
def test_bad_packed_input_is_named(change, error, message):
    with pytest.raises(error, match="assemble_tokens: " + message):
        jk.assemble_tokens(**{**PACKED, **change})


IDS = torch.tensor([[0, 2], [1, 3]])
RECTANGULAR = dict(context=torch.zeros(2, 2, 4), mask_token=torch.zeros(1, 4), context_ids=IDS, target_ids=IDS,
                   pos_embed=torch.zeros(4, 4))  # fmt: skip
BAD_RECTANGULAR = [
    (dict(context=torch.zeros(4, 4)), ValueError, r"context must have shape \[S, K, E\], got \(4, 4\)"),
    (dict(target_ids=None, pos_embed=None), TypeError, "target_ids must be given without packings, got None; pass the"),
    (dict(target_ids=IDS[0]), ValueError, r"target_ids must have shape \[S, K\], got \(2,\)"),
    (dict(target_ids=IDS[:1]), ValueError, "target_ids must hold a multiple of the 2 contexts, got 1; order"),
    (dict(context_ids=IDS[:, :1]), ValueError, r"context_ids must have shape \(2, 2\), got \(2, 1\); pass the patch"),
]


@pytest.mark.parametrize("change, error, message", BAD_RECTANGULAR, ids=[m[:40] for *_, m in BAD_RECTANGULAR])
def test_bad_rectangular_input_is_named(change, error, message):
    with pytest.raises(error, match="assemble_tokens: " + message):
        jk.assemble_tokens(**{**RECTANGULAR, **change})
