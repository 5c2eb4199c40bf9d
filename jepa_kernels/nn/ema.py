"""The target network: a moving average of the online one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.nn.momentum import chosen
from jepa_kernels.nn.pairing import Pair, Pairing, unwrap
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
    momentum: in [0, 1], at step 0; default 0.996. final_momentum: at total_steps and after; default 1 where
        total_steps is given.
    schedule: "linear", "cosine" or "constant"; None: linear where one of these two is given, else constant.
    shadow_dtype: bf16 or fp16: the update also writes low-precision copies of the weights that autocast casts, and
        `forward` under autocast to that dtype reads them: the same bits, no weight cast (2 bytes a parameter more).
        Writes to the target by others are seen, but for those through `.data`: call `refresh` after them.
    form: the roundings, see `ema_update`.
    decay, min_decay, update_after_step, use_warmup, warmup_gamma, warmup_power, device, exclude_buffers: as of
        `timm.utils.ModelEmaV3`, which takes all up to exclude_buffers by position too, in this order; model: online.
        With any of its own names (dtype and stochastic_rounding too; not device, foreach and exclude_buffers) its
        formulas replace the schedule, with momentum as its decay (default 0.9999), the target is in eval mode, and
        fp32 buffers are averaged unless exclude_buffers. Else the target keeps online's mode, as upstream's do, and
        exclude_buffers=False averages them.
    dtype: None or fp32, which the target of any network is; fp32: its buffers too. What timm does with foreach,
        stochastic_rounding and its seed is nothing to an fp32 target: accepted, with no effect.

    .module: the target, fp32, without gradient; shard it with `fully_shard` as the online network: an update is of
        the local shards, with no communication.
    .step: number of updates; part of the state dict.

    From the first update on, until the next `.to` or load of this module, both networks' tensors are held by more than
    Python: `torch.utils.swap_tensors` refuses them, and with it conversions of the online network under
    `torch.__future__.set_swap_module_params_on_conversion(True)` that was not set before.

    A deep copy follows the same online network, or its copy where both are copied as parts of one object.
    torch.compile leaves `update` out of its graphs: a step with it breaks in two, and is not compiled again.

    Raises ValueError and TypeError for arguments and networks that do not fit, before the first write.
    """

    def __init__(
        self,
        online: nn.Module | None = None,
        momentum: float | None = None,
        min_decay: float | None = None,
        update_after_step: int | None = None,
        use_warmup: bool | None = None,
        warmup_gamma: float | None = None,
        warmup_power: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool | None = None,
        stochastic_rounding_seed: int | None = None,
        foreach: bool = True,
        exclude_buffers: bool | None = None,
        *,
        final_momentum: float | None = None,
        total_steps: int | None = None,
        schedule: str | None = None,
        shadow_dtype: torch.dtype | None = None,
        form: str = "lerp",
        decay: float | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_names(shadow_dtype, form, dtype)
        timm: dict[str, Any] = dict(decay=decay, model=model, min_decay=min_decay, update_after_step=update_after_step)
        timm |= dict(use_warmup=use_warmup, warmup_gamma=warmup_gamma, warmup_power=warmup_power, dtype=dtype)
        timm |= dict(stochastic_rounding=stochastic_rounding, stochastic_rounding_seed=stochastic_rounding_seed)
        own = dict(final_momentum=final_momentum, total_steps=total_steps, schedule=schedule)
        self._momentum, self.decay = chosen(momentum, own, timm)
        self.form, self.step = form, 0
        self.average_buffers = self.decay is not None if exclude_buffers is None else not exclude_buffers
        self._followed = Followed(unwrap(_given(online, model)))
        self.module = _target(self._followed.network, device, dtype)
        if self.decay is not None:
            self.module.eval()
        self._shadow = None if shadow_dtype is None else Shadow(self.module, shadow_dtype)
        self._pairing: Pairing | None = None
        self.register_load_state_dict_post_hook(_after_load)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The target's output; under autocast to shadow_dtype from the low-precision copies, with the same bits."""
        with self.cast_weights():
            return self.module(*args, **kwargs)

    @contextmanager
    def cast_weights(self) -> Iterator[None]:
        """Within it, if autocast is on to shadow_dtype: the target's low-precision copies in place of its weights."""
        if self._shadow is None or not self._shadow.serves():
            yield
            return
        if not torch.compiler.is_compiling():  # compiled code trusts the last update, load or move
            self._shadow.refresh()
        with self._shadow.lent():
            yield

    def refresh(self) -> None:
        """Round the low-precision copies anew.

        Needed after a write that PyTorch does not count, through `.data` or by other libraries, and, where the forward
        is compiled, after any write but an update, a load_state_dict or a `.to` of this module.
        """
        if self._shadow is not None:
            self._shadow.renew()

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
        self.apply_update_(self._followed.network if online is None else online, self.get_decay(step))
        self.step = (self.step if step is None else step) + 1

    @torch._disable_dynamo
    @torch.no_grad()
    def apply_update_(self, model: nn.Module, decay: float | Tensor) -> None:
        """Move the target towards `model` with this momentum, a float or a 0-dim tensor; 0.0 copies, as `set`."""
        pairing = self._paired(unwrap(model))
        copied = pairing.copied()  # checked before the first write
        if not isinstance(decay, Tensor) and decay == 0.0:
            return self._copy([*pairing.moving().values(), *copied])
        pairing.update(decay, self.form)
        if self._shadow is not None:
            self._shadow.written()
        for target, online in copied:
            target.copy_(online)

    def pairs(self) -> dict[Tensor, Tensor]:
        """{online parameter: its target} of what updates move, the target_params of an `AdamWEMA` (see `moved_by`)."""
        if self.form != "lerp":
            fail("EMA", "form", "be lerp for an AdamWEMA", repr(self.form), "use another optimizer and update()")
        return {online: target for target, online in self._paired(self._followed.network).trained()}

    def shadow_copies(self) -> dict[Tensor, Tensor]:
        """{online parameter: the low-precision copy of its target}, the second shadow of an `AdamWEMA`."""
        copies: Mapping[Any, Tensor] = {} if self._shadow is None else self._shadow.copies
        trained = self._paired(self._followed.network).trained()
        return {online: copies[target] for target, online in trained if target in copies}

    @contextmanager
    def moved_by(self, optimizer: jk.AdamWEMA, momentum: float | Tensor | None = None) -> Iterator[None]:
        """Around the step of an optimizer that moves the target itself, instead of `update`:

            optimizer = AdamWEMA(net.parameters(), ema.pairs(), shadow=(None, ema.shadow_copies()))
            with ema.moved_by(optimizer):
                optimizer.step()

        Its groups get the momentum, which the optimizer checks (None: the schedule's, and the step is counted, as by
        `update`); buffers are copied or averaged after it. Raises ValueError where it lacks the target of a trained
        parameter, or the copy of one.
        """
        pairing = self._paired(self._followed.network)
        copied, averaged = pairing.copied(), pairing.averaged().values()
        pairing.check_moved_by(optimizer.targets)
        value = self.get_decay() if momentum is None else momentum
        for group in optimizer.param_groups:
            group["momentum"] = value
        yield
        if self._shadow is not None:
            self._shadow.written()
        if averaged:
            jk.ema_update([target for target, _ in averaged], [online for _, online in averaged], value)
        self._copy(copied)
        self.step += momentum is None

    def set(self, model: nn.Module) -> None:
        """Copy every parameter and buffer of `model`, frozen ones too."""
        self._copy(self._paired(unwrap(model)).all())

    @torch.no_grad()
    def _copy(self, pairs: list[Pair]) -> None:
        for target, online in pairs:
            target.copy_(online)
        if self._shadow is not None:
            self._shadow.refresh()

    def _paired(self, online: nn.Module) -> Pairing:
        """The pairing with `online`, and the copies up to date with what an update does not write."""
        if self._shadow is not None:
            self._shadow.refresh()
        if self._pairing is None or not self._pairing.holds(online):
            _given(online, None)  # names what is no network, a step by position
            if self._shadow is not None:
                self._shadow.renew()
            self._pairing = Pairing(online, self.module, self._shadow, averaged=self.average_buffers)
        return self._pairing

    def check_sync(self, group: Any = None) -> None:
        """Raise ValueError, on every rank of the group, unless their targets are equal bit for bit.

        It names the first parameter or buffer that differs. Sharded tensors are compared where they are replicated.
        Collective: reads every tensor once, and is no part of a step. Without torch.distributed it does nothing.
        """
        check_same("EMA", self.module, group)

    def _apply(self, fn: Any, recurse: bool = True) -> EMA:
        self._pairing = None  # its table holds on to tensors, which then could not be swapped for others
        super()._apply(fn, recurse)
        self.refresh()
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        self.step = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A state dict of the target network alone, or timm's, leaves the step as it is."""
        self._pairing = None  # as `_apply`
        given = [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]
        names = self.module.state_dict().keys()
        if len(names & set(given)) > len({f"module.{name}" for name in names} & set(given)):
            for name in given:
                state_dict[f"{prefix}module.{name}"] = state_dict.pop(prefix + name)
        state_dict.setdefault(prefix + STEP, self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pairing": None}  # it holds addresses


class Followed:
    """The online network, which is no part of the module: a copy of the average follows it too."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        return Followed(memo.get(id(self.network), self.network))  # or its copy, where they are copied together


def _after_load(ema: EMA, _: Any) -> None:
    ema.refresh()


def _given(online: nn.Module | None, model: nn.Module | None) -> nn.Module:
    if online is not None and model is not None:
        fail("EMA", "online", "be one module", "two, online and model", "pass the network once", TypeError)
    name, network = ("online", online) if model is None else ("model", model)
    if not isinstance(network, nn.Module):
        fail("EMA", name, "be one module", type(network).__name__, "pass the network once", TypeError)
    return network


def _target(online: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    if any(hasattr(m, "reshard") for m in online.modules()):
        remedy = "build the EMA first, then shard online and the EMA's .module alike"
        fail("EMA", "online", "be a whole network", f"a sharded {type(online).__name__}", remedy)
    target = copy.deepcopy(online).requires_grad_(False).to(device, dtype)
    for p in target.parameters():
        if p.dtype in (torch.bfloat16, torch.float16):
            p.data = p.data.float()
    return target


def _check_names(shadow: torch.dtype | None, form: str, dtype: torch.dtype | None) -> None:
    if shadow not in (None, torch.bfloat16, torch.float16):
        fail("EMA", "shadow_dtype", "be bfloat16, float16 or None", shadow, "pass the dtype of autocast", TypeError)
    if form not in FORMS:
        fail("EMA", "form", f"be one of {', '.join(FORMS)}", repr(form), "leave it out for lerp")
    if dtype not in (None, torch.float32):
        remedy = "leave it out: small updates vanish in less, and shadow_dtype writes low-precision copies"
        fail("EMA", "dtype", "be float32 or None", dtype, remedy, TypeError)
