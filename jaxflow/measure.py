"""Measures: prompts as weighted point clouds, and samplers of their laws.

mu = sum_j w_j delta_{x_j},  w_j >= 0,  sum_j w_j = 1
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ._types import ArrayLike, LogWeights, Points, ScalarLike, accumulation_dtype, is_concrete


class Measure(eqx.Module):
    """An empirical probability measure mu = sum_j w_j delta_{x_j} on R^d.

    **Arguments:**

    - `points`: shape `(*batch, n, d)`. Leading axes are systems, or saved times.
    - `log_weights`: log w_j up to a constant, shape `(n,)` (shared by every system and time) or
      `(*batch, n)`. `-inf` is a token without mass (padding). `None` is the uniform weight 1/n.

    Indexing, iteration and `len` run over the leading axis: `sol.measures[-1]`.
    """

    points: Points
    log_weights: LogWeights | None = None

    def __init__(self, points: ArrayLike, log_weights: ArrayLike | None = None):
        points = jnp.asarray(points)
        if points.ndim < 2 or 0 in points.shape:
            raise ValueError(
                "points must have shape (*batch, n, d) with at least one token and one dimension; "
                f"got {points.shape}."
            )
        if not jnp.issubdtype(points.dtype, jnp.floating):
            raise TypeError(f"points must be floating point, got {points.dtype}. Cast them first.")
        if log_weights is not None:
            log_weights = jnp.asarray(log_weights)
            if log_weights.shape not in (points.shape[-2:-1], points.shape[:-1]):
                raise ValueError(
                    f"log_weights must have one entry a token, shape {points.shape[-2:-1]} or "
                    f"{points.shape[:-1]} for points {points.shape}; got {log_weights.shape}."
                )
            if not jnp.issubdtype(log_weights.dtype, jnp.floating):
                raise TypeError(f"log_weights must be floating point, got {log_weights.dtype}.")
        self.points = jnp.asarray(points, points.dtype)  # Never weakly typed.
        self.log_weights = log_weights

    @property
    def n(self) -> int:
        """The number of tokens."""
        return self.points.shape[-2]

    @property
    def d(self) -> int:
        """The dimension of a token."""
        return self.points.shape[-1]

    @property
    def log_probabilities(self) -> Float[Array, "*batch n"]:
        """log w_j, normalised to sum_j w_j = 1."""
        if self.log_weights is None:
            return jnp.full(
                self.points.shape[:-1], -np.log(self.n), accumulation_dtype(self.points.dtype)
            )
        logs = jax.nn.log_softmax(
            self.log_weights.astype(accumulation_dtype(self.points.dtype)), axis=-1
        )
        return jnp.broadcast_to(logs, self.points.shape[:-1])

    @property
    def weights(self) -> Float[Array, "*batch n"]:
        """w_j, with sum_j w_j = 1."""
        return jnp.exp(self.log_probabilities)

    def __len__(self) -> int:
        self._check_leading()
        return self.points.shape[0]

    def __getitem__(self, index: Any) -> "Measure":
        self._check_leading()
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range: the leading axis has {len(self)}.")
        index = np.asarray(index) if isinstance(index, list) else index
        if self.log_weights is None or self.log_weights.ndim == 1:
            return Measure(self.points[index], self.log_weights)
        return Measure(self.points[index], self.log_weights[index])

    def _check_leading(self):
        if self.points.ndim == 2:
            raise TypeError(
                "this measure has no leading axis of times or systems to index; "
                "index `measure.points` for its tokens."
            )

    def expectation(self, fn: Callable[[Float[Array, " d"]], Array]) -> Array:
        """E_mu[fn(x)] = sum_j w_j fn(x_j), for a function of one token."""
        values = self._map(fn)
        axis = self.points.ndim - 2
        weights = self.weights.astype(values.dtype)
        weights = weights.reshape(weights.shape + (1,) * (values.ndim - axis - 1))
        return (weights * values).sum(axis=axis)

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        """m = E_mu[x]."""
        return jnp.einsum("...n,...nd->...d", self.weights.astype(self.points.dtype), self.points)

    @property
    def covariance(self) -> Float[Array, "*batch d d"]:
        """E_mu[(x - m)(x - m)^T]."""
        centred = self.points - self.mean[..., None, :]
        weights = self.weights.astype(self.points.dtype)
        return jnp.einsum("...n,...ni,...nj->...ij", weights, centred, centred)

    def push_forward(self, fn: Callable[[Float[Array, " d"]], Float[Array, " k"]]) -> "Measure":
        """fn_# mu: the law of fn(x), for a map of one token."""
        return Measure(self._map(fn), self.log_weights)

    def _map(self, fn: Callable) -> Array:
        for _ in range(self.points.ndim - 1):
            fn = jax.vmap(fn)
        return fn(self.points)


# ------------------------------------------------------------------ samplers


def uniform_sphere(n: int, d: int, *, key: PRNGKeyArray, radius: float = 1.0) -> Measure:
    """n independent uniform points on the sphere of that radius in R^d."""
    _check_sizes(n=n, d=d)
    x = jax.random.normal(key, (n, d))
    return Measure(radius * x / jnp.linalg.norm(x, axis=1, keepdims=True))


def gaussian(
    n: int,
    d: int,
    *,
    key: PRNGKeyArray,
    mean: ArrayLike | float = 0.0,
    covariance: ArrayLike | float = 1.0,
) -> Measure:
    """n independent points of N(mean, covariance) on R^d.

    `mean` is a number or `(d,)`; `covariance` a variance or a symmetric matrix `(d, d)`.
    """
    _check_sizes(n=n, d=d)
    z = jax.random.normal(key, (n, d))
    covariance = jnp.asarray(covariance, z.dtype)
    if covariance.ndim == 0:
        x = jnp.sqrt(covariance) * z
    else:
        if covariance.shape != (d, d):
            raise ValueError(
                f"covariance must be a number or shape {(d, d)}, got {covariance.shape}."
            )
        x = z @ jnp.linalg.cholesky(covariance).T
    return Measure(jnp.broadcast_to(jnp.asarray(mean, z.dtype), (n, d)) + x)


def von_mises_fisher(
    n: int, mean: ArrayLike, concentration: ScalarLike, *, key: PRNGKeyArray
) -> Measure:
    """n independent points of the density proportional to exp(kappa <m, x>) on the unit sphere.

    Wood's rejection sampler (Simulation of the von Mises Fisher distribution, 1994), each point
    rejected on its own until it is accepted.

    **Arguments:** `mean`, the direction m, shape `(d,)` with d >= 2, of any length but zero;
    `concentration`, kappa > 0.
    """
    axis = jnp.asarray(mean, float)
    if axis.ndim != 1 or axis.shape[0] < 2:
        raise ValueError(f"mean must be a direction of shape (d,), d >= 2; got {axis.shape}.")
    _check_sizes(n=n, d=axis.shape[0])
    axis = axis / jnp.linalg.norm(axis)
    kappa = jnp.asarray(concentration, axis.dtype)
    cosine, tangent = _wood(n, axis, kappa, key)
    sine = jnp.sqrt((1 - cosine) * (1 + cosine))
    return Measure(cosine[:, None] * axis[None] + sine[:, None] * tangent)


@partial(jax.jit, static_argnums=0)
def _wood(n: int, axis: Array, kappa: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
    """Cosines to the axis by Wood's rejection, and unit vectors uniform orthogonal to it."""
    d = axis.shape[0]
    # b = (sqrt(4 kappa^2 + (d-1)^2) - 2 kappa) / (d-1), without the cancellation.
    b = (d - 1) / (jnp.sqrt(4 * kappa**2 + (d - 1) ** 2) + 2 * kappa)
    x0 = (1 - b) / (1 + b)
    c = kappa * x0 + (d - 1) * jnp.log1p(-(x0**2))
    key_cosine, key_tangent = jax.random.split(key)

    def propose(carry):
        key, cosine, done = carry
        key, key_beta, key_uniform = jax.random.split(key, 3)
        z = jax.random.beta(key_beta, (d - 1) / 2, (d - 1) / 2, (n,), axis.dtype)
        w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        log_u = jnp.log(jax.random.uniform(key_uniform, (n,), axis.dtype))
        accepted = kappa * w + (d - 1) * jnp.log1p(-x0 * w) - c >= log_u
        return key, jnp.where(accepted & ~done, w, cosine), done | accepted

    start = key_cosine, jnp.zeros(n, axis.dtype), jnp.zeros(n, bool)
    _, cosine, _ = jax.lax.while_loop(lambda carry: ~carry[2].all(), propose, start)
    tangent = jax.random.normal(key_tangent, (n, d), axis.dtype)
    for _ in range(2):  # Once leaves a part along the axis where the draw is close to it.
        tangent = tangent - (tangent @ axis)[:, None] * axis[None]
        tangent = tangent / jnp.linalg.norm(tangent, axis=1, keepdims=True)
    return cosine, tangent


def circle(n: int, *, phase: ScalarLike = 0.0) -> Measure:
    """n equispaced points on the unit circle, the first at the angle `phase` (radians)."""
    _check_sizes(n=n)
    return from_angles(phase + 2 * jnp.pi * jnp.arange(n, dtype=float) / n)


def from_angles(angles: ArrayLike) -> Measure:
    """The points (cos a, sin a) of the unit circle, for angles in radians, shape `(*batch, n)`."""
    angles = jnp.asarray(angles, float)
    return Measure(jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1))


def simplex(n: int, d: int, rho: ScalarLike = 0.0) -> Measure:
    """n unit vectors in R^d with <x_i, x_j> = rho for all i != j.

    They exist for d >= n and -1/(n-1) <= rho <= 1 (and for d = n - 1 at rho = -1/(n-1)): the rows
    of sqrt(1 - rho) (I - J/n) + sqrt((1 + (n-1) rho)/n) J/sqrt(n), J the matrix of ones.
    """
    _check_sizes(n=n, d=d)
    rho = jnp.asarray(rho, float)
    lowest = -1 / (n - 1) if n > 1 else -1.0
    tolerance = 100 * float(jnp.finfo(rho.dtype).eps)
    regular = False
    if is_concrete(rho):
        if not lowest - tolerance <= rho <= 1:
            raise ValueError(f"{n} unit vectors need {lowest:.6g} <= rho <= 1, got {rho}.")
        regular = bool(abs(rho - lowest) <= tolerance)
    if d < n - regular:
        raise ValueError(
            f"{n} unit vectors with inner products {rho} span {n - regular} dimensions; got d={d}."
        )
    ones = jnp.full((n, n), 1 / n, rho.dtype)
    along = jnp.sqrt(jnp.maximum(0, 1 + (n - 1) * rho))
    x = jnp.sqrt(1 - rho) * (jnp.eye(n, dtype=rho.dtype) - ones) + along * ones
    if d >= n:
        return Measure(jnp.pad(x, ((0, 0), (0, d - n))))
    # The regular simplex spans the hyperplane orthogonal to 1: coordinates in a basis of it.
    basis = jnp.linalg.qr(jnp.concatenate([jnp.ones((n, 1), rho.dtype), jnp.eye(n)[:, :-1]], 1))[0]
    return Measure(x @ basis[:, 1:])


def kuramoto(n: int, order_parameter: ScalarLike, *, phase: ScalarLike = 0.0) -> Measure:
    """n quantiles of the Poisson kernel on the circle, with order parameter |E e^{i a}| = r.

    The density (1 - r^2) / (2 pi (1 - 2 r cos a + r^2)) is the invariant family of the Kuramoto
    model (Ott and Antonsen 2008). Its quantile function is a = 2 arctan((1-r)/(1+r) tan(pi (u -
    1/2))), here at the midpoints u = (j + 1/2)/n.
    """
    _check_sizes(n=n)
    r = jnp.asarray(order_parameter, float)
    if is_concrete(r) and not 0 <= r < 1:
        raise ValueError(f"an order parameter must lie in [0, 1), got {r}.")
    u = (jnp.arange(n, dtype=float) + 0.5) / n - 0.5
    angles = 2 * jnp.arctan((1 - r) / (1 + r) * jnp.tan(jnp.pi * u))
    return from_angles(phase + angles)


def from_text(
    text: str,
    d: int,
    *,
    key: PRNGKeyArray,
    position_scale: float = 0.5,
    max_tokens: int | None = None,
) -> tuple[Measure, list[str]]:
    """The measure of a prompt: one token a word or punctuation mark.

        x_j = (e(word_j) + position_scale p_j) / |e(word_j) + position_scale p_j|

    e is a random embedding (equal words have equal vectors, Gaussian in R^d before normalisation)
    and p_j the sinusoidal position code of Vaswani et al. 2017, both of unit length.

    **Returns:** the measure, uniform on the tokens, and the tokens as strings.
    """
    _check_sizes(d=d)
    tokens = re.findall(r"\w+|[^\w\s]", text)[:max_tokens]
    if not tokens:
        raise ValueError("the text has no token: it must hold at least one word or mark.")
    vocabulary, index = np.unique([t.lower() for t in tokens], return_inverse=True)
    table = jax.random.normal(key, (len(vocabulary), d))
    table = table / jnp.linalg.norm(table, axis=1, keepdims=True)
    rates = 10000.0 ** (-jnp.arange(0, d, 2, dtype=float) / d)
    angles = jnp.arange(len(tokens), dtype=float)[:, None] * rates[None]
    code = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(len(tokens), -1)[:, :d]
    x = table[index] + position_scale * code / jnp.linalg.norm(code, axis=1, keepdims=True)
    return Measure(x / jnp.linalg.norm(x, axis=1, keepdims=True)), tokens


def from_image(image: ArrayLike, patch: int, *, unit: bool = True) -> Measure:
    """The measure of an image's patches: tokens in raster order.

    **Arguments:**

    - `image`: shape `(height, width)` or `(height, width, channels)`; both sides multiples of
      `patch` (crop or pad it first).
    - `patch`: the side of a square patch in pixels, so d = patch^2 channels.
    - `unit`: centre each patch by the mean over all and put it on the unit sphere. A patch equal
      to the mean has no direction and becomes the first coordinate vector.
    """
    pixels = jnp.asarray(image, float)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3:
        raise ValueError(
            f"an image must have shape (height, width[, channels]), got {pixels.shape}."
        )
    h, w, c = pixels.shape
    if patch < 1 or h % patch or w % patch:
        raise ValueError(f"the sides of the image {(h, w)} must be multiples of patch = {patch}.")
    x = pixels.reshape(h // patch, patch, w // patch, patch, c).swapaxes(1, 2)
    x = x.reshape(-1, patch * patch * c)
    if not unit:
        return Measure(x)
    x = x - x.mean(axis=0, keepdims=True)
    length = jnp.linalg.norm(x, axis=1, keepdims=True)
    axis = jnp.zeros(x.shape[1], x.dtype).at[0].set(1)
    return Measure(jnp.where(length > 0, x / jnp.where(length > 0, length, 1), axis[None]))


def _check_sizes(**sizes: int):
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
