"""timm's ViTs on the kernels: the numbers of the unpatched model, a report, and what is left alone or refused."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from jepa_kernels.integrations import timm as integration
from tests.integrations.parity import but_for_products, drawn, failures, far_from_its_start


@pytest.fixture
def vit(timm):
    def make(seed=0, **changes):
        sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2, num_classes=5)
        torch.manual_seed(seed)
        return far_from_its_start(timm.models.VisionTransformer(**{**sizes, **changes})).eval()

    return make


IJEPA = dict(class_token=False, global_pool="avg")  # I-JEPA's published encoders, 80 and 88 channels a head
VARIANTS = {
    "ijepa-huge": dict(**IJEPA, embed_dim=160),
    "ijepa-giant": dict(**IJEPA, embed_dim=88, num_heads=1),
    "class-token": {},
    "registers": dict(reg_tokens=2, pre_norm=True),
    "normed": dict(qk_norm=True, scale_attn_norm=True),
}
images = drawn(2, 3, 32, 32)


def logits(model):
    return {"logits": model(images.to(next(model.parameters()).dtype))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_the_unpatched_model(vit, variant, dtype):
    models = [vit(seed, **VARIANTS[variant]).to(dtype) for seed in range(3)]
    assert not failures(models, integration.patch, logits)


def test_gates_stay(timm, vit):
    model = vit()
    model.blocks[1].attn = timm.layers.Attention(64, 2, qkv_bias=True, gated=True)
    assert not failures([model], integration.patch, logits)


def test_under_autocast_too(vit):
    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float32):
            return logits(model)

    models = [vit(seed, qk_norm=True) for seed in range(6)]
    assert not failures(models, integration.patch, run)


def test_it_compiles_as_one_graph(vit):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    changed = lambda run: torch.compile(run, fullgraph=True, backend=counter)  # noqa: E731
    assert not failures([vit(**IJEPA, depth=1)], integration.patch, logits, changed)
    assert counter.frame_count == 1


def test_a_report_names_what_was_replaced(vit):
    lines = str(integration.patch(vit())).split("\n")
    assert lines[:4] == [
        "VisionTransformer: 11 modules patched, 0 left alone",
        "  patched: patches embedded by one product over pixels read in place: patch_embed",
        "  patched: attention of the qkv product read in place: blocks.0.attn, blocks.1.attn",
        "  patched: large products by linear: blocks.0.attn.qkv, blocks.0.attn.proj ... blocks.1.mlp.fc2 (8)",
    ]
    assert lines[4].startswith("  verified: features: ")


def test_a_model_inside_another_is_found(vit):
    done = integration.patch(torch.nn.Sequential(vit(), torch.nn.Linear(5, 2)), only="0.blocks")
    assert but_for_products(done) == ["0.blocks.0.attn", "0.blocks.1.attn"] and "features of 0" in done.verified


def test_every_transformer_is_verified(vit, monkeypatch):
    model, own = torch.nn.ModuleDict(dict(student=vit(), teacher=vit(1))), integration._attend
    wrong = model.teacher.blocks[1].attn
    monkeypatch.setattr(integration, "_attend", lambda self, qkv: own(self, qkv) * (1.01 if self is wrong else 1))
    with pytest.raises(RuntimeError, match="must give the numbers of the model, got features of teacher with"):
        integration.patch(model)
    assert "forward" not in vars(wrong) and len(integration.patch(model.student).verified) == 1


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scale_of_its_own_is_kept_where_timm_uses_it(vit, fused, normed):
    models = [vit(seed, qk_norm=normed) for seed in range(3)]
    for block in [block for model in models for block in model.blocks]:
        block.attn.fused_attn, block.attn.scale = fused, 0.4
    assert not failures(models, integration.patch, logits)


def test_calls_with_masks_are_attentions_own(vit):
    attention, x = vit().blocks[0].attn, drawn(1, 6, 64)
    calls = dict(attn_mask=torch.ones(6, 6, dtype=torch.bool).tril()), dict(is_causal=True)
    expected = [attention(x, **given) for given in calls]
    integration.patch(attention, verify=False)
    assert all(torch.equal(attention(x, **given), out) for given, out in zip(calls, expected, strict=True))


def test_dropout_of_outputs_stays(vit):
    attention = vit(proj_drop_rate=0.5).blocks[0].attn.train()
    integration.patch(attention, verify=False)
    assert abs((attention(drawn(2, 16, 64)) == 0).double().mean() - 0.5) < 0.05


def test_hooks_run_and_the_state_dict_stays(vit):
    model, seen = vit(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    state = model.state_dict()
    logits(model)
    before, seen[:] = [name for name in seen if not name.endswith("attn_drop")], []
    done = integration.patch(model, verify=False)
    logits(model)
    dropped = {name for name in before if name.split(".")[-1] in ("q_norm", "k_norm")}  # identities
    assert seen == [name for name in before if name not in dropped]
    assert done.skipped == {"patch_embed": "hooks on Conv2d would not run"}
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)


def test_images_of_another_size_are_refused_by_timm_itself(vit):
    model = vit()
    integration.patch(model)
    with pytest.raises(AssertionError, match=r"Input height \(40\) doesn't match model \(32\)"):
        model(torch.randn(1, 3, 40, 32))


def test_images_of_any_size_are_cut_as_the_convolution_does(timm):
    embed, pixels = timm.layers.PatchEmbed(None, 8, 3, 64), torch.randn(1, 3, 21, 40)
    expected = embed(pixels)
    integration.patch(embed, verify=False)
    torch.testing.assert_close(embed(pixels), expected, rtol=0, atol=1e-5)


KERNEL = "the kernel takes head dims that are multiples of 8 up to 128, not "
LEFT_ALONE = {
    "dropout": (dict(attn_drop_rate=0.25), "attention dropout is 0.25, which the kernel has not: 0 allows it"),
    "width": (dict(num_heads=16), f"{KERNEL}4"),
    "differential": (dict(attn_layer="diff"), "DiffAttention is attention of another form"),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_other_attention_is_left_alone(vit, kind):
    options, why = LEFT_ALONE[kind]
    done = integration.patch(vit(**options))
    assert done.skipped == {"blocks.0.attn": why, "blocks.1.attn": why} and but_for_products(done) == ["patch_embed"]


def test_rotary_attention_is_left_alone(timm):
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2, use_rot_pos_emb=True, qkv_fused=True)
    done = integration.patch(timm.models.eva.Eva(**sizes, attn_type="rope"))
    assert done.skipped == {"blocks.0.attn": "AttentionRope is attention of another form"}


def test_a_patch_embedding_that_is_no_product_is_left_alone(vit):
    for changes, why in (
        (dict(dynamic_img_pad=True), "it pads images"),
        (dict(dynamic_img_size=True), "it keeps the grid of patches"),
    ):
        assert integration.patch(vit(**changes)).skipped == {"patch_embed": why}


def test_a_model_without_an_image_size_cannot_be_verified(vit):
    blocks = vit().blocks
    with pytest.raises(
        ValueError, match="patch: model must hold a timm ViT with an image size, to be verified, got Seq"
    ):
        integration.patch(blocks)
    assert "forward" not in vars(blocks[0].attn) and integration.patch(blocks, verify=False).verified == {}


def test_a_model_of_another_library_is_refused(timm):
    with pytest.raises(ValueError, match="patch: model must have a module to replace, got no module that is known"):
        integration.patch(torch.nn.Linear(3, 3))


def test_a_timm_without_these_classes_is_refused(timm, monkeypatch):
    monkeypatch.delattr(timm.layers, "Attention")
    message = r'patch: timm must be installed and have layers.Attention and .*, got .*; pip install "timm>=1.0.31"'
    with pytest.raises(ImportError, match=message):
        integration.patch(torch.nn.Linear(3, 3))
