"""Argument checks of `adamw_ema`: all of them pass before the first write."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from jepa_kernels._core.check import fail, has_values, is_number
from jepa_kernels._core.select import FLOATS, short
from jepa_kernels.chunks import read
from jepa_kernels.lists import Passed, check_stored, check_strided, overlap, same_layout, tensors
from jepa_kernels.sharding import layout, refuse

OP = "adamw_ema"
SINGLE, LOW = (torch.float32,), (torch.bfloat16, torch.float16)
DTYPES = {"grads": FLOATS, "online_shadow": LOW, "target_shadow": LOW}  # of each other list: SINGLE
SCALARS = (torch.float64, torch.float32)


Scalar = float | Tensor
Checked = dict[str, list[Tensor | None]]


class Options(NamedTuple):
    """What all tensors of one call share."""

    lr: Scalar
    weight_decay: Scalar
    momentum: Scalar
    betas: tuple[float, float]
    eps: float
    maximize: bool


class Lists(NamedTuple):
    """The tensors of one call, in the torch op's order: as many in each list as params, an empty one where none is."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    targets: list[Tensor]  # the last three lists may be empty altogether
    online_shadow: list[Tensor]
    target_shadow: list[Tensor]


STATE = ("exp_avgs", "exp_avg_sqs", "steps")
OPTIONAL = ("targets", "online_shadow", "target_shadow")


ALL_LISTS = [list] * len(Lists._fields)
_passed = Passed()


def check_call(given: dict[str, Any]) -> tuple[Checked, Any]:
    """`checked` and `check_overlap`, and what `chunks.read` told of lists of plain tensors, none of which is missing.

    Those that passed before and lie as they lay pass at once.
    """
    values = [*given.values()]
    usual = [*map(type, values)] == ALL_LISTS and not is_compiling()
    known = read(values, plain=True) if usual else None
    if known in _passed:
        return given, known
    lists = checked(**given)
    if not is_compiling():
        check_overlap(lists)
    _passed.add(known)
    return lists, known


def checked(names: Sequence[str] | None = None, **given: Any) -> Checked:
    """The lists with DTensors as their local shards. `names` are those of the parameters, for messages.

    What shares memory is `check_overlap`'s to find.
    """
    given = {k: v if type(v) is list or not isinstance(v, Iterator) else list(v) for k, v in given.items()}
    lists = {k: [] if v is None and k in OPTIONAL else tensors(OP, k, v) for k, v in given.items()}
    count = len(lists["params"])
    for k, v in lists.items():
        if len(v) != count and (v or k not in OPTIONAL):
            fail(OP, k, f"hold {count} tensors", len(v), _unpaired(k, len(v), count, names))
    if not is_compiling():
        for role in [k for k in lists if k not in ("params", "steps") and lists[k]]:
            _check_placed(role, given[role], given["params"], names)
    for i in range(count):
        _check_entry(lists, i, f"params[{i}]" if names is None else names[i])
    return lists


def _unpaired(role: str, found: int, count: int, names: Sequence[str] | None) -> str:
    """What to do with the first tensor that has no partner."""
    if found > count:
        return f"leave out {role}[{count}], which belongs to no parameter"
    return f"pass one (or None) for {f'params[{found}]' if names is None else names[found]}, the first without"


def _check_placed(role: str, values: Iterable[Any], params: Iterable[Any], names: Sequence[str] | None) -> None:
    """Shards are updated alone: each must be that part of its tensor that the parameter's shard is."""
    for i, (t, p) in enumerate(zip(values, params, strict=True)):
        if t is not None and layout(t) != layout(p):
            name = f"params[{i}]" if names is None else names[i]
            refuse(OP, name, f"the {_singular(role)} of {name}", layout(p), layout(t))


def _check_entry(lists: Checked, i: int, name: str) -> None:
    p = _check_param(lists["params"][i], name, lists["params"][0])
    entry = {role: values[i] for role, values in lists.items() if values and role != "params"}
    for role, t in entry.items():
        if t is not None:
            check_partner(p, t, role, name)
        elif role in STATE and entry["grads"] is not None:
            fail(OP, f"{role}[{i}]", f"be a tensor, as {name} has a gradient", "None", "pass the state", TypeError)
    if entry.get("target_shadow") is not None and entry.get("targets") is None:
        fail(OP, f"the target_shadow of {name}", "have a target to copy", "no target", "leave it out")


def _check_param(p: Tensor | None, name: str, first: Tensor | None) -> Tensor:
    if p is None or first is None:
        fail(OP, name, "be a tensor", "None", "leave it out of every list", TypeError)
    if p.dtype is not torch.float32:
        remedy = "keep fp32 weights and pass low-precision copies as a shadow"
        fail(OP, name, "be float32", short(p.dtype), remedy, TypeError)
    check_strided(OP, name, p)
    if p.device != first.device:
        fail(OP, name, f"be on {first.device}", p.device, "update each device's parameters in a call of its own")
    return p


def check_partner(p: Tensor, t: Tensor, role: str, name: str) -> None:
    """A tensor of another list against the parameter that it belongs to."""
    dtypes = DTYPES.get(role, SINGLE)
    usual = t.dtype in dtypes and t.device == p.device and t.layout is torch.strided
    if not (usual and (t.dim() == 0 if role == "steps" else same_layout(t, p))):
        _refuse_partner(p, t, f"the {_singular(role)} of {name}", dtypes, role == "steps")
    check_stored(OP, f"the {_singular(role)} of {name}", t)


def _refuse_partner(p: Tensor, t: Tensor, what: str, dtypes: tuple[torch.dtype, ...], is_step: bool) -> NoReturn:
    if t.dtype not in dtypes:
        wanted = f"be {' or '.join(short(d) for d in dtypes)}"
        fail(OP, what, wanted, short(t.dtype), "convert it with .to(dtype)", TypeError)
    check_strided(OP, what, t)
    if t.device != p.device:
        fail(OP, what, f"be on {p.device}", t.device, "move it with .to(device)")
    if is_step:
        fail(OP, what, "have shape ()", tuple(t.shape), "count the steps in a 0-dim tensor")
    actual = f"shape {tuple(t.shape)} and strides {t.stride()}"
    wanted = f"have shape {tuple(p.shape)} and strides {p.stride()}"
    fail(OP, what, wanted, actual, "pair the tensors in order, and store both alike")


def check_overlap(lists: Checked, names: Sequence[str] | None = None) -> None:
    """Two tensors in one place of memory would be updated twice, or from each other's new values."""

    def places(role: str) -> list[tuple[tuple[str, int], Tensor]]:
        return [((role, i), t) for i, t in enumerate(lists[role]) if t is not None]

    found = overlap([place for role in lists if role != "grads" for place in places(role)], places("grads"))
    if found is not None:
        first, other = (f"{r}[{i}]" if names is None else f"the {_singular(r)} of {names[i]}" for r, i in found)
        fail(OP, first, f"share no memory with {other}", "overlapping storage", "give each a tensor of its own")


def _singular(role: str) -> str:
    return role.removesuffix("s")


def check_options(options: Options, device: torch.device | None) -> None:
    """lr and weight_decay at least 0, momentum in [0, 1], betas in [0, 1), eps at least 0; NaN is none of these."""
    lr, weight_decay, momentum, betas, eps, maximize = options
    if not isinstance(maximize, bool):
        fail(OP, "maximize", "be a bool", type(maximize).__name__, "pass True or False", TypeError)
    floats = type(lr) is type(weight_decay) is type(momentum) is type(eps) is float
    if not (
        floats and 0.0 <= lr <= 1.0 and 0.0 <= weight_decay <= 1.0 and 0.0 <= momentum <= 1.0 and 0.0 <= eps <= 1.0
    ):
        _check_scalar("lr", lr, device, "be at least 0", "1e-3 is usual")
        _check_scalar("weight_decay", weight_decay, device, "be at least 0", "0.04 to 0.4 is usual")
        _check_scalar("momentum", momentum, device, "lie in [0, 1]", "0.996 to 1 is usual")
        _check_scalar("eps", eps, None, "be at least 0", "1e-8 is usual")
    pair = type(betas) is tuple and len(betas) == 2 and type(betas[0]) is type(betas[1]) is float
    if pair and 0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0:
        return
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(is_number(b) for b in betas):
        fail(OP, "betas", "be two numbers", repr(betas), "(0.9, 0.999) is usual", TypeError)
    if not all(0.0 <= b < 1.0 for b in betas):
        fail(OP, "betas", "lie in [0, 1)", tuple(betas), "(0.9, 0.999) is usual")


def _check_scalar(argument: str, value: Any, device: torch.device | None, wanted: str, remedy: str) -> None:
    """A number, or a 0-dim tensor on the device or the CPU. One on the device is read under JEPA_KERNELS_CHECK=1 alone:
    that waits for it."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 1 or value.dtype not in SCALARS:
            actual = f"{short(value.dtype)} {tuple(value.shape)}"
            kinds = "be a float or a 0-dim float32 or float64 tensor"
            fail(OP, argument, kinds, actual, "pass torch.tensor(x)", TypeError)
        if value.device.type != "cpu" and device not in (None, value.device):
            fail(OP, argument, f"be on the CPU or on {device}", value.device, "move it with .to(device)")
        if not has_values(value):
            return
        value = value.item()
    _check_range(argument, value, wanted, remedy)


def _check_range(argument: str, value: Any, wanted: str, remedy: str) -> None:
    if not is_number(value):
        fail(OP, argument, "be a number", type(value).__name__, "pass a float", TypeError)
    if not 0.0 <= value <= (1.0 if argument == "momentum" else float("inf")):
        fail(OP, argument, wanted, value, remedy)


def check_factor(name: str, value: Any, device: torch.device | None) -> Tensor | None:
    """grad_scale or found_inf as the kernels read it: fp32 [] on the device, which is not waited for."""
    if value is None or device is None:
        return None
    if not isinstance(value, Tensor):
        if not is_number(value):
            fail(OP, name, "be a number", type(value).__name__, "pass what GradScaler sets", TypeError)
        return torch.full((), float(value), dtype=torch.float32, device=device)
    if value.numel() != 1 or value.dtype is not torch.float32 or value.device != device:
        actual = f"{short(value.dtype)} {tuple(value.shape)} on {value.device}"
        fail(OP, name, f"be a float32 number on {device}", actual, "pass what GradScaler sets", TypeError)
    return value.reshape(())
