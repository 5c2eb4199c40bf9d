"""The published layout of I-JEPA's weights: names, shapes, parameter counts, loading, and files that do not fit."""

import copy
import pickle

import pytest
import torch

from jepa_kernels.models import ijepa
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from tests.models import published
from tests.models.weights import shaken

SMALL = IJEPAConfig(
    crop_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, predictor_embed_dim=32, predictor_depth=2
)


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def millions(module):
    return sum(p.numel() for name, p in module.named_parameters() if "pos_embed" not in name) / 1e6


SIZES = {  # name: width, depth, hidden, patch, tokens, predictor depth
    "vit_tiny": (192, 12, 768, 16, 196, 12),
    "vit_small": (384, 12, 1536, 16, 196, 12),
    "vit_base": (768, 12, 3072, 16, 196, 12),
    "vit_large": (1024, 24, 4096, 16, 196, 12),
    "vit_huge_14": (1280, 32, 5120, 14, 256, 12),
    "vit_huge_16_448": (1280, 32, 5120, 16, 784, 12),
    "vit_giant_16": (1408, 40, 6144, 16, 196, 16),
}
HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}  # 16 from vit_large on


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_are_the_published_ones(name):
    width, depth, hidden, patch, tokens, predictor_depth = SIZES[name]
    with torch.device("meta"):
        model = IJEPA(ijepa.SIZES[name]())
    assert shapes(model.context_encoder) == published.meta_encoder(width, depth, hidden, (patch, patch), tokens)
    assert shapes(model.target_encoder) == shapes(model.context_encoder)
    assert shapes(model.predictor) == published.meta_predictor(width, predictor_depth, None, table=tokens)
    blocks = *model.context_encoder.blocks, *model.predictor.predictor_blocks
    assert {b.attn.num_heads for b in blocks} == {HEADS.get(name, 16)}


@pytest.mark.parametrize(
    "name, encoder, predictor, entries",
    [("vit_huge_14", 630.4, 22.3, (389, 152)), ("vit_giant_16", 1011.1, 29.5, (485, 200))],
)
def test_parameter_counts_are_the_published_ones(name, encoder, predictor, entries):
    with torch.device("meta"):
        model = IJEPA(ijepa.SIZES[name]())
    assert (round(millions(model.context_encoder), 1), round(millions(model.predictor), 1)) == (encoder, predictor)
    assert (len(shapes(model.context_encoder)), len(shapes(model.predictor))) == entries


def test_all_sizes_are_tested():
    assert set(SIZES) == set(ijepa.SIZES)


def test_the_start_is_the_published_one():
    model = IJEPA(IJEPAConfig(crop_size=64, embed_dim=192, depth=2, num_heads=3))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif "pos_embed" not in name:
            assert 0.017 < p.std() < 0.023 and p.mean().abs() < 0.004, name
    online, target = model.context_encoder.state_dict(), model.target_encoder.state_dict()
    assert all(torch.equal(online[name], target[name]) for name in online)


def test_position_tables_hold_the_column_first():
    table = IJEPA(SMALL).context_encoder.pos_embed[0].view(4, 4, 48)
    assert torch.equal(table[1, :, :24], table[3, :, :24]) and torch.equal(table[:, 1, 24:], table[:, 3, 24:])
    waves = torch.arange(4.0, dtype=torch.float64)[:, None] / 10000.0 ** (torch.arange(12) / 12)
    expected = torch.cat([waves.sin(), waves.cos()], 1)
    torch.testing.assert_close(table[2, :, :24].double(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(table[:, 2, 24:].double(), expected, rtol=0, atol=1e-7)


def meta_layout(model, prefix="module."):
    parts = {"encoder": model.context_encoder, "predictor": model.predictor, "target_encoder": model.target_encoder}
    state = {name: {prefix + k: v for k, v in part.state_dict().items()} for name, part in parts.items()}
    return {
        **state,
        "opt": {},
        "scaler": None,
        "epoch": 300,
        "loss": 0.1,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }


@pytest.fixture
def donor():
    """Three networks of different weights."""
    return shaken(IJEPA(SMALL), 1)


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "_orig_mod.module."])
def test_a_published_checkpoint_loads(donor, prefix, tmp_path):
    torch.save(meta_layout(donor, prefix), tmp_path / "jepa-ep300.pth.tar")
    from_file, from_memory = IJEPA(SMALL), IJEPA(SMALL)
    reports = from_file.load(tmp_path / "jepa-ep300.pth.tar"), from_memory.load(meta_layout(donor, prefix))
    for report in reports:
        assert report.layout == "Meta's layout" and not report.missing
        assert len(report.loaded) == len(donor.state_dict())
        names = ("opt", "scaler", "epoch", "loss", "batch_size", "world_size", "lr")
        assert report.ignored == dict.fromkeys(names, "no weights of a network")
    for model in (from_file, from_memory):
        assert all(torch.equal(v, donor.state_dict()[k]) for k, v in model.state_dict().items())
        assert not any(p.requires_grad for p in model.target_encoder.parameters())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_its_own_state_dict_loads(donor, prefix):
    model = IJEPA(SMALL)
    report = model.load({prefix + name: value for name, value in donor.state_dict().items()})
    assert report.layout == "its own state dict" and len(report.loaded) == len(donor.state_dict())
    assert all(torch.equal(value, donor.state_dict()[name]) for name, value in model.state_dict().items())


def without(state, part, name):
    return {**state, part: {k: v for k, v in state[part].items() if k != name}}


def replaced(state, part, name, value):
    return {**state, part: {**state[part], name: value}}


CONVOLUTION = "module.patch_embed.proj.weight"


def spoiled(kind, state):
    predictor = state["predictor"]
    if kind == "a V-JEPA predictor":
        tokens = {"module.mask_tokens.0": predictor["module.mask_token"]}
        return without({**state, "predictor": {**predictor, **tokens}}, "predictor", "module.mask_token")
    if kind == "one missing":
        return without(state, "encoder", "module.blocks.1.attn.qkv.bias")
    if kind == "another shape":
        return replaced(state, "target_encoder", "module.norm.weight", torch.ones(64))
    if kind == "not finite":
        return replaced(state, "encoder", "module.norm.bias", torch.full((48,), torch.nan))
    if kind == "not a tensor":
        return replaced(state, "encoder", "module.norm.bias", [0.0] * 48)
    if kind == "an int for a name":
        return {**state, "encoder": {**state["encoder"], 3: torch.ones(2)}}
    if kind == "complex":
        complex_bias = torch.complex(torch.ones(48), torch.ones(48))
        return replaced(state, "encoder", "module.norm.bias", complex_bias)
    if kind == "integers":
        return replaced(state, "encoder", "module.norm.bias", torch.ones(48, dtype=torch.int64))
    if kind == "too large for float32":
        return replaced(state, "encoder", "module.norm.bias", torch.full((48,), 1e300, dtype=torch.float64))
    if kind == "sparse":
        return replaced(state, "encoder", "module.norm.bias", torch.ones(48).to_sparse())
    if kind == "no values":
        return replaced(state, "encoder", "module.norm.bias", torch.ones(48, device="meta"))
    if kind == "a list of positions":
        return replaced(state, "encoder", "module.pos_embed", [0.0])
    if kind == "flat positions":
        return replaced(state, "encoder", "module.pos_embed", torch.ones(16 * 48))
    if kind == "no encoder":
        return {"predictor": state["predictor"], "epoch": 3}
    if kind == "clips":
        weight = torch.ones(48, 3, 2, 8, 8)
        return replaced(replaced(state, "encoder", CONVOLUTION, weight), "target_encoder", CONVOLUTION, weight)
    if kind == "no convolution":
        names = ("encoder", "target_encoder")
        return {
            n: without(state, n, "module.patch_embed.proj.weight")[n] if n in names else v for n, v in state.items()
        }
    assert kind == "vit_tiny"
    with torch.device("meta"):
        return meta_layout(IJEPA(ijepa.vit_tiny()))


FITS = "IJEPA: checkpoint must hold exactly the weights of this config, got "


@pytest.mark.parametrize(
    "kind, message",
    [
        ("a V-JEPA predictor", FITS + "predictor.mask_token is missing; predictor.mask_tokens.0 is unknown; "),
        ("one missing", FITS + "encoder.blocks.1.attn.qkv.bias is missing; "),
        ("another shape", FITS + "target_encoder.norm.weight has shape (64,), the model (48,); "),
        ("not finite", FITS + "encoder.norm.bias holds values that are not finite; "),
        ("not a tensor", FITS + "encoder.norm.bias is a list; "),
        (
            "an int for a name",
            FITS + "encoder.3 is unknown; its size seems to be embed_dim 48, depth 2, patch_size 8 with 16 patches",
        ),
        ("complex", FITS + "encoder.norm.bias is of dtype complex64; "),
        ("integers", FITS + "encoder.norm.bias is of dtype int64; "),
        ("too large for float32", FITS + "encoder.norm.bias holds values that are not finite; "),
        ("sparse", FITS + "encoder.norm.bias is no dense tensor; "),
        ("no values", FITS + "encoder.norm.bias is on the meta device; "),
        (
            "a list of positions",
            FITS + "encoder.pos_embed is a list; its size seems to be embed_dim 48",
        ),
        ("flat positions", FITS + "encoder.pos_embed has shape (768,), the model (1, 16, 48); its size seems to be e"),
        ("vit_tiny", FITS + "encoder.blocks.2.norm1.weight is unknown; "),
        ("clips", "IJEPA: checkpoint must be of I-JEPA, got one of V-JEPA, embed_dim 48, depth 2, patch_size 8 with"),
        ("no convolution", FITS + "encoder.patch_embed.proj.weight is missing; target_encoder.patch_embed.proj.weight"),
        ("no encoder", "IJEPA: checkpoint must hold encoder, target_encoder, got epoch, predictor; "),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(donor, kind, message):
    model = IJEPA(SMALL)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        model.load(spoiled(kind, meta_layout(donor)))
    assert str(error.value).startswith(message)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if kind == "vit_tiny":
        assert str(error.value).endswith("; its size seems to be vit_tiny with 196 patches")
    if kind == "no convolution":
        assert str(error.value).endswith("; it seems to be of another model than I-JEPA")
    if kind == "no encoder":
        assert str(error.value).endswith("; pass a published file of I-JEPA or this model's state_dict()")


class Foreign:
    """Something that a file of plain tensors does not hold."""


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    text, pickled, tensor = tmp_path / "a.txt", tmp_path / "b.pt", tmp_path / "c.pt"
    text.write_text("weights?")
    torch.save({"encoder": Foreign()}, pickled)
    torch.save(torch.zeros(3), tensor)
    for path in (text, pickled):
        with pytest.raises(ValueError) as error:
            IJEPA(SMALL).load(path)
        assert str(error.value).startswith(f"IJEPA: {path} must be a torch file of plain tensors, got: ")
    with pytest.raises(TypeError, match="IJEPA: checkpoint must be a mapping of names, got Tensor; pass a state dict"):
        IJEPA(SMALL).load(tensor)
    with pytest.raises(FileNotFoundError):
        IJEPA(SMALL).load(tmp_path / "absent.pt")


@pytest.mark.parametrize("name", [3, ("a", "b"), None])
def test_names_that_are_no_text_are_refused_in_its_own_state_dict(donor, name):
    with pytest.raises(ValueError) as error:
        IJEPA(SMALL).load({**donor.state_dict(), name: torch.ones(2)})
    assert str(error.value).startswith(f"{FITS}encoder.{name} is unknown; ")


def test_a_source_that_is_neither_mapping_nor_path_is_refused():
    with pytest.raises(TypeError, match="IJEPA: checkpoint must be a mapping of names or a path, got int; pass a st"):
        IJEPA(SMALL).load(0)


def legacy(entries):
    """The opening of a file as torch wrote them before zip archives, then `entries`."""
    head = [pickle.dumps(v, protocol=2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(head) + entries


def test_any_bytes_are_refused_with_the_message(tmp_path):
    model, path = IJEPA(SMALL), tmp_path / "bytes.pt"
    for content in (*(bytes([first]) * 3 for first in range(256)), legacy(b""), legacy(b"."), legacy(b"].].")):
        path.write_bytes(content)
        with pytest.raises((ValueError, TypeError)) as error:
            model.load(path)
        ours = f"IJEPA: {path} must be a torch file of plain tensors, got: ", "IJEPA: checkpoint must be a mapping of "
        assert str(error.value).startswith(ours), content


def test_a_torn_file_is_refused(donor, tmp_path):
    path = tmp_path / "torn.pt"
    torch.save(meta_layout(donor), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"torn\.pt must be a torch file of plain tensors, got: "):
        IJEPA(SMALL).load(path)
