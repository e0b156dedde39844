"""The arrays of a tree by name, on the host and back where they were."""

import hashlib
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array


def is_stored(leaf: Any) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def named(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their names in it, such as ".params.field[0]"."""
    leaves = jtu.tree_leaves_with_path(tree)
    return {jtu.keystr(path): leaf for path, leaf in leaves if is_stored(leaf)}


def top(name: str) -> str:
    """The first key of a name."""
    return re.match(r"\W*\w*", name).group()  # pyright: ignore[reportOptionalMemberAccess]


def to_host(leaf: Any) -> np.ndarray:
    """An array, or the data of a PRNG key, in NumPy."""
    # A copy: the next step may write to the memory of the array.
    return np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def blank(leaf: Any) -> np.ndarray:
    """Zeros of the shape and dtype of `to_host`, for which no device is asked."""
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return np.zeros(data.shape, data.dtype)


def from_host(stored: np.ndarray, leaf: Any) -> Any:
    """What was stored as an array like `leaf`, on its devices.

    **Raises:** ValueError if JAX cannot hold the dtype.
    """
    if isinstance(leaf, np.ndarray):
        return stored
    if isinstance(leaf, np.generic):
        return stored[()]
    array = jnp.array(stored)
    if array.dtype != stored.dtype:
        raise ValueError(
            f"an array of {stored.dtype} was asked for, and JAX made it {array.dtype}: set "
            "jax_enable_x64, as when it was saved."
        )
    if _is_key(leaf):
        array = jax.random.wrap_key_data(array, impl=_key_impl(leaf))
    placed = isinstance(leaf, jax.Array) and leaf.committed
    return put(array, leaf.sharding) if placed else array


def put(array: Any, sharding: Sharding) -> Array:
    """An array, which is the same in each process, on devices of all processes."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and _is_key(array):
        data = put(to_host(array), sharding)
        return jax.random.wrap_key_data(data, impl=_key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def layout(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of an array as it is stored, and the generator of a PRNG key."""
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    found = {"dtype": str(data.dtype), "shape": list(data.shape)}
    return found | ({"key": str(_key_impl(leaf))} if _is_key(leaf) else {})


def digest(array: np.ndarray) -> str:
    """The sha256 of the bytes of an array."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """The generator of PRNG keys; by a trace, which knows that of a ShapeDtypeStruct too."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]
