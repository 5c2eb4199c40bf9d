"""Choosing a backend: the op's table of kernels, the user's override, and the reason for each row."""

import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.compiler import is_compiling, is_dynamo_compiling

from jepa_kernels._core import extension, triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cuda", "triton", "cpu", "sdpa", "reference")
DEVICES = {"cuda": ("cuda",), "triton": ("cuda", "cpu"), "cpu": ("cpu",), "sdpa": ("cuda", "cpu")}

log = logging.getLogger("jepa_kernels")
if os.environ.get("JEPA_KERNELS_LOG", "0") == "1":
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())


class BackendError(RuntimeError):
    """The chosen backend can't run this call."""


class BackendWarning(UserWarning):
    """Automatic choice found no kernel and ran the reference."""


@dataclass(frozen=True)
class Kernel:
    """One row of an op's table: where it runs, for which dtypes, and its limits.

    `limit` gets the op's description of the call and returns the reason why this row can't run it, or None.
    `automatic` likewise returns the reason why it is taken only when named. `silent`: the reference is PyTorch's own
    op and the right choice where this row is none: it draws no warning.
    """

    backend: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    limit: Callable[[Any], str | None] | None = None
    automatic: Callable[[Any], str | None] | None = None
    silent: bool = False


class Explained(Exception):
    """Carries a table out of a call that `explain` makes: (backend, why it can't run, why only when named)."""

    def __init__(self, rows: list[tuple[str, str | None, str | None]], named: str | None):
        self.rows, self.named = rows, named


# Plain globals: a ContextVar breaks torch.compile(fullgraph=True), functools.cache draws a Dynamo warning.
_override: dict[str, str] = {}
_environment = os.environ.get("JEPA_KERNELS_BACKEND")
_availability: dict[tuple[str, str], str | None] = {}
_ready: dict[tuple[str, str, torch.dtype], tuple[Kernel, ...]] = {}
_told: set[tuple[str, str]] = set()
_explaining: list[int] = []  # threads inside `explain`: the calls of others run


def unavailable(backend: str, device_type: str) -> str | None:
    """Why a backend can't run on a device type in this process; found once, None where it can."""
    key = (backend, device_type)
    if key not in _availability:
        if device_type not in DEVICES.get(backend, (device_type,)):
            _availability[key] = f"runs on {' and '.join(DEVICES[backend])} tensors, got {device_type}"
        elif backend in ("cpu", "cuda"):
            _availability[key] = extension.reason(backend)
        else:
            _availability[key] = triton.reason(device_type) if backend == "triton" else None
    return _availability[key]


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler: a trace asks once.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _static_refusal(kernel: Kernel, device_type: str, dtype: torch.dtype) -> str | None:
    why = unavailable(kernel.backend, device_type)
    if why is None and dtype not in kernel.dtypes:
        why = f"takes {', '.join(short(d) for d in kernel.dtypes)}, got {short(dtype)}"
    return why


def refusal(kernel: Kernel, device_type: str, dtype: torch.dtype, call: Any) -> str | None:
    """Why this row can't run the call; None where it can."""
    why = _static_refusal(kernel, device_type, dtype)
    return kernel.limit(call) if why is None and kernel.limit is not None else why


def _reasons(kernel: Kernel, device_type: str, dtype: torch.dtype, call: Any) -> tuple[str | None, str | None]:
    why = refusal(kernel, device_type, dtype, call)
    if why is not None or kernel.automatic is None:
        return why, None
    return None, kernel.automatic(call)


def select(
    op: str,
    kernels: tuple[Kernel, ...],
    backend: str | None,
    tensor: torch.Tensor,
    call: Any = None,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend for this call. Precedence: argument, `use_backend`, JEPA_KERNELS_BACKEND, automatic."""
    device_type = "cpu" if tensor.is_cpu else tensor.device.type
    dtype = tensor.dtype if dtype is None else dtype
    wanted = backend or (_override.get(op) or _override.get("*") if _override else None) or _environment
    if _explaining and threading.get_ident() in _explaining:
        rows = [(k.backend, *_reasons(k, device_type, dtype, call)) for k in kernels]
        raise Explained([*rows, ("reference", None, None)], wanted)
    if wanted is not None:
        return _named(op, kernels, wanted, device_type, dtype, call)
    compiling = is_dynamo_compiling()
    key = (op, device_type, dtype)
    able = None if compiling else _ready.get(key)  # availability does not change within a process
    if able is None:
        able = tuple(k for k in kernels if _static_refusal(k, device_type, dtype) is None)
        if not compiling:  # a memo that a trace fills would fail its own guard on the next call
            _ready[key] = able
    for kernel in able:
        if kernel.limit is not None and kernel.limit(call) is not None:
            continue
        if kernel.automatic is not None and kernel.automatic(call) is not None:
            continue
        if not compiling and (op, kernel.backend) not in _told:
            _told.add((op, kernel.backend))
            log.info("%s: %s", op, kernel.backend)
        return kernel.backend
    if not any([k.silent for k in kernels]) and not is_compiling():
        _tell_reference(op, kernels, device_type, dtype, call)
    return "reference"


def _named(op: str, kernels: tuple[Kernel, ...], wanted: str, device_type: str, dtype: torch.dtype, call: Any) -> str:
    if wanted == "reference":
        return wanted
    for kernel in kernels:
        if kernel.backend == wanted:
            why = refusal(kernel, device_type, dtype, call)
            if why is None:
                return wanted
            _refuse(op, wanted, why, kernels)
    if wanted not in BACKENDS:
        raise ValueError(
            f"{op}: backend must be one of {', '.join(BACKENDS)}, got {wanted!r}; leave it out for automatic choice"
        )
    _refuse(op, wanted, f"{op} has no {wanted} kernel", kernels)


def _refuse(op: str, wanted: str, why: str, kernels: tuple[Kernel, ...]) -> NoReturn:
    names = ", ".join([k.backend for k in kernels] + ["reference"])
    raise BackendError(
        f"{op}: backend {wanted!r} must be able to run this call, got: {why}; "
        f"leave backend out, or choose one of {names} (jepa_kernels.explain lists every reason)"
    )


def _tell_reference(op: str, kernels: tuple[Kernel, ...], device_type: str, dtype: torch.dtype, call: Any) -> None:
    reasons = [f"{k.backend}: {refusal(k, device_type, dtype, call) or 'not automatic'}" for k in kernels]
    why = "; ".join(reasons)
    if (op, why) not in _told:
        _told.add((op, why))
        warnings.warn(f"{op}: runs the plain PyTorch reference ({why})", BackendWarning, stacklevel=4)


@contextmanager
def use_backend(backend: str | None = None, **per_op: str) -> Iterator[None]:
    """Choose the backend of every op, or of single ops, inside the block.

    `use_backend("reference")` turns a whole model into plain PyTorch; `use_backend(masked_attention="cpu")`
    names one op. Strict: an op that can't run on the named backend raises. Process-wide, not per thread.

    Raises ValueError for an unknown backend or op.
    """
    from jepa_kernels.ops import OPS

    chosen = dict(per_op, **({"*": backend} if backend is not None else {}))
    for op, name in chosen.items():
        if op != "*" and op not in OPS:
            raise ValueError(f"use_backend: op must be one of {', '.join(OPS)}, got {op!r}; check the spelling")
        if name not in BACKENDS:
            raise ValueError(
                f"use_backend: backend must be one of {', '.join(BACKENDS)}, got {name!r}; check the spelling"
            )
    before = dict(_override)
    if backend is not None:  # the inner block decides: names of single ops around it end here
        _override.clear()
    _override.update(chosen)
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Say which backend a call would take and why each other one would not; runs no kernel.

    `explain("masked_attention", q, k, v, packing)` returns a line per row of the op's table, in order of
    preference. Arguments are checked as in the call itself.
    """
    import jepa_kernels
    from jepa_kernels.ops import FORMS, OPS

    if op not in (*OPS, *FORMS):
        raise ValueError(f"explain: op must be one of {', '.join((*OPS, *FORMS))}, got {op!r}; check the spelling")
    _explaining.append(threading.get_ident())
    try:
        getattr(jepa_kernels, op)(*args, **kwargs)
    except Explained as found:
        return _table(op, found)
    finally:
        _explaining.remove(threading.get_ident())
    return f"{op}: empty input, no kernel needed"


def _table(op: str, found: Explained) -> str:
    if found.named is None:
        chosen = next(f"{name} (automatic)" for name, *reasons in found.rows if reasons == [None, None])
    else:
        able = any(name == found.named and why is None for name, why, _ in found.rows)
        chosen = f"{found.named} (named{'' if able else ', but it must fail'})"
    return "\n".join(
        [f"{op}: {chosen}"] + [f"  {n:<10} {why or only or 'can run this call'}" for n, why, only in found.rows]
    )


def short(dtype: torch.dtype) -> str:
    """`float32` rather than `torch.float32`."""
    return str(dtype).removeprefix("torch.")
