"""Fast, trustworthy kernels for Joint Embedding Predictive Architectures (JEPA)."""

import importlib
from typing import TYPE_CHECKING, Any

from jepa_kernels._core.info import available_backends
from jepa_kernels._core.select import BackendError, BackendWarning, explain, use_backend
from jepa_kernels.about import info
from jepa_kernels.memory import empty_cache
from jepa_kernels.ops.adamw_ema.op import adamw_ema
from jepa_kernels.ops.assemble_tokens.op import assemble_tokens
from jepa_kernels.ops.collapse_stats.op import CollapseStats, collapse_stats
from jepa_kernels.ops.distance_weights.op import distance_weights
from jepa_kernels.ops.ema_update.op import ema_update
from jepa_kernels.ops.ema_update.table import EmaTable
from jepa_kernels.ops.embed_patches.op import embed_patches
from jepa_kernels.ops.gather_tokens.op import gather_tokens
from jepa_kernels.ops.grad_norm.op import grad_norm
from jepa_kernels.ops.info_nce.op import info_nce
from jepa_kernels.ops.latent_loss.op import latent_loss
from jepa_kernels.ops.linear.op import linear
from jepa_kernels.ops.masked_attention.merge import merge_attention
from jepa_kernels.ops.masked_attention.op import masked_attention, masked_attention_lse, masked_attention_qkv
from jepa_kernels.ops.rope.op import rope, rope_qk
from jepa_kernels.ops.sigreg.op import sigreg
from jepa_kernels.optim import AdamWEMA
from jepa_kernels.packing import Packing, pack
from jepa_kernels.rotary import Rope, patch_positions

if TYPE_CHECKING:
    from jepa_kernels import integrations as integrations
    from jepa_kernels import masks as masks
    from jepa_kernels import models as models
    from jepa_kernels import nn as nn
    from jepa_kernels import planning as planning
    from jepa_kernels.profiling import profile
    from jepa_kernels.training.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "AdamWEMA",
    "BackendError",
    "BackendWarning",
    "CollapseStats",
    "EmaTable",
    "Packing",
    "Rope",
    "adamw_ema",
    "assemble_tokens",
    "available_backends",
    "collapse_stats",
    "distance_weights",
    "ema_update",
    "embed_patches",
    "empty_cache",
    "explain",
    "gather_tokens",
    "grad_norm",
    "info",
    "info_nce",
    "latent_loss",
    "linear",
    "masked_attention",
    "masked_attention_lse",
    "masked_attention_qkv",
    "merge_attention",
    "pack",
    "patch_positions",
    "profile",
    "rope",
    "rope_qk",
    "sigreg",
    "use_backend",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Load what is built on the ops on first use: the import of the ops stays quick."""
    if name in ("integrations", "masks", "models", "nn", "planning", "testing"):
        return importlib.import_module(f"jepa_kernels.{name}")
    if name in (homes := {"profile": "profiling", "warmup": "training.warmup"}):
        return getattr(importlib.import_module(f"jepa_kernels.{homes[name]}"), name)
    raise AttributeError(f"module 'jepa_kernels' has no attribute {name!r}")
