"""Argument checks. One pattern for every message: `<op>: <argument> must <requirement>, got <actual>; <remedy>`."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch.compiler import is_compiling, is_dynamo_compiling

from jepa_kernels._core import extension
from jepa_kernels._core.select import FLOATS, short

if TYPE_CHECKING:
    from jepa_kernels.packing import Packing

DENSE = "convert it with .to_dense()"
PLAIN, STRIDED = (Tensor, torch.nn.Parameter), torch.strided
FLOATING, INT64 = (*FLOATS, torch.float64), (torch.int64,)
CHECK_DEVICE_VALUES = os.environ.get("JEPA_KERNELS_CHECK", "0") == "1"


def fail(
    op: str, argument: str, requirement: str, actual: Any, remedy: str, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise `error` with the one message pattern."""
    raise error(f"{op}: {argument} must {requirement}, got {actual}; {remedy}")


def sizes_of(*tensors: str) -> Callable[..., Any]:
    """What the tensors of most calls of an op are to one another; their checks end here, at a tenth of the time.

    sizes_of("M K E f", "B N E g", "M K int64|None contiguous") tells of three, and is called with them. It returns the
    sizes of the letters, (M, K, E, B, N), where all three are plain, strided and on one device, equal letters are equal
    sizes (`S+1`: one more) and types are among those named, small letters being floating types. `...` is any shape; a
    size that only a tensor left out would tell is None.

    Else it returns None, as while compiling or tracing, and without the compiled module: then each argument is looked
    at, and what is wrong is said, if anything is.
    """
    sizes: Callable[..., Any] | None = None

    def of(*given: Any) -> Any:
        nonlocal sizes
        if is_dynamo_compiling() or _get_tracing_state() is not None:  # sizes would be constants
            return None
        if sizes is None:
            module = extension.load()
            sizes = (lambda *_: None) if isinstance(module, str) else module.sizes_of(tensors)
        return sizes(*given)

    return of


def check_tensor(
    op: str,
    argument: str,
    x: Any,
    shape: str,
    *,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
    device: torch.device | None = None,
) -> None:
    """A strided tensor of as many dimensions as `shape` has letters (`"B N E"`), of one of `dtypes`, on `device`.

    float64 passes: no kernel takes it, the reference does (the exact side of every parity check).
    """
    # A plain tensor that fits in every respect: few attributes tell, and most calls end here.
    usual = type(x) in PLAIN and (x.is_cpu or x.is_cuda) and x.dtype in dtypes and x.dim() == shape.count(" ") + 1
    if not (usual and x.layout is STRIDED and not x.is_nested and (device is None or x.device == device)):
        _check_each(op, argument, x, shape, dtypes, device)


def _check_each(
    op: str, argument: str, x: Any, shape: str, dtypes: tuple[torch.dtype, ...], device: torch.device | None
) -> None:
    if not isinstance(x, Tensor):
        fail(op, argument, "be a tensor", type(x).__name__, "convert it with torch.as_tensor", TypeError)
    if type(x) is not Tensor and hasattr(x, "to_local"):
        fail(op, argument, "be a plain tensor", type(x).__name__, "pass x.to_local()", TypeError)
    if x.layout is not STRIDED or x.is_nested:
        actual, remedy = ("a nested tensor", "pack it with jepa_kernels.pack") if x.is_nested else (x.layout, DENSE)
        fail(op, argument, "be a strided tensor", actual, remedy, TypeError)
    if x.device.type not in ("cpu", "cuda", "meta"):
        fail(op, argument, "be on cpu or cuda", x.device, "move it", TypeError)
    if x.dtype not in dtypes:
        names = ", ".join(short(d) for d in dtypes)
        fail(op, argument, f"be of dtype {names}", short(x.dtype), "convert it with .to(dtype)", TypeError)
    if x.dim() != len(shape.split()):
        wanted = "[" + ", ".join(shape.split()) + "]"
        fail(op, argument, f"have shape {wanted}", tuple(x.shape), "reshape it")
    if device is not None and x.device != device:
        fail(op, argument, f"be on {device}", x.device, "move it with .to(device)")


def is_number(value: Any) -> bool:
    """A Python or NumPy number."""
    return isinstance(value, (int, float, Real))


def is_positive(value: Any) -> bool:
    """A number above 0 and finite in float64."""
    try:
        return 0 < float(value) < float("inf")
    except OverflowError:
        return False


def check_number(op: str, argument: str, value: Any) -> None:
    """A number, whatever its value."""
    if type(value) is not float and not is_number(value):
        fail(op, argument, "be a number", type(value).__name__, "pass a float", TypeError)


def check_packing(op: str, packing: Any, argument: str = "packing") -> None:
    """A Packing or None. Asked before anything that depends on it."""
    if packing is not None and not hasattr(packing, "cu_seqlens"):
        remedy = "build one with Packing.from_lengths(lengths)"
        fail(op, argument, "be a Packing", type(packing).__name__, remedy, TypeError)


def check_placed(op: str, argument: str, packing: Packing, device: torch.device) -> None:
    """The packing is on the device of what it packs."""
    if packing.cu_seqlens.device != device:
        fail(op, argument, f"be on {device}", packing.cu_seqlens.device, "build it there, or use .to(device)")


def has_values(x: Tensor) -> bool:
    """Whether a check may read x: on the CPU in eager mode, elsewhere under JEPA_KERNELS_CHECK=1, since that waits.

    What traces and transforms put in the place of a tensor (FakeTensor, wrappers of torch.func) holds no memory.
    """
    if is_compiling() or x.is_meta or not (x.is_cpu or CHECK_DEVICE_VALUES):
        return False
    return not (hasattr(x, "fake_mode") if type(x) not in PLAIN else torch._C._functorch.is_functorch_wrapped_tensor(x))


def check_ids(op: str, ids: Tensor, count: int, cu_seqlens: Tensor | None = None, argument: str = "ids") -> None:
    """Contiguous patch ids lie in [0, count) and increase within each row (or packed sequence).

    Where values are not read (see `has_values`) kernels skip ids out of range instead of trusting them.
    """
    if not has_values(ids) or not (cu_seqlens is None or has_values(cu_seqlens)):
        return
    if not ids.is_cpu:
        ids = ids.cpu()
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.cpu()
    module = extension.load()
    find = _first_bad_id if isinstance(module, str) or type(ids) not in PLAIN else module.first_bad_id
    place = find(ids, count, cu_seqlens)
    if place >= 0:
        value = ids.reshape(-1)[place].item()
        fail(op, argument, f"lie in [0, {count}) and increase within each row", f"{value} at position {place}",
             "sort each row and drop repeated or foreign ids")  # fmt: skip


def usable_device(op: str, argument: str, name: str) -> torch.device:
    """The cpu or cuda device of this name; ValueError where this machine has none."""
    try:
        found = torch.empty(0, device=name).device
        why = "" if found.type in ("cpu", "cuda") else "neither cpu nor cuda"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).split("\n")[0]
    if why:
        fail(op, argument, "name a device of this machine", f"{name!r} ({why})", "leave it out for the cpu")
    return found


def _first_bad_id(ids: Tensor, count: int, cu_seqlens: Tensor | None) -> int:
    """What the compiled module finds, without it."""
    total = ids.numel()
    if cu_seqlens is None:
        starts = list(range(0, total + 1, max(ids.shape[-1], 1)))
    else:  # as the kernels take them: never falling, never past the ids
        starts = [0, *cu_seqlens[1:].clamp(0, total).cummax(0).values.tolist()]
    for begin, end in pairwise(starts):
        row = ids.reshape(-1)[begin:end]
        bad = (row < 0) | (row >= count)
        bad[1:] |= row[1:] <= row[:-1]
        if bad.any():
            return begin + int(bad.nonzero()[0])
    return -1
