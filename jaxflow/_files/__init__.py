"""Files that a user names, as text, arrays and pictures.

Whatever is read here is untrusted: a file may be damaged, of another kind than its name says,
without an end, or made to fill the memory. Sizes are taken from headers and compared with the
memory that is free, a reader stops at the length that was declared, and what cannot be used is an
error that names the file.
"""

from .arrays import Stored, idx, is_npz, npy, npz, npz_names
from .images import check_pixels, read_image, white
from .ranges import first_outside
from .text import decoded, file_status, read_text, regular

__all__ = [
    "Stored",
    "check_pixels",
    "decoded",
    "file_status",
    "first_outside",
    "idx",
    "is_npz",
    "npy",
    "npz",
    "npz_names",
    "read_image",
    "read_text",
    "regular",
    "white",
]
