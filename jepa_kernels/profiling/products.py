"""FLOPs and bytes of torch's own products, by the shapes that its profiler saw and the formulas of its flop counter."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from math import prod
from typing import Any

from jepa_kernels.cost import Cost
from jepa_kernels.profiling.events import ATTENTION, Event, is_product

SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2}
NAMES = {"float": "float32", "double": "float64", "c10::BFloat16": "bfloat16", "c10::Half": "float16"}
Shape = tuple[int, ...]


def dtype(event: Event) -> str:
    """Of its first tensor, as torch calls it."""
    return next((NAMES[d] for d in event.dtypes if d in NAMES), "float32")


def cost(event: Event) -> Cost | None:
    """None for what is no product, or one without shapes. Every operand read once, the result written once."""
    if not is_product(event):
        return None
    shapes = [tuple(s) for s in event.shapes]
    size = next((SIZES[d] for d in event.dtypes if d in SIZES), 4)
    name = event.name.removeprefix("aten::")
    try:
        if event.name.startswith(ATTENTION):
            flops, written = _attention(name, shapes)
        elif name.startswith("convolution"):
            flops, written = _convolution(name, shapes, event.values)
        else:
            flops, written = _product(name, shapes)
    except (IndexError, ValueError, TypeError):  # a form that shapes alone do not tell
        return None
    return Cost(size * (sum(prod(s) for s in shapes if s) + written), flops)


def _product(name: str, shapes: list[Shape]) -> tuple[int, int]:
    """(FLOPs, numbers written)."""
    from torch.utils import flop_counter

    first = "add" in name  # what the product is added to comes first; what compiled code fills with it, last
    a, b = shapes[first : first + 2]
    if len(a) != (3 if "bmm" in name else 2) or a[-1] != b[-2]:
        raise ValueError(name)
    flops = flop_counter.bmm_flop(a, b) if "bmm" in name else flop_counter.mm_flop(a, b)
    result = (*a[:-1], b[-1])
    return flops, 0 if result in shapes[first + 2 :] else prod(result)


def _convolution(name: str, shapes: list[Shape], values: Sequence[Any]) -> tuple[int, int]:
    from torch.utils import flop_counter

    numbers = [ast.literal_eval(v) if isinstance(v, str) and v else v for v in values]
    if name == "convolution_backward":
        grad, x, w = shapes[:3]
        transposed, mask = bool(numbers[7]), numbers[10]
        given: list[Shape] = [x, w, (grad[1],)]
        formula: Any = flop_counter.conv_backward_flop
        flops = formula(grad, x, w, None, *numbers[4:7], transposed, *numbers[8:10], mask, given)
        return flops, sum(prod(s) for s, wanted in zip(given, mask, strict=True) if wanted)
    x, w = shapes[:2]
    stride, padding, dilation, transposed = numbers[3:7]
    if transposed:
        raise ValueError(name)
    spans = zip(x[2:], w[2:], _each(stride, x), _each(padding, x), _each(dilation, x), strict=True)
    sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans]
    out = (x[0], w[0], *sides)
    return flop_counter.conv_flop_count(list(x), list(w), list(out), transposed=False), prod(out)


def _each(values: Sequence[int], x: Shape) -> Sequence[int]:
    """One for each side of an image."""
    return values if len(values) == len(x) - 2 else list(values) * (len(x) - 2)


def _attention(name: str, shapes: list[Shape]) -> tuple[int, int]:
    from torch.utils import flop_counter

    if "backward" in name:
        q, k, v = shapes[1:4]
        return 2 * flop_counter.sdpa_flop_count(q, k, v), prod(q) + prod(k) + prod(v)  # scores again: no work of it
    q, k, v = shapes[:3]
    return flop_counter.sdpa_flop_count(q, k, v), prod(q[:-1]) * v[-1]
