"""What is asked of DTensors: an update of local shards is the whole update where both are cut alike."""

from typing import Any

from torch import Tensor

from jepa_kernels._core.check import fail


def check_sharding(op: str, name: str, target: Tensor, role: str, other: Tensor) -> None:
    """Two plain tensors, or two DTensors of one mesh and the same placements."""
    argument, cut = f"the {role} tensor of {name}", "shard both networks alike"
    a, b = _layout(target), _layout(other)
    if (a is None) != (b is None):
        kinds = "a plain tensor", "a DTensor"
        fail(op, argument, f"be {kinds[a is not None]}", kinds[b is not None], cut)
    if a is None or b is None or a == b:
        return
    if a[0] != b[0]:
        fail(op, argument, f"be on the mesh {a[0]}", b[0], cut)
    fail(op, argument, f"have placements {a[1]}", b[1], f"{cut}, or redistribute one")


def _layout(t: Any) -> tuple[Any, Any] | None:
    return (t.device_mesh, t.placements) if hasattr(t, "placements") else None
