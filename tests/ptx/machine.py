"""A block of threads: warps as coroutines that take turns in a random order.

A register of a warp is an array of its 32 lanes. A warp yields wherever another one could notice
the difference, and gives what it waits for, if anything.
"""

import collections
import dataclasses
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from . import tensor_cores
from .arithmetic import BF16, F16, F32, F64, PREDICATE, TYPES, U16, U32, U64, operation
from .memory import Barrier, DeviceMemory, Mistake, Shared, TensorMap
from .program import Instruction, Program, vector

ALL = np.ones(32, bool)
Condition = Callable[[], bool]
Step = Callable[["Warp"], Condition | None]
Read = Callable[["Warp"], np.ndarray]


class Launch(NamedTuple):
    """What the host gives a kernel."""

    grid: tuple[int, int, int]
    shared_bytes: int
    parameters: dict[str, int]  # values
    symbols: dict[str, int]  # addresses of the parameters that are structures
    tensor_maps: dict[int, TensorMap]


class Order(NamedTuple):
    """How a run goes where the hardware is free: who is next, and when copies happen."""

    seed: int = 0
    late: bool = False


class InFlight:
    """In place of a register that a product still reads or writes."""

    def __getattr__(self, name):
        raise Mistake("a register is used before the product that holds it is awaited")


class Queue:
    """What a warp has started and must wait for, in groups."""

    def __init__(self):
        self.open: list[Callable[[], None]] = []
        self.groups: collections.deque[list[Callable[[], None]]] = collections.deque()

    def commit(self):
        self.groups.append(self.open)
        self.open = []

    def wait(self, left: int):
        while len(self.groups) > left:
            for finish in self.groups.popleft():
                finish()


class Warp:
    """32 lanes with their registers."""

    def __init__(self, block: "Block", number: int):
        lanes = 32 * number + np.arange(32)
        named = {"%tid.x": lanes, "%laneid": np.arange(32)}
        named |= dict(zip(("%ctaid.x", "%ctaid.y", "%ctaid.z"), block.index, strict=True))
        fill = lambda value: np.broadcast_to(np.asarray(value, U32), 32)
        self.registers = {name: fill(value) for name, value in named.items()}
        self.block, self.number, self.mask = block, number, ALL
        self.bulk, self.copies, self.products = Queue(), Queue(), Queue()
        self.fenced: dict[str, np.ndarray] = {}  # registers at the last fence of products

    def put(self, name: str, value: np.ndarray):
        if name == "_":
            return
        if self.mask is not ALL:
            old = self.registers.get(name, np.zeros(32, value.dtype))
            value = np.where(self.mask, value, _as(old, value.dtype))
        self.registers[name] = value

    def run(self) -> Iterator[Condition | None]:
        code = self.block.code
        at = 0
        while True:
            step = code.steps[at]
            at += 1
            if step.visible:
                yield None
            self.mask = ALL
            if step.guard is not None:
                self.mask = self.registers[step.guard] ^ step.unless
                if step.uniform and self.mask.any() != self.mask.all():
                    raise Mistake(f"lanes of a warp part at {step.text!r}")
                if not self.mask.any():
                    continue
            if step.target is not None:
                if step.target == len(code.steps):
                    break
                at = step.target
            else:
                try:
                    wait = step.run(self)
                except Mistake as mistake:
                    raise Mistake(f"{mistake}; warp {self.number}: {step.text}") from None
                while wait is not None and not wait():
                    yield wait
        if any(queue.open or queue.groups for queue in (self.bulk, self.products)):
            raise Mistake("a kernel ends before its copies or products")


class Block:
    """Warps with a shared memory."""

    def __init__(
        self,
        code: "Code",
        launch: Launch,
        device: DeviceMemory,
        index: tuple[int, int, int],
        order: Order,
    ):
        self.code, self.launch, self.device, self.index = code, launch, device, index
        self.late, self.random = order.late, random.Random(f"{order.seed} {index}")
        self.shared = Shared(launch.shared_bytes)
        self.meetings: dict[int, Barrier] = {}
        self.pending: list[Callable[[], None]] = []  # copies into shared memory under way
        self.warps = code.threads // 32

    def run(self):
        runs = {i: Warp(self, i).run() for i in range(self.warps)}
        waits: dict[int, Condition] = {}
        # Some warps are much faster than others.
        speed = [1000 ** self.random.random() for _ in runs]
        while runs:
            ready = [i for i in runs if i not in waits or waits[i]()]
            if not ready:
                self._complete()
                continue
            (number,) = self.random.choices(ready, [speed[i] for i in ready])
            waits.pop(number, None)
            for _ in range(self.random.choice((1, 4, 100))):
                try:
                    wait = next(runs[number])
                except StopIteration:
                    del runs[number]
                    break
                if wait is not None:
                    waits[number] = wait
                    break
        if self.pending:
            raise Mistake("a kernel ends before the copies into its shared memory")

    def _complete(self):
        """Nobody can go on: one of the copies under way arrives."""
        if not self.pending:
            raise Mistake("all warps wait for ever")
        self.pending.pop(self.random.randrange(len(self.pending)))()

    def start(self, copy: Callable[[], None]):
        """A copy into shared memory, which a barrier awaits."""
        if self.late:
            self.pending.append(copy)
        else:
            copy()

    def queued(self, queue: Queue, act: Callable[[], None]):
        """What the warp awaits by a queue of its own."""
        if self.late:
            queue.open.append(act)
        else:
            act()
            queue.open.append(lambda: None)


# ------------------------------------------------------------------ decoding


@dataclasses.dataclass(frozen=True)
class Decoded:
    """An instruction as a function of a warp; a branch has a target in its place."""

    run: Step
    text: str
    guard: str | None
    unless: bool
    visible: bool  # to other warps: they may go first
    uniform: bool  # all lanes must take part, or none
    target: int | None = None


class Code:
    """A decoded program."""

    def __init__(self, program: Program, launch: Launch):
        self.threads = program.threads
        self.symbols = launch.symbols | dict.fromkeys(program.shared, Shared(0).base)
        self.launch = launch
        self.labels = program.labels
        self.end = len(program.instructions)
        self.steps = [self._decode(instruction) for instruction in program.instructions]

    def _decode(self, instruction: Instruction) -> Decoded:
        name, target = instruction.parts[0], None
        if name == "ret":
            target = self.end
        if name == "bra":
            target = self.labels[instruction.operands[0]]
        make = INSTRUCTIONS.get(name, _compute)
        step = (lambda warp: None) if target is not None else make(self, instruction)
        # What computes is seen by nobody else; a branch can be one that spins.
        visible = make is not _compute and name not in ("ret", "bra")
        uniform = target is not None or name in (
            "mma",
            "wgmma",
            "ldmatrix",
            "bar",
            "barrier",
            "shfl",
        )
        guard, unless = instruction.guard, instruction.unless
        return Decoded(step, instruction.text, guard, unless, visible, uniform, target)

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
            return value if value.dtype is dtype else _as(value, dtype)

        return register

    def address(self, operand: str) -> Read:
        """[register or name + offset] as signed numbers."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        read, by = self.read(base, U64), int(offset or 0)
        return lambda warp: read(warp).astype(np.int64) + by


def _as(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The bits of a register as another type, narrowed or widened with zeros."""
    if value.dtype == dtype:
        return value.view(dtype)  # the one object that stands for the type
    if dtype is PREDICATE or value.dtype == PREDICATE:
        return value.astype(dtype)
    if value.dtype.itemsize != dtype.itemsize:
        unsigned = np.dtype(f"u{value.dtype.itemsize}")
        value = value.view(unsigned).astype(f"u{dtype.itemsize}")
    return value.view(dtype)


def _number(operand: str, dtype: np.dtype):
    if operand[:2] in ("0f", "0F"):
        return _as(np.array([int(operand[2:], 16)], U32), dtype)[0]
    value = int(operand, 0)
    if dtype is PREDICATE:
        return np.bool_(value)
    return np.array([value & (1 << 8 * dtype.itemsize) - 1], f"u{dtype.itemsize}").view(dtype)[0]


def _lane(mask: np.ndarray) -> int:
    """The only lane that takes part."""
    if mask.sum() != 1:
        raise Mistake(f"a copy is started by {mask.sum()} lanes")
    return int(mask.argmax())


def _once(values: np.ndarray, mask: np.ndarray) -> int:
    """What all lanes that take part agree on."""
    chosen = values[mask]
    if (chosen != chosen[0]).any():
        raise Mistake("lanes disagree on an operand that must be common")
    return int(chosen[0])


# ------------------------------------------------------------------ what computes


def _compute(code: Code, instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    if instruction.parts[0] == "mov" and (target.startswith("{") or sources[0].startswith("{")):
        return _move_parts(code, target, sources[0])
    function, dtypes = operation(instruction.parts)
    reads = [code.read(s, dtype) for s, dtype in zip(sources, dtypes, strict=True)]

    def step(warp: Warp):
        warp.put(target, function(*[read(warp) for read in reads]))

    return step


def _move_parts(code: Code, target: str, source: str) -> Step:
    """mov between a register and the two halves of its bits."""
    if target.startswith("{"):
        read, names = code.read(source, U32), vector(target)

        def split(warp: Warp):
            for name, half in zip(names, tensor_cores.unpacked(read(warp), U16).T, strict=True):
                warp.put(name, half)

        return split
    low, high = (code.read(part, U16) for part in vector(source))
    return lambda warp: warp.put(target, tensor_cores.packed(low(warp), high(warp)))


def _convert_address(code: Code, instruction: Instruction) -> Step:
    target, source = instruction.operands
    read = code.read(source, U64)
    return lambda warp: warp.put(target, read(warp))


def _elect(code: Code, instruction: Instruction) -> Step:
    leader, predicate = instruction.operands[0].split("|")

    def step(warp: Warp):
        warp.put(leader, np.zeros(32, U32))
        warp.put(predicate, np.arange(32) == 0)

    return step


def _shuffle(code: Code, instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    value, by, _, _ = (code.read(s, U32) for s in sources)
    lanes, kind = np.arange(32), instruction.parts[2]

    def step(warp: Warp):
        other = by(warp).astype(int)
        source = {"idx": other, "bfly": lanes ^ other, "down": lanes + other, "up": lanes - other}
        chosen = source[kind]
        inside = (chosen >= 0) & (chosen < 32)
        warp.put(target, value(warp)[np.where(inside, chosen, lanes)])

    return step


# ------------------------------------------------------------------ loads and stores


def _access(parts: tuple[str, ...]) -> tuple[str, int]:
    """(space, bytes of a number); generic where the opcode names no space."""
    space = next((p.split("::")[0] for p in parts[1:] if p in SPACES), "generic")
    return space, TYPES[parts[-1]].itemsize if parts[-1] in TYPES else int(parts[-1][1:]) // 8


SPACES = ("shared", "shared::cta", "global", "param")


def _load(code: Code, instruction: Instruction) -> Step:
    space, width = _access(instruction.parts)
    names = vector(instruction.operands[0])
    if space == "param":
        key = instruction.operands[1].strip("[] ")
        value = np.full(32, code.launch.parameters[key], U64)
        return lambda warp: warp.put(names[0], value)
    address = code.address(instruction.operands[1])

    def step(warp: Warp):
        mask, where = warp.mask, address(warp)[warp.mask]
        for name, value in zip(names, _memory(warp, space, where).load(where, width, len(names))):
            if mask is not ALL:
                whole = np.zeros(32, value.dtype)
                whole[mask] = value
                value = whole
            warp.put(name, value)

    return step


def _store(code: Code, instruction: Instruction) -> Step:
    space, width = _access(instruction.parts)
    address = code.address(instruction.operands[0])
    reads = [code.read(name, np.dtype(f"u{width}")) for name in vector(instruction.operands[1])]

    def step(warp: Warp):
        where = address(warp)[warp.mask]
        values = [read(warp)[warp.mask] for read in reads]
        memory = _memory(warp, space, where)
        if isinstance(memory, Shared):
            memory.write(warp.number, where, width, values)
        else:
            memory.store(where, width, values)

    return step


def _memory(warp: Warp, space: str, where: np.ndarray):
    block = warp.block
    if space == "shared" or (space == "generic" and where[0] < 1 << 32):
        return block.shared
    return block.device.at(where)


def _load_matrices(code: Code, instruction: Instruction) -> Step:
    """ldmatrix: each lane names a row of 16 bytes; of each 8 x 8 matrix it gets two elements."""
    names, address = vector(instruction.operands[0]), code.address(instruction.operands[1])
    transpose = "trans" in instruction.parts

    def step(warp: Warp):
        where = address(warp)[: 8 * len(names)]
        rows = np.stack(warp.block.shared.load(where, 2, 8), axis=-1)
        for name, matrix in zip(names, rows.reshape(-1, 8, 8)):
            if transpose:
                matrix = matrix.T
            warp.put(name, np.ascontiguousarray(matrix).view(U32).reshape(32))

    return step


# ------------------------------------------------------------------ waiting for each other


def _meet(code: Code, instruction: Instruction) -> Step:
    """bar.sync: some warps of the block, or all."""
    number, *count = (code.read(operand, U32) for operand in instruction.operands)

    def step(warp: Warp):
        block = warp.block
        threads = _once(count[0](warp), ALL) if count else code.threads
        key = _once(number(warp), ALL)
        barrier = block.meetings.setdefault(key, Barrier(threads))
        if barrier.count != threads:
            if barrier.pending != barrier.count:
                raise Mistake(f"warps disagree on how many threads meet at barrier {key}")
            phase = barrier.phase
            barrier = block.meetings[key] = Barrier(threads)
            barrier.phase = phase
        phase = barrier.phase
        barrier.arrive(32)
        return lambda: barrier.phase != phase

    return step


def _mbarrier(code: Code, instruction: Instruction) -> Step:
    kind, operands = instruction.parts[1], instruction.operands
    if kind == "init":
        address, count = code.address(operands[0]), code.read(operands[1], U32)

        def initialise(warp: Warp):
            at = _once(address(warp), warp.mask)
            warp.block.shared.index(np.array([at]), 8)
            warp.block.shared.barriers[at] = Barrier(_once(count(warp), warp.mask))

        return initialise
    if kind == "try_wait":
        address, parity = code.address(operands[1]), code.read(operands[2], U32)

        def wait(warp: Warp):
            barrier = warp.block.shared.barrier(_once(address(warp), ALL))
            phase = _once(parity(warp), ALL)
            warp.put(operands[0], ALL.copy())
            return lambda: barrier.passed(phase)

        return wait
    if kind == "arrive":
        announces = "expect_tx" in instruction.parts
        address = code.address(operands[1])
        amount = code.read(operands[2] if len(operands) > 2 else "1", U32)

        def arrive(warp: Warp):
            where, amounts = address(warp), amount(warp)
            for lane in np.flatnonzero(warp.mask):
                barrier = warp.block.shared.barrier(int(where[lane]))
                value = int(amounts[lane])
                barrier.arrive(1, value) if announces else barrier.arrive(value)

        return arrive
    raise NotImplementedError(f"the instruction {instruction.opcode}")


def _fence(code: Code, instruction: Instruction) -> Step:
    if "async" in instruction.opcode.split("proxy")[-1]:
        return lambda warp: warp.block.shared.fence(warp.number)
    return lambda warp: None


def _nothing(code: Code, instruction: Instruction) -> Step:
    return lambda warp: None


# ------------------------------------------------------------------ copies


def _copy(code: Code, instruction: Instruction) -> Step:
    parts = instruction.parts
    queue = (lambda warp: warp.bulk) if "bulk" in parts else (lambda warp: warp.copies)
    if "commit_group" in parts:
        return lambda warp: queue(warp).commit()
    if "wait_group" in parts:
        left = int(instruction.operands[0])
        return lambda warp: queue(warp).wait(left)
    if "bulk" not in parts:
        return _copy_of_lanes(code, instruction)
    if "tensor" not in parts:
        return _copy_line_out(code, instruction)
    into_shared = parts[5].startswith("shared")
    return (_copy_box_in if into_shared else _copy_box_out)(code, instruction)


def _copy_of_lanes(code: Code, instruction: Instruction) -> Step:
    """cp.async: a few bytes a lane, and zeros after the first `given` of them."""
    target, source = (code.address(operand) for operand in instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    given = code.read(instruction.operands[-1], U32)

    def step(warp: Warp):
        mask, where, origin = warp.mask, target(warp), source(warp)
        left, block = given(warp), warp.block
        block.shared.index(where[mask], size)

        def copy():
            for lane in np.flatnonzero(mask):
                filled = np.zeros(size, np.uint8)
                if taken := int(left[lane]):
                    memory = block.device.at(origin[lane : lane + 1])
                    first = int(memory.index(origin[lane : lane + 1], taken)[0])
                    filled[:taken] = memory.bytes[first : first + taken]
                first = int(where[lane]) - block.shared.base
                block.shared.bytes[first : first + size] = filled

        block.queued(warp.copies, copy)

    return step


def _box(code: Code, operand: str) -> Callable[[Warp, int], tuple[TensorMap, list[int]]]:
    """[tensor map, {coordinates}]"""
    found = re.match(r"\[\s*(%\w+)\s*,\s*\{([^}]*)\}\s*\]", operand)
    assert found is not None, operand
    address = code.read(found[1], U64)
    coordinates = [code.read(c.strip(), TYPES["s32"]) for c in found[2].split(",")]

    def read(warp: Warp, lane: int):
        maps = code.launch.tensor_maps
        return maps[int(address(warp)[lane])], [int(c(warp)[lane]) for c in coordinates]

    return read


def _copy_box_in(code: Code, instruction: Instruction) -> Step:
    target, box, signal = instruction.operands
    target, box, signal = code.address(target), _box(code, box), code.address(signal)

    def step(warp: Warp):
        lane, block = _lane(warp.mask), warp.block
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


def _copy_box_out(code: Code, instruction: Instruction) -> Step:
    box, source = _box(code, instruction.operands[0]), code.address(instruction.operands[1])

    def step(warp: Warp):
        lane, block = _lane(warp.mask), warp.block
        described, coordinates = box(warp, lane)
        where, origin = (
            described.in_device(coordinates),
            described.in_shared(int(source(warp)[lane])),
        )
        block.shared.seen_by_copies(origin - block.shared.base)

        def copy():
            values = block.shared.load(origin, described.width, 1)
            block.device.at(where).store(where, described.width, values)

        block.queued(warp.bulk, copy)

    return step


def _copy_line_out(code: Code, instruction: Instruction) -> Step:
    target, source = (code.address(operand) for operand in instruction.operands[:2])
    size = code.read(instruction.operands[2], U32)

    def step(warp: Warp):
        lane, block = _lane(warp.mask), warp.block
        offsets = 16 * np.arange(int(size(warp)[lane]) // 16)
        where, origin = (read(warp)[lane] + offsets for read in (target, source))
        block.shared.seen_by_copies(slice(origin[0] - block.shared.base, origin[-1] + 16))

        def copy():
            block.device.at(where).store(where, 8, block.shared.load(origin, 8, 2))

        block.queued(warp.bulk, copy)

    return step


# ------------------------------------------------------------------ products of matrices


def _warp_product(code: Code, instruction: Instruction) -> Step:
    """mma.sync"""
    names, *factors = map(vector, instruction.operands)
    dtype = {"bf16": BF16, "f16": F16, "tf32": F32}[instruction.parts[-2]]
    a, b, c = ([code.read(name, U32) for name in factor] for factor in factors)

    def step(warp: Warp):
        values = ([read(warp) for read in reads] for reads in (a, b, c))
        for name, value in zip(names, tensor_cores.multiply(*values, dtype), strict=True):
            warp.put(name, value)

    return step


def _warpgroup_product(code: Code, instruction: Instruction) -> Step:
    """wgmma: this warp's 16 of the 64 rows."""
    if "fence" in instruction.parts:
        return lambda warp: warp.fenced.update(warp.registers)
    if "commit_group" in instruction.parts:
        return lambda warp: warp.products.commit()
    if "wait_group" in instruction.parts:
        left = int(instruction.operands[0])
        return lambda warp: warp.products.wait(left)
    totals, a, b, accumulate, *rest = instruction.operands
    names, size = vector(totals), re.search(r"m64n(\d+)k16", instruction.opcode)
    dtype = {"bf16": BF16, "f16": F16}[instruction.parts[-1]]
    assert size is not None and rest[:2] == ["1", "1"], instruction.text
    n, keep = int(size[1]), code.read(accumulate, PREDICATE)
    right = code.read(b, U64)
    if a.startswith("{"):
        left, held, (transpose,) = [code.read(x, U32) for x in vector(a)], vector(a), rest[2:]
    else:
        left, held, (over, transpose) = code.read(a, U64), [], rest[2:]
        assert over == "0", "a transposed left factor"

    def rows(warp: Warp) -> np.ndarray:
        if isinstance(left, list):
            return tensor_cores.left([warp.registers[name] for name in held], dtype)
        described = tensor_cores.Descriptor.of(_once(left(warp), ALL))
        matrix = described.read(warp.block.shared, 64, 16, True, dtype)
        return matrix[16 * (warp.number % 4) :][:16]

    def step(warp: Warp):
        registers, described = warp.registers, _once(right(warp), ALL)
        following = isinstance(registers[names[0]], Product)
        for name in held if following else [*held, *names]:
            if warp.fenced.get(name) is not registers[name]:
                raise Mistake(f"{name} was written after the last fence of products")
        product = registers[names[0]] if following else Product(names, registers)
        if not _once(keep(warp), ALL):
            raise NotImplementedError("a product that does not accumulate")
        transposed = transpose == "1"

        def act():
            shared, found = warp.block.shared, tensor_cores.Descriptor.of(described)
            factor = found.read(shared, n, 16, not transposed, dtype)
            product.total += rows(warp) @ factor.T

        product.under_way += 1
        warp.block.queued(warp.products, act)
        warp.products.open.append(lambda: product.land(registers))
        for name in names:
            registers[name] = product

    return step


class Product(InFlight):
    """The accumulators of a product under way."""

    def __init__(self, names: list[str], registers: dict[str, np.ndarray]):
        self.names = names
        self.total = tensor_cores.accumulator([registers[n] for n in names]).astype(F64)
        self.under_way = 0

    def land(self, registers: dict):
        self.under_way -= 1
        if self.under_way:
            return
        values = tensor_cores.accumulator_registers(self.total)
        for name, value in zip(self.names, values, strict=True):
            registers[name] = value


INSTRUCTIONS = {
    "cvta": _convert_address,
    "elect": _elect,
    "shfl": _shuffle,
    "ld": _load,
    "st": _store,
    "ldmatrix": _load_matrices,
    "bar": _meet,
    "barrier": _meet,
    "mbarrier": _mbarrier,
    "fence": _fence,
    "membar": _fence,
    "setmaxnreg": _nothing,
    "cp": _copy,
    "mma": _warp_product,
    "wgmma": _warpgroup_product,
}
