"""Optimizers."""

from jepa_kernels.optim.adamw_ema import AdamWEMA

__all__ = ["AdamWEMA"]
