"""LeJEPA on backbones of timm and transformers: views of several sizes, what their outputs are, and refusals."""

import pytest
import torch

from jepa_kernels.models.lejepa import LeJEPA, LeJEPAConfig

CONFIG = LeJEPAConfig(embed_dim=32, proj_hidden=48, proj_dim=16, slices=64)
SIZES = (32, 16, 32, 16)


def views(batch=3):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, side, side, generator=g) for side in SIZES]


@pytest.fixture
def timm_vit(timm):
    def make(**changes):
        sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
        return timm.create_model("vit_tiny_patch16_224", **{**sizes, **changes})

    return make


@pytest.fixture
def hf_vit():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    return transformers.ViTModel(config, add_pooling_layer=False)


def trains(backbone, pooled):
    """Each view's embedding is `pooled` of it alone, and every parameter has a gradient."""
    torch.manual_seed(0)
    lejepa, given = LeJEPA(backbone, CONFIG), views()
    for found, view in zip(lejepa.eval().embed(given), given, strict=True):
        torch.testing.assert_close(found, pooled(view), rtol=1e-5, atol=1e-6)
    lejepa.train().loss(given).backward()
    without = [name for name, p in lejepa.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


def test_timm_vit_with_pooled_features(timm_vit):
    vit = timm_vit(dynamic_img_size=True, global_pool="avg").eval()
    trains(vit, vit)


def test_a_model_of_transformers_as_it_is(hf_vit):
    hf_vit.eval()
    ask = dict(interpolate_pos_encoding=True)
    trains(hf_vit, lambda view: hf_vit(view, **ask).last_hidden_state.mean(1))
    own = torch.randn(2, 3, 32, 32)
    assert torch.equal(hf_vit(own, **ask).last_hidden_state, hf_vit(own).last_hidden_state)


def test_views_of_a_size_that_the_backbone_does_not_take(timm_vit):
    message = r"^LeJEPA: views must be of sizes that the backbone takes, got \(3, 16, 16\): .+ doesn't match model.+; "
    with pytest.raises(ValueError, match=message + r"build it for images of any size \(timm: dynamic_img_size=True\)"):
        LeJEPA(timm_vit(), CONFIG)(views())


def test_a_timm_model_that_fails_inside_says_that_it_is_the_size(timm):
    net = timm.create_model("efficientformerv2_s0", num_classes=0)
    message = r"^LeJEPA: views must be of sizes that the backbone takes, got \(3, 96, 96\): shape .+ is invalid .+; bui"
    with pytest.raises(ValueError, match=message):
        LeJEPA(net, LeJEPAConfig(embed_dim=176)).embed([torch.randn(2, 3, 96, 96)])


def test_outputs_that_are_no_embeddings(timm_vit, hf_vit):
    with pytest.raises(ValueError, match=r"^LeJEPA: backbone must give \[6, 32\] or \[6, N, 32\], got \(6, 7\); wrap"):
        LeJEPA(timm_vit(num_classes=7), CONFIG)(views()[::2])
    transformers = pytest.importorskip("transformers")
    resnet = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[32], depths=[1]))
    with pytest.raises(ValueError, match=r"LeJEPA: backbone must give .+, got \(6, 32, 8, 8\); wrap it, or set"):
        LeJEPA(resnet, CONFIG)(views()[::2])
