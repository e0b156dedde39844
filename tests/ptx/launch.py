"""Runs Pallas kernels as PTX: compiles them ahead of time and does what the host would do.

`interpreted` takes the place of `pl.pallas_call` and of `plgpu.kernel`, so that the functions that
call kernels run as they are, with the numbers of the PTX.
"""

import functools
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import machine_code
from benchmarks.machine_code import DEVICES, Device

from . import host
from .instructions import decode
from .machine import Block, Order
from .memory import DeviceMemory, Shared
from .operands import Launch
from .program import Program, parse

TRITON_SHARED_BYTES = 163 * 1024  # of a block on the device below; the PTX does not tell
MOSAIC, TRITON = DEVICES["9.0"], DEVICES["8.0"]


class Kernel(NamedTuple):
    """A compiled kernel and the text that tells how it is started."""

    program: Program
    host: str


@contextmanager
def interpreted(order: Order) -> Iterator[None]:
    """Pallas kernels run in the interpreter of PTX, in this order."""
    with _replaced(plgpu, "kernel", MOSAIC, order), _replaced(pl, "pallas_call", TRITON, order):
        yield


@contextmanager
def _replaced(module, name: str, device: Device, order: Order) -> Iterator[None]:
    original = getattr(module, name)

    def make(*args, **options):
        return functools.partial(_run, original(*args, **options), device, order)

    setattr(module, name, make)
    try:
        yield
    finally:
        setattr(module, name, original)


def _run(call: Callable[..., Any], device: Device, order: Order, *operands):
    """What `call(*operands)` gives on the device."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands]
    lowered = machine_code.lower(call, shapes, device)
    kernel = _compiled(lowered, device)
    outs, tree = jax.tree.flatten(lowered.out_info)
    memory = DeviceMemory([*map(np.asarray, operands), *(_unwritten(o) for o in outs)])
    described = _mosaic_launch if device == MOSAIC else _triton_launch
    execute(kernel.program, described(kernel, len(memory.buffers)), memory, order)
    found = enumerate(outs, start=len(operands))
    return tree.unflatten(jnp.asarray(memory.array(i, o.shape, o.dtype)) for i, o in found)


def execute(program: Program, launch: Launch, memory: DeviceMemory, order: Order):
    """Runs the blocks of the grid, one after the other."""
    steps, threads = decode(program, launch), program.threads
    with np.errstate(all="ignore"):
        for index in np.ndindex(launch.grid):
            shared = Shared(launch.shared_bytes)
            Block(steps, threads, shared, memory, index, order).run()


def _unwritten(out) -> np.ndarray:
    size = math.prod(out.shape) * out.dtype.itemsize
    return np.full(size, 0xFF, np.uint8).view(out.dtype).reshape(out.shape)


COMPILED: dict[str, Kernel] = {}  # The plugin writes nothing for a kernel that it has met before.


def _compiled(lowered, device: Device) -> Kernel:
    text = lowered.as_text()
    if text not in COMPILED:
        with tempfile.TemporaryDirectory() as folder:
            machine_code.compiled(lowered, device, folder)
            read = _mosaic_kernel if device == MOSAIC else _triton_kernel
            COMPILED[text] = read(Path(folder), text)
    return COMPILED[text]


# ------------------------------------------------------------------ Triton


def _triton_kernel(folder: Path, text: str) -> Kernel:
    """XLA writes what it makes of the program around the kernel, too."""
    name = re.search(r"@__gpu\$xla\.gpu\.triton.* name = \"(\w+)\"", text)
    assert name is not None, "the program holds no kernel on Triton"
    sources = [file.read_text() for file in folder.glob("*.ptx")]
    (source,) = [source for source in sources if f".entry {name[1]}(" in source]
    return Kernel(parse(source), text)


def _triton_launch(kernel: Kernel, arrays: int) -> Launch:
    grid = [int(n) for n in re.findall(r"grid_[xyz] = (\d+)", kernel.host)]
    # Pointers to the arrays, and some to scratch memory that no kernel here uses.
    addresses = [*map(DeviceMemory.address, range(arrays)), *[0] * len(kernel.program.parameters)]
    parameters = dict(zip(kernel.program.parameters, addresses, strict=False))
    return Launch((grid[0], grid[1], grid[2]), TRITON_SHARED_BYTES, parameters, {}, {})


# ------------------------------------------------------------------ Mosaic


def _mosaic_kernel(folder: Path, text: str) -> Kernel:
    """The host program is the last function that starts the kernel, in the log of the passes."""
    (passes,) = folder.glob("*.mlir-passes.log")
    log, source = passes.read_text(), Path(str(passes).replace(".mlir-passes.log", ".ptx"))
    start = log.rindex("gpu.launch_func")
    first, end = log.rindex("func.func @", 0, start), log.index("\n", start)
    return Kernel(parse(source.read_text()), log[first:end])


def _mosaic_launch(kernel: Kernel, arrays: int) -> Launch:
    return host.run(kernel.host, kernel.program.parameters, arrays)
