"""Text in UTF-8, whatever the locale; a byte order mark at its start is no part of it."""

import codecs
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._memory import check_fits

_CHUNK = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular(path: Any, what: str = "the file") -> Path:
    """The path of a file that has an end, and that this user may read.

    `what` names the argument in the error.

    **Raises:** ValueError if nothing is there, if it is a folder, a pipe, a socket or a device, or
    if it must not be read; TypeError for what is no path.
    """
    found = file_status(path, what)
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(
            f"{what} must be a regular file; {path} is {kind}. Copy its content into a file."
        )
    if not os.access(path, os.R_OK):
        raise ValueError(f"{what} must be a file that may be read; {path} may not.")
    return Path(path)


def file_status(path: Any, what: str) -> os.stat_result:
    """What the file system says of a path; ValueError if nothing is there."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{what} must be a path, got a {type(path).__name__}.")
    try:
        return os.stat(path)
    except FileNotFoundError:
        raise ValueError(
            f"{what} must be a path that exists; {str(path) or repr(path)} does not."
        ) from None
    except (OSError, ValueError) as error:  # a loop of links, too long a name, a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{what} must be a path that exists; {path!r}: {reason}.") from None


def decoded(path: str | Path, what: str = "the text") -> Iterator[str]:
    """The text of a file, a piece a MiB; `what` names the argument in an error.

    **Raises:** ValueError if the file does not exist or is not regular, if it is not UTF-8, with
    the first byte that is not, or if it cannot be read, or its length changes meanwhile.
    """
    path = regular(path, what)
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    for block, last in _blocks(path):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=last)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8: {error.reason} at byte {start - pending + error.start}. "
                "Convert it, for example with iconv, or leave it out."
            ) from None
        yield text if start else text.removeprefix("\ufeff")
        start += len(block)


def _blocks(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The bytes up to the length that the file has at the start, and which block is the last."""
    try:
        with path.open("rb") as file:
            size, start = os.fstat(file.fileno()).st_size, 0
            while block := file.read(min(_CHUNK, size - start)):
                start += len(block)
                yield block, start == size
            unchanged = start == size and not file.read(1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if not unchanged:
        raise ValueError(
            f"{path} does not have the {size} bytes that the file system states: it changed while "
            "it was read, or is no ordinary file. Copy it first."
        )


def read_text(path: str | Path, what: str = "the text") -> str:
    """The whole text of a file; `what` names the argument in an error.

    **Raises:** ValueError if the file does not exist, is not regular, or is not UTF-8; MemoryError
    if the text does not fit the memory.
    """
    file = regular(path, what)
    # Up to four bytes a character, in pieces and joined.
    check_fits(8 * file.stat().st_size, f"the text of {path}", "Take a part of it.", host=True)
    return "".join(decoded(file, what))
