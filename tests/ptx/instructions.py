"""Instructions as functions of a warp."""

import numpy as np

from . import copies, products
from .arithmetic import TYPES, U16, U32, U64, operation, packed, unpacked
from .machine import ALL, Decoded, Step, Warp
from .memory import Barrier, KernelError, Shared
from .operands import Launch, Operands, common
from .program import Instruction, Program, vector


def decode(program: Program, launch: Launch) -> list[Decoded]:
    operands = Operands(program, launch)
    return [_decoded(program, operands, instruction) for instruction in program.instructions]


def _decoded(program: Program, operands: Operands, instruction: Instruction) -> Decoded:
    name, target = instruction.parts[0], None
    if name == "ret":
        target = len(program.instructions)
    if name == "bra":
        target = program.labels[instruction.operands[0]]
    make = INSTRUCTIONS.get(name, _compute)
    return Decoded(
        _nothing(operands, instruction) if target is not None else make(operands, instruction),
        instruction.text,
        instruction.guard,
        instruction.unless,
        visible=name in INSTRUCTIONS,
        uniform=target is not None or name in UNIFORM,
        target=target,
    )


# ------------------------------------------------------------------ what computes


def _compute(operands: Operands, instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    if instruction.parts[0] == "mov" and (target.startswith("{") or sources[0].startswith("{")):
        return _move_parts(operands, target, sources[0])
    function, dtypes = operation(instruction.parts)
    reads = [operands.read(s, dtype) for s, dtype in zip(sources, dtypes, strict=True)]

    def step(warp: Warp):
        warp.put(target, function(*[read(warp) for read in reads]))

    return step


def _move_parts(operands: Operands, target: str, source: str) -> Step:
    """mov between a register and the two halves of its bits."""
    if target.startswith("{"):
        read, names = operands.read(source, U32), vector(target)

        def split(warp: Warp):
            for name, half in zip(names, unpacked(read(warp), U16).T, strict=True):
                warp.put(name, half)

        return split
    low, high = (operands.read(part, U16) for part in vector(source))
    return lambda warp: warp.put(target, packed(low(warp), high(warp)))


def _convert_address(operands: Operands, instruction: Instruction) -> Step:
    target, source = instruction.operands
    read = operands.read(source, U64)
    return lambda warp: warp.put(target, read(warp))


def _elect(operands: Operands, instruction: Instruction) -> Step:
    leader, predicate = instruction.operands[0].split("|")

    def step(warp: Warp):
        warp.put(leader, np.zeros(32, U32))
        warp.put(predicate, np.arange(32) == 0)

    return step


def _shuffle(operands: Operands, instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    value, by, _, _ = (operands.read(s, U32) for s in sources)
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
    space = next((p for p in (p.split("::")[0] for p in parts) if p in SPACES), "generic")
    return space, TYPES[parts[-1]].itemsize if parts[-1] in TYPES else int(parts[-1][1:]) // 8


SPACES = "shared", "global", "param"


def _load(operands: Operands, instruction: Instruction) -> Step:
    space, width = _access(instruction.parts)
    names = vector(instruction.operands[0])
    if space == "param":
        key = instruction.operands[1].strip("[] ")
        value = np.full(32, operands.launch.parameters[key], U64)
        return lambda warp: warp.put(names[0], value)
    address = operands.address(instruction.operands[1])

    def step(warp: Warp):
        mask, where = warp.mask, address(warp)[warp.mask]
        values = _memory(warp, space, where).load(where, width, len(names))
        for name, value in zip(names, values, strict=True):
            if mask is not ALL:
                whole = np.zeros(32, value.dtype)
                whole[mask] = value
                value = whole
            warp.put(name, value)

    return step


def _store(operands: Operands, instruction: Instruction) -> Step:
    space, width = _access(instruction.parts)
    address = operands.address(instruction.operands[0])
    reads = [operands.read(name, np.dtype(f"u{width}")) for name in vector(instruction.operands[1])]

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


def _load_matrices(operands: Operands, instruction: Instruction) -> Step:
    """ldmatrix: each lane names a row of 16 bytes; of each 8 x 8 matrix it gets two elements."""
    names, address = vector(instruction.operands[0]), operands.address(instruction.operands[1])
    turn = _turned if "trans" in instruction.parts else np.ascontiguousarray

    def step(warp: Warp):
        where = address(warp)[: 8 * len(names)]
        rows = np.stack(warp.block.shared.load(where, 2, 8), axis=-1)
        for name, matrix in zip(names, rows.reshape(-1, 8, 8), strict=True):
            warp.put(name, turn(matrix).view(U32).reshape(32))

    return step


def _store_matrices(operands: Operands, instruction: Instruction) -> Step:
    """stmatrix: the other way round."""
    address, names = operands.address(instruction.operands[0]), vector(instruction.operands[1])
    reads = [operands.read(name, U32) for name in names]
    turn = _turned if "trans" in instruction.parts else np.ascontiguousarray

    def step(warp: Warp):
        where = address(warp)[: 8 * len(names)]
        matrices = [turn(unpacked(read(warp), U16).reshape(8, 8)) for read in reads]
        rows = np.concatenate(matrices)
        warp.block.shared.write(warp.number, where, 2, list(rows.T))

    return step


def _turned(matrix: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix.T)


# ------------------------------------------------------------------ waiting for each other


def _meet(operands: Operands, instruction: Instruction) -> Step:
    """bar.sync: some warps of the block, or all."""
    number, *count = (operands.read(operand, U32) for operand in instruction.operands)

    def step(warp: Warp):
        block = warp.block
        threads = common(count[0](warp), ALL) if count else block.threads
        key = common(number(warp), ALL)
        barrier = block.meetings.setdefault(key, Barrier(threads))
        if barrier.count != threads:
            if barrier.pending != barrier.count:
                raise KernelError(f"warps disagree on how many threads meet at barrier {key}")
            phase = barrier.phase
            barrier = block.meetings[key] = Barrier(threads)
            barrier.phase = phase
        phase = barrier.phase
        barrier.arrive(32)
        return lambda: barrier.phase != phase

    return step


def _mbarrier(operands: Operands, instruction: Instruction) -> Step:
    kinds = {"init": _initialise, "try_wait": _wait, "arrive": _arrive}
    if instruction.parts[1] not in kinds:
        raise NotImplementedError(f"the instruction {instruction.opcode}")
    return kinds[instruction.parts[1]](operands, instruction)


def _initialise(operands: Operands, instruction: Instruction) -> Step:
    address, count = instruction.operands
    address, count = operands.address(address), operands.read(count, U32)

    def step(warp: Warp):
        at, shared = common(address(warp), warp.mask), warp.block.shared
        shared.index(np.array([at]), 8)
        shared.barriers[at] = Barrier(common(count(warp), warp.mask))

    return step


def _wait(operands: Operands, instruction: Instruction) -> Step:
    """try_wait tells by a predicate whether it waited long enough: here it always does."""
    done, address, parity, *_ = instruction.operands
    address, parity = operands.address(address), operands.read(parity, U32)

    def step(warp: Warp):
        barrier = warp.block.shared.barrier(common(address(warp), ALL))
        phase = common(parity(warp), ALL)
        warp.put(done, ALL.copy())
        return lambda: barrier.passed(phase)

    return step


def _arrive(operands: Operands, instruction: Instruction) -> Step:
    """Each lane arrives: once and announcing bytes, or as often as it says."""
    announces = "expect_tx" in instruction.parts
    _, address, *amount = instruction.operands
    address, amount = operands.address(address), operands.read(amount[0] if amount else "1", U32)

    def step(warp: Warp):
        where, amounts = address(warp), amount(warp)
        for lane in np.flatnonzero(warp.mask):
            barrier = warp.block.shared.barrier(int(where[lane]))
            value = int(amounts[lane])
            barrier.arrive(1, value) if announces else barrier.arrive(value)

    return step


def _fence(operands: Operands, instruction: Instruction) -> Step:
    if "async" in instruction.opcode.split("proxy")[-1]:
        return lambda warp: warp.block.shared.fence(warp.number)
    return lambda warp: None


def _nothing(operands: Operands, instruction: Instruction) -> Step:
    return lambda warp: None


INSTRUCTIONS = {
    "cvta": _convert_address,
    "elect": _elect,
    "shfl": _shuffle,
    "ld": _load,
    "st": _store,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "bar": _meet,
    "barrier": _meet,
    "mbarrier": _mbarrier,
    "fence": _fence,
    "membar": _fence,
    "setmaxnreg": _nothing,
    "prefetch": _nothing,
    "cp": copies.copy,
    "mma": products.of_a_warp,
    "wgmma": products.of_a_warpgroup,
}
# All lanes take part, or none.
UNIFORM = (
    "mma",
    "wgmma",
    "ldmatrix",
    "stmatrix",
    "bar",
    "barrier",
    "shfl",
)
