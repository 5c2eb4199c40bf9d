"""Low-precision copies of a target: they follow what is done to it, by whomever, and so do compiled forwards."""

import copy

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels.masks import MultiBlock2d
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.jepa import train_step
from jepa_kernels.nn import EMA

SIZES = dict(crop_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2)
BF16 = torch.bfloat16


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Dropout(0.5), nn.Linear(7, 3)).eval()


def averaged(seed=0):
    online = network(seed)
    return online, EMA(online, 0.9, shadow_dtype=BF16)


def under_autocast(forward, *arguments):
    with torch.no_grad(), torch.autocast("cpu", BF16):
        return forward(*arguments)


def assert_same_bits(ema, x):
    """The forward is the target's own, under the same random numbers."""
    torch.manual_seed(5)
    ours = under_autocast(ema, x)
    torch.manual_seed(5)
    assert torch.equal(ours, under_autocast(ema.module, x))


@pytest.mark.parametrize("change", ["mode of a part", "attribute", "layer", "norm", "weight", "assign"])
def test_whatever_is_changed_in_the_target_is_read(change):
    (_, ema), x = averaged(), torch.randn(6, 5)
    donor = network(1)
    under_autocast(ema, x)
    if change == "mode of a part":
        ema.module[2].train()
    elif change == "attribute":
        ema.module[1].eps = 2.0
    elif change == "layer":
        ema.module[0] = donor[0]
    elif change == "norm":
        ema.module[1].weight = nn.Parameter(torch.full((7,), 3.0))
    elif change == "weight":
        ema.module[0].weight = donor[0].weight
    else:
        ema.load_state_dict(donor.state_dict(), assign=True)
    assert_same_bits(ema, x)


def test_a_forward_that_fails_gives_the_weights_back():
    _, ema = averaged()
    before = list(ema.module.parameters())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        under_autocast(ema, torch.randn(2, 4))
    assert all(a is b for a, b in zip(ema.module.parameters(), before, strict=True))


def test_a_hook_of_the_target_may_run_the_target():
    (_, ema), x, seen = averaged(), torch.randn(2, 5), []
    expected = under_autocast(ema, x)

    def again(module, inputs, output):
        if not seen:
            seen.append(None)
            seen.append(ema(x))

    ema.module.register_forward_hook(again)
    assert torch.equal(under_autocast(ema, x), expected) and torch.equal(seen[1], expected)
    assert ema.module[0].weight.dtype == torch.float32


def test_writes_that_torch_does_not_count_are_read_after_a_refresh():
    (_, ema), x = averaged(), torch.randn(2, 5)
    ema.module[0].weight.data.mul_(3.0)
    ema.refresh()
    assert_same_bits(ema, x)


@pytest.mark.parametrize("write", ["load", "move", "update"])
def test_a_compiled_forward_reads_the_last_load_move_and_update(write):
    (online, ema), x = averaged(), torch.randn(2, 5)
    forward = torch.compile(ema, backend="eager", fullgraph=True)
    before = under_autocast(forward, x)
    if write == "load":
        ema.load_state_dict(network(1).state_dict())
    elif write == "move":
        with torch.no_grad():
            ema.module[0].weight.mul_(3.0)
        ema.to("cpu")
    else:
        with torch.no_grad():
            online[0].weight.mul_(3.0)
        ema.update()
    after = under_autocast(forward, x)
    assert torch.equal(after, under_autocast(ema.module, x)) and not torch.equal(after, before)


@pytest.mark.parametrize("write", ["load_state_dict", "load", "move"])
def test_compiled_targets_of_a_model_are_those_of_its_weights(write):
    torch.manual_seed(0)
    config = IJEPAConfig(**SIZES, predictor_embed_dim=32, predictor_depth=1)
    model, donor, images = IJEPA(config, shadow_dtype=BF16), IJEPA(config), torch.randn(2, 3, 32, 32)
    forward = torch.compile(model.targets, backend="eager")
    under_autocast(forward, images)
    with torch.no_grad():
        for p in (model if write == "move" else donor).target_encoder.parameters():
            p.add_(torch.randn_like(p))
    if write == "move":
        model.to("cpu")
    else:
        getattr(model, write)(donor.state_dict())
    assert torch.equal(under_autocast(forward, images), under_autocast(model.target_encoder, images))


def trained(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator)


def optimised(online, ema, **options):
    return jk.AdamWEMA(online.parameters(), ema.pairs(), 0.1, shadow=(None, ema.shadow_copies()), **options)


def batch_normed():
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    online[2].bias.requires_grad_(False)
    return online


@pytest.mark.parametrize("schedule", [dict(momentum=0.5, total_steps=6), dict(decay=0.9, use_warmup=True)])
def test_an_optimizer_that_moves_the_target_does_what_an_update_does(schedule):
    online = batch_normed()
    ema = EMA(online, shadow_dtype=BF16, **schedule)
    single = copy.deepcopy(online)
    expected = EMA(single, shadow_dtype=BF16, **schedule)
    fused, plain = optimised(online, ema), torch.optim.AdamW(single.parameters(), 0.1)
    for step in range(5):
        for net in (online, single):
            net[1].running_mean.fill_(step)
            trained(net, step)
        with ema.moved_by(fused):
            fused.step()
        plain.step()
        expected.update()
        for (name, ours), theirs in zip(ema.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2**-18, atol=2**-20, msg=name)
        for p, low in ema.shadow_copies().items():
            assert torch.equal(low, ema.pairs()[p].bfloat16())
    assert ema.step == expected.step == 5


def test_copies_that_the_optimizer_wrote_are_not_rounded_again():
    online, ema = averaged()
    optimizer = optimised(online, ema)
    trained(online, 1)
    with ema.moved_by(optimizer, 0.5):
        optimizer.step()
    low = ema.shadow_copies()[online[0].weight]
    low.data.zero_()  # would be written by a rounding
    under_autocast(ema, torch.randn(2, 5))
    assert not low.any() and ema.step == 0 and optimizer.param_groups[0]["momentum"] == 0.5


def test_an_optimizer_that_does_not_move_all_of_the_target_is_refused():
    online, ema = averaged()
    half = jk.AdamWEMA(online[0].parameters(), ema.pairs(), shadow=(None, ema.shadow_copies()))
    bare = jk.AdamWEMA(online.parameters(), ema.pairs())
    step = ema.module[0].weight.clone()
    with (
        pytest.raises(
            ValueError,
            match=r"^EMA: optimizer must move the target of 1.weight, got none of its targets is that; build it",
        ),
        ema.moved_by(half),
    ):
        half.step()
    with (
        pytest.raises(
            ValueError,
            match=r"^EMA: optimizer must write the copy of 0.weight, got another target shadow or none; build",
        ),
        ema.moved_by(bare),
    ):
        bare.step()
    with pytest.raises(
        ValueError, match=r"^EMA: form must be lerp for an AdamWEMA, got 'ijepa'; use another optimizer"
    ):
        EMA(online, form="ijepa").pairs()
    assert torch.equal(ema.module[0].weight, step) and ema.step == 0


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_training_averages_once(fused):
    torch.manual_seed(0)
    model = IJEPA(IJEPAConfig(**SIZES, predictor_embed_dim=32, predictor_depth=1), shadow_dtype=BF16)
    average = dict(target_params=model.ema.pairs(), shadow=(None, model.ema.shadow_copies())) if fused else {}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = jk.AdamWEMA(trained, lr=0.0, **average)  # weights stay, targets move
    with torch.no_grad():
        for target in model.ema.pairs().values():
            target.zero_()
    for step in range(3):
        images, masks = torch.randn(2, 3, 32, 32), MultiBlock2d(4, min_keep=2)(2, step=step).to("cpu")
        train_step(model, optimizer, images, masks, 0.5)
    for online, target in model.ema.pairs().items():
        torch.testing.assert_close(target, 0.875 * online.detach(), rtol=2**-20, atol=2**-24)
