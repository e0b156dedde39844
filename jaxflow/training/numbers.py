"""The numbers that a user passes, checked before any work."""

import operator
from typing import Any


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A number without a fraction, of Python or NumPy, as Python's.

    **Raises:** TypeError if it is none, such as a float, True or text; ValueError if it is less
    than `least` or more than `most`.
    """
    number = _integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}.")
    return number


def word(name: str, value: Any) -> int:
    """A number that keys random bits: TypeError or ValueError if it is not in 0 ... 2^64 - 1."""
    number = _integer(name, value)
    if not 0 <= number < 2**64:
        raise ValueError(f"{name} must lie in 0 ... 2^64 - 1, got {number}.")
    return number


def fraction(name: str, value: Any) -> float:
    """A number in [0, 1): ValueError for another one, TypeError for True, text and the like."""
    try:
        number = None if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise TypeError(f"{name} must be a fraction in [0, 1), got {value!r}.")
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be a fraction in [0, 1), got {value}.")
    return number


def _integer(name: str, value: Any) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    return number
