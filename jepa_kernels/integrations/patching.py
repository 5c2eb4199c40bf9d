"""Other `forward`s for single modules of a model: all or nothing, verified, and undone to the last bit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail

Run = Callable[[nn.Module], Mapping[str, Tensor]]  # one forward of the model: its outputs by name
IN_FLOAT32 = " in float32"


@dataclass(frozen=True)
class Replacement:
    """`forward`, called as forward(module, ...) in place of the module's own; a function that pickle finds by its name.

    what: what it does differently, in words, for the report.
    parameters: names that the own forward must take, in order; another signature is refused.
    """

    forward: Callable[..., Any]
    what: str
    parameters: tuple[str, ...]


class Forward(partial[Any]):
    """A forward that a patch put into a module, with the module. Copies and pickles hold the copied module."""


class Patch:
    """What was replaced in one model. `undo()`, or the end of a `with` block, gives the model back as it was.

    .patched: what stands at each replaced module, by the module's name ("" is the model itself).
    .skipped: why a module was left alone, likewise.
    .verified: relative errors of the patched model and of the model itself, by output; empty if not verified.
    print(patch) is a report of the three.

    Only the instances' `forward` changes: classes, parameters, buffers, hooks and the state dict stay, and training,
    saving and loading go on as before. A copy.deepcopy or a pickle of a patched model is patched; to undo a copy as
    well, copy the Patch, whose `.model` is the model's copy. Shallow copies are no copies here: a replica of
    nn.DataParallel would run the original's weights, on the original's device; DistributedDataParallel makes none.
    """

    def __init__(self, model: nn.Module, replacements: Mapping[str, Replacement], skipped: Mapping[str, str]) -> None:
        self.model = model
        self.patched = {name: r.what for name, r in replacements.items()}
        self.skipped = dict(skipped)
        self.verified: dict[str, tuple[float, float]] = {}
        self._forwards = {name: Forward(r.forward, model.get_submodule(name)) for name, r in replacements.items()}
        for name, forward in self._forwards.items():
            model.get_submodule(name).forward = forward

    def undo(self) -> None:
        """Give every module its own forward back. Once is enough; more does nothing.

        Raises RuntimeError, and changes nothing, where something else has replaced a forward since.
        """
        modules = {name: forward.args[0] for name, forward in self._forwards.items()}  # which an adapter may wrap now
        for name, module in modules.items():
            if vars(module).get("forward") is not self._forwards[name]:
                what, remedy = "the forward that the patch put there", "undo what replaced it first"
                fail("undo", f"{_shown(name)}.forward", f"be {what}", vars(module).get("forward"), remedy, RuntimeError)
        for module in modules.values():
            del module.forward
        self._forwards = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__}: {len(self.patched)} modules patched, {len(self.skipped)} left alone"]
        for title, found in (("patched", self.patched), ("left alone", self.skipped)):
            lines += [f"  {title}: {what}: {_brief(names)}" for what, names in _grouped(found).items()]
        lines += [f"  verified: {name}: {_errors(*found)}" for name, found in self.verified.items()]
        return "\n".join(lines)


def apply(
    model: nn.Module,
    replacements: Mapping[str, Replacement],
    skipped: Mapping[str, str],
    *,
    source: str,
    only: str | Sequence[str] | None = None,
    run: Run | None = None,
) -> Patch:
    """Put `replacements`, by module name, into `model`, or leave it as it was and raise.

    only: names of modules; each stands for itself and what it contains. None: everything.
    source: whose model it is, for messages: "transformers 5.23.0".
    run: what the verification computes, the same before and after, in evaluation mode and without gradient: outputs
        of a hundred numbers or more. Against the same forward with weights and inputs in float64, the patched model's
        error (the norm of the difference) must be at most twice the unpatched model's plus 2 fp32 ulp. Of a model in
        low precision, whose rounding hides faults, the same must hold with its weights in float32. This needs memory
        for a float64 copy of the weights, while it runs. None: no verification.
    Raises ValueError where the model is patched already, a name in `only` fits nothing or a signature is another one;
    RuntimeError where the patched model differs.
    """
    for name, module in model.named_modules():
        if is_patched(module):
            fail("patch", "model", "not be patched already", f"a patched {_shown(name)}", "undo the first patch")
    wanted, skipped = _selected(replacements, skipped, only)
    for name, replacement in wanted.items():
        _check_signature(model.get_submodule(name), replacement.parameters, source)
    if not wanted:
        reasons = "; ".join(f"{_shown(name)}: {why}" for name, why in skipped.items()) or "no module that is known"
        fail("patch", "model", "have a module to replace", reasons, "change what the reasons name")
    if run is not None:
        _check_weights(model)
    own = None if run is None else (_evaluate_in_both(model, run), _exactly(model, run))
    patch = Patch(model, wanted, skipped)
    if run is not None and own is not None:
        try:
            patch.verified = _verify(_evaluate_in_both(model, run), *own)
        except BaseException:
            patch.undo()
            raise
    return patch


def _check_weights(model: nn.Module) -> None:
    """That others can stand in their places for the verification."""
    remedy = "pass verify=False"
    if any(p.is_meta for p in model.parameters()):
        fail("patch", "model", "hold weights to be verified", "the meta device", f"load them first, or {remedy}")
    if any(hasattr(m, "reshard") or kind_of(m, ("FullyShardedDataParallel",)) for m in model.modules()):
        fail("patch", "model", "hold whole weights to be verified", "sharded ones", f"patch it before, or {remedy}")


def is_patched(module: nn.Module) -> bool:
    """Whether a patch has replaced the module's own forward."""
    return isinstance(vars(module).get("forward"), Forward)


def kind_of(module: nn.Module, known: Collection[str]) -> str | None:
    """The nearest class of the module whose name is among `known`."""
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in known), None)


def own_forward(module: nn.Module, kind: str) -> str | None:
    """Why a module of class `kind` must be left alone, if its forward is not that of the class."""
    if "forward" in vars(module):
        return "has a forward of its own already, set by something else"
    cls: Any = next(c for c in type(module).__mro__ if c.__name__ == kind)
    return None if type(module).forward is cls.forward else f"{type(module).__name__} has another forward than {kind}"


def _selected(
    replacements: Mapping[str, Replacement], skipped: Mapping[str, str], only: str | Sequence[str] | None
) -> tuple[dict[str, Replacement], dict[str, str]]:
    if only is None:
        return dict(replacements), dict(skipped)
    asked = (only,) if isinstance(only, str) else tuple(only)
    known = [*replacements, *skipped]
    for part in asked:
        if not any(within(name, part) for name in known):
            remedy = f"choose from {_brief([_shown(name) for name in replacements])}"
            fail("patch", "only", "name modules that can be patched, or what contains them", repr(part), remedy)
    wanted = {name: r for name, r in replacements.items() if any(within(name, part) for part in asked)}
    left = {name: "not among `only`" for name in replacements if name not in wanted}
    return wanted, {**skipped, **left}


def within(name: str, part: str) -> bool:
    """Whether a module is this part of the model, or in it."""
    return part == "" or name == part or name.startswith(f"{part}.")


def _check_signature(module: nn.Module, parameters: tuple[str, ...], source: str) -> None:
    found = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if found != parameters:
        name, wanted, actual = f"{type(module).__name__}.forward", ", ".join(parameters), ", ".join(found)
        fail("patch", name, f"take ({wanted})", f"({actual}) of {source}", "use a version that this one was made for")


def _evaluate(model: nn.Module, run: Run) -> dict[str, Tensor]:
    """Outputs in evaluation mode; training flags and random numbers stay as they were."""
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with torch.no_grad(), torch.random.fork_rng(gpus), torch.autocast(device.type, enabled=False):
            model.eval()
            return {name: x.detach().clone() for name, x in run(model).items()}
    finally:
        for module, flag in training.items():
            module.training = flag


def evaluate_in(dtype: torch.dtype, model: nn.Module, run: Run) -> dict[str, Tensor]:
    """Outputs in evaluation mode with weights of this type; the model stays as it is."""
    with weights_in(dtype, model):
        return _evaluate(model, run)


def _exactly(model: nn.Module, run: Run) -> dict[str, Tensor]:
    try:
        return evaluate_in(torch.float64, model, run)
    except (RuntimeError, TypeError) as error:  # of layers of integers, or of kernels that lack the type
        why, remedy = str(error).split("\n")[0][:200], "pass verify=False, and compare outputs yourself"
        fail("patch", "model", "run with its weights in float64, to be verified", why, remedy)


def _evaluate_in_both(model: nn.Module, run: Run) -> dict[str, Tensor]:
    """As the model is, and of a low-precision model, whose rounding hides faults, with its weights in float32 too."""
    found = _evaluate(model, run)
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return found
    return found | {name + IN_FLOAT32: x for name, x in evaluate_in(torch.float32, model, run).items()}


def _verify(
    patched: Mapping[str, Tensor], own: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> dict[str, tuple[float, float]]:
    sides = {name: (patched[name], own[name], exact[name.removesuffix(IN_FLOAT32)]) for name in own}
    found = {name: (_error(ours, best), _error(theirs, best)) for name, (ours, theirs, best) in sides.items()}
    slack = 2 * torch.finfo(torch.float32).eps
    wrong = [
        f"{name} with {_errors(*errors)}" for name, errors in found.items() if not errors[0] <= 2 * errors[1] + slack
    ]
    if wrong:
        finite = all(math.isfinite(unpatched) for _, unpatched in found.values())
        then = "leave it so, and report this" if finite else "its own numbers are not finite, look at its weights"
        remedy = f"the model is as it was: {then}"
        fail("patch", "the patched model", "give the numbers of the model", "; ".join(wrong), remedy, RuntimeError)
    return found


def _error(actual: Tensor, exact: Tensor) -> float:
    """Of a tensor, relative to its norm; NaN where anything is."""
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def _errors(patched: float, own: float) -> str:
    return f"a relative error of {patched:.2g}, unpatched {own:.2g}"


@contextmanager
def weights_in(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Other tensors, of this type, in place of the model's floating parameters and buffers, which are not touched."""
    stores: list[dict[str, Any]] = [store for m in model.modules() for store in (m._parameters, m._buffers)]
    own = [(store, dict(store)) for store in stores]
    try:
        for store, tensors in own:
            floating = {name: x for name, x in tensors.items() if x is not None and x.is_floating_point()}
            store.update({name: x.detach().to(dtype) for name, x in floating.items()})
        yield
    finally:
        for store, tensors in own:
            store.update(tensors)


def seeded_input(model: nn.Module, *shape: int) -> Tensor:
    """A drawn input on the model's device, in the type of its weights: the same numbers in every type."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    weight = next((p for p in model.parameters() if p.is_floating_point()), drawn)
    return (16 * drawn).round().div(16).to(weight.device, weight.dtype)


def _grouped(found: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, what in found.items():
        groups.setdefault(what, []).append(_shown(name))
    return groups


def _shown(name: str) -> str:
    return name or "the model"


def _brief(names: Sequence[str]) -> str:
    """All names, or the first and the last of many."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} ... {names[-1]} ({len(names)})"
