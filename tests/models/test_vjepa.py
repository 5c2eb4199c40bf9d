"""V-JEPA: its tables, loss and gradients against the equations, its own reference, the training step, inference."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import jepa_kernels as jk
from jepa_kernels.masks import MultiBlock3d
from jepa_kernels.models.jepa import train_step
from jepa_kernels.models.vjepa import VJEPA, VJEPAConfig
from jepa_kernels.nn import Encoder
from jepa_kernels.nn.patch_embed import sincos_2d, sincos_3d
from jepa_kernels.packing import Packing
from tests.models import video_equations
from tests.models.training import by_the_equations, networks, over_budget, results
from tests.models.weights import shaken

CONFIG = VJEPAConfig(
    crop_size=(8, 12),
    num_frames=6,
    patch_size=4,
    embed_dim=32,
    depth=2,
    num_heads=2,
    predictor_embed_dim=32,
    predictor_depth=2,
)
GRID = (3, 2, 3)
each_batching = pytest.mark.parametrize("truncate", [False, True], ids=["packed", "truncated"])


def far_from_its_start(**changes):
    return shaken(VJEPA(replace(CONFIG, **changes)), 0.15)


@pytest.fixture
def model():
    return far_from_its_start()


def sample(step, truncate=False, batch=2):
    clips = torch.randn(batch, 3, 6, 8, 12, generator=torch.Generator().manual_seed(step))
    return clips, MultiBlock3d(GRID, truncate=truncate)(batch, step=step)


def regulariser(predictions, count):
    spread = torch.stack([(x.var(0) + 1e-4).sqrt() for x in predictions]).unflatten(0, (-1, count)).mean(0)
    return (1 - spread).clamp_min(0).mean()


def loss_by_the_equations(model, clips, masks):
    c = model.config
    loss, found = by_the_equations(model, clips, masks, lambda mask: mask % c.num_mask_tokens)
    return loss + c.reg_coeff * regulariser(found, len(clips))


@pytest.mark.parametrize("dim, uniform_power", [(32, True), (48, True), (32, False)], ids=str)
def test_tables_are_those_of_the_equations(dim, uniform_power):
    found = sincos_3d((3, 4, 5), dim, uniform_power=uniform_power).double()
    assert torch.equal(found, video_equations.table((3, 4, 5), dim, uniform_power))


def test_the_table_of_one_frame_is_not_that_of_images():
    """I-JEPA's begins with the column, V-JEPA's with the row, behind the half of the frame."""
    of_clip, of_image = sincos_3d((1, 3, 4), 64, uniform_power=False), sincos_2d((3, 4), 32)
    assert torch.equal(of_clip[:, 32:].roll(16, 1), of_image) and not torch.equal(of_clip[:, 32:], of_image)


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss_exp": 1.5}, {"reg_coeff": 3.0}, {"uniform_power": False}, {"num_mask_tokens": 1}],
    ids=str,
)
@each_batching
def test_loss_and_gradients_are_those_of_the_equations(truncate, changes):
    model, (clips, masks) = far_from_its_start(**changes).double(), sample(0, truncate)
    clips = clips.double()
    expected = results(loss_by_the_equations(model, clips, masks), model)
    with jk.use_backend("reference"):
        actual = results(model.loss(clips, masks.to("cpu")), model)
        model.config = replace(CONFIG, num_mask_tokens=model.config.num_mask_tokens)
        plain = model.loss(clips, masks.to("cpu"))
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-11 * value.norm(), name
    if changes.keys() & {"loss_exp", "reg_coeff"}:
        assert abs(plain - actual["loss"]) > 1e-2


def test_each_kind_of_mask_has_its_own_token(model):
    clips, masks = sample(0)
    changed = copy.deepcopy(model)
    changed.predictor.mask_tokens[1].data[..., 0] += 1
    before, after = model(clips, masks.to("cpu")), changed(clips, masks.to("cpu"))
    first = int(masks.target_lengths[:2].sum())
    assert torch.equal(before[:first], after[:first]) and not torch.isclose(before[first:], after[first:]).any()


def test_loss_and_gradients_are_within_the_error_budget_of_the_reference():
    runs = [(far_from_its_start(reg_coeff=0.5), *sample(step)) for step in range(2)]
    assert not over_budget([(model, clips, masks.to("cpu")) for model, clips, masks in runs])


@each_batching
def test_a_step_trains_two_networks_and_the_third_follows_them(model, truncate):
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    clips, masks = sample(0, truncate)
    with jk.use_backend("reference"):
        expected = model.loss(clips, masks.to("cpu"))
    loss = train_step(model, optimizer, clips, masks.to("cpu"), 0.998)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    after = dict(model.named_parameters())
    for name, p in after.items():
        if "pos_embed" in name:
            assert torch.equal(p, before[name])
        elif name.startswith("target_encoder."):
            online = after[name.replace("target_encoder.", "context_encoder.")]
            torch.testing.assert_close(p, 0.998 * before[name] + 0.002 * online, rtol=0, atol=2**-22)
        else:
            assert not torch.equal(p, before[name]), name


def test_predictions_and_their_loss_compile_as_one_graph_for_all_lengths():
    torch._dynamo.reset()
    model = far_from_its_start(reg_coeff=0.5, depth=1, predictor_depth=1)
    counter = CompileCounterWithBackend("eager")

    def loss(clips, masks, targets):
        return model.compare(model(clips, masks), targets, masks)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for step in (0, 2, 6):
        clips, masks = sample(step)
        given = clips, masks.to("cpu"), model.targets(clips)
        torch.testing.assert_close(compiled(*given), loss(*given), rtol=1e-6, atol=0)
    assert counter.frame_count == 1


def test_inference_by_kept_patches_and_of_other_sizes(model):
    clips, _ = sample(0)
    ids, packing = Packing.from_ids([torch.tensor([0, 2, 17]), torch.tensor([1, 5])])
    p = {name: value.double() for name, value in networks(model)["target_encoder"].items()}
    for clip, found, kept in zip(clips, packing.split(model.ema(clips, ids, packing)), packing.split(ids), strict=True):
        (exact,) = video_equations.encode(clip.double(), kept, p, model.config)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"^embed_patches: pos_embed must have shape \(12, 32\)"):
        model.ema(clips[:, :, :4])


def between(n, wanted):
    """[wanted, n]: what each of n places in a row weighs at the centres of others spread over the same line."""
    weights = torch.zeros(wanted, n)
    for i in range(wanted):
        at = min(max((i + 0.5) * n / wanted - 0.5, 0.0), n - 1.0)
        left = min(int(at), n - 1)
        weights[i, left] += 1 - (at - left)
        weights[i, min(left + 1, n - 1)] += at - left
    return weights


@pytest.mark.parametrize("grid", [(4, 3, 5), (2, 2, 3), (3, 4, 6)], ids=str)
def test_the_table_of_encoders_is_resized_where_it_is_asked_for(grid):
    model = far_from_its_start(interpolate_positions=True)
    clips = torch.randn(2, 3, 2 * grid[0], 4 * grid[1], 4 * grid[2])
    other = VJEPA(replace(CONFIG, num_frames=2 * grid[0], crop_size=(4 * grid[1], 4 * grid[2]))).target_encoder
    state = model.target_encoder.state_dict()
    weights = (between(n, wanted) for n, wanted in zip(GRID, grid, strict=True))
    table = torch.einsum("at,bh,cw,thwe->abce", *weights, state["pos_embed"][0].unflatten(0, GRID))
    other.load_state_dict({**state, "pos_embed": table.view(1, -1, 32)})
    ids = torch.tensor([[0, 3, 11], [2, 5, 7]])
    for given in ((clips,), (clips, ids)):
        torch.testing.assert_close(model.ema(*given), other(*given), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"pos_embed must have shape|pixels must have .* patches like the table"):
        far_from_its_start().ema(clips)
    with pytest.raises(ValueError, match=r"^VJEPA: batch must have \(3, 2, 3\) patches like the predictor's table"):
        model(clips, (ids, ids + 1))


@pytest.mark.parametrize("options", [{"rope": "tiled", "tubelet_size": 2}, {}], ids=["rope", "images"])
def test_there_must_be_a_table_of_clips_to_resize(options):
    with pytest.raises(ValueError, match=r"^Encoder: interpolate_positions must be False without a table for clips"):
        Encoder(8, 4, 32, 1, 2, interpolate_positions=True, **options)


def test_one_target_of_each_clip_has_no_spread():
    model, (clips, _) = far_from_its_start(reg_coeff=1.0), sample(0)
    context, target = torch.arange(4).repeat(2, 1), torch.tensor([[7], [12]])
    dense = model.loss(clips, (context, target))
    plain = far_from_its_start()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(dense, plain.loss(clips, (context, target)) + 0.99, rtol=1e-5, atol=0)  # sqrt(1e-4)
    dense.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_no_clips_have_no_loss():
    model, ids = far_from_its_start(reg_coeff=1.0), torch.empty(0, 5, dtype=torch.int64)
    assert model.loss(torch.empty(0, 3, 6, 8, 12), (ids, ids)) == 0


def test_tables_of_both_networks_are_parameters_of_the_published_names(model):
    state = model.state_dict()
    assert state["context_encoder.pos_embed"].shape == (1, 18, 32)
    assert state["predictor.predictor_pos_embed"].shape == (1, 18, 32)
    expected = video_equations.table(GRID, 32).float().numpy()
    assert np.array_equal(state["target_encoder.pos_embed"][0], expected)
    assert [name for name in state if "mask_token" in name] == ["predictor.mask_tokens.0", "predictor.mask_tokens.1"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_frames": 5}, "Encoder: num_frames must be a multiple of tubelet_size 2, got 5; cut the clip to one"),
        ({"embed_dim": 36, "uniform_power": False}, "Encoder: embed_dim must be a multiple of 8, got 36; "),
        ({"predictor_embed_dim": 36, "uniform_power": False}, "Predictor: predictor_embed_dim must be a multiple of 8"),
        ({"num_mask_tokens": 0}, "Predictor: num_mask_tokens must be at least 1, got 0; "),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        VJEPA(replace(CONFIG, **changes))
    assert str(error.value).startswith(message)
