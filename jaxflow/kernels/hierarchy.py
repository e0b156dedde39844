"""The groups of keys of a hierarchical mask.

A group of 2^(l + 1) keys is made of two of 2^l, with the log-masses b and b':

    log-mass  logaddexp(b, b'),    mean key  p k + (1 - p) k',    p = e^b / (e^b + e^b')

and the mean value likewise. A group without mass has the log-mass -inf.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import finite, pad

Groups = tuple[Float[Array, "groups p"], Float[Array, "groups r"], Float[Array, " groups"]]


def groups(
    k: Float[Array, "n p"], v: Float[Array, "n r"], b: Float[Array, " n"], levels: int
) -> Groups:
    """Keys, values and log-masses of the groups of 1, 2, ..., 2^(levels - 1), one list."""
    of_level = [(k.astype(b.dtype), v.astype(b.dtype), b)]
    for _ in range(levels - 1):
        of_level.append(_paired(*of_level[-1]))
    keys, values, masses = (jnp.concatenate(parts) for parts in zip(*of_level, strict=True))
    return keys.astype(k.dtype), values.astype(v.dtype), masses


def _paired(k, v, b) -> Groups:
    even = len(b) + len(b) % 2
    b = pad(b, even, -jnp.inf, axis=0).reshape(-1, 2)
    top = jax.lax.stop_gradient(finite(b.max(axis=1)))
    w = jnp.exp(b - top[:, None])
    total = w.sum(axis=1)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    w = w / total[:, None]
    mean = lambda a: (w[:, :, None] * pad(a, even, axis=0).reshape(-1, 2, a.shape[1])).sum(axis=1)
    return mean(k), mean(v), jnp.where(empty, -jnp.inf, jnp.log(total) + top)
