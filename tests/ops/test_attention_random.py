"""masked_attention on random calls: packings, head dims, masks, ropes and strides, against float64."""

from dataclasses import replace

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import jepa_kernels as jk  # noqa: E402
from jepa_kernels import Packing, Rope  # noqa: E402
from jepa_kernels.testing import hold, op_module  # noqa: E402

CAPS = op_module("masked_attention", "cases").CAPS


@st.composite
def calls(draw):
    """Keyword arguments of one packed call."""
    frame = draw(st.sampled_from([None, None, 1, 3, 16, 65]))
    sequences = draw(st.integers(1, 4))
    lengths = [draw(st.integers(0, 140)) for _ in range(sequences)]
    key_lengths = lengths if draw(st.booleans()) else [draw(st.integers(0, 140)) for _ in range(sequences)]
    if frame is not None:
        key_lengths = [n // frame * frame for n in key_lengths]
    packing, keys = Packing.from_lengths(lengths), Packing.from_lengths(key_lengths)
    width, group, heads = draw(st.integers(1, 16)) * 8, draw(st.integers(1, 3)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    axes = draw(st.sampled_from([0, 0, 1, 2, 3]))
    inputs = dict(
        q=tensor(draw, generator, packing.tokens, heads * group, width),
        k=tensor(draw, generator, keys.tokens, heads, width),
        v=tensor(draw, generator, keys.tokens, heads, width),
        packing=packing, k_packing=keys, frame_size=frame,
    )  # fmt: skip
    if draw(st.booleans()):
        most = torch.tensor([n for n, m in zip(key_lengths, lengths, strict=True) for _ in range(m)])
        ends = (torch.rand(2, packing.tokens, generator=generator) * (most + 1)).int().sort(0).values
        inputs["key_ranges"] = ends.T.contiguous()
    if axes:
        pairing = draw(st.sampled_from(["interleaved", "tiled"] + ["half"] * (axes == 1)))
        places = (torch.rand(n, axes, generator=generator) * 20 for n in (packing.tokens, keys.tokens))
        inputs["rope"] = Rope(*places, pairing=pairing)
    return inputs


def tensor(draw, generator, tokens, heads, width):
    """[tokens, heads, width] in one of four layouts."""
    layout = draw(st.sampled_from(["contiguous", "qkv", "heads first", "spread"]))
    if layout == "qkv":
        return torch.randn(tokens, 3, heads, width, generator=generator)[:, 1]
    if layout == "heads first":
        return torch.randn(heads, tokens, width, generator=generator).transpose(0, 1)
    if layout == "spread":
        return torch.randn(tokens, heads, width + 5, generator=generator)[..., 2 : 2 + width]
    return torch.randn(tokens, heads, width, generator=generator)


def results(inputs, dtype, backend):
    leaves = {}
    for name in "qkv":
        x = inputs[name]
        leaves[name] = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x.bfloat16()).requires_grad_()
    out = jk.masked_attention(**{**inputs, **leaves}, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), list(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(inputs=calls())
def test_random_calls_are_within_the_error_budget(inputs, dtype):
    exact, eager = (results(inputs, d, "reference") for d in (torch.float64, dtype))
    actual = results(inputs, dtype, "cpu")
    for name, *values in zip(("out", "dq", "dk", "dv"), actual, exact, eager, strict=True):
        parity = hold(name, *values, CAPS[dtype] * (1 if name == "out" else 4))
        # The largest of thousands of rounding errors against one other draw of them: half as much again for chance.
        assert replace(parity, max_budget=1.5 * parity.max_budget).ok, parity
