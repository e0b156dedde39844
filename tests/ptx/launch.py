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
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.pallas import mosaic_gpu as plgpu

from benchmarks import machine_code
from benchmarks.machine_code import DEVICES, Device

from .instructions import decode
from .machine import Block, Order
from .memory import PARAMETERS, DeviceMemory, Shared, TensorMap
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
        with tempfile.TemporaryDirectory() as folder, _without_cache():
            machine_code.compiled(lowered, folder)
            read = _mosaic_kernel if device == MOSAIC else _triton_kernel
            COMPILED[text] = read(Path(folder), text)
    return COMPILED[text]


@contextmanager
def _without_cache() -> Iterator[None]:
    """Nothing is compiled, and no PTX written, where a program is read from JAX's cache."""
    config: Any = jax.config
    enabled = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks once whether there is a cache.
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", enabled)
        reset_cache()


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


# ------------------------------------------------------------------ Mosaic's host program


def _mosaic_kernel(folder: Path, text: str) -> Kernel:
    """The host program is the last function that starts the kernel, in the log of the passes."""
    (passes,) = folder.glob("*.mlir-passes.log")
    log, source = passes.read_text(), Path(str(passes).replace(".mlir-passes.log", ".ptx"))
    start = log.rindex("gpu.launch_func")
    first, end = log.rindex("func.func @", 0, start), log.index("\n", start)
    return Kernel(parse(source.read_text()), log[first:end])


class Cell(NamedTuple):
    """A place in an array of the host."""

    array: dict[int, Any]
    index: int = 0


def _mosaic_launch(kernel: Kernel, arrays: int) -> Launch:
    """Executes the host's straight-line code, which fills in the tensor maps."""
    values: dict[str, Any] = {"%arg1": Cell({i: DeviceMemory.address(i) for i in range(arrays)})}
    maps: dict[int, TensorMap] = {}
    for line in kernel.host.splitlines():
        if "gpu.launch_func" in line:
            return _launch(kernel.program, line, values, maps)
        if found := re.search(r"call @mosaic_gpu_init_tma_desc\(([^)]*)\)", line):
            place, *described = [values[name] for name in found[1].split(", ")]
            place.array[place.index] = _tensor_map(*described)
        elif found := re.match(r"\s*llvm.store (%\S+), (%\S+) :", line):
            cell = values[found[2]]
            cell.array[cell.index] = values[found[1]]
        elif found := re.match(r"\s*(%\w+) = ([\w.]+)(.*)", line):
            values[found[1]] = _value(found[2], found[3], values)
    raise AssertionError("the host program starts no kernel")


def _value(operation: str, operands: str, values: dict[str, Any]):
    """A number, an address, or a place: all else passes the address of an array on."""
    names = re.findall(r"%[\w#]+", operands)
    if operation == "llvm.mlir.constant":
        return int(re.findall(r"-?\d+", operands)[0])
    if operation == "llvm.mlir.undef":
        return None
    if operation == "llvm.alloca":
        return Cell({})
    first = values[names[0]]
    if operation == "llvm.getelementptr":
        offset = int(re.findall(r"\[(\d+)\]", operands)[0])
        return first._replace(index=first.index + offset)
    if operation == "llvm.load" and "array" not in operands and isinstance(first, Cell):
        return first.array.get(first.index, first)
    if operation == "llvm.insertvalue":
        # The second member of a description of an array is its address.
        return first if "[1]" in operands else values[names[1]]
    return first


def _tensor_map(base, kind, rank, sizes, strides, swizzle, box) -> TensorMap:
    numbers = lambda cell: tuple(cell.array[cell.index + i] for i in range(rank))
    return TensorMap(base, kind, numbers(sizes), numbers(strides), swizzle, numbers(box))


def _launch(program: Program, line: str, values: dict[str, Any], maps) -> Launch:
    found = re.search(
        r"blocks in \((.*?)\) threads.*dynamic_shared_memory_size (%\S+) args\((.*)\)", line
    )
    assert found is not None, line
    x, y, z = (values[name] for name in found[1].split(", "))
    parameters, symbols = {}, {}
    arguments = re.findall(r"(%\S+) : (\S+)", found[3])
    for i, (name, (argument, _)) in enumerate(zip(program.parameters, arguments, strict=True)):
        value = values[argument]
        if isinstance(value, Cell):  # tensor maps, passed by value
            symbols[name] = PARAMETERS + (i << 32)
            maps |= {symbols[name] + at: described for at, described in value.array.items()}
        else:
            parameters[name] = value
    return Launch((x, y, z), values[found[2]], parameters, symbols, maps)
