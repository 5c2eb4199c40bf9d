"""LeWorldModel against its equations, the published names of its weights, and what a planner asks of it."""

import copy
import math
import re

import pytest
import torch
from safetensors.torch import load_file

import jepa_kernels as jk
from jepa_kernels.models import lewm
from jepa_kernels.models.jepa import train_step
from jepa_kernels.models.layouts import LEWM, to_huggingface
from jepa_kernels.models.lewm import LeWMConfig, LeWorldModel
from jepa_kernels.models.world import Context
from jepa_kernels.nn.actions import InverseDynamics
from tests.models import lewm_equations
from tests.models.training import failures, results
from tests.models.weights import same, shaken

SMALL = LeWMConfig(
    crop_size=24, patch_size=8, embed_dim=48, depth=2, num_heads=2, projector_hidden=40, action_dim=3, action_hidden=16,
    predictor_depth=2, predictor_num_heads=4, predictor_head_dim=32, predictor_hidden=56, dropout=0.0,
)  # fmt: skip


LONG = lewm.replace(SMALL, rollout_steps=3, inverse_weight=0.5, inverse_hidden=20)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return shaken(LeWorldModel(SMALL), 0.1)


@pytest.fixture
def world(model):
    """In evaluation mode, with batch norms that have seen something."""
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, 4, 3, 24, 24), torch.randn(4, 3, 3))
    return model.eval()


def batch(seed, dtype=torch.float32, length=4, rows=3):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(rows, length, 3, 24, 24, generator=generator)
    return frames.to(dtype), torch.randn(rows, length - 1, 3, generator=generator).to(dtype)


def test_under_autocast_the_blocks_of_the_encoder_add_up_in_full_precision(model):
    found = []
    for block in model.encoder.blocks[:-1]:
        block.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch(0))
    assert found == [torch.float32]


UNFELT = {"encoder.norm.bias", "projector.net.0.bias", "pred_proj.net.0.bias", "predictor.transformer.norm.bias"}


def by_the_equations(model, frames, actions):
    """Loss and gradients; SIGReg has a reference and tests of its own."""
    state = dict(model.named_parameters())
    predicted, embeddings = lewm_equations.forward(state, frames, actions, model.config)
    error = ((predicted - embeddings[:, 1:]) ** 2).mean()
    return results(error + 0.09 * jk.sigreg(embeddings.transpose(0, 1), backend="reference"), model)


def test_loss_and_gradients_are_those_of_the_equations(model):
    double = copy.deepcopy(model).double()
    kernels, exact, eager = [], [], []
    for seed in range(3):
        model.sigreg.global_step.zero_()
        kernels.append(results(model.loss(*batch(seed)), model))
        exact.append(by_the_equations(double, *batch(seed, torch.float64)))
        eager.append(by_the_equations(model, *batch(seed)))
    assert exact[0].keys() == {"loss", *dict(model.named_parameters())}
    for run in (*kernels, *exact, *eager):  # batch norms take out what these add: 0 but for rounding
        assert all(run.pop(name).abs().max() < 1e-6 for name in UNFELT)
    assert not (failed := failures(kernels, exact, eager)), "\n".join(failed)


@pytest.mark.parametrize("length", [3, 4, 6])
def test_rollouts_and_inverse_dynamics_are_those_of_the_equations(length):
    """In float64, gradients too, of a weighted sum of all that the loss is made of."""
    torch.manual_seed(0)
    model = shaken(LeWorldModel(LONG), 0.1).double()
    frames, actions = batch(0, torch.float64, length, rows=8)
    with jk.use_backend("reference"):
        predicted, embeddings = model(frames, actions)
        ours = predicted, embeddings, model.inverse(embeddings)
    state = dict(model.named_parameters())
    predicted, embeddings = lewm_equations.forward(state, frames, actions, LONG)
    plain = predicted, embeddings, lewm_equations.read_back(state, embeddings)
    weights = [torch.randn_like(x) for x in plain]

    def all_of(parts):
        loss = sum((weight * x).sum() for weight, x in zip(weights, parts, strict=True))
        return results(loss, model) | dict(zip(("predicted", "embeddings", "read"), parts, strict=True))

    found, wanted = all_of(ours), all_of(plain)
    assert wanted.keys() == {"loss", "predicted", "embeddings", "read", *state}
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_loss_weighs_what_it_is_made_of():
    torch.manual_seed(0)
    model = shaken(LeWorldModel(LONG), 0.1)
    model.sigreg.eval()  # the same directions twice
    frames, actions = batch(0, length=6)
    predicted, embeddings = outputs = model(frames, actions)
    parts = predicted - embeddings[:, 1:], model.inverse(embeddings) - actions
    error, read = (part.square().mean() for part in parts)
    wanted = error + 0.09 * model.sigreg(embeddings.transpose(0, 1)) + 0.5 * read
    torch.testing.assert_close(model.objective(outputs, frames, actions), wanted)
    assert read > 0.1, "large enough to be missed"


def test_a_step_of_training_without_a_target(model):
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = train_step(model, optimizer, *batch(0))
    assert loss.isfinite() and model.sigreg.global_step == 1
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert {"encoder.cls_token", "projector.net.1.running_mean", "predictor.pos_embedding"} <= set(moved)
    with pytest.raises(ValueError, match=r"train_step: momentum must be None without a target encoder, got 0.9"):
        train_step(model, optimizer, *batch(0), 0.9)


def test_actions_that_are_what_embeddings_move_by_are_read_back():
    """With W1 = (-1, 1), b1 = 100, where gelu(x) = x, W2 = 1 and b2 = -100 it is their difference."""
    inverse = InverseDynamics(2, 2, 2)
    one = torch.eye(2)
    first, _, last = inverse.net
    with torch.no_grad():
        for layer, weight, bias in ((first, torch.cat([-one, one], 1), 100.0), (last, one, -100.0)):
            layer.weight.copy_(weight)
            layer.bias.fill_(bias)
        read = inverse(torch.tensor([[[1.0, 0.0], [3.0, -2.0], [2.5, -2.0]]]))
    assert torch.equal(read, torch.tensor([[[2.0, -2.0], [-0.5, 0.0]]]))


def test_inverse_dynamics_teach_the_encoder_and_not_the_predictor():
    torch.manual_seed(0)
    model = shaken(LeWorldModel(LONG), 0.1)
    model.sigreg.eval()  # the same directions twice
    frames, actions = batch(0, length=6)
    outputs = model(frames, actions)
    with_it = results(model.objective(outputs, frames, actions), model)
    outputs = model(frames, actions)
    inverse, model.inverse = model.inverse, None
    without = results(model.objective(outputs, frames, actions), model)
    felt = {name for name, grad in without.items() if not torch.equal(grad, with_it[name])} - UNFELT
    assert {name.split(".")[0] for name in felt} == {"loss", "encoder", "projector"}
    assert "encoder.patch_embed.proj.weight" in felt and "projector.net.0.weight" in felt
    assert {name for name in with_it if name not in without} == {f"inverse.{n}" for n, _ in inverse.named_parameters()}


def test_frames_past_the_history_are_predicted_from_predictions():
    """The last true frames are not seen: changed, they change no prediction; the first ones do."""
    torch.manual_seed(0)
    model = shaken(LeWorldModel(LONG), 0.1)
    frames, actions = batch(0, length=6)
    embeddings = torch.randn(3, 6, 48)
    model.embed = lambda _: embeddings
    first, _ = model(frames, actions)
    embeddings = torch.cat([embeddings[:, :3], torch.randn(3, 3, 48)], 1)
    assert torch.equal(model(frames, actions)[0], first) and first.shape == (3, 5, 48)
    embeddings = torch.cat([torch.randn(3, 1, 48), embeddings[:, 1:]], 1)
    assert not torch.isclose(model(frames, actions)[0], first).any(-1).any(1).all(), "even the last one feels the first"


def test_a_start_that_is_not_steered(model):
    assert not any(p.any() for name, p in LeWorldModel(SMALL).named_parameters() if "adaLN" in name)


def test_bytes_are_the_same_frames(world):
    frames = torch.randint(0, 256, (2, 4, 3, 24, 24), dtype=torch.uint8)
    torch.testing.assert_close(world.encode(frames), world.encode(frames / 255))
    assert world.encode(frames).shape == (2, 4, 1, 48) and world.encode(frames[0]).shape == (4, 1, 48)
    assert not world.encode(frames).requires_grad


@pytest.mark.parametrize("seen", [1, 2, 3, 5])
def test_imagined_frames_are_those_of_the_equations(world, seen):
    latents, past, actions = torch.randn(seen, 1, 48), torch.randn(seen - 1, 3), torch.randn(4, 5, 3)
    plain = {}
    context = Context(latents, past if seen > 1 else None)
    with torch.no_grad():
        imagined = world.imagine(context, 4, 5)(actions)
        double = {name: value.double() for name, value in world.state_dict().items()}
        for dtype, state in ((torch.float32, world.state_dict()), (torch.float64, double)):
            given = [[x.to(dtype) for x in (latents[:, 0], a, past)] for a in actions]
            plain[dtype] = torch.stack([lewm_equations.imagine(state, *sample, SMALL) for sample in given])
    parity = jk.testing.hold("imagined", imagined[:, :, 0], plain[torch.float64], plain[torch.float32])
    assert parity.ok, parity


def test_a_plan_can_be_asked_for_again_for_fewer_and_with_gradients(world):
    context, actions = Context(torch.randn(2, 1, 48), torch.randn(1, 3)), torch.randn(4, 3, 3)
    with torch.no_grad():
        imagine = world.imagine(context, 4, 3)
        first = imagine(actions)
        imagine(torch.randn(4, 3, 3))
        assert torch.equal(imagine(actions), first)
        torch.testing.assert_close(imagine(actions[:2, :2]), first[:2, :2])
    leaf = actions.clone().requires_grad_()
    unrolled = world.unroll(context, leaf)
    assert torch.equal(unrolled.detach(), first)
    (grad,) = torch.autograd.grad(unrolled[:, 0].sum(), leaf)
    assert grad[:, 0].all() and not grad[:, 1:].any()  # no frame before an action feels it


def test_imagining_compiles_whole(world):
    context, actions = Context(torch.randn(1, 1, 48)), torch.randn(4, 2, 3)
    with torch.no_grad():
        imagine = world.imagine(context, 4, 2)
        compiled = torch.compile(imagine, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(actions), imagine(actions))


def published(config):
    """Names and shapes of the published weights.pt, written out."""
    e, inner, f = config.embed_dim, config.predictor_num_heads * config.predictor_head_dim, config.predictor_hidden
    shapes = {
        "encoder.embeddings.cls_token": (1, 1, e),
        "encoder.embeddings.position_embeddings": (1, 1 + (config.crop_size // config.patch_size) ** 2, e),
        "encoder.embeddings.patch_embeddings.projection.weight": (e, 3, config.patch_size, config.patch_size),
        "predictor.pos_embedding": (1, config.history, e),
        "action_encoder.patch_embed.weight": (config.action_hidden, config.action_dim, 1),
    }
    biases = {
        "encoder.embeddings.patch_embeddings.projection": e,
        "action_encoder.patch_embed": config.action_hidden,
    }
    layers = {"action_encoder.embed.0": (4 * e, config.action_hidden), "action_encoder.embed.2": (e, 4 * e)}
    norms = {"encoder.layernorm": e, "predictor.transformer.norm": e}
    for i in range(config.depth):
        block = f"encoder.encoder.layer.{i}"
        norms |= {f"{block}.layernorm_before": e, f"{block}.layernorm_after": e}
        layers |= {f"{block}.attention.attention.{part}": (e, e) for part in ("query", "key", "value")}
        layers |= {f"{block}.attention.output.dense": (e, e)}
        layers |= {f"{block}.intermediate.dense": (4 * e, e), f"{block}.output.dense": (e, 4 * e)}
    for i in range(config.predictor_depth):
        layer = f"predictor.transformer.layers.{i}"
        norms |= {f"{layer}.attn.norm": e, f"{layer}.mlp.net.0": e}
        shapes[f"{layer}.attn.to_qkv.weight"] = (3 * inner, e)
        layers |= {f"{layer}.attn.to_out.0": (e, inner), f"{layer}.adaLN_modulation.1": (6 * e, e)}
        layers |= {f"{layer}.mlp.net.1": (f, e), f"{layer}.mlp.net.4": (e, f)}
    for name in ("projector", "pred_proj"):
        hidden = config.projector_hidden
        layers |= {f"{name}.net.0": (hidden, e), f"{name}.net.3": (e, hidden)}
        norms[f"{name}.net.1"] = hidden
        shapes |= {f"{name}.net.1.running_{what}": (hidden,) for what in ("mean", "var")}
        shapes[f"{name}.net.1.num_batches_tracked"] = ()
    shapes |= {f"{name}.weight": shape for name, shape in layers.items()}
    biases |= {name: shape[0] for name, shape in layers.items()} | norms
    shapes |= {f"{name}.weight": (width,) for name, width in norms.items()}
    return shapes | {f"{name}.bias": (width,) for name, width in biases.items()}


def synthetic(config):
    torch.manual_seed(1)
    shapes = published(config)
    return {n: torch.tensor(7) if n.endswith("tracked") else torch.rand(shape) for n, shape in shapes.items()}


def test_published_weights_load_and_are_written_back(tmp_path):
    state = synthetic(lewm.vit_tiny())
    torch.save(state, tmp_path / "weights.pt")
    model, report = LeWorldModel.from_checkpoint(tmp_path / "weights.pt", dropout=0.2)
    assert len(state) == 303 and model.config == lewm.vit_tiny(dropout=0.2) and not model.training
    assert 14.5e6 < sum(p.numel() for p in model.parameters()) < 18.1e6
    query, value = (state[f"encoder.encoder.layer.3.attention.attention.{part}.weight"] for part in ("query", "value"))
    assert torch.equal(model.encoder.blocks[3].attn.qkv.weight, torch.cat([query, _key(state), value]))
    assert torch.equal(
        model.predictor.transformer["layers"][5].mlp.net[4].weight,
        state["predictor.transformer.layers.5.mlp.net.4.weight"],
    )
    assert report.missing == {"sigreg": "its count of steps is left as it was"} and not report.ignored
    own = {name: getattr(model, name).state_dict() for name in lewm.NETWORKS}
    assert same(to_huggingface("LeWorldModel", LEWM, own), state)


def _key(state):
    return state["encoder.encoder.layer.3.attention.attention.key.weight"]


def test_the_encoder_is_hugging_faces(world):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=192)
    theirs = transformers.ViTModel(
        transformers.ViTConfig(image_size=24, patch_size=8, **sizes), add_pooling_layer=False
    )
    theirs = shaken(theirs, 0.1).eval()
    state = {f"encoder.{name}": value for name, value in theirs.state_dict().items()}
    state |= {name: value for name, value in world.state_dict().items() if not name.startswith("encoder.")}
    world.load(state)
    images = torch.rand(5, 3, 24, 24)
    mean, std = (torch.tensor(v)[:, None, None] for v in (lewm_equations.MEAN, lewm_equations.STD))
    with torch.no_grad():
        eager = theirs((images - mean) / std).last_hidden_state[:, 0]
        exact = theirs.double()((images.double() - mean.double()) / std.double()).last_hidden_state[:, 0]
        parity = jk.testing.hold("class token", world.encoder(images), exact, eager)
    assert parity.ok, parity


def test_a_saved_model_comes_back_whole(world, tmp_path):
    world.save(tmp_path / "small.safetensors")
    back, report = LeWorldModel.from_checkpoint(tmp_path / "small.safetensors")
    assert back.config == SMALL and same(back.state_dict(), world.state_dict()) and not report.missing
    world.save(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    half, _ = LeWorldModel.from_checkpoint(tmp_path / "half.safetensors")
    assert torch.equal(half.encoder.pos_embed, world.encoder.pos_embed.bfloat16().float())
    assert half.projector.net[1].num_batches_tracked == world.projector.net[1].num_batches_tracked == 3
    world.save(tmp_path / "theirs.safetensors", "huggingface")
    theirs, _ = LeWorldModel.from_checkpoint(
        tmp_path / "theirs.safetensors", num_heads=2, predictor_num_heads=4, predictor_head_dim=32, dropout=0.0
    )
    assert theirs.config == SMALL and same(theirs.projector.state_dict(), world.projector.state_dict())


def test_inverse_dynamics_are_kept_and_can_be_left_out(tmp_path):
    model = shaken(LeWorldModel(LONG), 0.1).eval()
    model.save(tmp_path / "long.safetensors")
    back, report = LeWorldModel.from_checkpoint(tmp_path / "long.safetensors")
    assert back.config == LONG and same(back.state_dict(), model.state_dict()) and not report.ignored
    bare, report = LeWorldModel.from_checkpoint(tmp_path / "long.safetensors", inverse_weight=0.0)
    assert bare.inverse is None and report.ignored == {"inverse": "no network of this model"}
    frames = torch.rand(2, 3, 24, 24)
    assert torch.equal(bare.encode(frames), model.encode(frames))
    again, report = LeWorldModel.from_checkpoint(bare.state_dict(), **vars(LONG))  # one of before learns it
    assert report.missing == {"inverse": "it is left as it was"} and again.inverse is not None
    assert same(again.projector.state_dict(), model.projector.state_dict())
    with pytest.raises(ValueError, match=r"inverse.net.2.bias is missing"):
        back.load({name: x for name, x in model.state_dict().items() if name != "inverse.net.2.bias"})
    model.save(tmp_path / "theirs.safetensors", "huggingface")
    assert load_file(tmp_path / "theirs.safetensors").keys() == published(SMALL).keys()


def test_weights_that_do_not_fit_load_nothing(model, tmp_path):
    before, state = copy.deepcopy(model.state_dict()), synthetic(SMALL)
    for change, message in (
        ({"predictor.pos_embedding": torch.rand(1, 4, 48)}, "has shape (1, 4, 48), the model (1, 3, 48)"),
        ({"projector.net.0.bias": torch.full((40,), torch.inf)}, "not finite"),
        ({"pred_proj.net.9.bias": torch.rand(3)}, "pred_proj.net.9.bias is unknown"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            model.load({**state, **change})
    with pytest.raises(ValueError, match=r"predictor.pos_embedding is missing"):
        model.load({name: value for name, value in state.items() if name != "predictor.pos_embedding"})
    LeWorldModel(lewm.replace(SMALL, num_heads=4)).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"'num_heads': 2.*'num_heads': 4"):
        model.load(tmp_path / "other.safetensors")
    assert same(model.state_dict(), before)


def test_messages(world):
    seen, actions = Context(torch.randn(2, 1, 48), torch.randn(1, 3)), torch.randn(4, 3, 3)
    with pytest.raises(RuntimeError, match=r"imagine must run where no gradients are recorded.*or take unroll"):
        world.imagine(seen, 4, 3)
    with torch.no_grad():
        imagine = world.imagine(seen, 4, 3)
        for wrong, message in (
            (torch.randn(4, 3, 2), r"actions must be \[S, horizon, 3\], of one or more, got \(4, 3, 2\)"),
            (torch.randn(4, 4, 3), r"actions must be \[4, 3, 3\] at most, got \(4, 4, 3\)"),
            (torch.randn(5, 3, 3), r"actions must be \[4, 3, 3\] at most, got \(5, 3, 3\)"),
            (torch.randn(4, 3), r"actions must have shape \[S, horizon, A\]"),
        ):
            with pytest.raises(ValueError, match=message):
                imagine(wrong)
    with pytest.raises(RuntimeError, match=r"imagine must run where no gradients are recorded, got grad mode"):
        imagine(actions)
    with pytest.raises(
        TypeError, match=r"context must be a Context, got Tensor; pass Context\(world.encode\(frames\)\)"
    ):
        world.unroll(seen.latents, actions)
    for few in (torch.randn(0, 3, 3), torch.randn(4, 0, 3)):
        with pytest.raises(ValueError, match=r"actions must be \[S, horizon, 3\], of one or more"):
            world.unroll(seen, few)
    for context, message in (
        (Context(torch.randn(2, 1, 48)), r"context.actions must have shape \(1, 3\), got \(0, 3\)"),
        (Context(torch.randn(2, 2, 48), torch.randn(1, 3)), r"context.latents must be \[T, 1, 48\]"),
        (Context(torch.randn(0, 1, 48)), r"context.latents must be \[T, 1, 48\]"),
    ):
        with pytest.raises(ValueError, match=message):
            world.unroll(context, actions)
    with pytest.raises(ValueError, match=r"must be in evaluation mode.*call .eval\(\)"):
        world.train().unroll(seen, actions)
    with pytest.raises(ValueError, match=r"actions must have shape \(3, 3, 3\), got \(3, 4, 3\)"):
        world(batch(0)[0], torch.randn(3, 4, 3))
    for length in (1, 5):
        with pytest.raises(
            ValueError, match=r"frames must be \[B, T, C, H, W\] of T in 2..4, got \(2, \d, 3, 24, 24\)"
        ):
            world.loss(torch.rand(2, length, 3, 24, 24), torch.randn(2, length - 1, 3))
    with pytest.raises(ValueError, match=r"frames must be \[..., 3, 24, 24\], got \(1, 3, 32, 32\); resize them"):
        world.embed(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"crop_size must be a multiple of 8"):
        LeWorldModel(lewm.replace(SMALL, crop_size=30))
    for change, message in (
        (dict(rollout_steps=0), r"rollout_steps must be a whole number from 1 on, got 0; 1 trains as published"),
        (dict(rollout_steps=2.5), r"rollout_steps must be a whole number from 1 on, got 2.5; .+"),
        (
            dict(inverse_weight=-1.0),
            r"inverse_weight and inverse_hidden must be finite, from 0 and 1 on, got \(-1.+",
        ),
        (dict(inverse_weight=math.nan), r"inverse_weight and inverse_hidden must be finite, .+"),
        (dict(inverse_hidden=0), r"inverse_weight and inverse_hidden must be finite, .+"),
    ):
        with pytest.raises(ValueError, match="LeWorldModel: " + message):
            LeWorldModel(lewm.replace(SMALL, **change))
    rolled = LeWorldModel(LONG).train()
    frames, actions = torch.rand(1, 6, 3, 24, 24), torch.rand(1, 5, LONG.action_dim)
    with pytest.raises(ValueError, match=r"hold at least 2 windows to be rolled out in training, got 1; .+"):
        rolled(frames, actions)
    assert rolled(frames[:, :4], actions[:, :3])[0].shape == (1, 3, LONG.embed_dim)


@torch.no_grad()
def test_a_model_of_low_precision_takes_contexts_and_actions_of_full(world):
    low = copy.deepcopy(world).bfloat16()
    context, actions = Context(torch.randn(2, 1, 48), torch.randn(1, 3)), torch.randn(4, 2, 3)
    cast = Context(context.latents.bfloat16(), context.actions.bfloat16())
    found = low.imagine(context, 4, 2)(actions)
    assert torch.equal(found, low.imagine(cast, 4, 2)(actions.bfloat16())) and found.dtype == torch.bfloat16


@pytest.mark.parametrize("make", lewm.SIZES.values())
def test_every_field_of_a_named_size_can_be_changed(make):
    for field, value in vars(make()).items():
        assert make(**{field: value + 1}) == lewm.replace(make(), **{field: value + 1}), field
