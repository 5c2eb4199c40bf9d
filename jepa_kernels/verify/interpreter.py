"""Makes Triton's interpreter exact where release 3.6 is not, so that parity in it means parity on a GPU.

bf16: casts truncate and `tl.dot` multiplies bit patterns; here casts round to nearest even and dot is exact. Arithmetic
on bf16 raises instead: a kernel computes in fp32. `tl.fma` rounds twice; here once. Comparisons have their operands'
type, which a scalar's broadcast casts to; here tl.int1. Run-time loop bounds fail with NumPy >= 2.4. Each call of a
helper patches the language once more, over the last patch; here each launch does, once.
Loads and stores are counted in TRAFFIC, masked lanes left out; products and exponentials in WORK, as issued.
"""

import math
from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

TRAFFIC: Counter[str] = Counter()  # bytes: {"read": .., "written": ..}
WORK: Counter[str] = Counter()  # {"multiply_adds": .., "exp2": ..}
Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns, to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in fp32, rounded once.

    The product is exact in fp64. Rounding the fp64 sum to odd keeps its second rounding, to fp32, the only one.
    """
    product, z = x.astype(np.float64) * y, z.astype(np.float64)
    with np.errstate(invalid="ignore"):
        total = product + z
        part = total - product
        error = (product - (total - part)) + (z - part)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    return (bits + np.where(inexact, np.where(away, 1, -1), 0)).view(np.float64).astype(np.float32)


def install() -> None:
    """Patch the interpreter of this process; before any kernel runs."""
    dot, cast, to_float, binary = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp, Builder.binary_op
    patch_language, everywhere = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    unchanged = SimpleNamespace(restore=lambda: None)
    exp2 = Builder.create_exp2
    np_dtype = lru_cache(maxsize=None)(interpreter._get_np_dtype)  # it builds a table for every tensor
    load, store, patch = Builder.create_masked_load, Builder.create_masked_store, interpreter._patch_lang_tensor

    def cast_impl(self, source, to):
        before, after = source.dtype.scalar, to.scalar
        if tl.bfloat16 not in (before, after) or before == after:
            return cast(self, source, to)
        if after == tl.bfloat16:
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        wide = Handle(widen(source.data), tl.float32)
        return wide if after == tl.float32 else cast(self, wide, to)

    def create_fp_to_fp(self, source, to, rounding):
        exact = tl.bfloat16 in (source.dtype.scalar, to.scalar)
        return cast_impl(self, source, to) if exact else to_float(self, source, to, rounding)

    def create_dot(self, a, b, *rest):
        WORK["multiply_adds"] += a.data.size * b.data.shape[-1]
        return dot(self, *(cast_impl(self, x, tl.float32) for x in (a, b)), *rest)

    def binary_op(self, a, b, op):
        if a.dtype.scalar == tl.bfloat16:
            raise TypeError(f"{op.__name__} of bf16: cast to fp32 first")
        found = binary(self, a, b, op)
        if found.data.dtype == bool:
            found.dtype = tl.int1
        return found

    def create_fma(self, x, y, z):
        if x.dtype.scalar != tl.float32:
            raise TypeError(f"fma of {x.dtype}: cast to fp32 first")
        return Handle(fused(x.data, y.data, z.data), tl.float32)

    def create_exp2(self, x):
        WORK["exp2"] += x.data.size
        return exp2(self, x)

    def create_masked_load(self, pointers, mask, *rest, **options):  # options: of the load of a descriptor's block
        loaded = load(self, pointers, mask, *rest, **options)
        TRAFFIC["read"] += int(np.asarray(mask.data).sum()) * loaded.data.itemsize
        return loaded

    def create_masked_store(self, pointers, value, mask, *rest):
        TRAFFIC["written"] += int(np.asarray(mask.data).sum()) * value.data.itemsize
        return store(self, pointers, value, mask, *rest)

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    for function in (cast_impl, create_fp_to_fp, create_dot, binary_op, create_fma, create_exp2):
        setattr(Builder, function.__name__, function)
    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    quick = interpreter.InterpreterOptions(sanitize_overflow=False)  # what it would compute never fires here
    interpreter.interpreter_builder.options = quick
    interpreter._get_np_dtype = lambda t: np.dtype(np.uint64) if t.scalar.is_ptr() else np_dtype(t.scalar)
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang = lambda kernel: unchanged
    patch_language(everywhere)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    remember_types()


def remember_types() -> None:
    """A type and a shape are objects with a name and checks of their own, made anew for every value; here once each."""
    make_block, of_shape, of_block = tl.block_type.__init__, {}, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, tuple(map(tl.core._unwrap_if_constexpr, shape))
        if key not in of_block:
            make_block(self, element_ty, shape)
            of_block[key] = vars(self)
        vars(self).update(of_block[key])

    def tensor(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in of_shape:
            of_shape[shape] = tl.core.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_shape[shape]

    tl.block_type.__init__, tl.core.tensor.__init__ = block_type, tensor
