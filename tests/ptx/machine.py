"""A block of threads: warps as coroutines that take turns in a random order.

A register of a warp is an array of its 32 lanes. A warp yields wherever another one could notice
the difference, and gives what it waits for, if anything.
"""

import collections
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import U32, bits
from .memory import Barrier, DeviceMemory, KernelError, Shared

ALL = np.ones(32, bool)
SPREAD = 1000  # the fastest warp of a block against the slowest
TURNS = 1, 4, 100  # steps that others could notice, before somebody else may go on

Condition = Callable[[], bool]
Action = Callable[[], None]
Step = Callable[["Warp"], Condition | None]


class Order(NamedTuple):
    """How a run goes where the hardware is free: who is next, and when copies happen."""

    seed: int = 0
    late: bool = False


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


class Queue:
    """What a warp has started and must wait for, in groups."""

    def __init__(self):
        self.open: list[Action] = []
        self.groups: collections.deque[list[Action]] = collections.deque()

    def commit(self):
        self.groups.append(self.open)
        self.open = []

    def wait(self, left: int):
        while len(self.groups) > left:
            for finish in self.groups.popleft():
                finish()

    @property
    def empty(self) -> bool:
        return not self.open and not any(self.groups)


class Warp:
    """32 lanes with their registers."""

    def __init__(self, block: "Block", number: int):
        named = {"%tid.x": 32 * number + np.arange(32), "%laneid": np.arange(32)}
        named |= dict(zip(("%ctaid.x", "%ctaid.y", "%ctaid.z"), block.index, strict=True))
        fill = lambda value: np.broadcast_to(np.asarray(value, U32), 32)
        self.registers: dict[str, Any] = {name: fill(value) for name, value in named.items()}
        self.block, self.number, self.mask = block, number, ALL
        self.bulk, self.copies, self.products = Queue(), Queue(), Queue()
        self.fenced: dict[str, Any] = {}  # registers at the last fence of products

    def put(self, name: str, value: np.ndarray):
        """Writes a register in the lanes that take part."""
        if name == "_":
            return
        if self.mask is not ALL:
            old = self.registers.get(name, np.zeros(32, value.dtype))
            value = np.where(self.mask, value, bits(old, value.dtype))
        self.registers[name] = value

    def run(self) -> Iterator[Condition | None]:
        steps, at = self.block.steps, 0
        while at < len(steps):
            step = steps[at]
            at += 1
            if step.visible:
                yield None
            if not self._takes_part(step):
                continue
            if step.target is not None:
                at = step.target
                continue
            try:
                wait = step.run(self)
            except KernelError as error:
                raise KernelError(f"{error}; warp {self.number}: {step.text}") from None
            while wait is not None and not wait():
                yield wait
        if not (self.bulk.empty and self.products.empty):
            raise KernelError("a kernel ends before its copies or products")

    def _takes_part(self, step: Decoded) -> bool:
        self.mask = ALL
        if step.guard is None:
            return True
        self.mask = self.registers[step.guard] ^ step.unless
        if step.uniform and self.mask.any() != self.mask.all():
            raise KernelError(f"lanes of a warp part at {step.text!r}")
        return bool(self.mask.any())


class Block:
    """Warps with a shared memory."""

    def __init__(
        self,
        steps: Sequence[Decoded],
        threads: int,
        shared: Shared,
        device: DeviceMemory,
        index: tuple[int, ...],
        order: Order,
    ):
        self.steps, self.threads, self.shared, self.device = steps, threads, shared, device
        self.index, self.late = index, order.late
        self.random = random.Random(f"{order.seed} {index}")
        self.meetings: dict[int, Barrier] = {}
        self.pending: list[Action] = []  # copies into shared memory under way

    def run(self):
        runs = {i: Warp(self, i).run() for i in range(self.threads // 32)}
        waits: dict[int, Condition] = {}
        speed = [SPREAD ** self.random.random() for _ in runs]
        while runs:
            ready = [i for i in runs if i not in waits or waits[i]()]
            if not ready:
                self._complete()
                continue
            (number,) = self.random.choices(ready, [speed[i] for i in ready])
            waits.pop(number, None)
            for _ in range(self.random.choice(TURNS)):
                try:
                    wait = next(runs[number])
                except StopIteration:
                    del runs[number]
                    break
                if wait is not None:
                    waits[number] = wait
                    break
        if self.pending:
            raise KernelError("a kernel ends before the copies into its shared memory")

    def _complete(self):
        """Nobody can go on: one of the copies under way arrives."""
        if not self.pending:
            raise KernelError("all warps wait for ever")
        self.pending.pop(self.random.randrange(len(self.pending)))()

    def start(self, copy: Action):
        """A copy into shared memory, which a barrier awaits."""
        if self.late:
            self.pending.append(copy)
        else:
            copy()

    def queued(self, queue: Queue, act: Action):
        """What the warp awaits by a queue of its own."""
        if self.late:
            queue.open.append(act)
        else:
            act()
            queue.open.append(lambda: None)
