"""Public face of `ema_update`."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels._core.define import define
from jepa_kernels._core.select import FLOATS, Kernel, select, short
from jepa_kernels.ops.ema_update import reference

OP = "ema_update"
FORMS = ("lerp", "ijepa", "vjepa2")

KERNELS = (
    Kernel("cuda", dtypes=(torch.float32,)),
    Kernel("triton", dtypes=(torch.float32,)),
    Kernel("cpu", dtypes=(torch.float32,)),
)


def ema_update(
    target: Sequence[Tensor] | nn.Module,
    online: Sequence[Tensor] | nn.Module,
    momentum: float | Tensor,
    *,
    shadow: Sequence[Tensor] | None = None,
    form: str = "lerp",
    backend: str | None = None,
) -> None:
    """Move the target weights towards the online weights, in place, in one pass over memory.

    target <- momentum * target + (1 - momentum) * online

    target: fp32 tensors of any shapes, or a module (its parameters, in order). Low-precision targets are refused:
        with momentum near 1 the update lies below their resolution and vanishes.
    online: as many tensors of the same shapes, fp32, bf16 or fp16, or a module.
    momentum: in [0, 1]; a float, or a 0-dim tensor of fp64 (reproduces a float's bits) or fp32. A compiled or
        captured step passes a tensor.
    shadow: tensors of the same shapes, bf16, fp16 or fp32, that get a rounded copy of the new target.
    form: the roundings in fp32. "lerp": target + (1 - momentum) * (online - target), one fused multiply-add.
        "ijepa": both products rounded, then their sum. "vjepa2": momentum * target rounded, then a fused
        multiply-add. Each of the latter two equals its published loop bit for bit.

    No gradient. Raises ValueError and TypeError for lists that do not match, before the first write.
    Source: I-JEPA (arXiv:2301.08243) section 3, V-JEPA 2 (arXiv:2506.09985) section 2.
    """
    names, target = _parameters("target", target)
    _, online = _parameters("online", online)
    shadow = () if shadow is None else list(shadow)
    _check_lists(names, target, online, shadow)
    _check_momentum(momentum)
    if form not in FORMS:
        fail(OP, "form", f"be one of {', '.join(FORMS)}", repr(form), "leave it out for lerp")
    if not target:
        return
    chosen = select(OP, KERNELS, backend, target[0])
    if chosen == "reference":
        return reference.forward(target, online, momentum, shadow=shadow, form=form)
    if not isinstance(momentum, Tensor):
        momentum = torch.tensor(momentum, dtype=torch.float64)
    _forward(target, online, shadow, momentum, form, chosen)


def _parameters(argument: str, source: Sequence[Tensor] | nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names and tensors; a DTensor counts as its local shard, which is exact for an elementwise update."""
    if isinstance(source, nn.Module):
        named = dict(source.named_parameters())
        names, tensors = list(named), list(named.values())
    else:
        tensors = list(source)
        names = [f"{argument}[{i}]" for i in range(len(tensors))]
    return names, [getattr(t, "_local_tensor", t).detach() for t in tensors]


def _check_lists(names: list[str], target: list[Tensor], online: list[Tensor], shadow: Sequence[Tensor]) -> None:
    for argument, tensors in (("online", online), ("shadow", shadow)):
        if len(tensors) != len(target) and not (argument == "shadow" and not tensors):
            fail(OP, argument, f"hold {len(target)} tensors", len(tensors), "pass one for each target, in order")
    for i, (name, t, o) in enumerate(zip(names, target, online, strict=True)):
        s = shadow[i] if shadow else None
        if t.dtype != torch.float32 or o.dtype not in FLOATS or (s is not None and s.dtype not in FLOATS):
            _refuse_dtype(name, t, o, s)
        if t.shape != o.shape or (s is not None and s.shape != t.shape):
            other = o if t.shape != o.shape else s
            _refuse_pair(name, "have one shape", tuple(t.shape), tuple(other.shape))  # type: ignore[union-attr]
        if t.device != o.device or t.device != target[0].device or (s is not None and s.device != t.device):
            _refuse_pair(name, f"be on {target[0].device}", t.device, o.device)
        if not (t.is_contiguous() and o.is_contiguous() and (s is None or s.is_contiguous())):
            fail(OP, f"{name} with its online and shadow tensor", "be contiguous", f"strides {t.stride()} and {o.stride()}", "store parameters contiguously")  # fmt: skip


def _refuse_dtype(name: str, t: Tensor, o: Tensor, s: Tensor | None) -> NoReturn:
    if t.dtype != torch.float32:
        fail(OP, name, "be float32, since with momentum near 1 an update is below a smaller type's resolution", short(t.dtype), "keep an fp32 target and pass low-precision copies as shadow", TypeError)  # fmt: skip
    bad = o if o.dtype not in FLOATS or s is None else s
    fail(OP, f"the online or shadow tensor of {name}", "be float32, bfloat16 or float16", short(bad.dtype), "convert it", TypeError)  # fmt: skip


def _refuse_pair(name: str, requirement: str, t: Any, other: Any) -> NoReturn:
    fail(OP, f"{name} and its counterparts", requirement, f"{t} and {other}", "pair the tensors in order")


def _check_momentum(momentum: float | Tensor) -> None:
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or momentum.dtype not in (torch.float64, torch.float32):
            fail(OP, "momentum", "be a float or a 0-dim float64 or float32 tensor", f"{short(momentum.dtype)} {tuple(momentum.shape)}", "use torch.tensor(m, dtype=torch.float64)", TypeError)  # fmt: skip
        if momentum.device.type != "cpu" or torch.compiler.is_compiling() or momentum.is_meta:
            return
        momentum = float(momentum)
    if not 0.0 <= momentum <= 1.0:
        fail(OP, "momentum", "lie in [0, 1]", momentum, "0.996 to 1 is usual")


def _fake(target: Any, online: Any, shadow: Any, momentum: Any, form: str, backend: str) -> None:
    return None


_forward = define(
    OP,
    "forward",
    "(Tensor(a!)[] target, Tensor[] online, Tensor(b!)[] shadow, Tensor momentum, str form, str backend) -> ()",
    _fake,
)
