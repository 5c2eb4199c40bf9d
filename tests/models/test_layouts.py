"""Every published layout at full key count: recognised, turned into Meta's names, loaded, saved, read back."""

import itertools

import pytest
import torch

from jepa_kernels.models import layouts, sizes, vjepa, vjepa2_1
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config
from tests.models import published

WIDTHS = {"vit_large": (1024, 24, 4096), "vit_huge": (1280, 32, 5120), "vit_giant_xformers": (1408, 40, 6144)}
VIDEO, HUGE_14 = (2, 16, 16), (1280, 32, 5120, (14, 14), 256)
each_width = pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
each_prefix = pytest.mark.parametrize(
    "prefix", ["", *map("".join, itertools.permutations(("module.", "backbone.", "_orig_mod."), 2))]
)


def shaped(shapes):
    """Tensors of these shapes and no values."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def found(state):
    checkpoint = layouts.recognise("test", state)
    return checkpoint, {name: shapes(own) for name, own in checkpoint.networks.items()}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@each_width
@each_prefix
def test_metas_vjepa2(widths, prefix):
    encoder, predictor = published.meta_encoder(*widths, VIDEO), published.meta_predictor(widths[0], 12, 10)
    parts = {"encoder": encoder, "target_encoder": encoder, "predictor": predictor}
    state = {name: prefixed(prefix, shaped(own)) for name, own in parts.items()}
    checkpoint, networks = found({**state, "opt": {}, "epoch": 3})
    assert networks == parts and checkpoint.layout.title == "Meta's layout"
    assert checkpoint.ignored == dict.fromkeys(("opt", "epoch"), "no weights of a network")
    flat = {f"{name}.{key}": value for name, own in state.items() for key, value in own.items()}
    assert found(flat)[1] == parts


@each_prefix
@pytest.mark.parametrize("size, tokens", [(HUGE_14, None), ((1024, 24, 4096, VIDEO, 1568), 2)], ids=["ijepa", "vjepa"])
def test_metas_models_with_tables(size, tokens, prefix):
    *widths, kernel, table = size
    parts = {
        "encoder": published.meta_encoder(*widths, kernel, table),
        "target_encoder": published.meta_encoder(*widths, kernel, table),
        "predictor": published.meta_predictor(widths[0], 12, tokens, table=table),
    }
    assert found({name: prefixed(prefix, shaped(own)) for name, own in parts.items()})[1] == parts


VJEPA = {  # of the encoder: width, depth, hidden width, patches
    "vit_large": (1024, 24, 4096, 1568),
    "vit_huge": (1280, 32, 5120, 1568),
    "vit_huge_384": (1280, 32, 5120, 4608),
}
VJEPA2_1 = {  # of the encoder: width, depth, hidden width; of the predictor: depth, levels, width of what it predicts
    "vit_base": (768, 12, 3072, 12, 1, 1664),
    "vit_large": (1024, 24, 4096, 12, 1, 1664),
    "vit_giant_xformers": (1408, 40, 6144, 24, 4, 4 * 1408),
    "vit_gigantic_xformers": (1664, 48, 8192, 24, 4, 4 * 1664),
}


def test_all_sizes_are_tested():
    assert VJEPA.keys() == vjepa.SIZES.keys() and VJEPA2_1.keys() == vjepa2_1.SIZES.keys()


def told(module, kind, networks, config):
    """Meta's file of these shapes is of this kind, and tells this config, whose model has just these tensors."""
    wrapped = {part: prefixed("module.backbone.", shaped(own)) for part, own in networks.items()}
    checkpoint, given = found(wrapped)
    assert given == networks and sizes.model_of(checkpoint.networks) == kind.published_name
    assert sizes.config_for("test", module.SIZES, checkpoint.networks, {}) == config
    with torch.device("meta"):
        model = kind(config)
    own = {"target_encoder": model.target_encoder, "predictor": model.predictor}
    assert {part: shapes(network.state_dict()) for part, network in own.items()} == networks


@pytest.mark.parametrize("name", VJEPA)
def test_metas_vjepa_and_the_config_that_its_shapes_tell(name):
    width, depth, hidden, table = VJEPA[name]
    encoder = published.meta_encoder(width, depth, hidden, VIDEO, table)
    networks = {"target_encoder": encoder, "predictor": published.meta_predictor(width, 12, 2, table=table)}
    told(vjepa, vjepa.VJEPA, networks, vjepa.SIZES[name]())


@pytest.mark.parametrize("name", VJEPA2_1)
def test_metas_vjepa2_1_and_the_config_that_its_shapes_tell(name):
    width, depth, hidden, *predictor = VJEPA2_1[name]
    encoder = published.meta_encoder_2_1(width, depth, hidden)
    networks = {"target_encoder": encoder, "predictor": published.meta_predictor_2_1(width, *predictor)}
    told(vjepa2_1, vjepa2_1.VJEPA2_1, networks, vjepa2_1.SIZES[name]())


def test_the_average_of_a_distilled_model_is_the_target_encoder():
    encoder = shaped(published.meta_encoder(768, 12, 3072, VIDEO))
    checkpoint, networks = found({"ema_encoder": prefixed("module.", encoder), "target_encoder": encoder, "lr": 0.1})
    assert networks == {"target_encoder": shapes(encoder)}
    assert checkpoint.ignored["target_encoder"] == "ema_encoder takes its place"


def test_a_stacked_mask_token_is_listed_and_a_split_attention_stacked_in_any_layout():
    predictor = shaped(published.meta_predictor(1024, 12, 0)) | {"mask_tokens": torch.empty(10, 1, 1, 384)}
    encoder = shaped(published.meta_encoder(1024, 24, 4096, VIDEO))
    for name in [name for name in encoder if ".attn.qkv." in name]:
        thirds = encoder.pop(name).chunk(3)
        encoder |= {name.replace("qkv", part): third for part, third in zip("qkv", thirds, strict=True)}
    networks = found({"encoder": encoder, "predictor": predictor})[1]
    assert networks["encoder"] == published.meta_encoder(1024, 24, 4096, VIDEO)
    assert networks["predictor"] == published.meta_predictor(1024, 12, 10)


@each_width
@pytest.mark.parametrize("prefix", ["", "vjepa2.", "module.vjepa2."])
def test_hugging_faces_vjepa2(widths, prefix):
    encoder, predictor = published.meta_encoder(*widths, VIDEO), published.meta_predictor(widths[0], 12, 10)
    theirs = published.huggingface_vjepa2(*widths, VIDEO)
    checkpoint, networks = found(prefixed(prefix, shaped(theirs)))
    assert networks == {"encoder": encoder, "predictor": predictor} and checkpoint.layout is layouts.VJEPA2
    back = layouts.to_huggingface("test", layouts.VJEPA2, checkpoint.networks)
    assert shapes(back) == theirs


def test_hugging_faces_classifier():
    theirs = prefixed("vjepa2.", published.huggingface_vjepa2(1024, 24, 4096, VIDEO))
    theirs |= published.huggingface_probe(1024, 4096, 174)
    _, networks = found(shaped(theirs))
    assert networks["encoder"] == published.meta_encoder(1024, 24, 4096, VIDEO)
    assert networks["classifier"] == published.meta_probe(1024, 4096, 174)
    assert networks.keys() == {"encoder", "predictor", "classifier"}


@pytest.mark.parametrize("old", [False, True], ids=["q_proj", "attention.query"])
@pytest.mark.parametrize("prefix", ["", "ijepa."])
def test_hugging_faces_ijepa(old, prefix):
    theirs = published.huggingface_ijepa(*HUGE_14, old=old)
    checkpoint, networks = found(prefixed(prefix, shaped(theirs)))
    assert networks == {"encoder": published.meta_encoder(*HUGE_14)}
    back = layouts.to_huggingface("test", layouts.IJEPA, checkpoint.networks)
    assert shapes(back) == published.huggingface_ijepa(*HUGE_14)


@pytest.mark.parametrize("norm, classes", [("norm", None), ("norm", 1000), ("fc_norm", 1000)])
def test_timms_vits(norm, classes):
    checkpoint, networks = found(shaped(published.timm(*HUGE_14, norm, classes)))
    assert networks.pop("encoder") == published.meta_encoder(*HUGE_14)
    assert networks == ({} if classes is None else {"classifier": published.affine("linear", classes, 1280)})
    assert ("fc_norm" in checkpoint.layout.title) == (norm == "fc_norm")


def test_the_names_here_are_those_of_hugging_faces_modules():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        video = transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(num_labels=174))
        image = transformers.IJepaModel(
            transformers.IJepaConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
            ),
            add_pooling_layer=False,
        )
    theirs = published.huggingface_vjepa2(1024, 24, 4096, VIDEO)
    assert shapes(video.vjepa2.state_dict()) == theirs
    assert shapes(video.state_dict()) == prefixed("vjepa2.", theirs) | published.huggingface_probe(1024, 4096, 174)
    assert shapes(image.state_dict()) == published.huggingface_ijepa(1024, 24, 4096, (16, 16), 196)


# Values: the depth of ViT-L, thin.
TINY = VJEPA2Config(
    patch_size=4, embed_dim=24, depth=24, num_heads=2, predictor_embed_dim=24, predictor_num_heads=2, crop_size=8,
    num_mask_tokens=12,  # whose names do not sort as they count
)  # fmt: skip
IMAGES = IJEPAConfig(crop_size=8, patch_size=4, embed_dim=24, depth=24, num_heads=2, predictor_embed_dim=24)


def filled(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())


def test_queries_keys_and_values_are_stacked_in_this_order_and_tokens_listed_in_theirs():
    theirs = filled(published.huggingface_vjepa2(24, 24, 96, (2, 4, 4), own=24, tokens=12), 0)
    model = VJEPA2(TINY)
    model.load(theirs)
    for ours, own in (("target_encoder.blocks", "encoder.layer"), ("predictor.predictor_blocks", "predictor.layer")):
        for i, kind in ((0, "weight"), (11, "bias")):
            parts = [theirs[f"{own}.{i}.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            assert torch.equal(model.state_dict()[f"{ours}.{i}.attn.qkv.{kind}"], torch.cat(parts))
    tokens = theirs["predictor.embeddings.mask_tokens"]
    assert all(torch.equal(token, tokens[i]) for i, token in enumerate(model.predictor.mask_tokens))


def donors():
    """Models whose every tensor is its own."""
    for model in (VJEPA2(TINY), IJEPA(IMAGES)):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        yield model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_saved_in_metas_names_loads_back(dtype, tmp_path):
    for model in donors():
        model.save(tmp_path / "model.safetensors", dtype=dtype)
        again = type(model)(model.config)
        report = again.load(tmp_path / "model.safetensors")
        kept = {name: value.to(dtype).float() if dtype else value for name, value in model.state_dict().items()}
        assert equal(again.state_dict(), kept) and not report.missing and not report.ignored


def test_what_is_saved_in_hugging_faces_names_loads_there_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    common = dict(hidden_size=24, num_hidden_layers=24, num_attention_heads=2, patch_size=4)
    video = transformers.VJEPA2Config(
        **common, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_mask_tokens=12, crop_size=8
    )
    image = transformers.IJepaConfig(**common, intermediate_size=96, image_size=8)
    theirs = transformers.VJEPA2Model(video), transformers.IJepaModel(image, add_pooling_layer=False)
    for model, other in zip(donors(), theirs, strict=True):
        path = tmp_path / "model.safetensors"
        model.save(path, "huggingface")
        other.load_state_dict(load_file(path), strict=True)
        again = type(model)(model.config)
        report = again.load(other.state_dict())
        assert equal(again.target_encoder.state_dict(), model.target_encoder.state_dict())
        assert equal(again.context_encoder.state_dict(), model.target_encoder.state_dict())
        if isinstance(model, VJEPA2):
            assert (
                equal(again.predictor.state_dict(), model.predictor.state_dict()) and "predictor" not in report.missing
            )
        else:
            assert report.missing["predictor"] == "left as it was"
