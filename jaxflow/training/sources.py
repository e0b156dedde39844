"""What text and images are read from.

A text is one file, the text files of a folder joined by line feeds, or the English prose of
Python's own manual. Images are `(n, height, width, channels)` with labels 0, ..., classes - 1, from
scikit-learn, a .npz, or files in the idx format of MNIST.
"""

import hashlib
import importlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .. import _files
from .._files import Stored

_SUFFIXES = frozenset(
    ".txt .md .rst .tex .py .c .h .cpp .js .ts .rs .go .java .sh .toml .yaml .html .css".split()
)


# ------------------------------------------------------------------ text


def text_files(source: str | Path | None) -> list[Path]:
    """A file, or the text files of a folder by name; none at all is the built-in text.

    **Raises:** ValueError for a path that does not exist, a folder without text, and for one of the
    files that is not regular or must not be read.
    """
    if source is None:
        return []
    if not stat.S_ISDIR(_files.file_status(source, "source").st_mode):
        return [_files.regular(source, "source")]
    root = Path(source)
    files = [_files.regular(root / name, "a text of the folder") for name in sorted(_names(root))]
    if not files:
        raise ValueError(f"the folder {root} has no text file ({' '.join(sorted(_SUFFIXES))}).")
    return files


def _names(root: Path) -> Iterator[Path]:
    """What a folder calls text, hidden files and folders excepted."""
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in _SUFFIXES and not name.startswith("."):
                yield path.relative_to(root)


def _unreadable(error: OSError) -> NoReturn:
    raise ValueError(f"the folder {error.filename} cannot be read: {error.strerror}.") from error


def chunks(files: list[Path]) -> Iterator[str]:
    """The text, piece by piece; ValueError for a file that is not UTF-8."""
    if not files:
        topics = importlib.import_module("pydoc_data.topics").topics
        yield "\n".join(topics[name] for name in sorted(topics))
    for k, path in enumerate(files):
        if k:
            yield "\n"
        yield from _files.decoded(path)


def scan(files: list[Path]) -> tuple[str, int]:
    """The sha256 of the text and its number of characters; ValueError as for `chunks`."""
    digest, characters = hashlib.sha256(), 0
    for chunk in chunks(files):
        digest.update(chunk.encode())
        characters += len(chunk)
    return digest.hexdigest(), characters


# ------------------------------------------------------------------ images


class Labelled(NamedTuple):
    """Images `(n, height, width, channels)`, labels int32 `(n,)`, and the pixel value of white."""

    images: np.ndarray
    labels: np.ndarray
    white: float


def read_images(
    source: str | Path | None, labels: str | Path | None = None, *, what: str = "source"
) -> tuple[Labelled, Labelled | None]:
    """The images of a source and, where it has a part of its own for it, those to validate on.

    `what` names the argument in an error.

    **Raises:** ValueError for a path that does not exist, a file that is damaged or of another
    format, and for pixels or labels out of their range; MemoryError for images that do not fit the
    memory; ImportError for the built-in ones without scikit-learn.
    """
    if source is None:
        if labels is not None:
            raise ValueError(f"the built-in images have labels; leave out labels={str(labels)!r}.")
        return _digits(), None
    path = _files.regular(source, what)
    if _files.is_npz(path):
        if labels is not None:
            raise ValueError(f"{path} holds its own labels; leave out labels={str(labels)!r}.")
        return _read_npz(path)
    images = _files.idx(path)
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if labels is None and beside == path:
        raise ValueError(f"labels must name the file with the labels of {path}.")
    return _read(images, _files.idx(_files.regular(labels or beside, "labels"))), None


def read_idx(path: str | Path) -> np.ndarray:
    """The array of a file in the idx format, gzipped or not; ValueError for a damaged one."""
    return _files.idx(_files.regular(path)).read()


def _digits() -> Labelled:
    """The 1797 images of 8 x 8 pixels in scikit-learn."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            'the built-in images need scikit-learn: pip install "jaxflow[train]".'
        ) from error
    digits = datasets.load_digits()
    return _labelled(digits.images.astype(np.uint8), digits.target, "digits", "digits", white=16)


def _read_npz(path: Path) -> tuple[Labelled, Labelled | None]:
    names = _files.npz_names(path)
    pairs = (("images", "labels"), ("x_train", "y_train"))
    pair = next((pair for pair in pairs if set(pair) <= set(names)), None)
    test = {"x_test", "y_test"} & set(names)
    if pair is None or len(test) == 1:
        raise ValueError(
            f"{path} must have the arrays images and labels, or x_train and y_train (and x_test "
            f"with y_test); it has {names[:20]}."
        )
    # All headers before any pixel.
    stored = {name: _files.npz(path, name) for name in (*pair, *test)}
    for images, labels in (pair, ("x_test", "y_test"))[: 1 + bool(test)]:
        _check_shapes(stored[images], stored[labels], stored[images].name, stored[labels].name)
    first = _read(*(stored[name] for name in pair))
    return first, _read(stored["x_test"], stored["y_test"]) if test else None


def _read(images: Stored, labels: Stored) -> Labelled:
    _check_shapes(images, labels, images.name, labels.name)
    return _labelled(images.read(), labels.read(), images.name, labels.name)


def _check_shapes(images: Any, labels: Any, name: str, labels_name: str):
    """What the headers tell: shapes and dtypes."""
    if len(images.shape) not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"images must have shape (n, height, width) or (n, height, width, channels); {name} "
            f"has {images.shape}."
        )
    _files.white(images.dtype)
    n = images.shape[0]
    if labels.shape not in ((n,), (n, 1)):
        raise ValueError(
            f"labels must be one number an image: {n}; {labels_name} has shape {labels.shape}, and "
            f"{name} {images.shape}."
        )
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be 0, 1, 2, ...; {labels_name} has {labels.dtype}.")


def _labelled(
    images: np.ndarray, labels: np.ndarray, name: str, labels_name: str, white: int | None = None
) -> Labelled:
    white = _files.white(images.dtype) if white is None else white
    _files.check_pixels(images, white, name)
    labels = labels.reshape(-1)
    if outside := _files.first_outside(labels, 0, 2**31 - 2):
        raise ValueError(
            f"labels must be 0, 1, 2, ...; {labels_name} has {outside[0]} {outside[1]}, and the "
            "largest possible is 2^31 - 2."
        )
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype.kind in "bf":
        images = images.astype({"b": np.uint8, "f": np.float32}[images.dtype.kind], copy=False)
    return Labelled(images, labels.astype(np.int32), float(white))


def classes_of(*parts: Labelled) -> int:
    """The number of classes of the parts together: the largest label and one.

    **Raises:** ValueError if there are more classes than images and more than a thousand: a head
    would be built for classes that no image has.
    """
    count = sum(len(part.labels) for part in parts)
    classes = int(max(part.labels.max(initial=0) for part in parts)) + 1
    if classes > max(count, 1000):
        raise ValueError(
            f"labels must be 0, 1, 2, ...: {count} images cannot have more than {max(count, 1000)} "
            f"classes; the largest label is {classes - 1}. Number the classes that there are, for "
            "example with np.unique(labels, return_inverse=True)."
        )
    return classes
