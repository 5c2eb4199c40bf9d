"""From pixels to predictions with rotary positions: one packed pass against the equations, mask by mask."""

import copy
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import jepa_kernels as jk
from jepa_kernels.masks import MultiBlock2d
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.jepa import train_step
from jepa_kernels.models.vjepa2 import VJEPA2Config
from jepa_kernels.nn import Encoder, Predictor
from jepa_kernels.packing import Packing
from jepa_kernels.pairs import Pairs
from jepa_kernels.testing import hold, poisoned_memory
from tests.models import video_equations
from tests.models.weights import shaken

SIZES, CLIP, GRID = (2, 4, 4), (3, 6, 16, 24), (3, 4, 6)  # of a patch; of a clip [C, T, H, W]; 72 patches
WIDTH, NARROW, HEADS, DEPTH = 64, 48, 2, 2  # heads of 32 and 24 channels: 2 and 0 of them stay
MASKS = 2
each_pairing = pytest.mark.parametrize("pairing", ["tiled", "interleaved"])


class Model(torch.nn.Module):
    """Both networks, far from their start."""

    def __init__(self, pairing="tiled", depth=DEPTH, encoder_depth=DEPTH):
        super().__init__()
        self.encoder = Encoder((16, 24), 4, WIDTH, encoder_depth, HEADS, tubelet_size=2, rope=pairing)
        self.predictor = Predictor(GRID, WIDTH, NARROW, depth, HEADS, rope=pairing, num_mask_tokens=3)
        shaken(self, 0.1)

    def forward(self, clips, m, mask_index=(2, 0)):
        context = self.encoder(clips, m.context_ids, m.context_packing)
        packings = m.context_packing, m.target_packing, m.pairs
        return self.predictor(context, m.context_ids, m.target_ids, *packings, mask_index=mask_index)


class Masks:
    """Two masks a clip, each a context and the places to predict; packed, or rectangular."""

    def __init__(self, clips, seed=0, kept=None, grid=GRID):
        generator = torch.Generator().manual_seed(seed)
        count, self.contexts, self.targets = grid[0] * grid[1] * grid[2], [], []
        for _ in range(MASKS * clips):
            order = torch.randperm(count, generator=generator)
            here, there = torch.randint(5, 30, (2,), generator=generator).tolist() if kept is None else kept
            self.contexts.append(order[:here].sort().values)
            self.targets.append(order[here : here + there].sort().values)
        if kept is None:
            self.context_ids, self.context_packing = Packing.from_ids(self.contexts)
            self.target_ids, self.target_packing = Packing.from_ids(self.targets)
            self.pairs = Pairs.from_lengths(self.context_packing.lengths, self.target_packing.lengths)
        else:
            self.context_ids, self.target_ids = torch.stack(self.contexts), torch.stack(self.targets)
            self.context_packing = self.target_packing = self.pairs = None


def clips(count=2, shape=CLIP, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def by_the_equations(model, batch, masks, pairing, grid=GRID, mask_index=(2, 0)):
    """Each mask of each clip alone."""
    p, found = dict(model.named_parameters()), []
    encoder, predictor = ({n.split(".", 1)[1]: x for n, x in p.items() if n.startswith(m)} for m in ("enc", "pred"))
    config = VJEPA2Config(
        patch_size=4, depth=DEPTH, num_heads=HEADS, rope=pairing, predictor_num_heads=HEADS,
        predictor_depth=len(model.predictor.predictor_blocks),
    )  # fmt: skip
    for s, (context_ids, target_ids) in enumerate(zip(masks.contexts, masks.targets, strict=True)):
        (context,) = video_equations.encode(batch[s % len(batch)], context_ids, encoder, config)
        token = predictor[f"mask_tokens.{mask_index[s // len(batch)]}"][0, 0]
        found.append(video_equations.predict(context, context_ids, target_ids, token, grid, predictor, config)[0])
    return torch.cat(found)


def results(out, model):
    """Predictions, and the gradient of every parameter for a loss that tells them apart."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad((out * weight).sum(), list(trained.values()), allow_unused=True)
    return {"out": out.detach(), **{n: g for n, g in zip(trained, grads, strict=True) if g is not None}}


@each_pairing
@pytest.mark.parametrize("kept", [None, (11, 17)], ids=["packed", "rectangular"])
@pytest.mark.parametrize("depth", [1, 2])
def test_predictions_and_gradients_are_those_of_the_equations(pairing, kept, depth):
    model, batch, masks = Model(pairing, depth).double(), clips().double(), Masks(2, kept=kept)
    expected = results(by_the_equations(model, batch, masks, pairing), model)
    with jk.use_backend("reference"):
        out = model(batch, masks)
    actual = results(out.flatten(0, -2), model)
    assert actual.keys() == expected.keys() and "predictor.mask_tokens.1" not in actual
    for name, value in expected.items():  # angles of the equations are exact, ours are rounded to fp32
        assert (actual[name] - value).norm() <= 2e-6 * value.norm(), name


@pytest.mark.parametrize("kept", [None, (11, 17)], ids=["packed", "rectangular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_within_the_error_budget_of_the_reference(kept, dtype):
    model, batch, masks = Model().to(dtype), clips(3).to(dtype), Masks(3, kept=kept)
    with poisoned_memory():
        actual = results(model(batch, masks), model)
    with jk.use_backend("reference"):
        eager = results(model(batch, masks), model)
        exact = copy.deepcopy(model).double()
        exact = results(exact(batch.double(), masks), exact)
    parity = [hold(name, actual[name], exact[name], eager[name]) for name in exact]
    assert not [str(p) for p in parity if not p.ok]


def test_packed_equals_each_mask_alone():
    model, batch, masks = Model(), clips(), Masks(2)

    def alone(model, batch):
        found = []
        for s, (context_ids, target_ids) in enumerate(zip(masks.contexts, masks.targets, strict=True)):
            context = model.encoder(batch[s % 2, None], context_ids[None])
            token = (2, 0)[s // 2]
            found.append(model.predictor(context, context_ids[None], target_ids[None], mask_index=token)[0])
        return results(torch.cat(found), model)

    actual, exact = model(batch, masks), copy.deepcopy(model).double()
    with jk.use_backend("reference"):
        eager, wanted = alone(model, batch)["out"], alone(exact, batch.double())
        packed = results(exact(batch.double(), masks), exact)
    for name, value in wanted.items():
        torch.testing.assert_close(packed[name], value, rtol=0, atol=1e-12 * value.abs().max())
    parity = hold("out", actual, wanted["out"], eager)
    assert parity.ok, parity


def packed_tokens(predictor, masks):
    """Contexts, mask tokens, and how they are put in place, as the predictor does."""
    context, token = torch.randn(len(masks.context_ids), NARROW).double(), torch.randn(MASKS, NARROW).double()
    given = dict(context_packing=masks.context_packing, target_packing=masks.target_packing)

    def place(context, token):
        return jk.assemble_tokens(
            context, token, masks.context_ids, masks.target_ids, packing=masks.pairs.packing, **given
        )

    ropes = predictor._ropes(masks.context_ids, masks.target_ids, masks.pairs, GRID)
    return context, token, place, ropes


def test_the_first_product_of_repeated_tokens_is_the_product_of_each():
    predictor, masks = Model().double().predictor, Masks(2)
    context, token, place, _ = packed_tokens(predictor, masks)
    block = predictor.predictor_blocks[0]
    with jk.use_backend("reference"):
        once, each = place(block.qkv(context), block.qkv(token)), block.qkv(place(context, token))
    torch.testing.assert_close(once, each, rtol=0, atol=1e-13)


def test_the_last_block_at_the_target_rows_is_the_whole_block_there():
    predictor, masks = Model().double().predictor, Masks(2)
    context, token, place, (rope, target_rope) = packed_tokens(predictor, masks)
    block, packings = predictor.predictor_blocks[-1], (masks.target_packing, masks.pairs.packing)
    with jk.use_backend("reference"):
        x = place(context, token)
        whole = block(x, masks.pairs.packing, rope)[masks.pairs.target_rows]
        rows = block.cross(x[masks.pairs.target_rows], x, *packings, target_rope)
    torch.testing.assert_close(rows, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("grid", [(2, 6, 3), (5, 2, 7), (1, 3, 3)])
def test_any_grid_is_as_good_as_the_constructors(grid):
    model, masks = Model().double(), Masks(1, grid=grid, kept=(4, 5))
    batch = clips(1, (3, *(n * size for n, size in zip(grid, SIZES, strict=True)))).double()
    expected = by_the_equations(model, batch, masks, "tiled", grid)
    with jk.use_backend("reference"):
        context = model.encoder(batch, masks.context_ids)
        ids = masks.context_ids, masks.target_ids
        actual = model.predictor(context, *ids, grid=model.encoder.grid_of(batch), mask_index=(2, 0))
    assert (actual.flatten(0, 1) - expected).norm() <= 2e-6 * expected.norm()


def test_an_image_is_a_clip_of_equal_frames():
    encoder, image = Model().encoder, clips(2, (3, 16, 24))
    torch.testing.assert_close(encoder(image), encoder(image[:, :, None].expand(-1, -1, 2, -1, -1)), rtol=0, atol=2e-5)


def test_bytes_are_normalised_on_the_way_in():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    encoder = Encoder((16, 24), 4, WIDTH, 1, HEADS, tubelet_size=2, rope="tiled", mean=mean, std=std)
    plain = Encoder((16, 24), 4, WIDTH, 1, HEADS, tubelet_size=2, rope="tiled")
    plain.load_state_dict(encoder.state_dict())
    pixels = torch.randint(0, 256, (2, *CLIP), dtype=torch.uint8)
    channels = (torch.tensor(v).view(3, 1, 1, 1) for v in (mean, std))
    floats = (pixels / 255 - next(channels)) / next(channels)
    torch.testing.assert_close(encoder(pixels), plain(floats), rtol=0, atol=2e-5)


def test_every_patch_by_ids_is_dense_inference():
    encoder, batch = Model().encoder, clips()
    ids, packing = torch.arange(72).repeat(2), Packing.uniform(2, 72)
    dense = encoder(batch)
    torch.testing.assert_close(encoder(batch, ids, packing).view_as(dense), dense, rtol=0, atol=2e-5)


def test_only_networks_with_a_table_have_one_in_their_state():
    model = Model()
    assert not [name for name in model.state_dict() if "pos_embed" in name]
    assert sorted(n for n in model.predictor.state_dict() if "mask_token" in n) == [
        f"mask_tokens.{i}" for i in range(3)
    ]
    table = Encoder(32, 8, 16, 1, 1)
    assert table.pos_embed.shape == (1, 16, 16) and "pos_embed" in table.state_dict()


READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "repeat_interleave")


class NoSync(TorchDispatchMode):
    """Refuses what waits for a device to read a value or a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in READS
        return func(*args, **(kwargs or {}))


@contextmanager
def no_sync():
    methods = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    refused = AssertionError("a value was read")
    patches = [mock.patch.object(torch.Tensor, name, side_effect=refused) for name in methods]
    with NoSync():
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            mock.patch.stopall()


@pytest.mark.parametrize("kept", [None, (11, 17)], ids=["packed", "rectangular"])
def test_a_step_reads_no_value_back(kept):
    model, batch, masks = Model(), clips(), Masks(2, kept=kept)
    with no_sync():
        model(batch, masks).sum().backward()
        with pytest.raises(AssertionError):  # the guard bites
            masks.context_ids.max().item()
    assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("truncate", [False, True], ids=["packed", "truncated"])
def test_a_training_step_reads_no_value_back(truncate):
    sizes = dict(crop_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=2)
    model = IJEPA(IJEPAConfig(**sizes, predictor_embed_dim=32, predictor_depth=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    masks, before = MultiBlock2d(8, truncate=truncate)(2).to("cpu"), model.predictor.mask_token.clone()
    # The loss's backward reads its scalar on the CPU, where that waits for nothing: as on a GPU, it must not here.
    with mock.patch("jepa_kernels.ops.latent_loss.op._graph_is_kept", return_value=True), no_sync():
        train_step(model, optimizer, torch.randn(2, 3, 32, 32), masks, 0.9)
    assert not torch.equal(before, model.predictor.mask_token)


def test_pixels_to_predictions_of_rectangular_masks_compile_as_one_graph_for_all_lengths():
    """Of packed masks too: see test_vjepa2.py."""
    torch._dynamo.reset()
    model, counter = Model(depth=2, encoder_depth=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ends = [model.predictor.mask_tokens[0], model.encoder.patch_embed.proj.weight]
    for seed, kept in enumerate([(11, 17), (7, 20), (9, 30)]):
        batch, masks = clips(seed=seed), Masks(2, seed, kept)
        out, eager = compiled(batch, masks), model(batch, masks)
        assert torch.equal(out, eager)
        ours, theirs = (torch.autograd.grad(x.square().sum(), ends) for x in (out, eager))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counter.frame_count == 2


def predict(model=None, **changes):
    """The predictor of two rectangular masks a clip, some of its arguments changed."""
    m = Masks(2, kept=(11, 17))
    given = dict(context=torch.zeros(4, 11, WIDTH), context_ids=m.context_ids, target_ids=m.target_ids)
    return (Model().predictor if model is None else model)(**{**given, **changes})


def with_table(**options):
    return Predictor((9, 8), WIDTH, NARROW, 1, HEADS, **options)


FIRST = torch.arange(17).repeat(4, 1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Encoder(16, 4, 64, 1, 2, tubelet_size=2), "Encoder: num_frames must be given for a video's table of"),
        (lambda: Encoder(16, 4, 64, 1, 2, rope="spiral"), "Encoder: rope must be interleaved, tiled or None, got 'spi"),
        (lambda: Encoder((16, 4, 4), 4, 64, 1, 2), "Encoder: sizes must be a side or (height, width), and at least 1"),
        (lambda: Encoder(16, 0, 64, 1, 2), "Encoder: sizes must be a side or (height, width), and at least 1, got"),
        (lambda: Encoder(16, 4, 64, 1, 2, mean=(0.5,) * 3), "PatchEmbed: mean and std must be given together, got"),
        (lambda: Encoder(16, 4, 64, 1, 2, mean=[1], std=[1]), "PatchEmbed: mean and std must hold 3 numbers like the"),
        (lambda: Predictor((4, 4), 64, 48, 1, 2, rope="tiled"), "Predictor: grid must be (Gt, Gh, Gw) with rope, got"),
        (lambda: Predictor((4,), 64, 48, 1, 2), "Predictor: grid must be (Gh, Gw) or (Gt, Gh, Gw), got (4,); "),
        (lambda: Predictor((4, 4), 64, 48, 0, 2), "Predictor: depth must be at least 1, got 0; "),
        (lambda: with_table(num_mask_tokens=0), "Predictor: num_mask_tokens must be at least 1, got 0; "),
        (lambda: predict(with_table(), grid=GRID), "Predictor: grid must be None without rope, got (3, 4, 6); "),
        (lambda: predict(with_table(), mask_index=1), "Predictor: mask_index must lie in [0, 1), got 1; "),
        (lambda: predict(grid=(4, 6)), "Predictor: grid must be (Gt, Gh, Gw) with rope, got (4, 6); "),
        (lambda: predict(mask_index=(0, -1)), "Predictor: mask_index must lie in [0, 3), got (0, -1); "),
        (lambda: predict(mask_index=(0, 1, 2)), "assemble_tokens: mask_token must hold a divisor of the 4 sequences"),
        (lambda: predict(target_ids=FIRST - 1), "Predictor: target_ids must lie in [0, 72) and increase within each"),
        (lambda: predict(target_ids=FIRST + 60), "Predictor: target_ids must lie in [0, 72) and increase within each"),
        (lambda: predict(target_ids=FIRST.flip(1)), "Predictor: target_ids must lie in [0, 72) and increase within"),
        (lambda: predict(target_ids=FIRST * 0), "Predictor: target_ids must lie in [0, 72) and increase within each"),
        (lambda: predict(target_ids=FIRST[:, ::2]), "Predictor: target_ids must be contiguous, got strides (17, 2); "),
        (lambda: predict(context_ids=FIRST), "Predictor: context_ids must have shape (4, 11), got (4, 17); "),
        (lambda: Model().encoder(clips(1, (3, 5, 16, 24))), "embed_patches: pixels must "),
        (lambda: Model().encoder(clips(1, (3, 6, 18, 24))), "embed_patches: pixels must "),
        (lambda: Encoder(32, 8, 64, 1, 2)(clips(1, (3, 32, 40))), "embed_patches: pos_embed must have shape (20, 64)"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("index", [True, 1.0, (), torch.tensor(0), "0"])
def test_a_mask_index_is_an_int_or_ints(index):
    with pytest.raises(TypeError, match=r"^Predictor: mask_index must be an int or a list of ints, got "):
        predict(mask_index=index)


def test_positions_of_patches_by_hand():
    ids = torch.tensor([[0, 5, 6], [23, 24, 71]])
    expected = [[[0, 0, 0], [0, 0, 5], [0, 1, 0]], [[0, 3, 5], [1, 0, 0], [2, 3, 5]]]
    found = jk.patch_positions(ids, GRID)
    assert found.dtype == torch.float32 and found.tolist() == expected
    with pytest.raises(TypeError, match=r"^patch_positions: ids must be an int64 tensor, got torch.int32; pass patch"):
        jk.patch_positions(ids.int(), GRID)
    with pytest.raises(ValueError, match=r"^patch_positions: grid must be \(Gt, Gh, Gw\), each at least 1, got \(4, 6"):
        jk.patch_positions(ids, (4, 6))
