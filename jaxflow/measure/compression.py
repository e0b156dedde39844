"""Measures of few signed points that stand for measures of many, for attention in low dimension.

With s_g = sum_j w_j K_g(y_j) on a fixed grid of points g,

    sum_j w_j exp(<q, y_j>) = sum_g s_g exp(<q, g>)   to a relative accuracy, for |q| <= reach

so that attention, which asks a measure for nothing but such integrals and their derivatives, costs
n times the number of points instead of n^2.

**One axis.** On a circle with angle a, exp(<q, y>) is exp(r cos(a - a_q)), r = |q|. Around a token
at angle a it is interpolated in N equispaced angles after multiplication by a window that is 1 at
the token,

    f(a) = sum_g D(a_g - a) W(a_g - a) f(a_g),    W(s) = exp(kappa (cos s - 1))

with D the periodic sinc (Dirichlet) kernel. As a function of s, f W = exp(R cos(s - b) - kappa)
is such an exponential again, R = |r e^{i alpha} + kappa| where alpha is the angle between q and
the token, so that the error of trigonometric interpolation is known: it is at most twice the modes
beyond those of the grid, and relative to f(a) = exp(r cos alpha)

    error(alpha) <= 4 sum_{k >= N/2} I_k(R) exp(-kappa - r cos alpha)

(I_k: modified Bessel functions). The largest over alpha is under the tolerance for the N that
`_axis` chooses. All terms of the sum over tokens are positive, so the sum has that relative
accuracy too, for every law and every query: near the tokens or far from all of them. What makes it
so is the window: without it, the grid carries rounding errors from where the tokens are to where
they are not. The window costs a factor of about two in N. Rounding is amplified by at most
max_alpha exp(R - kappa - r cos alpha), which kappa keeps small.

**Several.** An interval is the circle seen from the side, y = cos a (nodes of Chebyshev); a box is
a product of intervals, and S^2 the product of the circle of longitudes and the circle of
colatitudes, gone round twice. The kernel of a product is the product of kernels.
"""

import math
from functools import lru_cache, partial, reduce
from operator import and_
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import ive

from .._rules import constant, instance, known, positive, reals
from .._types import ArrayLike, accumulation_dtype, error_where, is_concrete
from ..geometry import Sphere
from .base import Measure, check_measure

# Kernel values that are held at a time.
AT_ONCE = 2**16
CHUNK = 64  # tokens of which one sum is made
# The grid's poles on S^2, where longitudes end, are away from the axes, where users put tokens.
_TURN = np.linalg.qr(np.array([[0.36, 0.48, 0.8], [0.2, -0.9, 0.4], [0.9, 0.1, -0.4]]))[0]
MOST_POINTS = 2**22


class Box(eqx.Module):
    """The box of all y with low_i <= y_i <= high_i, in one to three dimensions.

    **Arguments:** `low`, `high`: the lower and upper ends, shape `(d,)`.

    **Raises:** `ValueError` or `TypeError` where these are not the ends of intervals of positive
    length, in one to three dimensions.

    ```python
    >>> jaxflow.measure.Box([-1.0, -1.0], [1.0, 1.0]).d
    2

    ```
    """

    low: tuple[float, ...] = eqx.field(static=True)
    high: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, low: ArrayLike, high: ArrayLike):
        ends = [_corner("low", low), _corner("high", high)]
        if len(ends[0]) != len(ends[1]) or not all(a < b for a, b in zip(*ends, strict=True)):
            raise ValueError(
                f"a box has low < high in each of one to three dimensions, got {low} and {high}."
            )
        self.low, self.high = ends

    @property
    def d(self) -> int:
        """The dimension."""
        return len(self.low)


def _corner(name: str, value: ArrayLike) -> tuple[float, ...]:
    corner = known(reals(name, value))
    if corner is None:
        raise TypeError(f"{name} sets the number of points and cannot be traced: pass numbers.")
    if corner.ndim != 1 or not 1 <= len(corner) <= 3:
        raise ValueError(f"{name} must have shape (d,), d from 1 to 3; got {corner.shape}.")
    return tuple(map(float, corner))


Space = Sphere | Box


def compress(
    mu: Measure, space: Space = Sphere(), *, reach: float, tolerance: float = 1e-6
) -> Measure:
    """A measure of few signed points with the integrals of mu against exp(<q, .>), |q| <= reach.

        |sum_g s_g exp(<q, g>) - sum_j w_j exp(<q, y_j>)| <= tolerance sum_j w_j exp(<q, y_j>)

    The number of points depends on reach and tolerance, not on mu: on the circle it grows from
    about 4 reach, on S^2 and in boxes of d dimensions like its power. The work is O(n). Where mu
    has no more tokens than the grid has points, it is returned as it is, with signs that are all 1.
    The points are fixed and the weights smooth in the tokens, so derivatives pass: on a sphere,
    those along it.

    **Arguments:**

    - `mu`: points `(*batch, n, d)` of the space, in float32 or float64.
    - `space`: `jaxflow.Sphere(radius)` with d = 2 or 3, or a `jaxflow.measure.Box` around the
      tokens in one to three dimensions.
    - `reach`: the longest query; for attention with inverse temperature beta, beta |K^T Q x|.
    - `tolerance`: of the relative error above, which also bounds that of means (relative to the
      largest value). Rounding comes on top: float32 allows 1e-6, float64 2e-15 at the least.

    **Returns:** a signed `jaxflow.Measure`, whose `weights` are s_g, with points `(points, d)`
    or, for batches, `(*batch, points, d)`.

    **Raises:** `ValueError` or `TypeError` for spaces, reaches and tolerances that are not such,
    and for tokens that are not of the space (under `jit`, the run-time error of
    `equinox.error_if`).

    ```python
    >>> mu = jaxflow.measure.circle(100_000)
    >>> few = jaxflow.measure.compress(mu, jaxflow.Sphere(), reach=9.0, tolerance=1e-5)
    >>> few.n < 100, bool(jnp.abs(few.mean).max() < 1e-5)
    (True, True)

    ```
    """
    check_measure("mu", mu)
    grid = grid_of(space, mu.d, reach, tolerance, mu.points.dtype)
    if mu.n <= grid.points:
        logs = mu.log_probabilities
        return Measure(mu.points, logs, jnp.ones_like(logs))
    points = _checked(mu.points, space)
    s = _weights(points, mu.weights.astype(points.dtype), grid)
    places = jnp.asarray(grid.places(), points.dtype)
    return _signed(jnp.broadcast_to(places, (*s.shape, mu.d)), s)


def _signed(points: Array, s: Float[Array, "*batch points"]) -> Measure:
    """The measure sum_g s_g delta_g; derivatives pass through the signs."""
    size = jax.lax.stop_gradient(jnp.abs(s))
    there = size >= 4 * jnp.finfo(s.dtype).tiny  # its reciprocal is finite
    size = jnp.where(there, size, 1)
    logs = jnp.where(there, jnp.log(size), -jnp.inf)
    return Measure(points, logs, jnp.where(there, s / size, 0))


# ------------------------------------------------------------------ tokens of the space


def _checked(points: Array, space: Space) -> Array:
    """The points, which are of the space; those that are known are looked at on the host."""
    rule = f"the tokens must lie in the space {space}, for which the points were chosen"
    if not is_concrete(points):
        off = ~jnp.asarray(_inside(points, space)).all()
        return error_where(off, points, f"{rule}: retract them first, or pass a larger space.")
    if (where := np.argwhere(~_inside(host := np.asarray(points), space))).size:
        first = tuple(map(int, where[0]))
        raise ValueError(
            f"{rule}; the one at index {first} is {host[first]}. Retract the tokens first, or pass "
            "a space that holds them."
        )
    return points


def _inside(points, space: Space):
    if isinstance(space, Sphere):
        return space.contains(points)
    ends = enumerate(zip(space.low, space.high, strict=True))
    return reduce(
        and_, [(low <= points[..., i]) & (points[..., i] <= high) for i, (low, high) in ends]
    )


# ------------------------------------------------------------------ grids


class Axis(NamedTuple):
    """N angles (half a step from 0), the concentration kappa of the window, and how much it can
    amplify a relative error of the values at the angles."""

    size: int
    kappa: float
    gain: float

    @property
    def angles(self) -> np.ndarray:
        return (np.arange(self.size) + 0.5) * (2 * np.pi / self.size)


class Grid(NamedTuple):
    """The points of a space: a product of axes."""

    space: Space
    d: int
    axes: tuple[Axis, ...]

    @property
    def points(self) -> int:
        sizes = math.prod(axis.size for axis in self.axes)
        halves = len(self.axes) if isinstance(self.space, Box) else len(self.axes) - 1
        return sizes // 2**halves

    def places(self) -> Float[np.ndarray, "points d"]:
        """The points themselves."""
        if isinstance(self.space, Box):
            ends = zip(self.axes, self.space.low, self.space.high, strict=True)
            lines = [
                (a + b) / 2 + (b - a) / 2 * np.cos(axis.angles[: axis.size // 2])
                for axis, a, b in ends
            ]
            return np.stack([x.ravel() for x in np.meshgrid(*lines, indexing="ij")], axis=1)
        longitudes = self.axes[-1].angles
        ring = np.stack([np.cos(longitudes), np.sin(longitudes)], axis=1)
        if self.d == 2:
            return self.space.radius * ring
        colatitudes = self.axes[0].angles[: self.axes[0].size // 2]
        up, out = np.cos(colatitudes), np.sin(colatitudes)
        rings = out[:, None, None] * ring
        up = np.broadcast_to(up[:, None, None], (*rings.shape[:2], 1))
        return self.space.radius * np.concatenate([rings, up], axis=2).reshape(-1, 3) @ _TURN


def check_tolerance(tolerance: float) -> float:
    """The tolerance of a compression, a number of (0, 1).

    **Raises:** `ValueError` or `TypeError` if it is not.
    """
    return constant("tolerance", tolerance, "in (0, 1)", lambda x: (0 < x) & (x < 1))


def grid_of(space: Space, d: int, reach: float, tolerance: float, dtype) -> Grid:
    """The grid for tokens of dimension d; the rules on what it is chosen by.

    **Raises:** as `jaxflow.measure.compress`.
    """
    instance("space", space, (Sphere, Box), "jaxflow.Sphere()")
    reach = constant("reach, the longest query,", reach, "positive and finite", positive)
    tolerance = check_tolerance(tolerance)
    if dtype != accumulation_dtype(dtype):
        raise TypeError(
            f"points of {jnp.dtype(dtype)} round the places of the points that would stand for "
            "them, which no weights make up for: cast them to float32."
        )
    least = 8 * float(jnp.finfo(dtype).eps)
    if tolerance < least:
        raise ValueError(
            f"tolerance must be at least {least:.1e}, eight roundings of {jnp.dtype(dtype)}; got "
            f"{tolerance}. Use float64 points for less."
        )
    if isinstance(space, Sphere):
        if d not in (2, 3):
            raise ValueError(
                f"measures are compressed on spheres in R^2 and R^3, got tokens of dimension {d}: "
                "the number of points grows like a power d - 1 of the reach."
            )
        radii = [float(space.radius)] * (d - 1)
    else:
        if d != space.d:
            raise ValueError(f"a box of {space.d} dimensions holds no tokens of dimension {d}.")
        radii = [(b - a) / 2 for a, b in zip(space.low, space.high, strict=True)]
    # Half of the tolerance is for what a grid leaves out, half for roundings, which it amplifies.
    allowed = (tolerance / 2 / (least / 8)) ** (1 / len(radii))
    axes, gain = [], 1.0
    for radius in radii:
        # What one axis gets wrong, those before it amplify.
        axes.append(_axis(reach * radius, tolerance / 2 / len(radii) / gain, allowed))
        gain *= axes[-1].gain
    grid = Grid(space, d, tuple(axes))
    if grid.points > MOST_POINTS:
        raise ValueError(
            f"reach {reach:g} needs {grid.points:.2g} points in {space}, more than {MOST_POINTS}: "
            "lower the reach (beta), or run without compression."
        )
    return grid


@lru_cache(maxsize=256)
def _axis(r: float, tolerance: float, allowed: float) -> Axis:
    """The fewest angles, and the window, for exponentials exp(r cos) to a relative tolerance, with
    a gain that is allowed."""
    alphas = np.linspace(0, np.pi, 33)[:, None]
    # The gain is largest near right angles, about exp(r^2 / 2 kappa).
    kappas = 0.1 + max(r, r**2) * np.geomspace(0.02, 2, 48)
    longest = np.sqrt(r**2 + kappas**2 + 2 * r * kappas * np.cos(alphas))
    gains = np.exp(np.minimum(longest - kappas - r * np.cos(alphas), 500))
    gain = gains.max(axis=0)
    sizes = 2 * _modes(longest, tolerance / gains).max(axis=0)
    best = np.argmin(np.where(gain <= max(allowed, 2), sizes, np.inf))
    return Axis(int(sizes[best]), float(kappas[best]), float(gain[best]))


def _modes(R: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """The least K with 4 exp(-R) sum_{k >= K} I_k(R) <= tolerance, by bisection.

    The ratio I_{k+1}(R) / I_k(R) falls with k, and is at most R / (c + sqrt(c^2 + R^2)) with
    c = k + 1/2 (Amos, Computation of modified Bessel functions and their ratios, 1974), so that a
    geometric series bounds the tail.
    """
    low, high = np.zeros(R.shape, int), np.full(R.shape, 64 + 40 * int(np.sqrt(R.max()) + 1))
    while (high - low > 1).any():
        middle = (low + high) // 2
        c = middle + 0.5
        tail = ive(middle, R) / (1 - R / (c + np.sqrt(c**2 + R**2)))
        enough = 4 * tail <= tolerance
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


# ------------------------------------------------------------------ weights


@partial(jax.jit, static_argnames="grid")
def _weights(points: Float[Array, "*batch n d"], w: Float[Array, "*batch n"], grid: Grid):
    """s_g = sum_j w_j K_g(y_j)."""
    one = partial(_weights_of_one, grid=grid)
    for _ in range(points.ndim - 2):
        one = jax.vmap(one)
    return one(points, w)


def _weights_of_one(points: Float[Array, "n d"], w: Float[Array, " n"], grid: Grid):
    """The same of one measure, a block of tokens after the other."""
    first = math.prod(axis.size for axis in grid.axes[:-1])
    at_once = min(AT_ONCE // max(first, grid.axes[-1].size), len(w))
    block = CHUNK * max(1, -(-at_once // CHUNK))
    count = -(-len(w) // block)
    pad = count * block - len(w)
    # Tokens without weight, at places where derivatives exist.
    points = jnp.concatenate([points, jnp.broadcast_to(points[:1], (pad, points.shape[1]))])
    w = jnp.concatenate([w, jnp.zeros(pad, w.dtype)])
    blocks = points.reshape(count, block, -1), w.reshape(count, block)

    @jax.checkpoint
    def add(carry, tokens):
        # Kahan's sum: what an addition lost is in the next one.
        total, lost = carry
        points, w = tokens
        part = _block(points, w, grid) - lost
        after = total + part
        return (after, (after - total) - part), None

    zeros = jnp.zeros(grid.points, w.dtype)
    return jax.lax.scan(add, (zeros, zeros), blocks)[0][0]


def _block(points, w, grid: Grid):
    """The weights that some tokens give to the points."""
    factors = [
        _kernel(cosine, sine, axis)
        for (cosine, sine), axis in zip(_directions(points, grid), grid.axes, strict=True)
    ]
    if isinstance(grid.space, Box):
        factors = [_mirrored(K) for K in factors]
    *others, last = factors
    rows = w[:, None]
    for K in others:
        rows = (rows[:, :, None] * K[:, None, :]).reshape(len(w), -1)
    # A few at a time, then in pairs: many additions of like numbers would be wrong alike.
    rows, last = (a.reshape(-1, CHUNK, a.shape[1]) for a in (rows, last))
    parts = jnp.einsum("cjf,cjg->cfg", rows, last, precision="highest")
    while len(parts) > 1:
        half = len(parts) // 2
        parts = jnp.concatenate([parts[:half] + parts[half : 2 * half], parts[2 * half :]])
    total = parts[0]
    if len(factors) == 2 and not isinstance(grid.space, Box):
        # Beyond a pole, the colatitude -a at the longitude b is a at b + pi.
        half, turn = grid.axes[0].size // 2, grid.axes[1].size // 2
        total = total[:half] + jnp.roll(total[: half - 1 : -1], turn, axis=1)
    return total.reshape(-1)


def _mirrored(K):
    """On an interval, angles a and -a are one point."""
    half = K.shape[1] // 2
    return K[:, :half] + K[:, : half - 1 : -1]


def _directions(points, grid: Grid):
    """The cosine and sine of the angle of each token on each axis."""
    space = grid.space
    if isinstance(space, Box):
        middles = [(a + b) / 2 for a, b in zip(space.low, space.high, strict=True)]
        halves = [(b - a) / 2 for a, b in zip(space.low, space.high, strict=True)]
        lines = zip(points.T, middles, halves, strict=True)
        cosines = [jnp.clip((y - middle) / half, -1, 1) for y, middle, half in lines]
        return [(u, _root(1 - u**2)) for u in cosines]
    # Of tokens beside the sphere, the direction counts: derivatives are those along the sphere.
    points = points / _root((points * points).sum(axis=1, keepdims=True))
    if grid.d == 2:
        return [(points[:, 0], points[:, 1])]
    x, y, z = jnp.matmul(points, jnp.asarray(_TURN.T, points.dtype), precision="highest").T
    out = _root(x**2 + y**2)
    return [(z, out), (x / out, y / out)]


def _root(square):
    """The root, with a finite derivative at 0."""
    return jnp.sqrt(jnp.maximum(square, 1e-30))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kernel(cosine: Array, sine: Array, axis: Axis) -> Float[Array, "n size"]:
    """D(a_g - a) W(a_g - a) for tokens at angles a and the angles a_g of an axis.

    For N angles D(s) = sin(N s / 2) / (N tan(s / 2)), whose numerator is one number for a token,
    but for signs. Since D sums to 1 over the angles that number need not be known, as in the
    barycentric formula (Berrut and Trefethen, Barycentric Lagrange interpolation, 2004), which is
    right to rounding also next to an angle.
    """
    cotangents, window, _ = _pieces(cosine, sine, axis)
    return cotangents * window / cotangents.sum(axis=1, keepdims=True)


@_kernel.defjvp
def _kernel_jvp(axis: Axis, primals, tangents):
    """The derivative in the angle a.

    With cotangents u, D = u / sum u. Where an angle is near, its u is large and the derivative of
    its D cancels; it is minus the sum of the others, as the D sum to 1.
    """
    (cosine, sine), (dcosine, dsine) = primals, tangents
    u, window, across = _pieces(cosine, sine, axis)
    slopes = -0.5 * _signs(axis, cosine.dtype) * (u * u + 1)
    near = jnp.abs(u) > 1 / np.tan(np.pi / 4 / axis.size)  # nearer than a quarter of the gap
    total, far, near_slope, far_slope = (
        jnp.where(mask, a, 0).sum(axis=1, keepdims=True)
        for a, mask in ((u, True), (u, ~near), (slopes, near), (slopes, ~near))
    )
    slope = near_slope + far_slope
    dirichlet = u / total
    others = (slopes - dirichlet * slope) / total
    nearest = (far / total * slope - far_slope) / total
    derivative = jnp.where(near, nearest, others) - axis.kappa * dirichlet * across
    turn = cosine * dsine - sine * dcosine
    return dirichlet * window, derivative * window * turn[:, None]


def _pieces(cosine, sine, axis: Axis):
    """(-1)^g cot(s / 2), W(s) and sin(s), s = a - a_g; an s of 0 is one too small to see."""
    dtype = cosine.dtype
    c, s = (jnp.asarray(f(axis.angles), dtype)[None] for f in (np.cos, np.sin))
    cosine, sine = cosine[:, None], sine[:, None]
    # Of differences, which are exact where a token is near: right to rounding there, and opposite.
    up, right = sine - s, cosine - c
    across = up * c - right * s
    across = jnp.where(jnp.abs(across) < 1e-15, jnp.asarray(1e-15, dtype), across)
    away = jnp.maximum(right**2 + up**2, across**2)  # 2 (1 - cos s)
    window = jnp.exp(-axis.kappa / 2 * away)
    return _signs(axis, dtype) * 2 * across / away, window, across


def _signs(axis: Axis, dtype) -> Array:
    return jnp.asarray((-1.0) ** np.arange(axis.size), dtype)[None]
