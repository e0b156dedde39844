"""Optimal transport between two measures in one dimension.

    W_2(mu, nu)^2 = min over couplings of int dist(x, y)^2

On the line the optimal coupling is monotone, W_2^2 = int_0^1 |F^{-1}(u) - G^{-1}(u)|^2 du with
the quantile functions F^{-1}, G^{-1}. On the circle of length 1 it is monotone after a cut,

    W_2^2 = min over alpha of int_0^1 |F^{-1}(u) - G^{-1}(u + alpha)|^2 du,
    G^{-1}(u + 1) = G^{-1}(u) + 1,

which is convex in alpha (Delon, Salomon and Sobolevski 2010), and piecewise linear for point
masses. Its slope, from the jumps of F^{-1} at c_i from x_i to x_{i+1}, is

    sum_i (x_i - x_{i+1}) (x_i + x_{i+1} - 2 G^{-1}(c_i + alpha)),       x_{n+1} = x_1 + 1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..geometry import AbstractGeometry, Euclidean, Sphere
from ..measure import Measure, check_measure
from .base import or_nan, over_two


def wasserstein(
    mu: Measure, nu: Measure, *, geometry: AbstractGeometry = Euclidean()
) -> Float[Array, "*batch"]:
    """W_2(mu, nu), exact, on the line and on the circle.

        W_2(mu, nu)^2 = min over couplings of int dist(x, y)^2

    **Arguments:**

    - `mu`, `nu`: measures with any weights and numbers of tokens, d = 1 on the line, d = 2 on the
      circle (where directions count); leading axes are broadcast.
    - `geometry`: `Euclidean()`, or `Sphere(radius)` with the length of the arc as distance.

    O(n log n) time on the line and about 30 (float64: 60) times that on the circle, O(n) memory.
    Differentiable, with derivative 0 where W_2 = 0. Ends of intervals of quantiles that agree up to
    rounding (16 epsilon) are taken as equal, so that W_2 is 0 where the measures are.

    **Returns:** shape `(*batch,)`, in the units of the points; nan where a token with mass is not
    finite.

    **Raises:** `ValueError` for other dimensions, where
    `jaxflow.observables.sinkhorn_divergence` serves; `TypeError` for other geometries and what
    is no measure.
    """
    check_measure("mu", mu)
    check_measure("nu", nu)
    if isinstance(geometry, Euclidean):
        d = 1
    elif isinstance(geometry, Sphere):
        d = 2
    else:
        raise TypeError(f"W_2 is exact on Euclidean() and Sphere() alone, got {geometry}.")
    if (mu.d, nu.d) != (d, d):
        raise ValueError(
            f"W_2 is exact for d = 1 with Euclidean() and d = 2 with Sphere(); got d = {mu.d} and "
            f"{nu.d} with {geometry}. Use sinkhorn_divergence in more dimensions."
        )
    return _wasserstein(mu, nu, geometry)


@eqx.filter_jit
def _wasserstein(mu: Measure, nu: Measure, geometry: AbstractGeometry) -> Array:
    circle = isinstance(geometry, Sphere)

    def cost(x, v, y, w):
        sliver = _sliver(v, w)
        if circle:
            return _circle_cost(*_sorted(_turns(x), v), *_sorted(_turns(y), w), sliver)
        return _quantile_cost(*_sorted(x[:, 0], v), *_sorted(y[:, 0], w), sliver)

    square = over_two(cost, mu, nu)
    positive = square > 0
    distance = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
    return or_nan(2 * jnp.pi * geometry.radius * distance if circle else distance, mu, nu)


def _turns(x: Float[Array, "n 2"]) -> Float[Array, " n"]:
    """The angle in turns, in [0, 1]."""
    return jnp.arctan2(x[:, 1], x[:, 0]) / (2 * jnp.pi) % 1


def _sorted(x: Float[Array, " n"], weights: Float[Array, " n"]):
    """Atoms in order and the ends of their intervals of quantiles; those without mass last."""
    massive = weights > 0
    x = jnp.where(massive, x, jnp.max(x, where=massive, initial=-jnp.inf))
    order = jnp.argsort(x)
    ends = jnp.cumsum(weights[order])
    return x[order], ends / ends[-1]


def _sliver(v, w):
    """The length up to which an interval of quantiles is the rounding of two ends that agree."""
    least = lambda w: jnp.min(w, where=w > 0, initial=1)
    return jnp.minimum(16 * jnp.finfo(v.dtype).eps, jnp.minimum(least(v), least(w)) / 64)


def _quantile_cost(x, ends_x, y, ends_y, sliver):
    """int_0^1 |F^{-1}(u) - G^{-1}(u)|^2 du of atoms x and y on intervals with these ends."""
    ends = jnp.concatenate([ends_x, ends_y])
    order = jnp.argsort(ends)
    from_x = (order < len(x)).astype(order.dtype)
    # Before the k-th end, as many atoms of each measure have been passed as have ended.
    passed_x = jnp.cumsum(from_x) - from_x
    passed_y = jnp.arange(len(ends), dtype=order.dtype) - passed_x
    lengths = jnp.diff(ends[order], prepend=0)
    gap = x[jnp.minimum(passed_x, len(x) - 1)] - y[jnp.minimum(passed_y, len(y) - 1)]
    return (jnp.where(lengths > sliver, lengths, 0) * gap**2).sum()


def _circle_cost(x, ends_x, y, ends_y, sliver):
    """The least cost over the cuts of the circle, by bisection on its slope.

    The derivative at the least cost is that at a fixed cut.
    """
    frozen = jax.lax.stop_gradient((x, ends_x, y, ends_y))
    alpha = _best_cut(*frozen)
    # G^{-1}(u + alpha) has its ends at ends_y - alpha, here brought into (0, 1].
    shifted = ends_y - alpha
    turn = 1 - jnp.ceil(shifted)
    shifted, lifted = shifted + turn, y + turn
    order = jnp.argsort(shifted)
    # What is left up to u = 1 belongs to the first atom, one turn on.
    shifted = jnp.append(shifted[order], 1)
    lifted = jnp.append(lifted[order], lifted[order[0]] + 1)
    return _quantile_cost(x, ends_x, lifted, shifted, sliver)


def _best_cut(x, ends_x, y, ends_y):
    after = jnp.append(x[1:], x[0] + 1)

    def slope(alpha):
        u = ends_x + alpha
        turn = jnp.ceil(u) - 1  # u - turn in (0, 1]
        index = jnp.minimum(jnp.searchsorted(ends_y, u - turn), len(y) - 1)
        return ((x - after) * (x + after - 2 * (y[index] + turn))).sum()

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        rising = slope(middle) > 0
        return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

    steps = jnp.finfo(x.dtype).nmant + 4
    one = jnp.ones((), x.dtype)
    low, high = jax.lax.fori_loop(0, steps, halve, (-one, one))
    return (low + high) / 2
