"""Rules on what a caller passes, checked on the host: none of them compiles a program.

An error says what must hold, what came instead, and what to do. A value that is traced passes where
the rule is on its number, and is held to its shape and kind alone.
"""

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._types import is_concrete


def check_count(name: str, value: Any, least: int = 1, remedy: str = "") -> int:
    """A whole number from `least` on, as an int."""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        text = f"{name} must be a whole number, got {_shown(value)}. {remedy}"
        raise TypeError(text.rstrip()) from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}. {remedy}".rstrip())
    return count


def check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    """A number for which `holds` is true, which `rule` says in words.

    It must hold in the precision that JAX computes in: 1e300 is not finite in float32.
    """
    kind = getattr(value, "dtype", None)
    array = np.asarray(value) if kind is None else value
    if np.shape(array) != () or not is_real(array.dtype):
        raise TypeError(f"{name} must be one number, {rule}; got {_shown(value)}.")
    if not is_concrete(array):
        return
    with np.errstate(over="ignore"):
        held = holds(float(np.asarray(array).astype(jax.dtypes.canonicalize_dtype(float))))
    if not held:
        raise ValueError(f"{name} must be {rule}, got {value}.")


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], remedy: str) -> None:
    """An instance of a class."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        raise TypeError(f"{name} must be a {names}, got {_shown(value)}. {remedy}")


def check_key(key: Any) -> None:
    """One PRNG key, new or of the old kind (two numbers of uint32)."""
    dtype, shape = getattr(key, "dtype", None), np.shape(key) if key is not None else None
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    old = dtype == np.uint32 and len(shape or ()) == 1
    if not old and not (typed and shape == ()):
        raise TypeError(
            f"key must be one PRNG key, such as jax.random.key(0); got {_shown(key)}. Draw several "
            "with jax.vmap over jax.random.split(key, ...)."
        )


def real_array(name: str, value: Any, rule: str) -> Array:
    """An array of real numbers in its own dtype, from an array or nested sequences."""
    if not isinstance(value, jax.Array | np.ndarray):
        # Rows of unequal lengths, or traced numbers within a list, which jnp takes as they are.
        with contextlib.suppress(ValueError, jax.errors.TracerArrayConversionError):
            value = np.asarray(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype.itemsize > 4:
        value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
    dtype = getattr(value, "dtype", None)
    if isinstance(value, list | tuple) and not is_concrete(*jax.tree.leaves(value)):
        return jnp.asarray(value)
    if dtype is None or not (is_real(dtype) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"{name} must be {rule}, got {_shown(value)}.")
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        info = jnp.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
        if value.size and not (info.min <= value.min() and value.max() <= info.max):
            raise ValueError(
                f"{name} must fit {info.dtype}, got {value.min()} to {value.max()}. Integers of 64 "
                'bits need jax.config.update("jax_enable_x64", True).'
            )
    return jnp.asarray(value)


def known(value: Any) -> np.ndarray | None:
    """The value on the host; None where it is traced."""
    return np.asarray(value) if is_concrete(value) else None


def is_real(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer))


def _shown(value: Any) -> str:
    """A value in an error: an array by its dtype and shape, others as they are written, cut off."""
    if hasattr(value, "dtype") and np.shape(value) != ():
        return f"an array of {value.dtype} with shape {np.shape(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
