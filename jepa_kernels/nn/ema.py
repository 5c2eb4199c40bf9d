"""The target network: a moving average of the online one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kernels import schedules
from jepa_kernels._core.check import fail, is_number
from jepa_kernels.nn.pairing import Pairing, unwrap
from jepa_kernels.nn.shadow import Shadow
from jepa_kernels.nn.sync import check_same
from jepa_kernels.ops.ema_update.check import FORMS

STEP = "_extra_state"  # torch's name for what a module keeps beside its tensors


class EMA(nn.Module):
    """A copy of `online` that follows it: target <- m * target + (1 - m) * online, one pass over memory per update.

    Which momentum the published runs used (n: finished steps, N: ipe * epochs * ipe_scale):

    | run | m | here |
    |---|---|---|
    | I-JEPA | 0.996 -> 1, linear in n / N | `EMA(net, 0.996, final_momentum=1.0, total_steps=N, form="ijepa")` |
    | V-JEPA | 0.998 -> 1, linear in n / N, ipe_scale 1.25 | `EMA(net, 0.998, final_momentum=1.0, total_steps=N, ...)` |
    | V-JEPA 2 | 0.99925 | `EMA(net, 0.99925, form="vjepa2")` |
    | BYOL, DINO | 0.996 -> 1, half cosine in n / N | `EMA(net, 0.996, total_steps=N, schedule="cosine")` |
    | timm | decay, at once or warmed up | `EMA(net, decay=0.9998, use_warmup=True)` |

    online: a module, or its wrapper by DDP or torch.compile; fp32, or bf16 and fp16: the target is fp32. Parameters
        that are frozen (requires_grad False) at an update are skipped, shared ones move once, buffers of the state
        dict are copied.
    momentum: in [0, 1], at step 0. final_momentum: at total_steps and after; default 1 where total_steps is given.
    schedule: "linear", "cosine" or "constant"; None: linear where one of these two is given, else constant.
    shadow_dtype: bf16 or fp16: the update also writes low-precision copies of the weights that autocast casts, and
        `forward` under autocast to that dtype reads them: the same bits, no weight cast (2 bytes a parameter more).
    form: the roundings, see `ema_update`.
    decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power, device, exclude_buffers: as of
        `timm.utils.ModelEmaV3`. With decay its formulas replace the schedule, the target is in eval mode, and fp32
        buffers are averaged unless exclude_buffers; else the target keeps online's mode, as upstream's do, and
        exclude_buffers=False averages them. foreach is accepted and has no effect.

    .module: the target, fp32, without gradient; shard it with `fully_shard` as the online network: an update is of
        the local shards, with no communication. .shadow: the module that `forward` runs under autocast, or None.
    .step: number of updates; part of the state dict.

    Raises ValueError and TypeError for arguments and networks that do not fit, before the first write.
    """

    def __init__(
        self,
        online: nn.Module,
        momentum: float = 0.996,
        *,
        final_momentum: float | None = None,
        total_steps: int | None = None,
        schedule: str | None = None,
        shadow_dtype: torch.dtype | None = None,
        form: str = "lerp",
        decay: float | None = None,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        foreach: bool = True,
        exclude_buffers: bool | None = None,
    ) -> None:
        super().__init__()
        _check_names(shadow_dtype, form)
        self.decay, self.form, self.step = decay, form, 0
        self.average_buffers = decay is not None if exclude_buffers is None else not exclude_buffers
        self._momentum: Callable[[int], float]
        if decay is None:
            self._momentum = _schedule(schedule, momentum, final_momentum, total_steps)
        else:
            _check_alone(final_momentum=final_momentum, total_steps=total_steps, schedule=schedule)
            for name, value in (("decay", decay), ("min_decay", min_decay)):
                _check_momentum(name, value)
            warmup = dict(use_warmup=use_warmup, gamma=warmup_gamma, power=warmup_power)
            limits = dict(decay=decay, min_decay=min_decay, update_after_step=update_after_step)
            self._momentum = partial(schedules.momentum_warmup, **limits, **warmup)  # type: ignore[arg-type]
        self._online = (unwrap(online),)  # in a tuple: not a part of this module
        self.module = _target(self._online[0], device)
        if decay is not None:
            self.module.eval()
        self._shadow = None if shadow_dtype is None else Shadow(self.module, shadow_dtype)
        self._pairing: Pairing | None = None

    @property
    def shadow(self) -> nn.Module | None:
        """The target with low-precision copies of what autocast casts; it shares everything else."""
        return None if self._shadow is None else self._shadow.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The target's output; under autocast to shadow_dtype from the low-precision copies, with the same bits."""
        shadow = self.under_autocast()
        return (self.module if shadow is None else shadow)(*args, **kwargs)

    def under_autocast(self) -> nn.Module | None:
        """The shadow, in the target's mode and up to date, where autocast is on to its dtype; else None."""
        if self._shadow is None or not self._shadow.serves():
            return None
        if not torch.compiler.is_compiling():  # compiled code trusts the last update
            self._shadow.refresh()
        if self._shadow.module.training != self.module.training:
            self._shadow.module.train(self.module.training)
        return self._shadow.module

    def momentum_at(self, step: int) -> float:
        """The momentum of the update after `step` finished ones (with decay: of the update that timm calls `step`)."""
        return self._momentum(step)

    def get_decay(self, step: int | None = None) -> float:
        """`momentum_at(step)`; None: the next update's (with decay: decay itself, as timm)."""
        if step is None:
            return self.momentum_at(self.step) if self.decay is None else self.decay
        return self.momentum_at(step)

    @torch._disable_dynamo  # the step is a number: compiled code would be compiled anew for each
    def update(self, online: nn.Module | None = None, step: int | None = None) -> None:
        """Move the target by the schedule, after the optimiser's step.

        online: None: the module of the constructor. step: None: the number of updates so far.
        A loop over a CUDA graph passes its momentum, a tensor on the device, to `apply_update_` instead.
        """
        self.apply_update_(self._online[0] if online is None else online, self.get_decay(step))
        self.step = (self.step if step is None else step) + 1

    @torch._disable_dynamo
    @torch.no_grad()
    def apply_update_(self, model: nn.Module, decay: float | Tensor) -> None:
        """Move the target towards `model` with this momentum, a float or a 0-dim tensor; 0.0 copies, as `set`."""
        if not isinstance(decay, Tensor) and decay == 0.0:
            return self.set(model)
        pairing = self._paired(unwrap(model))
        copied = pairing.copied()  # checked before the first write
        if self._shadow is not None:
            self._shadow.refresh()  # what the update does not write, such as copies of frozen weights
        pairing.update(decay, self.form)
        if self._shadow is not None:
            self._shadow.written()
        for target, online in copied:
            target.copy_(online)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Copy every parameter and buffer of `model`."""
        pairing = self._paired(unwrap(model))
        for target, online in [*pairing.parameters, *pairing.buffers().values()]:
            target.copy_(online)
        if self._shadow is not None:
            self._shadow.refresh()

    def _paired(self, online: nn.Module) -> Pairing:
        if self._pairing is None or not self._pairing.holds(online):
            if self._shadow is not None and self._shadow.members != list(self.module.modules()):
                self._shadow = Shadow(self.module, self._shadow.dtype)
            self._pairing = Pairing(online, self.module, self._shadow, averaged=self.average_buffers)
        return self._pairing

    def check_sync(self, group: Any = None) -> None:
        """Raise ValueError, on every rank of the group, unless their targets are equal bit for bit.

        It names the first parameter or buffer that differs. Sharded tensors are compared where they are replicated.
        Collective: reads every tensor once, and is no part of a step. Without torch.distributed it does nothing.
        """
        check_same("EMA", self.module, group)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)

    def set_extra_state(self, state: Any) -> None:
        self.step = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A state dict of the target network alone, or timm's, leaves the step as it is."""
        own = [name for name in state_dict if name.startswith(prefix)]
        if not any(name.startswith(f"{prefix}module.") for name in own):
            for name in own:
                state_dict[f"{prefix}module.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        state_dict.setdefault(prefix + STEP, self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pairing": None}  # it holds addresses


def _target(online: nn.Module, device: torch.device | str | None) -> nn.Module:
    target = copy.deepcopy(online).requires_grad_(False)
    for p in target.parameters():
        if p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()
    return target if device is None else target.to(device)


def _schedule(kind: str | None, start: float, final: float | None, total: int | None) -> Callable[[int], float]:
    """The momentum as a function of the number of finished updates."""
    moving = final is not None or total is not None
    kind = ("linear" if moving else "constant") if kind is None else kind
    if kind not in ("linear", "cosine", "constant"):
        fail("EMA", "schedule", "be linear, cosine or constant", repr(kind), "leave it out: the arguments tell")
    _check_momentum("momentum", start)
    if kind == "constant":
        _check_alone("schedule='constant'", final_momentum=final, total_steps=total)
        return partial(schedules.momentum_constant, start=start)
    final = 1.0 if final is None else final
    _check_momentum("final_momentum", final)
    if total is None or total < 1:
        fail("EMA", "total_steps", "be at least 1", total, "pass ipe * epochs * ipe_scale")
    curve = schedules.momentum if kind == "linear" else schedules.momentum_cosine
    return partial(curve, start=start, final=final, total=int(total))


def _check_momentum(name: str, value: Any) -> None:
    if not is_number(value):
        fail("EMA", name, "be a number", type(value).__name__, "pass a float", TypeError)
    if not 0.0 <= value <= 1.0:
        fail("EMA", name, "lie in [0, 1]", value, "0.996 to 1 is usual")


def _check_alone(with_: str = "decay", **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            fail("EMA", name, f"be left out with {with_}", value, f"choose one of {name} and {with_}")


def _check_names(dtype: torch.dtype | None, form: str) -> None:
    if dtype not in (None, torch.bfloat16, torch.float16):
        fail("EMA", "shadow_dtype", "be bfloat16, float16 or None", dtype, "pass the dtype of autocast", TypeError)
    if form not in FORMS:
        fail("EMA", "form", f"be one of {', '.join(FORMS)}", repr(form), "leave it out for lerp")
