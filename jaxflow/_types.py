"""Shape letters, fixed once.

    n  tokens (particles) of a measure       m  query points
    d  dimension of a token                  p  dimension of a query or key
    r  dimension of a value                  t  saved times

Leading axes written `*batch` are batch axes.
"""

from typing import TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, Float

Points = Float[Array, "*batch n d"]
LogWeights = Float[Array, "*batch n"]
Queries = Float[Array, "m p"]
Keys = Float[Array, "n p"]
Values = Float[Array, "n r"]
Scalar = Float[Array, ""]

# What a caller may pass where an array or a number is meant.
ArrayLike = jax.Array | np.ndarray | list | tuple
Tree = TypeVar("Tree")
ScalarLike = float | int | jax.Array | np.ndarray | np.floating | np.integer


def accumulation_dtype(dtype) -> np.dtype:
    """Sums of float16 and bfloat16 numbers are kept in float32, others in their own dtype."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def is_concrete(*values) -> bool:
    """Whether the numbers are known, so that a rule on them can be checked outside jit."""
    return not any(isinstance(v, jax.core.Tracer) for v in values)


def on_automatic_mesh(a: Array) -> Array:
    """The array on the same devices, its sharding no part of its type.

    `jax.make_mesh` makes axes explicit unless told otherwise: each operation must then name the
    sharding of its result, which those inside a solver do not.
    """
    sharding = getattr(a, "sharding", None)
    if not is_concrete(a) or not isinstance(sharding, NamedSharding):
        return a
    mesh = sharding.mesh
    if AxisType.Explicit not in mesh.axis_types or not isinstance(mesh, Mesh):
        return a
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return jax.device_put(
        a, NamedSharding(Mesh(mesh.devices, mesh.axis_names, axis_types=kinds), sharding.spec)
    )


def error_where(wrong: Array, tree: Tree, message: str) -> Tree:
    """The tree, each number of which is a run-time error where something is wrong.

    `equinox.error_if` on the arrays themselves would pass them through the branches of its
    callback, which XLA gathers onto one device where they are divided among several. So it has a
    scalar, on which all of them depend: a program that uses one alone keeps the check.
    """
    zero = eqx.error_if(jnp.zeros(()), wrong, message)  # NaN where the user turns errors to NaN

    def keep(a):
        if not isinstance(a, jax.Array) or jnp.issubdtype(a.dtype, jax.dtypes.extended):
            return a
        nothing = jnp.nan if eqx.is_inexact_array(a) else 0
        return jnp.where(zero == 0, a, jnp.full_like(a, nothing))

    return jax.tree_util.tree_map(keep, tree)
