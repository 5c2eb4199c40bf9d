"""Bytes and FLOPs of `ema_update`: 12 bytes a weight, 14 with a bf16 shadow."""

from typing import Any

from jepa_kernels.cost import Cost, elements, nbytes


def forward(target: Any, online: Any, shadow: Any, *options: Any) -> Cost:
    """Targets read and written, online weights read, shadows written; difference and multiply-add."""
    return Cost(2 * nbytes(target) + nbytes(online, shadow), 3 * elements(target))
