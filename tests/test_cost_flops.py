"""FLOPs that ops state of their calls, against those of the plain equation, which does each once.

Products of matrices by torch's own counter, sums and products of single numbers by calls of torch's.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import jepa_kernels as jk
from jepa_kernels.profiling import products as torchs
from jepa_kernels.profiling.events import Event
from jepa_kernels.testing import op_module
from tests.test_cost import counted, every, leaf

SUMS = ("add", "sub", "mul", "div", "sqrt", "pow", "rsub")  # one operation for each number of the result


def products(call):
    """[forward, backward]: FLOPs that torch counts of what a call computes."""
    with FlopCounterMode(display=False) as forward:
        out = call()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return [forward.get_total_flops(), backward.get_total_flops()]


def plain_attention(q, k, v, lengths):
    """Each sequence by itself; a key head serves several of the queries'."""
    outs = []
    for own in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        q, k, v = (x.transpose(0, 1) for x in own)
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        outs.append((q @ k.mT).softmax(-1) @ v)
    return torch.cat([out.flatten() for out in outs])


def plain_patches(pixels, ids, weight, bias):
    patches = F.unfold(pixels, weight.shape[-1], stride=weight.shape[-1]).mT
    image = torch.arange(len(ids)) % len(pixels)
    return F.linear(patches[image[:, None], ids], weight.flatten(1), bias)


def both(ours, plain, *args):
    """([forward, backward] as stated, as counted)."""
    found = counted(lambda: ours(*args))
    stated = [sum(c.flops for stage, c in found.items() if stage != "backward"), found["backward"].flops]
    return stated, products(lambda: plain(*args))


def test_products_of_attention():
    q, k, v = leaf(10, 4, 16), leaf(10, 2, 16), leaf(10, 2, 16)
    packing = jk.Packing.from_lengths([3, 7])
    ours, plain = lambda *x: jk.masked_attention(*x, packing), lambda *x: plain_attention(*x, [3, 7])
    stated, seen = both(ours, plain, q, k, v)
    assert stated == seen and seen[1] == 2 * seen[0]


def test_torchs_own_attention_counts_alike():
    """What its backward computes again, which its counter counts, is left out as in ours."""
    q = [2, 4, 10, 16]
    flops = []
    for name, shapes in (("", [q] * 3), ("_backward", [q] * 6)):
        name = f"aten::_scaled_dot_product_flash_attention{name}"
        flops.append(torchs.cost(Event(name, 1, 0, 1, shapes=shapes, dtypes=["float"] * 3)).flops)
    assert flops == both(jk.masked_attention, jk.masked_attention, *(leaf(*q) for _ in range(3)))[0]


@pytest.mark.parametrize("wanted", [False, True])
def test_products_of_patches(wanted):
    """Of all rows, those of a patch that several masks name too; for the pixels' gradient one more."""
    pixels, weight, bias = leaf(2, 3, 16, 16), leaf(8, 3, 4, 4), leaf(8)
    pixels.requires_grad_(wanted)
    ids = every(4, 0, 0, 2, 1)
    stated, seen = both(jk.embed_patches, plain_patches, pixels, ids, weight, bias)
    assert stated == seen and seen[1] == (1 + wanted) * seen[0] > 0


@pytest.mark.parametrize("wanted", [False, True])
def test_products_of_linear_layers(wanted):
    """Backward two products, or one where the rows need no gradient."""
    x, weight, bias = leaf(3, 10, 16).requires_grad_(wanted), leaf(24, 16), leaf(24)
    ours = lambda *x: jk.linear(*x, backend="cpu")  # noqa: E731
    stated, seen = both(ours, F.linear, x, weight, bias)
    assert stated == seen == products(lambda: ours(x, weight, bias)) and seen[1] == (1 + wanted) * seen[0] > 0


def test_products_of_pairs():
    plain = op_module("info_nce", "reference").forward
    stated, seen = both(jk.info_nce, plain, leaf(24, 16), leaf(24, 16), 0.1)
    assert stated == seen and seen[1] == 2 * seen[0] > 0


def test_products_of_slices():
    """Beside the projections a sum for each knot and slice."""
    plain = op_module("sigreg", "reference").forward
    sizes = dict(slices=40, knots=5)
    stated, seen = both(lambda z: jk.sigreg(z, **sizes), lambda z: plain(z, **sizes), leaf(3, 100, 64))
    assert stated == pytest.approx(seen, rel=0.05)


class Sums(TorchDispatchMode):
    """Sums and products of single numbers that torch's operations do."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        self.count += out.numel() if name in SUMS else args[0].numel() if name == "sum" else 0
        return out


def sums(equation):
    with Sums() as mode:
        equation()
    return mode.count


def test_sums_of_updates():
    p, g, m, v, target = torch.rand(5, 50, 70)

    def equation():
        first, second = m * 0.9 + g * 0.1, v * 0.999 + g * g * 0.001
        p * 0.99 - first * 0.1 / ((second * 1.1).sqrt() + 1e-8)

    stated = {targets: counted(lambda t=targets: adamw(p, g, t))["forward"].flops for targets in (False, True)}
    moved = sums(lambda: target + (p - target) * 0.1)
    assert stated[True] - stated[False] == moved == counted(lambda: jk.ema_update([p], [g], 0.9))["forward"].flops
    assert stated[False] == pytest.approx(sums(equation), rel=0.05)


def adamw(p, g, targets):
    state = [torch.zeros_like(p)], [torch.zeros_like(p)], [torch.zeros(())]
    jk.adamw_ema([p], [g], *state, [p.clone()] if targets else None, lr=0.1, **({"momentum": 0.9} if targets else {}))


def test_sums_of_norms_turns_and_rows():
    x, cos, sin = leaf(64, 4, 16), torch.rand(64, 1, 16), torch.rand(64, 1, 16)
    found = counted(lambda: jk.rope(x, torch.rand(64, 2)))
    assert found["forward"].flops == found["backward"].flops == sums(lambda: x * cos + x.roll(1, -1) * sin)
    assert counted(lambda: jk.grad_norm([x.detach()]))["forward"].flops == sums(lambda: (x * x).sum())
    ids = every(9, 0, 3)
    tokens = leaf(2, 12, 16)
    assert counted(lambda: jk.gather_tokens(tokens, ids))["backward"].flops == ids.numel() * 16  # added to a row each


@pytest.mark.parametrize(
    "options, pairs",
    [
        ({}, 36),
        ({"frame_size": 2}, 4 + 8 + 12),
        ({"key_ranges": torch.tensor([[0, 6], [1, 4], [2, 2], [0, 1], [5, 6], [0, 3]], dtype=torch.int32)}, 14),
        ({"frame_size": 2, "key_ranges": torch.tensor([[0, 6]] * 6, dtype=torch.int32)}, 24),
        ({"frame_size": 3, "key_ranges": torch.tensor([[2, 5]] * 6, dtype=torch.int32)}, 3 * 1 + 3 * 3),
    ],
)
def test_attention_counts_the_pairs_that_are_seen(options, pairs):
    q, k, v = torch.randn(3, 2, 3, 6, 8)  # two sequences, three heads
    found, all_ = (counted(lambda o=o: jk.masked_attention(q, k, v, **o, backend="cpu")) for o in (options, {}))
    assert found["forward"].flops == all_["forward"].flops * pairs / 36
