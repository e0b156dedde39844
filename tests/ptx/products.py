"""Products of matrices by a warp (mma.sync) and by four of them (wgmma)."""

import re
from collections.abc import Callable

import numpy as np

from . import tensor_cores
from .arithmetic import BF16, F16, F32, F64, PREDICATE, U32, U64
from .machine import ALL, Step, Warp
from .memory import KernelError
from .operands import Operands, common
from .program import Instruction, vector

DTYPES = {"bf16": BF16, "f16": F16, "tf32": F32}
Matrix = Callable[[Warp], np.ndarray]


def of_a_warp(operands: Operands, instruction: Instruction) -> Step:
    names, *factors = map(vector, instruction.operands)
    a, b, c = ([operands.read(name, U32) for name in factor] for factor in factors)
    dtype = DTYPES[instruction.parts[-2]]

    def step(warp: Warp):
        x, y, z = ([read(warp) for read in reads] for reads in (a, b, c))
        for name, value in zip(names, tensor_cores.multiply(x, y, z, dtype), strict=True):
            warp.put(name, value)

    return step


def of_a_warpgroup(operands: Operands, instruction: Instruction) -> Step:
    if "fence" in instruction.parts:
        return lambda warp: warp.fenced.update(warp.registers)
    if "commit_group" in instruction.parts:
        return lambda warp: warp.products.commit()
    if "wait_group" in instruction.parts:
        left = int(instruction.operands[0])
        return lambda warp: warp.products.wait(left)
    return _product(operands, instruction)


class Product:
    """The accumulators of a warp while products are under way, in place of its registers."""

    def __init__(self, names: list[str], registers: dict):
        self.names, self.under_way = names, 0
        self.total = tensor_cores.accumulator([registers[n] for n in names]).astype(F64)

    @property
    def dtype(self):
        raise KernelError("a register is used before the product that holds it is awaited")

    def land(self, registers: dict):
        self.under_way -= 1
        if self.under_way == 0:
            values = tensor_cores.accumulator_registers(self.total)
            registers.update(zip(self.names, values, strict=True))


def _product(operands: Operands, instruction: Instruction) -> Step:
    """{accumulators}, left, right, accumulate, signs, transpositions: this warp's 16 rows of 64."""
    totals, a, b, accumulate, *rest = instruction.operands
    size = re.search(r"m64n(\d+)k16", instruction.opcode)
    assert size is not None and rest[:2] == ["1", "1"], instruction.text
    names, dtype, keep = vector(totals), DTYPES[instruction.parts[-1]], accumulate
    held = vector(a) if a.startswith("{") else []
    *left_major, right_major = [flag == "0" for flag in rest[2:]]
    left = _held(held, dtype) if held else _rows(operands, a, left_major[0], dtype)
    right = _shared(operands, b, int(size[1]), right_major, dtype)
    accumulates = operands.read(keep, PREDICATE)

    def step(warp: Warp):
        registers = warp.registers
        product = registers[names[0]]
        following = isinstance(product, Product) and product.names == names
        for name in held if following else [*held, *names]:
            if warp.fenced.get(name) is not registers[name]:
                raise KernelError(f"{name} was written after the last fence of products")
        if not common(accumulates(warp), ALL):
            raise NotImplementedError("a product that does not accumulate")
        product = product if following else Product(names, registers)
        product.under_way += 1
        registers.update(dict.fromkeys(names, product))
        factor = right(warp)

        def act():
            product.total += left(warp) @ factor().T

        warp.block.queued(warp.products, act)
        warp.products.open.append(lambda: product.land(registers))

    return step


def _held(names: list[str], dtype: np.dtype) -> Matrix:
    """A left factor in registers."""
    return lambda warp: tensor_cores.left([warp.registers[name] for name in names], dtype)


def _rows(operands: Operands, operand: str, k_major: bool, dtype: np.dtype) -> Matrix:
    """This warp's rows of a left factor in shared memory."""
    shared = _shared(operands, operand, 64, k_major, dtype)
    return lambda warp: shared(warp)()[16 * (warp.number % 4) :][:16]


def _shared(
    operands: Operands, operand: str, size: int, k_major: bool, dtype: np.dtype
) -> Callable[[Warp], Callable[[], np.ndarray]]:
    """A factor, size x 16, in shared memory: where it is now, and what it is when it is read."""
    described = operands.read(operand, U64)

    def find(warp: Warp):
        found = tensor_cores.Descriptor.of(common(described(warp), ALL))
        return lambda: found.read(warp.block.shared, size, 16, k_major, dtype)

    return find
