"""V-JEPA 2's published layouts, Meta's and Hugging Face's: names, shapes, loading, and files that do not fit."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from jepa_kernels.models import vjepa2
from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config
from jepa_kernels.nn.patch_embed import sincos_3d
from tests.models import published
from tests.models.test_checkpoints import millions, shapes
from tests.models.weights import same, shaken

SMALL = VJEPA2Config(
    crop_size=16,
    num_frames=4,
    patch_size=8,
    embed_dim=48,
    depth=2,
    num_heads=2,
    predictor_embed_dim=32,
    predictor_depth=2,
    predictor_num_heads=2,
    num_mask_tokens=3,
)
SIZES = {  # name: width, depth, heads, hidden, crop; of the encoder: parameters in millions, entries; of the predictor
    "vit_large": (1024, 24, 16, 4096, 256, 303.9, 292, 22.1),
    "vit_huge": (1280, 32, 16, 5120, 256, 631.6, 388, 22.3),
    "vit_giant_xformers": (1408, 40, 22, 6144, 256, 1012.2, 484, 22.4),
    "vit_giant_xformers_384": (1408, 40, 22, 6144, 384, 1012.2, 484, 22.4),
    "vit_gigantic_xformers": (1664, 48, 26, 6656, 256, 1598.5, 580, None),
}


def meta(config):
    with torch.device("meta"):
        return VJEPA2(config)


@pytest.mark.parametrize("name", SIZES)
def test_names_shapes_and_counts_are_the_published_ones(name):
    width, depth, heads, hidden, crop, encoder, entries, predictor = SIZES[name]
    model, encoder_shapes = meta(vjepa2.SIZES[name]()), published.meta_encoder(width, depth, hidden, (2, 16, 16))
    assert shapes(model.context_encoder) == shapes(model.target_encoder) == encoder_shapes
    assert shapes(model.predictor) == published.meta_predictor(width, 12, 10)
    assert {b.attn.num_heads for b in model.context_encoder.blocks} == {heads}
    assert {b.attn.num_heads for b in model.predictor.predictor_blocks} == {12}
    assert (round(millions(model.context_encoder), 1), len(shapes(model.context_encoder))) == (encoder, entries)
    assert predictor is None or round(millions(model.predictor), 1) == predictor
    assert model.grid == (8, crop // 16, crop // 16)


def test_all_sizes_are_tested():
    assert set(SIZES) == set(vjepa2.SIZES)


def meta_layout(model, prefix="module.backbone."):
    parts = {"encoder": model.context_encoder, "predictor": model.predictor, "target_encoder": model.target_encoder}
    state = {name: {prefix + k: v for k, v in part.state_dict().items()} for name, part in parts.items()}
    tables = {"encoder": "pos_embed", "target_encoder": "pos_embed", "predictor": "predictor_pos_embed"}
    for name, table in tables.items():
        state[name][prefix + table] = torch.zeros(1, 8, 32)
    return {
        **state,
        "opt": {},
        "scaler": None,
        "epoch": 10,
        "loss": 0.1,
        "batch_size": 24,
        "world_size": 128,
        "lr": 1e-3,
    }


HUGGINGFACE = {  # the beginning of our name: theirs
    "encoder": {"patch_embed": "embeddings.patch_embeddings", "blocks": "layer", "norm": "layernorm"},
    "predictor": {
        "predictor_embed": "embeddings.predictor_embeddings",
        "predictor_blocks": "layer",
        "predictor_norm": "layernorm",
        "predictor_proj": "proj",
    },
}


def huggingface_layout(model):
    """Queries, keys and values apart, mask tokens in one tensor, one encoder."""
    found = {}
    for part, module in (("encoder", model.target_encoder), ("predictor", model.predictor)):
        for name, value in module.state_dict().items():
            first, rest = name.split(".", 1)
            if first == "mask_tokens":
                continue
            theirs = f"{part}.{HUGGINGFACE[part][first]}.{rest.replace('attn.', 'attention.')}"
            if ".qkv." in theirs:
                thirds = zip(("query", "key", "value"), value.chunk(3), strict=True)
                found |= {theirs.replace("qkv", which): third for which, third in thirds}
            else:
                found[theirs] = value
    found["predictor.embeddings.mask_tokens"] = torch.stack([t.detach() for t in model.predictor.mask_tokens])
    return found


@pytest.fixture
def donor():
    """Three networks of different weights."""
    return shaken(VJEPA2(SMALL), 1)


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "_orig_mod.module."])
def test_metas_layout_loads(donor, prefix, tmp_path):
    torch.save(meta_layout(donor, prefix), tmp_path / "vitl.pt")
    for source in (tmp_path / "vitl.pt", meta_layout(donor, prefix)):
        model = VJEPA2(SMALL)
        report = model.load(source)
        assert same(model.state_dict(), donor.state_dict()) and not report.missing
        tables = {"encoder.pos_embed", "target_encoder.pos_embed", "predictor.predictor_pos_embed"}
        replaced = {name for name, why in report.ignored.items() if why == "rotary positions take its place"}
        assert replaced == tables and report.ignored["opt"] == "no weights of a network"


def write(path, tensors):
    save_file({name: value.detach().clone() for name, value in tensors.items()}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hugging_faces_layout_loads_into_both_encoders(donor, dtype, tmp_path):
    donor = donor.to(dtype)
    state = huggingface_layout(donor)
    for source in (state, write(tmp_path / "model.safetensors", state)):
        model = VJEPA2(SMALL)
        report = model.load(source)
        assert report.missing == {"target_encoder": "the encoder's weights are in its place"} and not report.ignored
        encoder = {name: value.float() for name, value in donor.target_encoder.state_dict().items()}
        assert same(model.target_encoder.state_dict(), encoder) and same(model.context_encoder.state_dict(), encoder)
        predictor = {name: value.float() for name, value in donor.predictor.state_dict().items()}
        assert same(model.predictor.state_dict(), predictor)


def test_its_own_state_dict_loads(donor):
    prefixed = {f"module.{name}": value for name, value in donor.state_dict().items()}
    model = VJEPA2(SMALL)
    model.load(prefixed)
    assert same(model.state_dict(), donor.state_dict())


@pytest.mark.parametrize("part", ["predictor.", "target_encoder."])
def test_a_part_of_its_own_state_dict_is_refused(donor, part):
    state = {name: value for name, value in donor.state_dict().items() if not name.startswith(part)}
    with pytest.raises(ValueError, match=f"VJEPA2: checkpoint must hold {part[:-1]}, got "):
        VJEPA2(SMALL).load(state)


def test_weights_without_values_are_refused():
    model, absent = VJEPA2(SMALL), meta(SMALL)
    for state in (meta_layout(absent), huggingface_layout(absent)):
        with pytest.raises(ValueError) as error:
            model.load(state)
        assert str(error.value).startswith(FITS + "encoder.") and str(error.value).count(" is on the meta device") == 3


def spoiled(kind, donor):
    state, theirs = meta_layout(donor, "module."), huggingface_layout(donor)
    weight = "encoder.layer.1.attention.key.weight"
    if kind == "V-JEPA 1":
        tokens = {f"module.mask_tokens.{i}": torch.zeros(1, 1, 32) for i in range(2)}
        predictor = {k: v for k, v in state["predictor"].items() if "mask_tokens" not in k}
        table = sincos_3d((2, 2, 2), 32)[None]
        return {**state, "predictor": {**predictor, **tokens, "module.predictor_pos_embed": table}}
    if kind == "V-JEPA 2.1":
        encoder = {k.replace("module.norm.", "module.norms_block.0."): v for k, v in state["encoder"].items()}
        return {**state, "encoder": encoder}
    if kind == "ViT-L":
        return meta_layout(meta(vjepa2.vit_large()))
    if kind == "V-JEPA 2-AC":
        return {**state, "predictor": {**state["predictor"], "module.action_encoder.weight": torch.zeros(32, 7)}}
    if kind == "no layout":
        return {"layer.weight": torch.zeros(3), "layer.bias": torch.zeros(3)}
    if kind == "one name twice":
        return {**state, "encoder": {**state["encoder"], "norm.weight": torch.ones(48)}}
    if kind == "no key":
        return {k: v for k, v in theirs.items() if k != weight}
    if kind == "a key of another shape":
        return {**theirs, weight: torch.ones(24, 48)}
    if kind == "a key that is no tensor":
        return {**theirs, weight: [1.0]}
    if kind == "a key that is not finite":
        return {**theirs, weight: torch.full((48, 48), torch.inf)}
    if kind == "more mask tokens":
        return {**theirs, "predictor.embeddings.mask_tokens": torch.zeros(4, 1, 1, 32)}
    if kind == "flat mask tokens":
        return {**theirs, "predictor.embeddings.mask_tokens": torch.zeros(96)}
    assert kind == "an unknown name"
    return {**theirs, "decoder.weight": torch.zeros(3, 48)}


FITS = "VJEPA2: checkpoint must hold exactly the weights of this config, got "
OWN = "; its size seems to be embed_dim 48, depth 2, patch_size 8"
OTHER = "VJEPA2: checkpoint must be of V-JEPA 2, got one of "
TOKENS = "; build the model with num_mask_tokens=4, as many as it holds"


@pytest.mark.parametrize(
    "kind, message, remedy",
    [
        ("V-JEPA 1", OTHER + "V-JEPA, embed_dim 48, depth 2, patch_size 8 with 8 patches", "; build that model"),
        ("V-JEPA 2.1", OTHER + "V-JEPA 2.1, embed_dim 48", "; build that model"),
        ("V-JEPA 2-AC", OTHER + "V-JEPA 2-AC, embed_dim 48", "; build that model"),
        (
            "ViT-L",
            FITS + "encoder.blocks.2.norm1.weight is unknown; ",
            "; its size seems to be vit_large with 8 patches",
        ),
        ("no layout", "VJEPA2: checkpoint must be of a published layout, got layer.bias, layer.weight", "state_dict()"),
        (
            "one name twice",
            "VJEPA2: checkpoint must hold each tensor once, got encoder.norm.weight twice",
            "of the two",
        ),
        ("no key", FITS + "encoder.blocks.1.attn.qkv.weight is missing; ", OWN),
        ("a key of another shape", FITS + "encoder.blocks.1.attn.qkv.weight is missing; ", OWN),
        ("a key that is no tensor", FITS + "encoder.blocks.1.attn.qkv.weight is missing; ", OWN),
        ("a key that is not finite", FITS + "encoder.blocks.1.attn.qkv.weight holds values that are not finite; ", OWN),
        ("more mask tokens", FITS + "predictor.mask_tokens.3 is unknown; ", TOKENS),
        ("flat mask tokens", FITS + "predictor.mask_tokens.0 is missing; ", OWN),
        ("an unknown name", FITS + "encoder.decoder.weight is unknown; ", OWN),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(donor, kind, message, remedy):
    model = VJEPA2(SMALL)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        model.load(spoiled(kind, donor))
    assert str(error.value).startswith(message) and str(error.value).endswith(remedy)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    "content", [b"", b"\x02", b"\xff" * 40, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{x"]
)
def test_bytes_that_are_no_safetensors_are_refused(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.safetensors must be a safetensors file of plain tensors, got: "):
        VJEPA2(SMALL).load(path)


def test_a_torn_file_is_refused(donor, tmp_path):
    path = write(tmp_path / "torn.safetensors", huggingface_layout(donor))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"torn\.safetensors must be a safetensors file of plain tensors, got: "):
        VJEPA2(SMALL).load(path)
