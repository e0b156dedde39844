"""Products of matrices on tensor cores: which lane holds which element, and the sums themselves.

    mma.sync    D (16 x 8) = A (16 x k) B (k x 8) + C     of one warp, all in registers
    wgmma       D (64 x n) = A (64 x k) B (k x n) + D     of four warps, 16 rows each; B, and A too
                                                          or not, in shared memory

A lane l holds of an accumulator the rows l / 4 and l / 4 + 8 and, in each eight columns, the
columns 2 (l % 4) and 2 (l % 4) + 1 (PTX ISA, "Matrix fragments").
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from .arithmetic import F32, F64, U32, unpacked
from .memory import Shared, swizzled

Registers = Sequence[np.ndarray]
Places = tuple[np.ndarray, np.ndarray]  # (row, column) by register, lane and part of a register

# ------------------------------------------------------------------ fragments


def accumulator(registers: Registers) -> np.ndarray:
    """The 16 x n matrix that n / 2 registers of 32 lanes hold."""
    out = np.empty((16, 2 * len(registers)), F32)
    out[_of_accumulator(len(registers))] = np.stack([x.view(F32) for x in registers])
    return out


def accumulator_registers(matrix: np.ndarray) -> list[np.ndarray]:
    return list(matrix[_of_accumulator(matrix.shape[1] // 2)].astype(F32))


def left(registers: Registers, dtype: np.dtype) -> np.ndarray:
    """A, 16 x 16 of 16 bits or 16 x 8 of 32, in four registers."""
    out = np.empty((16, 32 // dtype.itemsize), F64)
    out[_of_left(dtype.itemsize)] = _numbers(registers, dtype)
    return out


def right(registers: Registers, dtype: np.dtype) -> np.ndarray:
    """B, 16 x 8 of 16 bits or 8 x 8 of 32, in two registers."""
    out = np.empty((32 // dtype.itemsize, 8), F64)
    out[_of_right(dtype.itemsize)] = _numbers(registers, dtype)
    return out


def _numbers(registers: Registers, dtype: np.dtype) -> np.ndarray:
    values = np.stack(registers)
    if dtype.itemsize == 2:
        return unpacked(values, dtype)
    # TF32 ignores the 13 lowest bits of a float32.
    return (values.view(U32) & U32.type(0xFFFFE000)).view(F32)[..., None]


@functools.cache
def _of_accumulator(count: int) -> Places:
    i, lane = np.arange(count)[:, None], np.arange(32)
    return lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2


@functools.cache
def _of_left(width: int) -> Places:
    i, lane, part = np.arange(4)[:, None, None], np.arange(32)[:, None], np.arange(4 // width)
    return lane // 4 + i % 2 * 8 + 0 * part, i // 2 * (16 // width) + lane % 4 * len(part) + part


@functools.cache
def _of_right(width: int) -> Places:
    i, lane, part = np.arange(2)[:, None, None], np.arange(32)[:, None], np.arange(4 // width)
    return i * (16 // width) + lane % 4 * len(part) + part, lane // 4 + 0 * i + 0 * part


def multiply(a: Registers, b: Registers, c: Registers, dtype: np.dtype) -> list[np.ndarray]:
    """mma.sync on registers."""
    return accumulator_registers(left(a, dtype) @ right(b, dtype) + accumulator(c))


# ------------------------------------------------------------------ matrices in shared memory


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """Where a warpgroup's product finds a factor in shared memory (PTX ISA, "Matrix descriptor").

    Atoms of 8 lines of `swizzle` bytes lie one after the other. A line runs along k where the
    matrix is k-major and along its other dimension, m or n, where it is not.
    """

    start: int
    leading: int  # bytes between atoms along the line, where it is longer than one atom
    stride: int  # bytes between atoms across the lines
    swizzle: int

    @classmethod
    def of(cls, bits: int) -> "Descriptor":
        field = lambda first, length: (bits >> first) & ((1 << length) - 1)
        assert field(49, 3) == 0, "the base offset of a descriptor"
        swizzle = (16, 128, 64, 32)[field(62, 2)]
        return cls(16 * field(0, 14), 16 * field(16, 14), 16 * field(32, 14), swizzle)

    def addresses(self, other: int, k: int, k_major: bool, width: int) -> np.ndarray:
        """Of the elements of an (other x k) matrix."""
        i, j = np.arange(other)[:, None], np.arange(k)[None, :]
        line, along = (i, j) if k_major else (j, i)
        leading, stride = self.leading, self.stride
        if self.swizzle == 16 and not k_major:
            leading, stride = stride, leading
        per_atom = self.swizzle // width
        address = self.start + line // 8 * stride + line % 8 * self.swizzle
        address = address + along // per_atom * leading + along % per_atom * width
        return swizzled(address, self.swizzle)

    def read(self, shared: Shared, other: int, k: int, k_major: bool, dtype) -> np.ndarray:
        addresses = self.addresses(other, k, k_major, dtype.itemsize)
        shared.seen_by_copies(shared.index(addresses, dtype.itemsize))
        (words,) = shared.load(addresses, dtype.itemsize, 1)
        return words.view(dtype).astype(F64)
