"""timm's ViTs on the kernels: the numbers of the unpatched model, a report, and what is left alone or refused."""

import importlib.util
import sys
import types

import pytest
import torch

from jepa_kernels.integrations import timm as integration
from tests.integrations.parity import failures, far_from_its_start

STUBS = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".models")


class AnyClass(type):
    """A class that has every attribute, a class of this kind again."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return AnyClass(name, (), {})


class Stub(types.ModuleType):
    __path__ = ()
    __getattr__ = AnyClass.__getattr__


@pytest.fixture(scope="module")
def timm():
    """timm; where torchvision is missing, modules of that name stand in while timm imports it."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    names = [] if importlib.util.find_spec("torchvision") else [f"torchvision{part}" for part in STUBS]
    for name in names:
        sys.modules[name] = Stub(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        return importlib.import_module("timm")
    finally:
        for name in names:
            del sys.modules[name]


@pytest.fixture
def vit(timm):
    def make(**changes):
        sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2, num_classes=5)
        return far_from_its_start(timm.models.VisionTransformer(**{**sizes, **changes})).eval()

    return make


IJEPA = dict(class_token=False, global_pool="avg")
VARIANTS = {
    "ijepa-huge": dict(**IJEPA, embed_dim=160),  # 80 channels a head
    "ijepa-giant": dict(**IJEPA, embed_dim=88, num_heads=1),
    "class-token": {},
    "registers-scale": dict(reg_tokens=2, init_values=0.3, pre_norm=True),
    "normed": dict(qk_norm=True, scale_attn_norm=True),
    "any-size": dict(img_size=None, dynamic_img_size=False, strict_img_size=False, pos_embed="none"),
}


def logits(batch=2, side=32):
    """Of pixels that every type holds exactly."""
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).mul(16).round().div(16)
    return lambda model: {"logits": model(images.to(next(model.parameters()).dtype))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["ijepa-huge", "ijepa-giant", "class-token", "registers-scale", "normed"])
def test_outputs_and_gradients_are_those_of_the_unpatched_model(vit, variant, dtype):
    model = vit(**VARIANTS[variant]).to(dtype)
    assert not failures(model, integration.patch, logits())
