"""Pixels as numbers in [0, 1], where 1 is the white of their dtype.

    bool: 1    floats: 1    uint8: 255    uint16: 65535    other integers: 255

Other integers do not tell what white is, so values over 255 in them are refused: nothing is clipped
and nothing is guessed from the values.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from .._memory import check_fits
from .arrays import npy
from .ranges import first_outside
from .text import regular


def white(dtype: np.dtype) -> int:
    """The pixel value that is white; ValueError for a dtype that is not one of numbers."""
    if dtype.kind not in "biuf":
        raise ValueError(f"pixels must be integers or floats, got {dtype}.")
    if dtype.kind in "bf":
        return 1
    return 65535 if dtype.kind == "u" and dtype.itemsize == 2 else 255


def check_pixels(pixels: np.ndarray, white: int, name: str):
    """Refuses pixels that do not lie in 0 ... white, with the first that does not: ValueError."""
    if (found := first_outside(pixels, 0, white)) is None:
        return
    value, place = found
    raise ValueError(
        f"pixels must lie in 0 ... {white} ({pixels.dtype}); {name} has {value} {place}. "
        + (
            "Rescale them to 0 ... 1"
            if white == 1
            else "Save them as uint8, uint16, or floats 0 ... 1"
        )
        + ", and leave out what is not finite."
    )


def read_image(
    path: str | Path, what: str = "the image"
) -> Float32[np.ndarray, "height width"] | Float32[np.ndarray, "height width channels"]:
    """An image as numbers in [0, 1].

    Grey pictures have shape `(height, width)`, all others are red, green and blue; transparent
    pixels show a white page.

    **Arguments:**

    - `path`: a picture that Pillow reads, or a .npy file with an array of shape `(height, width)`
      or `(height, width, channels)`. White is 255 in 8 bits, 65535 in 16, and 1 in floats.
    - `what`: names the argument in an error.

    **Raises:** ValueError if the file does not exist, is damaged, is animated, or has pixels that
    are not in the range of their dtype, NaN included; MemoryError if it does not fit the memory,
    found before it is decoded; ImportError without Pillow.
    """
    file = regular(path, what)
    if file.suffix.lower() == ".npy":
        stored = npy(file)
        if len(stored.shape) not in (2, 3) or 0 in stored.shape:
            raise ValueError(
                f"an image has shape (height, width[, channels]); {path} has {stored.shape}."
            )
        # In float32, and twice while they are scaled.
        size = max(stored.dtype.itemsize, 8) * (stored.nbytes // stored.dtype.itemsize)
        check_fits(2 * size, f"the image {path}", "Take a part of it.", host=True)
        pixels, top = stored.read(), white(stored.dtype)
    else:
        pixels, top = _picture(file)
    check_pixels(pixels, top, str(path))
    return pixels.astype(np.float32) / np.float32(top)


def _picture(path: Path) -> tuple[np.ndarray, int]:
    """The pixels of a picture, and white."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('images need pillow: pip install "jaxflow[viz]".') from error
    with _readable(path, Image), Image.open(path) as picture:
        form, (width, height) = picture.format, picture.size
        if form != "EPS":  # which would start another program
            picture.verify()  # checksums, where the format has them
    if form == "EPS":
        raise ValueError(f"{path} is a drawing, not a picture: save it as PNG.")
    check_fits(40 * width * height, f"the image {path}", "Scale it down.", host=True)
    with _readable(path, Image), Image.open(path) as picture:
        moving = form != "MPO" and getattr(picture, "is_animated", False)
        if not moving:
            return _pixels(picture, Image)
    raise ValueError(f"{path} holds several pictures: save one of them as PNG.")


@contextlib.contextmanager
def _readable(path: Path, pillow: Any) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            yield
    except (pillow.DecompressionBombWarning, pillow.DecompressionBombError) as error:
        raise ValueError(
            f"{path} has too many pixels to be decoded safely: {error} Scale it down."
        ) from error
    except pillow.UnidentifiedImageError as error:
        raise ValueError(
            f"{path} is no picture that Pillow knows, or its start is damaged: save it as PNG."
        ) from error
    except MemoryError:
        raise
    # Decoders of damaged files raise whatever their arithmetic comes to.
    except Exception as error:
        raise ValueError(
            f"{path} is a picture that cannot be decoded; it may be damaged: {error or type(error)}"
            ". Get it again, or save it as PNG."
        ) from error


def _pixels(picture: Any, pillow: Any) -> tuple[np.ndarray, int]:
    mode, grey = picture.mode, picture.mode in ("1", "L", "LA", "La")
    if picture.has_transparency_data:
        page = pillow.new("RGBA", picture.size, "white")
        page.alpha_composite(picture.convert("RGBA"))
        picture = page
    elif mode.startswith("I;16"):
        return np.asarray(picture), 65535
    elif mode in ("I", "F"):
        # Pillow opens 16 bits of these two formats as 32.
        wide = mode == "I" and picture.format in ("PNG", "PPM")
        pixels = np.asarray(picture)
        return pixels, 65535 if wide else white(pixels.dtype)
    return np.asarray(picture.convert("L" if grey else "RGB")), 255
