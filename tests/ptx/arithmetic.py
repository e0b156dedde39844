"""Instructions that compute: from the values of registers in 32 lanes to those of another."""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
BF16 = np.dtype(ml_dtypes.bfloat16)
U16, U32, U64 = np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64)
S32, S64 = np.dtype(np.int32), np.dtype(np.int64)
PREDICATE = np.dtype(np.bool_)
TYPES = {
    **{"b16": U16, "u16": U16, "s16": np.dtype(np.int16), "b32": U32, "u32": U32, "s32": S32},
    **{"b64": U64, "u64": U64, "s64": S64, "pred": PREDICATE},
    **{"f16": F16, "bf16": BF16, "f32": F32, "f64": F64, "tf32": F32},
}
SMALLEST = np.finfo(np.float32).tiny


class Operation(NamedTuple):
    """A function of arrays, and how the bits of registers are to be read for it."""

    function: Callable[..., np.ndarray]
    operands: tuple[np.dtype, ...]


def operation(parts: tuple[str, ...]) -> Operation:
    """What the parts of an opcode mean; the last names the type.

    **Raises:** `NotImplementedError` for an instruction that no kernel has had so far.
    """
    name, modifiers, kind = parts[0], parts[1:-1], parts[-1]
    unknown = NotImplementedError(f"the instruction {'.'.join(parts)}")
    if name == "cvt":
        return _conversion(modifiers, kind)
    if name == "setp":
        return _comparison(parts[1], modifiers[1:], TYPES[kind])
    if name == "selp":
        dtype = TYPES[kind]
        return Operation(lambda x, y, p: np.where(p, x, y), (dtype, dtype, PREDICATE))
    if name in ("mul", "mad") and "wide" in modifiers:
        return _wide(name, kind)
    if (name, kind[-4:]) == ("neg", "16x2"):
        return Operation(lambda x: x ^ U32.type(0x80008000), (U32,))
    key = f"{name}.hi" if "hi" in modifiers else name
    if kind not in TYPES:
        raise unknown
    dtype = TYPES[kind]
    if dtype in (F32, F64):
        function, count = FLOATS["max.NaN" if parts[:2] == ("max", "NaN") else key]
        if "ftz" in modifiers:
            return Operation(lambda *x: _flushed(function(*x)), (dtype,) * count)
        return Operation(function, (dtype,) * count)
    if key in SHIFTS:
        return Operation(SHIFTS[key], (dtype, U32))
    if key == "bfe":
        return Operation(_extract, (dtype, U32, U32))
    if key == "shf":
        return Operation(_funnel_left, (U32, U32, U32))
    if key not in INTEGERS:
        raise unknown
    function, count = INTEGERS[key]
    return Operation(function, (dtype,) * count)


# ------------------------------------------------------------------ floating-point numbers


def _fma(x, y, z):
    """Rounded once: the product of two float32 is exact in float64."""
    return (np.multiply(x, y, dtype=F64) + z).astype(F32)


def _in_double(function):
    return lambda *x: function(*(a.astype(F64) for a in x)).astype(F32)


def _flushed(x):
    return np.where(np.abs(x) < SMALLEST, np.float32(0), x)


FLOATS = {
    "add": (np.add, 2),
    "sub": (np.subtract, 2),
    "mul": (np.multiply, 2),
    "div": (np.divide, 2),
    "fma": (_fma, 3),
    "neg": (np.negative, 1),
    "abs": (np.abs, 1),
    "mov": (np.positive, 1),
    "max": (np.fmax, 2),
    "max.NaN": (np.maximum, 2),
    "min": (np.fmin, 2),
    "ex2": (_in_double(np.exp2), 1),
    "lg2": (_in_double(np.log2), 1),
    "rcp": (np.reciprocal, 1),
}


# ------------------------------------------------------------------ integers and bits


def _shift_left(x, by):
    return np.where(by < 8 * x.itemsize, x << by.astype(x.dtype), 0).astype(x.dtype)


def _shift_right(x, by):
    """Shifts by the width or more leave zeros, or the sign."""
    limit = 8 * x.itemsize - 1
    shifted = x >> np.minimum(by, limit).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by > limit, 0, shifted).astype(x.dtype)


def _extract(x, first, length):
    """`length` bits from `first` on, with their sign where the type has one."""
    bits = 8 * x.itemsize
    left = (bits - first - length).astype(x.dtype)
    return (x << left) >> (bits - length).astype(x.dtype)


def _funnel_left(low, high, by):
    pair = (high.astype(U64) << U64.type(32)) | low
    return ((pair << (by & U32.type(31)).astype(U64)) >> U64.type(32)).astype(U32)


def _wide(name, kind):
    dtype = TYPES[kind]
    double = S64 if dtype.kind == "i" else U64
    if dtype.itemsize == 2:
        double = S32 if dtype.kind == "i" else U32
    if name == "mul":
        return Operation(lambda x, y: x.astype(double) * y.astype(double), (dtype, dtype))
    multiply_add = lambda x, y, z: x.astype(double) * y.astype(double) + z
    return Operation(multiply_add, (dtype, dtype, double))


def _high(x, y):
    double = S64 if x.dtype.kind == "i" else U64
    return ((x.astype(double) * y.astype(double)) >> double.type(32)).astype(x.dtype)


def _permute(low, high, selector):
    """Each byte of the result is one of the eight of both operands, or copies of its sign."""
    found = np.zeros(low.shape, U32)
    pair = (high.astype(U64) << U64.type(32)) | low
    for place in range(4):
        chosen = selector >> U32.type(4 * place)
        byte = (pair >> (chosen & U32.type(7)).astype(U64) * U64.type(8)).astype(U32) & U32.type(
            255
        )
        sign = (byte >> U32.type(7)) * U32.type(255)
        found |= np.where(chosen & U32.type(8), sign, byte) << U32.type(8 * place)
    return found


SHIFTS = {"shl": _shift_left, "shr": _shift_right}
INTEGERS = {
    "add": (np.add, 2),
    "sub": (np.subtract, 2),
    "mul": (np.multiply, 2),  # the low half
    "mul.hi": (_high, 2),
    "mad": (lambda x, y, z: x * y + z, 3),
    "neg": (np.negative, 1),
    "min": (np.minimum, 2),
    "max": (np.maximum, 2),
    "and": (np.bitwise_and, 2),
    "or": (np.bitwise_or, 2),
    "xor": (np.bitwise_xor, 2),
    "not": (np.invert, 1),
    "mov": (lambda x: x, 1),
    "prmt": (_permute, 3),
}
ORDERED = {
    **{
        "eq": np.equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    },
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
    "ne": lambda x, y: (x != y) & ~_unordered(x, y),
    "num": lambda x, y: ~_unordered(x, y),
}


def _unordered(x, y):
    return (x != x) | (y != y)


def _or_unordered(name):
    return lambda x, y: ORDERED[name](x, y) | _unordered(x, y)


# With a NaN the first are false, the others, which end in u, are true.
COMPARISONS = ORDERED | {f"{name}u": _or_unordered(name) for name in ORDERED}
COMPARISONS["nan"] = _unordered


def _comparison(name, modifiers, dtype):
    """Alone or joined with another predicate."""
    compare = COMPARISONS[name]
    join = next((JOINED[m] for m in modifiers if m in JOINED), None)
    if join is None:
        return Operation(compare, (dtype, dtype))
    return Operation(lambda x, y, p: join(compare(x, y), p), (dtype, dtype, PREDICATE))


JOINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


# ------------------------------------------------------------------ conversions


def bits(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The bits of a register as another type, narrowed or widened with zeros."""
    if value.dtype == dtype:
        return value.view(dtype)  # the one object that stands for the type
    if dtype is PREDICATE or value.dtype == PREDICATE:
        return value.astype(dtype)
    if value.dtype.itemsize != dtype.itemsize:
        unsigned = np.dtype(f"u{value.dtype.itemsize}")
        value = value.view(unsigned).astype(f"u{dtype.itemsize}")
    return value.view(dtype)


def _conversion(modifiers, source):
    """cvt.<rounding>.<target>.<source>"""
    target = modifiers[-1]
    if target in ("bf16x2", "f16x2"):
        dtype = TYPES[target[:-2]]
        # The first operand is the upper half.
        return Operation(
            lambda high, low: packed(low.astype(dtype), high.astype(dtype)), (F32, F32)
        )
    if target == "tf32":
        return Operation(_nearest_tf32, (F32,))
    to = TYPES[target]
    return Operation(lambda x: x.astype(to), (TYPES[source],))


def packed(low, high):
    """Two arrays of 16 bits as one of 32."""
    return low.view(U16).astype(U32) | (high.view(U16).astype(U32) << U32.type(16))


def unpacked(x, dtype) -> np.ndarray:
    """The two numbers of 16 bits in each of 32, on a new last axis."""
    return np.ascontiguousarray(x).view(dtype).reshape(*x.shape, 2)


def _nearest_tf32(x):
    """The 13 lowest bits of the fraction rounded away, ties away from zero."""
    bits = (x.view(U32) + U32.type(0x1000)) & U32.type(0xFFFFE000)
    return np.where(np.isfinite(x), bits.view(F32), x)
