"""The tensors of one parameter group, checked once: later steps only look whether they are still the same."""

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, strided

from jepa_kernels._core.check import fail
from jepa_kernels._core.select import FLOATS
from jepa_kernels.lists import PLAIN, same_layout, tensors
from jepa_kernels.ops.adamw_ema.check import OP, Checked, Lists, check_overlap, check_partner, checked
from jepa_kernels.ops.adamw_ema.op import filled, written

Grads = Sequence[Tensor | None]
ENTRIES = {"steps": "step", "exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"}  # as torch.optim.AdamW names them


class Partners(NamedTuple):
    """What follows a parameter."""

    targets: Tensor | None = None
    online_shadow: Tensor | None = None
    target_shadow: Tensor | None = None


ALONE = Partners()


class Members(NamedTuple):
    """The parameters of a group, their partners and their states: all but the gradients."""

    params: Sequence[Tensor]
    partners: Sequence[Partners]
    states: Sequence[dict[str, Any]]

    def lists(self, grads: Grads) -> dict[str, Any]:
        """As the op takes them; None for a list of nothing."""
        found: dict[str, Any] = dict(params=self.params, grads=grads)
        found |= {name: [state.get(key) for state in self.states] for name, key in ENTRIES.items()}
        for i, name in enumerate(Partners._fields):
            values = [p[i] for p in self.partners]
            found[name] = None if all(v is None for v in values) else values
        return {name: found[name] for name in Lists._fields}


class Plan:
    """One group's lists, ready for the op."""

    def __init__(self, names: Sequence[str], members: Members, grads: Grads):
        given = members.lists(grads)
        self.names, self.kept = names, _kept(grads)
        self.members = [*members.params, *members.partners, *_entries(members)]
        self.tensors: Checked = checked(names, **given)
        self.lists = filled(self.tensors)
        self.device = self.lists.params[0].device if self.lists.params else None
        self.written = written(given)
        originals = [t for values in given.values() for t in values or () if t is not None and type(t) not in PLAIN]
        self.shards = [(t, t._local_tensor) for t in originals if hasattr(t, "_local_tensor")]
        self.places = self._places()

    def fits(self, members: Members, grads: Grads) -> bool:
        """Whether these are the tensors that were checked, where they were, with gradients of the same parameters."""
        now = [*members.params, *members.partners, *_entries(members)]
        return (
            len(now) == len(self.members)
            and all(map(is_, now, self.members))
            and all(t._local_tensor is local for t, local in self.shards)  # type: ignore[attr-defined]
            and _kept(grads) == self.kept
            and self._places() == self.places
        )

    def take(self, grads: Grads) -> None:
        """The gradients of this step."""
        local = [g if g is None or type(g) in PLAIN else self._shard(i, g) for i, g in enumerate(grads)]
        for name, p, g in zip(self.names, self.lists.params, local, strict=True):
            if g is None or (g.dtype in FLOATS and g.device == p.device and g.layout is strided and same_layout(g, p)):
                continue
            check_partner(p, g, "grads", name)
        self.tensors["grads"] = local
        empty = self.lists.grads
        self.lists = self.lists._replace(grads=[e if g is None else g for e, g in zip(empty, local, strict=True)])

    def _shard(self, i: int, grad: Any) -> Tensor:
        placements = getattr(self.members[i], "placements", None)
        if getattr(grad, "placements", None) != placements:
            what, remedy = f"the grad of {self.names[i]}", "redistribute it as its parameter is"
            fail(OP, what, f"be placed as {placements}", getattr(grad, "placements", type(grad).__name__), remedy)
        return tensors(OP, "grads", [grad])[0]  # type: ignore[return-value]

    def _places(self) -> list[int]:
        fixed = [values for name, values in zip(Lists._fields, self.lists, strict=True) if name != "grads"]
        return [x for values in fixed for t in values for x in (t.data_ptr(), t.numel())]


def _entries(members: Members) -> list[Any]:
    return [state.get(key) for state in members.states for key in ENTRIES.values()]


def _kept(grads: Grads) -> list[bool]:
    return [g is not None for g in grads]


def check_overlap_of(plans: Sequence[Plan]) -> None:
    """No tensor of one group lies in the memory of another, be it of the same or of another group."""
    joined: Checked = {name: [] for name in Lists._fields}
    for plan in plans:
        for name, values in plan.tensors.items():
            joined[name] += values or [None] * len(plan.names)
    check_overlap(joined, [name for plan in plans for name in plan.names])
