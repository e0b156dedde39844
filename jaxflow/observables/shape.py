"""The shape of a measure's support: diameter, and area of the convex hull in the plane."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._types import accumulation_dtype
from ..measure import Measure, check_measure
from .base import one_by_one, or_nan, present
from .tiles import over_pairs, split, squared_span


def diameter(mu: Measure) -> Float[Array, "*batch"]:
    """max_{i,j} |x_i - x_j| over tokens with mass.

    Exact for any n: pairs of tiles are searched in the order of the bounds that their boxes give,
    until no bound exceeds the distance found. Time O(n log n) where d is small, O(n^2 d) at worst
    (points on a sphere in many dimensions); memory O(n d + 10^6). Differentiable in the two
    tokens that attain it. Systems run one after the other.

    **Arguments:** `mu`: points `(*batch, n, d)`.

    **Returns:** shape `(*batch,)`; 0 for a single token, nan where one with mass is not finite.

    **Raises:** `TypeError` where mu is no measure.

    ```python
    >>> jaxflow.observables.diameter(jaxflow.Measure([[0.0, 0.0], [3.0, 4.0]])).tolist()
    5.0

    ```
    """
    check_measure("mu", mu)
    return _diameter(mu)


@jax.jit
def _diameter(mu: Measure) -> Array:
    dtype = accumulation_dtype(mu.points.dtype)
    search = lambda x, logs: _farthest(x.astype(dtype), present(x, logs))
    pairs = one_by_one(search, mu)
    ends = jnp.take_along_axis(mu.points, pairs[..., None], axis=-2).astype(dtype)
    square = ((ends[..., 0, :] - ends[..., 1, :]) ** 2).sum(axis=-1)
    apart = square > 0
    return or_nan(jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0), mu)


def _farthest(x, there) -> Int[Array, " 2"]:
    """The two tokens of the largest distance."""
    # Centred points: |x|^2 + |y|^2 - 2 <x, y> loses nothing for the distances that matter.
    middle = (jnp.where(there[:, None], x, 0)).sum(axis=0) / there.sum().astype(x.dtype)
    tiles = split(x - middle[None], there)
    count = len(tiles.low)
    first = jnp.arange(count)
    spans = over_pairs(squared_span, tiles)
    spans = jnp.where(first[:, None] + first[None, :] < count, spans, -jnp.inf).reshape(-1)
    order = jnp.argsort(-spans)
    slack = 1 + 16 * x.shape[1] * jnp.finfo(x.dtype).eps

    def distances(pair):
        a, b = pair % count, pair % count + pair // count
        x, y = tiles.points[a], tiles.points[b]
        products = jnp.matmul(x, y.T, precision="highest")
        squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :] - 2 * products
        return jnp.where(jnp.isnan(squares), -1, squares)

    def more(state):
        k, largest, _ = state
        return (k < len(order)) & (spans[order[k]] * slack > largest)

    def search(state):
        k, largest, at = state
        found = distances(order[k]).max()
        return k + 1, jnp.maximum(found, largest), jnp.where(found > largest, order[k], at)

    start = jnp.array(0), jnp.array(-1, x.dtype), jnp.zeros((), order.dtype)
    _, _, pair = jax.lax.while_loop(more, search, start)
    i, j = jnp.unravel_index(jnp.argmax(distances(pair)), (tiles.tokens.shape[1],) * 2)
    return jnp.stack([tiles.tokens[pair % count, i], tiles.tokens[pair % count + pair // count, j]])


def hull_vertices(mu: Measure) -> Int[Array, "*batch vertices"]:
    """The indices of the tokens that are vertices of the convex hull, in the plane, in positive
    order; repeated to a length of 2 n.

    **Arguments:** `mu`: points `(*batch, n, 2)`.

    **Returns:** integers, shape `(*batch, 2 n)`: the lower side of the hull and then the upper one.

    **Raises:** `ValueError` where d is not 2, `TypeError` where mu is no measure.

    ```python
    >>> mu = jaxflow.Measure([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0], [1.0, 1.0]])
    >>> sorted(set(jaxflow.observables.hull_vertices(mu).tolist()))  # not the one inside
    [0, 1, 2, 3]

    ```
    """
    _check_plane("hull_vertices", mu)
    return one_by_one(_hull, mu)


def _check_plane(name: str, mu: Measure):
    check_measure("mu", mu)
    if mu.d != 2:
        raise ValueError(f"{name} takes points in the plane, d = 2; got d = {mu.d}.")


def hull_area(mu: Measure) -> Float[Array, "*batch"]:
    """The area of the convex hull of the tokens with mass, in the plane.

    Monotone chains (Andrew 1979), stripped in parallel: of the tokens in the order of their
    coordinates, all go that lie below the segment of any two that stand 2^k places before and
    after them, until none does. Some ten rounds of O(n log n) in practice, O(n) memory. The area
    is the shoelace sum over the vertices, and differentiable in them. Systems run one after the
    other.

    **Arguments:** `mu`: points `(*batch, n, 2)`.

    **Returns:** shape `(*batch,)`; 0 where all tokens lie on a line, nan where one with mass is not
    finite.

    **Raises:** `ValueError` where d is not 2, `TypeError` where mu is no measure.

    ```python
    >>> mu = jaxflow.Measure([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0], [1.0, 1.0]])
    >>> jaxflow.observables.hull_area(mu).tolist()
    4.0

    ```
    """
    _check_plane("hull_area", mu)
    return _hull_area(mu)


@jax.jit
def _hull_area(mu: Measure) -> Array:
    dtype = accumulation_dtype(mu.points.dtype)
    vertices = one_by_one(_hull, mu)
    x = jnp.take_along_axis(mu.points, vertices[..., None], axis=-2).astype(dtype)
    x = x - x[..., :1, :]
    after = jnp.roll(x, -1, axis=-2)
    return or_nan((x[..., 0] * after[..., 1] - x[..., 1] * after[..., 0]).sum(axis=-1) / 2, mu)


def _hull(x, logs) -> Int[Array, " vertices"]:
    """The vertices in positive order, repeated to a length of 2 n: the lower side, then the upper.

    A stack is padded with its last vertex, which adds nothing to a shoelace sum.
    """
    there = present(x, logs)
    x = jnp.where(there[:, None], x, x[jnp.argmax(there)][None])
    tokens = jnp.where(there, jnp.arange(len(x)), jnp.argmax(there))
    a, b, tokens = jax.lax.sort((x[:, 0], x[:, 1], tokens), num_keys=2)
    points = jnp.stack([a, b], axis=1)
    lower, upper = jax.lax.map(_chain, jnp.stack([points, points[::-1]]))
    return jnp.concatenate([tokens[lower], tokens[::-1][upper]])


def _chain(x: Float[Array, "n 2"]) -> Int[Array, " n"]:
    """The vertices of the side of the hull that turns left from the first point to the last.

    The last vertex repeats to the length n. A chain that turns left at each of its points is
    convex; what is below a segment between two points is no vertex, whatever became of the two.
    """
    n = len(x)
    places = jnp.arange(n)

    def below(p, size, shift):
        u, v = p - p[(places - shift) % n], p[(places + shift) % n] - p
        turn = u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]
        # Of equal points the first stays.
        repeats, ahead = (u == 0).all(axis=1), (v != 0).any(axis=1)
        between = (places >= shift) & (places + shift < size)
        return between & (repeats | ((turn <= 0) & ahead))

    def strip(state):
        kept, size, _ = state
        p = x[kept]
        look = lambda k, dropped: dropped | below(p, size, 2**k)
        dropped = jax.lax.fori_loop(0, (n - 1).bit_length(), look, places >= size)
        # The last point always stays, and pads.
        kept = jnp.minimum(jax.lax.sort(jnp.where(dropped, n, kept)), n - 1)
        left = n - dropped.sum()
        return kept, left, left < size

    start = places, jnp.array(n), jnp.array(True)
    return jax.lax.while_loop(lambda state: state[2], strip, start)[0]
