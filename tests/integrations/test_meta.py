"""Networks of the published shape on the kernels: the numbers of the unpatched, shared positions, what is refused."""

import pytest
import torch

from jepa_kernels.integrations import meta
from tests.integrations import published
from tests.integrations.parity import failures, far_from_its_start
from tests.integrations.published import PatchEmbed, PatchEmbed3D, VisionTransformer, VisionTransformerPredictor

GRID = 2, 3, 4  # of clips
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def network(kind, **options):
    torch.manual_seed(3)
    if kind == "predictor":
        return far_from_its_start(VisionTransformerPredictor()).eval()
    images = kind == "ijepa"
    patch_embed = PatchEmbed(4, 3, 64) if images else PatchEmbed3D(4, 2, 3, 64)
    attention = {
        "ijepa": published.IJEPAAttention,
        "vjepa": published.VJEPAAttention,
        "vjepa2": published.RoPEAttention,
        "vjepa2-ac": published.ACRoPEAttention,
        "no-rope": published.Attention,
    }[kind]
    table = None if attention is published.RoPEAttention else 16 if images else 24
    return far_from_its_start(VisionTransformer(attention, patch_embed, num_patches=table, **options)).eval()


def drawn(*shape):
    """Numbers that every type holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(16).round().div(16)


def masks(kept, patches, batch=2):
    generator = torch.Generator().manual_seed(kept)
    rows = [torch.randperm(patches, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(rows)


def forward(kind, *, masked=True, like=None):
    """What a network of this kind makes of fixed inputs."""
    if kind == "predictor":
        x, ids = drawn(2, 5, 64), (masks(5, 32), masks(7, 32))
        return lambda model: {"out": model(x.to(next(model.parameters()).dtype), *ids)}
    x = drawn(2, 3, 16, 16) if kind == "ijepa" else drawn(2, 3, 4, 12, 16)
    patches = 16 if kind == "ijepa" else 24
    chosen = [masks(6, patches), masks(9, patches)[:, :6]] if masked else None
    return lambda model: {"out": model(x.to(next(model.parameters()).dtype), chosen)}


@each_dtype
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "whole"])
@pytest.mark.parametrize("kind", ["ijepa", "vjepa", "vjepa2", "no-rope", "predictor"])
def test_outputs_and_gradients_are_those_of_the_unpatched_network(kind, masked, dtype):
    assert not failures(network(kind).to(dtype), meta.patch, forward(kind, masked=masked))
