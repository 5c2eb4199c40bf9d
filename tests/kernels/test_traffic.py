"""Bytes that Triton kernels touch, counted in the interpreter, over the least that have to move."""

import os

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels import Packing
from jepa_kernels.ops import OPS

pytestmark = pytest.mark.interp
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    from tests.interpreter import TRAFFIC

BANDWIDTH = 4.3e12  # bytes a second, read and written: what an H200 copies at
LAUNCH_S = 2e-6


def ema(shadow: bool):
    target, online = torch.zeros(100_000), torch.ones(100_000)
    copies = [torch.zeros(100_000, dtype=torch.bfloat16)] if shadow else None
    jk.ema_update([target], [online], 0.9, shadow=copies, backend="triton")
    return 100_000 * (14 if shadow else 12)


def loss(dtype: torch.dtype, channels: int):
    """Forward with the gradient: pred and chosen targets read, gradient written."""
    ids = torch.arange(6).expand(4, 6).reshape(-1)
    pred = torch.randn(24, channels, dtype=dtype, requires_grad=True)
    target = torch.randn(2, 9, channels, dtype=dtype)
    jk.latent_loss(pred, target, ids, packing=Packing.uniform(4, 6), backend="triton")
    return 3 * pred.numel() * pred.element_size()


# Name, a small call that returns its floor in bytes, launches, the floor of the published size in bytes, and the
# modelled time in microseconds that it must stay under on an H200.
CASES = [
    ("ema_update-vit_h14", lambda: ema(False), 1, 632e6 * 12, 1770),
    ("ema_update-vit_h14-shadow", lambda: ema(True), 1, 632e6 * 14, 2065),
    ("latent_loss-vit_h14-bf16", lambda: loss(torch.bfloat16, 1280), 2, 21504 * 1280 * 6, 45),
    ("latent_loss-vit_h14-fp32", lambda: loss(torch.float32, 1280), 2, 21504 * 1280 * 12, 85),
    ("latent_loss-vit_g-bf16", lambda: loss(torch.bfloat16, 1408), 2, 23328 * 1408 * 6, 53),
]


@pytest.mark.parametrize("name, call, launches, full, limit", CASES, ids=[c[0] for c in CASES])
def test_bytes_touched_stay_near_the_floor(name, call, launches, full, limit, record_property):
    TRAFFIC.clear()
    floor = call()
    ratio = TRAFFIC.total() / floor
    modelled = (full * ratio / BANDWIDTH + launches * LAUNCH_S) * 1e6
    record_property("bytes_over_floor", round(ratio, 4))
    record_property("modelled_us", round(modelled, 1))
    print(f"{name}: {ratio:.3f} of the floor's bytes, {modelled:.0f} us modelled")
    assert 1.0 <= ratio < 1.04 and modelled < limit


def test_every_op_with_a_triton_kernel_is_counted():
    from jepa_kernels._core.info import kernels

    counted = {name.split("-")[0] for name, *_ in CASES}
    assert counted == {op for op in OPS if any(k.backend == "triton" for k in kernels(op))}
