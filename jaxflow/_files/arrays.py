"""Arrays in .npy, .npz and idx files: the header first, the numbers when they are asked for.

idx is the format of MNIST: two zero bytes, a type code, the number r of axes, r sizes as big-endian
int32, the data; gzipped or not.
"""

import contextlib
import gzip
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._memory import check_fits

_CHUNK = 1 << 20
# What gzip, zipfile and NumPy raise for bytes that they do not expect.
_DAMAGE = (OSError, EOFError, ValueError, RuntimeError, OverflowError)
_DAMAGE += (zipfile.BadZipFile, zlib.error, struct.error)
_LONGEST_HEADER = 10_000  # bytes; those of numbers take some hundred
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


@dataclass(frozen=True)
class Stored:
    """An array in a file, of which the header alone was read.

    - `name`: the file, for errors. `shape`, `dtype`: of the array.
    - `fortran`: whether the first axis is the fastest.
    - `data`: opens the numbers as a stream.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    data: Callable[[], AbstractContextManager[io.BufferedIOBase]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array, in the byte order of the machine.

        **Raises:** ValueError if the file does not hold exactly the bytes that its header declares,
        or a checksum in it differs; MemoryError if there is no room for two of the array.
        """
        check_fits(2 * self.nbytes, f"reading {self.name}", "Take a part of it.", host=True)
        values = np.empty(math.prod(self.shape), self.dtype)
        room = values.view(np.uint8).data
        with damaged(self.name), self.data() as stream:
            position = 0
            while found := stream.read(min(_CHUNK, self.nbytes - position)):
                room[position : position + len(found)] = found
                position += len(found)
            # Only at the end of a compressed stream is its checksum compared.
            if position < self.nbytes or stream.read(1):
                raise OSError(
                    f"shape {self.shape} of {self.dtype.name} takes {self.nbytes} bytes, it has "
                    f"{'more' if position == self.nbytes else position}"
                )
        if not self.dtype.isnative:
            values = values.byteswap(inplace=True).view(self.dtype.newbyteorder("="))
        return values.reshape(self.shape, order="F" if self.fortran else "C")


@contextlib.contextmanager
def damaged(name: str) -> Iterator[None]:
    """What goes wrong while a format is taken apart is damage of the file."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{name} is damaged: {error}. Get it again.") from error


def _start(path: Path) -> bytes:
    with damaged(str(path)), path.open("rb") as file:
        return file.read(2)


# ------------------------------------------------------------------ NumPy's formats


def is_npz(path: Path) -> bool:
    """Whether a file is an archive of arrays, or its name says so."""
    return path.suffix.lower() == ".npz" or _start(path) == b"PK"


def npy(path: Path) -> Stored:
    """The array of a .npy file; ValueError if its header is damaged or not that of numbers."""
    return _stored(str(path), os.path.getsize(path), lambda: path.open("rb"))


def npz_names(path: Path) -> list[str]:
    """The arrays of a .npz file; ValueError if it is no archive, or damaged."""
    with damaged(str(path)), zipfile.ZipFile(path) as archive:
        return sorted(name.removesuffix(".npy") for name in archive.namelist())


def npz(path: Path, name: str) -> Stored:
    """One array of a .npz file; nothing else in it is read.

    **Raises:** ValueError if the archive or the header of the array is damaged, the array does not
    consist of numbers, or NumPy would not have compressed it so.
    """
    with damaged(str(path)), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        info = archive.getinfo(f"{name}.npy" if f"{name}.npy" in names else name)
        # The other methods cannot be stopped at a length.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise NotImplementedError(f"{info.filename} is compressed as NumPy never does")

    @contextlib.contextmanager
    def opened() -> Iterator[Any]:
        with zipfile.ZipFile(path) as archive, archive.open(info) as stream:
            yield stream

    return _stored(f"{name} in {path}", info.file_size, opened)


def _stored(name: str, size: int, opened: Callable[[], AbstractContextManager[io.BufferedIOBase]]):
    with damaged(name), opened() as stream:
        shape, fortran, dtype, start = _header(stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, not {dtype} (a pickle is never opened).")
    expected = start + math.prod(shape) * dtype.itemsize
    if expected != size:
        raise ValueError(
            f"{name} is damaged: shape {shape} of {dtype.name} takes {expected} bytes, it has "
            f"{size}. Get it again."
        )

    @contextlib.contextmanager
    def data() -> Iterator[io.BufferedIOBase]:
        with opened() as stream:
            stream.read(start)
            yield stream

    return Stored(name, shape, dtype, fortran, data)


def _header(stream: io.BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, dtype, and the number of bytes before the data."""
    magic = stream.read(np.lib.format.MAGIC_LEN)
    major, minor = np.lib.format.read_magic(io.BytesIO(magic))
    readers = {
        (1, 0): (2, np.lib.format.read_array_header_1_0),
        (2, 0): (4, np.lib.format.read_array_header_2_0),
    }
    if (major, minor) not in readers:
        raise ValueError(f"version {major}.{minor} of the format is not that of numbers")
    width, read = readers[major, minor]
    prefix = stream.read(width)
    length = int.from_bytes(prefix, "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header would take {length} bytes")
    try:
        shape, fortran, dtype = read(io.BytesIO(prefix + stream.read(length)))
    except Exception as error:  # of the parser of Python, which may raise many
        raise ValueError(f"its header cannot be parsed: {error}") from error
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"its header has the shape {shape}")
    return shape, fortran, dtype, len(magic) + width + length


# ------------------------------------------------------------------ idx


def idx(path: Path) -> Stored:
    """The array of an idx file, gzipped or not.

    **Raises:** ValueError if the file is of another format, or its size is not what the header
    declares. The size of a gzipped one is found when it is read.
    """
    zipped = _start(path) == b"\x1f\x8b"

    def opened() -> io.BufferedIOBase:
        return gzip.open(path) if zipped else path.open("rb")

    with damaged(str(path)), opened() as stream:
        head = stream.read(4)
        axes = head[3] if len(head) == 4 else 0
        sizes = stream.read(4 * axes).ljust(4 * axes, b"\0")
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_DTYPES:
        raise ValueError(
            f"{path} must be a .npz or an idx file (zero, zero, type, axes); it starts with "
            f"{head.hex(' ') or 'nothing'}. A .npz comes from "
            "np.savez(path, images=..., labels=...)."
        )
    shape = tuple(np.frombuffer(sizes, ">u4").tolist())
    dtype, start = np.dtype(_IDX_DTYPES[head[2]]), 4 + 4 * axes
    expected = start + math.prod(shape) * dtype.itemsize
    if not zipped and os.path.getsize(path) != expected:
        raise ValueError(
            f"{path} is damaged: shape {shape} of {dtype.name} takes {expected} bytes, it has "
            f"{os.path.getsize(path)}. Get it again."
        )

    @contextlib.contextmanager
    def data() -> Iterator[io.BufferedIOBase]:
        with opened() as stream:
            stream.read(start)
            yield stream

    return Stored(str(path), shape, dtype, False, data)
