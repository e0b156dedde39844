"""Parameters from a network of time: theta(t) = theta + A h(t)."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import constant, count, positive, prng_key
from .base import AbstractField, is_field
from .curves import AbstractCurve, as_time, fixed


class HyperNetwork(AbstractCurve):
    """theta(t) = theta + A h(t), h a perceptron of a sinusoidal embedding of t.

    The weights of each block come from one network of time, as in the neural ODE transformers of
    Tong et al. (ICLR 2025). There A has a row for each entry of theta. With `rank` a matrix moves
    by U diag(A h(t)) V^T instead, and the number of parameters does not grow with the embedding
    times the square of the dimension.

    **Arguments:**

    - `field`: theta, the field at the start of training (A = 0).
    - `width`, `depth`: of the perceptron, `depth` hidden layers; `width` is the length of h.
    - `embedding`: the number of sinusoids, frequencies 1 to 1000 spaced evenly in logarithm.
    - `t1`: the time that counts as 1 in the embedding, positive.
    - `rank`: of the moving part of a matrix; `None` moves every entry on its own.
    - `key`: PRNG key.

    **Raises:** `ValueError` for numbers out of their range, and for a field without arrays, or one
    whose geometry holds arrays; `TypeError` for what is of another kind than these.
    """

    base: AbstractField
    network: eqx.nn.MLP
    heads: tuple
    embedding: int = eqx.field(static=True)
    t1: float = eqx.field(static=True)

    def __init__(
        self,
        field: AbstractField,
        *,
        width: int = 64,
        depth: int = 1,
        embedding: int = 32,
        t1: float = 1.0,
        rank: int | None = None,
        key: PRNGKeyArray,
    ):
        width, depth = count("width", width), count("depth", depth, 0)
        if count("embedding", embedding, 0) < 2 or embedding % 2:
            raise ValueError(f"embedding must be even and at least 2, got {embedding}.")
        if rank is not None and count("rank", rank, 0) < 1:
            raise ValueError(f"rank must be at least 1 or None, got {rank}.")
        leaves = jtu.tree_leaves(eqx.filter(fixed(is_field(field)), eqx.is_inexact_array))
        if not leaves:
            raise ValueError(f"{type(field).__name__} holds no array to move in time.")
        network_key, *keys = jax.random.split(prng_key(key), len(leaves) + 1)
        self.base = field
        self.network = eqx.nn.MLP(
            embedding, width, width, depth, jax.nn.silu, jax.nn.silu, key=network_key
        )
        self.heads = tuple(
            _Full(a, width) if rank is None or a.ndim < 2 else _LowRank(a, width, rank, key=k)
            for a, k in zip(leaves, keys, strict=True)
        )
        self.embedding = embedding
        self.t1 = constant("t1", t1, "positive and finite", positive)

    @property
    def breakpoints(self):
        return ()

    def at(self, t):
        dtype = self.network.layers[0].weight.dtype
        time = (as_time(t) / self.t1).astype(dtype)
        angles = jnp.logspace(0, 3, self.embedding // 2, dtype=dtype) * time
        arrays, rest = eqx.partition(self.base, eqx.is_inexact_array)
        leaves, structure = jtu.tree_flatten(arrays)
        with jax.default_matmul_precision("highest"):
            hidden = self.network(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]))
            moved = [
                a + head(hidden).reshape(a.shape).astype(a.dtype)
                for a, head in zip(leaves, self.heads, strict=True)
            ]
        return eqx.combine(jtu.tree_unflatten(structure, moved), rest)


class _Full(eqx.Module):
    """A h."""

    matrix: Float[Array, "size width"]

    def __init__(self, like: Array, width: int):
        self.matrix = jnp.zeros((like.size, width))

    def __call__(self, hidden):
        return self.matrix @ hidden


class _LowRank(eqx.Module):
    """U diag(A h) V^T, of an array taken as a matrix with its last axis as columns."""

    matrix: Float[Array, "rank width"]
    left: Float[Array, "rows rank"]
    right: Float[Array, "columns rank"]

    def __init__(self, like: Array, width: int, rank: int, *, key: PRNGKeyArray):
        left, right = jax.random.split(key)
        rows, columns = like.size // like.shape[-1], like.shape[-1]
        self.matrix = jnp.zeros((rank, width))
        self.left = jax.random.normal(left, (rows, rank)) / math.sqrt(rank)
        self.right = jax.random.normal(right, (columns, rank)) / math.sqrt(columns)

    def __call__(self, hidden):
        return (self.left * (self.matrix @ hidden)[None]) @ self.right.T
