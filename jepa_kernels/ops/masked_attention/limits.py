"""What single rows of KERNELS can't run, and why."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST = 256  # queries, and keys, of a sequence: what the Hopper kernels hold in shared memory
_capabilities: dict[int, str] = {}  # by device, found once


class Call(NamedTuple):
    """What a row of KERNELS may ask about a call."""

    needs_grad: bool
    needs_lse: bool
    tensors: tuple[Tensor, Tensor, Tensor]  # q, k and v
    lengths: tuple[Any, Any]  # upper bounds of queries and keys in a sequence
    masks: tuple[Any, Any, Any]  # frame_size, key_ranges and rope; None: not given


def gives_no_lse(call: Call) -> str | None:
    return "gives no lse" if call.needs_lse else None


def only_without_grad(call: Call) -> str | None:
    return "its backward may add in any order: taken only when named" if call.needs_grad else None


def hopper(call: Call) -> str | None:
    """The Hopper kernels: whole sequences in shared memory, fetched by tensor maps."""
    capability = _capability(call.tensors[0].get_device())
    if capability != "9.0":
        return f"needs a GPU of compute capability 9.0, got {capability}"
    for name, given in zip(("frame_size", "key_ranges", "rope"), call.masks, strict=True):
        if given is not None:
            return f"takes no {name}"
    for name, length in zip(("queries", "keys"), call.lengths, strict=True):
        if length > LONGEST:
            return f"takes at most {LONGEST} {name} in a sequence, got {length}"
    for name, x in zip("qkv", call.tensors, strict=True):
        if not _mappable(x):
            return f"needs {name} in rows of stride 1 that begin at multiples of 16 bytes, got strides {x.stride()}"
    return None


def _capability(device: int) -> str:
    if device not in _capabilities:
        major, minor = torch.cuda.get_device_capability(device)
        _capabilities[device] = f"{major}.{minor}"
    return _capabilities[device]


# A trace asks once, and can take a string for a constant: see `unavailable` in _core/select.py.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _mappable(x: Tensor) -> bool:
    """A tensor map can describe x, of 2-byte elements. A trace can't see where x begins: the launch copies there."""
    if x.stride(-1) != 1 or (not torch.compiler.is_compiling() and x.storage_offset() % 8):
        return False
    return all(size == 1 or (step > 0 and step % 8 == 0) for size, step in zip(x.shape[:-1], x.stride(), strict=False))
