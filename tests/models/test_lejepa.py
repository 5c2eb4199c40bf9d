"""LeJEPA: its loss against plain sums, its packed views against each alone, and backbones of any kind."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels.models.lejepa import LeJEPA, LeJEPAConfig, ViTConfig
from jepa_kernels.nn import Encoder
from jepa_kernels.ops.sigreg import reference
from jepa_kernels.testing import hold
from tests.models.weights import same, shaken

CONFIG = LeJEPAConfig(embed_dim=32, proj_hidden=48, proj_dim=16, slices=64)
SIZES = (32, 16, 24, 16)  # pixels of the views: global first


def views(batch=5):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, side, side, generator=g) for side in SIZES]


def model(config=CONFIG, backbone=None):
    torch.manual_seed(0)
    encoder = Encoder(32, 8, 32, 2, 2, rope="interleaved") if backbone is None else backbone
    return shaken(LeJEPA(encoder, config), 0.05)


def plain_sigreg(p, directions):
    """Epps-Pulley by the equations: p [N, K], directions [K, M]."""
    y, t = p @ directions, torch.linspace(0, 3, 17, dtype=p.dtype)
    angle = y[..., None] * t
    normal = torch.exp(-(t**2) / 2)
    weights = torch.full((17,), 2 * 3 / 16, dtype=p.dtype)
    weights[0] = weights[-1] = 3 / 16
    error = (angle.cos().mean(0) - normal) ** 2 + angle.sin().mean(0) ** 2
    return len(p) * (error * weights * normal).sum(-1).mean()


def test_the_loss_is_invariance_and_sigreg():
    lejepa = model()
    found = lejepa.losses(p := lejepa(views()).detach())
    p, directions = p.double(), reference.directions(16, 64, 0, 0, torch.device("cpu")).double().T
    meet = sum(p) / len(SIZES)
    invariance = sum(((view - meet) ** 2).mean() for view in p) / len(SIZES)
    sigreg = sum(plain_sigreg(view, directions) for view in p) / len(SIZES)
    torch.testing.assert_close(found.invariance.double(), invariance, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.sigreg.double(), sigreg, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.loss.double(), 0.98 * invariance + 0.02 * sigreg, rtol=1e-5, atol=0)


def test_views_meet_at_the_global_ones():
    lejepa = model(replace(CONFIG, global_views=1))
    p = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
    expected = ((p - p[0]) ** 2).mean()
    torch.testing.assert_close(lejepa.losses(p).invariance, expected)


def one_by_one(lejepa, given):
    """Every image of every view through the encoder alone."""
    embedded = [torch.cat([lejepa.backbone(image[None]).mean(1) for image in view]) for view in given]
    return lejepa.projector(torch.cat(embedded)).unflatten(0, (len(given), -1))


def test_one_packed_pass_equals_each_view_alone_with_every_gradient():
    lejepa, given = model().eval(), views()  # in training batch norms take out what shifts all alike
    weights = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))

    def results(net, given, run):
        p = run(net, given)
        grads = torch.autograd.grad((p * weights.to(p.dtype)).sum(), list(net.parameters()))
        return {"p": p.detach(), **dict(zip(dict(net.named_parameters()), grads, strict=True))}

    double = copy.deepcopy(lejepa).double()
    packed = results(lejepa, given, lambda net, x: net(x))
    with jk.use_backend("reference"):
        exact = results(double, [x.double() for x in given], one_by_one)
        eager = results(lejepa, given, lambda net, x: net(x))  # plain PyTorch, with sums as long as ours
    failed = [str(r) for n in exact if not (r := hold(n, packed[n], exact[n], eager[n])).ok]
    assert not failed, failed


class Pixels(nn.Module):
    """Means of colors, as one vector or as tokens of rows."""

    def __init__(self, tokens):
        super().__init__()
        self.linear, self.tokens, self.calls = nn.Linear(3, 32), tokens, []

    def forward(self, pixels):
        self.calls.append(tuple(pixels.shape))
        return self.linear(pixels.mean(3).mT if self.tokens else pixels.mean((2, 3)))


@pytest.mark.parametrize("tokens", [False, True])
def test_other_backbones_are_called_once_for_each_size(tokens):
    backbone, given = Pixels(tokens), views()
    embedded = model(backbone=backbone).embed(given)
    assert backbone.calls == [(5, 3, 32, 32), (10, 3, 16, 16), (5, 3, 24, 24)]
    for found, view in zip(embedded, given, strict=True):
        torch.testing.assert_close(found, backbone.linear(view.mean((2, 3))), rtol=1e-5, atol=1e-6)


def test_stacks_of_views_are_the_views_themselves():
    lejepa, g = model().eval(), torch.Generator().manual_seed(0)
    large, small = torch.randn(5, 2, 3, 32, 32, generator=g), torch.randn(5, 3, 3, 16, 16, generator=g)
    expected = lejepa([*large.unbind(1), *small.unbind(1)])
    assert torch.equal(lejepa(large, small), expected)
    assert torch.equal(lejepa(large, small[:, :0]), lejepa(large))
    torch.testing.assert_close(lejepa(large), expected[:2])  # products of fewer rows may sum in another order
    assert torch.equal(lejepa.objective(expected, large, small), lejepa.losses(expected).loss)


SMALL = ViTConfig(embed_dim=32, proj_hidden=48, proj_dim=16, slices=64, crop_size=16, depth=1, num_heads=2)


def test_a_saved_model_is_built_again_with_its_statistics_and_steps(tmp_path):
    lejepa = LeJEPA.of(SMALL)
    pixels = torch.randint(0, 256, (4, 2, 3, 16, 16), dtype=torch.uint8)
    lejepa.loss(pixels)
    lejepa.save(tmp_path / "model.safetensors")
    again, report = LeJEPA.from_checkpoint(tmp_path / "model.safetensors")
    assert same(again.state_dict(), lejepa.state_dict()) and again.config == SMALL and not again.training
    assert again.sigreg.global_step == 1 and again.projector[1].num_batches_tracked == 1
    assert set(report.loaded) == set(lejepa.state_dict())
    assert torch.equal(again(pixels), lejepa.eval()(pixels))
    torch.testing.assert_close(again(pixels / 255), again(pixels))  # the same picture, floating


def test_checkpoints_that_do_not_fit(tmp_path):
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    LeJEPA.of(SMALL).save(path)
    heads = LeJEPA.of(replace(SMALL, num_heads=4))
    before = copy.deepcopy(heads.state_dict())
    with pytest.raises(ValueError, match=r"^LeJEPA: checkpoint must be of 4 heads, got 2; build the model by from_ch"):
        heads.load(path)
    with pytest.raises(ValueError, match=r"^LeJEPA: checkpoint must hold exactly .+ model.backbone.blocks.1.norm1"):
        LeJEPA.of(replace(SMALL, depth=2)).load(path)
    nan = {name: value * torch.nan if value.is_floating_point() else value for name, value in before.items()}
    with pytest.raises(ValueError, match=r"^LeJEPA: checkpoint must hold exactly .+ holds values that are not finite"):
        heads.load(nan)
    assert same(heads.state_dict(), before)
    model(backbone=Pixels(False)).save(other)
    with pytest.raises(ValueError, match=r"hold the config of an Encoder, got the config of another backbone; pass "):
        LeJEPA.from_checkpoint(other)
    message = r"^LeJEPA: checkpoint must hold the config, .+, got none; build LeJEPA\(backbone, config\) and"
    for backbone in (None, Pixels(False)):
        with pytest.raises(ValueError, match=message):
            LeJEPA.from_checkpoint(model(backbone=Pixels(False)).state_dict(), backbone)
    again, _ = LeJEPA.from_checkpoint(other, Pixels(False))
    assert again.config == CONFIG


def test_a_few_steps_lower_the_loss():
    lejepa, given = model(), views(16)
    optimizer, losses = torch.optim.AdamW(lejepa.parameters(), 1e-3), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = lejepa.loss(given)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


class Tabled(nn.Module):
    """Patches of 8 and a plain learned table of the positions of 32 pixels."""

    def __init__(self):
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.zeros(1, 16, 32))

    def forward(self, pixels, interpolate_pos_encoding=False):
        x = self.conv(pixels).flatten(2).mT
        return x + (self.table[:, : x.shape[1]] if interpolate_pos_encoding else self.table)


class Plain(Tabled):
    def forward(self, pixels):
        return super().forward(pixels)


def test_what_a_backbone_says_raw_comes_with_the_remedy():
    message = r"^LeJEPA: views must be of sizes that the backbone takes, got \(3, 16, 16\): The size of .+; build it"
    with pytest.raises(ValueError, match=message):
        model(backbone=Plain())(views())
    pixels = [torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 3, 32, 32)]
    message = r"^LeJEPA: views must be floating for .+, got \[torch.uint8, torch.float32\]; normalise them, as jepa_k.+"
    with pytest.raises(ValueError, match=message):
        model(backbone=Plain())(pixels)
    with pytest.raises(RuntimeError, match=r"^(?!LeJEPA).*(dtype|type)"):  # of no size: as torch says it
        model(backbone=Plain())([view.double() for view in views()[:1]])


def test_behind_torch_compile_a_backbone_is_asked_as_it_would_be():
    backbone, given = Tabled(), views()
    compiled = torch.compile(backbone, backend="eager")
    assert torch.equal(model(backbone=compiled).embed(given), LeJEPA(backbone, CONFIG).embed(given))
    encoder, pixels = LeJEPA.of(SMALL).backbone, torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    wrapped = LeJEPA(torch.compile(encoder, backend="eager"), SMALL)
    torch.testing.assert_close(wrapped.embed([pixels]), LeJEPA(encoder, SMALL).embed([pixels]))


def test_refusals():
    lejepa, given = model(), views()
    with pytest.raises(ValueError, match=r"LeJEPA: views must be one or more \[B, C, H, W\] of one B, at least 1, got"):
        lejepa([given[0], given[1][:2]])
    with pytest.raises(ValueError, match=r"LeJEPA: views must be one or more .+, got \[\]; .+"):
        lejepa([])
    with pytest.raises(ValueError, match=r"LeJEPA: backbone must give \[5, 32\] or \[5, N, 32\], got .+"):
        model(backbone=nn.Flatten())(given[:1])
    with pytest.raises(ValueError, match=r"LeJEPA: backbone must give \[20, 32\] .+, got \(20, 48\); .+ set embed_dim"):
        model(backbone=Encoder(32, 8, 48, 2, 2, rope="interleaved"))(given)
    with pytest.raises(ValueError, match=r"LeJEPA: weight must lie in 0\.\.1, got 2; .+"):
        model(replace(CONFIG, weight=2))
    for count in (0, -1):
        with pytest.raises(ValueError, match=rf"^LeJEPA: global_views must be at least 1, got {count}; .+"):
            model(replace(CONFIG, global_views=count))
    for backbone in (None, Pixels(False)):
        with pytest.raises(ValueError, match=r"^LeJEPA: views must be one or more .+ got \[\(0, 3, 16, 16\)\]; .+"):
            model(backbone=backbone).loss([torch.randn(0, 3, 16, 16)])
    with pytest.raises(ValueError, match=r"LeJEPA: global_views must lie in 1\.\.4, the views, got 5; .+"):
        model(replace(CONFIG, global_views=5)).loss(given)
    with pytest.raises(ValueError, match=r"LeJEPA: views must be \[B, V, C, H, W\] in one tensor, got .+"):
        lejepa(given[0])
    with pytest.raises(
        ValueError, match=r"embed_patches: pixels must have sides divisible by the patch size 8, got .+"
    ):
        lejepa([given[0], torch.randn(5, 3, 20, 20)])
    with pytest.raises(ValueError, match=r"Encoder: ragged must be of an encoder that is not frame_causal, .+"):
        model(backbone=Encoder(32, 8, 32, 2, 2, rope="tiled", frame_causal=True))(given)
