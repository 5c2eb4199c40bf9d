"""embed_patches of clips, of bytes and of images shown as equal frames: values by hand, equivalences, and messages."""

import pytest
import torch
import torch.nn.functional as F

import jepa_kernels as jk
from jepa_kernels import Packing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(params=("reference", "cpu"))
def backend(request):
    return request.param


def whole_numbers(*shape):
    """Small integers: sums of their products are exact in fp32, whatever the order."""
    return torch.randint(-4, 5, shape).float()


def some_ids(masks, batch, count, kept):
    return torch.stack([torch.randperm(count)[:kept].sort().values for _ in range(masks * batch)])


def some_bytes(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def both(out, leaves, grad=None):
    """The output and the gradients of its leaves."""
    grad = torch.ones_like(out).cumsum(-1) if grad is None else grad
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_clips_by_hand(backend):
    # two frames a token: the first once, the second ten times; ids run along the row, then down, then through time
    pixels = torch.arange(1.0, 17.0).view(1, 1, 4, 2, 2).requires_grad_()
    weight = torch.tensor([1.0, 10]).view(1, 1, 2, 1, 1).requires_grad_()
    pos = torch.arange(0.0, 800, 100)[:, None].requires_grad_()
    ids = torch.tensor([[0, 1, 2, 7]])
    out = jk.embed_patches(pixels, ids, weight, None, pos, backend=backend)
    assert out.flatten().tolist() == [1 + 50, 100 + 2 + 60, 200 + 3 + 70, 700 + 12 + 160]
    grad = torch.tensor([[[1.0], [0], [0], [2]]])
    dpixels, dweight, dpos = torch.autograd.grad(out, (pixels, weight, pos), grad)
    assert dweight.flatten().tolist() == [1 + 2 * 12, 5 + 2 * 16]
    assert dpixels.flatten().tolist() == [1, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 20]
    assert dpos.flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 2]


def test_bytes_by_hand(backend):
    # (p / 255 - 0.2) / (1 / 255) = p - 51 in the first channel, p / 2 in the second
    pixels = torch.tensor([[51, 52], [255, 0], [8, 4], [2, 6]], dtype=torch.uint8).view(1, 2, 2, 2)
    weight = torch.ones(1, 2, 1, 2).expand(1, 2, 2, 2).contiguous().requires_grad_()
    packing, ids = Packing.from_lengths([1]).padded(2, 1, 1), torch.tensor([0, 99])
    options = dict(packing=packing, mean=(0.2, 0.0), std=(1 / 255, 2 / 255), backend=backend)
    out = jk.embed_patches(pixels, ids, weight, **options)
    assert out.flatten().tolist() == pytest.approx([0 + 1 + 204 - 51 + 4 + 2 + 1 + 3, 0], rel=1e-6)
    (dweight,) = torch.autograd.grad(out, weight, torch.tensor([[2.0], [0]]))
    assert dweight.flatten().tolist() == pytest.approx([0, 2, 408, -102, 8, 4, 2, 6], rel=1e-5, abs=1e-4)


def test_gradients_pass_through_the_normalisation(backend):
    pixels = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1).requires_grad_()
    weight = torch.tensor([7.0, 11.0]).view(1, 2, 1, 1).requires_grad_()
    out = jk.embed_patches(pixels, None, weight, mean=(1.0, 2.0), std=(0.5, 0.25), backend=backend)
    assert out.item() == 7 * (3 - 1) / 0.5 + 11 * (5 - 2) / 0.25
    dpixels, dweight = torch.autograd.grad(out, (pixels, weight), torch.full_like(out, 3))
    assert dpixels.flatten().tolist() == [3 * 7 / 0.5, 3 * 11 / 0.25]
    assert dweight.flatten().tolist() == [3 * 4, 3 * 12]


@pytest.mark.parametrize("tubelet, patch, frames", [(2, 16, 4), (3, 5, 3), (1, 14, 2)])
def test_clips_equal_convolution_and_gather_exactly(tubelet, patch, frames, backend):
    pixels = whole_numbers(2, 3, frames, 3 * patch, 4 * patch).requires_grad_()
    weight, bias = whole_numbers(40, 3, tubelet, patch, patch).requires_grad_(), whole_numbers(40).requires_grad_()
    count = frames // tubelet * 12
    pos, ids = whole_numbers(count, 40).requires_grad_(), some_ids(2, 2, count, 9)
    tokens = F.conv3d(pixels, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + pos
    expected = tokens[torch.arange(4)[:, None] % 2, ids]
    out = jk.embed_patches(pixels, ids, weight, bias, pos, backend=backend)
    leaves, grad = (pixels, weight, bias, pos), whole_numbers(4, 9, 40)
    assert equal(both(out, leaves, grad), both(expected, leaves, grad))
    assert torch.equal(jk.embed_patches(pixels, None, weight, bias, pos, backend=backend), tokens)


@pytest.mark.parametrize("tubelet", [2, 4])
def test_an_image_shown_as_frames_equals_the_repeated_clip_exactly(tubelet, backend):
    image, weight = whole_numbers(2, 3, 12, 8).requires_grad_(), whole_numbers(20, 3, tubelet, 4, 4).requires_grad_()
    ids, pos = some_ids(2, 2, 6, 4), whole_numbers(6, 20).requires_grad_()
    clip = image.unsqueeze(2).repeat(1, 1, tubelet, 1, 1)
    leaves = (image, weight, pos)
    shown = both(jk.embed_patches(image, ids, weight, None, pos, backend=backend), leaves)
    assert equal(shown, both(jk.embed_patches(clip, ids, weight, None, pos, backend=backend), leaves))
    assert equal(shown[2].unbind(2), [shown[2][:, :, 0]] * tubelet)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_shown_as_frames_is_the_summed_weight_bit_for_bit(dtype):
    image, weight = torch.randn(2, 3, 42, 28).to(dtype), torch.randn(70, 3, 2, 14, 14).to(dtype)
    if dtype == torch.bfloat16:  # so that the sum, which stays in fp32, is a bf16 number too
        weight = whole_numbers(*weight.shape).to(dtype)
    ids, (image, weight) = some_ids(2, 2, 6, 4), (image.requires_grad_(), weight.requires_grad_())
    summed = weight.detach().sum(2).requires_grad_()
    shown = both(jk.embed_patches(image, ids, weight, backend="cpu"), (image, weight))
    plain = both(jk.embed_patches(image, ids, summed, backend="cpu"), (image, summed))
    assert equal(shown[:2], plain[:2])
    assert equal(shown[2].unbind(2), [plain[2]] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tubelet_equals_its_frames_as_channels_exactly(dtype):
    clip, weight = torch.randn(2, 3, 2, 42, 28).to(dtype), torch.randn(70, 3, 2, 14, 14).to(dtype)
    leaves = [x.requires_grad_() for x in (clip, weight, torch.randn(70).to(dtype))]
    ids, twice = some_ids(2, 2, 6, 4), [v for c in MEAN for v in (c, c)]
    options = dict(std=(0.5,) * 3, backend="cpu"), dict(std=(0.5,) * 6, backend="cpu")
    tubes = both(jk.embed_patches(clip, ids, weight, leaves[2], mean=MEAN, **options[0]), leaves)
    stacked = clip.flatten(1, 2), ids, weight.flatten(1, 2), leaves[2]
    assert equal(tubes, both(jk.embed_patches(*stacked, mean=twice, **options[1]), leaves))


def test_packed_equals_rectangular_equals_one_mask_at_a_time_exactly():
    clip, weight = some_bytes(2, 3, 4, 48, 64), torch.randn(40, 3, 2, 16, 16)
    pos, options = torch.randn(24, 40), dict(mean=MEAN, std=STD, backend="cpu")
    masks = some_ids(3, 2, 24, 7).split(2)
    alone = torch.cat([jk.embed_patches(clip, ids, weight, None, pos, **options) for ids in masks])
    assert torch.equal(jk.embed_patches(clip, torch.cat(masks), weight, None, pos, **options), alone)
    ids, packing = Packing.from_ids(list(torch.cat(masks)))
    packed = jk.embed_patches(clip, ids, weight, None, pos, packing=packing, **options)
    assert torch.equal(packed, alone.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_equal_the_same_floats_exactly(dtype):
    clip, weight = some_bytes(2, 3, 4, 42, 28), torch.randn(70, 3, 2, 14, 14).to(dtype).requires_grad_()
    ids, wide = some_ids(2, 2, 12, 5), dict(mean=[255 * v for v in MEAN], std=[255 * v for v in STD])
    out = jk.embed_patches(clip, ids, weight, mean=MEAN, std=STD, backend="cpu")
    floats = jk.embed_patches(clip.to(dtype), ids, weight, **wide, backend="cpu")
    assert out.dtype == dtype and equal(both(out, (weight,)), both(floats, (weight,)))


def test_bytes_as_a_decoder_lays_them_out_give_the_same_bits():
    frames = some_bytes(2, 4, 40, 40, 3)  # [B, T, H, W, C], and cropped
    clip, weight, ids = (
        frames.permute(0, 4, 1, 2, 3)[..., 3:35, 5:37],
        torch.randn(20, 3, 2, 16, 16),
        some_ids(1, 2, 8, 5),
    )
    options = dict(mean=MEAN, std=STD, backend="cpu")
    expected = jk.embed_patches(clip.contiguous(), ids, weight, **options)
    assert torch.equal(jk.embed_patches(clip, ids, weight, **options), expected)


def test_images_further_apart_than_32_bits_reach():
    memory = torch.empty(2**31 + 4, dtype=torch.uint8)  # reserved; only its ends are touched
    images = memory.as_strided((2, 1, 2, 2), (2**31, 4, 2, 1))
    images[0], images[1] = 1, 2
    out = jk.embed_patches(images, None, torch.ones(1, 1, 2, 2), mean=(0.0,), std=(1 / 255,), backend="cpu")
    assert out.flatten().tolist() == [4, 8]


def test_dropped_tubelets_are_never_read():
    clip = torch.full((1, 1, 4, 2, 4), float("nan"))
    clip[:, :, 2:, :, :2] = 1.0
    leaves = clip.requires_grad_(), torch.ones(1, 1, 2, 2, 2, requires_grad=True)
    out, dpixels, dweight = both(jk.embed_patches(clip, torch.tensor([[2]]), leaves[1], backend="cpu"), leaves)
    assert out.item() == 8 and dweight.eq(1).all()
    assert torch.equal(dpixels, clip.detach().nan_to_num(0))


def test_autocast_leaves_bytes_alone(backend):
    clip, weight = some_bytes(2, 3, 4, 8, 8), torch.randn(5, 3, 2, 4, 4, requires_grad=True)
    options = dict(mean=MEAN, std=STD, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = jk.embed_patches(clip, None, weight, **options)
    assert torch.equal(out, jk.embed_patches(clip, None, weight.bfloat16(), **options))
    assert torch.autograd.grad(out.sum(), weight)[0].dtype == torch.float32


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_bytes_of_two_masks_compile_with_lengths_that_change(compiler):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    clip, weight = some_bytes(2, 3, 4, 16, 24), torch.randn(20, 3, 2, 8, 8, requires_grad=True)

    def embed(ids, packing):
        return jk.embed_patches(clip, ids, weight, packing=packing, mean=MEAN, std=STD, backend="cpu")

    compiled = torch.compile(embed, fullgraph=True, backend=counter)
    for size in range(4):
        ids, packing = Packing.from_ids([torch.arange(n) for n in (3 + size, 5, 8 - size, 2 + size)])
        assert equal(both(compiled(ids, packing), (weight,)), both(embed(ids, packing), (weight,)))
    assert counter.frame_count <= 2


def test_opcheck_of_bytes_and_of_duplicated_frames():
    ids, scale, shift = some_ids(2, 2, 4, 3), [0.5, 1.0, 2.0], [0.0, 1.0, -1.0]
    weight = torch.randn(20, 3, 2, 4, 4, requires_grad=True)
    floats = torch.randn(2, 3, 8, 8, requires_grad=True)
    for pixels in (some_bytes(2, 3, 2, 8, 8), some_bytes(2, 3, 8, 8), floats):
        args = (pixels, ids, weight, None, None, None, scale, shift, "cpu")
        torch.library.opcheck(torch.ops.jepa_kernels.embed_patches.default, args)


CLIP, TUBES = some_bytes(2, 3, 4, 8, 12), torch.randn(5, 3, 2, 4, 4)
FLOATS = torch.randn(2, 3, 4, 8, 12)
UNITS = r"pass mean and std, a number a channel in units of 0\.\.1, ImageNet's .+"
BAD = [
    (dict(weight=TUBES[:, :, 0]), ValueError, r"weight must have shape \[E, C, Pt, P, P\], got \(5, 3, 4, 4\)"),
    (
        dict(pixels=torch.cat([CLIP, CLIP[:, :, :1]], 2)),
        ValueError,
        r"pixels must have frames divisible by the tubelet size 2, got 5; cut the clip: pixels\[:, :, :4\]",
    ),
    (
        dict(pixels=CLIP[:, :, :1]),
        ValueError,
        r"pixels must have frames divisible by the tubelet size 2, got 1; pass a lone frame as an image, "
        r"pixels\[:, :, 0\]",
    ),
    (dict(pixels=CLIP[..., :9]), ValueError, r"pixels must have sides divisible .+, got 8 x 9; crop to 8 x 8: .+"),
    (
        dict(weight=TUBES[..., :3]),
        ValueError,
        r"weight must have square patches of at least one pixel, got \(2, 4, 3\); pass \[E, C, Pt, P, P\]",
    ),
    (dict(weight=TUBES[:, :, :0]), ValueError, r"weight must have square patches .+, got \(0, 4, 4\)"),
    (dict(weight=TUBES.int()), TypeError, "weight must be of dtype float32, .+, got int32; convert"),
    (dict(bias=torch.randn(5).bfloat16()), TypeError, "bias must be of dtype float32, got bfloat16; convert"),
    (dict(pos_embed=torch.randn(6, 5)), ValueError, r"pos_embed must have shape \(12, 5\), got \(6, 5\); interpolate"),
    (dict(mean=None), TypeError, "mean must be given with uint8 pixels, got None; " + UNITS),
    (dict(std=None), TypeError, "std must be given with uint8 pixels, got None; " + UNITS),
    (dict(pixels=FLOATS, mean=None), TypeError, "mean must be given with std, got None; pass both"),
    (dict(pixels=FLOATS, std=None), TypeError, "std must be given with mean, got None; pass both"),
    (dict(mean=torch.zeros(3)), TypeError, "mean must be a tuple of numbers, got Tensor; convert it with .+ once"),
    (dict(std=("a", "b", "c")), TypeError, "std must be a tuple of numbers, got tuple; convert"),
    (dict(mean=0.5), TypeError, "mean must be a tuple of numbers, got float; convert"),
    (dict(mean=(0.5,)), ValueError, "mean must hold 3 numbers, one a channel, got 1; pass one of each channel"),
    (dict(std=(1.0, 0.0, 1.0)), ValueError, r"std must be positive, got \(1.0, 0.0, 1.0\); leave out channels"),
    (dict(mean=(0.0, float("nan"), 0.0)), ValueError, r"mean must be finite, got \(0.0, nan, 0.0\); compute it again"),
    (dict(ids=torch.tensor([[0, 12], [0, 1]])), ValueError, r"ids must lie in \[0, 12\) .+, got 12 at position 1"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:44] for *_, m in BAD])
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match="embed_patches: " + message):
        jk.embed_patches(**{**dict(pixels=CLIP, ids=None, weight=TUBES, mean=MEAN, std=STD), **change})
