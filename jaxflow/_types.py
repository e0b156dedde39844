"""Shape letters, fixed once.

    n  tokens (particles) of a measure       m  query points
    d  dimension of a token                  p  dimension of a query or key
    r  dimension of a value                  t  saved times

Leading axes written `*batch` are batch axes.
"""

import jax
import jax.core
import numpy as np
from jaxtyping import Array, Float

Points = Float[Array, "*batch n d"]
LogWeights = Float[Array, "*batch n"]
Queries = Float[Array, "m p"]
Keys = Float[Array, "n p"]
Values = Float[Array, "n r"]
Scalar = Float[Array, ""]

# What a caller may pass where an array or a number is meant.
ArrayLike = jax.Array | np.ndarray | list | tuple
ScalarLike = float | int | jax.Array | np.ndarray | np.floating | np.integer


def accumulation_dtype(dtype) -> np.dtype:
    """Sums of float16 and bfloat16 numbers are kept in float32, others in their own dtype."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def is_concrete(*values) -> bool:
    """Whether the numbers are known, so that a rule on them can be checked outside jit."""
    return not any(isinstance(v, jax.core.Tracer) for v in values)
