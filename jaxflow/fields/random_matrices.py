"""Laws of random query, key and value matrices, and their redrawing in depth.

    GaussianMatrices   Q, K of shape (rank, d), V of (d, d), entries independent, N(0, 1/d)
    GOEMatrices        V = (G + G^T)/sqrt(2), entries of G N(0, 1/d): eigenvalues in [-2, 2]
    SignedValue(B)     V = B or -B, each with probability 1/2

A law gives the three matrices of an attention for each key; `redrawn` draws them anew for each
layer. With them attention of random weights is a dynamical system in a random environment.
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import count, flag, function, prng_key, reals
from .._types import ArrayLike
from .base import AbstractField
from .curves import PiecewiseConstant, increasing
from .time import TimeDependent

Matrices = tuple[Array | None, Array | None, Array | None]


class AbstractMatrices(eqx.Module):
    """A law of (Q, K, V)."""

    @abc.abstractmethod
    def __call__(self, d: int, *, key: PRNGKeyArray) -> Matrices:
        """Q, K and V of one attention on tokens of dimension d; `None` is the identity."""


class GaussianMatrices(AbstractMatrices):
    """Q and K of shape `(rank, d)` with entries N(0, 1/d), and V.

    The scores <Q x, K y> of a token of length 1 have variance rank/d^2; beta is in front of them.

    **Arguments:** `rank`: of Q^T K, at most d; `None` is d. `value`: whether V, shape `(d, d)`, is
    drawn as well, with entries N(0, 1/d), or the identity.

    **Raises:** `ValueError` or `TypeError` for a rank that is no positive number or, when drawn,
    above d.

    ```python
    >>> law = jaxflow.fields.GaussianMatrices(rank=2)
    >>> query, key, value = law(5, key=jax.random.key(0))
    >>> query.shape, value
    ((2, 5), None)

    ```
    """

    rank: int | None = eqx.field(static=True, default=None)
    value: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        flag("value", self.value)
        if self.rank is not None:
            count("rank", self.rank)

    def __call__(self, d, *, key):
        rank = d if self.rank is None else self.rank
        if rank > d:
            raise ValueError(f"the rank of Q^T K is at most d = {d}, got rank={rank}.")
        keys = jax.random.split(prng_key(key), 3)
        query, key_, value = (
            jax.random.normal(k, (size, d)) / np.sqrt(d)
            for k, size in zip(keys, (rank, rank, d), strict=True)
        )
        return query, key_, value if self.value else None


class GOEMatrices(AbstractMatrices):
    """V from the Gaussian orthogonal ensemble, with eigenvalues that fill [-2, 2] for large d
    (Wigner's semicircle); Q = K = I.

    Off the diagonal the entries are N(0, 1/d), on it N(0, 2/d).

    **Raises:** when drawn, `ValueError` or `TypeError` for what is no dimension or no key.
    """

    def __call__(self, d, *, key):
        entries = jax.random.normal(prng_key(key), (count("d", d), d)) / np.sqrt(d)
        return None, None, (entries + entries.T) / np.sqrt(2)


class SignedValue(AbstractMatrices):
    """V = B or -B, each with probability 1/2; Q = K = I.

    Layer by layer, attraction and repulsion alternate at random; on average the field is 0.

    **Arguments:** `matrix`: B, shape `(d, d)`; `None` is the identity.

    **Raises:** `ValueError` or `TypeError` for what is no square matrix, and when drawn for tokens
    of another dimension.
    """

    matrix: Float[Array, "d d"] | None

    def __init__(self, matrix: ArrayLike | None = None):
        self.matrix = None if matrix is None else reals("matrix", matrix)
        if self.matrix is not None and (self.matrix.ndim != 2 or len(set(self.matrix.shape)) > 1):
            raise ValueError(f"B must be a matrix (d, d), got shape {self.matrix.shape}.")

    def __call__(self, d, *, key):
        matrix = jnp.eye(d) if self.matrix is None else self.matrix
        if len(matrix) != d:
            raise ValueError(f"B of shape {matrix.shape} acts on no tokens of dimension {d}.")
        return None, None, jax.random.rademacher(prng_key(key), (), matrix.dtype) * matrix


def redrawn(
    draw: Callable[[PRNGKeyArray], AbstractField], ts: ArrayLike, *, key: PRNGKeyArray
) -> TimeDependent:
    """A field drawn anew for each layer, t_l <= t < t_{l+1}.

    **Arguments:** `draw`: one key -> a field, all of one structure; `ts`: the L + 1 edges of the
    layers, increasing; `key`: PRNG key, of which each layer has its own.

    **Returns:** a `jaxflow.TimeDependent` of a `jaxflow.PiecewiseConstant`.

    **Raises:** `ValueError` or `TypeError` for times that do not increase, fewer than two, and
    fields that differ in structure.

    ```python
    >>> law = jaxflow.fields.GOEMatrices()
    >>> draw = lambda key: jaxflow.SelfAttention(*law(3, key=key), beta=4.0)
    >>> field = jaxflow.fields.redrawn(draw, jnp.linspace(0, 6, 13), key=jax.random.key(0))
    >>> field.at(0.2).value.shape, bool((field.at(0.2).value == field.at(0.7).value).any())
    ((3, 3), False)

    ```
    """
    edges = increasing(ts)
    if len(edges) < 2:
        raise ValueError(f"layers have two edges at least, got the times {edges}.")
    keys = jax.random.split(prng_key(key), len(edges) - 1)
    fields = [function("draw", draw)(k) for k in keys]
    return TimeDependent(PiecewiseConstant(fields, np.asarray(edges)))
