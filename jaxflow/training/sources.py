"""Where the data come from: text files to tokens on disk, image files to arrays.

A text is read in pieces of a megabyte and never held whole. Images are `(n, height, width,
channels)` with labels 0, ..., classes - 1, from scikit-learn, a .npz, or files in the idx format
of MNIST: two zero bytes, a type code, the number r of axes, r sizes as big-endian int32, the data.
"""

import codecs
import gzip
import hashlib
import importlib
import json
import math
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .tokenizers import Chars, Tokenizer

_CHUNK = 1 << 20
_SUFFIXES = frozenset(
    ".txt .md .rst .tex .py .c .h .cpp .js .ts .rs .go .java .sh .toml .yaml .html .css".split()
)
_IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def existing(path: str | Path, what: str) -> Path:
    """The path, if something is there."""
    if not Path(path).exists():
        raise ValueError(f"{what} must be a path that exists; {path} does not.")
    return Path(path)


# ------------------------------------------------------------------ text


def text_files(source: str | Path | None) -> list[Path]:
    """A file, or the text files of a folder by name; none at all is the built-in text."""
    if source is None:
        return []
    root = existing(source, "source")
    if root.is_file():
        return [root]
    names = (path.relative_to(root) for path in root.rglob("*") if path.suffix in _SUFFIXES)
    visible = (name for name in names if not any(part.startswith(".") for part in name.parts))
    files = [root / name for name in sorted(visible) if (root / name).is_file()]
    if not files:
        raise ValueError(f"the folder {root} has no text file ({' '.join(sorted(_SUFFIXES))}).")
    return files


def chunks(files: list[Path]) -> Iterator[str]:
    """The text, piece by piece."""
    if not files:
        topics = importlib.import_module("pydoc_data.topics").topics
        yield "\n".join(topics[name] for name in sorted(topics))
    for k, path in enumerate(files):
        if k:
            yield "\n"
        yield from _decoded(path)


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, last = 0, False
    with path.open("rb") as file:
        while not last:
            block, pending = file.read(_CHUNK), len(decoder.getstate()[0])
            last = not block
            try:
                text = decoder.decode(block, final=last)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8: {error.reason} at byte {start - pending + error.start}. "
                    "Convert it, for example with iconv, or leave it out."
                ) from None
            start += len(block)
            yield text


def scan(files: list[Path]) -> tuple[str, int]:
    """The sha256 of the text and its number of characters."""
    digest, characters = hashlib.sha256(), 0
    for chunk in chunks(files):
        digest.update(chunk.encode())
        characters += len(chunk)
    return digest.hexdigest(), characters


def _between(text: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The characters start, ..., stop - 1."""
    position = 0
    for chunk in text:
        yield chunk[max(start - position, 0) : max(stop - position, 0)]
        position += len(chunk)


def tokenise(
    files: list[Path], tokenizer: Tokenizer, split: int, cache: Path, *, sha256: str
) -> Path:
    """The folder of the cache with the tokens of the characters before and after `split`.

    It holds training.npy, validation.npy and tokenizer.json, and appears whole or not at all.
    """
    key = hashlib.sha256(json.dumps([sha256, tokenizer.to_dict(), split]).encode())
    entry = cache / f"tokens-{key.hexdigest()[:16]}"
    if entry.exists():
        return entry
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tokens-", dir=cache) as temporary:
        work = Path(temporary) / "entry"
        work.mkdir()
        # As nanoGPT does: the alphabet is that of the whole text.
        seen = sys.maxsize if isinstance(tokenizer, Chars) else split
        fitted = tokenizer.fit(_between(chunks(files), 0, seen))
        (work / "tokenizer.json").write_text(json.dumps(fitted.to_dict()))
        _write(work / "training.npy", fitted, _between(chunks(files), 0, split))
        _write(work / "validation.npy", fitted, _between(chunks(files), split, sys.maxsize))
        try:
            os.rename(work, entry)
        except OSError:
            if not entry.exists():  # else another process was faster
                raise
    return entry


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


# ------------------------------------------------------------------ images


class Labelled(NamedTuple):
    """Images `(n, height, width, channels)`, labels int32 `(n,)`, and the pixel value of white."""

    images: np.ndarray
    labels: np.ndarray
    white: float


def read_images(
    source: str | Path | None, labels: str | Path | None = None
) -> tuple[Labelled, Labelled | None]:
    """The images of a source and, where it has a part of its own for it, those to validate on."""
    if source is None:
        return _digits(), None
    path = existing(source, "source")
    if zipfile.is_zipfile(path):
        if labels is not None:
            raise ValueError(f"{path} holds its own labels; leave out labels={str(labels)!r}.")
        return _read_npz(path)
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels is None and beside == path:
        raise ValueError(f"labels must name the file with the labels of {path}.")
    images, ys = read_idx(path), read_idx(existing(labels or beside, "labels"))
    return _labelled(images, ys, str(path)), None


def _digits() -> Labelled:
    """The 1797 images of 8 x 8 pixels in scikit-learn."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            'the built-in images need scikit-learn: pip install "jaxflow[train]".'
        ) from error
    digits = datasets.load_digits()
    return _labelled(digits.images.astype(np.uint8), digits.target, "digits", white=16.0)


def _read_npz(path: Path) -> tuple[Labelled, Labelled | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Get it again.") from error
    for names in (("images", "labels"), ("x_train", "y_train")):
        if set(names) <= set(arrays):
            first = _labelled(arrays[names[0]], arrays[names[1]], str(path))
            break
    else:
        raise ValueError(
            f"{path} must have the arrays images and labels, or x_train and y_train (and x_test, "
            f"y_test); it has {sorted(arrays)}."
        )
    if not {"x_test", "y_test"} <= set(arrays):
        return first, None
    return first, _labelled(arrays["x_test"], arrays["y_test"], str(path))


def _labelled(images: np.ndarray, labels: np.ndarray, name: str, white: float = 255.0) -> Labelled:
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"images must have shape (n, height, width) or (n, height, width, channels); {name} "
            f"has {images.shape}."
        )
    if np.issubdtype(images.dtype, np.floating):
        images, white = images.astype(np.float32), 1.0
    elif not np.issubdtype(images.dtype, np.integer):
        raise TypeError(f"pixels must be integers or floats; {name} has {images.dtype}.")
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= white):
        raise ValueError(
            f"pixels must lie in 0 ... 255 (integers) or 0 ... 1 (floats); {name} has {low} ... "
            f"{high}. Rescale them."
        )
    if labels.size != len(images) or labels.shape[0] != len(images):
        raise ValueError(
            f"labels must be one number an image: {len(images)}; {name} has shape {labels.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"labels must be 0, 1, 2, ...; {name} has {labels.dtype}: {labels.min()}.")
    images = images[..., None] if images.ndim == 3 else images
    return Labelled(images, labels.reshape(-1).astype(np.int32), white)


def read_idx(path: str | Path) -> np.ndarray:
    """The array of a file in the idx format, gzipped or not; ValueError for a damaged one."""
    content = Path(path).read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}. Get it again.") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_DTYPES:
        raise ValueError(
            f"{path} must be a .npz or an idx file (zero, zero, type, axes); it starts with "
            f"{content[:4].hex(' ') or 'nothing'}."
        )
    start = 4 + 4 * content[3]
    dtype = np.dtype(_IDX_DTYPES[content[2]])
    shape = np.frombuffer(content[4:start].ljust(start - 4, b"\0"), ">u4").tolist()
    expected = start + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise ValueError(
            f"{path} is damaged: shape {tuple(shape)} of {dtype.name} takes {expected} bytes, it "
            f"has {len(content)}. Get it again."
        )
    array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))
