"""The rules on the arguments of a phase diagram."""

from typing import Any

import numpy as np
from jaxtyping import Float

from .._types import ArrayLike, ScalarLike


def whole(name: str, value: ScalarLike, least: int) -> int:
    number = float(value)
    if not (number.is_integer() and number >= least):
        raise ValueError(f"{name} must be a whole number from {least} on, got {value}.")
    return int(number)


def positive(name: str, value: ScalarLike) -> float:
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive, got {value}.")
    return float(value)


def checked_threshold(threshold: ScalarLike, eps: float = 0.0) -> float:
    """The threshold, which products that round by `eps` can tell from 1."""
    level = float(threshold)
    if not 0 < level < 1:
        raise ValueError(
            f"threshold must lie between 0 and 1, got {level}: tokens come ever nearer to an inner "
            "product of 1 and never reach it. 0.999 is the default."
        )
    if 1 - level < 100 * eps:
        raise ValueError(
            f"1 - threshold must be at least 100 roundings of {eps:.1e}, got {1 - level:.1e}. "
            'Use float64, jax.config.update("jax_enable_x64", True), or a lower threshold.'
        )
    return level


def numbers(name: str, values: ArrayLike) -> Float[np.ndarray, " values"]:
    axis = np.asarray(values, float)
    if axis.ndim != 1 or not axis.size or not np.isfinite(axis).all():
        raise ValueError(
            f"{name} must be finite numbers, at least one, of shape ({name},); got {short(axis)}."
        )
    return axis


def increasing_times(values: ArrayLike) -> Float[np.ndarray, " ts"]:
    ts = numbers("ts", values)
    if ts[0] < 0 or (np.diff(ts) <= 0).any():
        raise ValueError(f"ts must increase from 0 or later, got {short(ts)}. Sort them.")
    return ts


def short(value: Any) -> str:
    """A setting in a few words."""
    axis = np.asarray(value)
    if axis.ndim != 1 or axis.size < 4:
        return str(value)
    return f"{axis.size} values from {axis[0]} to {axis[-1]}"
