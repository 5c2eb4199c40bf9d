"""The tensors of one parameter group, checked once: later steps only look whether they are still the same."""

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor

from jepa_kernels._core.check import PLAIN, fail
from jepa_kernels.chunks import read
from jepa_kernels.lists import tensors
from jepa_kernels.ops.adamw_ema.check import OP, Checked, Lists, check_overlap, check_partner, checked
from jepa_kernels.ops.adamw_ema.op import Table, written

Grads = Sequence[Tensor | None]
State = Mapping[Tensor, dict[str, Any]]
ENTRIES = {"steps": "step", "exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"}  # as torch.optim.AdamW names them
NOTHING: dict[str, Any] = {}


class Partners(NamedTuple):
    """What follows a parameter."""

    targets: Tensor | None = None
    online_shadow: Tensor | None = None
    target_shadow: Tensor | None = None


ALONE = Partners()


class Plan:
    """One group's lists, ready for the op."""

    def __init__(
        self, names: Sequence[str], params: Sequence[Tensor], partners: Sequence[Partners], state: State, grads: Grads
    ):
        given: dict[str, Any] = dict(params=params, grads=grads)
        states = [state.get(p, NOTHING) for p in params]
        given |= {name: [entries.get(key) for entries in states] for name, key in ENTRIES.items()}
        given |= {name: _unless_none([p[i] for p in partners]) for i, name in enumerate(Partners._fields)}
        self.names, self.params, self.state = names, list(params), _entries(params, state)
        self.table = Table(checked(names, **{name: given[name] for name in Lists._fields}))
        self.kept = _kept(grads)
        lists = self.table.lists
        self.device = lists.params[0].device if self.params else None
        self.written = written(given)
        self.shards = [(t, t._local_tensor) for t in self.written if hasattr(t, "_local_tensor")]
        self.places = self._places()
        self.passed: Any = None  # gradients, by `chunks.read`

    def fits(self, params: Sequence[Tensor], state: State, grads: Grads) -> bool:
        """Whether these are the tensors that were checked, where they were, with gradients of the same parameters."""
        return (
            _same(params, self.params)
            and _same(_entries(params, state), self.state)
            and _kept(grads) == self.kept
            and all(t._local_tensor is local for t, local in self.shards)  # type: ignore[attr-defined]
            and self._places() == self.places
        )

    def take(self, grads: Grads) -> None:
        """The gradients of this step."""
        local = [g if g is None or type(g) in PLAIN else self._shard(i, g) for i, g in enumerate(grads)]
        self.table.take(local)
        known = read([self.table.lists.grads], plain=True)
        negative = any(g.is_neg() for g in self.table.lists.grads)  # which is not read
        if known is not None and known == self.passed and not negative:
            return
        for p, g, name in zip(self.table.lists.params, local, self.names, strict=True):
            if g is not None:
                check_partner(p, g, "grads", name)
        self.passed = known

    @property
    def known(self) -> Any:
        """Of all lists, by `chunks.read`; None where it is not known of each."""
        return None if self.passed is None or isinstance(self.places, list) else (self.places, self.passed)

    def _shard(self, i: int, grad: Any) -> Tensor:
        placements = getattr(self.params[i], "placements", None)
        if getattr(grad, "placements", None) != placements:
            what, remedy = f"the grad of {self.names[i]}", "redistribute it as its parameter is"
            fail(OP, what, f"be placed as {placements}", getattr(grad, "placements", type(grad).__name__), remedy)
        return tensors(OP, "grads", [grad])[0]  # type: ignore[return-value]

    def _places(self) -> Any:
        """Where all but the gradients lies, and how: what the table knows is true where this is equal."""
        lists = self.table.lists._replace(grads=[])
        return read(lists, plain=True) or [x for values in lists for t in values for x in (t.data_ptr(), t.numel())]


def check_overlap_of(plans: Sequence[Plan]) -> None:
    """No tensor of one group lies in the memory of another, be it of the same or of another group."""
    joined: Checked = {name: [] for name in Lists._fields}
    for plan in plans:
        for name, values in plan.table.tensors.items():
            joined[name] += values or [None] * len(plan.names)
    check_overlap(joined, [name for plan in plans for name in plan.names])


def _entries(params: Sequence[Tensor], state: State) -> list[Any]:
    return [x for p in params for x in state.get(p, NOTHING).values()]


def _kept(grads: Grads) -> list[bool]:
    return [g is not None for g in grads]


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _unless_none(values: list[Any]) -> list[Any] | None:
    return None if all(v is None for v in values) else values
