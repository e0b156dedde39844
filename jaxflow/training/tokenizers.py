"""Text to tokens and back: bytes, characters, byte pairs, a tokenizer.json of Hugging Face.

    decode(encode(text)) = text,    0 <= token < vocab_size

(a tokenizer.json need not give back what it was given, such as capitals).

`fit(text)` gives the tokenizer of a text and leaves a fitted one as it is; `to_dict()` is JSON, so
that a run's config decodes what its model writes, without the data.
"""

import functools
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, UInt

from .._files import first_outside, regular
from .._rules import count

# Published vocabularies have up to 262,144 symbols.
LARGEST = 2**20

# Byte pairs are merged within a word in a time that grows as the square of its length, so a run of
# letters, marks or spaces without an end is cut.
_RUN = 2**10
_RUNS = re.compile(rf"(?:[^\W_]{{{_RUN}}}|(?:[^\w\s]|_){{{_RUN}}}|\s{{{_RUN}}})")


@dataclass(frozen=True)
class Bytes:
    """The 256 bytes of UTF-8."""

    vocab_size = 256

    def fit(self, text: Iterable[str]) -> "Bytes":
        """This tokenizer: it is that of every text."""
        return self

    def encode(self, text: str) -> UInt[np.ndarray, " tokens"]:
        """The bytes of the text; ValueError for half a surrogate pair, which UTF-8 has not."""
        return np.frombuffer(_utf8(text), np.uint8)

    def decode(self, tokens: Any) -> str:
        """The text; bytes that are no UTF-8, as a model may write, become U+FFFD.

        **Raises:** ValueError for a token that is not in 0 ... 255, TypeError for floats.
        """
        return _checked(tokens, self.vocab_size).astype(np.uint8).tobytes().decode(errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """What `jaxflow.training.tokenizer_from_dict` reads, as JSON."""
        return {"type": "bytes"}


@dataclass(frozen=True)
class Chars:
    """The characters of a text, in order of their code points: `Chars().fit([text])`.

    **Raises:** ValueError for an alphabet that is not in this order, or has a character twice.
    """

    alphabet: str = ""

    def __post_init__(self):
        _utf8(self.alphabet)
        if sorted(set(self.alphabet)) != list(self.alphabet):
            raise ValueError(
                "an alphabet must have each character once, in order of the code points, as "
                f"Chars().fit([text]) makes it; got {self.alphabet[:40]!r}."
            )

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def fit(self, text: Iterable[str]) -> "Chars":
        """The tokenizer of the characters in these pieces of a text."""
        return self if self.alphabet else Chars("".join(sorted(set().union(*text))))

    @functools.cached_property
    def _codes(self) -> UInt[np.ndarray, " vocab"]:
        if not self.alphabet:
            raise ValueError("Chars() has no alphabet before Chars().fit([text]) of some text.")
        return np.frombuffer(self.alphabet.encode("utf-32-le"), "<u4")

    def encode(self, text: str) -> UInt[np.ndarray, " tokens"]:
        """The characters' places in the alphabet; ValueError for one that is not in it."""
        alphabet = self._codes
        _check_string(text)
        if foreign := set(text).difference(self.alphabet):
            raise ValueError(
                f"the alphabet of {self.vocab_size} characters has no {min(foreign)!r}: leave it "
                "out, or train with the tokenizer Bytes(), which knows every text."
            )
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        return np.searchsorted(alphabet, codes).astype(np.uint32)

    def decode(self, tokens: Any) -> str:
        """The text.

        **Raises:** ValueError for a token outside 0 ... vocab_size - 1, TypeError for floats.
        """
        alphabet = self._codes
        return alphabet[_checked(tokens, self.vocab_size)].tobytes().decode("utf-32-le")

    def to_dict(self) -> dict[str, Any]:
        """What `jaxflow.training.tokenizer_from_dict` reads, as JSON."""
        return {"type": "chars", "alphabet": self.alphabet}


@dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding, of at most `size` symbols: `BPE(512).fit([text])`.

    `model` is the fitted tokenizer in the JSON of the `tokenizers` library.

    **Raises:** ValueError for a size that is not in 256 ... 2^20, or a model that is damaged;
    TypeError for a size that is no whole number; ImportError for a model without that library.
    """

    size: int
    model: str = ""

    def __post_init__(self):
        size = count("the size of BPE", self.size, 256)  # it starts from the bytes
        if size > LARGEST:
            raise ValueError(f"the size of BPE must be at most {LARGEST}, got {size}.")
        object.__setattr__(self, "size", size)  # an int of Python, for JSON
        if self.model:
            _ = self._backend

    @functools.cached_property
    def _backend(self) -> Any:
        if not self.model:
            raise ValueError(
                f"BPE({self.size}) has no symbols before BPE({self.size}).fit([text])."
            )
        return _assembled(*_symbols(self.model, self.size))

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def fit(self, text: Iterable[str]) -> "BPE":
        """The tokenizer of the most frequent pairs in these pieces of a text."""
        if self.model:
            return self
        backend = _assembled({}, [])
        trainer = _library().trainers.BpeTrainer(
            vocab_size=self.size, initial_alphabet=_alphabet(), show_progress=False
        )
        backend.train_from_iterator((part for piece in text for part in _cut(piece)), trainer)
        return BPE(self.size, backend.to_str())

    def encode(self, text: str) -> UInt[np.ndarray, " tokens"]:
        """The tokens of the text; ValueError for half a surrogate pair, which UTF-8 has not."""
        _utf8(text)
        ids = [np.array(self._backend.encode(part).ids, np.uint32) for part in _cut(text)]
        return np.concatenate([*ids, np.zeros(0, np.uint32)])

    def decode(self, tokens: Any) -> str:
        """The text; bytes that are no UTF-8, as a model may write, become U+FFFD.

        **Raises:** ValueError for a token outside 0 ... vocab_size - 1, TypeError for floats.
        """
        return self._backend.decode(_checked(tokens, self.vocab_size).tolist())

    def to_dict(self) -> dict[str, Any]:
        """What `jaxflow.training.tokenizer_from_dict` reads, as JSON."""
        return {"type": "bpe", "size": self.size, "model": self.model}


@dataclass(frozen=True)
class TokenizerFile:
    """The tokenizer of a tokenizer.json, as pretrained models have: `TokenizerFile.read(path)`.

    Tokens that it would add around a text, cut off or fill up with are left out. `model` is the
    content of the file.

    **Raises:** ValueError for content that the `tokenizers` library does not read; ImportError
    without that library.
    """

    model: str

    def __post_init__(self):
        _ = self._backend

    @classmethod
    def read(cls, path: str | Path) -> "TokenizerFile":
        """The tokenizer of a file; ValueError, naming it, for one that is none."""
        try:
            return cls(regular(Path(path)).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no tokenizer.json: {error}") from None

    @functools.cached_property
    def _backend(self) -> Any:
        _check_string(self.model)
        backend = _foreign("the tokenizer", lambda: _library().Tokenizer.from_str(self.model))
        backend.no_truncation()
        backend.no_padding()
        return backend

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token."""
        largest = max(self._backend.get_vocab().values(), default=-1)
        if not 0 <= largest < LARGEST:
            raise ValueError(f"a vocabulary has 1 ... {LARGEST} tokens, got {largest + 1}.")
        return largest + 1

    def fit(self, text: Iterable[str]) -> "TokenizerFile":
        """This tokenizer, which is fitted already."""
        return self

    def encode(self, text: str) -> UInt[np.ndarray, " tokens"]:
        """The tokens of the text; ValueError for a text that the tokenizer has none for."""
        _utf8(text)
        encoded = _foreign("the text", lambda: self._backend.encode(text, add_special_tokens=False))
        return np.array(encoded.ids, np.uint32)

    def decode(self, tokens: Any) -> str:
        """The text, special tokens included.

        **Raises:** ValueError for a token outside 0 ... vocab_size - 1, TypeError for floats.
        """
        tokens = _checked(tokens, self.vocab_size).tolist()
        return self._backend.decode(tokens, skip_special_tokens=False)

    def to_dict(self) -> dict[str, Any]:
        """What `jaxflow.training.tokenizer_from_dict` reads, as JSON."""
        return {"type": "file", "model": self.model}


def _foreign(what: str, work: Callable[[], Any]) -> Any:
    """What the library gives; its errors, of which some are no Exception, are ValueErrors."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit, ImportError, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what} is refused by the tokenizers library: {error}.") from None


Tokenizer = Bytes | Chars | BPE | TokenizerFile
_TOKENIZERS = {"bytes": Bytes, "chars": Chars, "bpe": BPE, "file": TokenizerFile}
_ENTRIES = {
    "bytes": {},
    "chars": {"alphabet": str},
    "bpe": {"size": int, "model": str},
    "file": {"model": str},
}


def tokenizer_from_dict(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer of `tokenizer.to_dict()`, as a run's config holds it.

    **Arguments:** `saved`: `{"type": ..., ...}`, with the entries of that type.

    **Returns:** a `Bytes`, `Chars`, `BPE` or `TokenizerFile`.

    **Raises:** ValueError for another type, entries that are missing, too many or of the wrong
    type, an alphabet out of order, and a model that is damaged.

    ```python
    >>> saved = jaxflow.training.Bytes().to_dict()
    >>> jaxflow.training.tokenizer_from_dict(saved).encode("To").tolist()
    [84, 111]

    ```
    """
    kind = saved.get("type") if isinstance(saved, dict) else saved
    if not isinstance(kind, str) or kind not in _TOKENIZERS:
        raise ValueError(f"a tokenizer's type is one of {list(_TOKENIZERS)}; got {kind!r:.80}.")
    entries = {name: value for name, value in saved.items() if name != "type"}
    if {name: type(value) for name, value in entries.items()} != _ENTRIES[kind]:
        expected = {name: of.__name__ for name, of in _ENTRIES[kind].items()}
        found = {name: type(value).__name__ for name, value in entries.items()}
        raise ValueError(
            f"a tokenizer of type {kind} must have the entries {expected}; got {found}."
        )
    return _TOKENIZERS[kind](**entries)


def _check_string(text: Any):
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, got {text!r:.80}.")


def _utf8(text: Any) -> bytes:
    _check_string(text)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is {text[error.start]!r}, half a surrogate pair, "
            "which UTF-8 does not have: leave it out."
        ) from None


def _checked(tokens: Any, vocab_size: int) -> Integer[np.ndarray, " tokens"]:
    """Tokens as int64, if all of them are some of this vocabulary."""
    try:
        found = np.asarray(tokens)
    except ValueError:  # lists of several lengths
        found = np.asarray(None)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise TypeError(
            f"tokens must be a sequence of whole numbers, got {found.dtype} of shape {found.shape}."
        )
    if outside := first_outside(found, 0, vocab_size - 1):
        raise ValueError(
            f"tokens must lie in 0 ... {vocab_size - 1}, the vocabulary; got {outside[0]} "
            f"{outside[1]}."
        )
    return found.astype(np.int64)


def _cut(text: str) -> Iterator[str]:
    """The text in parts without a longer run than `_RUN`."""
    start = 0
    for run in _RUNS.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    if start < len(text):
        yield text[start:]


def _symbols(model: str, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The symbols of a model in JSON and its pairs; the rest of it is known.

    All that the library relies on is looked at here: it does not end in an error but in a panic.
    """
    try:
        parts = json.loads(model)["model"]
        vocabulary, merges = parts["vocab"], [(left, right) for left, right in parts["merges"]]
        sound = (
            sorted(vocabulary.values()) == list(range(len(vocabulary)))
            and not any(isinstance(number, bool) for number in vocabulary.values())
            and len(vocabulary) <= size
            and vocabulary.keys() >= {*_alphabet()}
            and all({left, right, left + right} <= vocabulary.keys() for left, right in merges)
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise ValueError(
            f"the model of BPE({size}) must be JSON of the tokenizers library, with the 256 bytes "
            f"and their pairs, at most {size} symbols; this one is damaged, or of another kind. "
            "Take it from to_dict() of a fitted one."
        )
    return vocabulary, merges


def _assembled(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    hf = _library()
    backend = hf.Tokenizer(hf.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    return backend


def _alphabet() -> list[str]:
    """The characters that stand for the 256 bytes."""
    return _library().pre_tokenizers.ByteLevel.alphabet()


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError('byte pairs need tokenizers: pip install "jaxflow[train]".') from error
