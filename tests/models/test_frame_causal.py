"""Encoders in which a patch sees no later frame: against a masked computation, and by what gradients reach."""

import copy
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import jepa_kernels as jk
from jepa_kernels.models.vjepa import VJEPA, VJEPAConfig
from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config
from jepa_kernels.nn import Encoder
from jepa_kernels.nn.encoder import frame_ranges
from jepa_kernels.packing import Packing
from jepa_kernels.testing import hold
from tests.models import video_equations
from tests.models.weights import shaken

SIZES = dict(crop_size=(8, 12), num_frames=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, predictor_embed_dim=32)
GRID, FRAME = (4, 2, 3), 6  # 24 patches, 6 to a frame
CONFIG = VJEPA2Config(**SIZES, predictor_depth=1, predictor_num_heads=2, rope="interleaved", frame_causal=True)
KEPT = [torch.tensor([0, 1, 5, 7, 13, 14, 23]), torch.tensor([4]), torch.tensor([6, 12, 17, 18, 20])]  # clip 0, 1, 0


def encoder(**changes):
    c = replace(CONFIG, **changes)
    options = dict(tubelet_size=2, rope=c.rope, frame_causal=c.frame_causal)
    return shaken(Encoder(c.crop_size, 4, 32, c.depth, 2, **options), 0.15)


def clips():
    return torch.randn(2, 3, 8, 8, 12)


def kept(batching):
    """Ids and packing of what `encoder` is given, and the ids of each sequence."""
    if batching == "whole":
        return (None, None), [torch.arange(24)] * 2
    if batching == "rectangular":
        rows = [KEPT[0], torch.tensor([2, 3, 6, 8, 9, 12, 22])]
        return (torch.stack(rows), None), rows
    return Packing.from_ids(KEPT[:2]), KEPT[:2]


each_batching = pytest.mark.parametrize("batching", ["whole", "rectangular", "packed"])


def by_the_equations(model, pixels, rows):
    p = dict(model.named_parameters())
    return torch.cat([video_equations.encode(x, ids, p, CONFIG)[0] for x, ids in zip(pixels, rows, strict=True)])


@each_batching
def test_latents_are_those_of_a_masked_computation(batching):
    model, pixels, (given, rows) = encoder(), clips(), kept(batching)
    double = copy.deepcopy(model).double()
    exact = by_the_equations(double, pixels.double(), rows)
    with jk.use_backend("reference"):
        eager, wide = model(pixels, *given).flatten(0, -2), double(pixels.double(), *given).flatten(0, -2)
    assert (wide - exact).norm() <= 2e-6 * exact.norm()  # angles of the equations are exact, ours are rounded to fp32
    parity = hold("latents", model(pixels, *given).flatten(0, -2).detach(), wide.detach(), eager.detach())
    assert parity.ok, parity
    blind = encoder(frame_causal=False).double()
    blind.load_state_dict(double.state_dict())
    with jk.use_backend("reference"):
        assert (blind(pixels.double(), *given).flatten(0, -2) - exact).norm() > 1e-2 * exact.norm()


@each_batching
def test_later_frames_leave_no_trace(batching):
    """No bit of an early latent changes with a later frame, and no gradient goes there."""
    model, pixels, (given, rows) = encoder(), clips().requires_grad_(), kept(batching)
    changed = pixels.detach().clone()
    changed[:, :, 4:] = torch.randn(2, 3, 4, 8, 12)
    early = torch.cat([ids // FRAME < 2 for ids in rows])
    before, after = (model(x, *given).flatten(0, -2) for x in (pixels, changed))
    assert torch.equal(before[early], after[early])
    if not early.all():
        assert not torch.isclose(before[~early], after[~early]).all(1).any()
    before[early].sum().backward()
    assert pixels.grad[:, :, :4].any() and not pixels.grad[:, :, 4:].any()


def test_ranges_of_packed_patches_by_hand():
    ids, packing = Packing.from_ids(KEPT)
    ends = [3, 3, 3, 4, 6, 6, 7, 1, 1, 3, 3, 5, 5]
    assert frame_ranges(ids, FRAME, 24, packing).tolist() == [[0, end] for end in ends]
    rows = torch.stack([KEPT[2], KEPT[2] + 1])
    assert frame_ranges(rows, FRAME, 24, None)[..., 1].tolist() == [[1, 3, 3, 5, 5], [1, 2, 5, 5, 5]]


def test_ranges_of_a_padded_packing_are_those_of_its_sequences():
    ids, packing = Packing.from_ids(KEPT)
    padded = packing.padded(20, 5, 9)
    more = torch.cat([ids, torch.zeros(7, dtype=torch.int64)])
    assert torch.equal(frame_ranges(more, FRAME, 24, padded)[:13], frame_ranges(ids, FRAME, 24, packing))


def test_it_compiles_as_one_graph_for_all_lengths():
    torch._dynamo.reset()
    model, counter = encoder(depth=1), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (KEPT[:2], KEPT[1:], [KEPT[2], KEPT[0]]):
        ids, packing = Packing.from_ids(rows)
        pixels = clips()
        assert torch.equal(compiled(pixels, ids, packing), model(pixels, ids, packing))
    assert counter.frame_count == 2


def test_models_pass_the_option_on():
    sizes = dict(predictor_depth=1, frame_causal=True)
    models = VJEPA(VJEPAConfig(**SIZES, **sizes)), VJEPA2(CONFIG)
    pixels = clips()
    changed = torch.cat([pixels[:, :, :4], torch.randn(2, 3, 4, 8, 12)], 2)
    for model in models:
        assert torch.equal(model.ema(pixels)[:, :12], model.ema(changed)[:, :12])
        assert torch.equal(model.context_encoder(pixels)[:, :12], model.context_encoder(changed)[:, :12])
