"""Low-precision shadows: the target's bits under autocast, no weight cast, no temporaries, and what they share."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kernels.masks import MultiBlock2d
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.jepa import train_step
from jepa_kernels.nn import EMA, Encoder

SIZES = dict(crop_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2)
BF16 = torch.bfloat16


class Watch(TorchDispatchMode):
    """Counts conversions by the number of elements, and the largest new tensor in bytes."""

    def __init__(self):
        super().__init__()
        self.casts, self.largest, self.known = [], 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = [t for t in torch.utils._pytree.tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)]
        before = {t.untyped_storage().data_ptr() for t in given}
        result = function(*arguments, **(options or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in before:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        if "_to_copy" in str(function) or "copy_" in str(function):
            self.casts.append(arguments[0])
        return result


def moved(module, scale=0.3):
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * scale)
    return module


def read_under_autocast(ema, dtype=BF16):
    """The parameters that a forward finds."""
    with torch.autocast("cpu", dtype), ema.cast_weights():
        return dict(ema.module.named_parameters())


def video_encoder():
    return Encoder(**SIZES, tubelet_size=2, rope="tiled")


def convolutions():
    layers = nn.Conv1d(2, 6, 3), nn.ConvTranspose1d(6, 6, 3), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 3, bias=False)
    return nn.Sequential(*layers)


NETWORKS = {
    "images": (lambda: Encoder(**SIZES), (3, 3, 32, 32)),
    "clips": (video_encoder, (2, 3, 4, 32, 32)),
    "convolutions": (convolutions, (5, 2, 20)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), (2, 7, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shadow_has_the_targets_bits_under_autocast(name):
    build, shape = NETWORKS[name]
    online = moved(build())
    ema, plain = EMA(online, 0.9, shadow_dtype=BF16), EMA(online, 0.9)
    x = torch.randn(shape)
    for _ in range(2):
        moved(online)
        ema.update()
        plain.update()
        with torch.autocast("cpu", BF16):
            through, expected = ema(x), ema.module(x)
        assert through.dtype == expected.dtype and torch.equal(through, expected)
        assert not torch.equal(expected, plain.module.float()(x).to(expected.dtype))  # autocast does change it
        assert all(torch.equal(a, b) for a, b in zip(ema.module.parameters(), plain.module.parameters(), strict=True))


@pytest.mark.parametrize("name", ["images", "clips"])
def test_a_forward_through_the_shadow_casts_no_weight(name):
    build, shape = NETWORKS[name]
    ema, x = EMA(moved(build()), shadow_dtype=BF16), torch.randn(shape)
    shapes = {p.shape for p in ema.module.parameters() if p.dim() > 1} | {p[0].shape for p in ema.module.parameters()}
    with torch.autocast("cpu", BF16), Watch() as through, torch.no_grad():
        ema(x)
    with torch.autocast("cpu", BF16), Watch() as plain, torch.no_grad():
        ema.module(x)
    weights = [t for t in through.casts if t.shape in shapes]
    assert not weights and len([t for t in plain.casts if t.shape in shapes]) >= 9


def test_what_autocast_leaves_alone_is_shared():
    ema = EMA(Encoder(**SIZES), shadow_dtype=BF16)
    own, low = dict(ema.module.named_parameters()), read_under_autocast(ema)
    assert own.keys() == low.keys()
    for name, p in low.items():
        if "norm" in name:
            assert p is own[name]
        else:
            assert p.dtype == BF16 and not p.requires_grad and torch.equal(p, own[name].bfloat16())
    assert not any("shadow" in name for name in ema.state_dict()) and len(list(ema.parameters())) == len(own)


def test_outside_of_autocast_the_target_itself_runs():
    ema, x = EMA(moved(Encoder(**SIZES)), shadow_dtype=BF16), torch.randn(1, 3, 32, 32)
    assert torch.equal(ema(x), ema.module(x))
    with ema.cast_weights():
        assert ema.module.pos_embed.dtype == ema.module.blocks[0].mlp.fc1.weight.dtype == torch.float32
    for dtype, found in ((torch.float16, torch.float32), (BF16, BF16)):
        assert read_under_autocast(ema, dtype)["blocks.0.mlp.fc1.weight"].dtype == found
    assert ema.module.blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_a_network_without_memory_has_a_shadow_too():
    with torch.device("meta"):
        ema = EMA(nn.Linear(3, 3), shadow_dtype=BF16)
        with torch.autocast("cpu", BF16):
            assert ema.shadow_copies().popitem()[1].is_meta and ema(torch.randn(2, 3)).shape == (2, 3)


def test_a_weight_that_another_layer_reads_is_not_rounded():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    ema = EMA(Tied(), shadow_dtype=BF16)
    low = read_under_autocast(ema)
    assert low["embed.weight"] is ema.module.head.weight is ema.module.embed.weight and low["head.bias"].dtype == BF16


def test_a_layer_with_a_forward_of_its_own_keeps_its_weight():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.square().mean().sqrt()

    assert read_under_autocast(EMA(Scaled(3, 3), shadow_dtype=BF16))["weight"].dtype == torch.float32


@pytest.mark.parametrize("write", ["load", "by hand", "set", "storage", "frozen"])
def test_the_shadow_follows_what_is_written_to_the_target(write):
    online = moved(Encoder(**SIZES))
    ema, donor, x = EMA(online, shadow_dtype=BF16), moved(Encoder(**SIZES)), torch.randn(1, 3, 32, 32)
    if write == "load":
        ema.load_state_dict(donor.state_dict())
    elif write == "by hand":
        with torch.no_grad():
            ema.module.blocks[1].mlp.fc1.weight.mul_(3.0)
    elif write == "set":
        ema.set(donor)
    elif write == "storage":
        ema.module.norm.weight.data = torch.full((48,), 2.0)
        ema.module.blocks[0].attn.qkv.weight.data = ema.module.blocks[0].attn.qkv.weight.data * 2
    else:
        ema.module.pos_embed.add_(1.0)
        ema.update()
    with torch.autocast("cpu", BF16):
        assert torch.equal(ema(x), ema.module(x))


def test_mode_and_hooks_are_the_targets():
    ema, x, seen = EMA(convolutions(), shadow_dtype=BF16), torch.randn(2, 2, 20), []
    ema.module.eval()
    handle = ema.module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.autocast("cpu", BF16):
        out = ema(x)
    assert seen == [out] and ema.module[2].num_batches_tracked == 0
    handle.remove()
    ema.module.train()
    with torch.autocast("cpu", BF16):
        ema(x)
    assert len(seen) == 1 and ema.module[2].num_batches_tracked == 1


def test_an_update_makes_no_temporary_larger_than_its_tables():
    online = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)), nn.LayerNorm(256))
    ema = EMA(online, shadow_dtype=BF16)
    with Watch() as watch:
        ema.update()
    assert watch.largest <= 4096


def step_of(shadow_dtype, scaler=None):
    torch.manual_seed(0)
    model = IJEPA(IJEPAConfig(**SIZES, predictor_embed_dim=32, predictor_depth=1), shadow_dtype=shadow_dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(3):
        images, masks = torch.randn(2, 3, 32, 32), MultiBlock2d(4, min_keep=2)(2, step=step).to("cpu")
        losses.append(train_step(model, optimizer, images, masks, 0.9, dtype=BF16))
    return losses, model


def test_training_with_shadows_has_the_same_bits():
    (plain, model), (ours, shadowed) = step_of(None), step_of(BF16)
    assert torch.equal(torch.stack(plain), torch.stack(ours))
    states = model.state_dict(), shadowed.state_dict()
    assert list(states[0]) == list(states[1]) and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert read_under_autocast(shadowed.ema)["blocks.0.attn.qkv.weight"].dtype == BF16
    twin = copy.deepcopy(shadowed)
    assert twin.ema.module is twin.target_encoder and read_under_autocast(twin.ema)["norm.weight"] is not None
    twin.ema.update()
    trained = [p for p in twin.context_encoder.parameters() if p.requires_grad]
    assert set(twin.ema.pairs()) == set(trained)


def test_targets_of_a_loaded_model_are_those_of_its_weights():
    (_, donor), (_, model) = step_of(None), step_of(BF16)
    moved(donor)
    model.load(donor.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", BF16):
        assert torch.equal(model.targets(images), donor.targets(images))
    assert torch.equal(model.targets(images), donor.targets(images))
