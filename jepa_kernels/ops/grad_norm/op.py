"""Public face of `grad_norm`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels._core.define import define, implementation
from jepa_kernels._core.select import FLOATS, Kernel, select, short
from jepa_kernels.chunks import read
from jepa_kernels.lists import Passed, check_strided, observed, tensors
from jepa_kernels.ops.grad_norm import reference

OP = "grad_norm"

# On an H200 CUDA's was the faster one: docs/tuning/memory_bound.md.
KERNELS = (Kernel("cuda"), Kernel("triton"), Kernel("cpu"))

_passed = Passed()


def grad_norm(grads: Sequence[Tensor | None], *, backend: str | None = None) -> Tensor:
    """Return the norm of all gradients together, in one pass over memory, without waiting for the device.

    norm = sqrt(sum over all tensors of sum(g ** 2))

    grads: fp32, bf16 or fp16 tensors of any shapes, in any mixture, without gaps in memory. A None is left out, a
        DTensor counts as its local shard. An empty list has norm 0.
    Returns fp32 [], on the gradients' device. Squares are added in an order that depends on the sizes alone, in fp64
    from a few thousand on: 1e9 elements are exact to fp32's rounding, whatever the number of threads. A NaN or an
    infinity in any gradient gives one in the norm, so that `norm.isfinite()` is the check of a loss scaler.

    No gradient. Raises TypeError and ValueError for what is no such list of tensors.
    """
    kept, known = _checked(grads)
    if not kept:
        return torch.zeros(())
    wide = known is None and any(g.dtype == torch.float64 for g in kept)  # one is enough: no kernel takes it
    chosen = select(OP, KERNELS, backend, kept[0], dtype=torch.float64 if wide else None)
    if chosen == "reference":
        return reference.forward(kept)
    if known is not None and not observed():
        return implementation(OP, "forward", chosen)(kept, known)
    with torch.no_grad():
        return _forward(kept, chosen)


def _checked(grads: Sequence[Tensor | None]) -> tuple[list[Tensor], Any]:
    """The gradients that there are, and what was read of them; plain ones that lie as they lay pass at once."""
    usual = type(grads) is list and not torch.compiler.is_compiling()
    known = read([grads], plain=True) if usual else None  # type: ignore[list-item]
    if known in _passed:
        return grads, known  # type: ignore[return-value]
    named = [(f"grads[{i}]", g) for i, g in enumerate(tensors(OP, "grads", grads)) if g is not None]
    for name, g in named:
        _check(name, g, named[0][1].device)
    kept = [g for _, g in named]
    if any(g.dtype == torch.float64 for g in kept):
        return kept, None
    _passed.add(known)
    return kept, known


def _check(name: str, g: Tensor, device: torch.device) -> None:
    if g.dtype not in FLOATS and g.dtype != torch.float64:
        wanted = "be float32, bfloat16 or float16"
        fail(OP, name, wanted, short(g.dtype), "convert it with .to(dtype)", TypeError)
    check_strided(OP, name, g)
    if g.device != device:
        fail(OP, name, f"be on {device}", g.device, "take the norm of each device's gradients by itself")


def _fake(grads: Any, backend: str) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float32)


_forward = define(OP, "forward", "(Tensor[] grads, str backend) -> Tensor", _fake)
