"""The momentum of a target network as a function of the number of finished updates, from `EMA`'s arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jepa_kernels import schedules
from jepa_kernels._core.check import fail, is_number

Momentum = Callable[[int], float]
TIMM = dict(min_decay=0.0, update_after_step=0, use_warmup=False, warmup_gamma=1.0, warmup_power=2 / 3)
TIMM_DECAY = 0.9999


def chosen(momentum: float | None, own: dict[str, Any], timm: dict[str, Any]) -> tuple[Momentum, float | None]:
    """timm's formula and its decay where one of timm's arguments is given; else the schedule, and None."""
    named = [name for name, value in timm.items() if value is not None]
    if not named:
        return scheduled(momentum, **own), None
    check_absent(f"with {named[0]}", **own)
    if timm["decay"] is not None:
        check_absent("with decay", momentum=momentum)
    name = "decay" if momentum is None else "momentum"
    decay = next(x for x in (timm["decay"], momentum, TIMM_DECAY) if x is not None)
    return decayed(name, decay, timm), decay


def scheduled(
    start: float | None, final_momentum: float | None, total_steps: int | None, schedule: str | None
) -> Momentum:
    """From `start` to `final_momentum`, by the schedule of this name."""
    final, total, kind = final_momentum, total_steps, schedule
    start = 0.996 if start is None else start
    moving = final is not None or total is not None
    kind = ("linear" if moving else "constant") if kind is None else kind
    if kind not in ("linear", "cosine", "constant"):
        fail("EMA", "schedule", "be linear, cosine or constant", repr(kind), "leave it out: the arguments tell")
    _check_momentum("momentum", start)
    if kind == "constant":
        check_absent("with schedule='constant'", final_momentum=final, total_steps=total)
        return partial(schedules.momentum_constant, start=start)
    final = 1.0 if final is None else final
    _check_momentum("final_momentum", final)
    if total is None or total < 1:
        fail("EMA", "total_steps", "be at least 1", total, "pass ipe * epochs * ipe_scale")
    curve = schedules.momentum if kind == "linear" else schedules.momentum_cosine
    return partial(curve, start=start, final=final, total=int(total))


def decayed(argument: str, decay: float, given: dict[str, Any]) -> Momentum:
    """timm's, with those of its options that are given; argument: what the caller named the decay."""
    options = TIMM | {name: given[name] for name in TIMM if given[name] is not None}
    _check_momentum(argument, decay)
    _check_momentum("min_decay", options["min_decay"])
    if options["min_decay"] > decay:
        remedy = "name final_momentum= and total_steps= for a schedule"
        fail("EMA", "min_decay", f"be at most the decay {decay}", options["min_decay"], remedy)
    if not isinstance(options["update_after_step"], int):
        actual = type(options["update_after_step"]).__name__
        fail("EMA", "update_after_step", "be an int", actual, "pass a number of steps", TypeError)
    for name in ("warmup_gamma", "warmup_power"):
        value = options[name]
        if not is_number(value) or not value > 0:
            fail("EMA", name, "be a positive number", repr(value), f"timm's default is {TIMM[name]:.4g}")
    named: dict[str, Any] = {name.removeprefix("warmup_"): value for name, value in options.items()}
    return partial(schedules.momentum_warmup, decay=decay, **named)


def check_absent(beside: str, **arguments: Any) -> None:
    """These arguments have no meaning `beside` others."""
    for name, value in arguments.items():
        if value is not None:
            other = beside.removeprefix("with ")
            fail("EMA", name, f"be left out {beside}", value, f"choose one of {name} and {other}")


def _check_momentum(name: str, value: Any) -> None:
    if not is_number(value):
        fail("EMA", name, "be a number", type(value).__name__, "pass a float", TypeError)
    if not 0.0 <= value <= 1.0:
        fail("EMA", name, "lie in [0, 1]", value, "0.996 to 1 is usual")
