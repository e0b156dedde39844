"""What the host does before it starts a kernel of Mosaic GPU: it describes boxes of arrays.

Its program, in MLIR's LLVM dialect, has no branches: one pass over its lines executes it.
"""

import re
from typing import Any, NamedTuple

from .memory import PARAMETERS, DeviceMemory, TensorMap
from .operands import Launch


class Place(NamedTuple):
    """An element of an array of the host, or a byte of a structure."""

    array: dict[int, Any]
    index: int = 0


Values = dict[str, Any]  # numbers, addresses in device memory, and places


def run(text: str, parameters: tuple[str, ...], arrays: int) -> Launch:
    """Executes the text of a host program; its second argument points to the arrays' addresses."""
    first, *lines = text.splitlines()
    _, pointers, *_ = re.findall(r"(%\w+): !llvm.ptr", first)
    values: Values = {pointers: Place({i: DeviceMemory.address(i) for i in range(arrays)})}
    for line in lines:
        if "gpu.launch_func" in line:
            return _launch(line, parameters, values)
        _execute(line, values)
    raise AssertionError("the host program starts no kernel")


def _execute(line: str, values: Values):
    if found := re.search(r"call @mosaic_gpu_init_tma_desc\(([^)]*)\)", line):
        place, *described = [values[name] for name in found[1].split(", ")]
        place.array[place.index] = _tensor_map(*described)
    elif found := re.match(r"\s*(?:llvm|memref)\.store (%\w+), (%\w+)(?:\[(%\w+)\])? :", line):
        place = values[found[2]]
        place.array[place.index + values.get(found[3], 0)] = values[found[1]]
    elif found := re.match(r"\s*(%\w+) = ([\w.]+)(.*)", line):
        values[found[1]] = _value(found[2], found[3], values)


def _value(operation: str, operands: str, values: Values):
    """A new value; what only changes how an array is seen passes its address on."""
    if operation == "llvm.mlir.constant":
        return int(re.findall(r"-?\d+", operands)[0])
    if operation in ("llvm.mlir.undef", "llvm.mlir.poison"):
        return None
    if operation.endswith(".alloca"):
        return Place({})
    first, *others = [values[name] for name in re.findall(r"%\w+", operands)]
    if operation == "llvm.getelementptr":
        return first._replace(index=first.index + int(re.findall(r"\[(\d+)\]", operands)[0]))
    if operation == "llvm.load" and "-> !llvm.array" not in operands:
        return first.array[first.index]
    # The second member of the description of an array is its address, the third an offset.
    if operation == "llvm.insertvalue":
        return first if "[1]" in operands else others[0]
    if operation == "llvm.extractvalue" and "[2]" in operands:
        return 0
    if operation == "llvm.mul":
        return first * others[0]
    if operation == "llvm.add" and others[0] != 0:
        return first + others[0]
    return first


def _tensor_map(base, kind, rank, sizes, strides, swizzle, box) -> TensorMap:
    numbers = lambda place: tuple(place.array[place.index + i] for i in range(rank))
    return TensorMap(base, kind, numbers(sizes), numbers(strides), swizzle, numbers(box))


def _launch(line: str, names: tuple[str, ...], values: Values) -> Launch:
    found = re.search(
        r"blocks in \((.*?)\) threads.*dynamic_shared_memory_size (%\w+) args\((.*?)\) loc", line
    )
    assert found is not None, line
    x, y, z = (values[name] for name in found[1].split(", "))
    parameters, structures, maps = {}, {}, {}
    arguments = re.findall(r"(%\w+) : ", found[3])
    for i, (name, argument) in enumerate(zip(names, arguments, strict=True)):
        value = values[argument]
        if isinstance(value, Place):  # tensor maps, passed by value
            structures[name] = PARAMETERS + (i << 32)
            maps |= {structures[name] + at: described for at, described in value.array.items()}
        else:
            parameters[name] = value
    return Launch((x, y, z), values[found[2]], parameters, structures, maps)
