"""What is asked of DTensors: updating the local shards is the whole update where all lists are cut alike."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jepa_kernels._core.check import fail


def check_sharding(op: str, lists: Sequence[Sequence[Any]], names: Callable[[], dict[str, list[str]]]) -> None:
    """Each target and its partners in the other lists: plain tensors, or DTensors of one mesh and equal placements."""
    target, *others = lists
    for role, partners in zip(("online", "shadow"), others, strict=True):
        for i, (t, other) in enumerate(zip(target, partners, strict=False)):
            if _layout(t) != _layout(other) and other.numel():
                _refuse(op, names()["target"][i], names()[role][i], _layout(t), _layout(other))


def _layout(t: Any) -> tuple[Any, Any] | None:
    return (t.device_mesh, t.placements) if hasattr(t, "placements") else None


def _refuse(op: str, target: str, name: str, wanted: Any, found: Any) -> NoReturn:
    if wanted is None or found is None:
        plain, sharded = "be a plain tensor", "be a DTensor"
        requirement, actual = (plain, "a DTensor") if wanted is None else (sharded, "a plain tensor")
        fail(op, name, f"{requirement} as {target}", actual, "shard both networks alike")
    what = "mesh" if wanted[0] != found[0] else "placements"
    a, b = (layout[what == "placements"] for layout in (wanted, found))
    fail(op, name, f"have the {what} {a} of {target}", b, "shard both networks alike")
