"""Products of matrices on tensor cores: which lane holds which element, and the sums themselves.

    mma.sync    D (16 x 8) = A (16 x k) B (k x 8) + C     of one warp, all in registers
    wgmma       D (64 x n) = A (64 x k) B (k x n) + D     of four warps, 16 rows each; B, and A too
                                                          or not, in shared memory

A lane l holds of an accumulator the rows l / 4 and l / 4 + 8 and, in each eight columns, the
columns 2 (l % 4) and 2 (l % 4) + 1 (PTX ISA, "Matrix fragments").
"""

import dataclasses

import numpy as np

from .arithmetic import F32, F64, U32, unpacked
from .memory import Shared, swizzled

LANES = np.arange(32)
ROW, PAIR = LANES // 4, LANES % 4

# ------------------------------------------------------------------ fragments


def accumulator(registers: list[np.ndarray]) -> np.ndarray:
    """The 16 x n matrix that n / 2 registers of 32 lanes hold."""
    out = np.empty((16, 2 * len(registers)), F32)
    for i, x in enumerate(registers):
        out[_row(i), _column(i)] = x.view(F32)
    return out


def accumulator_registers(matrix: np.ndarray) -> list[np.ndarray]:
    count = matrix.shape[1] // 2
    return [matrix[_row(i), _column(i)].astype(F32) for i in range(count)]


def _row(i):
    return ROW + 8 * (i // 2 % 2)


def _column(i):
    return 8 * (i // 4) + 2 * PAIR + i % 2


def left(registers: list[np.ndarray], dtype) -> np.ndarray:
    """A, 16 x 16 of 16 bits or 16 x 8 of 32, in four registers."""
    out = np.empty((16, 16 if dtype.itemsize == 2 else 8), F64)
    for i, x in enumerate(registers):
        row, column = ROW + 8 * (i % 2), out.shape[1] // 2 * (i // 2)
        _scatter(out, x, dtype, row, column)
    return out


def right(registers: list[np.ndarray], dtype) -> np.ndarray:
    """B, 16 x 8 of 16 bits or 8 x 8 of 32, in two registers."""
    out = np.empty((8, 16 if dtype.itemsize == 2 else 8), F64)
    for i, x in enumerate(registers):
        _scatter(out, x, dtype, ROW, out.shape[1] // 2 * i)
    return out.T


def _scatter(out, x, dtype, row, column):
    if dtype.itemsize == 2:
        out[row, column + 2 * PAIR], out[row, column + 2 * PAIR + 1] = unpacked(x, dtype).T
    else:
        # TF32 ignores the 13 lowest bits of a float32.
        out[row, column + PAIR] = (x.view(U32) & U32.type(0xFFFFE000)).view(F32)


def multiply(a: list, b: list, c: list, dtype) -> list[np.ndarray]:
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
