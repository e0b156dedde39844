"""Batches of text and images: what they hold, and that batch k depends on (seed, k) alone."""

import functools
import gzip
import inspect
import io
import itertools
import json
import os
import sys
import warnings
import zipfile

import numpy as np
import pytest

from jaxflow import _memory
from jaxflow.training.data import IGNORED, image_data, text_data
from jaxflow.training.sources import read_idx
from jaxflow.training.tokenizers import BPE, Bytes, Chars, tokenizer_from_dict

PROSE = "The quick brown fox jumps over the lazy dog; naïve façade, 東京 🙂.\r\n" * 40


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes(PROSE.encode())
    return path


text = functools.partial(text_data, context=16, batch_size=4)


# ------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("tokenizer", [Bytes(), Chars(), BPE(300)], ids=lambda t: type(t).__name__)
def test_tokens_decode_to_the_text(prose, tokenizer):
    if isinstance(tokenizer, BPE):
        pytest.importorskip("tokenizers")
    data = text(prose, tokenizer=tokenizer)
    tokens = np.concatenate([data.training, data.validation])
    assert data.tokenizer.decode(tokens) == PROSE
    assert tokens.dtype == np.uint16 and tokens.max() < data.vocab_size
    saved = json.loads(json.dumps(data.tokenizer.to_dict()))
    again = tokenizer_from_dict(saved)
    assert again == data.tokenizer and again.vocab_size == data.vocab_size
    np.testing.assert_array_equal(again.encode(PROSE[:50]), data.tokenizer.encode(PROSE[:50]))
    assert again.fit(["another text"]) is again


def test_bytes_are_those_of_utf8_and_a_broken_one_is_shown():
    assert Bytes().vocab_size == 256
    np.testing.assert_array_equal(Bytes().encode("é"), [0xC3, 0xA9])
    assert Bytes().decode([0xC3, 0xA9, 0xC3]) == "é\ufffd"


def test_characters_are_in_order_of_their_code_points():
    tokenizer = Chars().fit(["hello", " wörld"])
    assert tokenizer.alphabet == " dehlorwö"
    np.testing.assert_array_equal(tokenizer.encode("whö"), [7, 3, 8])
    with pytest.raises(ValueError, match="alphabet of 9 characters has no 'x'"):
        tokenizer.encode("whox")


def test_byte_pairs_shorten_the_text_and_are_those_of_the_training_part(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "text.txt"
    path.write_text("abcabc " * 90 + "xyzxyz " * 10)
    data = text(path, tokenizer=BPE(262), context=4)
    # Six merges: ab, abc, abcabc, those with a space; none of xyz, which is in the validation part.
    assert data.vocab_size <= 262 and len(data.training) <= 2 * 90
    assert len(data.validation) >= 6 * 10


@pytest.mark.parametrize("tokenizer", [Bytes(), Chars(), BPE(300)], ids=lambda t: type(t).__name__)
def test_tokens_outside_the_vocabulary_are_refused(tokenizer):
    if isinstance(tokenizer, BPE):
        pytest.importorskip("tokenizers")
    tokenizer = tokenizer.fit(["hello"])
    n = tokenizer.vocab_size
    assert tokenizer.decode([]) == "" and len(tokenizer.encode("")) == 0
    assert tokenizer.decode([n - 1]) == tokenizer.decode(np.array([n - 1], np.int32))
    for bad in ([0, -1], [0, n], np.array([0, 2**63], np.uint64)):
        with pytest.raises(ValueError, match=rf"0 ... {n - 1}, the vocabulary; got {bad[1]} at"):
            tokenizer.decode(bad)
    for wrong in ([0.0], [True], [[1]], 5, "ab", None, [2**70], [1, [2]]):
        with pytest.raises(TypeError, match="tokens must be a sequence of whole numbers"):
            tokenizer.decode(wrong)
    with pytest.raises(ValueError, match="ud800"):
        tokenizer.encode("he\ud800")
    with pytest.raises(TypeError, match="a text must be a string, got b'x'"):
        inspect.unwrap(type(tokenizer).encode)(tokenizer, b"x")


def test_tokenizers_that_cannot_be():
    for size, message in {255: "at least 256", 10**9: "at most 1048576", -1: "got -1"}.items():
        with pytest.raises(ValueError, match=f"the size of BPE must .*{message}"):
            BPE(size)
    with pytest.raises(TypeError, match="whole number, got True"):
        BPE(True)
    for unfitted in (Chars(), BPE(300)):
        with pytest.raises(ValueError, match=r"before .*fit\(\[text\]\)"):
            unfitted.encode("a")
    for alphabet, message in {"ba": "in order", "aa": "once", "a\ud800": "surrogate"}.items():
        with pytest.raises(ValueError, match=message):
            Chars(alphabet)


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"type": "words"}, "one of .*'bytes'.*got .*words"),
        ({}, "got None"),
        ([], r"got \[\]"),
        ({"type": ["bytes"]}, r"got \['bytes'\]"),
        ({"type": "bytes", "size": 3}, r"entries \{\}; got \{'size': 'int'\}"),
        ({"type": "chars"}, "entries .*'alphabet': 'str'.*got {}"),
        ({"type": "chars", "alphabet": 3}, "got {'alphabet': 'int'}"),
        ({"type": "bpe", "size": True, "model": ""}, "'size': 'bool'"),
        ({"type": "bpe", "size": 300.0, "model": ""}, "'size': 'float'"),
    ],
)
def test_a_damaged_tokenizer_is_refused(saved, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(tokenizer_from_dict)(saved)


def test_a_damaged_model_of_byte_pairs_is_refused_before_the_library_sees_it():
    """The library ends in a panic, which is no Exception, for pairs that are no symbols."""
    pytest.importorskip("tokenizers")
    tokenizer = BPE(300).fit([PROSE])
    whole = json.loads(tokenizer.model)
    symbols, merges = whole["model"]["vocab"], whole["model"]["merges"]
    last = max(symbols, key=symbols.get)

    def changed(**parts):
        return json.dumps(whole | {"model": whole["model"] | parts})

    fewer = {name: number for name, number in symbols.items() if name != last}
    renumbered = symbols | {last: symbols[last] + 1}
    models = [tokenizer.model[:-9], "null", "[]", "{}", "{" * 9999, changed(vocab=fewer)]
    models += [changed(vocab=renumbered), changed(vocab=symbols | {last: None}), changed(vocab=[])]
    models += [changed(merges=[["a", "xyz"], *merges]), changed(merges=[1]), changed(merges="ab")]
    for model in models:
        with pytest.raises(ValueError, match="the model of BPE.300. must be JSON"):
            BPE(300, model)
    with pytest.raises(ValueError, match="at most 257 symbols"):
        BPE(257, tokenizer.model)
    # What is not of the model, such as a change of the text, is not taken over.
    lower = json.dumps(whole | {"normalizer": {"type": "Lowercase"}})
    assert BPE(300, lower).decode(BPE(300, lower).encode(PROSE)) == PROSE


@pytest.mark.parametrize("word", ["ab", "?!", " ", "1²", "_"])
def test_a_word_without_an_end_takes_the_time_of_its_length(word):
    """As one word of the library it would take hours; in parts it decodes the same."""
    pytest.importorskip("tokenizers")
    text = word * (2**16 // len(word))
    tokenizer = BPE(300).fit([text])
    tokens = tokenizer.encode(text)
    assert len(tokens) < len(text) / 16 and tokenizer.decode(tokens) == text


# ------------------------------------------------------------------ text


def test_windows_are_cut_from_the_training_tokens(prose):
    data = text(prose)
    inputs, targets = data.batch(3)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    windows = np.lib.stride_tricks.sliding_window_view(data.training, 17)
    rows = np.concatenate([inputs, targets[:, -1:]], axis=1)
    assert all((windows == row).all(axis=1).any() for row in rows)


def test_every_window_of_the_training_part_is_drawn_and_no_other(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    data = text(path, context=3, batch_size=500, validation=0.25)
    starts = data.batch(0)[0][:, 0] - ord("a")
    # 19 characters to train on, int(0.75 * 26): windows of 3 + 1 start at 0, ..., 15.
    assert len(data.training) == 19
    counts = np.bincount(starts, minlength=16)
    assert len(counts) == 16
    # A chi-square of 15 degrees of freedom: beyond 44 with probability 1e-4; the seed is fixed.
    assert ((counts - 500 / 16) ** 2 / (500 / 16)).sum() < 44


def test_a_batch_of_text_is_a_function_of_seed_and_step(prose):
    first, again, other = text(prose), text(prose), text(prose, seed=1)
    forwards = [first.batch(k) for k in range(5)]
    for k in (4, 0, 2):
        for mine, theirs in zip(forwards[k], again.batch(k), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert not np.array_equal(forwards[0][0], forwards[1][0])
    assert not np.array_equal(forwards[0][0], other.batch(0)[0])


def test_batches_do_not_change_with_the_versions(tmp_path):
    """Numbers written down once: with others, runs of before would resume on other data."""
    path = tmp_path / "bytes.txt"
    path.write_bytes(bytes(range(128)))
    data = text(path, context=1, batch_size=6, validation=0)
    assert data.batch(7)[0][:, 0].tolist() == [58, 32, 82, 38, 73, 73]
    images = image_file(tmp_path / "images.npz", n=10)
    drawn, _ = image_data(images, batch_size=10, seed=1).batch(0)
    assert numbers(drawn).tolist() == [5, 2, 8, 3, 7, 6, 4, 9, 0, 7]


def test_validation_windows_cover_the_part_once(prose):
    data = text(prose)
    batches = list(data.validation_batches())
    assert all(x.shape == y.shape == (4, 16) and y.dtype == np.int32 for x, y in batches)
    inputs, targets = (np.concatenate(part) for part in zip(*batches, strict=True))
    whole = targets[:, 0] != IGNORED
    count = (len(data.validation) - 1) // 16
    assert whole.sum() == count and not whole.all() and (targets[~whole] == IGNORED).all()
    np.testing.assert_array_equal(inputs[whole].ravel(), data.validation[: 16 * count])
    np.testing.assert_array_equal(targets[whole].ravel(), data.validation[1 : 16 * count + 1])
    assert len(list(data.validation_batches(2))) == 2
    assert list(text(prose, validation=0).validation_batches()) == []


def test_the_split_is_by_characters(tmp_path):
    path = tmp_path / "two.txt"
    path.write_text("é" * 90 + "z" * 10)
    data = text(path, context=2)
    assert bytes(data.training.astype(np.uint8)) == ("é" * 90).encode()
    assert bytes(data.validation.astype(np.uint8)) == b"z" * 10
    described = data.describe()
    assert described["characters"] == 100 and described["training_tokens"] == 180
    assert json.loads(json.dumps(described)) == described


def test_the_built_in_text_is_prose():
    data = text(None)
    assert data.source == "pydoc_data.topics" and data.characters > 100_000
    assert " the " in data.tokenizer.decode(data.training[:5000])


def test_a_folder_is_read_by_name_without_hidden_and_foreign_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "c.md": b"last",
        "a.txt": b"first",
        "b/x.py": b"middle",
        ".git/y.txt": b"hidden",
        "d.png": b"\xff\xfe",
    }.items():
        (tmp_path / name).write_bytes(content)
    data = text(tmp_path, context=2, validation=0)
    assert data.tokenizer.decode(data.training) == "first\nmiddle\nlast"


def test_a_text_longer_than_a_piece_is_read_whole(tmp_path):
    """A piece is 2^20 bytes; here one ends within a character of three."""
    path = tmp_path / "long.txt"
    content = "x" + "東" * (2**19) + "y"
    path.write_text(content)
    data = text(path, tokenizer=Chars(), validation=0.5, context=3)
    assert len(data.training) == len(data.validation) == 2**18 + 1
    assert data.tokenizer.decode(data.training) == content[: 2**18 + 1]
    assert data.tokenizer.decode(data.validation) == content[2**18 + 1 :]


def test_names_in_any_case_byte_order_marks_and_links_in_a_folder(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub.txt").mkdir(parents=True)
    (folder / "A.TXT").write_bytes(b"\xef\xbb\xbffirst")
    (folder / "sub.txt" / "b.Md").write_bytes(b"\xef\xbb\xbfsecond")
    (folder / ".hidden.txt").write_bytes(b"no")
    (folder / "up").symlink_to("..")
    data = text(folder, context=2, validation=0)
    assert data.tokenizer.decode(data.training) == "first\nsecond"
    (tmp_path / "plain.txt").write_bytes(b"first\nsecond")
    assert text(tmp_path / "plain.txt", context=2, validation=0).sha256 == data.sha256
    for make, message in {
        os.mkfifo: "is a named pipe",
        lambda path: path.symlink_to("gone"): "does not",
        lambda path: path.symlink_to("c.txt"): "symbolic links",
        lambda path: path.write_bytes(b"\xff"): "is not UTF-8",
    }.items():
        make(folder / "c.txt")
        with pytest.raises(ValueError, match=f"c.txt.* {message}"):
            text(folder, context=2, validation=0)
        (folder / "c.txt").unlink()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def walk(root, onerror):
        onerror(PermissionError(13, "Permission denied", str(root / "secret")))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(ValueError, match="secret cannot be read: Permission denied"):
        text(tmp_path)


@pytest.mark.parametrize("start", [0, 5, 2**20 - 1, 2**20])
def test_a_file_that_is_not_utf8_is_refused_with_its_byte(tmp_path, start):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"a" * start + "é".encode("latin-1") + b"tude")
    with pytest.raises(ValueError, match=rf"latin1.txt is not UTF-8: .* at byte {start}\."):
        text(path)


def test_texts_and_options_that_do_not_do(tmp_path, prose):
    with pytest.raises(ValueError, match="nowhere.txt does not"):
        text(tmp_path / "nowhere.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no text file"):
        text(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\), got 1"):
        text(prose, validation=1.0)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        text(prose, context=0)
    with pytest.raises(ValueError, match="validation part has .* need 401.*0.1"):
        text(prose, context=400)
    with pytest.raises(ValueError, match="training part has .* need 100001"):
        text(prose, context=100_000)
    with pytest.raises(ValueError, match="source must be a regular file; /dev/zero is a device"):
        text("/dev/zero")
    with pytest.raises(ValueError, match="cache must be a folder, or a new one; /dev/zero"):
        text(prose, cache="/dev/zero/tokens")
    (tmp_path / "nothing.txt").write_bytes(b"\xef\xbb\xbf")
    for tokenizer in (Bytes(), Chars(), BPE(300)):
        with pytest.raises(ValueError, match="nothing.txt has none"):
            text(tmp_path / "nothing.txt", tokenizer=tokenizer)
    data = text(prose)
    for step in (-1, 2**64):
        with pytest.raises(ValueError, match=f"step must lie in .* got {step}"):
            data.batch(step)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        data.validation_batches(-1)
    for name in ("context", "batch_size"):
        with pytest.raises(MemoryError, match="a batch needs about"):
            inspect.unwrap(text_data)(prose, **{"context": 1000, "batch_size": 1000, name: 10**9})
        with pytest.raises(ValueError, match=f"{name} must be below 2.31, got 1000000000000"):
            inspect.unwrap(text_data)(prose, **{"context": 1000, "batch_size": 1000, name: 10**12})


NUMBERS = {
    "batch_size": [0, -1, 1.0, True, "4", None, float("nan")],
    "seed": [-1, 2**64, 10**20, 1.0, True, None],
    "validation": [1, -0.1, float("nan"), True, None, 1j],
}


@pytest.mark.parametrize("make", [text_data, image_data], ids=["text", "images"])
def test_every_number_is_checked_before_any_work(make, monkeypatch):
    make = inspect.unwrap(make)
    monkeypatch.setattr("jaxflow.training.data.text_files", lambda source: pytest.fail("work"))
    monkeypatch.setattr("jaxflow.training.data.read_images", lambda *a, **k: pytest.fail("work"))
    settings, wrong = {"batch_size": 4}, NUMBERS
    if "context" in inspect.signature(make).parameters:
        settings, wrong = {"batch_size": 4, "context": 16}, NUMBERS | {"context": [0, 1.5, True]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((ValueError, TypeError), match=rf"{name} must .*, got "):
                make(None, **settings | {name: value})


def test_numbers_of_numpy_are_numbers(prose):
    make = inspect.unwrap(text_data)
    data = make(prose, context=np.int64(4), batch_size=np.int8(2), seed=np.uint64(2**64 - 1))
    assert json.loads(json.dumps(data.describe())) == data.describe()
    assert inspect.unwrap(type(data).batch)(data, np.int32(3))[0].shape == (2, 4)
    for tokenizer in (Bytes, "bytes", None):
        with pytest.raises(TypeError, match=r"tokenizer must be Bytes\(\), Chars\(\), BPE"):
            make(prose, context=4, batch_size=2, tokenizer=tokenizer)


def test_a_cache_keeps_the_tokens(prose, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = text(prose, tokenizer=Chars(), cache=cache)
    entries = list(cache.iterdir())
    assert len(entries) == 1 and isinstance(first.training, np.memmap)
    monkeypatch.setattr(Chars, "encode", lambda self, text: pytest.fail("tokenised again"))
    again = text(prose, tokenizer=Chars(), cache=cache)
    np.testing.assert_array_equal(first.training, again.training)
    assert again.describe() == first.describe()
    monkeypatch.undo()
    text(prose, tokenizer=Bytes(), cache=cache)
    text(prose, tokenizer=Chars(), validation=0.2, cache=cache)
    prose.write_text(PROSE.upper())
    text(prose, tokenizer=Chars(), cache=cache)
    assert len(list(cache.iterdir())) == 4


def test_damage_of_the_cache_is_named_and_never_trained_on(prose, tmp_path):
    cache = tmp_path / "cache"
    text(prose, tokenizer=Chars(), cache=cache)
    good = text(prose, tokenizer=Chars())  # not mapped from the files that are damaged below
    (entry,) = cache.iterdir()
    draw = np.random.default_rng(0)
    for k in range(60):
        path = sorted(entry.iterdir())[k % 4]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[draw.integers(len(whole))] ^= 1 << draw.integers(8)
        path.write_bytes([flipped, whole[: draw.integers(len(whole))], whole + b" "][k // 4 % 3])
        if path.read_bytes() == whole + b" " and path.name == "entry.json":
            path.write_bytes(b"[]")  # JSON may end in a space
        with pytest.warns(UserWarning, match=f"{entry}.* made again, for this process") as caught:
            data = text(prose, tokenizer=Chars(), cache=cache)
        assert len(caught) == 1 and (path.name in str(caught[0].message))
        np.testing.assert_array_equal(data.training, good.training)
        np.testing.assert_array_equal(data.validation, good.validation)
        assert data.tokenizer == good.tokenizer and path.exists()
        path.write_bytes(whole)
    for path in sorted(entry.iterdir()):
        whole = path.read_bytes()
        path.unlink()
        for make in (lambda path: None, os.mkfifo):
            make(path)
            with pytest.warns(UserWarning, match=f"{path.name}.* made again"):
                data = text(prose, tokenizer=Chars(), cache=cache)
            np.testing.assert_array_equal(data.training, good.training)
        path.unlink()
        path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text(prose, tokenizer=Chars(), cache=cache)
    assert list(cache.iterdir()) == [entry]


def test_tokens_of_another_text_are_not_taken(prose, tmp_path):
    """An entry that is whole, under the name of another one."""
    text(prose, cache=tmp_path / "first")
    text(prose, validation=0.2, cache=tmp_path / "second")
    (first,), (second,) = (list((tmp_path / name).iterdir()) for name in ("first", "second"))
    first.rename(second.with_name("kept"))
    second.rename(first)
    with pytest.warns(UserWarning, match="what these tokens are made of"):
        data = text(prose, cache=tmp_path / "first")
    np.testing.assert_array_equal(data.training, text(prose).training)


def test_a_text_that_changes_while_it_is_read_is_refused(prose, monkeypatch):
    monkeypatch.setattr("jaxflow.training.data.scan", lambda files: ("0" * 64, len(PROSE)))
    with pytest.raises(ValueError, match="the text changed while it was read"):
        text(prose)


def test_a_cache_that_cannot_be_written_is_named(prose, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="cache must be a folder, or a new one; .*file is a file"):
        text(prose, cache=tmp_path / "file" / "tokens")

    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(ValueError, match="cannot be kept in .*cache: .*No space left"):
        text(prose, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ------------------------------------------------------------------ images


def image_file(path, n=20, names=("images", "labels"), **more):
    """Image k has the pixels k; its label is k mod 3."""
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None], (n, 4, 5))
    np.savez(path, **{names[0]: images, names[1]: np.arange(n) % 3}, **more)
    return path


def numbers(images):
    return np.rint(255 * images[:, 0, 0, 0]).astype(int)


def test_every_image_comes_once_an_epoch(tmp_path):
    data = image_data(image_file(tmp_path / "a.npz"), batch_size=5, validation=0.1)
    assert data.shape == (4, 5, 1) and data.classes == 3
    batches = [data.batch(k) for k in range(18)]
    assert all(x.shape == (5, 4, 5, 1) and x.dtype == np.float32 for x, _ in batches)
    assert all(y.shape == (5,) and y.dtype == np.int32 for _, y in batches)
    seen = np.concatenate([numbers(x) for x, _ in batches])
    np.testing.assert_array_equal(seen % 3, np.concatenate([y for _, y in batches]))
    epochs = seen.reshape(5, 18)
    held = {int(k) for x, y in data.validation_batches() for k in numbers(x)[y >= 0]}
    assert all(sorted({*map(int, epoch)} | held) == list(range(20)) for epoch in epochs)
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(epochs))


def test_a_batch_of_images_is_a_function_of_seed_and_step(tmp_path):
    path = image_file(tmp_path / "a.npz")
    first, again = (image_data(path, batch_size=50) for _ in range(2))  # more than two epochs
    forwards = [first.batch(k) for k in range(4)]
    for k in (3, 1):
        for mine, theirs in zip(forwards[k], again.batch(k), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    other = image_data(path, batch_size=50, seed=1)
    assert not np.array_equal(other.batch(0)[0], forwards[0][0])
    np.testing.assert_array_equal(other.validation_images, first.validation_images)
    with pytest.raises(ValueError, match="got -"):
        first.batch(-1)


def test_validation_images_come_once_in_batches_of_one_shape(tmp_path):
    data = image_data(image_file(tmp_path / "a.npz"), batch_size=4, validation=0.3)
    batches = list(data.validation_batches())
    assert [x.shape for x, _ in batches] == [(4, 4, 5, 1)] * 2
    labels = np.concatenate([y for _, y in batches])
    np.testing.assert_array_equal(labels[:6], data.validation_labels)
    assert labels.dtype == np.int32 and labels[6:].tolist() == [IGNORED] * 2
    assert len(list(data.validation_batches(1))) == 1
    none = image_data(image_file(tmp_path / "b.npz"), batch_size=4, validation=0)
    assert list(none.validation_batches()) == [] and len(none.images) == 20


def test_pixels_lie_between_0_and_1(tmp_path):
    pytest.importorskip("sklearn")
    digits = image_data(batch_size=1617)
    assert digits.shape == (8, 8, 1) and digits.classes == 10
    images, _ = digits.batch(0)
    assert (images.min(), images.max()) == (0, 1) and len(np.unique(images)) == 17
    described = digits.describe()
    assert (described["training_images"], described["validation_images"]) == (1617, 180)
    assert json.loads(json.dumps(described)) == described
    floats = np.linspace(0, 1, 2 * 9 * 3).reshape(2, 3, 3, 3)
    np.savez(tmp_path / "colours.npz", images=floats, labels=[[0], [1]])
    colours = image_data(tmp_path / "colours.npz", batch_size=2, validation=0.5)
    assert colours.shape == (3, 3, 3)
    assert colours.batch(0)[0].max() in (floats.astype(np.float32)[0].max(), np.float32(1))


def test_a_test_part_is_taken_for_validation(tmp_path):
    held = {"x_test": np.zeros((3, 4, 5), np.uint8), "y_test": np.array([0, 1, 3])}
    path = image_file(tmp_path / "keras.npz", names=("x_train", "y_train"), **held)
    data = image_data(path, batch_size=4)
    assert (len(data.images), len(data.validation_images), data.classes) == (20, 3, 4)
    second = image_file(tmp_path / "second.npz", n=7)
    data = image_data(path, batch_size=4, validation=second)
    assert len(data.validation_images) == 7
    np.savez(tmp_path / "larger.npz", images=np.zeros((2, 9, 9), np.uint8), labels=[0, 1])
    with pytest.raises(ValueError, match=r"must be alike: got \(4, 5, 1\) .* \(9, 9, 1\)"):
        image_data(path, batch_size=4, validation=tmp_path / "larger.npz")


def test_other_data_have_another_digest(tmp_path):
    first = image_data(image_file(tmp_path / "a.npz"), batch_size=4)
    second = image_data(image_file(tmp_path / "b.npz", n=21), batch_size=4)
    assert first.sha256 != second.sha256 and len(first.sha256) == 64


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((4, 9), np.uint8), np.zeros(4, int), r"\(n, height, width\).*\(4, 9\)"),
        (np.full((4, 2, 2), 256), np.zeros(4, int), "0 ... 255 .* 256"),
        (np.full((4, 2, 2), 1.5), np.zeros(4, int), "0 ... 1 .* 1.5"),
        (np.full((4, 2, 2), np.nan), np.zeros(4, int), "0 ... 1 .* nan"),
        (np.zeros((4, 2, 2), np.uint8), np.zeros(3, int), r"an image: 4; .* \(3,\)"),
        (np.zeros((4, 2, 2), np.uint8), np.full(4, -1), "0, 1, 2, ...; .* -1"),
        (np.zeros((4, 2, 2), np.uint8), np.zeros(4), "0, 1, 2, ...; .* float64"),
        (np.zeros((4, 2, 2), np.uint8), np.zeros(4, bool), "0, 1, 2, ...; .* bool"),
        (np.zeros((4, 2, 2), np.uint8), np.array(3), r"an image: 4; .* \(\)"),
        (np.zeros((4, 2, 2), np.uint8), np.eye(4, dtype=int), r"an image: 4; .* \(4, 4\)"),
        (np.zeros((4, 2, 2), np.uint8), np.array([0, 1, 2**31, 2]), r"has 2147483648 at \[2\]"),
        (np.zeros((4, 2, 2), np.uint8), np.array([0, 2**32, 1, 2]), r"has 4294967296 at \[1\]"),
        (np.zeros((4, 2, 2), np.uint8), np.full(4, 2**64 - 1, np.uint64), "184467440737095516"),
        (np.zeros((4, 2, 2), np.uint8), np.full(4, 10**9), "4 images .* more than 1000 classes"),
        (np.zeros((4, 2, 2), np.uint8), np.full(4, 1000), "the largest label is 1000"),
        (np.full((4, 2, 2), 2**40), np.zeros(4, int), "0 ... 255 .* 1099511627776"),
        (np.full((4, 2, 2), -np.inf), np.zeros(4, int), "0 ... 1 .* -inf"),
        (np.array([[{}]]), np.zeros(1, int), "must hold numbers, not object"),
        (np.zeros((4, 0, 2), np.uint8), np.zeros(4, int), r"\(4, 0, 2\)"),
    ],
)
def test_images_that_do_not_do(tmp_path, images, labels, message):
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=message):
        image_data(tmp_path / "a.npz", batch_size=2, validation=0.5)


def test_white_is_that_of_the_dtype(tmp_path):
    for dtype, white in {"u1": 255, "u2": 65535, "i8": 255, "?": 1, "f2": 1, "f8": 1}.items():
        images = np.array([0, white] * 4).astype(dtype)[:, None, None] * np.ones((2, 3), dtype)
        np.savez(tmp_path / "a.npz", images=images, labels=np.arange(8) % 2)
        data = image_data(tmp_path / "a.npz", batch_size=8, validation=0)
        found, labels = data.batch(0)
        assert data.white == white and found.dtype == np.float32
        np.testing.assert_array_equal(found[:, 0, 0, 0], labels)


def test_a_thousand_classes_need_no_image_each(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 2, 2), np.uint8), labels=[0, 999])
    assert image_data(tmp_path / "a.npz", batch_size=2, validation=0.5).classes == 1000


def test_only_the_arrays_that_are_needed_are_read(tmp_path, monkeypatch):
    """And the headers of all before the numbers of one."""
    path = image_file(tmp_path / "a.npz", unused=np.zeros(10**6, np.uint8))
    monkeypatch.setattr(_memory, "host_memory", lambda: 10**5)
    assert image_data(path, batch_size=4).classes == 3
    np.savez(tmp_path / "b.npz", images=np.zeros((10**5, 1, 1), np.uint8), labels=np.zeros(3, int))
    with pytest.raises(ValueError, match="labels must be one number an image"):
        image_data(tmp_path / "b.npz", batch_size=4)
    image_file(tmp_path / "c.npz", n=10**4)
    with pytest.raises(MemoryError, match="images in .*c.npz needs about"):
        image_data(tmp_path / "c.npz", batch_size=4)
    monkeypatch.undo()
    with pytest.raises(MemoryError, match="a batch needs about"):
        image_data(path, batch_size=10**9)


def test_damaged_archives_are_named(tmp_path):
    path = image_file(tmp_path / "a.npz")
    whole = path.read_bytes()
    for size in (0, 2, 100, len(whole) // 2, len(whole) - 1):
        for name in ("a.npz", "images"):  # told by its name, or by its first bytes
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"{name} is damaged|{name} must be a .npz"):
                image_data(tmp_path / name, labels=None, batch_size=4)
    draw = np.random.default_rng(0)
    path.write_bytes(whole)
    digest = image_data(path, batch_size=4).sha256
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[draw.integers(len(whole))] ^= 1 << draw.integers(8)
        path.write_bytes(flipped)
        try:
            assert image_data(path, batch_size=4).sha256 == digest
        except ValueError as error:
            assert "a.npz" in str(error)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        for name, array in {"images": np.zeros((4, 2, 2)), "labels": np.zeros(4, int)}.items():
            np.save(content := io.BytesIO(), array)
            archive.writestr(f"{name}.npy", content.getvalue())
    with pytest.raises(ValueError, match="a.npz is damaged: .* compressed as NumPy never does"):
        image_data(path, batch_size=4)


def test_image_files_and_options_that_do_not_do(tmp_path):
    path = image_file(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="nowhere.npz does not"):
        image_data(tmp_path / "nowhere.npz", batch_size=4)
    with pytest.raises(ValueError, match="leaves 20 to train on and 0"):
        image_data(path, batch_size=4, validation=0.01)
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\), got -0.1"):
        image_data(path, batch_size=4, validation=-0.1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        image_data(path, batch_size=0)
    with pytest.raises(ValueError, match="holds its own labels"):
        image_data(path, batch_size=4, labels=path)
    for step in (-1, 2**64):
        with pytest.raises(ValueError, match=f"step must lie in .* got {step}"):
            image_data(path, batch_size=4).batch(step)
    with pytest.raises(ValueError, match="validation must be a path that exists; 0.1 does not"):
        image_data(path, batch_size=4, validation="0.1")
    with pytest.raises(ValueError, match="source must be a regular file; /dev/zero is a device"):
        image_data("/dev/zero", batch_size=4)
    with pytest.raises(ValueError, match="the built-in images have labels"):
        image_data(labels=path, batch_size=4)
    np.savez(tmp_path / "b.npz", x_train=np.zeros(3), y_train=np.zeros(3), x_test=np.zeros(3))
    with pytest.raises(ValueError, match=r"\(and x_test with y_test\); it has"):
        image_data(tmp_path / "b.npz", batch_size=4)
    np.savez(tmp_path / "b.npz", pictures=np.zeros(3))
    with pytest.raises(ValueError, match=r"it has \['pictures'\]"):
        image_data(tmp_path / "b.npz", batch_size=4)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.npz is damaged"):
        image_data(path, batch_size=4)


# ------------------------------------------------------------------ idx


def idx(array, code):
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.tobytes()


@pytest.mark.parametrize(
    "code, dtype", [(8, ">u1"), (9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
def test_idx_files_are_read(tmp_path, code, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for name, content in {"a": idx(array, code), "b": gzip.compress(idx(array, code))}.items():
        (tmp_path / name).write_bytes(content)
        found = read_idx(tmp_path / name)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype.newbyteorder("=")


def mnist(folder, n=12, prefix="train"):
    images = np.arange(n * 20).reshape(n, 4, 5).astype(np.uint8)
    path = folder / f"{prefix}-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(images, 8)))
    labels = folder / f"{prefix}-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx((np.arange(n) % 10).astype(np.uint8), 8)))
    return path, labels


def test_images_in_idx_files_find_their_labels(tmp_path):
    path, labels = mnist(tmp_path)
    held, _ = mnist(tmp_path, n=5, prefix="t10k")
    data = image_data(path, batch_size=12, validation=held)
    assert data.shape == (4, 5, 1) and data.classes == 10
    assert len(data.validation_images) == 5
    images, ys = data.batch(0)
    first = np.rint(255 * images[:, 0, 0, 0]).astype(int)
    np.testing.assert_array_equal(first // 20, ys + np.where(first >= 200, 10, 0))
    elsewhere = labels.rename(tmp_path / "classes.gz")
    with pytest.raises(ValueError, match="labels must be a path that exists"):
        image_data(path, batch_size=4)
    assert image_data(path, labels=elsewhere, batch_size=4).classes == 10
    with pytest.raises(ValueError, match="labels must name the file"):
        image_data(path.rename(tmp_path / "pictures"), batch_size=4)


def test_damaged_idx_files_are_refused(tmp_path):
    path = tmp_path / "images"
    content = idx(np.zeros((2, 3, 4), np.uint8), 8)
    for damaged, message in {
        content[:-1]: r"is damaged: shape \(2, 3, 4\) of uint8 takes 40 bytes, it has 39",
        content + b"\0": "takes 40 bytes, it has 41",
        content[:9]: "is damaged",
        gzip.compress(content)[:-9]: "is damaged",
        b"\0\0\x07\3" + content[4:]: "must be a .npz or an idx file .* 00 00 07 03",
        b"PNG": "must be a .npz or an idx file",
        b"": "starts with nothing",
    }.items():
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_idx(path)


def test_a_gzipped_file_is_read_to_its_declared_length_alone(tmp_path, monkeypatch):
    path, labels = mnist(tmp_path)
    declared = idx(np.zeros((12, 4, 5), np.uint8), 8)
    path.write_bytes(gzip.compress(declared + bytes(2**25), compresslevel=1))
    read = gzip.GzipFile.read
    taken = []
    monkeypatch.setattr(gzip.GzipFile, "read", lambda f, n=-1: taken.append(n) or read(f, n))
    with pytest.raises(ValueError, match=r"\(12, 4, 5\) of uint8 takes 240 bytes, it has more"):
        image_data(path, batch_size=4)
    assert min(taken) >= 0 and sum(taken) < 1000
    for shape, error in {(2**31, 28, 28): ValueError, (12, 2**31, 2**31): MemoryError}.items():
        head = bytes([0, 0, 8, 3]) + np.array(shape, ">u4").tobytes()
        path.write_bytes(gzip.compress(head + bytes(99)))
        with pytest.raises(error, match=path.name):
            image_data(path, batch_size=4)
    path.write_bytes(gzip.compress(declared) + b"more")
    with pytest.raises(ValueError, match="is damaged"):
        image_data(path, batch_size=4)
    labels.unlink()
    os.mkfifo(labels)
    with pytest.raises(ValueError, match="labels must be a regular file; .* is a named pipe"):
        image_data(path, batch_size=4)


def test_missing_libraries_are_named(monkeypatch):
    for name in ("sklearn", "sklearn.datasets", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'scikit-learn: pip install "jaxflow\[train\]"'):
        image_data(batch_size=4)
    with pytest.raises(ImportError, match=r'tokenizers: pip install "jaxflow\[train\]"'):
        BPE(300).fit(["text"])


def test_padded_rows_hold_tokens_of_the_vocabulary():
    """Only their targets are left out: a model refuses a token of -1."""
    data = text_data(context=16, batch_size=7)
    batches = list(data.validation_batches())
    for inputs, _ in batches:
        assert inputs.min() >= 0
    assert (batches[-1][1] == -1).any()
