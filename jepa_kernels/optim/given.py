"""What callers give an optimizer: groups of parameters, and the targets and shadows that follow them, in order."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from jepa_kernels._core.check import fail

OP = "AdamWEMA"
Given = Iterable[Tensor | None] | Mapping[Tensor, Tensor] | None


def with_partners(params: Any, targets: Given, shadow: tuple[Given, Given]) -> Any:
    """The groups, each with its share of the targets and shadows."""
    if isinstance(params, Tensor):
        return params  # which torch.optim refuses
    groups = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [dict(params=groups)]
    groups = [{**group, "params": items_of(group["params"])} for group in groups]
    flat = [tensor_of(item) for group in groups for item in group["params"]]
    columns = [aligned("target_params", flat, targets), *aligned_both(flat, shadow)]
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


def items_of(params: Any) -> Any:
    if isinstance(params, Tensor):
        return [params]
    return params if isinstance(params, set) else list(params)  # torch.optim refuses a set


def tensor_of(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item


def aligned_both(params: Sequence[Tensor], shadow: Any) -> tuple[list[Tensor | None], list[Tensor | None]]:
    if not isinstance(shadow, (tuple, list)) or len(shadow) != 2:
        fail(OP, "shadow", "be a pair (online, target)", type(shadow).__name__, "pass None for either", TypeError)
    return aligned("the online shadow", params, shadow[0]), aligned("the target shadow", params, shadow[1])


def aligned(role: str, params: Sequence[Tensor], given: Given) -> list[Tensor | None]:
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
