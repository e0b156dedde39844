"""Batches of text and of images whose cursor is one number.

    text     inputs[b] = u[i_b : i_b + c],  targets[b] = u[i_b + 1 : i_b + c + 1],  i_b uniform
    images   batch k holds the positions k B, ..., k B + B - 1 of pi_0 pi_1 pi_2 ...

u are the training tokens, c the context, pi_e the order of the images in epoch e. The i_b and pi_e
are Philox bits keyed by (seed, k) and (seed, e), so batch k is a pure function of (seed, k): a run
that knows k goes on exactly. The bits are used raw, so the batches are those of any NumPy.
"""

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Integer, Num, UInt

from .. import _rules
from .._memory import check_fits
from .cache import tokenised
from .sources import Labelled, classes_of, read_images, scan, text_files
from .tokenizers import Bytes, Tokenizer

TokenBatch = tuple[Int32[np.ndarray, "batch context"], Int32[np.ndarray, "batch context"]]
ImageBatch = tuple[Float32[np.ndarray, "batch height width channels"], Int32[np.ndarray, " batch"]]

# The target of a row that only fills up the last validation batch: a loss leaves it out.
IGNORED = -1

# The counter that draws the validation images: the same for every seed, so that runs compare.
_SPLIT = 2**64 - 1


def _bits(seed: int, counter: int, count: int) -> UInt[np.ndarray, " count"]:
    """`count` 64-bit words of the Philox stream keyed by (seed, counter)."""
    return np.random.Philox(key=np.array([seed, counter], np.uint64)).random_raw(count)


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, counter: int) -> Integer[np.ndarray, " n"]:
    return np.argsort(_bits(seed, counter, n), kind="stable")


def _word(name: str, value: Any) -> int:
    """The value, which keys random bits, as an int of Python."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if not 0 <= value < 2**64:
        raise ValueError(f"{name} must lie in 0 ... 2^64 - 1, got {value}.")
    return int(value)


def _fraction(validation: Any) -> float:
    rule = "a fraction in [0, 1)"
    return _rules.constant("validation", validation, rule, lambda part: (part >= 0) & (part < 1))


def _check_batch(numbers: int):
    check_fits(16 * numbers, "a batch", "Take a smaller batch_size or context.", host=True)


def _first(batches: Iterator[Any], count: int | None) -> Iterator[Any]:
    return itertools.islice(
        batches, None if count is None else _rules.count("count", count, least=0)
    )


def _rows(n: int, batch_size: int) -> Iterator[Integer[np.ndarray, " batch"]]:
    """0, ..., n - 1 in batches, the last filled up with -1."""
    for start in range(0, n, batch_size):
        rows = np.arange(start, start + batch_size)
        yield np.where(rows < n, rows, -1)


# ------------------------------------------------------------------ text


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens of a text on disk, and windows of them: what `jaxflow.training.text_data` returns.

    - `training`, `validation`: the tokens before and after the split, mapped from disk.
    - `tokenizer`: its `encode`, `decode`, `vocab_size`, `to_dict`.
    - `context`, `batch_size`, `seed`: of the batches.
    - `source`, `sha256`, `characters`: where the text came from, its digest and length.
    """

    training: UInt[np.ndarray, " tokens"]
    validation: UInt[np.ndarray, " rest"]
    tokenizer: Tokenizer
    context: int
    batch_size: int
    seed: int
    source: str
    sha256: str
    characters: int

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def batch(self, step: int) -> TokenBatch:
        """Batch number `step`: independent uniform windows of the training tokens.

        **Returns:** `(inputs, targets)`, each int32 `(batch_size, context)`, targets one token on.

        **Raises:** ValueError if `step` is not in 0 ... 2^64 - 1, TypeError if it is no whole
        number.
        """
        starts = len(self.training) - self.context
        # The remainder of 64 bits is uniform up to tokens / 2^64.
        words = _bits(self.seed, _word("step", step), self.batch_size) % np.uint64(starts)
        return self._windows(self.training, words.astype(np.int64))

    def validation_batches(self, count: int | None = None) -> Iterator[TokenBatch]:
        """The windows 0, c, 2 c, ... of the validation tokens in order, each once.

        All batches have one shape: rows after the last window have targets -1 (`IGNORED`), which a
        loss leaves out. `count`: the first so many batches alone.

        **Raises:** ValueError for a negative `count`, TypeError for one that is no whole number.
        """
        return _first(self._validation_batches(), count)

    def _validation_batches(self) -> Iterator[TokenBatch]:
        windows = max(len(self.validation) - 1, 0) // self.context
        for rows in _rows(windows, self.batch_size):
            inputs, targets = self._windows(self.validation, np.maximum(rows, 0) * self.context)
            # A new array: inputs and targets are views of the same tokens.
            yield inputs, np.where(rows[:, None] < 0, np.int32(IGNORED), targets)

    def _windows(self, tokens: np.ndarray, starts: np.ndarray) -> TokenBatch:
        windows = tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int32)
        return windows[:, :-1], windows[:, 1:]

    def describe(self) -> dict[str, Any]:
        """What the batches depend on, as JSON; `source` is for the reader, `sha256` decides."""
        return {
            "kind": "text",
            "source": self.source,
            "sha256": self.sha256,
            "characters": self.characters,
            "training_tokens": len(self.training),
            "validation_tokens": len(self.validation),
            "context": self.context,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "tokenizer": self.tokenizer.to_dict(),
        }


def text_data(
    source: str | Path | None = None,
    *,
    tokenizer: Tokenizer = Bytes(),
    context: int,
    batch_size: int,
    validation: float | int = 0.1,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Text:
    """Tokenises a text once, to disk, and gives windows of it.

    **Arguments:**

    - `source`: a UTF-8 file; or a folder, whose text files (`.txt`, `.md`, `.py`, ... in any case;
      hidden files and folders excepted) are read in order of their names, with a line feed between
      two. A byte order mark is no part of the text. `None` is the English prose of Python's own
      manual, which comes with every CPython.
    - `tokenizer`: `Bytes()`, `Chars()` (the characters of the whole text) or `BPE(size)` (trained
      on the training part). A fitted one, from a run's config, is used as it is, and so is
      `TokenizerFile.read("tokenizer.json")`, of pretrained models.
    - `context`: tokens a window, c. `batch_size`: windows a batch.
    - `validation`: the fraction of characters, at the end of the text, that is set aside.
    - `seed`: of the windows, in 0 ... 2^64 - 1.
    - `cache`: a folder that keeps the tokens for the next run. `None` keeps them for this process.
      Tokens from it are compared with their sha256; where they are damaged, a warning names the
      file, and they are made again for this process.

    **Returns:** a `Text`, with the training and the validation part.

    **Raises:** ValueError for numbers out of their range; for a path that does not exist, is a
    pipe or a device, or must not be read; for a file that is not UTF-8 (with the byte where it ends
    to be), an empty text, a part too short for one window, and a cache that cannot be written to.
    TypeError for numbers that are not whole and for another tokenizer. MemoryError for batches that
    do not fit the memory.

    ```python
    >>> import pathlib, tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> file = pathlib.Path(folder.name, "text.txt")
    >>> characters = file.write_text("to be or not to be " * 20)
    >>> data = jaxflow.training.text_data(file, context=8, batch_size=2, cache=folder.name)
    >>> inputs, targets = data.batch(0)
    >>> inputs.shape, data.vocab_size
    ((2, 8), 256)
    >>> folder.cleanup()

    ```
    """
    context, batch_size = _rules.count("context", context), _rules.count("batch_size", batch_size)
    seed, validation = _word("seed", seed), _fraction(validation)
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            "tokenizer must be Bytes(), Chars(), BPE(size) or TokenizerFile.read(path), got "
            f"{tokenizer!r}."
        )
    _check_batch(batch_size * (context + 1))
    files, folder = text_files(source), _cache_folder(cache)
    sha256, characters = scan(files)
    name = "pydoc_data.topics" if source is None else str(source)
    if not characters:
        raise ValueError(f"a text must have characters; {name} has none.")
    split = int((1 - validation) * characters)
    tokens = tokenised(files, tokenizer, split, folder, sha256=sha256)
    parts = {"training": tokens.training}
    for part, found in (parts | ({"validation": tokens.validation} if validation else {})).items():
        if len(found) <= context:
            raise ValueError(
                f"the {part} part has {len(found)} tokens; windows of context {context} need "
                f"{context + 1}. Take a smaller context, another validation fraction (it is "
                f"{validation}), or a longer text ({name}: {characters} characters)."
            )
    return Text(
        training=tokens.training,
        validation=tokens.validation,
        tokenizer=tokens.tokenizer,
        context=context,
        batch_size=batch_size,
        seed=seed,
        source=name,
        sha256=sha256,
        characters=characters,
    )


def _cache_folder(cache: str | Path | None) -> Path | None:
    if cache is None:
        return None
    if not isinstance(cache, str | os.PathLike):
        raise TypeError(f"cache must be the path of a folder, got a {type(cache).__name__}.")
    path = Path(cache)
    for place in (path, *path.parents):
        if os.path.lexists(place):
            if not place.is_dir():
                raise ValueError(f"cache must be a folder, or a new one; {place} is a file.")
            break
    return path


# ------------------------------------------------------------------ images


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images in memory: what `jaxflow.training.image_data` returns.

    - `images`, `labels`: the training part, `(n, height, width, channels)` as stored and `(n,)`.
    - `validation_images`, `validation_labels`: the validation part.
    - `white`: the pixel value that becomes 1.
    - `classes`: the number of classes. `batch_size`, `seed`: of the batches.
    - `source`, `sha256`: where the images came from, and the digest of both parts.
    """

    images: Num[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]
    validation_images: Num[np.ndarray, "rest h w c"]
    validation_labels: Int32[np.ndarray, " rest"]
    white: float
    classes: int
    batch_size: int
    seed: int
    source: str
    sha256: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def batch(self, step: int) -> ImageBatch:
        """Batch number `step`: every image once an epoch, in an order drawn for the epoch.

        A batch that starts before the end of an epoch goes on in the next one.

        **Returns:** `(images, labels)`: float32 `(batch_size, height, width, channels)` in [0, 1],
        int32 `(batch_size,)`.

        **Raises:** ValueError if `step` is not in 0 ... 2^64 - 1, TypeError if it is no whole
        number.
        """
        n, start = len(self.images), _word("step", step) * self.batch_size
        epochs = range(start // n, (start + self.batch_size - 1) // n + 1)
        order = np.concatenate([_permutation(n, self.seed, epoch) for epoch in epochs])
        chosen = order[start % n :][: self.batch_size]
        return self._scaled(self.images[chosen]), self.labels[chosen]

    def validation_batches(self, count: int | None = None) -> Iterator[ImageBatch]:
        """The validation images in order, each once.

        All batches have one shape: rows after the last image have the label -1 (`IGNORED`), which a
        loss and an accuracy leave out. `count`: the first so many batches alone.

        **Raises:** ValueError for a negative `count`, TypeError for one that is no whole number.
        """
        return _first(self._validation_batches(), count)

    def _validation_batches(self) -> Iterator[ImageBatch]:
        for rows in _rows(len(self.validation_images), self.batch_size):
            labels = np.where(rows < 0, np.int32(IGNORED), self.validation_labels[rows])
            yield self._scaled(self.validation_images[rows]), labels

    def _scaled(self, images: np.ndarray) -> Float32[np.ndarray, "batch h w c"]:
        return images.astype(np.float32) / np.float32(self.white)

    def describe(self) -> dict[str, Any]:
        """What the batches depend on, as JSON; `source` is for the reader, `sha256` decides."""
        return {
            "kind": "images",
            "source": self.source,
            "sha256": self.sha256,
            "shape": list(self.shape),
            "classes": self.classes,
            "training_images": len(self.images),
            "validation_images": len(self.validation_images),
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


def image_data(
    source: str | Path | None = None,
    *,
    labels: str | Path | None = None,
    batch_size: int,
    validation: float | int | str | Path = 0.1,
    seed: int = 0,
) -> Images:
    """Labelled images and batches of them.

    **Arguments:**

    - `source`: `None` is the 1797 digits of 8 x 8 pixels in scikit-learn. A path is a .npz with the
      arrays `images`, `labels`, or `x_train`, `y_train` (and `x_test`, `y_test`), images
      `(n, height, width)` or `(n, height, width, channels)`; or a file in the idx format of MNIST,
      gzipped or not. White is 65535 in uint16, 255 in other integers, 1 in floats and booleans; a
      pixel beyond it, a negative one or NaN is refused, as nothing is clipped. Labels are
      0, 1, 2, ...: as many classes as there are images, or a thousand where these are fewer.
    - `labels`: the labels of an idx file. `None` looks beside it, for `labels` and `idx1` in the
      place of `images` and `idx3`, as MNIST's files are called.
    - `batch_size`: images a batch; one longer than an epoch goes on in the next.
    - `validation`: a fraction drawn at random (the same for every seed), or the path of a second
      file. A `x_test` in the source is taken instead of a fraction.
    - `seed`: of the order of the images, in 0 ... 2^64 - 1.

    **Returns:** an `Images`, with the training and the validation part.

    **Raises:** ValueError for numbers out of their range; for a path that does not exist, is a
    pipe or a device, or must not be read; for a damaged file, pixels or labels out of their range
    (with the first that is), parts of different shapes or without an image. TypeError for numbers
    that are not whole. MemoryError for images or batches that do not fit the memory, before they
    are read. ImportError for the built-in images without scikit-learn.

    ```python
    >>> images, labels = jaxflow.training.image_data(batch_size=8).batch(0)
    >>> images.shape, labels.shape
    ((8, 8, 8, 1), (8,))

    ```
    """
    batch_size, seed = _rules.count("batch_size", batch_size), _word("seed", seed)
    _check_batch(batch_size)
    if not isinstance(validation, str | Path):
        validation = _fraction(validation)
    train, test = read_images(source, labels)
    if isinstance(validation, str | Path):
        test, _ = read_images(validation, what="validation")
    elif test is None:
        train, test = _split(train, validation)
    if train.images.shape[1:] != test.images.shape[1:] or train.white != test.white:
        raise ValueError(
            f"training and validation images must be alike: got {train.images.shape[1:]} with "
            f"white = {train.white:g} and {test.images.shape[1:]} with white = {test.white:g}."
        )
    classes = classes_of(train, test)
    _check_batch(batch_size * math.prod(train.images.shape[1:]))
    digest = hashlib.sha256()
    for array in (train.images, train.labels, test.images, test.labels):
        digest.update(np.ascontiguousarray(array).data)
    return Images(
        images=train.images,
        labels=train.labels,
        validation_images=test.images,
        validation_labels=test.labels,
        white=train.white,
        classes=classes,
        batch_size=batch_size,
        seed=seed,
        source="digits" if source is None else str(source),
        sha256=digest.hexdigest(),
    )


def _split(data: Labelled, validation: float) -> tuple[Labelled, Labelled]:
    n = len(data.images)
    held = round(validation * n)
    if held == n or (validation and not held):
        raise ValueError(
            f"validation = {validation} of {n} images leaves {n - held} to train on and {held} to "
            "validate on: take another fraction, or more images."
        )
    order = _permutation(n, 0, _SPLIT)
    parts = (
        Labelled(data.images[k], data.labels[k], data.white) for k in np.split(order, [n - held])
    )
    train, test = parts
    return train, test
