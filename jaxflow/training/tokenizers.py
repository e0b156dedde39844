"""Text to tokens and back: bytes, characters, byte pairs.

    decode(encode(text)) = text,    0 <= token < vocab_size

`fit(text)` gives the tokenizer of a text and leaves a fitted one as it is; `to_dict()` is JSON, so
that a run's config decodes what its model writes, without the data.
"""

import functools
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt


@dataclass(frozen=True)
class Bytes:
    """The 256 bytes of UTF-8."""

    vocab_size = 256

    def fit(self, text: Iterable[str]) -> "Bytes":
        return self

    def encode(self, text: str) -> UInt[np.ndarray, " tokens"]:
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, tokens: Any) -> str:
        """The text; bytes that are no UTF-8, as a model may write, become U+FFFD."""
        return bytes(np.asarray(tokens).tolist()).decode(errors="replace")

    def to_dict(self) -> dict[str, Any]:
        return {"type": "bytes"}


@dataclass(frozen=True)
class Chars:
    """The characters of a text, in order of their code points: `Chars().fit([text])`."""

    alphabet: str = ""

    @property
    def vocab_size(self) -> int:
        return len(self.alphabet)

    def fit(self, text: Iterable[str]) -> "Chars":
        return self if self.alphabet else Chars("".join(sorted(set().union(*text))))

    @functools.cached_property
    def _codes(self) -> UInt[np.ndarray, " vocab"]:
        return np.frombuffer(self.alphabet.encode("utf-32-le"), "<u4")

    def encode(self, text: str) -> UInt[np.ndarray, " tokens"]:
        """The characters' places in the alphabet; ValueError for one that is not in it."""
        if foreign := set(text).difference(self.alphabet):
            raise ValueError(
                f"the alphabet of {self.vocab_size} characters has no {min(foreign)!r}: leave it "
                "out, or train with the tokenizer Bytes(), which knows every text."
            )
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        return np.searchsorted(self._codes, codes).astype(np.uint32)

    def decode(self, tokens: Any) -> str:
        return self._codes[np.asarray(tokens, np.int64)].tobytes().decode("utf-32-le")

    def to_dict(self) -> dict[str, Any]:
        return {"type": "chars", "alphabet": self.alphabet}


@dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding, of at most `size` symbols: `BPE(512).fit([text])`.

    `model` is the fitted tokenizer in the JSON of the `tokenizers` library.
    """

    size: int
    model: str = ""

    def __post_init__(self):
        if self.size < 256:
            raise ValueError(f"BPE starts from the 256 bytes: size must be >= 256, got {self.size}")

    @functools.cached_property
    def _backend(self) -> Any:
        return _library().Tokenizer.from_str(self.model)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def fit(self, text: Iterable[str]) -> "BPE":
        if self.model:
            return self
        hf = _library()
        backend = hf.Tokenizer(hf.models.BPE())
        backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = hf.decoders.ByteLevel()
        alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=self.size, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(text, trainer)
        return BPE(self.size, backend.to_str())

    def encode(self, text: str) -> UInt[np.ndarray, " tokens"]:
        return np.array(self._backend.encode(text).ids, np.uint32)

    def decode(self, tokens: Any) -> str:
        return self._backend.decode(np.asarray(tokens).tolist())

    def to_dict(self) -> dict[str, Any]:
        return {"type": "bpe", "size": self.size, "model": self.model}


Tokenizer = Bytes | Chars | BPE
_TOKENIZERS = {"bytes": Bytes, "chars": Chars, "bpe": BPE}


def tokenizer_from_dict(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer of `tokenizer.to_dict()`, as a run's config holds it."""
    if saved.get("type") not in _TOKENIZERS:
        raise ValueError(f"a tokenizer's type is one of {list(_TOKENIZERS)}; got {saved}.")
    return _TOKENIZERS[saved["type"]](**{k: v for k, v in saved.items() if k != "type"})


def _library() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError('BPE needs tokenizers: pip install "jaxflow[train]".') from error
