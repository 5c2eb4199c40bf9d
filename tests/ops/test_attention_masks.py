"""masked_attention: which keys each query sees, counted by hand; what must equal what exactly."""

import math

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing, Rope
from tests.ops.attention import OURS, equal, with_gradients


@pytest.fixture(params=("reference", "cpu", "sdpa"))
def backend(request):
    return request.param


def seen(queries, keys, backend, packing=None, k_packing=None, **options):
    """The set of keys (numbers within the sequence) that each query sees: equal scores spread the weight evenly."""
    if packing is None:
        q, k, v = torch.zeros(1, 1, queries, 32), torch.zeros(1, 1, keys, 32), torch.eye(32)[:keys][None, None]
    else:
        place = torch.cat([torch.arange(n) for n in (k_packing or packing).lengths])
        q, k, v = torch.zeros(queries, 1, 32), torch.zeros(keys, 1, 32), torch.eye(32)[place][:, None]
    out = jk.masked_attention(q, k, v, packing, k_packing=k_packing, backend=backend, **options)
    rows = out[0, 0] if packing is None else out[:, 0]
    sets = [set(row.nonzero()[:, 0].tolist()) for row in rows]
    for row, keys_seen in zip(rows, sets, strict=True):
        assert torch.allclose(row[list(keys_seen)], torch.tensor(1 / max(len(keys_seen), 1)))
    return sets


def first(*counts):
    return [set(range(n)) for n in counts]


@pytest.mark.parametrize(
    "queries, keys, frame_size, expected",
    [
        (6, 6, 2, first(2, 2, 4, 4, 6, 6)),
        (6, 6, 6, first(*[6] * 6)),
        (3, 3, 1, first(1, 2, 3)),
        (3, 8, 4, first(8, 8, 8)),  # cached keys: the queries are tokens 5, 6, 7
        (5, 8, 4, first(4, 8, 8, 8, 8)),
        (7, 4, 2, first(0, 0, 0, 2, 2, 4, 4)),  # more queries than keys: the first stand before every frame
    ],
)
def test_frames_by_hand(queries, keys, frame_size, expected, backend):
    assert seen(queries, keys, backend, frame_size=frame_size) == expected
    packed = seen(queries, keys, backend, Packing.uniform(1, queries), Packing.uniform(1, keys), frame_size=frame_size)
    assert packed == expected


def test_frames_of_each_packed_sequence_start_anew(backend):
    packing, keys = Packing.from_lengths([2, 0, 3]), Packing.from_lengths([4, 2, 2])
    assert seen(5, 8, backend, packing, keys, frame_size=2) == first(4, 4, 0, 2, 2)


RANGES = torch.tensor([[0, 2], [1, 1], [2, 4], [3, 1], [0, 4]], dtype=torch.int32)
IN_RANGES = [{0, 1}, set(), {2, 3}, set(), {0, 1, 2, 3}]


def test_ranges_by_hand(backend):
    assert seen(5, 4, backend, key_ranges=RANGES) == IN_RANGES
    assert seen(5, 4, backend, key_ranges=RANGES[None]) == IN_RANGES
    packing, keys = Packing.from_lengths([2, 3]), Packing.from_lengths([3, 4])
    assert seen(5, 7, backend, packing, keys, key_ranges=RANGES) == IN_RANGES


def test_ranges_and_frames_intersect(backend):
    # Queries stand at -1, 0, 1, 2, 3 and see the first 0, 2, 2, 4, 4 keys.
    assert seen(5, 4, backend, key_ranges=RANGES, frame_size=2) == [set(), set(), set(), set(), {0, 1, 2, 3}]
    everything = torch.tensor([[1, 4]] * 5, dtype=torch.int32)
    expected = [set(), {1}, {1}, {1, 2, 3}, {1, 2, 3}]
    assert seen(5, 4, backend, key_ranges=everything, frame_size=2) == expected


def inputs(queries=70, keys=70, heads=(4, 2), width=24, dtype=torch.float32):
    q = torch.randn(1, heads[0], queries, width, dtype=dtype)
    return q, *torch.randn(2, 1, heads[1], keys, width, dtype=dtype).unbind(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [70, 270])
@pytest.mark.parametrize("name", OURS)
def test_what_hides_nothing_changes_no_bit(name, keys, dtype):
    q, k, v = inputs(70, keys, dtype=dtype)
    plain = with_gradients(q, k, v, backend=name)
    everything = torch.tensor([[0, keys]] * 70, dtype=torch.int32)
    assert equal(with_gradients(q, k, v, frame_size=keys, backend=name), plain)
    assert equal(with_gradients(q, k, v, key_ranges=everything, backend=name), plain)


def turn(x, turns, half):
    """Channel times cosine plus partner times sine: the second product rounded to fp32, then one multiply-add."""
    channels = turns.shape[-1]
    cos, sin = turns[:, None].unbind(2)
    i = torch.arange(channels)
    partner = (i + channels // 2) % channels if half else i ^ 1
    second = x[..., partner].float() * sin
    turned = (x[..., :channels].double() * cos.double() + second.double()).float()
    return torch.cat([turned.to(x.dtype), x[..., channels:]], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pairing, axes", [("interleaved", 3), ("tiled", 3), ("half", 1), ("interleaved", 2)])
def test_fused_rope_equals_separate_rope_exactly(pairing, axes, dtype):
    lengths = [5, 0, 70, 130]
    packing, rows = Packing.from_lengths(lengths), sum(lengths)
    q, k, v = torch.randn(3, rows, 2, 40, dtype=dtype).unbind(0)
    rope = Rope(torch.randint(0, 30, (rows, axes)), torch.rand(rows, axes) * 9, pairing=pairing)
    turned = [turn(x, turns, rope.half) for x, turns in zip((q, k), rope.turns(40), strict=True)]
    fused = jk.masked_attention(q, k, v, packing, rope=rope, backend="cpu")
    assert torch.equal(fused, jk.masked_attention(*turned, v, packing, backend="cpu"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lse_by_hand(backend):
    # Scores 0 and ln 3: their exponentials sum to 4. The third query sees one key, the last none.
    q = torch.zeros(1, 1, 4, 8)
    q[..., 0] = 1.0
    k = torch.zeros(1, 1, 2, 8)
    k[0, 0, 1, 0] = math.log(3)
    ranges = torch.tensor([[0, 2], [0, 2], [1, 2], [1, 1]], dtype=torch.int32)
    out, lse = jk.masked_attention_lse(q, k, k, scale=1.0, key_ranges=ranges, backend=backend)
    assert lse.shape == (1, 1, 4) and lse.dtype == torch.float32
    assert torch.allclose(lse[0, 0, :3], torch.tensor([4.0, 4.0, 3.0]).log()) and lse[0, 0, 3] == -math.inf
    assert out[0, 0, 3].eq(0).all()


Q, K, DENSE = torch.randn(5, 4, 16), torch.randn(5, 2, 16), torch.randn(2, 4, 6, 16)
P = Packing.from_lengths([2, 3])
ROPE = Rope(torch.zeros(5, 3))
PACKED, DENSES = dict(q=Q, k=K, v=K, packing=P), dict(q=DENSE, k=DENSE, v=DENSE)
BAD = [
    (PACKED, dict(frame_size=2.0), TypeError, "frame_size must be an int, got float; pass the tokens of one frame"),
    (PACKED, dict(frame_size=0), ValueError, "frame_size must be at least 1, got 0; leave it out to see all keys"),
    (PACKED, dict(frame_size=2), ValueError, "frame_size must divide the number of keys of every .+, got 2 and 3 keys"),
    (DENSES, dict(frame_size=4), ValueError, "frame_size must divide the number of keys .+, got 4 and 6 keys; give"),
    (PACKED, dict(key_ranges=[1]), TypeError, "key_ranges must be a tensor, got list"),
    (PACKED, dict(key_ranges=torch.zeros(5, 2)), TypeError, "key_ranges must be of dtype int32, got float32"),
    (PACKED, dict(key_ranges=RANGES[:4]), ValueError, r"key_ranges must have shape \(5, 2\), got \(4, 2\); pass"),
    (DENSES, dict(key_ranges=RANGES), ValueError, r"key_ranges must have shape \(6, 2\), got \(5, 2\)"),
    (PACKED, dict(key_ranges=RANGES[:, :1].expand(5, 2)), ValueError, "key_ranges must be contiguous, got strides"),
    (PACKED, dict(key_ranges=RANGES), ValueError, r"key_ranges must lie inside .+, got \[2, 4\] for query 2; count"),
    (DENSES, dict(key_ranges=torch.full((2, 6, 2), -1).int()), ValueError, r".+, got \[-1, -1\] for query 0; count"),
    (PACKED, dict(rope=5), TypeError, r"rope must be a Rope, got int; build one with Rope\(positions\)"),
    (PACKED, dict(rope=Rope(torch.zeros(4, 3))), ValueError, r"rope must hold positions for q's tokens \(5,\), got"),
    (DENSES, dict(rope=Rope(torch.zeros(2, 5, 1))), ValueError, r"rope must hold .+ q's tokens \(2, 6\), got \(2, 5\)"),
    (PACKED, dict(rope=Rope(torch.zeros(5, 1), torch.zeros(6, 1))), ValueError, r"rope must hold .+ k's tokens \(5,\)"),
    (PACKED, dict(rope=ROPE.to("meta")), ValueError, "rope must be on cpu, got meta; build it from positions there"),
]


@pytest.mark.parametrize("given, change, error, message", BAD, ids=[m[:50] for *_, m in BAD])
def test_bad_input_is_named(given, change, error, message):
    with pytest.raises(error, match="masked_attention: " + message):
        jk.masked_attention(**{**given, **change})


LENGTHS = (0, 1, 63, 130, 64)
OPTIONS = ("frames", "ranges", "rope", "all")


def masked(option, lengths=LENGTHS, dtype=torch.bfloat16):
    """Arguments of a packed call, its rows in order of the sequences."""
    packing, keys = Packing.from_lengths(lengths), Packing.from_lengths([n + n % 2 for n in lengths])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(packing.tokens, 4, 24, generator=generator).to(dtype)
    k, v = torch.randn(2, keys.tokens, 2, 24, generator=generator).to(dtype).unbind(0)
    options = {}
    if option in ("frames", "all"):
        options["frame_size"] = 2
    if option in ("ranges", "all"):
        most = torch.repeat_interleave(keys.cu_seqlens.diff(), packing.cu_seqlens.diff())
        ends = (torch.rand(2, packing.tokens, generator=generator) * (most + 1)).int().sort(0).values
        options["key_ranges"] = ends.T.contiguous()
    if option in ("rope", "all"):
        places = (torch.rand(n, 3, generator=generator) * 9 for n in (packing.tokens, keys.tokens))
        options["rope"] = Rope(*places, pairing="tiled")
    return q, k, v, packing, keys, options


def run(q, k, v, packing, keys, options, threads=2):
    return with_gradients(q, k, v, packing, keys, threads, **options)


def part(x, packing, s):
    return packing.split(x)[s].contiguous()


@pytest.mark.parametrize("option", OPTIONS)
def test_masked_and_packed_equals_each_sequence_alone_exactly(option):
    q, k, v, packing, keys, options = masked(option)
    whole = run(q, k, v, packing, keys, options)
    for s in range(len(LENGTHS)):
        one, one_keys = (Packing.from_lengths([p.lengths[s]]) for p in (packing, keys))
        own = dict(options)
        if "key_ranges" in own:
            own["key_ranges"] = part(own["key_ranges"], packing, s)
        if "rope" in own:
            rope = own["rope"]
            places = part(rope.positions, packing, s), part(rope.k_positions, keys, s)
            own["rope"] = Rope(*places, pairing="tiled")
        alone = run(part(q, packing, s), part(k, keys, s), part(v, keys, s), one, one_keys, own)
        pieces = [p.split(x)[s] for p, x in zip((packing, packing, keys, keys), whole, strict=True)]
        assert equal(alone, pieces), f"sequence {s}"


@pytest.mark.parametrize("option", ["none", *OPTIONS])
def test_every_run_and_number_of_threads_gives_the_same_bits(option):
    call = masked(option)
    expected = run(*call)
    for i in range(100):
        assert equal(run(*call, threads=1 + i % 4), expected)
