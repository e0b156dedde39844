"""What the numbers and parts of a field must be.

Each rule returns the value that it holds of, or raises with the rule and the value received. A
traced number is not known yet and is trusted, unless it would be part of a field's structure.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._types import Scalar, is_concrete

anything: Callable[[Any], Any] = lambda number: True
positive: Callable[[Any], Any] = lambda number: number > 0
not_negative: Callable[[Any], Any] = lambda number: number >= 0


def real(
    name: str, value: Any, rule: str = "finite", holds: Callable[[Any], Any] = anything
) -> Scalar:
    """The value as a floating-point scalar, which is finite and of which `holds` is true.

    Its dtype is its own, never a weak one: a literal and an array then run the same program.

    **Raises:** `TypeError` for what is no real number, `ValueError` for arrays and where the rule
    does not hold.
    """
    check_real(name, value, rule, holds)
    dtype = _own_dtype(value)
    if not is_concrete(value):
        return jnp.asarray(value, dtype)
    with jax.ensure_compile_time_eval():  # What is known stays known while a jit is traced.
        return jnp.asarray(value if isinstance(value, jax.Array) else _rounded(value, dtype), dtype)


def check_real(
    name: str, value: Any, rule: str = "finite", holds: Callable[[Any], Any] = anything
) -> None:
    """The checks of `real`, which need no device: a module can make them while it loads."""
    if not is_real(value):
        raise TypeError(f"{name} must be a real number, got {value!r}.")
    if np.shape(value) != ():
        raise ValueError(
            f"{name} must be a scalar, got shape {np.shape(value)}; jax.vmap runs over many."
        )
    if is_concrete(value):
        number = _rounded(value, _own_dtype(value))
        if not (np.isfinite(number) and holds(number)):
            raise ValueError(f"{name} must be {rule}, got {value}.")


def _own_dtype(value: Any) -> Any:
    own = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)
    return value.dtype if own else jnp.result_type(float)


def constant(
    name: str, value: Any, rule: str = "finite", holds: Callable[[Any], Any] = anything
) -> float:
    """The same for a number of the structure of a field, which is no array."""
    if not is_concrete(value):
        raise TypeError(
            f"{name} is part of the structure of a field and cannot be traced: pass a number."
        )
    check_real(name, value, rule, holds)
    return float(value)


def count(name: str, value: Any, least: int = 1) -> int:
    """The value as an integer that is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if not least <= value < 2**31:
        rule = "below 2^31" if value >= least else f"at least {least}"
        raise ValueError(f"{name} must be {rule}, got {value}.")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """The value, which is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def array(name: str, value: Any) -> Array:
    """The value as an array, whose integers keep their values."""
    try:
        if isinstance(value, jax.Array):
            return value
        if isinstance(value, np.ndarray) and not _fits(value):
            raise OverflowError
        if isinstance(value, np.ndarray):
            with jax.ensure_compile_time_eval():
                return jnp.asarray(value)
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        held = jax.dtypes.canonicalize_dtype(int)
        raise TypeError(
            f"{name} must be an array of real numbers, integers within {held}; got {value!r}."
        ) from None


def reals(name: str, value: Any) -> Array:
    """The value as a floating-point array, whose entries are finite where they are known."""
    given = array(name, value)
    if not is_real(given):
        raise TypeError(f"{name} must hold real numbers, got {given.dtype}.")
    return finite(name, jnp.asarray(given, float))


def finite(name: str, values: Array) -> Array:
    """The array, whose entries are finite where they are known."""
    if is_concrete(values) and not np.isfinite(known := np.asarray(values)).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(known))[0])
        raise ValueError(f"{name} must be finite, got {known[where]} at index {where}.")
    return values


def known(values: Any) -> np.ndarray | None:
    """The array on the host; None where it is traced."""
    return np.asarray(values) if is_concrete(values) else None


def instance(name: str, value: Any, kind: type | tuple[type, ...], example: str) -> Any:
    """The value, which is an instance of `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be an instance such as {example}, got {value!r}.")
    return value


def path(name: str, value: Any) -> Path:
    """The value as a path."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, a string or a pathlib.Path, got {value!r}.")
    return Path(value)


def function(name: str, value: Any) -> Any:
    """The value, which can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function such as jax.nn.gelu, got {value!r}.")
    return value


def prng_key(value: Any) -> Any:
    """The value, which is a PRNG key."""
    try:
        jax.eval_shape(jax.random.split, value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(
            f"key must be one PRNG key such as jax.random.key(0), got {value!r}."
        ) from None
    return value


def floating(name: str, dtype: Any) -> np.dtype | None:
    """The dtype, which is None or a floating-point one."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(
            f"{name} must be a floating-point dtype such as jnp.bfloat16, or None; got {dtype!r}."
        )
    return found


def _rounded(value: Any, dtype: Any) -> np.ndarray:
    """The number as the dtype holds it."""
    try:
        with np.errstate(over="ignore"):
            return np.asarray(value, float).astype(dtype)
    except OverflowError:
        return np.asarray(np.inf)


def _fits(value: np.ndarray) -> bool:
    """Whether integers keep their values in the dtype that JAX gives them, often of 32 bits."""
    if value.dtype.kind not in "iu" or not value.size:
        return True
    held = jnp.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
    return bool(held.min <= value.min() and value.max() <= held.max)


def is_real(value: Any) -> bool:
    """Whether it is an integer or a floating-point number, or an array of such."""
    if (dtype := getattr(value, "dtype", None)) is None:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
