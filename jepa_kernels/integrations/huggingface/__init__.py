"""Hugging Face's models: `patch` one instance, or `register_attention` for all that ask for it by name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.integrations import patching
from jepa_kernels.integrations.huggingface import ijepa, vjepa2_plan
from jepa_kernels.integrations.huggingface.implementations import run_in_any_type
from jepa_kernels.integrations.patching import Patch, kind_of
from jepa_kernels.packing import Packing

# Class name -> what plans its patch: (model, masked_encoder, angle_dtype) -> replacements, skipped, verification.
PLANS = {
    "VJEPA2Model": vjepa2_plan.plan,
    "VJEPA2ForVideoClassification": vjepa2_plan.plan,
    "IJepaModel": ijepa.plan,
    "IJepaForImageClassification": ijepa.plan,
}


def patch(
    model: nn.Module,
    *,
    only: str | Sequence[str] | None = None,
    verify: bool = True,
    masked_encoder: bool = False,
    angle_dtype: torch.dtype | None = None,
) -> Patch:
    """Put the kernels into one model of transformers; `.undo()` of what is returned takes them out, to the last bit.

    VJEPA2Model, VJEPA2ForVideoClassification: positions are turned into one table of cosines for all layers, and
    queries and keys turn inside attention; patches are embedded by one product; the predictor neither sorts tokens nor
    waits for the device, so that torch.compile(fullgraph=True) works, and takes several masks (lists of ids [B, K],
    all of one K), with which the model alone fails: rows are mask-major then; its last layer computes the rows of the
    target alone, which hooks in it see. IJepaModel, IJepaForImageClassification: attention, and patches as above; calls
    with attention_mask run transformers' attention. Blocks and poolers of both, where fp32 on the CPU, multiply by
    `linear` where that leads. All else stays the model's own: norms, activations, drop path, gradient checkpointing,
    hidden states, adapters in its linear layers. Attention weights are not formed.

    only: names of modules to patch, with what they contain: "encoder", ["predictor", "encoder.layer.0"]. None: all.
    verify: compare a small forward before and after (see `patching.apply`); costs a float64 copy of the weights for
        the moment.
    masked_encoder: `context_mask` drops tokens before the encoder, as in pretraining: ids [B, K], increasing in each
        row. Patches outside are neither embedded nor encoded, and kept ones do not see them, so that results differ
        from the unpatched model's, whose encoder sees the whole clip and then selects. `last_hidden_state` and
        `masked_hidden_state` hold the context's tokens [masks * B, K, E] alone, and `target_hidden_state` is None.
    angle_dtype: the type in which rotary angles are kept. None: as the model does, in its own type, which for bf16
        means errors of up to pos / 256 radians; torch.float32: exact angles, better and no longer the model's numbers.
    Raises ValueError or TypeError for a model that is not one of these, is patched already or of another version of
    transformers; RuntimeError where the patched model differs. The model stays as it was then.
    """
    kind = kind_of(model, PLANS)
    if kind is None:
        fail(
            "patch", "model", f"be one of {', '.join(PLANS)}", type(model).__name__, "pass the model itself", TypeError
        )
    if masked_encoder and only is not None:
        fail("patch", "only", "be left out with masked_encoder", repr(only), "it needs the whole encoder")
    replacements, skipped, run = PLANS[kind](model, masked_encoder=masked_encoder, angle_dtype=angle_dtype)
    source = f"transformers {transformers().__version__}"
    verified = partial(run_in_any_type, run=run) if verify else None
    return patching.apply(model, replacements, skipped, source=source, only=only, run=verified)


def register_attention(name: str = "jepa_kernels") -> None:
    """Make `masked_attention` an attention implementation of transformers, for models that take one by name.

    Afterwards: AutoModel.from_pretrained(..., attn_implementation="jepa_kernels"), or on a live model
    model.set_attn_implementation("jepa_kernels"). Calls with a mask (padded batches) go to transformers' own "sdpa";
    attention dropout and causal attention are refused. Models that hand keywords on to attention, as BERT does, take
    packed sequences: model(input_ids=[1, T], position_ids=..., packing=...); see `TextEncoder`. VJEPA2's positions stay
    apart from attention here: `patch` fuses them.
    """
    utils, masking = (transformers(f".{part}") for part in ("modeling_utils", "masking_utils"))
    utils.AttentionInterface.register(name, _attention)
    masking.AttentionMaskInterface.register(name, masking.sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, H, N, D], key and value [B, Hk, M, D] -> ([B, N, H, D], None), as transformers calls it.

    packing: of the sequences that follow one another in the only row of a batch.
    """
    name = f"{type(module).__name__} with attn_implementation='jepa_kernels'"
    if dropout:
        fail(name, "dropout", "be 0", dropout, "set the config's attention dropout to 0, or take 'sdpa'")
    if is_causal if is_causal is not None else getattr(module, "is_causal", True):
        fail(name, "is_causal", "be False", True, "take 'sdpa'")
    for option in ("softcap", "sliding_window", "s_aux", "position_bias", "cache"):
        if options.get(option) is not None:
            fail(name, option, "be left out", options[option], "take 'eager'")
    if packing is not None and (attention_mask is not None or len(query) != 1):
        actual = f"{len(query)} rows" if attention_mask is None else "an attention_mask too"
        fail(name, "packing", "come with one row and no mask", actual, "pack all tokens of the batch in one row")
    if attention_mask is not None:
        own = transformers(".integrations.sdpa_attention").sdpa_attention_forward
        return own(module, query, key, value, attention_mask, scaling=scaling, is_causal=False, **options)
    if packing is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return jk.masked_attention(q, k, v, packing, scale=scaling)[None], None
    return jk.masked_attention(query, key, value, scale=scaling).transpose(1, 2), None


def transformers(part: str = "") -> ModuleType:
    """The package, or a module in it; importing ours alone needs neither."""
    try:
        return importlib.import_module(f"transformers{part}")
    except ImportError as error:
        raise ImportError("jepa_kernels.integrations.huggingface: pip install 'transformers>=5.4,<6'") from error
