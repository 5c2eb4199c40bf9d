"""What `ema_update` asks of its tensors, before the first write; once for lists that stay as they are."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from jepa_kernels._core.check import PLAIN, fail, has_values, is_number
from jepa_kernels._core.select import FLOATS, short
from jepa_kernels.chunks import read
from jepa_kernels.lists import Passed, check_stored, is_dense, local_of, overlap, same_layout
from jepa_kernels.sharding import check_sharding

OP = "ema_update"
ROLES = ("target", "online", "shadow")
FORMS = ("lerp", "ijepa", "vjepa2")
Source = Sequence[Tensor] | Mapping[str, Tensor] | nn.Module
Shadow = Sequence[Tensor | None] | Mapping[str, Tensor | None] | None
Sources = tuple[Source, Source, Shadow]
Names = dict[str, list[str]]  # by role
_passed = Passed()


class Checked(NamedTuple):
    """Lists of targets, online weights and shadows that an update may be run on."""

    given: tuple[list[Any], ...]
    local: tuple[list[Tensor], ...]  # the same; of each DTensor its shard: exact for an elementwise update
    known: Any  # by `chunks.read`; None where the op must go through torch's dispatcher

    @property
    def written(self) -> list[Any]:
        """Everything whose version counts; a DTensor (or other subclass) counts apart from its shard."""
        target, _, shadow = self.local
        if self.local is self.given:
            return [*target, *shadow] if shadow else target
        return [*target, *shadow, *(t for ts in (self.given[0], self.given[2]) for t in ts if type(t) not in PLAIN)]


def check(sources: Sources) -> Checked:
    """The lists of these modules or lists; raises the error that names the first tensor at fault."""
    target, online, shadow = sources
    given = _listed(target, "target"), _listed(online, "online"), _listed(shadow, "shadow")
    _check_lengths(sources, given)
    if given[2] and any(s is None for s in given[2]):
        given[2][:] = [t.new_empty(0) if s is None else s for t, s in zip(given[0], given[2], strict=True)]
    checked = reread(given)
    if not is_compiling() and checked.local is not checked.given:
        check_sharding(OP, given, partial(names, sources, given))
    if checked.known in _passed:
        return checked
    name = names(sources, given)
    _check_lists(name, *checked.local)
    if checked.known is not None:
        _check_memory(name, checked.local)
    _passed.add(checked.known)
    return checked


def reread(given: tuple[list[Any], ...]) -> Checked:
    """What these lists are at present; nothing is checked but that they hold tensors."""
    if not is_compiling():
        known = read(given, plain=True)
        if known is not None:
            return Checked(given, given, known)
    local = tuple(
        [t if type(t) in PLAIN else _local(t, role) for t in tensors]
        for tensors, role in zip(given, ROLES, strict=True)
    )
    known = None if is_compiling() else read(local, plain=True)
    return Checked(given, local, known)


def _listed(source: Source | Shadow, role: str) -> list[Any]:
    if type(source) is list:  # an update of few tensors would spend most of its checks on asking what this is
        return source.copy()
    if isinstance(source, nn.Module):
        return list(source.parameters())
    if source is None and role == "shadow":
        return []
    if not isinstance(source, Iterable):
        fail(OP, role, "be tensors or a module", type(source).__name__, "pass a list of tensors", TypeError)
    return list(source.values() if isinstance(source, Mapping) else source)


def _local(t: Any, role: str) -> Tensor:
    if not isinstance(t, Tensor):
        fail(OP, role, "hold tensors", type(t).__name__, "convert it with torch.as_tensor", TypeError)
    return local_of(OP, f"a tensor of {role}", t)


def names(sources: Sources, given: tuple[list[Any], ...]) -> Names:
    """What errors call the tensors: by name in a module or mapping, by their place in a list."""
    return {
        role: [f"{role} {name}" for name in _keys(source)]
        if isinstance(source, nn.Module | Mapping)
        else [f"{role}[{i}]" for i in range(len(tensors))]
        for role, source, tensors in zip(ROLES, sources, given, strict=True)
    }


def _keys(source: nn.Module | Mapping[str, Any]) -> Iterable[str]:
    return source if isinstance(source, Mapping) else [name for name, _ in source.named_parameters()]


def _check_lengths(sources: Sources, given: tuple[list[Any], ...]) -> None:
    """As many of each as targets, or no shadows."""
    count, online, shadow = map(len, given)
    if online == count and shadow in (0, count):
        return
    for role, others in zip(ROLES[1:], given[1:], strict=True):
        if len(others) == count or (role == "shadow" and not others):
            continue
        name = names(sources, given)
        if len(others) < count:
            remedy = f"pass one for {name['target'][len(others)]}, the first without"
        else:
            remedy = f"leave out {name[role][count]}, the first without a target"
        fail(OP, role, f"hold {count} tensors", len(others), remedy)


def _check_lists(name: Names, target: list[Tensor], online: list[Tensor], shadow: list[Tensor]) -> None:
    device = target[0].device if target else None
    for i, t in enumerate(target):
        if t.dtype is not torch.float32:
            _refuse_target(name["target"][i], t)
        for role, others in (("online", online), ("shadow", shadow)):
            absent = role == "shadow" and others and others[i].numel() == 0 < t.numel()
            if others and not absent and not _fits(t, others[i], device):
                _refuse_partner(name["target"][i], name[role][i], t, others[i], device)


def _fits(t: Tensor, other: Tensor, device: torch.device | None) -> bool:
    alike = other.dtype in FLOATS and other.shape == t.shape and t.device == device == other.device
    return alike and is_dense(t) and same_layout(t, other)


def _refuse_target(name: str, t: Tensor) -> NoReturn:
    why = "be float32 (with momentum near 1 an update lies below a smaller type's resolution)"
    fail(OP, name, why, short(t.dtype), "keep an fp32 target and pass low-precision copies as shadow", TypeError)


def _refuse_partner(target: str, name: str, t: Tensor, other: Tensor, device: torch.device | None) -> NoReturn:
    if other.dtype not in FLOATS:
        wanted = "be float32, bfloat16 or float16"
        fail(OP, name, wanted, short(other.dtype), "convert it with .to(dtype)", TypeError)
    if other.shape != t.shape:
        wanted = f"have the shape {tuple(t.shape)} of {target}"
        fail(OP, name, wanted, tuple(other.shape), "pair the tensors in order")
    if t.device != device or other.device != device:
        wanted = f"be on {device}"
        fail(OP, f"{target} and {name}", wanted, f"{t.device} and {other.device}", "move them")
    strides = f"strides {t.stride()} and {other.stride()}"
    wanted = "fill their memory, in one order"
    fail(OP, f"{target} and {name}", wanted, strides, "store both alike, contiguous or channels_last")


def _check_memory(name: Names, lists: tuple[list[Tensor], ...]) -> None:
    """No memory that is written is read or written as another tensor's. Online weights may share theirs."""
    present = {
        (role, i): t for role, tensors in zip(ROLES, lists, strict=True) for i, t in enumerate(tensors) if t.numel()
    }
    for (role, i), t in present.items():
        check_stored(OP, name[role][i], t)
    places = present.items()
    found = overlap([p for p in places if p[0][0] != "online"], [p for p in places if p[0][0] == "online"])
    if found is not None:
        other, written = found if found[1][0] != "online" else found[::-1]
        shared = f"{_common(present[written], present[other])} bytes in common"
        (role, i), (partner, j) = written, other
        fail(OP, name[role][i], f"share no memory with {name[partner][j]}", shared, "clone one of them")


def _common(a: Tensor, b: Tensor) -> int:
    """Bytes that belong to both."""
    end = min(t.data_ptr() + t.numel() * t.element_size() for t in (a, b))
    return end - max(a.data_ptr(), b.data_ptr())


def check_options(momentum: Any, form: str, device: torch.device | None) -> None:
    """The momentum, whose value is read where that needs no sync or JEPA_KERNELS_CHECK=1 asks for it, and the form."""
    if form not in FORMS:
        fail(OP, "form", f"be one of {', '.join(FORMS)}", repr(form), "leave it out for lerp")
    if type(momentum) is float and 0.0 <= momentum <= 1.0:
        return
    if isinstance(momentum, Tensor):
        if momentum.dim() != 0 or momentum.dtype not in (torch.float64, torch.float32):
            _refuse_momentum(f"{short(momentum.dtype)} {tuple(momentum.shape)}")
        if momentum.device.type != "cpu" and device not in (None, momentum.device):
            wanted = f"be on the CPU or on the targets' device {device}"
            fail(OP, "momentum", wanted, momentum.device, "move it with .to(device)")
        if not has_values(momentum):
            return
        momentum = float(momentum)
    if not is_number(momentum):
        _refuse_momentum(type(momentum).__name__)
    if not 0.0 <= momentum <= 1.0:
        fail(OP, "momentum", "lie in [0, 1]", momentum, "0.996 to 1 is usual")


def _refuse_momentum(actual: str) -> NoReturn:
    wanted = "be a float or a 0-dim float64 or float32 tensor"
    fail(OP, "momentum", wanted, actual, "use torch.tensor(m, dtype=torch.float64)", TypeError)
