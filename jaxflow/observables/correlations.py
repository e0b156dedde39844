"""Correlations of two tokens.

    inner_products       <x_i, x_j>, the whole matrix
    pair_correlations    the density of <x_i, x_j> over pairs i != j, each of weight w_i w_j
    pair_distances       the density of |x_i - x_j|, likewise

The densities are histograms, streamed over pairs of tiles: where the boxes of two tiles put all
their pairs into one bin, they are counted unseen; elsewhere the pairs above each edge that the
boxes leave open are counted from the matrix of the two tiles.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._memory import check_fits
from .._rules import count, known, reals
from .._types import ArrayLike, accumulation_dtype
from ..measure import Measure, check_measure
from .base import one_by_one, or_nan, present
from .tiles import Tiles, split, squared_distances, squared_gap, squared_span

# Up to this many tokens every pair is counted; above, this many tokens meet all others.
EXACT, QUERIES = 32_768, 4_096


def inner_products(mu: Measure) -> Float[Array, "*batch n n"]:
    """The Gram matrix <x_i, x_j>.

    **Arguments:** `mu`: points `(*batch, n, d)`.

    **Returns:** the matrix, shape `(*batch, n, n)`.

    **Raises:** `TypeError` where mu is no measure; `MemoryError` where the matrix does not fit:
    `pair_correlations` does without it.

    ```python
    >>> mu = jaxflow.Measure([[1.0, 0.0], [0.0, 1.0]])
    >>> jaxflow.observables.inner_products(mu).tolist()
    [[1.0, 0.0], [0.0, 1.0]]

    ```
    """
    check_measure("mu", mu)
    check_fits(
        math.prod(mu.points.shape[:-1]) * mu.n * mu.points.dtype.itemsize,
        f"the matrix of inner products of {mu.n} tokens",
        "Take pair_correlations, their density, or fewer tokens.",
    )
    return jnp.einsum("...id,...jd->...ij", mu.points, mu.points, precision="highest")


def pair_correlations(
    mu: Measure, edges: ArrayLike, *, queries: int | None = None
) -> Float[Array, "*batch bins"]:
    """The density of <x_i, x_j> over pairs i != j, each of weight w_i w_j.

        p_b = sum_{i != j} w_i w_j 1[e_b <= <x_i, x_j> < e_{b+1}] / (e_{b+1} - e_b)
              / sum_{i != j} w_i w_j

    It integrates to the mass of pairs between the first edge and the last. The last bin is closed,
    and the outer edges take in what rounding has put beyond them (the product of two equal unit
    vectors). Tokens are counted exactly; sums over pairs round like sums of their number of tiles.

    **Arguments:**

    - `edges`: of the bins, ascending, shape `(bins + 1,)`.
    - `queries`: pairs of this many tokens with all others, tokens evenly spaced in the order of
      a k-d tree: an estimate with standard error at most sqrt(q (1 - q) / queries) for the mass q
      of a bin. `None` is all tokens for n <= 32,768, and 4,096 for more; pass n for the exact
      density of any measure.

    Time O(queries n (d + the edges that boxes leave open)), memory O(n d + bins); systems one
    after the other.

    **Returns:** the density in each bin, shape `(*batch, bins)`; nan where a token with mass is not
    finite.

    **Raises:** `ValueError` or `TypeError` for bad arguments, and for a single token.

    ```python
    >>> mu = jaxflow.measure.from_angles([0.0, 0.0, jnp.pi])  # one pair of three is together
    >>> density = jaxflow.observables.pair_correlations(mu, [-1.0, 0.0, 1.0])
    >>> [round(float(mass), 3) for mass in density]
    [0.667, 0.333]

    ```
    """
    return _pair_density(mu, edges, queries, PRODUCTS)


def pair_distances(
    mu: Measure, edges: ArrayLike, *, queries: int | None = None
) -> Float[Array, "*batch bins"]:
    """The density of |x_i - x_j| over pairs i != j, each of weight w_i w_j.

    Computed as `jaxflow.observables.pair_correlations` is.

    **Arguments:** `mu`, `queries`: as in `jaxflow.observables.pair_correlations`; `edges`: of the
    bins, ascending, shape `(bins + 1,)`, in the units of the points.

    **Returns:** the density in each bin, shape `(*batch, bins)`.

    **Raises:** `ValueError` or `TypeError` for bad arguments, and for a single token.

    ```python
    >>> mu = jaxflow.Measure([[0.0], [1.0], [5.0]])
    >>> density = jaxflow.observables.pair_distances(mu, [0.0, 2.0, 6.0])
    >>> [round(float(mass), 3) for mass in density]  # one pair of three within 2, two within 4 more
    [0.167, 0.167]

    ```
    """
    return _pair_density(mu, edges, queries, DISTANCES)


class _Pairing(NamedTuple):
    """values(x, y): a number for each pair; bounds(boxes): between which they lie."""

    values: Callable
    bounds: Callable


def _products(x, y):
    return jnp.matmul(x, y.T, precision="highest")


def _product_bounds(low_a, high_a, low_b, high_b):
    corners = jnp.stack([low_a * low_b, low_a * high_b, high_a * low_b, high_a * high_b])
    return corners.min(axis=0).sum(), corners.max(axis=0).sum()


def _distance_bounds(*boxes):
    return jnp.sqrt(squared_gap(*boxes)), jnp.sqrt(squared_span(*boxes))


PRODUCTS = _Pairing(_products, _product_bounds)
DISTANCES = _Pairing(lambda x, y: jnp.sqrt(squared_distances(x, y)), _distance_bounds)


def _pair_density(mu, edges, queries, pairing):
    check_measure("mu", mu)
    if queries is not None:
        queries = count("queries", queries)
    edges = reals("edges", edges).astype(accumulation_dtype(mu.points.dtype))
    if edges.ndim != 1 or len(edges) < 2:
        raise ValueError(f"edges must have shape (bins + 1,) with a bin, got {edges.shape}.")
    ends = known(edges)
    if ends is not None and not (np.diff(ends) > 0).all():
        raise ValueError(f"edges must ascend, got {ends}.")
    if mu.n < 2:
        raise ValueError("a density over pairs needs at least two tokens, got one.")
    if queries is None:
        queries = mu.n if mu.n <= EXACT else QUERIES
    mu, edges = jax.lax.stop_gradient((mu, edges))
    return _density(mu, edges, max(1, mu.n // queries), pairing)


@partial(jax.jit, static_argnums=(2, 3))
def _density(mu: Measure, edges: Array, stride: int, pairing: _Pairing) -> Array:
    def one(x, logs, edges):
        x = x.astype(edges.dtype)
        tiles = split(x, present(x, logs))
        # Equal weights become 1: counts within tiles are then exact.
        weights = jnp.append(jnp.exp(logs - logs.max()), 0)[tiles.tokens]
        counts = _histogram(tiles, weights, edges, stride, pairing)
        own = weights[:, ::stride]
        pairs = own.sum() * weights.sum() - (own**2).sum()
        return counts / pairs / jnp.diff(edges)

    return or_nan(one_by_one(one, mu, edges), mu)


def _histogram(tiles: Tiles, weights, edges, stride, pairing: _Pairing):
    """sum of w_i w_j over pairs i != j in each bin, for every `stride`-th token i of a tile."""
    count = len(tiles.low)
    scale = jnp.maximum(jnp.abs(tiles.low).max(), jnp.abs(tiles.high).max())
    eps = jnp.finfo(edges.dtype).eps
    slack = 8 * (tiles.low.shape[1] + 8) * eps * jnp.maximum(scale, scale**2)
    outer = 8 * eps * jnp.abs(edges).max()
    above = edges.at[0].add(-outer).at[-1].add(outer)

    def pair(a, b):
        x, w = tiles.points[a, ::stride], weights[a, ::stride]
        low, high = pairing.bounds(tiles.low[a], tiles.high[a], tiles.low[b], tiles.high[b])
        first, last = (above <= low - slack).sum(), (above <= high + slack).sum()
        itself = jnp.where(a == b, (w**2).sum(), 0)
        full = jnp.where(jnp.arange(len(above)) < first, w.sum() * weights[b].sum() - itself, 0)

        def look(full):
            values = pairing.values(x, tiles.points[b])
            same = tiles.tokens[a, ::stride][:, None] == tiles.tokens[b][None, :]
            values = jnp.where(same, -jnp.inf, values)

            def count_above(k, totals):
                columns = jnp.where(values >= above[k], w[:, None], 0).sum(axis=0)
                return totals.at[k].set((columns * weights[b]).sum())

            return jax.lax.fori_loop(first, last, count_above, full)

        totals = jax.lax.cond(first < last, look, lambda full: full, full)
        return totals[:-1] - totals[1:]

    def row(a, total):
        # All pairs of tiles with all tokens as queries: one of (a, b) and (b, a) stands for both.
        start = jnp.where(stride == 1, a, 0)
        factor = 2 if stride == 1 else 1
        own = jnp.zeros_like(total)
        add = lambda b, own: own + jnp.where(a == b, 1, factor).astype(own.dtype) * pair(a, b)
        return total + jax.lax.fori_loop(start, count, add, own)

    return jax.lax.fori_loop(0, count, row, jnp.zeros(len(edges) - 1, edges.dtype))
