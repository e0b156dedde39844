"""Memory with bounds, barriers that count arrivals and bytes, and copies of boxes of arrays."""

import dataclasses
import math

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
GLOBAL = 40  # an address in device memory is (number of the buffer + 1) << 40, plus the offset
SHARED = 1024  # the first address in shared memory; the hardware aligns it so, too
PARAMETERS = 1 << 60


class KernelError(AssertionError):
    """What a kernel must not do."""


class Buffer:
    """Bytes from an address on; what nobody wrote is NaN in every floating-point format."""

    def __init__(self, name: str, base: int, size: int):
        self.name, self.base, self.size = name, base, size
        self.bytes = np.full(-(-size // 16) * 16, 0xFF, np.uint8)
        self.words = {width: self.bytes.view(dtype) for width, dtype in UNSIGNED.items()}

    def index(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Offsets of `size` bytes at each address, which must be aligned to their size."""
        if (addresses & (size - 1)).any():
            raise KernelError(f"an address in {self.name} is not aligned to {size} bytes")
        offsets = addresses - self.base
        if offsets.min() < 0 or offsets.max() + size > self.size:
            bad = offsets[(offsets < 0) | (offsets + size > self.size)][0]
            raise KernelError(
                f"{size} bytes at {bad} are outside of {self.name}, {self.size} bytes"
            )
        return offsets

    def load(self, addresses: np.ndarray, width: int, count: int) -> list[np.ndarray]:
        """`count` numbers of `width` bytes from each address on."""
        first = self.index(addresses, width * count) // width
        return [self.words[width][first + i] for i in range(count)]

    def store(self, addresses: np.ndarray, width: int, values: list[np.ndarray]):
        first = self.index(addresses, width * len(values)) // width
        for i, value in enumerate(values):
            self.words[width][first + i] = value


class Shared(Buffer):
    """The shared memory of a block, which remembers plain writes that copies might not see."""

    def __init__(self, size: int):
        super().__init__("shared memory", SHARED, size)
        self.writer = np.zeros(size, np.int16)  # a warp's number + 1 until that warp fences
        self.barriers: dict[int, Barrier] = {}

    def write(self, warp: int, addresses: np.ndarray, width: int, values: list[np.ndarray]):
        self.store(addresses, width, values)
        for i in range(width * len(values)):
            self.writer[addresses - self.base + i] = warp + 1

    def fence(self, warp: int):
        self.writer[self.writer == warp + 1] = 0

    def seen_by_copies(self, offsets: np.ndarray | slice):
        """Asserts that what a copy or a product reads by itself was fenced by who wrote it."""
        if self.writer[offsets].any():
            raise KernelError("a copy or product reads shared memory written without a fence")

    def barrier(self, address: int) -> "Barrier":
        if address not in self.barriers:
            raise KernelError(
                f"no barrier is initialised at {address - self.base} in shared memory"
            )
        return self.barriers[address]


class DeviceMemory:
    """DeviceMemory memory: one buffer an array."""

    def __init__(self, arrays: list[np.ndarray]):
        self.buffers: list[Buffer] = []
        for number, array in enumerate(arrays):
            buffer = Buffer(f"array {number}", self.address(number), array.nbytes)
            buffer.bytes[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self.buffers.append(buffer)

    @staticmethod
    def address(number: int) -> int:
        return (number + 1) << GLOBAL

    def at(self, addresses: np.ndarray) -> Buffer:
        number = (int(addresses.flat[0]) >> GLOBAL) - 1
        if not 0 <= number < len(self.buffers):
            raise KernelError(f"address {addresses.flat[0]:#x} is in no array")
        return self.buffers[number]

    def array(self, number: int, shape: tuple[int, ...], dtype) -> np.ndarray:
        buffer = self.buffers[number]
        return buffer.bytes[: buffer.size].view(dtype).reshape(shape).copy()


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all announced bytes are there."""

    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, times: int, announced: int = 0):
        self.bytes += announced
        self.pending -= times
        if self.pending < 0:
            raise KernelError(f"more arrivals than the {self.count} that a barrier expects")
        self._advance()

    def receive(self, size: int):
        self.bytes -= size
        self._advance()

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity is over."""
        return self.phase & 1 != parity

    def _advance(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


# ------------------------------------------------------------------ copies of boxes

WIDTHS = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2}  # bytes of an element, by the code of its type


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """How the copy engine sees an array: dimensions, strides in elements, the box it copies."""

    base: int
    type: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    swizzle: int
    box: tuple[int, ...]

    @property
    def width(self) -> int:
        return WIDTHS[self.type]

    @property
    def bytes(self) -> int:
        return math.prod(self.box) * self.width

    def in_device(self, coordinates: list[int]) -> np.ndarray:
        """Addresses of the box's elements in device memory; coordinates are innermost first."""
        start = coordinates[::-1]
        for first, length, size in zip(start, self.box, self.sizes, strict=True):
            if first < 0 or first + length > size:
                raise KernelError(f"a box {self.box} at {start} leaves the array {self.sizes}")
        address = np.array(self.base)
        for first, length, stride in zip(start, self.box, self.strides, strict=True):
            address = address[..., None] + (first + np.arange(length)) * stride * self.width
        return address.reshape(-1)

    def in_shared(self, address: int) -> np.ndarray:
        """Addresses of the box's elements in shared memory."""
        if address % 128:
            raise KernelError(f"a box begins at {address - SHARED}, not aligned to 128 bytes")
        return swizzled(address + np.arange(math.prod(self.box)) * self.width, self.swizzle)


def swizzled(addresses: np.ndarray, swizzle: int) -> np.ndarray:
    """Units of 16 bytes exchanged within rows of `swizzle` bytes, by the number of the row of 128:
    so columns of units lie in different banks. 16 is no swizzle.
    """
    mask = swizzle // 16 - 1
    return addresses ^ (((addresses >> 7) & mask) << 4)
