"""Plays recorded calls of `_C` with no torch in the process, which valgrind would take half a minute to load.

`python benchmarks/replay.py MODULE CALLS`; benchmarks/instructions.py records CALLS and counts. Here is a stub of the
few things that `_C` asks of torch: dtypes, one thread, tensors with an address, and DLPack's table for lists of them.
"""

import copy
import ctypes
import importlib.util
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

# dtype: bytes, and DLPack's code
DTYPES = {"float32": (4, 2), "bfloat16": (2, 4), "float16": (2, 2), "float64": (8, 2), "int64": (8, 0), "int32": (4, 0),
          "uint8": (1, 1)}  # fmt: skip
ALIGNED = 64


class Dtype:
    """One of torch's."""

    def __init__(self, name: str):
        self.size, self.code = DTYPES[name]


class Tensor:
    """Memory of its own, at an address that 64 divides."""

    device, is_cpu = SimpleNamespace(index=None), True

    def __init__(self, dtype: Dtype, shape: tuple[int, ...], stride: tuple[int, ...], data: bytes | None = None):
        self.dtype, self.shape, self._stride = dtype, shape, stride
        span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if all(shape) else 0
        self._memory = ctypes.create_string_buffer(span * dtype.size + ALIGNED)
        self._address = -(-ctypes.addressof(self._memory) // ALIGNED) * ALIGNED
        if data:
            ctypes.memmove(self._address, data, len(data))
        self._sizes, self._steps = ((ctypes.c_int64 * len(x))(*x) for x in (shape, stride))

    def data_ptr(self) -> int:
        return self._address

    def stride(self) -> tuple[int, ...]:
        return self._stride

    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    def new_empty(self, shape: tuple[int, ...], dtype: Dtype) -> "Tensor":
        stride, step = [], 1
        for n in reversed(shape):
            stride.insert(0, step)
            step *= n
        return Tensor(dtype, tuple(shape), tuple(stride))

    new_zeros = new_empty  # fresh memory is zero here

    def transpose(self, a: int, b: int) -> "Tensor":
        view = copy.copy(self)
        order = list(range(len(self.shape)))
        order[a], order[b] = b, a
        view.shape, view._stride = (tuple(x[i] for i in order) for x in (self.shape, self._stride))
        return view


class View(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_index", ctypes.c_int32),
        ("dims", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


Read = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(View))


class Exchange(ctypes.Structure):
    """DLPack's table of functions, up to `read`."""

    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("older", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p), ("export_owned", ctypes.c_void_p), ("import_owned", ctypes.c_void_p),
        ("read", Read),
    )  # fmt: skip


@Read
def read(tensor: Tensor, out: Any) -> int:
    shape, strides = ctypes.addressof(tensor._sizes), ctypes.addressof(tensor._steps)
    kind = tensor.dtype.code, 8 * tensor.dtype.size
    out[0] = View(tensor.data_ptr(), 1, 0, len(tensor.shape), *kind, 1, shape, strides, 0)
    return 0


TABLE = Exchange(1, 0, None, None, None, 1, read)  # outputs come from new_empty: import_owned is there, never called
NAME = b"dlpack_exchange_api"


def stub() -> ModuleType:
    """What `_C` looks up in torch."""
    torch = ModuleType("torch")
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    Tensor.__dlpack_c_exchange_api__ = new(ctypes.addressof(TABLE), NAME, None)
    dtypes = {name: Dtype(name) for name in DTYPES}
    threads, deterministic = (lambda: 1), (lambda: True)  # so that outputs come from new_empty
    torch.__dict__.update(
        dtypes, Tensor=Tensor, get_num_threads=threads, are_deterministic_algorithms_enabled=deterministic
    )
    return torch


def argument(torch: ModuleType, module: ModuleType, given: Any) -> Any:
    """What instructions.py wrote down, as `_C` takes it."""
    kind, value = given
    if kind == "tensor":
        return Tensor(getattr(torch, value[0]), *value[1:])
    if kind == "dtype":
        return getattr(torch, value)
    if kind in ("list", "tuple", "lists"):
        items = [argument(torch, module, x) for x in value]
        kept.append(items)
        return module.read_lists(items, False) if kind == "lists" else items if kind == "list" else tuple(items)
    return value


kept: list[Any] = []  # tensors whose addresses a TensorLists holds


def main(path: str, calls: str) -> None:
    torch = sys.modules["torch"] = stub()
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with open(calls, "rb") as stream:
        rows = pickle.load(stream)
    for row in rows:
        ready = [(getattr(module, name), [argument(torch, module, a) for a in args]) for name, args in row]
        if not module.set_isa("avx2"):  # where valgrind writes down what was counted before
            sys.exit("this processor lacks AVX2")
        for function, args in ready:
            function(*args)
        kept.clear()
    module.set_isa("avx2")


if __name__ == "__main__":
    main(*sys.argv[1:])
