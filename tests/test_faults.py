"""The suite itself is tested: faults that kernels are known to have are put into ours, and must be caught.

A fault wraps one stage of an op's cpu kernel. It counts as caught where the error budget, over the cases that the
conformance suite runs, is broken for some dtype, output or gradient.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_kernels._core import define
from jepa_kernels.ops import OPS
from jepa_kernels.testing import check_case, op_module

DTYPES = (torch.float32, torch.bfloat16)


def argument(position, change):
    """The kernel reads one argument wrongly."""

    def wrap(real):
        return lambda *args: real(*args[:position], change(args[position]), *args[position + 1 :])

    return wrap


def result(change):
    """The kernel writes its (first) result wrongly."""

    def wrap(real):
        def run(*args):
            out = real(*args)
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        return run

    return wrap


def output(position, change):
    """The kernel writes one of several results wrongly."""

    def wrap(real):
        def run(*args):
            out = list(real(*args))
            out[position] = change(out[position])
            return tuple(out)

        return run

    return wrap


def given(change):
    """Of an argument that may be None."""
    return lambda x: None if x is None else change(x).to(x.dtype).contiguous()


def in_place(position, change):
    """change(tensors now, tensors before) spoils what the kernel wrote to a list of tensors."""

    def wrap(real):
        def run(*args):
            before = [t.clone() for t in args[position]]
            real(*args)
            change(args[position], before)

        return run

    return wrap


def truncate(x):
    """fp32 to bf16 and back, dropping bits: what a cast without rounding does."""
    return (x.float().contiguous().view(torch.int32) & -65536).view(torch.float32)


def computed_wide_then_truncated(real):
    """In bf16 alone: in fp32, where bits are plenty, any budget shows it."""

    def run(*args):
        low = next(a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point())
        if low != torch.bfloat16:
            return real(*args)
        wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        out = real(*wide)
        first = truncate(out[0] if isinstance(out, tuple) else out).to(low)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    return run


def spoil(index, value):
    """Set part of a tensor."""

    def change(x):
        if x.numel():
            x[index] = value
        return x

    return change


def restore_tail(now, before):
    for x, old in zip(now, before, strict=True):
        x.view(-1)[-1:] = old.view(-1)[-1:]


def restore_last(now, before):
    now[-1].copy_(before[-1]) if now else None


def restore_all(now, before):
    for x, old in zip(now, before, strict=True):
        x.copy_(old)


def truncate_shadow(now, before):
    for x in now:
        x.copy_(x * (1 - torch.finfo(x.dtype).eps))


def without_first_row(x):
    return x * (torch.arange(len(x)) > 0).view(-1, *(1,) * (x.dim() - 1))


def without_last_channel(x):
    return x * (torch.arange(x.shape[-1]) < max(x.shape[-1] - 1, 1))


def without_last_pixel(weight):
    rows = weight.flatten(1)
    return torch.cat([rows[:, :-1], torch.zeros_like(rows[:, :1])], 1).view_as(weight)


def sines_of_partners(turns):
    return torch.stack([turns[..., 0, :], turns[..., 1, :].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)], -2)


def boundaries_late(cu_seqlens):
    if cu_seqlens is None:
        return None
    return torch.cat([cu_seqlens[:1], (cu_seqlens[1:-1] + 1).minimum(cu_seqlens[-1]), cu_seqlens[-1:]])


LAST_ROW, LAST_CHANNEL = (..., -1, slice(None)), (..., -1)


def another_seed(real):
    """Of a backward pass that draws directions anew."""
    return lambda *args: real(*args[:5], args[5] + 1, args[6], torch.empty(0))


FAULTS = {
    "adamw_ema": {
        "gradients truncated to bf16": ("forward", argument(1, lambda ts: [truncate(t) for t in ts])),
        "first step's correction at every step": ("forward", argument(4, lambda ts: [t.clamp(max=1.0) for t in ts])),
        "steps one behind": ("forward", argument(4, lambda ts: [(t - 1).clamp(min=1.0) for t in ts])),
        "weight decay missing": ("forward", argument(8, lambda s: s * torch.tensor([1.0, 0.0, 1.0]))),
        "rate rounded to bf16": ("forward", argument(8, lambda s: torch.cat([s[:1].bfloat16().double(), s[1:]]))),
        "momentum and its complement swapped": ("forward", argument(8, lambda s: torch.cat([s[:2], 1 - s[2:]]))),
        "gradients not unscaled": ("forward", argument(9, lambda scale: None)),
        "infinite gradients not skipped": ("forward", argument(10, lambda found: None)),
        "betas swapped": ("forward", lambda real: lambda *a: real(*a[:11], a[12], a[11], *a[13:])),
        "eps a hundred times larger": ("forward", argument(13, lambda eps: 100 * eps)),
        "minimised": ("forward", argument(14, lambda maximize: False)),
        "tail element of every parameter left alone": ("forward", in_place(0, restore_tail)),
        "second moments left alone": ("forward", in_place(3, restore_all)),
        "last target left alone": ("forward", in_place(5, restore_last)),
        "online shadow truncated": ("forward", in_place(6, truncate_shadow)),
        "target shadow is the old target": ("forward", in_place(7, lambda now, old: [n.zero_() for n in now])),
    },
    "assemble_tokens": {
        "neighbour's context": ("forward", argument(0, lambda context: context.roll(1, 0))),
        "mask tokens swapped": ("forward", argument(1, lambda token: token.flip(0))),
        "mask token truncated to bf16": ("forward", argument(1, truncate)),
        "positions by place, not by id": ("forward", argument(4, given(lambda pos: pos.roll(1, 0)))),
        "target id off by one": ("forward", argument(3, given(lambda ids: (ids - 1).clamp(min=0)))),
        "targets one token late": ("forward", argument(6, given(boundaries_late))),
        "sequences one token late": ("forward", argument(7, given(boundaries_late))),
        "last row left out": ("forward", result(spoil(LAST_ROW, 0))),
        "output truncated": ("forward", computed_wide_then_truncated),
        "gradient of the first row missing": ("backward", argument(0, without_first_row)),
        "context's gradient of one mask": ("backward", output(0, lambda g: g / 2)),
        "mask token's gradient in bf16": ("backward", output(1, truncate)),
    },
    "collapse_stats": {
        "last row left out": ("forward", argument(0, lambda z: z[:-1])),
        "last feature left out": ("forward", argument(0, lambda z: z[:, :-1])),
        "embeddings truncated to bf16": ("forward", argument(0, truncate)),
        "Bessel's correction": ("forward", result(lambda x: x * torch.tensor([30 / 29, 30 / 29, 1, 1]).sqrt())),
        "numbers in bf16": ("forward", result(truncate)),
    },
    "distance_weights": {
        "targets of the neighbour": ("forward", argument(3, given(boundaries_late))),
        "contexts one token late": ("forward", argument(2, given(boundaries_late))),
        "rows and columns swapped": ("forward", argument(0, lambda ids: ids // 8 * 8 + 7 - ids % 8)),
        "frames not seen": ("forward", argument(4, lambda frames: 1)),
        "grid one column wider": ("forward", argument(6, lambda width: width + 1)),
        "last target left out": ("forward", argument(1, given(lambda ids: spoil(LAST_CHANNEL, -1)(ids.clone())))),
        "scale ignored": ("forward", argument(7, lambda scale: 1.0)),
        "weights truncated": ("forward", result(truncate)),
        "last row left out": ("forward", result(spoil(LAST_CHANNEL, 0))),
    },
    "ema_update": {
        "momentum and its complement swapped": ("forward", argument(3, lambda m: 1 - m)),
        "momentum rounded to bf16": ("forward", argument(3, lambda m: m.bfloat16().to(m.dtype))),
        "online truncated to bf16": ("forward", argument(1, lambda ts: [truncate(t) for t in ts])),
        "tail element of every tensor left alone": ("forward", in_place(0, restore_tail)),
        "last tensor left alone": ("forward", in_place(0, restore_last)),
        "shadow truncated": ("forward", in_place(2, truncate_shadow)),
        "shadow is the old target": ("forward", in_place(2, lambda now, old: [n.zero_() for n in now])),
    },
    "gather_tokens": {
        "id off by one": ("forward", argument(1, lambda ids: (ids - 1).clamp(min=0))),
        "neighbour's image": ("forward", argument(0, lambda x: x.roll(1, 0))),
        "last channel stale": ("forward", result(spoil(LAST_CHANNEL, float("nan")))),
        "last row left out": ("forward", result(spoil(LAST_ROW, 0))),
        "masks overwrite instead of adding": ("backward", argument(0, without_first_row)),
        "sums in bf16": ("backward", result(lambda g: g.bfloat16().to(g.dtype))),
        "gradient truncated": ("backward", computed_wide_then_truncated),
        "unchosen tokens not cleared": ("backward", result(lambda g: torch.where(g == 0, torch.nan, g))),
    },
    "grad_norm": {
        "last tensor left out": ("forward", argument(0, lambda grads: grads[:-1] or grads)),
        "last element left out": ("forward", argument(0, lambda grads: [g.flatten()[:-1] for g in grads])),
        "gradients truncated to bf16": ("forward", argument(0, lambda grads: [truncate(g) for g in grads])),
        "squares in bf16": ("forward", result(lambda norm: norm.square().bfloat16().float().sqrt())),
        "not rooted": ("forward", result(torch.square)),
        "mean of squares": ("forward", result(lambda norm: norm / 2)),
        "infinities dropped": ("forward", argument(0, lambda grads: [g.nan_to_num(0, 0, 0) for g in grads])),
    },
    "info_nce": {
        "pairs shifted by one": ("forward", argument(5, lambda shift: shift + 1)),
        "temperature of another": ("forward", argument(2, lambda temperature: temperature * 1.001)),
        "x rounded to bf16": ("forward", argument(0, lambda x: x.bfloat16().to(x.dtype))),
        "last channel left out": ("forward", argument(1, without_last_channel)),
        "duplicates count": ("forward", argument(3, lambda items: None)),
        "not normalised": ("forward", argument(7, lambda normalize: False)),
        "columns' sums stale": ("forward", output(1, spoil((-1,), 0))),
        "gradient of columns' sums alone": ("backward", argument(6, lambda lse: lse + 30)),
        "smoothing not spread": ("backward", argument(8, given(torch.zeros_like))),
        "pairs count in full under smoothing": ("backward", argument(11, lambda kept: 1.0)),
        "gradient along the embedding": ("backward", argument(12, lambda normalize: False)),
        "gradient truncated": ("backward", output(0, lambda g: g * (1 - torch.finfo(g.dtype).eps))),
        "dy of the last row missing": ("backward", output(1, spoil((-1,), 0))),
    },
    "latent_loss": {
        "beta ignored": ("forward", argument(5, lambda beta: 1.0)),
        "targets not normalised": ("forward", argument(6, lambda normalize: False)),
        "eps a hundred times larger": ("forward", argument(7, lambda eps: 100 * eps)),
        "mean over tokens, not over masks": ("forward", argument(8, lambda reduction: "token")),
        "power ignored": ("forward", argument(9, lambda power: 1.0)),
        "levels ignored": ("forward", argument(10, lambda levels: 1)),
        "gains missing": ("forward", argument(11, given(torch.ones_like))),
        "biases missing": ("forward", argument(12, given(torch.zeros_like))),
        "gains of the neighbour": ("forward", argument(11, given(lambda gain: gain.roll(1, 0)))),
        "the norm's eps a hundred times larger": ("forward", argument(13, lambda eps: 100 * eps)),
        "weights missing": ("forward", argument(14, lambda weight: None)),
        "weights of the neighbour": ("forward", argument(14, given(lambda weight: weight.nan_to_num(1).roll(1, -1)))),
        "neighbour's image": ("forward", argument(1, lambda target: target.roll(1, 0))),
        "last channel of the target left out": ("forward", argument(1, without_last_channel)),
        "prediction truncated to bf16": ("forward", argument(0, truncate)),
        "gradient of the last row missing": ("forward", output(1, spoil(LAST_ROW, 0))),
        "gradient truncated": ("forward", output(1, lambda u: u * (1 - torch.finfo(u.dtype).eps))),
        "gradient not scaled": ("backward", argument(0, lambda grad: torch.ones_like(grad))),
    },
    "masked_attention": {
        "scale missing": ("forward", argument(14, lambda scale: 1.0)),
        "scale of another head dim": ("forward", argument(14, lambda scale: scale * 0.98)),
        "frames not seen": ("forward", argument(9, lambda frame_size: 0)),
        "frames one token short": ("forward", argument(9, lambda frame_size: max(frame_size - 1, 0))),
        "ranges end one key late": ("forward", argument(10, given(lambda x: x + torch.tensor([0, 1])))),
        "ranges of the neighbour": ("forward", argument(10, given(lambda x: x.roll(1, -2)))),
        "sines of the wrong sign": ("forward", argument(11, given(lambda x: x * torch.tensor([[1.0], [-1.0]])))),
        "keys turn as queries do": ("forward", argument(12, given(lambda x: x.roll(1, -3)))),
        "pairing swapped": ("forward", argument(13, lambda half: not half)),
        "gradient turned the wrong way": ("backward", argument(14, given(lambda x: x * torch.tensor([[1.0], [-1.0]])))),
        "gradient of hidden keys": ("backward", argument(12, lambda frame_size: 0)),
        "last value read as 0": ("forward", argument(2, without_last_channel)),
        "last row left out": ("forward", result(spoil((-1,), 0))),
        "heads in reverse": ("forward", argument(1, lambda k: k.flip(1))),
        "boundary one token late": ("forward", argument(3, boundaries_late)),
        "q truncated to bf16": ("forward", argument(0, truncate)),
        "output truncated": ("forward", computed_wide_then_truncated),
        "softmax not normalised": ("forward", result(lambda out: out * 1.01)),
        "dq not scaled": ("backward", output(0, lambda g: g * 1.5)),
        "dk of the last key missing": ("backward", output(1, spoil((-1,), 0))),
        "dv stale where there are few keys": ("backward", output(2, spoil((0, ..., 0), 0))),
    },
    "rope": {
        "sines of the wrong sign": ("forward", argument(2, given(lambda x: x * torch.tensor([[1.0], [-1.0]])))),
        "neighbour's turns": ("forward", argument(2, given(lambda x: x.roll(1, -3)))),
        "turns in bf16": ("forward", argument(2, truncate)),
        "pairing swapped": ("forward", argument(4, lambda half: not half)),
        "last channel stale": ("forward", result(spoil(LAST_CHANNEL, float("nan")))),
        "last head left out": ("forward", result(spoil(LAST_ROW, 0))),
        "output truncated": ("forward", computed_wide_then_truncated),
        "gradient turned the wrong way": ("backward", argument(2, given(lambda x: x * torch.tensor([[1.0], [-1.0]])))),
        "gradient by the sines of the wrong channel": ("backward", argument(2, given(sines_of_partners))),
        "gradient truncated": ("backward", computed_wide_then_truncated),
    },
    "sigreg": {
        "directions of another step": ("moments", argument(4, lambda step: step + 1)),
        "directions of another seed": ("backward", another_seed),
        "what was kept in bf16": ("backward", argument(7, truncate)),
        "embeddings truncated to bf16": ("moments", argument(0, truncate)),
        "last row left out": ("moments", argument(0, lambda z: z[:, :-1])),
        "a collapsed row too many": ("moments", argument(0, lambda z: torch.cat([z, z[:, :1] * 0], 1))),
        "sines of the wrong sign": ("backward", argument(2, lambda m: m * torch.tensor([1.0, -1.0])[:, None, None])),
        "moments in bf16": ("forward", argument(1, truncate)),
        "last knot left out": ("forward", argument(1, lambda m: spoil((..., -1, slice(None)), 0)(m.clone()))),
        "knots further apart": ("forward", argument(2, lambda t_max: t_max * 1.001)),
        "gradient not scaled": ("backward", argument(0, torch.ones_like)),
        "gradient of the last row missing": ("backward", result(spoil(LAST_ROW, 0))),
        "gradient truncated": ("backward", result(lambda g: truncate(g).to(g.dtype))),
    },
    "linear": {
        "last channel left out": ("forward", argument(0, without_last_channel)),
        "bias missing": ("forward", argument(2, lambda bias: None)),
        "weights of the neighbour": ("forward", argument(1, lambda weight: weight.roll(1, 0))),
        "rows truncated to bf16": ("forward", argument(0, truncate)),
        "last row left out": ("forward", output(0, lambda y: spoil(LAST_ROW, 0)(y) if y.dim() > 1 else y)),
        "what GELU is of truncated": ("forward", output(1, lambda z: truncate(z).to(z.dtype))),
        "gradient of weights misses the last row": (
            "backward",
            argument(0, lambda g: spoil(LAST_ROW, 0)(g.clone()) if g.dim() > 1 else g),
        ),
        "gradient of rows truncated": ("backward", output(0, lambda g: truncate(g).to(g.dtype))),
        "bias gradient in bf16": ("backward", output(2, lambda g: truncate(g).to(g.dtype))),
        "gradient of weights transposed": (
            "backward",
            output(1, lambda g: g.t().reshape(g.shape)),
        ),
    },
    "embed_patches": {
        "rows and columns of a patch swapped": ("forward", argument(2, lambda w: w.transpose(2, 3).contiguous())),
        "last pixel of a patch left out": ("forward", argument(2, without_last_pixel)),
        "bias missing": ("forward", argument(3, lambda bias: None)),
        "positions by place, not by id": ("forward", argument(4, lambda pos: None if pos is None else pos.roll(1, 0))),
        "neighbour's image": ("forward", argument(0, lambda pixels: pixels.roll(1, 0))),
        "output truncated": ("forward", computed_wide_then_truncated),
        "weight gradient misses the last row": ("backward", argument(0, spoil(LAST_ROW, 0))),
        "shift missing": ("forward", argument(7, lambda shift: [0.0] * len(shift))),
        "channels share a scale": ("forward", argument(6, lambda scale: scale[:1] * len(scale))),
        "frames of a tubelet swapped": ("forward", argument(2, lambda w: w.flip(-3) if w.dim() == 5 else w)),
        "weight gradient of pixels as they are": ("backward", argument(6, lambda shift: [0.0] * len(shift))),
        "bias gradient in bf16": ("backward", output(2, lambda g: truncate(g).to(g.dtype))),
    },
}


class Dispatched(TorchDispatchMode):
    """Every op goes through torch's dispatcher, which hands the stage all of its arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op, fault", [(op, fault) for op in FAULTS for fault in FAULTS[op]])
def test_a_seeded_fault_is_caught(op, fault, monkeypatch):
    stage, wrap = FAULTS[op][fault]
    real = define.implementation(op, stage, "cpu")
    monkeypatch.setitem(define._implementations, (op, stage, "cpu"), wrap(real))
    cases = op_module(op, "cases").CASES
    with Dispatched():
        assert any(not p.ok for dtype in DTYPES for c in cases for p in check_case(op, "cpu", c, dtype))


def test_every_op_has_faults_and_there_are_forty():
    assert set(FAULTS) == set(OPS) and sum(map(len, FAULTS.values())) >= 40
