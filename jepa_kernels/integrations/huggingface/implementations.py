"""Attention implementations of transformers: those the kernels may stand for, and what verification runs instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kernels.integrations.layers import against_kernel
from jepa_kernels.integrations.patching import Run

IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "jepa_kernels")


def against_attention(module: Any, width: int, dropout: float) -> str | None:
    """Why attention of any of Hugging Face's models must keep its own forward."""
    found = module.config._attn_implementation
    if found not in IMPLEMENTATIONS:
        return f"attn_implementation is {found!r}: model.set_attn_implementation('sdpa') before the patch allows it"
    return against_kernel(width, dropout)


def run_in_any_type(model: nn.Module, *, run: Run) -> Mapping[str, Tensor]:
    """run(model), by "sdpa" where its weights are float32 or float64: other implementations lack these types."""
    if next(model.parameters()).dtype not in (torch.float32, torch.float64):
        return run(model)
    configs: list[Any] = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    own = [(config, config._attn_implementation) for config in configs]
    try:
        for config, implementation in own:
            if implementation in IMPLEMENTATIONS:
                config._attn_implementation = "sdpa"
        return run(model)
    finally:
        for config, implementation in own:
            config._attn_implementation = implementation
