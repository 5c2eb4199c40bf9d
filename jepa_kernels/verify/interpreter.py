"""Makes Triton's interpreter exact where release 3.6 is not, so that parity in it means parity on a GPU.

bf16: casts truncate and `tl.dot` multiplies bit patterns; here casts round to nearest even and dot is exact. Arithmetic
on bf16 raises instead: a kernel computes in fp32. `tl.fma` rounds twice; here once. Comparisons have their operands'
type, which a scalar's broadcast casts to; here tl.int1. The larger of a NaN and a number is the NaN; here the number.
Floats that a launch hands over stay doubles; here they are fp32. Run-time loop bounds fail with NumPy >= 2.4. Each call
of a helper patches the language once more, over the last patch; here each launch does, once.
Loads and stores are counted in TRAFFIC, masked lanes left out; products and exponentials in WORK, as issued.
"""

import math
from collections import Counter
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
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
    dot, cast, to_float = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp
    patch_language, everywhere = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    unchanged = SimpleNamespace(restore=lambda: None)
    exp2, run = Builder.create_exp2, interpreter.GridExecutor.__call__
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
        found, dtype = op(a.data, b.data), a.dtype.scalar
        if found.dtype == bool:
            return Handle(found, tl.int1)
        return Handle(found if dtype.is_ptr() else found.astype(np_dtype(dtype), copy=False), dtype)

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

    def launch(self, *given, **named):
        def number(name, x):
            if type(x) is tuple:
                return tuple(number(name, each) for each in x)
            kind = str(self.fn.__annotations__.get(name))
            if type(x) is not float or "constexpr" in kind:
                return x
            dtype = tl.float64 if "float64" in kind else tl.float32
            return tl.core.tensor(Handle(np.array([x], np_dtype(dtype)), dtype), dtype)

        return run(self, *map(number, self.arg_names, given), **{name: number(name, x) for name, x in named.items()})

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_attr(module, name, member, builder, scope):
        function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def call(*args, **options):
            options["_semantic"] = semantic
            return function(*args, **options)

        scope.set_attr(module, name, call)

    for function in (cast_impl, create_fp_to_fp, create_dot, binary_op, create_fma, create_exp2):
        setattr(Builder, function.__name__, function)
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    quick = interpreter.InterpreterOptions(sanitize_overflow=False)  # what it would compute never fires here
    interpreter.interpreter_builder.options = quick
    interpreter._get_np_dtype = lambda t: np.dtype(np.uint64) if t.scalar.is_ptr() else np_dtype(t.scalar)
    interpreter._patch_lang_tensor, interpreter.GridExecutor.__call__ = patch_tensor, launch
    interpreter._patch_lang, interpreter._patch_attr = lambda kernel: unchanged, patch_attr
    patch_language(everywhere)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    remember_types()
    hasten()


def remember_types() -> None:
    """A type and a shape are objects with a name and checks of their own, made anew for every value; here once each."""
    make_block, equal, unwrap = tl.block_type.__init__, tl.dtype.__eq__, tl.core._unwrap_if_constexpr
    of_shape, of_block, like = {}, {}, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, tuple(n if type(n) is int else unwrap(n) for n in shape)
        if key not in of_block:
            make_block(self, element_ty, list(key[1]))
            self.sizes = key[1]
            of_block[key] = vars(self)
        vars(self).update(of_block[key])

    def tensor(self, handle, type):
        shape = type.sizes
        if shape not in of_shape:
            of_shape[shape] = tl.core.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_shape[shape]

    def unwrapped(value):
        of = type(value)
        return value if of is int or of is tl.core.tensor or of is tl.dtype else unwrap(value)

    def with_element_ty(self, dtype):
        key = dtype.name, self.sizes
        if key not in like:
            like[key] = tl.block_type(dtype, self.sizes)
        return like[key]

    tl.dtype.sizes, tl.block_type.with_element_ty = (), with_element_ty
    tl.block_type.__init__, tl.core.tensor.__init__, tl.core._unwrap_if_constexpr = block_type, tensor, unwrapped
    tl.dtype.__eq__ = lambda self, other: self.name == other.name if type(other) is tl.dtype else equal(self, other)


def hasten() -> None:
    """What most operations need of Triton's rules, which are long: operands of one type, offsets of pointers, numbers
    beside a block, a scalar beside one. All else goes the whole way.
    """
    names = "broadcast_impl_value", "binary_op_type_checking_impl", "to_tensor", "cast"
    broadcast, check, to_tensor, change = (getattr(TritonSemantic, name) for name in names)
    tensor, plain = tl.core.tensor, {"fp32", "fp64", "int1", "int32", "int64", "uint32"}  # division makes no other type
    kinds = {"fp32": (np.float32, (int, float)), "int32": (np.int32, (int,)), "int64": (np.int64, (int,))}

    def of_shape(x, number):
        """A number in x's type and shape, None where Triton's rules are to say what it becomes."""
        dtype, known = (np.int32, (int,)) if x.dtype.is_ptr() else kinds.get(x.dtype.name, (None, ()))
        if type(number) not in known or (type(number) is int and abs(number) >= 2**24):
            return None
        own = x.type.with_element_ty(tl.int32) if x.dtype.is_ptr() else x.type
        return tensor(Handle(np.full(own.sizes or 1, number or 0, dtype), own.scalar), own)

    def spread(x, over):
        data = x.handle.data
        return tensor(Handle(np.full(over.type.sizes, data, data.dtype), x.dtype), over.type.with_element_ty(x.dtype))

    def wide(x):
        return tensor(Handle(x.handle.data.astype(np.int64), tl.int64), x.type.with_element_ty(tl.int64))

    def broadcast_impl_value(self, a, b):
        if a.type.sizes == b.type.sizes:
            return a, b
        if not b.type.sizes:
            return a, spread(b, a)
        if not a.type.sizes:
            return spread(a, b), b
        return broadcast(self, a, b)

    def binary_op_type_checking_impl(self, a, b, allow_a=False, *rest, **options):
        number = None
        if type(a) is tensor is type(b):
            types = a.dtype.name, b.dtype.name
            if types == ("int64", "int32"):
                return broadcast_impl_value(self, a, wide(b))
            if types == ("int32", "int64"):
                return broadcast_impl_value(self, wide(a), b)
            if types[0] == types[1] in plain or (allow_a and a.dtype.is_ptr() and types[1] in ("int32", "int64")):
                return broadcast_impl_value(self, a, b)
        elif type(a) is tensor and (allow_a or not a.dtype.is_ptr()):
            number = of_shape(a, b)
        elif type(b) is tensor and not b.dtype.is_ptr():
            number = of_shape(b, a)
        if number is not None:
            return (a, number) if type(a) is tensor else (number, b)
        return check(self, a, b, allow_a, *rest, **options)

    def cast(self, x, to, *rest, **options):
        return x if type(to) is tl.dtype and x.dtype.name == to.name else change(self, x, to, *rest, **options)

    for function in (broadcast_impl_value, binary_op_type_checking_impl, cast):
        setattr(TritonSemantic, function.__name__, function)
    TritonSemantic.to_tensor = lambda self, x, *rest: x if type(x) is tensor else to_tensor(self, x, *rest)
