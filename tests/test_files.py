"""Files that a user names: what is read from them, and what is refused before it does harm."""

import inspect
import os
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from jaxflow import _files, _memory
from jaxflow._files import check_pixels, read_image, read_text

GREY = np.linspace(0, 1, 12).reshape(3, 4)


@pytest.fixture
def pictures():
    return pytest.importorskip("PIL.Image")


# ------------------------------------------------------------------ what has an end


def special(folder):
    """A path of each kind that is no file to read to its end, and what it is called."""
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("gone")
    return {
        folder / "pipe": "pipe is a named pipe",
        folder / "folder": "folder is a folder",
        folder / "loop": "loop.*symbolic links",
        folder / "dangling": "dangling does not",
        folder / "gone": "gone does not",
        "/dev/zero": "/dev/zero is a device",
        "": "'' does not",
        "a\0b": "null",
        "x" * 300: "too long",
    }


def test_what_has_no_end_is_named_and_not_opened(tmp_path):
    for path, message in special(tmp_path).items():
        for read in (read_text, read_image):
            with pytest.raises(ValueError, match=message):
                read(path)
    with pytest.raises(TypeError, match="the text must be a path, got a int"):
        inspect.unwrap(read_text)(5)


def test_a_socket_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind("socket")
        with pytest.raises(ValueError, match="socket is a socket"):
            read_text("socket")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="a.txt may not"):
        read_text(tmp_path / "a.txt")


# ------------------------------------------------------------------ text


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("naïve\r\n東京 🙂", "", "\ufeffsecond", "x" * 2**20 + "\ufeff"):
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert read_text(path) == content


def test_text_is_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve 東京".encode())
    code = "import sys; from jaxflow._files import read_text; print(ascii(read_text(sys.argv[1])))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "a.txt")],
        env=os.environ | plain,
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == ascii("naïve 東京")


@pytest.mark.parametrize("content", [b"\xff\xfea\0", b"caf\xe9", b"\xef\xbb", b"\xed\xa0\x80"])
def test_what_is_not_utf8_is_refused_with_its_byte(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    first = next(k for k, byte in enumerate(content) if byte > 127)
    with pytest.raises(ValueError, match=rf"a.txt is not UTF-8: .* at byte [{first}{first + 1}]\."):
        read_text(tmp_path / "a.txt")


def test_a_reader_stops_at_the_length_that_was_stated(tmp_path, monkeypatch):
    """Files of /proc state no length; so does one that another process is writing."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 10)
    for stated in (4, 11):
        shorter = os.stat_result([*path.stat()[:6], stated, *path.stat()[7:10]])
        monkeypatch.setattr(os, "fstat", lambda descriptor, found=shorter: found)
        with pytest.raises(ValueError, match=f"does not have the {stated} bytes"):
            read_text(path)


def test_sizes_are_compared_with_the_memory_before_reading(tmp_path, monkeypatch):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(10**13)  # takes no room on the disk
    with pytest.raises(MemoryError, match="a.txt needs about 80000.0 GB"):
        read_text(tmp_path / "a.txt")
    np.save(tmp_path / "a.npy", np.zeros((100, 100)))
    monkeypatch.setattr(_memory, "host_memory", lambda: 10**5)
    with pytest.raises(MemoryError, match="a.npy needs about"):
        read_image(tmp_path / "a.npy")


def test_the_free_memory_respects_the_limit_of_the_process(monkeypatch):
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc on this machine")
    limit = _memory._address_space() + 10**7
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    free = _memory.host_memory()
    assert free is not None and 0 <= free <= 10**7


# ------------------------------------------------------------------ pixels


@pytest.mark.parametrize(
    "dtype, white",
    [("?", 1), ("u1", 255), ("u2", 65535), (">u2", 65535), ("i8", 255), ("u4", 255)]
    + [("f2", 1), ("f4", 1), (">f8", 1)],
)
def test_white_is_that_of_the_dtype(tmp_path, dtype, white):
    levels = np.array([[0, 1], [white, 0]])
    np.save(tmp_path / "a.npy", levels.astype(dtype))
    found = read_image(tmp_path / "a.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, levels.astype(np.float32) / np.float32(white))


@pytest.mark.parametrize(
    "value, dtype, allowed",
    [(256, "i8", 255), (-1, "i2", 255), (2**40, "i8", 255), (2**63 + 1, "u8", 255)]
    + [(256, "u4", 255), (np.nan, "f4", 1), (np.inf, "f8", 1), (-np.inf, "f2", 1)]
    + [(-1e-9, "f8", 1), (1.25, "f4", 1), (255.0, "f8", 1)],
)
def test_a_pixel_out_of_its_range_is_named_and_never_clipped(tmp_path, value, dtype, allowed):
    pixels = np.zeros((3, 4, 3), dtype)
    pixels[1, 2, 0] = value
    np.save(tmp_path / "a.npy", pixels)
    message = rf"0 \.\.\. {allowed} .*a.npy has {str(pixels[1, 2, 0].item()).replace('+', '.')} at"
    with pytest.raises(ValueError, match=message + r" \[1, 2, 0\]"):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("dtype", ["c8", "U3", "M8[s]", "V4", "O"])
def test_what_is_no_number_is_no_pixel(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.zeros((2, 2), dtype))
    with pytest.raises(ValueError, match="a.npy must hold numbers"):
        read_image(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="pixels must be integers or floats"):
        _files.white(np.dtype(dtype))


@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 2, 2, 2)])
def test_an_image_has_two_or_three_axes(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"shape \(height, width\[, channels\]\); .*a.npy has"):
        read_image(tmp_path / "a.npy")


def test_the_first_number_outside_is_found():
    assert _files.first_outside(np.array([0, 3, 7]), 0, 7) is None
    assert _files.first_outside(np.array([], float), 0, 7) is None
    assert _files.first_outside(np.array([0, 8, -1]), 0, 7) == (8, "at [1]")
    check_pixels(np.ones((2, 2), bool), 1, "mask")


# ------------------------------------------------------------------ .npy


def test_the_order_and_the_version_of_a_npy_do_not_matter(tmp_path):
    with (tmp_path / "A.NPY").open("wb") as file:
        np.lib.format.write_array(file, np.asfortranarray(GREY), version=(2, 0))
    np.testing.assert_array_equal(read_image(tmp_path / "A.NPY"), GREY.astype(np.float32))


def header(shape, descr="<f8", version=b"\x01\x00"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


def test_damaged_npy_files_are_named(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, GREY)
    whole = path.read_bytes()
    cut = [whole[:k] for k in (0, 5, 7, 9, 60, len(whole) - 1)]
    lies = [header(s) + bytes(8) for s in ("(10**9,)", "(-1, -1)", "(True,)", "(2, ", "'x'")]
    lies += [header("(1000000, 1000000)") + bytes(8), header("(" * 3000), whole + b"x"]
    lies += [header("(1,)", version=b"\x03\x00"), b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(99)]
    for content in cut + lies:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.npy is damaged: "):
            read_image(path)


# ------------------------------------------------------------------ pictures


def test_pictures_of_any_depth_are_not_saturated(tmp_path, pictures):
    for name, top in {"8.png": 255, "16.png": 65535, "16.tif": 65535, "16.pgm": 65535}.items():
        levels = np.rint(top * GREY).astype(np.uint8 if top == 255 else np.uint16)
        pictures.fromarray(levels).save(tmp_path / name)
        expected = levels.astype(np.float32) / np.float32(top)
        np.testing.assert_array_equal(read_image(tmp_path / name), expected)
    pictures.fromarray(GREY.astype(np.float32)).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "float.tif"), GREY.astype(np.float32))
    pictures.fromarray(np.eye(3, dtype=bool)).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_image(tmp_path / "1.png"), np.eye(3, dtype=np.float32))
    for name, levels in {"32.tif": 70_000 * GREY, "-1.tif": GREY * 10 - 1}.items():
        pictures.fromarray(levels.astype(np.int32)).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"0 \.\.\. 255 \(int32\); .*{name} has"):
            read_image(tmp_path / name)
    for bad in (np.nan, 2.0):
        pictures.fromarray(np.full((2, 2), bad, np.float32)).save(tmp_path / "float.tif")
        with pytest.raises(ValueError, match=rf"0 \.\.\. 1 .* has {bad} at \[0, 0\]"):
            read_image(tmp_path / "float.tif")


def test_colours_palettes_and_transparency(tmp_path, pictures):
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[0], colours[1] = (255, 0, 51), (0, 102, 0)
    plain = pictures.fromarray(colours)
    for name, picture in {
        "rgb.png": plain,
        "palette.png": plain.convert("P", palette=pictures.Palette.ADAPTIVE),
        "cmyk.tif": plain.convert("CMYK"),
        "opaque.png": plain.convert("RGBA"),
    }.items():
        picture.save(tmp_path / name)
        np.testing.assert_allclose(read_image(tmp_path / name), colours / 255, atol=1e-6)
    # A transparent pixel shows the page, whatever colour hides in it.
    hidden = plain.convert("RGBA")
    hidden.putalpha(pictures.fromarray(np.array([[255] * 3, [0] * 3], np.uint8)))
    hidden.save(tmp_path / "hidden.png")
    expected = np.where(np.arange(2)[:, None, None] == 1, 1, colours / 255)
    np.testing.assert_allclose(read_image(tmp_path / "hidden.png"), expected, atol=1e-6)
    hidden.convert("LA").save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png")[1] == 1).all()


def test_damaged_pictures_are_named(tmp_path, pictures):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    for form in ("png", "jpg", "gif", "bmp", "tif", "webp"):
        path = tmp_path / f"a.{form}"
        pictures.fromarray(noise).save(path)
        whole = path.read_bytes()
        for content in (b"", whole[:9], whole[: len(whole) // 2]):
            path.write_bytes(content)
            with pytest.raises(
                ValueError, match=rf"a.{form} is (no picture|a picture that cannot)"
            ):
                read_image(path)
    path = tmp_path / "a.png"
    pictures.fromarray(noise).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.png .* checksum"):
        read_image(path)


def test_several_pictures_in_one_file_and_drawings_are_refused(tmp_path, pictures):
    frames = [pictures.fromarray(np.full((4, 4), v, np.uint8)) for v in (0, 99, 200)]
    for name in ("a.gif", "a.tif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match=f"{name} holds several pictures"):
            read_image(tmp_path / name)
    pictures.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match="a.eps is a drawing"):
        read_image(tmp_path / "a.eps")


@pytest.mark.parametrize("side", [12_000, 60_000, 2**31 - 1])
def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded(tmp_path, pictures, side):
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10**5))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + body)
    with pytest.raises(ValueError, match="bomb.png has too many pixels"):
        read_image(tmp_path / "bomb.png")


def test_without_pillow_the_way_to_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pillow: pip install "jaxflow\[viz\]"'):
        read_image(tmp_path / "a.png")
