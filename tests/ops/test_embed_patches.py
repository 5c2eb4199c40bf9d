"""embed_patches: values by hand, equivalences, and messages."""

import pytest
import torch
import torch.nn.functional as F

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels.testing import hold

TRITON = pytest.param("triton", marks=pytest.mark.interp)


@pytest.fixture(params=["reference", "cpu", TRITON])
def backend(request):
    return request.param


@pytest.fixture(params=["cpu", TRITON])
def kernel(request):
    return request.param


def test_by_hand(backend):
    # one channel, patches of 2 x 2: token = (a - d) of its patch [[a, b], [c, d]], and b + c in the second channel
    pixels = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    weight = torch.tensor([[1.0, 0, 0, -1], [0, 1, 1, 0]]).view(2, 1, 2, 2).requires_grad_()
    bias = torch.tensor([0.5, 0.25]).requires_grad_()
    pos = torch.tensor([[0.0, 0], [10, 20], [30, 40], [50, 60]]).requires_grad_()
    ids = torch.tensor([[1, 2], [2, 3]])  # two masks of one image
    out = jk.embed_patches(pixels, ids, weight, bias, pos, backend=backend)
    assert out.tolist() == [[[5.5, 29.25], [25.5, 61.25]], [[25.5, 61.25], [45.5, 85.25]]]
    grad = torch.tensor([[[1.0, 0], [2, 0]], [[3, 0], [0, 4]]])
    dpixels, dweight, dbias, dpos = torch.autograd.grad(out, (pixels, weight, bias, pos), grad)
    assert dbias.tolist() == [6, 4]
    assert dpos.tolist() == [[0, 0], [1, 0], [5, 0], [0, 4]]
    # 1 x patch 1 + 5 x patch 2, and 4 x patch 3
    assert dweight.flatten(1).tolist() == [[2 + 40, 3 + 45, 6 + 60, 7 + 65], [40, 44, 56, 60]]
    assert dpixels.view(4, 4).tolist() == [[0, 0, 1, 0], [0, 0, 0, -1], [5, 0, 0, 4], [0, -5, 4, 0]]


def test_packed_rows_past_the_end_are_zero_and_have_no_gradient(backend):
    packing = Packing.from_lengths([1, 2]).padded(5, 2, 2)
    ids = torch.tensor([3, 0, 1, 99, -7])
    weight = torch.ones(1, 1, 2, 2, requires_grad=True)
    out = jk.embed_patches(torch.ones(2, 1, 4, 4), ids, weight, packing=packing, backend=backend)
    assert out.flatten().tolist() == [4, 4, 4, 0, 0]
    grad = torch.tensor([1.0, 2, 3, float("nan"), float("nan")])[:, None]
    if backend != "reference":
        assert torch.autograd.grad(out, weight, grad)[0].flatten().tolist() == [6] * 4


def whole_numbers(*shape):
    """Small integers: sums of their products are exact in fp32, whatever the order."""
    return torch.randint(-4, 5, shape).float()


def some_ids(masks, batch, count, kept):
    return torch.stack([torch.randperm(count)[:kept].sort().values for _ in range(masks * batch)])


@pytest.mark.parametrize("patch", [3, 14, 16])
def test_equals_convolution_and_gather_exactly(patch, backend):
    pixels, pos = whole_numbers(3, 2, 4 * patch, 5 * patch).requires_grad_(), whole_numbers(20, 70).requires_grad_()
    weight, bias = whole_numbers(70, 2, patch, patch).requires_grad_(), whole_numbers(70).requires_grad_()
    ids = some_ids(4, 3, 20, 6)
    tokens = F.conv2d(pixels, weight, bias, stride=patch).flatten(2).transpose(1, 2) + pos
    expected = tokens[torch.arange(12)[:, None] % 3, ids]
    out = jk.embed_patches(pixels, ids, weight, bias, pos, backend=backend)
    assert torch.equal(out, expected)
    assert torch.equal(jk.embed_patches(pixels, None, weight, bias, pos, backend=backend), tokens)
    grad = whole_numbers(12, 6, 70)
    gradients = [torch.autograd.grad(x, (pixels, weight, bias, pos), grad) for x in (out, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_packed_sequence_equals_itself_alone_in_any_order_exactly(dtype):
    lengths, order = [5, 0, 36, 1, 17, 23], [4, 2, 0, 5, 3, 1]
    pixels = torch.randn(6, 3, 84, 84).to(dtype)
    layer = [torch.randn(s).to(dtype) for s in ((100, 3, 14, 14), (100,), (36, 100))]

    def embed(images):
        ids, packing = Packing.from_ids([rows[i] for i in images])
        return packing.split(jk.embed_patches(pixels[images], ids, *layer, packing=packing, backend="cpu"))

    rows = [torch.randperm(36)[:n].sort().values for n in lengths]
    together, permuted = embed(list(range(6))), embed(order)
    assert all(torch.equal(permuted[place], together[i]) for place, i in enumerate(order))
    assert all(torch.equal(embed([i])[0], together[i]) for i in range(6))


def large():
    """More tokens than are multiplied into the weights' gradient at a time, some of them in three masks."""
    leaves = [torch.randn(4, 3, 192, 192), torch.randn(72, 3, 16, 16), torch.randn(72), torch.randn(144, 72)]
    return some_ids(3, 4, 144, 90), [x.requires_grad_() for x in leaves]


def large_gradients(ids, leaves, threads=2, backend="cpu"):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pixels, *layer = leaves
        out = jk.embed_patches(pixels, ids, *layer, backend=backend)
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(1))
    finally:
        torch.set_num_threads(before)


def test_large_gradients_do_not_depend_on_the_thread_count():
    inputs = large()
    runs = [large_gradients(*inputs, threads=n) for n in (1, 2, 5)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_large_gradients_are_within_the_error_budget():
    ids, leaves = large()
    exact = large_gradients(ids, [x.detach().double().requires_grad_() for x in leaves], backend="reference")
    eager, ours = large_gradients(ids, leaves, backend="reference"), large_gradients(ids, leaves)
    for name, *values in zip(("out", "dpixels", "dweight", "dbias", "dpos"), ours, exact, eager, strict=True):
        parity = hold(name, *values)
        assert parity.ok, parity


def test_repeated_gradients_are_summed_in_fp32(kernel):
    # 300 masks choose one patch: bf16 sums would stop growing at 256
    leaves = [torch.zeros(s, dtype=torch.bfloat16, requires_grad=True) for s in ((1, 1, 2, 2), (3, 1, 2, 2), (1, 3))]
    pixels, weight, pos = leaves
    with torch.no_grad():
        pixels.fill_(1), weight.fill_(1)
    out = jk.embed_patches(pixels, torch.zeros(300, 1, dtype=torch.long), weight, None, pos, backend=kernel)
    dpixels, dweight, dpos = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert dpixels.eq(900).all() and dweight.eq(300).all() and dpos.eq(300).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_and_cropped_pixels_give_the_same_bits(dtype, kernel):
    wide = torch.randn(2, 3, 50, 61).to(dtype)
    cropped, (weight, ids) = wide[..., 3:45, 5:61], (torch.randn(20, 3, 14, 14).to(dtype), some_ids(1, 2, 12, 5))
    expected = jk.embed_patches(cropped.contiguous(), ids, weight, backend=kernel)
    assert torch.equal(jk.embed_patches(cropped, ids, weight, backend=kernel), expected)
    last = [x.to(memory_format=torch.channels_last) for x in (cropped, weight)]
    assert torch.equal(jk.embed_patches(last[0], ids, last[1], backend=kernel), expected)


def test_dropped_patches_are_never_read(kernel):
    pixels = torch.full((1, 1, 4, 4), float("nan"))
    pixels[..., :2, 2:] = 1.0
    pixels.requires_grad_()
    weight, ids = torch.ones(1, 1, 2, 2, requires_grad=True), torch.tensor([[1]])
    out = jk.embed_patches(pixels, ids, weight, backend=kernel)
    dpixels, dweight = torch.autograd.grad(out, (pixels, weight), torch.ones_like(out))
    assert out.item() == 4 and dweight.eq(1).all()
    assert dpixels.view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_ids_out_of_range_read_nothing_when_unchecked(kernel):
    pixels, weight, ids = torch.ones(1, 1, 4, 4), torch.ones(3, 1, 2, 2), torch.tensor([[0, 4, -1]])
    out = torch.ops.jepa_kernels.embed_patches_forward(pixels, ids, weight, None, None, None, [], [], kernel)
    assert out[0].tolist() == [[4] * 3, [0] * 3, [0] * 3]
    grad = torch.where(out > 0, 5.0, float("nan"))  # of what no token's row holds nothing may be used
    backward = torch.ops.jepa_kernels.embed_patches_backward
    dpixels, dweight, dbias, dpos = backward(grad, pixels, ids, weight, None, [], [], [True] * 4, kernel)
    assert dweight.eq(5).all() and dbias.eq(5).all() and dpos[:, 0].tolist() == [5, 0, 0, 0]
    assert dpixels.view(4, 4)[:2, :2].eq(15).all() and dpixels.sum() == 60


def test_autocast_compiles(backend):
    pixels, weight, pos = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(4, 5)
    ids = some_ids(1, 2, 4, 2)

    def embed():
        with torch.autocast("cpu", torch.bfloat16):
            return jk.embed_patches(pixels, ids, weight, None, pos, backend=backend)

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")()
    assert compiled.dtype == torch.bfloat16 and torch.equal(compiled, embed())


PIXELS, WEIGHT, IDS = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 4), torch.tensor([[0, 2], [1, 5]])
BAD = [
    (dict(pixels=PIXELS[0]), ValueError, r"pixels must have shape \[B, C, H, W\], got \(3, 8, 12\); reshape it"),
    (dict(pixels=PIXELS.int()), TypeError, "pixels must be of dtype .+, got int32; convert"),
    (dict(pixels=[1.0]), TypeError, "pixels must be a tensor, got list; convert"),
    (
        dict(pixels=torch.randn(2, 3, 9, 15)),
        ValueError,
        r"pixels must have sides divisible by the patch size 4, got 9 x 15; crop to 8 x 12: pixels\[..., :8, :12\]",
    ),
    (dict(weight=WEIGHT[0]), ValueError, r"weight must have shape \[E, C, P, P\], got \(3, 4, 4\)"),
    (dict(weight=WEIGHT.bfloat16()), TypeError, "weight must be of dtype float32, got bfloat16; convert"),
    (dict(weight=WEIGHT[:, :1]), ValueError, "weight must have 3 channels like pixels, got 1; pass"),
    (
        dict(weight=WEIGHT[..., :3]),
        ValueError,
        r"weight must have square patches of at least one pixel, got \(4, 3\); pass",
    ),
    (dict(weight=WEIGHT[..., :0, :0]), ValueError, r"weight must have square patches .+, got \(0, 0\)"),
    (dict(bias=torch.randn(5, 1)), ValueError, r"bias must have shape \[E\], got \(5, 1\)"),
    (dict(bias=torch.randn(4)), ValueError, r"bias must have shape \(5,\) like weight, got \(4,\); pass"),
    (dict(bias=torch.randn(5).double()), TypeError, "bias must be of dtype float32, got float64"),
    (dict(pos_embed=torch.randn(1, 6, 5)), ValueError, r"pos_embed must have shape \[N, E\], got \(1, 6, 5\)"),
    (dict(pos_embed=torch.randn(7, 5)), ValueError, r"pos_embed must have shape \(6, 5\), got \(7, 5\); interpolate"),
    (dict(ids=None, packing=Packing.from_lengths([1, 2])), TypeError, "ids must be given with a packing, got None"),
    (dict(ids=IDS.float()), TypeError, "ids must be of dtype int64, got float32"),
    (dict(ids=IDS[0]), ValueError, r"ids must have shape \[M, K\], got \(2,\)"),
    (dict(ids=IDS + 1), ValueError, r"ids must lie in \[0, 6\) .+, got 6 at position 3; sort"),
    (dict(ids=IDS.flip(1)), ValueError, "ids must .+ increase within each row, got 0 at position 1"),
    (dict(ids=torch.tensor([[0, 2], [1, 1]])), ValueError, "ids must .+ increase within each row, got 1 at position 3"),
    (dict(ids=IDS[:1]), ValueError, "ids must hold a multiple of the 2 images, got 1; order"),
    (dict(ids=IDS.t()), ValueError, "ids must be contiguous, got strides"),
    (dict(ids=IDS[0], packing=Packing.from_lengths([1, 2])), ValueError, "ids must hold packing.tokens = 3 ids, got 2"),
    (dict(ids=IDS[0], packing=Packing.from_lengths([2])), ValueError, "packing must hold a multiple of the 2 images"),
    (dict(packing=IDS), TypeError, "packing must be a Packing, got Tensor; build one with Packing.from_lengths"),
    (dict(weight=WEIGHT.to("meta")), ValueError, "weight must be on cpu, got meta"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:44] for *_, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match="embed_patches: " + message):
        jk.embed_patches(**{**dict(pixels=PIXELS, ids=IDS, weight=WEIGHT), **change})


def test_gradients_that_are_not_wanted_share_no_tensor(kernel):
    pixels, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 4, 4)
    grad, wanted = torch.randn(2, 4, 5), [False, True, False, False]
    backward = torch.ops.jepa_kernels.embed_patches_backward
    found = backward(grad, pixels, None, weight, None, [], [], wanted, kernel)
    assert [x.numel() for x in found] == [0, weight.numel(), 0, 0]
    assert len({x.untyped_storage()._cdata for x in found}) == 4
