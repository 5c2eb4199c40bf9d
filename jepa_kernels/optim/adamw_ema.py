"""AdamW, the average of the weights that it moves and low-precision copies of both, as one optimizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from jepa_kernels._core.check import fail, is_number
from jepa_kernels.ops.adamw_ema.check import Options, check_factor, check_options
from jepa_kernels.ops.adamw_ema.op import update
from jepa_kernels.optim.clip import clipped_scale, norm_of
from jepa_kernels.optim.plan import ALONE, Partners, Plan, check_overlap_of

OP = "AdamWEMA"
Given = Iterable[Tensor | None] | Mapping[Tensor, Tensor] | None


class AdamWEMA(Optimizer):
    """AdamW, the exponential moving average of its weights and low-precision copies of both, in one pass over memory.

    The step is that of `jepa_kernels.adamw_ema`, which states the equations: 36 bytes of memory traffic a parameter
    and 2 for each shadow, where fused AdamW, an EMA and two casts take 52. It is a `torch.optim.Optimizer` in every
    respect: groups, schedulers, closures, hooks, GradScaler; its state_dict and torch.optim.AdamW's load into each
    other. Nothing waits for the device.

    params: as torch.optim takes them: fp32 parameters, (name, parameter) pairs, or groups. A group may set lr, betas,
        eps, weight_decay, momentum, max_grad_norm, clip, maximize and capturable for itself.
    target_params: fp32 tensors of the same shapes that follow the parameters, in the order of `params` (None: no
        target), or a dict {parameter: target} that may hold other keys too. A group may carry "target_params" itself.
    lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; no amsgrad.
    momentum: of the average, in [0, 1]: target <- momentum * target + (1 - momentum) * parameter.
    shadow: (online, target), each a list or dict as target_params is, of bf16 or fp16 tensors that get copies of the
        new parameters and targets; a group may carry "shadow" itself. A parameter without a gradient takes that of
        its online shadow, which the forward pass used in its place.
    max_grad_norm: gradients are scaled down to this norm as torch.nn.utils.clip_grad_norm_ does, on their way into
        the update: `.grad` stays as it is. Groups of the same `clip` (a name) that have a max_grad_norm share one norm;
        it is kept in `grad_norms[name]`.
    capturable: as in torch.optim: needed to capture a step in a CUDA graph; pass lr and momentum as 0-dim tensors on
        the device to change them between replays. On a GPU the step counts lie on the device in any case.

    A parameter without a gradient stays, and so does its state; its target still moves. So does every target on a step
    that GradScaler skips for an infinite gradient. States are made when a parameter is added.
    Raises ValueError and TypeError, naming the tensor, before anything is written.
    Source: AdamW (arXiv:1711.05101) algorithm 2; I-JEPA (arXiv:2301.08243) section 3.
    """

    _constructing = False  # groups are then compared with each other once, at the end
    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf

    def __init__(
        self,
        params: Any,
        target_params: Given = None,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        momentum: float | Tensor = 0.996,
        shadow: tuple[Given, Given] = (None, None),
        max_grad_norm: float | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ):
        defaults: dict[str, Any] = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum, clip="all"
        )
        defaults |= dict(max_grad_norm=max_grad_norm, maximize=maximize, capturable=capturable)
        _options(defaults)
        self.grad_norms: dict[str, Tensor] = {}
        self._pair({})
        self._constructing = True
        super().__init__(_with_partners(params, target_params, shadow), defaults)
        self._constructing = False
        check_overlap_of([self._plan(i, [None] * len(g["params"])) for i, g in enumerate(self.param_groups)])

    @property
    def targets(self) -> dict[Tensor, Tensor | None]:
        """{target: its shadow, or None} of what steps move, beside the parameters."""
        return {p.targets: p.target_shadow for p in self._partners.values() if p.targets is not None}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with "target_params" and "shadow" of its own where it has any."""
        if not isinstance(param_group, dict) or isinstance(param_group.get("params"), set):
            return super().add_param_group(param_group)  # which says what is wrong
        group = {**param_group, "params": _items(param_group["params"])}
        targets, shadow = group.pop("target_params", None), group.pop("shadow", (None, None))
        params = [_tensor(item) for item in group["params"]]
        columns = _aligned("target_params", params, targets), *_both(params, shadow)
        _options({**self.defaults, **group})
        before = self._partners
        self._pair(before | {p: Partners(*row) for p, *row in zip(params, *columns, strict=True)})
        try:
            super().add_param_group(group)
            if self._constructing:
                self._plan(len(self.param_groups) - 1, [None] * len(params))
            else:
                self._planned([[None] * len(g["params"]) for g in self.param_groups])
        except Exception:
            self.param_groups = [g for g in self.param_groups if g is not group]
            self._pair(before)
            raise
        self._complete_states()

    def _pair(self, partners: dict[Tensor, Partners]) -> None:
        self._partners = partners
        self._shadows = {p: x.online_shadow for p, x in partners.items() if x.online_shadow is not None}
        self._plans: list[Plan] = []

    def _complete_states(self) -> None:
        """Zeros for what is trained and has no state; the step counts of a loaded state to where kernels read them."""
        for p in [p for group in self.param_groups for p in group["params"]]:
            state = self.state.get(p)
            if state:
                device = getattr(p, "_local_tensor", p).device
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(device)
            elif p.requires_grad:
                self.state[p] = _new_state(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update parameters, targets and shadows. `closure` computes loss and gradients anew; its loss is returned."""
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch._disable_dynamo  # addresses are compared, which no graph can hold
    def _update(self) -> None:
        grads = [self._grads(group["params"]) for group in self.param_groups]
        self._prepare(grads)
        devices = [plan.device for plan in self._plans]
        options = [_options(group, device) for group, device in zip(self.param_groups, devices, strict=True)]
        found_inf = self._found_inf()
        scales = self._scales(grads)
        for plan, device, group_options, scale in zip(self._plans, devices, options, scales, strict=True):
            if device is None:
                continue
            factors = (_factor("grad_scale", scale, device), _factor("found_inf", found_inf, device))
            update(plan.table.tensors, group_options, *factors, table=plan.table, known=plan.known)
            plan.table.release()
            torch.autograd.graph.increment_version(plan.written)

    def _grads(self, params: list[Tensor]) -> list[Tensor | None]:
        """Of each parameter its own gradient, or its online shadow's."""
        if not self._shadows:
            return [p.grad for p in params]
        return [self._either_grad(p, self._shadows.get(p)) for p in params]

    def _either_grad(self, p: Tensor, shadow: Tensor | None) -> Tensor | None:
        if shadow is None or shadow.grad is None:
            return p.grad
        if p.grad is not None:
            remedy = "use one of them in the forward pass"
            fail(OP, f"one of {self._name(p)} and its online shadow", "have a gradient", "both", remedy)
        return shadow.grad

    def _prepare(self, grads: list[list[Tensor | None]]) -> None:
        """Plans of the present tensors. All checks of tensors are here, before the first write."""
        params = [group["params"] for group in self.param_groups]
        states = [self.state] * len(params)
        if len(self._plans) != len(params) or not all(map(Plan.fits, self._plans, params, states, grads)):
            for group, present in zip(self.param_groups, grads, strict=True):
                for p, grad in zip(group["params"], present, strict=True):
                    if grad is not None and not self.state.get(p):
                        self.state[p] = _new_state(p)
            self._plans = self._planned(grads)
        for plan, present in zip(self._plans, grads, strict=True):
            plan.take(present)

    def _planned(self, grads: list[list[Tensor | None]]) -> list[Plan]:
        plans = [self._plan(i, present) for i, present in enumerate(grads)]
        check_overlap_of(plans)
        return plans

    def _plan(self, i: int, grads: list[Tensor | None]) -> Plan:
        params = self.param_groups[i]["params"]
        return Plan(self._names(i), params, [self._partners.get(p, ALONE) for p in params], self.state, grads)

    def _names(self, i: int) -> list[str]:
        group = self.param_groups[i]
        return group.get("param_names") or [f"param_groups[{i}]['params'][{j}]" for j in range(len(group["params"]))]

    def _name(self, p: Tensor) -> str:
        groups = enumerate(self.param_groups)
        return next(n for i, g in groups for n, x in zip(self._names(i), g["params"], strict=True) if x is p)

    def _found_inf(self) -> Tensor | None:
        """What GradScaler found. It looks at the parameters' own gradients alone."""
        found = getattr(self, "found_inf", None)
        if found is not None and any(shadow.grad is not None for shadow in self._shadows.values()):
            actual = "a GradScaler, which sees the parameters' own gradients alone"
            fail(OP, "the gradients of online shadows", "be unscaled", actual, "use bf16 shadows, and no scaler")
        return found

    def _scales(self, grads: list[list[Tensor | None]]) -> list[Tensor | None]:
        """What each group's gradients are divided by: GradScaler's scale, and what brings them to max_grad_norm."""
        scale = getattr(self, "grad_scale", None)
        clipped: dict[str, list[Tensor]] = {}
        for group, present in zip(self.param_groups, grads, strict=True):
            if group["max_grad_norm"] is not None:
                clipped.setdefault(group["clip"], []).extend(g for g in present if g is not None)
        norms = {name: norm_of(found) for name, found in clipped.items() if found}
        self.grad_norms = norms if scale is None else {name: norm / scale for name, norm in norms.items()}
        return [clipped_scale(self.grad_norms.get(g["clip"]), g["max_grad_norm"], scale) for g in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of parameters and of their online shadows."""
        super().zero_grad(set_to_none)
        for shadow in self._shadows.values():
            if set_to_none:
                shadow.grad = None
            elif shadow.grad is not None:
                shadow.grad.detach_().zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or torch.optim.AdamW saved; a group keeps its own value of what the saved one lacks."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            fail(OP, "a loaded group", "have amsgrad=False", "True", "continue it with torch.optim.AdamW")
        for state in state_dict["state"].values():
            if not state.keys() >= {"step", "exp_avg", "exp_avg_sq"}:
                actual = ", ".join(map(str, state)) or "nothing"
                fail(OP, "a loaded state", "hold step, exp_avg and exp_avg_sq", actual, "load that of an AdamW")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_partners": self._partners}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = self.__dict__.get("param_groups") or [{}] * len(state["param_groups"])
        super().__setstate__(state)
        self._pair(self._partners)
        self.grad_norms = {}
        for group, before in zip(self.param_groups, own, strict=True):
            for key, default in self.defaults.items():
                group.setdefault(key, before.get(key, default))
        self._complete_states()


def _new_state(p: Tensor) -> dict[str, Tensor]:
    step = torch.zeros((), dtype=torch.float32, device=getattr(p, "_local_tensor", p).device)
    return dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))


def _factor(name: str, value: Tensor | None, device: torch.device) -> Tensor | None:
    return check_factor(name, None if value is None else value.to(device, non_blocking=True), device)


def _options(group: dict[str, Any], device: torch.device | None = None) -> Options:
    """A group's options, checked."""
    options = Options(*(group[name] for name in Options._fields))
    check_options(options, device)
    most = group["max_grad_norm"]
    if most is not None and not (is_number(most) and most > 0):
        fail(OP, "max_grad_norm", "be a positive number or None", repr(most), "1.0 is usual")
    return options


def _with_partners(params: Any, targets: Given, shadow: tuple[Given, Given]) -> Any:
    """The groups, each with its share of the targets and shadows."""
    if isinstance(params, Tensor):
        return params  # which torch.optim refuses
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [dict(params=groups)]
    groups = [{**group, "params": _items(group["params"])} for group in groups]
    flat = [_tensor(item) for group in groups for item in group["params"]]
    columns = [_aligned("target_params", flat, targets), *_both(flat, shadow)]
    if all(x is None for column in columns for x in column):
        return groups
    if any("target_params" in group or "shadow" in group for group in groups):
        fail(OP, "targets and shadows", "be given for all groups or by each", "both", "leave one of them out")
    start = 0
    for group in groups:
        stop = start + len(group["params"])
        group["target_params"], *group["shadow"] = (column[start:stop] for column in columns)
        start = stop
    return groups


def _items(params: Any) -> Any:
    if isinstance(params, Tensor):
        return [params]
    return params if isinstance(params, set) else list(params)  # torch.optim refuses a set


def _tensor(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item


def _both(params: Sequence[Tensor], shadow: Any) -> tuple[list[Tensor | None], list[Tensor | None]]:
    if not isinstance(shadow, (tuple, list)) or len(shadow) != 2:
        fail(OP, "shadow", "be a pair (online, target)", type(shadow).__name__, "pass None for either", TypeError)
    return _aligned("the online shadow", params, shadow[0]), _aligned("the target shadow", params, shadow[1])


def _aligned(role: str, params: Sequence[Tensor], given: Given) -> list[Tensor | None]:
    """A tensor or None for each parameter."""
    if given is None:
        return [None] * len(params)
    if not isinstance(given, Iterable):
        fail(OP, role, "be tensors or a dict", type(given).__name__, "pass module.parameters()", TypeError)
    if isinstance(given, Mapping):
        return [given.get(p) for p in params]
    found = list(given)
    if len(found) != len(params):
        fail(OP, role, f"hold {len(params)} tensors", len(found), "pass one (or None) for each parameter, in order")
    return found
