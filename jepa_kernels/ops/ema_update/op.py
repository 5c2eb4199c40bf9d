"""Public face of `ema_update`."""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail, is_number
from jepa_kernels._core.define import define
from jepa_kernels._core.select import FLOATS, Kernel, select, short
from jepa_kernels.ops.ema_update import reference

OP = "ema_update"
PLAIN = (Tensor, nn.Parameter)
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
    source, target, online = target, _tensors(target, "target"), _tensors(online, "online")
    shadow = () if shadow is None else _tensors(shadow, "shadow")
    _check_lists(source, target, online, shadow)
    _check_momentum(momentum, target[0].device if target else None)
    if form not in FORMS:
        fail(OP, "form", f"be one of {', '.join(FORMS)}", repr(form), "leave it out for lerp")
    if not target:
        return
    chosen = select(OP, KERNELS, backend, target[0])
    if chosen == "reference":
        return reference.forward(target, online, momentum, shadow=shadow, form=form)
    if not isinstance(momentum, Tensor):
        momentum = torch.scalar_tensor(momentum, dtype=torch.float64)
    with torch.no_grad():  # parameters are leaves
        _forward(target, online, shadow, momentum, form, chosen)
    if not torch.compiler.is_compiling():  # a graph that saved an old value must refuse its backward
        torch.autograd.graph.increment_version([*target, *shadow, *_sharded(source)])


def _tensors(source: Sequence[Tensor] | nn.Module, argument: str = "target") -> list[Tensor]:
    """A module's parameters, or the list; a DTensor counts as its local shard: exact for an elementwise update."""
    tensors = source.parameters() if isinstance(source, nn.Module) else source
    if not isinstance(tensors, Iterable):
        fail(OP, argument, "be tensors or a module", type(source).__name__, "pass a list of tensors", TypeError)
    return [t if type(t) in PLAIN else _local(t, argument) for t in tensors]


def _local(t: Any, argument: str) -> Tensor:
    if not isinstance(t, Tensor):
        fail(OP, argument, "hold tensors", type(t).__name__, "convert it with torch.as_tensor", TypeError)
    return getattr(t, "_local_tensor", t)


def _sharded(source: Sequence[Tensor] | nn.Module) -> list[Tensor]:
    """The DTensors (or other subclasses) among the targets: these count their versions apart from their shards."""
    tensors = source.parameters() if isinstance(source, nn.Module) else source
    return [t for t in tensors if type(t) not in PLAIN]


def _name(source: Sequence[Tensor] | nn.Module, i: int) -> str:
    return [n for n, _ in source.named_parameters()][i] if isinstance(source, nn.Module) else f"target[{i}]"


def _check_lists(
    source: Sequence[Tensor] | nn.Module, target: list[Tensor], online: list[Tensor], shadow: Sequence[Tensor]
) -> None:
    """Everything is checked before the first write, so that an error leaves every tensor as it was."""
    if len(online) != len(target):
        fail(OP, "online", f"hold {len(target)} tensors", len(online), "pass one for each target, in order")
    if shadow and len(shadow) != len(target):
        fail(OP, "shadow", f"hold {len(target)} tensors", len(shadow), "pass one for each target, in order")
    device = target[0].device if target else None
    for i, t in enumerate(target):
        if t.dtype is not torch.float32:
            _refuse_target(_name(source, i), t)
        if not _fits(t, online[i], device):
            _refuse_partner(_name(source, i), "online", t, online[i], device)
        if shadow and not _fits(t, shadow[i], device):
            _refuse_partner(_name(source, i), "shadow", t, shadow[i], device)


def _fits(t: Tensor, other: Tensor, device: torch.device | None) -> bool:
    alike = other.dtype in FLOATS and other.shape == t.shape and t.device == device == other.device
    return alike and t.is_contiguous() and other.is_contiguous()


def _refuse_target(name: str, t: Tensor) -> NoReturn:
    why = "be float32 (with momentum near 1 an update lies below a smaller type's resolution)"
    fail(OP, name, why, short(t.dtype), "keep an fp32 target and pass low-precision copies as shadow", TypeError)


def _refuse_partner(name: str, role: str, t: Tensor, other: Tensor, device: torch.device | None) -> NoReturn:
    if other.dtype not in FLOATS:
        wanted = "be float32, bfloat16 or float16"
        fail(OP, f"the {role} tensor of {name}", wanted, short(other.dtype), "convert it with .to(dtype)", TypeError)
    if other.shape != t.shape:
        wanted = f"have shape {tuple(t.shape)}"
        fail(OP, f"the {role} tensor of {name}", wanted, tuple(other.shape), "pair the tensors in order")
    if t.device != device or other.device != device:
        wanted = f"be on {device}"
        fail(OP, f"{name} and its {role} tensor", wanted, f"{t.device} and {other.device}", "move them")
    strides = f"strides {t.stride()} and {other.stride()}"
    fail(OP, f"{name} and its {role} tensor", "be contiguous", strides, "store parameters contiguously")


def _check_momentum(momentum: float | Tensor, device: torch.device | None) -> None:
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or momentum.dtype not in (torch.float64, torch.float32):
            _refuse_momentum(f"{short(momentum.dtype)} {tuple(momentum.shape)}")
        if momentum.device.type != "cpu" and device not in (None, momentum.device):
            fail(
                OP,
                "momentum",
                f"be on the CPU or on the targets' device {device}",
                momentum.device,
                "move it with .to(device)",
            )
        if momentum.device.type != "cpu" or torch.compiler.is_compiling() or momentum.is_meta:
            return
        momentum = float(momentum)
    if not is_number(momentum):
        _refuse_momentum(type(momentum).__name__)
    if not 0.0 <= momentum <= 1.0:
        fail(OP, "momentum", "lie in [0, 1]", momentum, "0.996 to 1 is usual")


def _refuse_momentum(actual: str) -> NoReturn:
    wanted = "be a float or a 0-dim float64 or float32 tensor"
    fail(OP, "momentum", wanted, actual, "use torch.tensor(m, dtype=torch.float64)", TypeError)


def _fake(target: Any, online: Any, shadow: Any, momentum: Any, form: str, backend: str) -> None:
    return None


_forward = define(
    OP,
    "forward",
    "(Tensor(a!)[] target, Tensor[] online, Tensor(b!)[] shadow, Tensor momentum, str form, str backend) -> ()",
    _fake,
)
