"""LeJEPA: its loss against plain sums, its packed views against each alone, and backbones of any kind."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels.models.lejepa import LeJEPA, LeJEPAConfig
from jepa_kernels.nn import Encoder
from jepa_kernels.ops.sigreg import reference
from jepa_kernels.testing import compare
from tests.models.weights import shaken

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
    found = lejepa.objective(p := lejepa(views()).detach())
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
    torch.testing.assert_close(lejepa.objective(p).invariance, expected)


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
        eager = results(lejepa, given, one_by_one)
    failed = [str(r) for n in exact if not (r := compare(n, packed[n], exact[n], eager[n])).ok]
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


def test_refusals():
    lejepa, given = model(), views()
    with pytest.raises(ValueError, match=r"LeJEPA: views must be one or more \[B, C, H, W\] of one B, got .+"):
        lejepa([given[0], given[1][:2]])
    with pytest.raises(ValueError, match=r"LeJEPA: views must be one or more .+, got \[\]; .+"):
        lejepa([])
    with pytest.raises(ValueError, match=r"LeJEPA: backbone must give \[5, 32\] or \[5, N, 32\], got .+"):
        model(backbone=nn.Flatten())(given[:1])
    with pytest.raises(ValueError, match=r"LeJEPA: weight must lie in 0\.\.1, got 2; .+"):
        model(replace(CONFIG, weight=2))
    with pytest.raises(ValueError, match=r"LeJEPA: global_views must lie in 1\.\.4, the views, got 5; .+"):
        model(replace(CONFIG, global_views=5)).loss(given)
    with pytest.raises(ValueError, match=r"Encoder: ragged must be of an encoder that is not frame_causal, .+"):
        model(backbone=Encoder(32, 8, 32, 2, 2, rope="tiled", frame_causal=True))(given)
