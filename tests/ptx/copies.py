"""Copies that run by themselves: between device memory and shared memory, of lines or boxes."""

import re
from collections.abc import Callable

import numpy as np

from .arithmetic import PREDICATE, TYPES, U32, U64
from .machine import Step, Warp
from .memory import TensorMap
from .operands import Operands, Read, only_lane
from .program import Instruction


def copy(operands: Operands, instruction: Instruction) -> Step:
    parts = instruction.parts
    queue = (lambda warp: warp.bulk) if "bulk" in parts else (lambda warp: warp.copies)
    if "commit_group" in parts:
        return lambda warp: queue(warp).commit()
    if "wait_group" in parts:
        left = int(instruction.operands[0])
        return lambda warp: queue(warp).wait(left)
    if "bulk" not in parts:
        return _copy_of_lanes(operands, instruction)
    if "tensor" not in parts:
        return _copy_line_out(operands, instruction)
    into_shared = parts[5].startswith("shared")
    return (_copy_box_in if into_shared else _copy_box_out)(operands, instruction)


def _copy_of_lanes(operands: Operands, instruction: Instruction) -> Step:
    """cp.async: a few bytes a lane, and zeros after the first `given` of them."""
    target, source = (operands.address(operand) for operand in instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    given = _given(operands, size, instruction.operands[3:])

    def step(warp: Warp):
        mask, where, origin = warp.mask, target(warp), source(warp)
        left, block = given(warp), warp.block

        def copy():
            block.shared.bytes[block.shared.index(where[mask], size)[:, None] + np.arange(size)] = 0
            for taken in {int(n) for n in left[mask]} - {0}:
                lanes = mask & (left == taken)
                memory, part = block.device.at(origin[lanes]), np.arange(taken)
                found = memory.bytes[memory.index(origin[lanes], taken)[:, None] + part]
                block.shared.bytes[block.shared.index(where[lanes], taken)[:, None] + part] = found

        block.queued(warp.copies, copy)

    return step


def _given(operands: Operands, size: int, operand: tuple[str, ...]) -> Read:
    """Bytes of each lane that are copied: a number, or none where a predicate holds."""
    if operand and operand[0].startswith("%p"):
        ignored = operands.read(operand[0], PREDICATE)
        return lambda warp: np.where(ignored(warp), 0, size)
    return operands.read(operand[0] if operand else str(size), U32)


def _box(operands: Operands, operand: str) -> Callable[[Warp, int], tuple[TensorMap, list[int]]]:
    """[tensor map, {coordinates}]"""
    found = re.match(r"\[\s*(%\w+)\s*,\s*\{([^}]*)\}\s*\]", operand)
    assert found is not None, operand
    address = operands.read(found[1], U64)
    coordinates = [operands.read(c.strip(), TYPES["s32"]) for c in found[2].split(",")]

    def read(warp: Warp, lane: int):
        maps = operands.launch.tensor_maps
        return maps[int(address(warp)[lane])], [int(c(warp)[lane]) for c in coordinates]

    return read


def _copy_box_in(operands: Operands, instruction: Instruction) -> Step:
    target, box, signal = instruction.operands
    target, box, signal = operands.address(target), _box(operands, box), operands.address(signal)

    def step(warp: Warp):
        lane, block = only_lane(warp.mask), warp.block
        described, coordinates = box(warp, lane)
        where = described.in_shared(int(target(warp)[lane]))
        barrier = block.shared.barrier(int(signal(warp)[lane]))
        origin = described.in_device(coordinates)

        def copy():
            values = block.device.at(origin).load(origin, described.width, 1)
            block.shared.store(where, described.width, values)
            barrier.receive(described.bytes)

        block.start(copy)

    return step


def _copy_box_out(operands: Operands, instruction: Instruction) -> Step:
    box, source = _box(operands, instruction.operands[0]), operands.address(instruction.operands[1])

    def step(warp: Warp):
        lane, block = only_lane(warp.mask), warp.block
        described, coordinates = box(warp, lane)
        where = described.in_device(coordinates)
        origin = described.in_shared(int(source(warp)[lane]))
        block.shared.seen_by_copies(origin - block.shared.base)

        def copy():
            values = block.shared.load(origin, described.width, 1)
            block.device.at(where).store(where, described.width, values)

        block.queued(warp.bulk, copy)

    return step


def _copy_line_out(operands: Operands, instruction: Instruction) -> Step:
    target, source = (operands.address(operand) for operand in instruction.operands[:2])
    size = operands.read(instruction.operands[2], U32)

    def step(warp: Warp):
        lane, block = only_lane(warp.mask), warp.block
        offsets = 16 * np.arange(int(size(warp)[lane]) // 16)
        where, origin = (read(warp)[lane] + offsets for read in (target, source))
        first = int(origin[0]) - block.shared.base
        block.shared.seen_by_copies(slice(first, first + 16 * len(offsets)))

        def copy():
            block.device.at(where).store(where, 8, block.shared.load(origin, 8, 2))

        block.queued(warp.bulk, copy)

    return step
