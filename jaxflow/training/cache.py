"""The tokens of a text on disk, made once and compared with their sha256 whenever they are read.

    CACHE/tokens-KEY/   training.npy   validation.npy   tokenizer.json   entry.json

KEY is the sha256 of what the tokens are made of: the sha256 of the text, the tokenizer, the split.
entry.json holds it in full, and the sha256 of the three other files.
"""

import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt

from .._files import regular
from .sources import chunks
from .tokenizers import Chars, Tokenizer, tokenizer_from_dict

_FILES = ("training.npy", "validation.npy", "tokenizer.json")


class Tokens(NamedTuple):
    """Tokens before and after the split, mapped from disk, and the tokenizer that made them."""

    training: UInt[np.ndarray, " tokens"]
    validation: UInt[np.ndarray, " rest"]
    tokenizer: Tokenizer


def tokenised(
    files: list[Path], tokenizer: Tokenizer, split: int, cache: Path | None, *, sha256: str
) -> Tokens:
    """The tokens of the characters before and after `split` of the text of this sha256.

    An entry of the cache appears whole or not at all. One that is damaged is named in a warning and
    left alone, and the tokens are made again for this process.

    **Raises:** ValueError if the text is not that of the sha256 any more, has a character that the
    tokenizer does not know, or the cache cannot be written to.
    """
    made_of = {"text": sha256, "tokenizer": tokenizer.to_dict(), "split": split}
    if cache is not None:
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        entry = cache / f"tokens-{key[:16]}"
        try:
            if not os.path.lexists(entry):
                _make(files, tokenizer, made_of, entry)
            return _read(entry, made_of)
        except _DamagedError as error:
            warnings.warn(
                f"{error} The tokens are made again, for this process alone; delete {entry} to "
                "have them kept again.",
                stacklevel=3,
            )
    # The mapping of a file outlives its name.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        entry = Path(folder) / "tokens"
        _make(files, tokenizer, made_of, entry)
        return _read(entry, made_of)


class _DamagedError(Exception):
    """An entry that is not what was written."""


def _read(entry: Path, made_of: dict[str, Any]) -> Tokens:
    record = entry / "entry.json"
    try:
        written = _json(record)
        found = {name: _sha256(regular(entry / name)) for name in _FILES}
    except (OSError, ValueError) as error:
        raise _DamagedError(f"the tokens in {entry} cannot be read: {error}") from error
    if written != {"made of": made_of, "sha256": found}:
        sums = written.get("sha256") if isinstance(written, dict) else None
        sums = sums if isinstance(sums, dict) else {}
        wrong = [name for name in _FILES if name in sums and sums[name] != found[name]]
        raise _DamagedError(
            f"{entry / wrong[0]} does not have the sha256 that {record} states."
            if wrong
            else f"{record} is damaged: it does not tell what these tokens are made of."
        )
    return Tokens(
        np.load(entry / "training.npy", mmap_mode="r"),
        np.load(entry / "validation.npy", mmap_mode="r"),
        tokenizer_from_dict(_json(entry / "tokenizer.json")),
    )


def _make(files: list[Path], tokenizer: Tokenizer, made_of: dict[str, Any], entry: Path):
    sha256, split = made_of["text"], made_of["split"]
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokens-", dir=entry.parent) as temporary:
            work = Path(temporary) / "entry"
            work.mkdir()
            # As nanoGPT does: the alphabet is that of the whole text.
            seen = sys.maxsize if isinstance(tokenizer, Chars) else split
            fitted = tokenizer.fit(_between(_unchanged(files, sha256), 0, seen))
            (work / "tokenizer.json").write_text(json.dumps(fitted.to_dict()), encoding="utf-8")
            for name, part in {"training": (0, split), "validation": (split, sys.maxsize)}.items():
                _write(work / f"{name}.npy", fitted, _between(_unchanged(files, sha256), *part))
            sums = {name: _sha256(work / name) for name in _FILES}
            record = json.dumps({"made of": made_of, "sha256": sums})
            (work / "entry.json").write_text(record, encoding="utf-8")
            try:
                os.rename(work, entry)
            except OSError:
                if not entry.exists():  # else another process was faster
                    raise
    except OSError as error:
        raise ValueError(
            f"the tokens cannot be kept in {entry.parent}: {error}. Take another folder as cache, "
            "with room for them."
        ) from error


def _unchanged(files: list[Path], sha256: str) -> Iterator[str]:
    """The text, piece by piece; ValueError at its end if it is not the one that was scanned."""
    digest = hashlib.sha256()
    for chunk in chunks(files):
        digest.update(chunk.encode())
        yield chunk
    if digest.hexdigest() != sha256:
        raise ValueError("the text changed while it was read: start again when it stays as it is.")


def _between(text: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The characters start, ..., stop - 1."""
    position = 0
    for chunk in text:
        yield chunk[max(start - position, 0) : max(stop - position, 0)]
        position += len(chunk)


def _write(path: Path, tokenizer: Tokenizer, pieces: Iterable[str]):
    """Tokens to a .npy file; its header, padded for growth, is written again with their number."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    header = {"descr": dtype.str, "fortran_order": False}
    count = 0
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count,)})
        for piece in pieces:
            tokens = tokenizer.encode(piece).astype(dtype)
            file.write(tokens.tobytes())
            count += len(tokens)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header | {"shape": (count,)})


def _json(path: Path) -> Any:
    try:
        return json.loads(regular(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
