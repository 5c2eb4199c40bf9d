"""Checkpoints of V-JEPA and V-JEPA 2.1, and those of other models than the one that is to load them."""

import contextlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from jepa_kernels.models import sizes, vjepa, vjepa2, vjepa2_1
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.vjepa2 import VJEPA2
from jepa_kernels.models.vjepa2_1 import VJEPA2_1
from jepa_kernels.nn.patch_embed import sincos_3d
from tests.models.test_checkpoint_files import HEADS, SMALL, same


@pytest.fixture
def donor():
    return VJEPA2(SMALL)


def small(module, kind, **changes):
    sizes = dict(crop_size=16, patch_size=8, embed_dim=48, depth=4, num_heads=2, predictor_embed_dim=48, num_frames=4)
    return kind(module.vit_large(**{**sizes, "predictor_depth": 2, **changes}))


@pytest.fixture
def first():
    return small(vjepa, vjepa.VJEPA)


@pytest.fixture
def dense():
    """V-JEPA 2.1 of four levels, not distilled."""
    return small(vjepa2_1, VJEPA2_1, predictor_num_heads=2, levels=4, teacher_embed_dim=None)


def meta_state(model, *left_out):
    parts = {"encoder": model.context_encoder, "target_encoder": model.target_encoder, "predictor": model.predictor}
    return {name: part.state_dict() for name, part in parts.items() if name not in left_out}


def test_vjepa_and_vjepa2_1_are_saved_loaded_and_built_from_their_files(first, dense, tmp_path):
    for model, heads in ((first, {"num_heads": 2}), (dense, HEADS)):
        model.save(tmp_path / "model.safetensors")
        assert type(model).from_checkpoint(tmp_path / "model.safetensors")[0].config == model.config
        tensors = load_file(tmp_path / "model.safetensors")
        again, report = type(model).from_checkpoint(tensors, num_frames=4, **heads)
        assert same(again.state_dict(), model.state_dict()) and not report.missing and not report.ignored
        if model is dense:  # no weight tells the crop, which positions do not depend on
            again.config = replace(again.config, crop_size=16)
        assert replace(again.config, mlp_ratio=4.0) == model.config
        encoder, _ = type(model).load_encoder(tensors, num_frames=4, num_heads=2)
        assert same(encoder.state_dict(), model.target_encoder.state_dict())


def test_a_distilled_files_average_is_loaded_into_both_encoders(dense):
    state = {"ema_encoder": dense.target_encoder.state_dict(), "predictor": dense.predictor.state_dict()}
    again = VJEPA2_1(dense.config)
    assert again.load(state).missing == {"encoder": "the target_encoder's weights are in its place"}
    for encoder in (again.context_encoder, again.target_encoder):
        assert same(encoder.state_dict(), dense.target_encoder.state_dict())


def test_options_of_vjepa2_1_in_vjepa2_load_their_own_file(dense, tmp_path):
    model = VJEPA2(dense.config)
    model.save(tmp_path / "model.safetensors")
    again = VJEPA2(dense.config)
    again.load(tmp_path / "model.safetensors")
    assert same(again.state_dict(), model.state_dict())


def test_files_of_other_models_are_refused_even_where_every_shape_fits(first, dense, donor):
    two = VJEPA2(replace(SMALL, num_mask_tokens=2))
    old = meta_state(two)  # V-JEPA's tensors are these and two tables
    for part, table in (
        ("encoder", "pos_embed"),
        ("target_encoder", "pos_embed"),
        ("predictor", "predictor_pos_embed"),
    ):
        old[part]["module." + table] = sincos_3d((2, 2, 2), 48 if part != "predictor" else 32)[None]
    wanted = "VJEPA2: checkpoint must be of V-JEPA 2, got one of V-JEPA, "
    for state in (old, without_predictor(old)):
        for read in (two.load, lambda s: VJEPA2.from_checkpoint(s, **HEADS), lambda s: VJEPA2.load_encoder(s, **HEADS)):
            with pytest.raises(ValueError, match=wanted + ".*; build that model"):
                read(state)
    for read in (donor.load, VJEPA2.from_checkpoint, VJEPA2.load_encoder):
        with pytest.raises(ValueError, match=r"VJEPA2: checkpoint must be of V-JEPA 2, got one of V-JEPA 2\.1, embed"):
            read(meta_state(dense))
    with pytest.raises(ValueError, match=r"VJEPA2_1: checkpoint must be of V-JEPA 2\.1, got one of V-JEPA 2, embed"):
        dense.load(meta_state(donor))
    with pytest.raises(
        ValueError, match=r"VJEPA: .* got encoder\.pos_embed is missing; target_encoder\.pos_embed is m"
    ):
        first.load(meta_state(VJEPA2(vjepa2.vit_large(**SAME)), "predictor"))


def without_predictor(state):
    return {part: own for part, own in state.items() if part != "predictor"}


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_vjepa_of_other_mask_tokens_is_built_from_its_weights_and_is_no_vjepa2(tokens, donor):
    model = small(vjepa, vjepa.VJEPA, num_mask_tokens=tokens)
    again, _ = vjepa.VJEPA.from_checkpoint(model.state_dict(), num_heads=2, num_frames=4)
    assert again.config == model.config
    with pytest.raises(ValueError, match="VJEPA2: checkpoint must be of V-JEPA 2, got one of V-JEPA, "):
        donor.load(model.state_dict())


def test_tables_that_vjepa2s_files_hold_unused_do_not_tell_another_model(first):
    """Ten mask tokens are its own, whatever the tables hold; those of zeros are of no place."""
    model = VJEPA2(replace(SMALL, num_mask_tokens=10))
    for table in (sincos_3d((2, 2, 2), 48)[None], torch.zeros(1, 8, 48)):
        state = meta_state(model)
        for own, name in ((state["encoder"], "pos_embed"), (state["predictor"], "predictor_pos_embed")):
            own[name] = table
        assert "encoder.pos_embed" in model.load(state).ignored
    encoder = {**VJEPA2(vjepa2.vit_large(**SAME)).context_encoder.state_dict(), "pos_embed": torch.zeros(1, 8, 48)}
    with pytest.raises(ValueError, match=r"VJEPA: .* got encoder\.pos_embed holds other positions than the grid's; "):
        first.load({"encoder": encoder})


def test_tables_of_another_grid_with_as_many_patches_are_refused(tmp_path):
    wide = small(vjepa, vjepa.VJEPA, crop_size=(16, 32))
    with pytest.raises(ValueError, match=r"VJEPA: .* got encoder\.pos_embed holds other positions than the grid's; "):
        small(vjepa, vjepa.VJEPA, crop_size=(32, 16)).load(wide.state_dict())
    for dtype in (torch.float16, torch.bfloat16):
        wide.save(tmp_path / "half.safetensors", dtype=dtype)
        small(vjepa, vjepa.VJEPA, crop_size=(16, 32)).load(tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"Encoder: pixels must have \(2, 2, 4\) patches .* got \(2, 4, 2\); crop"):
        wide.ema(torch.zeros(1, 3, 4, 32, 16))
    flat = IJEPA(IJEPAConfig((16, 64), 8, embed_dim=48, depth=2, num_heads=2))
    for build in (IJEPA.from_checkpoint, IJEPA.load_encoder):
        with pytest.raises(ValueError, match=r"IJEPA: .*encoder\.pos_embed holds other positions than the grid's; "):
            build(flat.state_dict(), num_heads=2)
        build(flat.state_dict(), num_heads=2, crop_size=(16, 64))


def test_tables_that_were_trained_on_are_loaded(tmp_path):
    """As those of fine-tuned models of other libraries are."""
    model, again = (IJEPA(IJEPAConfig(32, 8, embed_dim=48, depth=2, num_heads=2)) for _ in range(2))
    with torch.no_grad():
        for encoder in (model.context_encoder, model.target_encoder):
            encoder.pos_embed.add_(torch.randn_like(encoder.pos_embed) * 0.1)
    again.load(model.state_dict())
    assert torch.equal(again.target_encoder.pos_embed, model.target_encoder.pos_embed)


def test_the_crop_of_rotary_positions_is_not_told_by_a_table_that_is_not_used():
    networks = {"encoder": {**meta_state(VJEPA2(SMALL))["encoder"], "pos_embed": torch.zeros(1, 8192, 48)}}
    assert sizes.config_for("test", vjepa2.SIZES, networks, HEADS).crop_size == vjepa2.vit_large().crop_size


SAME = dict(crop_size=16, patch_size=8, embed_dim=48, depth=4, num_heads=2)  # an encoder as of `first`


def test_the_encoder_of_an_action_model_loads_alone(donor):
    state = meta_state(donor)
    state["predictor"] = {"action_encoder.weight": torch.zeros(48, 7)}
    with pytest.raises(ValueError, match="got one of V-JEPA 2-AC, embed_dim 48, depth 2, patch_size 8; build"):
        donor.load(state)
    encoder, _ = VJEPA2.load_encoder(state, num_heads=2)
    assert same(encoder.state_dict(), donor.target_encoder.state_dict())


def test_hugging_face_has_no_place_for_some_models(first, dense, tmp_path):
    for model in (first, dense):
        with pytest.raises(ValueError, match=r": layout must be meta, got 'huggingface'; leave it out for Meta's"):
            model.save(tmp_path / "model.safetensors", "huggingface")
    with pytest.raises(
        ValueError, match=r"VJEPA2: layout must have a place for every weight, got Hugging Face's VJEPA2 "
    ):
        VJEPA2(dense.config).save(tmp_path / "model.safetensors", "huggingface")


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.ones(0, 3, 2, 8, 8), [1.0]])
def test_whatever_stands_in_a_tensors_place_is_refused_with_a_message(first, dense, value):
    for model, heads in ((first, {"num_heads": 2}), (dense, HEADS)):
        state = meta_state(model, "encoder")
        for part, own in state.items():
            for name in [name for name in own if "blocks." not in name or name.endswith("blocks.0.mlp.fc1.weight")]:
                spoiled = {**state, part: {**own, name: value}}
                with pytest.raises(ValueError, match=f"^{type(model).__name__}: "):
                    model.load(spoiled)
                with contextlib.suppress(ValueError):
                    sizes.config_for("test", model.sizes, spoiled, heads)
