"""V-JEPA 2-AC and the AdaLN predictor: against the equations, gradients, losses, and what no frame may see."""

import copy

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.models.vjepa2_ac import SIZES, WorldModel, WorldModelConfig
from jepa_kernels.testing import hold
from tests.models import world_equations
from tests.models.ijepa_equations import layer_norm
from tests.models.weights import shaken

SMALL = dict(crop_size=(8, 12), num_frames=12, patch_size=4, embed_dim=24, depth=1, num_heads=1, mlp_ratio=2.0)
SMALL |= dict(predictor_embed_dim=48, predictor_depth=2, predictor_num_heads=2)
STEERED = dict(conditioning="adaln", action_dim=3, state_dim=None, extrinsics_dim=None, normalize=False, distance="l2")
KINDS = {
    "tokens": {"rope_grid": 4},
    "camera": {"use_extrinsics": True, "rope_grid": None},
    "no_state": {"state_dim": None, "extrinsics_dim": None, "rope": "interleaved", "tubelet_size": 1},
    "adaln": {**STEERED, "rope_grid": 4},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def world(kind="tokens", **changes):
    return shaken(WorldModel(WorldModelConfig(**{**SMALL, **KINDS[kind], **changes})), 0.1)


def given(model, batch=2, frames=3):
    """Latents, actions, states and extrinsics that the model takes."""
    c = model.config
    widths = c.action_dim, c.state_dim, c.extrinsics_dim if c.use_extrinsics else None
    rest = [None if width is None else torch.randn(batch, frames, width) * 0.3 for width in widths]
    return [torch.randn(batch, frames, 6, c.embed_dim), *rest]


def double(tensors):
    return [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def by_the_equations(model, latents, *rest):
    p = dict(model.predictor.named_parameters())
    worlds = [[None if x is None else x[b] for x in (latents, *rest)] for b in range(len(latents))]
    return torch.stack([world_equations.predict(*one, p, model.config) for one in worlds])


@each_kind
@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_predictions_and_gradients_are_those_of_the_equations(kind, low):
    model, inputs = world(kind), given(world(kind))
    inputs[1].requires_grad_()
    wide, weights = copy.deepcopy(model).double(), torch.randn(inputs[0].shape)

    def run(module, function, tensors, dtype=None):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            out = function(*tensors)
        trained = {n: p for n, p in module.predictor.named_parameters() if n.split(".")[0] != "extrinsics_encoder"}
        grads = torch.autograd.grad((out * weights.to(out.dtype)).sum(), [tensors[1], *trained.values()])
        return {"out": out.detach(), "actions": grads[0], **dict(zip(trained, grads[1:], strict=True))}

    found = run(model, model, inputs, low)
    with jk.use_backend("reference"):
        eager = run(model, model, inputs, low)
        exact = run(wide, wide, double(inputs))
    if low is None:
        stated = run(wide, lambda *x: by_the_equations(wide, *x), double(inputs))
        for name, value in stated.items():  # angles of the equations are exact, ours are rounded to fp32
            assert (exact[name] - value).norm() <= 4e-6 * value.norm(), name
        bad = [parity for n in exact if not (parity := hold(n, found[n], exact[n], eager[n])).ok]
        assert not bad, bad
    else:  # of all gradients together: single ones have few numbers
        sides = (torch.cat([side[n].flatten() for n in exact if n != "out"]) for side in (found, exact, eager))
        parity = hold("gradients", *sides), hold("out", found["out"], exact["out"], eager["out"])
        assert all(p.ok for p in parity), parity


@each_kind
def test_later_frames_and_actions_leave_no_trace(kind):
    model, inputs = world(kind), given(world(kind), frames=4)
    changed = [None if x is None else torch.cat([x[:, :2], torch.randn_like(x[:, 2:])], 1) for x in inputs]
    before, after = model(*inputs), model(*changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.isclose(before[:, 2:], after[:, 2:]).all(-1).any()


def test_the_rule_of_frames_is_the_dense_mask_exactly():
    """With values of one each, the output is the weights: above 0 where the mask is True, and 0 elsewhere."""
    frames, tokens = 3, 8
    mask = world_equations.frame_mask(frames, tokens)
    q, k = (torch.randn(1, 1, 24, 24) for _ in range(2))
    weights = jk.masked_attention(q, k, torch.eye(24)[None, None], frame_size=tokens)
    assert torch.equal(weights[0, 0] > 0, mask)
    ranges = torch.stack([torch.zeros(24, dtype=torch.int32), mask.sum(1, dtype=torch.int32)], 1)
    assert torch.equal(weights, jk.masked_attention(q, k, torch.eye(24)[None, None], key_ranges=ranges))
    v = torch.randn(1, 1, 24, 24, dtype=torch.float64)
    by_rule = jk.masked_attention(q.double(), k.double(), v, frame_size=tokens, backend="reference")
    dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v, attn_mask=mask)
    assert (by_rule - dense).abs().max() <= 1e-14


def test_frames_are_encoded_alone_as_still_clips_and_normalised():
    model = world()
    frames = torch.randint(0, 256, (2, 3, 3, 8, 12), dtype=torch.uint8)
    latents = model.encode(frames)
    assert latents.shape == (2, 3, 6, 24) and not latents.requires_grad
    one = frames[1, 2].float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    clip = ((one - mean) / std)[:, None].expand(-1, 2, -1, -1)  # shown for a whole tubelet
    plain = WorldModel(WorldModelConfig(**{**SMALL, "rope_grid": 4}, mean=None, std=None)).encoder
    plain.load_state_dict(model.encoder.state_dict())
    exact = layer_norm(plain(clip[None])[0], eps=1e-5)
    torch.testing.assert_close(latents[1, 2], exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.encode(frames[1].float() / 255)[2], exact, rtol=1e-4, atol=1e-5)


def clip(model, frames=4):
    latents, actions, states, _ = given(model, batch=2, frames=frames)
    return layer_norm(latents, eps=1e-5), actions[:, 1:], states


def mean_of(function, *tensors):
    """Of a loss by the equations over the clips of a batch."""
    return sum(function(*(None if x is None else x[b] for x in tensors)) for b in range(2)) / 2


def gradients(model, loss):
    names = [n for n, _ in model.predictor.named_parameters() if "extrinsics" not in n]
    own = dict(model.predictor.named_parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [own[n] for n in names])])


@pytest.mark.parametrize("auto_steps, released", [(1, False), (2, False), (3, False), (2, True)])
def test_the_loss_is_that_of_the_equations(auto_steps, released):
    model = world().double()
    h, actions, states = double(clip(model))
    p, options = dict(model.predictor.named_parameters()), dict(auto_steps=auto_steps, released_slice=released)
    stated = mean_of(lambda *x: world_equations.loss(*x, p, model.config, auto_steps, released), h, actions, states)
    with jk.use_backend("reference"):
        found = model.loss(h, actions, states, **options)
        assert torch.equal(found, model.loss(h, actions, states[:, :-1], **options))
        grads = gradients(model, found)
    assert abs(found - stated) <= 1e-6 * stated
    assert (grads - gradients(model, stated)).norm() <= 1e-4 * grads.norm()  # |d|'s sign may turn near 0


def test_the_loss_of_frames_is_that_of_their_latents():
    model = world()
    frames, (_, actions, states) = torch.rand(2, 4, 3, 8, 12), clip(world())
    loss = model.loss(frames, actions, states)
    assert torch.equal(loss, model.loss(model.encode(frames), actions, states)) and loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None for p in model.encoder.parameters())


@pytest.mark.parametrize(
    "steps, prefixes, window, detach, stop",
    [(1, (0,), 8, True, False), (3, (0,), 8, True, False), (2, (0, 1, 2), 2, False, False), (4, (0,), 2, False, True)],
)
def test_the_loss_of_prefixes_is_that_of_the_equations(steps, prefixes, window, detach, stop):
    model = world("adaln").double()
    h, actions, _ = double(clip(model, frames=5))
    p, options = dict(model.predictor.named_parameters()), (steps, prefixes, window, detach, stop)
    stated = mean_of(lambda *x: world_equations.prefix_loss(*x, p, model.config, *options), h, actions)
    names = ("rollout_steps", "prefixes", "window", "detach", "stop_gradient")
    with jk.use_backend("reference"):
        found = model.prefix_loss(h, actions, **dict(zip(names, options, strict=True)))
        grads = gradients(model, found)
    assert abs(found - stated) <= 1e-6 * stated
    assert (grads - gradients(model, stated)).norm() <= 1e-5 * grads.norm()


def test_the_named_sizes_are_the_published_ones():
    with torch.device("meta"):
        models = {name: WorldModel(make(crop_size=256)) for name, make in SIZES.items()}
    counts = {name: sum(p.numel() for p in model.predictor.parameters()) for name, model in models.items()}
    assert round(counts["vit_giant"] / 1e6, 1) == 305.2 and models["vit_giant"].max_frames == 32
    assert counts["vit_giant"] - counts["vj2ac_droid"] == 8 * 1024 and models["vj2ac_droid"].max_frames == 512
    assert [models["jepa_wm_droid"].predictor.cond_tokens, models["vj2ac_droid"].predictor.cond_tokens] == [0, 1]
    assert {n: m.config.window for n, m in models.items()} == {"vit_giant": None, "vj2ac_droid": 2, "jepa_wm_droid": 2}
    assert {model.predictor.frame_tokens for model in models.values()} == {256, 257, 258}
    encoders = [models[name].encoder.state_dict() for name in ("vit_giant", "vj2ac_droid")]  # both are V-JEPA 2's ViT-g
    assert len({tuple((key, x.shape) for key, x in encoder.items()) for encoder in encoders}) == 1


def test_a_training_step_compiles_as_one_graph():
    torch._dynamo.reset()
    model, inputs = world(), given(world())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"conditioning": "film"}, "conditioning must be tokens or adaln, got 'film'"),
        ({"conditioning": "adaln"}, "state_dim and extrinsics_dim must be None with adaln, got 7 and 6; leave them"),
        ({"distance": "cosine"}, "distance must be l1 or l2, got 'cosine'"),
        ({"use_extrinsics": True, "extrinsics_dim": None}, "sizes must be at least 1, and known where used"),
        ({"window": 0}, "window must lie in 1..6, or be None, got 0"),
        ({"window": 7}, "window must lie in 1..6, or be None, got 7"),
        ({"num_frames": 7}, "num_frames must be a multiple of tubelet_size 2, got 7"),
    ],
)
def test_configs_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        WorldModel(WorldModelConfig(**{**SMALL, **changes}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"actions": torch.zeros(2, 3, 4)}, r"actions must be \(2, 3, 7\), got \(2, 3, 4\)"),
        ({"states": None}, r"states must be \(2, 3, 7\), got None"),
        ({"extrinsics": torch.zeros(2, 3, 6)}, r"extrinsics must be None, got \(2, 3, 6\)"),
        ({"latents": torch.zeros(2, 3, 4, 24)}, r"latents must be \(2, 3, 6, 24\), got \(2, 3, 4, 24\)"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_refused(change, message):
    model = world()
    inputs = dict(zip(("latents", "actions", "states", "extrinsics"), given(model), strict=True))
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **change})


def test_clips_that_losses_can_not_use_are_refused():
    model = world()
    h, actions, states = clip(model, frames=2)
    for call, message in (
        (lambda: model.loss(h, actions, states), r"auto_steps must lie in 1..1 for 2 frames, got 2"),
        (lambda: model.loss(h, actions[:, :0], states), "actions must be of the 1 frames before the last"),
        (
            lambda: model.loss(h, actions, states, auto_steps=1, released_slice=True),
            "released_slice must have 3 frames or more, got 2",
        ),
        (lambda: model.prefix_loss(h, actions, states, prefixes=(1,)), r"prefixes must lie in 0..T-1-1, .* got \[1\]"),
        (lambda: model.encode(torch.zeros(2, 3, 8, 8)), r"frames must be \[..., T, 3, 8, 12\], got \(2, 3, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
