"""Batches of text and images: what they hold, and that batch k depends on (seed, k) alone."""

import functools
import gzip
import itertools
import json
import sys

import numpy as np
import pytest

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
    with pytest.raises(ValueError, match="size must be >= 256, got 255"):
        BPE(255)


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match="one of .*'bytes'.*got .*words"):
        tokenizer_from_dict({"type": "words"})


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
    with pytest.raises(ValueError, match="step must lie in .* got -1"):
        text(prose).batch(-1)


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
    ],
)
def test_images_that_do_not_do(tmp_path, images, labels, message):
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=message):
        image_data(tmp_path / "a.npz", batch_size=2, validation=0.5)


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


def test_missing_libraries_are_named(monkeypatch):
    for name in ("sklearn", "sklearn.datasets", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'scikit-learn: pip install "jaxflow\[train\]"'):
        image_data(batch_size=4)
    with pytest.raises(ImportError, match=r'tokenizers: pip install "jaxflow\[train\]"'):
        BPE(300).fit(["text"])
