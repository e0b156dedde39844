"""Runs Pallas kernels as PTX: compiles them ahead of time and does what the host would do.

`interpreted` takes the place of `pl.pallas_call` and of `plgpu.kernel`, so that the functions that
call kernels run as they are, with the numbers of the PTX.
"""

import functools
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

from .machine import Block, Code, Launch, Order
from .memory import PARAMETERS, Device, TensorMap
from .program import Program, parse

TRITON_SHARED_BYTES = 163 * 1024  # of a block on the device below; the PTX does not tell
MOSAIC, TRITON = machine_code.DEVICES["9.0"], machine_code.DEVICES["8.0"]


class Kernel(NamedTuple):
    """A compiled kernel and what its host program says, as text."""

    program: Program
    host: str
    mosaic: bool


@contextmanager
def interpreted(order: Order = Order()) -> Iterator[None]:
    """Pallas kernels run in the interpreter of PTX, in this order."""
    with jax.disable_jit(False), _replaced(plgpu, "kernel", True, order):
        with _replaced(pl, "pallas_call", False, order):
            yield


@contextmanager
def _replaced(module, name: str, mosaic: bool, order: Order) -> Iterator[None]:
    original = getattr(module, name)

    def make(*args, **options):
        return functools.partial(_run, original(*args, **options), mosaic, order)

    setattr(module, name, make)
    try:
        yield
    finally:
        setattr(module, name, original)


def _run(call: Callable[..., Any], mosaic: bool, order: Order, *operands):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands]
    lowered = machine_code.lower(call, shapes, MOSAIC if mosaic else TRITON)
    kernel = _compiled(lowered.as_text(), mosaic, lowered)
    outs, tree = jax.tree.flatten(lowered.out_info)
    empty = [np.full(o.shape, -1, np.int8).repeat(1) for o in outs[:0]]
    arrays = [np.asarray(a) for a in operands] + empty
    arrays += [_unwritten(o.shape, o.dtype) for o in outs]
    device = Device(arrays)
    launch = (_mosaic_launch if mosaic else _triton_launch)(kernel, len(arrays))
    code = Code(kernel.program, launch)
    for index in np.ndindex(*launch.grid):
        Block(code, launch, device, index, order).run()
    found = [device.array(len(operands) + i, o.shape, o.dtype) for i, o in enumerate(outs)]
    return jax.tree.unflatten(tree, [jnp.asarray(a) for a in found])


def _unwritten(shape, dtype) -> np.ndarray:
    dtype = np.dtype(dtype)
    return np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)


CACHE: dict[str, Kernel] = {}


def _compiled(text: str, mosaic: bool, lowered) -> Kernel:
    """The plugin writes nothing for a kernel that it has compiled before, so it is kept."""
    if text not in CACHE:
        with tempfile.TemporaryDirectory() as folder:
            cached = jax.config.jax_enable_compilation_cache
            jax.config.update("jax_enable_compilation_cache", False)
            try:
                machine_code.compiled(lowered, folder)
            finally:
                jax.config.update("jax_enable_compilation_cache", cached)
            (source,) = machine_code._sources(Path(folder))
            host = text
            if mosaic:
                log = source.with_name(f"{source.stem}.mlir-passes.log").read_text()
                host = log[: log.rindex("gpu.launch_func")]
                host = host[host.rindex("func.func @") :] + log[log.rindex("gpu.launch_func") :]
            CACHE[text] = Kernel(parse(source.read_text()), host, mosaic)
    return CACHE[text]


# ------------------------------------------------------------------ Triton


def _triton_launch(kernel: Kernel, arrays: int) -> Launch:
    grid = [int(n) for n in re.findall(r"grid_[xyz] = (\d+)", kernel.host)]
    # Pointers to the arrays, and some to scratch memory that no kernel here uses.
    addresses = [*map(Device.address, range(arrays)), *[0] * len(kernel.program.parameters)]
    parameters = dict(zip(kernel.program.parameters, addresses))
    return Launch((grid[0], grid[1], grid[2]), TRITON_SHARED_BYTES, parameters, {}, {})


# ------------------------------------------------------------------ Mosaic's host program


class Cell(NamedTuple):
    """A place in an array of the host."""

    array: dict[int, Any]
    index: int = 0


def _mosaic_launch(kernel: Kernel, arrays: int) -> Launch:
    """Executes the host's straight-line code, which fills in the tensor maps."""
    values: dict[str, Any] = {"%arg1": Cell({i: Device.address(i) for i in range(arrays)})}
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
