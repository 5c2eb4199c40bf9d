"""The sm_90a attention kernels on the host: their own sources, built against tests/kernels/emulation."""

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

HERE = Path(__file__).parent / "emulation"
CSRC = Path(__file__).parents[2] / "csrc"


class Input(ctypes.Structure):
    """`AttentionInput`: address, strides of sequence, row, head and channel, and how many sequences and rows."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sequence", "row", "head", "channel", "sequences", "count")),
    )


def build(folder: Path) -> ctypes.CDLL:
    library = folder / "attention.so"
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
               f"-I{HERE}", f"-I{CSRC}", HERE / "attention.cpp", "-o", library]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(library)


def described(x: Tensor) -> Input:
    """x [T, H, D] or [B, H, N, D]; lse [H, T] or [B, H, N]."""
    packed = x.dim() == (3 if x.dtype != torch.float32 else 2)
    head, row = (-2, -1) if x.dtype == torch.float32 else ((-2, -3) if packed else (-3, -2))
    planes, stride = (1, 0) if packed else (x.shape[0], x.stride(0))
    return Input(x.data_ptr(), stride, x.stride(row), x.stride(head), 1, planes, x.shape[row])


def call(
    library: ctypes.CDLL,
    tensors: Sequence[Tensor],
    starts: tuple[Tensor, Tensor] | None,
    scale: float,
    *,
    backward: bool = False,
) -> None:
    q, k = tensors[:2]
    if starts is None:
        sequences, rows = q.shape[0], (q.shape[2], k.shape[2])
        bounds, pointers = rows, (None, None)
    else:
        sequences, rows = len(starts[0]) - 1, (0, 0)
        bounds = tuple(int(s.diff().max()) if sequences else 0 for s in starts)
        pointers = tuple(ctypes.c_void_p(s.data_ptr()) for s in starts)
    numbers = (sequences, *rows, *bounds, q.shape[1], k.shape[1], q.shape[-1])
    library.masked_attention(
        (Input * len(tensors))(*map(described, tensors)),
        *pointers,
        (ctypes.c_int64 * 8)(*numbers),
        ctypes.c_float(scale),
        ctypes.c_bool(q.dtype == torch.float16),
        ctypes.c_bool(backward),
    )


def poisoned_like(x: Tensor) -> Tensor:
    """An output of x's shape, laid out as the op lays outputs out, full of NaN."""
    if x.dim() == 3:
        return x.new_full(x.shape, float("nan"))
    batch, heads, tokens, width = x.shape
    return x.new_full((batch, tokens, heads, width), float("nan")).transpose(1, 2)


def forward(
    library: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, starts: tuple[Tensor, Tensor] | None, scale: float
) -> SimpleNamespace:
    rows = (q.shape[1], q.shape[0]) if starts is not None else q.shape[:3]
    out, lse = poisoned_like(q), torch.full(rows, float("nan"))
    call(library, (q, k, v, out, lse), starts, scale)
    return SimpleNamespace(out=out, lse=lse)


def backward(
    library: ctypes.CDLL,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: SimpleNamespace,
    starts: tuple[Tensor, Tensor] | None,
    scale: float,
) -> SimpleNamespace:
    dq, dk, dv = (poisoned_like(x) for x in (q, k, v))
    call(library, (q, k, v, saved.out, saved.lse, grad, dq, dk, dv), starts, scale, backward=True)
    return SimpleNamespace(dq=dq, dk=dk, dv=dv)
