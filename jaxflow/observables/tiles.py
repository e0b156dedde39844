"""Tokens in tiles: work on all pairs that skips the pairs of tiles whose boxes settle it.

A balanced kd-split cuts n tokens into 2^k tiles of equal size, each with the box that bounds it.
Distances and inner products between two tiles lie between bounds that follow from the boxes, so
that a search over n^2 pairs becomes one over (n / size)^2 boxes and the few products that remain.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# 256 x 256 products stay in a core's cache; beyond 1024 tiles, the pairs of boxes would cost more
# than the products.
SIZE, MOST = 256, 1024


class Tiles(NamedTuple):
    """T tiles of s tokens.

    - `points`: shape `(T, s, d)`; nan where there is no token, which no comparison holds for.
    - `tokens`: the index of each token, `(T, s)`; n where there is none.
    - `low`, `high`: the corners of the boxes, `(T, d)`.
    """

    points: Float[Array, "T s d"]
    tokens: Int[Array, "T s"]
    low: Float[Array, "T d"]
    high: Float[Array, "T d"]


def split(x: Float[Array, "n d"], there: Bool[Array, " n"]) -> Tiles:
    """The tiles of the tokens that are `there`; O(n log n) time and O(n d) memory.

    Neighbours in the order of tiles are neighbours in space: at each of log2(T) levels, every
    group is halved at the median of its widest coordinate.
    """
    n, d = x.shape
    levels = min(max(0, math.ceil(math.log2(n / SIZE))), round(math.log2(MOST)))
    count = 2**levels
    size = -(-n // count)
    padded = jnp.pad(there, (0, count * size - n))
    # What is not there sits on a token that is, and so does not widen a box.
    anchor = jnp.where(there.any(), x[jnp.argmax(there)], jnp.zeros(d, x.dtype))
    y = jnp.where(padded[:, None], jnp.pad(x, ((0, count * size - n), (0, 0))), anchor[None])
    places = jnp.arange(count * size)

    def halve(level, order):
        group = places // (len(places) >> level)
        sorted_y = y[order]
        over = {"num_segments": count, "indices_are_sorted": True}
        high = jax.ops.segment_max(sorted_y, group, **over)
        extent = high - jax.ops.segment_min(sorted_y, group, **over)
        widest = jnp.argmax(extent, axis=1)[group]
        coordinate = jnp.take_along_axis(sorted_y, widest[:, None], axis=1)[:, 0]
        return jax.lax.sort((group, coordinate, order), num_keys=2)[2]

    order = jax.lax.fori_loop(0, levels, halve, places)
    y, padded = y[order].reshape(count, size, d), padded[order].reshape(count, size)
    return Tiles(
        points=jnp.where(padded[..., None], y, jnp.nan),
        tokens=jnp.where(padded, order.reshape(count, size), n),
        low=y.min(axis=1),
        high=y.max(axis=1),
    )


def over_pairs(fn, tiles: Tiles) -> Array:
    """fn(low_a, high_a, low_b, high_b) of the boxes a and b = a + o (mod T), at [o, a].

    Rows are offsets o, so that the first pairs are a tile with itself, then with its neighbour.
    """
    first = jnp.arange(len(tiles.low))

    def row(offset):
        second = (first + offset) % len(first)
        return fn(tiles.low, tiles.high, tiles.low[second], tiles.high[second])

    return jax.lax.map(row, first)


def squared_gap(low_a, high_a, low_b, high_b):
    """The least squared distance between points of two boxes."""
    gap = jnp.maximum(jnp.maximum(low_b - high_a, low_a - high_b), 0)
    return (gap**2).sum(axis=-1)


def squared_span(low_a, high_a, low_b, high_b):
    """The largest squared distance between points of two boxes."""
    return (jnp.maximum(high_a - low_b, high_b - low_a) ** 2).sum(axis=-1)


def squared_distances(x: Float[Array, "a d"], y: Float[Array, "b d"]) -> Float[Array, "a b"]:
    """|x_i - x_j|^2 from differences: no cancellation for close points."""

    def add(total, columns):
        a, b = columns
        return total + (a[:, None] - b[None, :]) ** 2, None

    start = jnp.zeros((len(x), len(y)), x.dtype)
    return jax.lax.scan(add, start, (x.T, y.T), unroll=min(x.shape[1], 8))[0]
