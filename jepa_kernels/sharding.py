"""What is asked of DTensors: updating the local shards is the whole update where all lists are cut alike."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jepa_kernels._core.check import fail


def check_sharding(op: str, lists: Sequence[Sequence[Any]], names: Callable[[], dict[str, list[str]]]) -> None:
    """Each target and its partners in the other lists: plain tensors, or DTensors of one mesh and equal placements."""
    target, *others = lists
    for role, partners in zip(("online", "shadow"), others, strict=True):
        for i, (t, other) in enumerate(zip(target, partners, strict=False)):
            if layout(t) != layout(other) and other.numel():
                refuse(op, names()["target"][i], names()[role][i], layout(t), layout(other))


def layout(t: Any) -> tuple[Any, Any] | None:
    """Mesh and placements of a DTensor; None of a plain tensor."""
    return (t.device_mesh, t.placements) if hasattr(t, "placements") else None


def refuse(op: str, target: str, name: str, wanted: Any, found: Any) -> NoReturn:
    """Say how the layouts of a tensor and of its partner `name` differ."""
    if wanted is None or found is None:
        plain, sharded = "be a plain tensor", "be a DTensor"
        requirement, actual = (plain, "a DTensor") if wanted is None else (sharded, "a plain tensor")
        fail(op, name, f"{requirement} as {target}", actual, "shard both networks alike")
    what = "mesh" if wanted[0] != found[0] else "placements"
    a, b = (x[what == "placements"] for x in (wanted, found))
    fail(op, name, f"have the {what} {a} of {target}", b, "shard both networks alike")
