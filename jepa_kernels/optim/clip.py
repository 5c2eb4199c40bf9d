"""The norm of all gradients that are clipped together, over shards too, and the factor that clips them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import PLAIN
from jepa_kernels.ops.grad_norm.op import grad_norm


def norm_of(grads: Sequence[Tensor]) -> Tensor:
    """fp32 [], the norm of plain gradients and of DTensors, whose shards are summed over their meshes.

    Replicas count once. Every rank of a mesh must call it.
    """
    if not any(hasattr(g, "_local_tensor") for g in grads):
        return grad_norm(grads)
    parts: dict[Any, list[Tensor]] = {}
    for g in grads:
        key = None if type(g) in PLAIN else (g.device_mesh, _sharded_dims(g))  # type: ignore[attr-defined]
        parts.setdefault(key, []).append(g)
    squares = [_summed(grad_norm(part).double().square(), key) for key, part in parts.items()]
    return torch.stack(squares).sum().sqrt().float()


def _sharded_dims(g: Any) -> tuple[int, ...]:
    return tuple(i for i, placement in enumerate(g.placements) if placement.is_shard())


def _summed(square: Tensor, key: Any) -> Tensor:
    if key is not None:
        mesh, dims = key
        for dim in dims:
            torch.distributed.all_reduce(square, group=mesh.get_group(dim))
    return square


def clipped_scale(norm: Tensor | None, most: float | None, scale: Tensor | None) -> Tensor | None:
    """What gradients are divided by: `scale`, times what brings their norm (without scale) to at most `most`.

    The reciprocal of torch.nn.utils.clip_grad_norm_'s factor, `most` / (norm + 1e-6) but at most 1.
    """
    if norm is None or most is None:
        return scale
    factor = ((norm + 1e-6) / most).clamp(min=1.0)
    return factor if scale is None else factor * scale
