"""Clusters of tokens: the connected components of a graph of close pairs.

    x_i ~ x_j   iff   cos(x_i, x_j) >= threshold        clusters in direction
    x_i ~ x_j   iff   |x_i - x_j| <= radius             clusters in R^d

Every token starts as the root of itself. A sweep looks at the pairs of tiles that hold links
between different roots, hooks each root to the least root that it is linked to, and follows hooks
to their end. Each root that is not the least among its neighbours disappears, so that the number
of sweeps is logarithmic, and a pair of tiles that holds no link between different roots never
holds one again.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from .._memory import PAIRS_AT_ONCE
from .._types import Scalar, ScalarLike, accumulation_dtype, is_concrete
from ..measure import Measure
from .base import AbstractObservable, one_by_one, over_leading, present
from .tiles import Tiles, over_pairs, split, squared_distances, squared_gap

# Systems of up to this many tokens are linked all with all, many systems together.
DENSE = 1024


def cluster_labels(
    mu: Measure, threshold: ScalarLike = 0.999, *, radius: ScalarLike | None = None
) -> Int[Array, "*batch n"]:
    """Single-linkage clusters of tokens, in direction or in space.

    Two tokens are linked where cos(x_i, x_j) >= threshold, or, with a radius, where
    |x_i - x_j| <= radius; a cluster is a connected component. Clusters are numbered 0, 1, ... by
    their first token; a token without mass (log-weight -inf) is -1; one that has no direction
    (x = 0), or is not finite, is a cluster of its own.

    Works under jit and vmap. Tokens are cut into tiles by a kd-split and only tiles within the
    linking distance meet: O(n log n) and a multiple of the linked pairs in time for small d, at
    most n^2 d; O(n d + 10^6) memory. Large systems run one after the other, small ones together.

    **Arguments:** `threshold`, in [-1, 1]; `radius`, at least 0, in the units of the points (the
    threshold is then not used).

    **Returns:** labels, shape `(*batch, n)`.
    """
    link, level = _rule(threshold, radius)
    return _labels(*jax.lax.stop_gradient((mu, level)), link)


def cluster_count(
    mu: Measure, threshold: ScalarLike = 0.999, *, radius: ScalarLike | None = None
) -> Int[Array, "*batch"]:
    """The number of clusters of [`jaxflow.observables.cluster_labels`][], shape `(*batch,)`.

    Of the saved measures of a flow, the number at each time; systems with many tokens are taken
    one after the other, in the memory of one.
    """
    return cluster_labels(mu, threshold, radius=radius).max(axis=-1) + 1


class ClusterCount(AbstractObservable):
    """t, mu -> [`jaxflow.observables.cluster_count`][]; threshold and radius may be traced."""

    threshold: Scalar
    radius: Scalar | None

    def __init__(self, threshold: ScalarLike = 0.999, *, radius: ScalarLike | None = None):
        self.threshold = jnp.asarray(threshold, float)
        self.radius = None if radius is None else jnp.asarray(radius, float)

    def __call__(self, t, mu):
        return cluster_count(mu, self.threshold, radius=self.radius)


# ------------------------------------------------------------------ what a link is


class _Link(NamedTuple):
    """place(x): the points that tiles hold; linked(x, y, level): the matrix of links;
    reach(level, d): the squared distance of places beyond which there is no link."""

    place: Callable
    linked: Callable
    reach: Callable


def _directions(x):
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def _aligned(x, y, level):
    return jnp.matmul(x, y.T, precision="highest") >= level


def _chord(level, d):
    # |x - y|^2 = 2 - 2 <x, y> for unit vectors. Products, norms and boxes each round by less than
    # d + 8 units, and the list of tiles may only be too long.
    return 2 - 2 * level + 16 * (d + 8) * jnp.finfo(level.dtype).eps


def _near(x, y, level):
    return squared_distances(x, y) <= level**2


def _ball(level, d):
    return level**2 * (1 + 16 * (d + 8) * jnp.finfo(level.dtype).eps)


IN_DIRECTION = _Link(_directions, _aligned, _chord)
IN_SPACE = _Link(lambda x: x, _near, _ball)


def _rule(threshold, radius):
    if radius is None:
        if is_concrete(threshold) and not -1 <= threshold <= 1:
            raise ValueError(f"threshold is a cosine and lies in [-1, 1], got {threshold}.")
        return IN_DIRECTION, threshold
    if is_concrete(radius) and not radius >= 0:
        raise ValueError(f"radius is a distance and at least 0, got {radius}.")
    return IN_SPACE, radius


# ------------------------------------------------------------------ components


@partial(jax.jit, static_argnums=2)
def _labels(mu: Measure, level: Array, link: _Link) -> Array:
    dtype = accumulation_dtype(mu.points.dtype)
    level = jnp.asarray(level, dtype)
    roots_of = _all_pairs if mu.n <= DENSE else _tiled

    def one(x, logs, level):
        x = link.place(x.astype(dtype))
        there = present(x, logs)
        roots = roots_of(x, there, level, link)
        massive = ~jnp.isneginf(logs)
        first = (roots == jnp.arange(len(x))) & massive
        return jnp.where(massive, jnp.cumsum(first)[roots] - 1, -1)

    if mu.n > DENSE:
        return one_by_one(one, mu, level)
    return over_leading(one, mu, level, batch_size=max(1, PAIRS_AT_ONCE // mu.n**2))


def _all_pairs(x, there, level, link: _Link) -> Int[Array, " n"]:
    """The root of each token, its component's first, from the whole matrix of links."""
    n = len(x)
    x = jnp.where(there[:, None], x, jnp.nan)  # which no comparison holds for
    linked = link.linked(x, x, level)

    def sweep(carry):
        roots, _ = carry
        least = jnp.min(jnp.where(linked, roots[:, None], n), axis=0)
        new = _hook(roots, jnp.minimum(roots, least), n)
        return new, (new != roots).any()

    return jax.lax.while_loop(lambda carry: carry[1], sweep, (jnp.arange(n), jnp.array(True)))[0]


def _tiled(x, there, level, link: _Link) -> Int[Array, " n"]:
    """The root of each token, from the tiles that can hold links.

    The state is (start, kept, total, roots, pairs): of the list of `total` pairs of tiles, those
    before `start` have been visited, and the first `kept` are those to be visited again.
    """
    n = len(x)
    tiles = split(x, there)
    count = len(tiles.tokens)
    pairs, total = _close_pairs(tiles, link.reach(level, x.shape[1]))

    def chunk(state):
        start, kept, total, roots, pairs = state
        window = jax.lax.dynamic_slice_in_dim(pairs, start, count)
        size = jnp.minimum(count, total - start)
        low, high = roots.min(axis=1), jnp.where(roots < n, roots, -1).max(axis=1)

        def visit(k, carry):
            least, active = carry
            a, b = window[k]
            settled = (low[a] == high[a]) & (low[a] == low[b]) & (low[b] == high[b])
            meet = partial(_meet, tiles, roots, level, link)
            to_a, to_b, linked = jax.lax.cond(settled, partial(_no_link, roots), meet, a, b)
            least = least.at[a].min(to_a)
            return least.at[b].min(to_b), active.at[k].set(linked)

        least, active = jax.lax.fori_loop(0, size, visit, (roots, jnp.zeros(count, bool)))
        roots = jax.lax.cond(active.any(), partial(_hook, n=n + 1), lambda r, _: r, roots, least)
        # The pairs to see again move to the front of the list, where all has been seen.
        places = jnp.where(active, kept + jnp.cumsum(active) - 1, len(pairs))
        pairs = pairs.at[places].set(window, mode="drop")
        start, kept = start + size, kept + active.sum()
        last, zero = start == total, jnp.zeros_like(start)
        ahead = jnp.where(last, zero, start), jnp.where(last, zero, kept)
        return *ahead, jnp.where(last, kept, total), roots, pairs

    zero = jnp.zeros_like(total)
    state = (zero, zero, total, tiles.tokens, pairs)
    roots = jax.lax.while_loop(lambda state: state[2] > 0, chunk, state)[3]
    return jnp.arange(n).at[tiles.tokens].set(roots, mode="drop")


def _close_pairs(tiles: Tiles, reach) -> tuple[Int[Array, "p 2"], Int[Array, ""]]:
    """The pairs of tiles (a, b), a <= b, within reach, tiles that are close in order first."""
    count = len(tiles.low)
    first = jnp.arange(count)
    close = over_pairs(squared_gap, tiles) <= reach
    close = (close & (first[:, None] + first[None, :] < count)).reshape(-1)
    places = jax.lax.sort(jnp.where(close, jnp.arange(count**2), count**2))
    # With room for a whole chunk after the last pair.
    offset, a = jnp.divmod(places[: count * (count + 1) // 2], count)
    pairs = jnp.stack([a, (a + offset) % count], axis=1)
    return jnp.pad(pairs, ((0, count), (0, 0))), close.sum()


def _meet(tiles: Tiles, roots, level, link: _Link, a, b):
    """The least roots that the tokens of tiles a and b are linked to, and if any is another."""
    roots_a, roots_b = roots[a], roots[b]
    linked = link.linked(tiles.points[a], tiles.points[b], level)
    none = jnp.iinfo(roots.dtype).max
    to_a = jnp.minimum(roots_a, jnp.min(jnp.where(linked, roots_b[None, :], none), axis=1))
    to_b = jnp.minimum(roots_b, jnp.min(jnp.where(linked, roots_a[:, None], none), axis=0))
    return to_a, to_b, (to_a < roots_a).any() | (to_b < roots_b).any()


def _no_link(roots, a, b):
    return roots[a], roots[b], jnp.array(False)


def _hook(roots: Int[Array, "*shape"], least: Int[Array, "*shape"], n: int):
    """Joins each root to the least root seen by any of its members, and follows to the end."""
    parents = jnp.arange(n).at[roots].min(least)
    ends = jax.lax.while_loop(lambda p: (p != p[p]).any(), lambda p: p[p], parents)
    return ends[roots]
