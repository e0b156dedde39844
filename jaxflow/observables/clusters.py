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
from .._rules import not_negative, real
from .._types import Scalar, ScalarLike, accumulation_dtype
from ..measure import Measure, check_measure
from .base import AbstractObservable, one_by_one, or_nan, over_leading, present, whole
from .tiles import Tiles, over_pairs, split, squared_distances, squared_gap

# Systems of up to this many tokens are linked all with all, many systems together.
DENSE = 1024


def cluster_labels(
    mu: Measure,
    threshold: ScalarLike = 0.999,
    *,
    radius: ScalarLike | None = None,
    min_mass: ScalarLike = 0.0,
) -> Int[Array, "*batch n"]:
    """Single-linkage clusters of tokens, in direction or in space.

    Two tokens are linked where cos(x_i, x_j) >= threshold, or, with a radius, where
    |x_i - x_j| <= radius; a cluster is a connected component. Clusters are numbered 0, 1, ... by
    their first token; -1 is a token in none of them: one without mass (log-weight -inf), and one in
    a component of less than `min_mass`. A token without direction (x = 0) is a component of its
    own. Where a token with mass is not finite there are no clusters, and all labels are -1.

    Works under jit and vmap. Tokens are cut into tiles by a kd-split and only tiles within the
    linking distance meet: O(n log n) and a multiple of the linked pairs in time for small d, at
    most n^2 d; O(n d + 10^6) memory. Large systems run one after the other, small ones together.

    **Arguments:**

    - `threshold`: the least cosine of linked tokens, in [-1, 1].
    - `radius`: the largest distance of linked tokens, at least 0, in the units of the points; the
      threshold is then not used.
    - `min_mass`: the least share of all mass that makes a component a cluster, in [0, 1]. Of many
      tokens a few always straggle: 0.01 leaves out what holds less than a hundredth.

    **Returns:** labels, shape `(*batch, n)`.

    **Raises:** `ValueError` or `TypeError` for bad arguments.

    ```python
    >>> mu = jaxflow.measure.from_angles([0.0, 0.01, 1.5, 3.0, 3.01])
    >>> jaxflow.observables.cluster_labels(mu).tolist()
    [0, 0, 1, 2, 2]
    >>> jaxflow.observables.cluster_labels(mu, min_mass=0.3).tolist()
    [0, 0, -1, 1, 1]

    ```
    """
    check_measure("mu", mu)
    link, level = _rule(threshold, radius)
    mu, level, least = jax.lax.stop_gradient((mu, level, _share(min_mass)))
    return _labels(mu, level, least, link)


def cluster_count(
    mu: Measure,
    threshold: ScalarLike = 0.999,
    *,
    radius: ScalarLike | None = None,
    min_mass: ScalarLike = 0.0,
) -> Int[Array, "*batch"]:
    """The number of clusters of `jaxflow.observables.cluster_labels`.

    Of the saved measures of a flow, the number at each time; systems with many tokens are taken
    one after the other, in the memory of one. It is -1 where a token with mass is not finite, as
    at the times that a flow did not reach.

    **Arguments:** as in `jaxflow.observables.cluster_labels`.

    **Returns:** integers, shape `(*batch,)`.

    **Raises:** `ValueError` or `TypeError` for bad arguments.

    ```python
    >>> mu = jaxflow.measure.from_angles([0.0, 0.01, 3.0])
    >>> int(jaxflow.observables.cluster_count(mu, threshold=0.999))
    2

    ```
    """
    labels = cluster_labels(mu, threshold, radius=radius, min_mass=min_mass)
    return jnp.where(whole(mu.points, mu.log_probabilities), labels.max(axis=-1) + 1, -1)


class ClusterCount(AbstractObservable):
    """t, mu -> `jaxflow.observables.cluster_count`, nan where that is -1.

    **Arguments:** `threshold`, `radius` and `min_mass` as in
    `jaxflow.observables.cluster_labels`; each may be traced.

    **Raises:** `ValueError` or `TypeError` for bad arguments.
    """

    threshold: Scalar
    radius: Scalar | None
    min_mass: Scalar

    def __init__(
        self,
        threshold: ScalarLike = 0.999,
        *,
        radius: ScalarLike | None = None,
        min_mass: ScalarLike = 0.0,
    ):
        self.threshold = _rule(threshold, None)[1]
        self.radius = None if radius is None else _rule(threshold, radius)[1]
        self.min_mass = _share(min_mass)

    def __call__(self, t, mu):
        count = cluster_count(mu, self.threshold, radius=self.radius, min_mass=self.min_mass)
        return or_nan(count.astype(accumulation_dtype(mu.points.dtype)), mu)


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
        rule = "a cosine, in [-1, 1]"
        return IN_DIRECTION, real("threshold", threshold, rule, lambda c: (-1 <= c) & (c <= 1))
    return IN_SPACE, real("radius", radius, "a distance, at least 0", not_negative)


def _share(min_mass):
    rule = "a share of all mass, in [0, 1]"
    return real("min_mass", min_mass, rule, lambda share: (0 <= share) & (share <= 1))


# ------------------------------------------------------------------ components


@partial(jax.jit, static_argnums=3)
def _labels(mu: Measure, level: Array, min_mass: Array, link: _Link) -> Array:
    dtype = accumulation_dtype(mu.points.dtype)
    level, min_mass = (jnp.asarray(a, dtype) for a in (level, min_mass))
    roots_of = _all_pairs if mu.n <= DENSE else _tiled

    def one(x, logs, level, min_mass):
        places = link.place(x.astype(dtype))
        roots = roots_of(places, present(places, logs), level, link)
        # Equal weights become 1, whose sums are exact.
        weights = jnp.exp(logs - logs.max())
        least = min_mass * weights.sum() * (1 - 8 * jnp.finfo(dtype).eps)
        heavy = jnp.zeros_like(weights).at[roots].add(weights) >= least
        inside = ~jnp.isneginf(logs) & heavy[roots] & whole(x, logs)
        first = (roots == jnp.arange(len(x))) & inside
        return jnp.where(inside, jnp.cumsum(first)[roots] - 1, -1)

    if mu.n > DENSE:
        return one_by_one(one, mu, level, min_mass)
    return over_leading(one, mu, level, min_mass, batch_size=max(1, PAIRS_AT_ONCE // mu.n**2))


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
