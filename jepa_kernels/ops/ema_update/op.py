"""Public face of `ema_update`."""

from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.define import define, implementation
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.lists import observed
from jepa_kernels.ops.ema_update import reference
from jepa_kernels.ops.ema_update.check import OP, Checked, Shadow, Source, check, check_options

# On an H200 Triton's was the faster one: docs/tuning/memory_bound.md.
KERNELS = (
    Kernel("triton", dtypes=(torch.float32,)),
    Kernel("cuda", dtypes=(torch.float32,)),
    Kernel("cpu", dtypes=(torch.float32,)),
)


def ema_update(
    target: Source,
    online: Source,
    momentum: float | Tensor,
    *,
    shadow: Shadow = None,
    form: str = "lerp",
    backend: str | None = None,
) -> None:
    """Move the target weights towards the online weights, in place, in one pass over memory.

    target <- momentum * target + (1 - momentum) * online

    target: fp32 tensors of any shapes, or a module (its parameters, in order). Low-precision targets are refused:
        with momentum near 1 the update lies below their resolution and vanishes.
    online: as many tensors of the same shapes, fp32, bf16 or fp16, or a module.
        Each may be a mapping {name: tensor} too, paired in order, whose names errors tell. Of DTensors the local
        shards are updated, with no communication; target and online must have one mesh and equal placements.
    momentum: in [0, 1]; a float, or a 0-dim tensor of fp64 (reproduces a float's bits) or fp32. A compiled or
        captured step passes a tensor.
    shadow: tensors of the same shapes, bf16, fp16 or fp32, that get a rounded copy of the new target; None among
        them: no copy of that one.
    form: the roundings in fp32; the public recipes differ from each other in the last bit.
        "lerp"    target + (1 - momentum) * (online - target), one fused multiply-add: what torch.optim.swa_utils,
                  timm's ModelEmaV3 and lightly compute with `lerp_`, within one rounding of theirs.
        "ijepa"   both products rounded, then their sum: the loops of I-JEPA and V-JEPA, bit for bit.
        "vjepa2"  momentum * target rounded, then a fused multiply-add: the `_foreach_mul_` and `_foreach_add_` of
                  V-JEPA 2, bit for bit.

    Lists that stay the same are updated with less host time by an `EmaTable`.
    No gradient. Tensors of several devices, that share memory with a target, or that do not match raise ValueError,
    other dtypes TypeError, before the first write: every tensor is as it was.
    Source: I-JEPA (arXiv:2301.08243) section 3, V-JEPA 2 (arXiv:2506.09985) section 2.
    """
    update(check((target, online, shadow)), {}, momentum, form, backend)


def update(lists: Checked, prepared: dict[str, Any], momentum: float | Tensor, form: str, backend: str | None) -> None:
    """Run lists that passed their checks. prepared: what each backend made of them before; it is added to."""
    target, online, shadow = lists.local
    check_options(momentum, form, target[0].device if target else None)
    if not target:
        return
    chosen = select(OP, KERNELS, backend, target[0])
    if chosen == "reference":
        return reference.forward(target, online, momentum, shadow=shadow, form=form)
    if not isinstance(momentum, Tensor):
        momentum = torch.scalar_tensor(momentum, dtype=torch.float64, device="cpu")
    if lists.known is None or observed():
        with torch.no_grad():  # parameters are leaves
            _forward(target, online, shadow, momentum, form, chosen)
    else:
        if chosen not in prepared:
            prepared[chosen] = implementation(OP, "prepare", chosen)(lists.local, lists.known)
        implementation(OP, "run", chosen)(prepared[chosen], momentum, form)
    if not torch.compiler.is_compiling():  # a graph that saved an old value must refuse its backward
        torch.autograd.graph.increment_version(lists.written)


def _fake(target: Any, online: Any, shadow: Any, momentum: Any, form: str, backend: str) -> None:
    return None


_forward = define(
    OP,
    "forward",
    "(Tensor(a!)[] target, Tensor[] online, Tensor(b!)[] shadow, Tensor momentum, str form, str backend) -> ()",
    _fake,
)
