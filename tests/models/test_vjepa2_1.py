"""V-JEPA 2.1: every option against the equations, the dense loss, images and clips, anticipation, public sizes."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import jepa_kernels as jk
from jepa_kernels.masks import MultiBlock3d
from jepa_kernels.models import vjepa, vjepa2_1
from jepa_kernels.models.jepa import train_step
from jepa_kernels.models.vjepa2_1 import VJEPA2_1
from jepa_kernels.nn import Encoder
from jepa_kernels.packing import Packing
from tests.models import video_equations
from tests.models.training import by_the_equations, networks, over_budget, results
from tests.models.weights import shaken

CONFIG = replace(
    vjepa2_1.vit_giant_xformers(),
    crop_size=(8, 12),
    num_frames=6,
    patch_size=4,
    embed_dim=32,
    depth=4,
    num_heads=2,
    mlp_ratio=2.0,
    predictor_embed_dim=32,
    predictor_depth=2,
    predictor_num_heads=2,
    num_mask_tokens=2,
)
GRID = (3, 2, 3)
each_batching = pytest.mark.parametrize("truncate", [False, True], ids=["packed", "truncated"])


def far_from_its_start(**changes):
    return shaken(VJEPA2_1(replace(CONFIG, **changes)), 0.15)


@pytest.fixture
def model():
    return far_from_its_start()


def sample(step, truncate=False, batch=2, grid=GRID, frames=None):
    """Clips, or images of one frame, and masks of both published kinds."""
    frames = 2 * grid[0] if frames is None else frames
    generator = torch.Generator().manual_seed(step)
    clips = torch.randn(batch, 3, frames, 4 * grid[1], 4 * grid[2], generator=generator)
    return clips, MultiBlock3d(grid, truncate=truncate)(batch, step=step)


def matches(model, clips, masks):
    """Whether loss and gradients are those of the equations; returns them."""
    model, clips = model.double(), clips.double()
    expected = results(by_the_equations(model, clips, masks, lambda mask: 0)[0], model)
    with jk.use_backend("reference"):
        actual = results(model.loss(clips, masks.to("cpu")), model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():  # angles of the equations are exact, ours are rounded to fp32
        assert (actual[name] - value).norm() <= 4e-6 * value.norm(), name
    return actual


@each_batching
def test_loss_and_gradients_are_those_of_the_equations(model, truncate):
    actual = matches(model, *sample(0, truncate))
    unused = {name for name, p in model.named_parameters() if p.requires_grad and name not in actual}
    image = {f"context_encoder.patch_embed_img.proj.{part}" for part in ("weight", "bias")}
    assert unused == image | {"context_encoder.img_mod_embed", "predictor.img_mod_embed", "predictor.mask_tokens.1"}


def test_of_clips_of_another_size(model):
    matches(model, *sample(1, grid=(2, 3, 2)))


def test_images_have_patches_and_modality_embeddings_of_their_own(model):
    images, masks = sample(2, grid=(1, 4, 5), frames=1)
    actual = matches(model, images, masks)
    assert "context_encoder.patch_embed_img.proj.weight" in actual and "predictor.img_mod_embed" in actual
    assert not {"context_encoder.patch_embed.proj.weight", "context_encoder.video_mod_embed"} & actual.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": "tiled"},
        {"interpolate_rope": False},
        {"predictor_interpolate_rope": False},
        {"modality_embedding": False},
        {"levels": 1},
        {"levels": None},
        {"predict_all": False},
        {"context_weight": 0.25},
        {"weight_distance_loss": False},
        {"frame_causal": True},
        {"depth": 8},  # quarters of two blocks, whose last ones have the norms
    ],
    ids=str,
)
def test_each_option_does_what_the_equations_say_and_changes_the_loss(model, changes):
    clips, masks = sample(3, grid=(2, 5, 4))  # large enough for places at some distance from every target
    other = far_from_its_start(**changes)
    own = model.state_dict()
    shared = {n: own[n] for n, x in other.state_dict().items() if n in own and own[n].shape == x.shape}
    other.load_state_dict(shared, strict=False)
    before = model.loss(clips, masks.to("cpu"))
    after = matches(other, clips, masks)["loss"]
    assert abs(after - before) > 1e-4


def test_a_clip_of_one_frame_is_an_image(model):
    images = torch.randn(2, 3, 1, 8, 12)
    assert torch.equal(model.ema(images), model.ema(images[:, :, 0]))


def test_images_without_patches_of_their_own_are_shown_for_a_whole_one():
    model = far_from_its_start(image_tokenizer=False)
    images = torch.randn(2, 3, 8, 12)
    clips = images[:, :, None].expand(-1, -1, 2, -1, -1)
    found, encoder = model.ema(images), model.target_encoder
    assert not torch.allclose(found, model.ema(clips), atol=1e-2)
    encoder.video_mod_embed.data.copy_(encoder.img_mod_embed)  # images are told apart by their own embedding alone
    torch.testing.assert_close(found, model.ema(clips), rtol=0, atol=1e-5)
    assert model.context_encoder.patch_embed_img is None


def test_distances_count_in_units_of_sixteen_rows():
    model = far_from_its_start(crop_size=(128, 8), num_frames=2, offset_context_loss=True)
    clips, masks = sample(4, batch=1, grid=(1, 32, 2))
    after = matches(model, clips, masks)["loss"]
    model.config = replace(model.config, offset_context_loss=False)
    with jk.use_backend("reference"):
        before = model.loss(clips.double(), masks.to("cpu"))
    assert abs(after - before) > 1e-3


def test_distances_in_units_of_no_row_are_refused():
    model = far_from_its_start(offset_context_loss=True)
    with pytest.raises(ValueError, match=r"^VJEPA2: offset_context_loss must have 16 rows of patches or more, got 2; "):
        model.loss(sample(0)[0], sample(0)[1].to("cpu"))


def test_loss_and_gradients_are_within_the_error_budget_of_the_reference():
    runs = [(far_from_its_start(), *sample(step)) for step in range(2)]
    assert not over_budget([(model, clips, masks.to("cpu")) for model, clips, masks in runs])


@pytest.mark.parametrize("frames", [6, 1], ids=["clips", "images"])
def test_a_step_trains_two_networks_and_the_third_follows_them(model, frames):
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    clips, masks = sample(0, grid=GRID if frames > 1 else (1, 4, 5), frames=frames)
    loss = train_step(model, optimizer, clips, masks.to("cpu"), 0.99925, dtype=torch.bfloat16)
    assert loss.isfinite() and loss.dtype == torch.float32
    after = dict(model.named_parameters())
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    own, other = ("video", "img") if frames > 1 else ("img", "video")
    assert {f"{own}_mod_embed", "norms_block.0.weight", "blocks.3.mlp.fc2.bias"} <= in_network("context_encoder", moved)
    assert {f"{own}_mod_embed", "mask_tokens.0", "predictor_proj_context.bias"} <= in_network("predictor", moved)
    assert in_network("target_encoder", moved) >= {"norms_block.3.bias", f"{own}_mod_embed"}
    online = in_network("context_encoder", moved) | in_network("predictor", moved)
    assert not online & {f"{other}_mod_embed", "mask_tokens.1"}


def in_network(network, names):
    return {name.removeprefix(f"{network}.") for name in names if name.startswith(f"{network}.")}


def test_predictions_and_their_loss_compile_as_one_graph_for_all_lengths_and_weights():
    torch._dynamo.reset()
    model, counter = far_from_its_start(predictor_depth=1), CompileCounterWithBackend("eager")
    model.context_weight = torch.tensor(0.5)

    def loss(clips, masks, targets):
        return model.compare(model(clips, masks), targets, masks)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step, weight in ((0, 0.0), (2, 0.25), (6, 0.5)):
        model.context_weight.fill_(weight)
        clips, masks = sample(step)
        given = clips, masks.to("cpu"), model.targets(clips)
        torch.testing.assert_close(compiled(*given), loss(*given), rtol=1e-6, atol=0)
    assert counter.frame_count == 2


def test_anticipation_of_places_beyond_the_clip_of_each_row_its_own(model):
    """Targets in frames that the encoder has not seen, further ahead in one clip than in the other."""
    clips, longer, frame = sample(0)[0], (9, 2, 3), GRID[1] * GRID[2]
    ids = torch.arange(math.prod(GRID)).repeat(2, 1)
    later = (ids[:, -frame:] + torch.tensor([[1], [5]]) * frame).contiguous()
    model, clips = model.double(), clips.double()
    with jk.use_backend("reference"):
        context = model.context_encoder(clips, dense=True)
        found, own = model.predictor(context, ids, later, grid=longer)
    p = networks(model)
    for i in range(2):
        whole = torch.cat(video_equations.encode(clips[i], ids[i], p["context_encoder"], CONFIG), -1)
        given = whole, ids[i], later[i], p["predictor"]["mask_tokens.0"][0, 0], longer, p["predictor"], CONFIG
        exact, exact_own = video_equations.predict(*given)
        torch.testing.assert_close(found[i], exact, rtol=0, atol=2e-5)
        torch.testing.assert_close(own[i], exact_own, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"^Predictor: target_ids must lie in \[0, 18\)"):
        model.predictor(context, ids, later)


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (3, 10, 12, 4), (3, 1, 20, 8)], ids=str)
def test_inference_is_the_last_level_whole_and_by_kept_patches(model, shape):
    clips = torch.randn(2, *shape)
    found, grid = model.ema(clips), video_equations.grid_of(clips[0], CONFIG)
    assert found.shape == (2, math.prod(grid), 32) and not found.requires_grad
    ids, packing = Packing.from_ids([torch.tensor([0, 1, 3]), torch.tensor([2])])
    p = {name: value.double() for name, value in networks(model)["target_encoder"].items()}
    kept = packing.split(model.ema(clips, ids, packing))
    for clip, all_of_it, given, wanted in zip(clips, found, kept, packing.split(ids), strict=True):
        for ids, latents in ((wanted, given), (torch.arange(math.prod(grid)), all_of_it)):
            *_, exact = video_equations.encode(clip.double(), ids, p, CONFIG)
            torch.testing.assert_close(latents.double(), exact, rtol=0, atol=2e-5)


def test_places_are_spread_over_the_grid_of_pretraining():
    found = jk.patch_positions(torch.tensor([0, 5, 11, 23]), (2, 3, 4), pretrained_grid=16)
    assert torch.equal(found, torch.tensor([[0, 0, 0], [0, 7.5, 5], [0, 15, 15], [1, 15, 15]]))
    assert torch.equal(jk.patch_positions(torch.arange(3), (3, 1, 1), pretrained_grid=16)[:, 1:], torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"^patch_positions: pretrained_grid must be at least 1, got 0; "):
        jk.patch_positions(torch.arange(3), (3, 1, 1), pretrained_grid=0)


def test_a_distilled_model_predicts_its_teachers_width_and_is_not_trained():
    model = far_from_its_start(levels=1, teacher_embed_dim=52)
    clips, masks = sample(0)
    predicted = model(clips, masks.to("cpu"))
    assert predicted.target.shape[1] == predicted.context.shape[1] == 52
    assert predicted.weight.shape == predicted.context.shape[:1]
    with pytest.raises(ValueError, match=r"^VJEPA2: teacher_embed_dim must be None for targets of its own encoder"):
        model.loss(clips, masks.to("cpu"))


@pytest.mark.parametrize("depth", video_equations.LEVEL_BLOCKS)
def test_levels_are_the_outputs_of_the_published_blocks(depth):
    given = dict(depth=depth, num_heads=1, tubelet_size=2, rope="interleaved", levels=4)
    encoder, outputs = Encoder(8, 4, 8, **given), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features = encoder.features(torch.randn(2, 3, 4, 8, 8)).chunk(4, -1)
    assert [[n for n, x in enumerate(outputs) if torch.equal(x, level)] for level in features] == [
        [n] for n in video_equations.LEVEL_BLOCKS[depth]
    ]


@pytest.mark.parametrize("changes", [{"levels": 5}, {"levels": 0}, {"depth": 6}], ids=str)
def test_levels_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match=r"^Encoder: levels must be 1 to 4, for a depth of as many equal parts, got"):
        far_from_its_start(**changes)


# Parameters in millions, and entries of the state dict, of encoder and predictor.
COUNTS = {
    (vjepa, "vit_large"): (305.5, 293, 22.7, 153),
    (vjepa, "vit_huge"): (633.7, 389, 22.9, 153),
    (vjepa, "vit_huge_384"): (637.5, 389, 24.0, 153),
    (vjepa2_1, "vit_base"): (86.8, 158, 22.9, 162),
    (vjepa2_1, "vit_large"): (304.7, 302, 23.0, 162),
    (vjepa2_1, "vit_giant_xformers"): (1013.3, 494, 55.4, 308),
    (vjepa2_1, "vit_gigantic_xformers"): (1845.2, 590, 59.4, 308),
}


def test_public_sizes_have_the_published_numbers_of_parameters():
    """V-JEPA's with their tables of positions, 1.6 M and more beside about 304 M and 632 M of V-JEPA 2."""
    kinds = {vjepa: vjepa.VJEPA, vjepa2_1: VJEPA2_1}
    assert {(module, name) for module in kinds for name in module.SIZES} == COUNTS.keys()
    for (module, name), counts in COUNTS.items():
        with torch.device("meta"):
            model = kinds[module](module.SIZES[name]())
        found = []
        for network in (model.context_encoder, model.predictor):
            found += [round(sum(p.numel() for p in network.parameters()) / 1e6, 1), len(network.state_dict())]
        assert tuple(found) == counts, (module.__name__, name)
