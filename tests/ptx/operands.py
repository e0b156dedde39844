"""What the operands of an instruction stand for: registers, numbers, addresses."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .arithmetic import PREDICATE, U32, U64, bits
from .machine import Warp
from .memory import SHARED, KernelError, TensorMap
from .program import Program

Read = Callable[[Warp], np.ndarray]


class Launch(NamedTuple):
    """What the host gives a kernel."""

    grid: tuple[int, int, int]
    shared_bytes: int
    parameters: dict[str, int]  # values
    structures: dict[str, int]  # addresses of the parameters that are passed by value
    tensor_maps: dict[int, TensorMap]


class Operands:
    """Reads the operands of a program."""

    def __init__(self, program: Program, launch: Launch):
        self.launch = launch
        self.symbols = launch.structures | dict.fromkeys(program.shared, SHARED)

    def read(self, operand: str, dtype: np.dtype) -> Read:
        """A register, a number, or the address that a name stands for."""
        if re.match(r"-?\d|0[fF]", operand):
            value = np.broadcast_to(_number(operand, dtype), 32)
            return lambda warp: value
        if operand in self.symbols or operand.partition("+")[0] in self.symbols:
            symbol, _, offset = operand.partition("+")
            address = np.full(32, self.symbols[symbol] + int(offset or 0), dtype)
            return lambda warp: address

        def register(warp: Warp) -> np.ndarray:
            value = warp.registers[operand]
            return value if value.dtype is dtype else bits(value, dtype)

        return register

    def address(self, operand: str) -> Read:
        """[register or name + offset] as signed numbers."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        read, by = self.read(base, U64), int(offset or 0)
        return lambda warp: read(warp).astype(np.int64) + by


def _number(operand: str, dtype: np.dtype):
    if operand[:2] in ("0f", "0F"):
        return bits(np.array([int(operand[2:], 16)], U32), dtype)[0]
    value = int(operand.removesuffix("U"), 0)
    if dtype is PREDICATE:
        return np.bool_(value)
    return np.array([value & (1 << 8 * dtype.itemsize) - 1], f"u{dtype.itemsize}").view(dtype)[0]


def only_lane(mask: np.ndarray) -> int:
    """The only lane that takes part."""
    if mask.sum() != 1:
        raise KernelError(f"a copy is started by {mask.sum()} lanes")
    return int(mask.argmax())


def common(values: np.ndarray, mask: np.ndarray) -> int:
    """What all lanes that take part agree on."""
    chosen = values[mask]
    if (chosen != chosen[0]).any():
        raise KernelError("lanes disagree on an operand that must be common")
    return int(chosen[0])
