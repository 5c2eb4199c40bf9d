"""Public face of `adamw_ema`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.define import define, implementation
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.lists import observed
from jepa_kernels.ops.adamw_ema import reference
from jepa_kernels.ops.adamw_ema.check import (
    OP,
    STATE,
    Checked,
    Lists,
    Options,
    Scalar,
    check_call,
    check_factor,
    check_options,
)

# On an H200 Triton's was the faster one: docs/tuning/memory_bound.md.
KERNELS = (
    Kernel("triton", dtypes=(torch.float32,)),
    Kernel("cuda", dtypes=(torch.float32,)),
    Kernel("cpu", dtypes=(torch.float32,)),
)

Tensors = Sequence[Tensor | None]


def adamw_ema(
    params: Sequence[Tensor],
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    targets: Tensors | None = None,
    *,
    lr: Scalar,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Scalar = 0.01,
    momentum: Scalar = 1.0,
    online_shadow: Tensors | None = None,
    target_shadow: Tensors | None = None,
    maximize: bool = False,
    grad_scale: Scalar | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Take one AdamW step and move the target weights after it, in place, in one pass over memory.

    t = step + 1, g = grad / grad_scale (negated by maximize), and for each element, in fp32:
        m <- m + (1 - beta1) (g - m)                v <- beta2 v + (1 - beta2) g^2
        p <- (1 - lr weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
        k <- k + (1 - momentum) (p - k)             online_shadow <- p, target_shadow <- k, rounded
    Factors that are the same for all elements are computed in fp64 and rounded once.

    params: fp32 tensors p of any shapes, without gaps in memory; a DTensor counts as its local shard, here as below.
    grads: fp32, bf16 or fp16 of the same shapes, or None for a parameter without a gradient: it stays, as does its
        state, and its target still moves.
    exp_avgs, exp_avg_sqs: fp32 m and v. steps: fp32 [] each. All three are updated, and may be None beside no gradient.
    targets: fp32 k, None where there is no average.
    lr, weight_decay: at least 0; momentum: in [0, 1]. Floats, or 0-dim fp32 or fp64 tensors on the CPU or on the
        parameters' device, where a captured graph reads them anew at each replay.
    online_shadow, target_shadow: bf16 or fp16 tensors (or None) that get copies of the new p and k.
    grad_scale: what the gradients were multiplied by. found_inf: where it is not 0, gradients were not finite: p, m, v
        and steps stay, targets and shadows are still written. Both are 0-dim fp32 on the parameters' device.

    No gradient. Raises ValueError and TypeError, naming the tensor, before the first write.
    Source: AdamW (arXiv:1711.05101) algorithm 2; I-JEPA (arXiv:2301.08243) section 3.
    """
    given: dict[str, Any] = {
        "params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps,
        "targets": [] if targets is None else targets,
        "online_shadow": [] if online_shadow is None else online_shadow,
        "target_shadow": [] if target_shadow is None else target_shadow,
    }  # fmt: skip
    tensors, known = check_call(given)
    options = Options(lr, weight_decay, momentum, betas, eps, maximize)
    device = tensors["params"][0].device if tensors["params"] else None  # type: ignore[union-attr]
    check_options(options, device)
    scale, inf = check_factor("grad_scale", grad_scale, device), check_factor("found_inf", found_inf, device)
    if device is None:
        return
    update(tensors, options, scale, inf, backend, known=known)
    if not torch.compiler.is_compiling():  # a graph that saved an old value must refuse its backward
        torch.autograd.graph.increment_version(written(given))


def update(
    tensors: Checked,
    options: Options,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
    table: "Table | None" = None,
    known: Any = None,
) -> None:
    """One step on lists that were checked.

    table: of these lists, for who steps in eager mode and keeps them: it saves reading a thousand tensors.
    known: what `chunks.read` told of them: so does this.
    """
    first: Any = tensors["params"][0]
    chosen = select(OP, KERNELS, backend, first)
    lr, weight_decay, momentum, betas, eps, maximize = options
    if chosen == "reference":
        values = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, betas=betas, eps=eps, maximize=maximize)
        return reference.forward(**tensors, **values, grad_scale=grad_scale, found_inf=found_inf)  # type: ignore[arg-type]
    arguments = gathered(lr, weight_decay, momentum), grad_scale, found_inf, *betas, eps, maximize
    with torch.no_grad():  # parameters are leaves
        if table is not None and not observed():
            return table.step(chosen, known, *arguments)
        lists = filled(tensors)
        count(lists.steps, found_inf)
        if known is None or chosen == "cpu" or observed():
            _forward(*lists, *arguments, chosen)
        else:
            implementation(OP, "forward", chosen)(*lists, *arguments, known=known)


class Table:
    """A call's lists that stay: the kernel itself gets them, not the dispatcher, and the CPU's reads addresses once.

    Whoever keeps a Table builds a new one where a tensor moved.
    """

    def __init__(self, tensors: Checked):
        self.tensors, self.lists = tensors, filled(tensors)
        self.none = [p.new_empty(0) for p in self.lists.params]
        self.empty = [i for i, p in enumerate(self.lists.params) if p.numel() == 0]
        self.read: Any = None
        self.release()

    def take(self, grads: list[Tensor | None]) -> None:
        """Gradients of the same parameters for the next step."""
        self.tensors["grads"] = grads
        self.lists = self.lists._replace(grads=[e if g is None else g for e, g in zip(self.none, grads, strict=True)])

    def release(self) -> None:
        """Let go of the gradients: their memory is wanted between the steps."""
        self.take([None] * len(self.none))

    def step(self, backend: str, known: Any, *arguments: Any) -> None:
        """Count the steps, then update. known: as `update` has it."""
        if backend != "cpu":
            count(self.lists.steps, arguments[2])
            return implementation(OP, "forward", backend)(*self.lists, *arguments, known=known)
        if self.read is None:
            self.read = implementation(OP, "table", backend)(*self.lists)
        self.read.step(self.lists.grads, *arguments)
        # The CPU's kernel sees no gradient where a rank has no share of one; its count is that of the other ranks.
        given: Any = self.tensors
        count([given["steps"][i] for i in self.empty if given["grads"][i] is not None], arguments[2])


def count(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """One step more, where gradients were finite, for each parameter that has one."""
    counted = [step for step in steps if step.dim() == 0]  # the others are empty
    if not counted:
        return
    if found_inf is None:
        torch._foreach_add_(counted, 1)
    else:  # a tensor for each: as the scalar of all, it would be waited for
        finite: Any = torch.eq(found_inf, 0).float()
        torch._foreach_add_(counted, [finite] * len(counted))


def filled(tensors: Checked) -> Lists:
    """The lists as the torch op takes them. A parameter without a gradient hands in no state."""
    params: list[Any] = tensors["params"]

    def full(name: str, values: list[Tensor | None]) -> list[Tensor]:
        given = [None if name in STATE and g is None else t for t, g in zip(values, tensors["grads"], strict=False)]
        return [p.new_empty(0) if t is None else t for t, p in zip(given, params, strict=False)]

    return Lists(**{name: full(name, values) for name, values in tensors.items()})


def gathered(lr: Scalar, weight_decay: Scalar, momentum: Scalar) -> Tensor:
    """fp64 [3] of the three: on the device where one of them is a tensor there, which is not read, else on the CPU."""
    values = (lr, weight_decay, momentum)
    given = [x for x in values if isinstance(x, Tensor)]
    if not given:
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    place = next((x.device for x in given if x.device.type != "cpu"), given[0].device)
    full = [
        x.reshape(()).to(place, torch.float64)
        if isinstance(x, Tensor)
        else torch.full((), x, dtype=torch.float64, device=place)
        for x in values
    ]
    return torch.stack(full)


def written(given: dict[str, Any]) -> list[Tensor]:
    """What an update writes, but for the steps: DTensors count their versions apart from their shards."""
    lists = [v for k, v in given.items() if k not in ("grads", "steps") and v is not None]
    return [t for tensors in lists for t in tensors if t is not None]


def _fake(*args: Any) -> None:
    return None


_forward = define(
    OP,
    "forward",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] steps, "
    "Tensor(d!)[] targets, Tensor(e!)[] online_shadow, Tensor(f!)[] target_shadow, Tensor scalars, "
    "Tensor? grad_scale, Tensor? found_inf, float beta1, float beta2, float eps, bool maximize, str backend) -> ()",
    _fake,
)
