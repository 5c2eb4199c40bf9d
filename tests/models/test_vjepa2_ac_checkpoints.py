"""Files of V-JEPA 2-AC: the published layout, what is refused, and what `save` writes."""

from dataclasses import asdict, replace

import pytest
import torch

from jepa_kernels.models import layouts, sizes, vjepa2_ac
from jepa_kernels.models.vjepa2 import VJEPA2
from jepa_kernels.models.vjepa2_ac import WorldModel, WorldModelConfig
from tests.models.test_checkpoint_files import SMALL as VJEPA2_SMALL
from tests.models.test_vjepa2_ac import SMALL, world
from tests.models.weights import same

HEADS = {"num_heads": 1, "predictor_num_heads": 2}


def published(model, prefix="module."):
    """As in `vjepa2-ac-vitg.pt`: two encoders that are one, each with a table that is not used."""
    encoder = {**model.encoder.state_dict(), "pos_embed": torch.zeros(1, 6, model.config.embed_dim)}
    networks = {"encoder": encoder, "predictor": model.predictor.state_dict(), "target_encoder": encoder}
    state = {name: {f"{prefix}{key}": value for key, value in own.items()} for name, own in networks.items()}
    return {**state, "opt": {"state": {}}, "epoch": 315, "lr": 1e-5}


def block_names(name, depth):
    layers = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    return {f"{name}.{i}.{layer}.{w}" for i in range(depth) for layer in layers for w in ("weight", "bias")}


def pairs(*layers):
    return {f"{layer}.{w}" for layer in layers for w in ("weight", "bias")}


def test_the_published_file_has_every_name_and_shape_of_the_model():
    with torch.device("meta"):
        model = WorldModel()
    encoder, predictor = model.encoder.state_dict(), model.predictor.state_dict()
    ends = pairs("predictor_embed", "action_encoder", "state_encoder", "extrinsics_encoder")
    ends |= pairs("predictor_norm", "predictor_proj")
    assert encoder.keys() == block_names("blocks", 40) | pairs("patch_embed.proj", "norm") and len(encoder) == 484
    assert predictor.keys() == block_names("predictor_blocks", 24) | ends and len(predictor) == 300
    assert predictor["action_encoder.weight"].shape == predictor["state_encoder.weight"].shape == (1024, 7)
    assert predictor["extrinsics_encoder.weight"].shape == (1024, 6)
    assert predictor["predictor_blocks.23.attn.qkv.weight"].shape == (3072, 1024)
    networks = {"encoder": encoder, "predictor": predictor}
    assert sizes.model_of(networks) == "V-JEPA 2-AC"
    config = sizes.config_for("WorldModel", vjepa2_ac.SIZES, networks, {})
    assert config == WorldModelConfig() == vjepa2_ac.vit_giant()


@pytest.mark.parametrize("prefix", ["module.", "", "module.backbone.", "_orig_mod."])
def test_a_published_file_is_loaded_with_any_prefix(prefix, tmp_path):
    donor, model = world(), world()
    model.load_state_dict(WorldModel(donor.config).state_dict())
    torch.save(published(donor, prefix), tmp_path / "model.pt")
    report = model.load(tmp_path / "model.pt")
    assert same(model.state_dict(), donor.state_dict()) and set(report.loaded) == donor.state_dict().keys()
    reasons = {"target_encoder.pos_embed": "rotary positions take its place", "encoder": "the target_encoder is taken"}
    assert report.ignored == {**reasons, **dict.fromkeys(("opt", "epoch", "lr"), "no weights of a network")}
    assert not report.missing and str(report).startswith(f"WorldModel: {len(report.loaded)} of its tensors loaded from")


@pytest.mark.parametrize("kind", ["tokens", "no_state", "adaln"])
def test_a_model_is_built_from_its_file(kind, tmp_path):
    donor = world(kind)
    donor.save(tmp_path / "model.safetensors")
    again, report = WorldModel.from_checkpoint(tmp_path / "model.safetensors")
    assert again.config == donor.config and same(again.state_dict(), donor.state_dict())
    assert not report.missing and not report.ignored and report.layout == "Meta's layout"
    c = donor.config  # no shape tells these
    untold = {f: getattr(c, f) for f in ("crop_size", "num_frames", "rope", "rope_grid", "normalize", "distance")}
    again, _ = WorldModel.from_checkpoint(published(donor), **HEADS, **untold)
    assert replace(again.config, mlp_ratio=c.mlp_ratio) == c and same(again.state_dict(), donor.state_dict())


def of_jepa_wms(model, beside=("action_encoder",), proprio="proprio_encoder"):
    """As in JEPA-WMs' `{model}.pth.tar`: no encoder; what encodes actions and poses in the predictor, or beside it."""
    names = {"action_encoder": "action_encoder", "state_encoder": proprio}
    own, outer = {}, dict.fromkeys(("action_encoder", "proprio_encoder"))
    for name, value in model.predictor.state_dict().items():
        part, _, leaf = name.rpartition(".")
        theirs = names.get(part, part)
        if theirs in beside:  # a convolution over single steps
            weights = outer[theirs] = outer[theirs] or {}
            weights[f"module.patch_embed.{leaf}"] = value[..., None] if leaf == "weight" else value
        else:
            own[f"module.{theirs}.{leaf}"] = value
    return {"predictor": own, **outer, "heads": {}, "opt": {}, "scaler": None, "epoch": 50}


@pytest.mark.parametrize("size, count, beside", [("vj2ac_droid", 296, ()), ("jepa_wm_droid", 176, ("action_encoder",))])
def test_jepa_wms_files_have_every_name_and_shape_of_their_predictors(size, count, beside):
    with torch.device("meta"):
        model = WorldModel(vjepa2_ac.SIZES[size](depth=1, extrinsics_dim=None))
    state = of_jepa_wms(model, beside)
    found = layouts.recognise("WorldModel", state)
    own = model.predictor.state_dict()
    assert found.layout.title == "JEPA-WMs' layout" and found.networks.keys() == {"predictor"}
    assert {n: v.shape for n, v in found.networks["predictor"].items()} == {n: v.shape for n, v in own.items()}
    depth = model.config.predictor_depth
    layers = "predictor_embed", "action_encoder", "predictor_norm", "predictor_proj"
    modulated = pairs(*(f"predictor_blocks.{i}.adaLN_modulation.1" for i in range(depth if beside else 0)))
    assert own.keys() == block_names("predictor_blocks", depth) | modulated | pairs(*layers)
    assert len(own) == count and (state["action_encoder"] is None) == (not beside)
    sizes_of_theirs = {n: vjepa2_ac.SIZES[n] for n in ("vj2ac_droid", "jepa_wm_droid")}
    config = sizes.config_for("WorldModel", sizes_of_theirs, found.networks, {})
    assert config == vjepa2_ac.SIZES[size](extrinsics_dim=None)  # with the whole encoder, which the file lacks


@pytest.mark.parametrize(
    "kind, beside, proprio",
    [
        ("adaln", ("action_encoder",), "proprio_encoder"),
        ("adaln", (), "proprio_encoder"),
        ("tokens", (), "proprio_encoder"),
        ("tokens", (), "state_encoder"),  # as V-JEPA 2-AC was first published
        ("tokens", ("action_encoder", "proprio_encoder"), "proprio_encoder"),
    ],
)
def test_jepa_wms_files_fill_the_predictor_and_leave_the_encoder(kind, beside, proprio, tmp_path):
    donor, model = world(kind), WorldModel(world(kind).config)
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    torch.save(of_jepa_wms(donor, beside, proprio), tmp_path / "jepa_wm.pth.tar")
    report = model.load(tmp_path / "jepa_wm.pth.tar")
    own = donor.predictor.state_dict()
    assert same(model.predictor.state_dict(), own) and same(model.encoder.state_dict(), before)
    assert set(report.loaded) == {f"predictor.{name}" for name in own}
    assert report.missing == {"encoder": "left as it was"} and report.layout == "JEPA-WMs' layout"
    assert {"heads", "opt", "scaler", "epoch"} <= report.ignored.keys() <= of_jepa_wms(donor).keys()

    c = donor.config  # no shape of a predictor tells these
    told = {f: getattr(c, f) for f in ("embed_dim", "action_dim", "state_dim", "extrinsics_dim", "conditioning")}
    untold = {f: v for f, v in asdict(c).items() if f not in told and not f.startswith("predictor")}
    again, report = WorldModel.from_checkpoint(tmp_path / "jepa_wm.pth.tar", predictor_num_heads=2, **untold)
    assert again.config == c and same(again.predictor.state_dict(), own)
    assert report.missing == {"encoder": "at its random start"}


def test_what_is_no_predictor_of_ours_in_jepa_wms_layout_is_refused():
    state = of_jepa_wms(world("adaln"))
    other = of_jepa_wms(world("adaln", action_dim=4))
    with pytest.raises(
        ValueError, match=r"action_encoder.weight has shape \(48, 4\), the model \(48, 3\); its predictor"
    ):
        world("adaln").load(other)
    state["action_encoder"]["module.mlp.0.weight"] = torch.zeros(3)  # of deeper encoders of actions
    with pytest.raises(ValueError, match=r"got predictor\.action_encoder\.mlp\.0\.weight is unknown; its predictor"):
        world("adaln").load(state)
    with pytest.raises(ValueError, match=r"got predictor\.action_encoder\.weight twice"):
        world("adaln").load({**of_jepa_wms(world("adaln"), ()), "action_encoder": {"weight": torch.zeros(48, 3)}})
    with pytest.raises(ValueError, match="pass num_heads and predictor_num_heads, which shapes do not tell"):
        WorldModel.from_checkpoint(of_jepa_wms(world("adaln")))


def test_one_encoder_of_its_files_is_vjepa2s_too():
    donor = world()
    encoder, _ = VJEPA2.load_encoder(published(donor), num_heads=1)
    assert same(encoder.state_dict(), donor.encoder.state_dict())


def wrong(kind):
    donor = world()
    state = published(donor, "")
    if kind == "missing":
        del state["predictor"]["action_encoder.bias"]
    elif kind == "unknown":
        state["predictor"]["mask_tokens.0"] = torch.zeros(1, 1, 48)
    elif kind == "infinite":
        state["predictor"]["predictor_norm.bias"][3] = torch.inf
    elif kind == "no predictor":
        del state["predictor"]
    elif kind == "V-JEPA 2":
        return VJEPA2(VJEPA2_SMALL).state_dict()
    elif kind == "AdaLN":
        return published(world("adaln"))
    elif kind == "wider":
        return published(world(embed_dim=32))
    return state


@pytest.mark.parametrize(
    "kind, message",
    [
        ("missing", "got predictor.action_encoder.bias is missing; its encoder seems to be embed_dim 24"),
        ("unknown", "got predictor.mask_tokens.0 is unknown"),
        ("infinite", "got predictor.predictor_norm.bias holds values that are not finite"),
        (
            "no predictor",
            "must hold an encoder and a predictor, got encoder, target_encoder; pass a file of V-JEPA 2-AC",
        ),
        ("V-JEPA 2", "must be of V-JEPA 2-AC, got one of V-JEPA 2, embed_dim 48, depth 2, patch_size 8; build that"),
        ("AdaLN", "got predictor.state_encoder.weight is missing;"),
        (
            "wider",
            r"has shape \(32, 3, 2, 4, 4\), the model \(24, 3, 2, 4, 4\); .* more; its encoder .* embed_dim 32",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_loaded(kind, message):
    model = world()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load(wrong(kind))
    assert same(model.state_dict(), before)


def test_a_file_whose_config_means_something_else_is_refused(tmp_path):
    donor = world()
    donor.save(tmp_path / "model.safetensors")
    for change in ({"predictor_num_heads": 1}, {"rope_grid": 16}, {"normalize": False}):
        field, value = next(iter(change.items()))
        with pytest.raises(ValueError, match=f"must be of {field}={value}, got {field}="):
            world(**change).load(tmp_path / "model.safetensors")
    other = WorldModelConfig(**{**SMALL, "rope_grid": 4, "crop_size": (16, 16)})  # no weight depends on it
    WorldModel(other).load(tmp_path / "model.safetensors")


def test_sizes_that_shapes_do_not_tell_are_asked_for():
    with pytest.raises(ValueError, match="pass num_heads and predictor_num_heads, which shapes do not tell"):
        WorldModel.from_checkpoint(published(world()))
