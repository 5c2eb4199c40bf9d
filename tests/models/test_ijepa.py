"""I-JEPA: its loss and gradients against the equations and against its own reference, and the training step."""

import copy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import jepa_kernels as jk
from jepa_kernels.masks import Masks, MultiBlock2d
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.jepa import train_step
from jepa_kernels.nn import compile_blocks
from jepa_kernels.packing import Packing
from jepa_kernels.pairs import Pairs
from jepa_kernels.testing import poisoned_memory
from tests.models import ijepa_equations
from tests.models.training import failures, rows
from tests.models.weights import shaken

CONFIG = IJEPAConfig(
    crop_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=2, predictor_embed_dim=32, predictor_depth=2
)
GRID = (8, 8)
each_batching = pytest.mark.parametrize("truncate", [False, True], ids=["packed", "truncated"])


def far_from_its_start():
    return shaken(IJEPA(CONFIG), 0.15)


@pytest.fixture
def model():
    return far_from_its_start()


def sample(step, truncate, batch=3):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(batch, 3, 64, 64, generator=generator), MultiBlock2d(8, truncate=truncate)(batch, step=step)


def results(model, images, masks, dtype=None):
    """Loss and every gradient, by name."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = model.loss(images, masks)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))}


@each_batching
def test_loss_and_gradients_are_those_of_the_equations(model, truncate):
    images, masks = sample(0, truncate, batch=2)
    model, images = model.double(), images.double()
    leaves = dict(model.named_parameters())
    ids = rows(masks.context_ids, masks.context_lengths), rows(masks.target_ids, masks.target_lengths)
    loss = ijepa_equations.loss(leaves, images, *ids, GRID, CONFIG)
    trained = {name: p for name, p in leaves.items() if p.requires_grad}
    expected = {"loss": loss, **dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))}
    with jk.use_backend("reference"):
        actual = results(model, images, masks.to("cpu"))
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-11 * value.norm(), name


@each_batching
@pytest.mark.parametrize("dtype, runs", [(None, 4), (torch.bfloat16, 24)], ids=["float32", "bfloat16"])
def test_loss_and_gradients_are_within_the_error_budget_of_the_reference(truncate, dtype, runs):
    actual, exact, eager = [], [], []
    for run in range(runs):
        model, (images, masks) = far_from_its_start(), sample(100 + run, truncate)
        masks = masks.to("cpu")
        with poisoned_memory():
            actual.append(results(model, images, masks, dtype))
        with jk.use_backend("reference"):
            eager.append(results(model, images, masks, dtype))
            exact.append(results(model.double(), images.double(), masks))
    assert not failures(actual, exact, eager)


@pytest.mark.parametrize("shadow_dtype", [None, torch.bfloat16])
def test_under_autocast_the_blocks_of_an_encoder_add_up_in_full_precision_as_published(shadow_dtype):
    torch.manual_seed(0)
    model = IJEPA(replace(CONFIG, depth=12), shadow_dtype=shadow_dtype)
    images, encoder = torch.randn(2, 3, 64, 64), model.target_encoder
    with jk.use_backend("reference"):
        exact = copy.deepcopy(encoder).double()(images.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        x = encoder.patch_embed(images) + encoder.pos_embed  # of bf16 and fp32: fp32
        for block in encoder.blocks:
            x = block(x)
        published, ours = encoder.norm(x), model.targets(images)
    # 1.9 times, for patch and place, whose sum the kernel rounds to bf16; 7.6 times where all sums are.
    assert (ours - exact).norm() <= 3 * (published - exact).norm()


def test_packed_equals_the_same_masks_one_by_one():
    def one_by_one(model, images, masks):
        contexts, targets = rows(masks.context_ids, masks.context_lengths), rows(masks.target_ids, masks.target_lengths)
        pairs = [(s % len(images), ids) for s, ids in enumerate(targets)]
        single = [(images[b, None], (contexts[b][None], ids[None])) for b, ids in pairs]
        losses = [results(model, *call) for call in single]
        mean = {name: torch.stack([found[name] for found in losses]).mean(0) for name in losses[0]}
        return {"predicted": torch.cat([model(*call).detach()[0] for call in single]), **mean}

    actual, exact, eager = [], [], []
    for run in range(12):
        model, (images, masks) = far_from_its_start(), sample(run, truncate=False)
        packed = masks.to("cpu")
        actual.append({"predicted": model(images, packed).detach(), **results(model, images, packed)})
        with jk.use_backend("reference"):
            eager.append(one_by_one(model, images, masks))
            exact.append(one_by_one(model.double(), images.double(), masks))
    assert not failures(actual, exact, eager)


def test_rectangular_ids_are_masks_too(model):
    images, masks = sample(0, truncate=True)
    pair = torch.from_numpy(masks.context_ids), torch.from_numpy(masks.target_ids)
    assert torch.equal(model.loss(images, pair), model.loss(images, masks.to("cpu")))


@each_batching
def test_a_step_trains_two_networks_and_the_third_follows_them(model, truncate):
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images, masks = sample(0, truncate)
    with jk.use_backend("reference"):
        expected = model.loss(images, masks.to("cpu"))
    loss = train_step(model, optimizer, images, masks.to("cpu"), 0.9)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    old, new = dict(before.named_parameters()), dict(model.named_parameters())
    for name, p in new.items():
        assert p.grad is None
        if name.startswith("target_encoder."):
            online = new[name.replace("target_encoder.", "context_encoder.")].double()
            exact = 0.9 * old[name].double() + 0.1 * online  # of the weights after the optimiser's step
            assert (p - exact).abs().max() <= 2**-23 * max(1.0, exact.abs().max())
            assert not p.requires_grad
        else:
            assert torch.equal(p, old[name]) == ("pos_embed" in name), name


def test_momentum_1_leaves_the_target_encoder_as_it_is(model):
    before = copy.deepcopy(model.target_encoder.state_dict())
    optimizer = torch.optim.AdamW(model.predictor.parameters(), lr=1e-3)
    images, masks = sample(0, truncate=False)
    train_step(model, optimizer, images, masks.to("cpu"), 1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.target_encoder.state_dict().items())


@each_batching
def test_two_steps_are_the_same_bits_on_every_run(model, truncate):
    twins = [model, copy.deepcopy(model)]
    for twin in twins:
        optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-3)
        for step in range(2):
            images, masks = sample(step, truncate)
            twin.last = train_step(twin, optimizer, images, masks.to("cpu"), 0.99, dtype=torch.bfloat16)
    assert torch.equal(twins[0].last, twins[1].last)
    states = [twin.state_dict() for twin in twins]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_moving_average_runs_where_the_scaler_skips_the_optimiser(model):
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images, masks = sample(0, truncate=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))  # no gradient is finite
    train_step(model, optimizer, images, masks.to("cpu"), 0.5, scaler=scaler)
    after = model.state_dict()
    for name, value in after.items():
        moves = name.startswith("target_encoder.") and "pos_embed" not in name
        assert torch.equal(value, before[name]) != moves, name


@each_batching
def test_the_loss_compiles_as_one_graph_for_all_lengths(truncate):
    torch._dynamo.reset()
    model = IJEPA(replace(CONFIG, depth=1, predictor_depth=1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    for step in (0, 1, 4):  # no length of step 0 comes again in step 1: from there on all are dynamic
        images, masks = sample(step, truncate)
        loss, eager = compiled(images, masks.to("cpu")), model.loss(images, masks.to("cpu"))
        assert torch.equal(loss, eager)
        ends = [model.predictor.mask_token, model.context_encoder.patch_embed.proj.weight]
        ours, theirs = torch.autograd.grad(loss, ends), torch.autograd.grad(eager, ends)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counter.frame_count == 2


@each_batching
def test_blocks_compile_once_for_all_lengths_and_give_the_same_bits(truncate):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = IJEPA(CONFIG, shadow_dtype=torch.bfloat16)
    twins = [model, copy.deepcopy(model)]
    compile_blocks(model, fullgraph=True, backend="aot_eager")
    for twin in twins:
        trained, shadow = [p for p in twin.parameters() if p.requires_grad], (None, twin.ema.shadow_copies())
        optimizer = jk.AdamWEMA(trained, twin.ema.pairs(), shadow=shadow)
        for step in (0, 1, 4):
            images, masks = sample(step, truncate)
            twin.last = train_step(twin, optimizer, images, masks.to("cpu"), 0.99, dtype=torch.bfloat16)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3, "context, predictor and target blocks"
    assert torch.equal(twins[0].last, twins[1].last)
    states = [twin.state_dict() for twin in twins]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def no_masks(truncate):
    ids = torch.empty((0, 5) if truncate else 0, dtype=torch.int64)
    if truncate:
        return Masks(0, ids, ids)
    return Masks(0, ids, ids, Packing.from_lengths([]), Packing.from_lengths([]), Pairs.from_lengths([], []))


@each_batching
def test_no_images_have_no_loss_and_no_gradient(model, truncate):
    found = results(model, torch.empty(0, 3, 64, 64), no_masks(truncate))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found.values())


def test_masks_of_another_kind_or_batch_are_refused(model):
    images, masks = sample(0, truncate=False)
    with pytest.raises(TypeError, match=r"^IJEPA: masks must be on the device, got a MaskBatch; pass masks.to"):
        model.loss(images, masks)
    with pytest.raises(ValueError, match=r"^IJEPA: masks must belong to 2 images, got 3; sample that many"):
        model.loss(images[:2], masks.to("cpu"))
    ids = torch.arange(4).repeat(6, 1)
    with pytest.raises(ValueError, match=r"^IJEPA: masks must hold 3 contexts and a multiple of 3 targets, got"):
        model.loss(images, (ids, ids))
    with pytest.raises(ValueError, match=r"got \(3, 4\); pass ids \[B, Kc\] and \[masks \* B, Kt\], mask-major"):
        model.loss(images, (ids[:3], ids[:4]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"crop_size": 60}, "Encoder: crop_size must be a multiple of patch_size 8, got 60; crop to a multiple"),
        ({"embed_dim": 50}, "Encoder: embed_dim must be a multiple of 4, got 50; "),
        ({"num_heads": 5}, "Attention: num_heads must divide embed_dim 48, got 5; change either"),
        ({"predictor_embed_dim": 34}, "Predictor: predictor_embed_dim must be a multiple of 4, got 34; "),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        IJEPA(IJEPAConfig(**{**vars(CONFIG), **changes}))
    assert str(error.value).startswith(message)
