"""Patches of VJEPA2: faults that verification finds, what is left alone, and what is refused."""

import pytest
import torch
from torch import nn

import jepa_kernels as jk
from jepa_kernels.integrations.huggingface import patch, vjepa2, vjepa2_plan
from tests.integrations.vjepa2_models import (
    arguments,
    assert_within_budget,
    clips,
    exactly,
    masks,
    numbers,
    outputs,
    small,
)

pytest.importorskip("transformers")


def another_rotation(attention, x, ids, angle_dtype):
    ids = torch.arange(x.shape[-2]) if ids is None else ids
    return jk.Rope(jk.patch_positions(ids, (1, 4, 4)), pairing="interleaved")


def no_rotation(attention, x, ids, angle_dtype):
    ids = torch.zeros(x.shape[-2], dtype=torch.long) if ids is None else torch.zeros_like(ids)
    return jk.Rope(jk.patch_positions(ids, (1, 4, 4)), pairing="tiled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rotation", [another_rotation, no_rotation])
def test_another_rotation_is_found_and_the_model_stays_as_it_was(rotation, dtype, monkeypatch):
    """Of weights as drawn by default too, whose attention is nearly a mean: bf16 alone would hide the fault."""
    model, pixels = small(dtype=dtype, initializer_range=0.02), clips(dtype=dtype)
    before = outputs(model, pixels)
    monkeypatch.setattr(vjepa2, "_rope", rotation)
    with pytest.raises(RuntimeError, match="the patched model must give the numbers of the model, got encoder"):
        patch(model)
    assert all(torch.equal(outputs(model, pixels)[name], x) for name, x in before.items())


@pytest.mark.parametrize("name", ["flash_attention_2", "jepa_kernels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_verification_asks_no_implementation_for_a_type_that_it_lacks(name, dtype, monkeypatch):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import AttentionInterface

    called = []

    def narrow(module, query, *args, **kwargs):
        called.append(query.dtype)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, name, narrow)
    model = small(dtype=dtype)
    model.config._attn_implementation = name
    done = patch(model)
    assert not done.skipped and set(called) <= {torch.bfloat16} and bool(called) == (dtype == torch.bfloat16)
    assert model.config._attn_implementation == name


REASONS = {
    "eager": (dict(attn_implementation="eager"), "attn_implementation is 'eager'"),
    "dropout": (dict(attention_probs_dropout_prob=0.1), "attention dropout is 0.1"),
    "width": (dict(hidden_size=40, pred_hidden_size=24), "head dims that are multiples of 8 up to 128"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_has_no_kernel_keeps_its_own_forward(case):
    changes, why = REASONS[case]
    model, given, pixels = small(**changes), arguments(), clips()
    exact, own = exactly(model, pixels, **given), numbers(model, pixels, **given)
    done = patch(model)
    assert why in done.skipped["encoder.layer.0.attention"] and why in done.skipped["predictor.layer.1.attention"]
    assert done.skipped["encoder"] == "layer 0 keeps its own attention" and "predictor" in done.patched
    assert why in str(done)
    assert_within_budget(numbers(model, pixels, **given), exact, own)


def test_an_adapted_or_watched_convolution_is_left_alone():
    model = small()
    model.encoder.embeddings.patch_embeddings.proj.register_forward_hook(lambda *_: None)
    assert patch(model).skipped == {"encoder.embeddings.patch_embeddings": "hooks on Conv3d would not run"}


@pytest.mark.parametrize("switch", vjepa2_plan.SWITCHES)
def test_a_config_of_vjepa_2_1_is_refused(switch):
    model = small()
    setattr(model.config, switch, [1] if switch == "hierarchical_layers" else 4)
    with pytest.raises(ValueError, match=rf"patch: config.{switch} must be .*; of V-JEPA 2.1 this patch knows nothing"):
        patch(model)


def test_a_signature_of_another_version_is_refused(monkeypatch):
    from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

    def forward(self, hidden_states, position_mask=None, output_attentions=False, head_mask=None):
        """As of transformers 4.57."""

    monkeypatch.setattr(VJEPA2RopeAttention, "forward", forward)
    message = (
        r"VJEPA2RopeAttention.forward must take \(hidden_states, position_mask\), "
        r"got \(hidden_states, position_mask, output_attentions, head_mask\) of transformers \d"
    )
    with pytest.raises(ValueError, match=message):
        patch(small())


def test_what_cannot_be_patched_says_why():
    with pytest.raises(
        TypeError, match=r"patch: model must be one of VJEPA2Model, .* got Linear; pass the model itself"
    ):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"patch: angle_dtype must be None, float32, .* got torch.float64"):
        patch(small(), angle_dtype=torch.float64)
    with pytest.raises(TypeError, match=r"patch: model must be float32, bfloat16 or float16, got torch.float64"):
        patch(small().double())
    with pytest.raises(ValueError, match=r"patch: only must be left out with masked_encoder, got 'encoder'"):
        patch(small(), only="encoder", masked_encoder=True)
    with pytest.raises(
        ValueError, match=r"patch: masked_encoder must find an encoder and a predictor it can replace, got encoder: lay"
    ):
        patch(small(attn_implementation="eager"), masked_encoder=True)
    model = small()
    model.predictor.forward = model.predictor.forward
    with pytest.raises(ValueError, match=r"masked_encoder must find .*, got predictor: has a forward of its own"):
        patch(model, masked_encoder=True)
    model = small()
    patch(model)
    with pytest.raises(ValueError, match="patch: model must not be patched already, got a patched encoder"):
        patch(model)
    with pytest.raises(ValueError, match="patch: model must hold weights to be verified, got the meta device"):
        patch(small().to("meta"))


def test_calls_that_a_patched_model_cannot_answer_say_why():
    model, pixels = small(), clips()
    context, target = masks()
    patch(model, masked_encoder=True)
    with pytest.raises(ValueError, match="target_mask must be given with context_mask, got None; or pass skip_pred"):
        model(pixels, context_mask=[context])
    with pytest.raises(ValueError, match="output_hidden_states must be left out with context_mask, got True"):
        model(pixels, context_mask=[context], skip_predictor=True, output_hidden_states=True)
    with pytest.raises(TypeError, match=r"context_mask must be a list of ids \[B, K\], got Tensor; pass \[ids\]"):
        model(pixels, context_mask=context, target_mask=[target])
    with pytest.raises(ValueError, match=r"context_mask must hold masks of one shape, got \[\(2, 11\), \(2, 9\)\]"):
        model(pixels, context_mask=[context, target], target_mask=[target, target])
    with pytest.raises(ValueError, match="context_mask and target_mask must hold as many masks, got 1 and 2"):
        model(pixels, context_mask=[context], target_mask=[target, target])
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="patched VJEPA2: attn_implementation must not be 'eager', got a wish for att"):
        model(pixels)
