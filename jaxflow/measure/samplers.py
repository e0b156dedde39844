"""Samplers of measures."""

import re
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._memory import check_fits
from .._rules import (
    array,
    count,
    instance,
    known,
    not_negative,
    positive,
    prng_key,
    real,
    reals,
)
from .._types import ArrayLike, ScalarLike
from .base import Measure


def uniform_sphere(n: int, d: int, *, key: PRNGKeyArray, radius: float = 1.0) -> Measure:
    """n independent uniform points on the sphere of that radius in R^d.

    **Arguments:** `n`, `d`: the number of points and their dimension, at least 1; `key`: a PRNG
    key; `radius`: of the sphere, positive.

    **Returns:** a measure with points `(n, d)` and equal weights.

    **Raises:** `ValueError` or `TypeError` for sizes below 1, a radius that is not positive, and
    what is no key; `MemoryError` where the points do not fit.

    ```python
    >>> mu = jaxflow.measure.uniform_sphere(512, 3, key=jax.random.key(0))
    >>> mu.points.shape
    (512, 3)

    ```
    """
    n, d = _sizes(n, d)
    real("radius", radius, "positive and finite", positive)
    prng_key(key)
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

    **Arguments:** `n`, `d`: the number of points and their dimension, at least 1; `key`: a PRNG
    key; `mean`: a number for all coordinates, or a vector `(d,)`; `covariance`: a variance for all
    coordinates, at least 0, or a positive definite matrix `(d, d)`.

    **Returns:** a measure with points `(n, d)` and equal weights.

    **Raises:** `ValueError` or `TypeError` for bad sizes, means, covariances and keys;
    `MemoryError` where the points do not fit.

    ```python
    >>> mu = jaxflow.measure.gaussian(100, 2, key=jax.random.key(0), covariance=0.25)
    >>> mu.points.shape
    (100, 2)

    ```
    """
    n, d = _sizes(n, d)
    prng_key(key)
    mean, covariance = reals("mean", mean), reals("covariance", covariance)
    if mean.shape not in ((), (d,)):
        raise ValueError(f"mean must be a number or shape {(d,)}, got {mean.shape}.")
    _check_covariance(known(covariance))
    z = jax.random.normal(key, (n, d))
    covariance = covariance.astype(z.dtype)
    if covariance.ndim == 0:
        x = jnp.sqrt(covariance) * z
    else:
        if covariance.shape != (d, d):
            raise ValueError(
                f"covariance must be a number or shape {(d, d)}, got {covariance.shape}."
            )
        x = z @ jnp.linalg.cholesky(covariance).T
    return Measure(jnp.broadcast_to(mean.astype(z.dtype), (n, d)) + x)


def _check_covariance(covariance: np.ndarray | None):
    """What is known of a covariance: a variance, or a symmetric matrix of full rank."""
    if covariance is None:
        return
    if covariance.ndim == 0:
        real("covariance", covariance, "at least 0", not_negative)
        return
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"covariance must be a number or shape (d, d), got {covariance.shape}.")
    wide = covariance.astype(float)
    slack = 1e-5 * np.abs(wide).max()  # entries may have been rounded to float32
    if not np.allclose(wide, wide.T, rtol=0, atol=slack):
        raise ValueError(f"covariance must be a symmetric matrix, got {covariance}.")
    least = np.linalg.eigvalsh(wide)[0]
    if not least > 0:
        raise ValueError(
            f"covariance must be positive definite, its least eigenvalue is {least:.3g}. Add a "
            "small multiple of the identity, or push a Gaussian of lower dimension forward."
        )


def von_mises_fisher(
    n: int, mean: ArrayLike, concentration: ScalarLike, *, key: PRNGKeyArray
) -> Measure:
    """n independent points of the density proportional to exp(kappa <m, x>) on the unit sphere.

    Wood's rejection sampler (Simulation of the von Mises Fisher distribution, 1994), each point
    rejected on its own until it is accepted.

    **Arguments:** `n`, the number of points; `mean`, the direction m, shape `(d,)` with d >= 2, of
    any length but zero; `concentration`, kappa >= 0 (0 is the uniform law); `key`, a PRNG key.

    **Returns:** a measure with points `(n, d)` and equal weights.

    **Raises:** `ValueError` or `TypeError` for a mean without direction, a concentration that is
    negative or not finite, bad sizes and keys; `MemoryError` where the points do not fit.

    ```python
    >>> pole = jnp.array([0.0, 0.0, 1.0])
    >>> mu = jaxflow.measure.von_mises_fisher(100, pole, 50.0, key=jax.random.key(0))
    >>> bool(mu.mean @ pole > 0.9)
    True

    ```
    """
    axis = reals("mean", mean)
    if axis.ndim != 1 or axis.shape[0] < 2:
        raise ValueError(f"mean must be a direction of shape (d,), d >= 2; got {axis.shape}.")
    n, _ = _sizes(n, axis.shape[0])
    prng_key(key)
    rule = "from 0 up to 1e30; for a negative one pass -mean"
    kappa = real("concentration", concentration, rule, lambda kappa: 0 <= kappa < 1.01e30)
    where = known(axis)
    if where is not None and not where.any():
        raise ValueError(f"mean must have a direction, got {where}.")
    # Squares of the longest and shortest vectors would overflow or vanish.
    axis = axis / jnp.abs(axis).max()
    axis = axis / jnp.linalg.norm(axis)
    away, tangent = _wood(n, axis, kappa.astype(axis.dtype), key)
    sine = jnp.sqrt(away * (2 - away))
    return Measure((1 - away)[:, None] * axis[None] + sine[:, None] * tangent)


@partial(jax.jit, static_argnums=0)
def _wood(n: int, axis: Array, kappa: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
    """1 - cosine to the axis by Wood's rejection, and unit vectors uniform orthogonal to it.

    With the cosines w of proposals and x0 of their bound written 1 - s and 1 - s0, no number here
    cancels, however large kappa is. What is not a number is accepted, so that the loop ends.
    """
    d = axis.shape[0]
    # b = (sqrt(4 kappa^2 + (d-1)^2) - 2 kappa) / (d-1), and x0 = (1 - b) / (1 + b).
    b = (d - 1) / (jnp.hypot(2 * kappa, jnp.asarray(d - 1, kappa.dtype)) + 2 * kappa)
    x0, s0 = (1 - b) / (1 + b), 2 * b / (1 + b)
    key_away, key_tangent = jax.random.split(key)

    def propose(carry):
        key, away, done = carry
        key, key_beta, key_uniform = jax.random.split(key, 3)
        z = jax.random.beta(key_beta, (d - 1) / 2, (d - 1) / 2, (n,), axis.dtype)
        s = 2 * b * z / ((1 - z) + b * z)
        log_u = jnp.log(jax.random.uniform(key_uniform, (n,), axis.dtype))
        # log((1 - x0 w) / (1 - x0^2)), where 1 - x0^2 = 2 s0 / (1 + b)
        ratio = jnp.log((s0 + x0 * s) * (1 + b) / (2 * s0))
        accepted = ~(kappa * (s0 - s) + (d - 1) * ratio < log_u)
        return key, jnp.where(accepted & ~done, s, away), done | accepted

    start = key_away, jnp.zeros(n, axis.dtype), jnp.zeros(n, bool)
    _, away, _ = jax.lax.while_loop(lambda carry: ~carry[2].all(), propose, start)
    tangent = jax.random.normal(key_tangent, (n, d), axis.dtype)
    for _ in range(2):  # Once leaves a part along the axis where the draw is close to it.
        tangent = tangent - (tangent @ axis)[:, None] * axis[None]
        tangent = tangent / jnp.linalg.norm(tangent, axis=1, keepdims=True)
    return away, tangent


def circle(n: int, *, phase: ScalarLike = 0.0) -> Measure:
    """n equispaced points on the unit circle, the first at the angle `phase` (radians).

    **Arguments:** `n`: the number of points, at least 1; `phase`: in radians.

    **Returns:** a measure with points `(n, 2)` and equal weights, counterclockwise.

    **Raises:** `ValueError` or `TypeError` for n below 1 and a phase that is not finite;
    `MemoryError` where the points do not fit.

    ```python
    >>> mu = jaxflow.measure.circle(4)  # the mean of a square is its centre
    >>> bool(jnp.abs(mu.mean).max() < 1e-6)
    True

    ```
    """
    n, _ = _sizes(n, 2)
    phase = real("phase", phase)
    return from_angles(phase + 2 * jnp.pi * jnp.arange(n, dtype=float) / n)


def from_angles(angles: ArrayLike) -> Measure:
    """The points (cos a, sin a) of the unit circle, for angles in radians, shape `(*batch, n)`.

    **Arguments:** `angles`: in radians, shape `(*batch, n)`.

    **Returns:** a measure with points `(*batch, n, 2)` and equal weights.

    **Raises:** `ValueError` or `TypeError` for what is no array of finite angles.

    ```python
    >>> jaxflow.measure.from_angles([0.0]).points.tolist()
    [[1.0, 0.0]]

    ```
    """
    angles = reals("angles", angles)
    return Measure(jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1))


def simplex(n: int, d: int, rho: ScalarLike = 0.0) -> Measure:
    """n unit vectors in R^d with <x_i, x_j> = rho for all i != j.

    They exist for d >= n and -1/(n-1) <= rho <= 1 (and for d = n - 1 at rho = -1/(n-1)): the rows
    of sqrt(1 - rho) (I - J/n) + sqrt((1 + (n-1) rho)/n) J/sqrt(n), J the matrix of ones.

    **Arguments:** `n`: the number of vectors; `d`: their dimension; `rho`: the inner product of any
    two.

    **Returns:** a measure with points `(n, d)` and equal weights.

    **Raises:** `ValueError` or `TypeError` where there are no such vectors; `MemoryError` where
    they, or the matrix J, do not fit.

    ```python
    >>> mu = jaxflow.measure.simplex(3, 4, 0.5)
    >>> jaxflow.observables.inner_products(mu).round(3).tolist()
    [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]

    ```
    """
    n, d = count("n", n), count("d", d)
    _sizes(n, max(n, d))
    rho = real("rho", rho)
    lowest = -1 / (n - 1) if n > 1 else -1.0
    tolerance = 100 * float(jnp.finfo(rho.dtype).eps)
    regular = False
    cosine = known(rho)
    if cosine is not None:
        if not lowest - tolerance <= cosine <= 1:
            raise ValueError(f"{n} unit vectors need {lowest:.6g} <= rho <= 1, got {cosine}.")
        regular = bool(abs(cosine - lowest) <= tolerance)
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

    **Arguments:** `n`: the number of points, at least 1; `order_parameter`: r, in [0, 1); `phase`:
    the angle of their mean, in radians.

    **Returns:** a measure with points `(n, 2)` and equal weights.

    **Raises:** `ValueError` or `TypeError` for n below 1, an order parameter outside [0, 1) and a
    phase that is not finite; `MemoryError` where the points do not fit.

    ```python
    >>> mu = jaxflow.measure.kuramoto(1000, 0.5)
    >>> round(float(jaxflow.observables.order_parameter(mu)), 3)
    0.5

    ```
    """
    n, _ = _sizes(n, 2)
    phase = real("phase", phase)
    r = real("an order parameter", order_parameter, "in [0, 1)", lambda r: 0 <= r < 1)
    u = (jnp.arange(n, dtype=float) + 0.5) / n - 0.5
    angles = 2 * jnp.arctan((1 - r) / (1 + r) * jnp.tan(jnp.pi * u))
    return from_angles(phase + angles)


def from_text(
    text: str,
    d: int,
    *,
    key: PRNGKeyArray,
    position_scale: ScalarLike = 0.5,
    max_tokens: int | None = None,
) -> tuple[Measure, list[str]]:
    """The measure of a prompt: one token a word or punctuation mark.

        x_j = (e(word_j) + position_scale p_j) / |e(word_j) + position_scale p_j|

    e is a random embedding (equal words have equal vectors, Gaussian in R^d before normalisation)
    and p_j the sinusoidal position code of Vaswani et al. 2017, both of unit length.

    **Arguments:** `text`: a string; `d`: at least 2; `position_scale`: the length of p_j;
    `max_tokens`: how many tokens to take at most, from the start (`None`: all).

    **Returns:** the measure, uniform on the tokens, and the tokens as strings.

    **Raises:** `ValueError` or `TypeError` for a text without a token and bad arguments;
    `MemoryError` where the points do not fit.

    ```python
    >>> mu, words = jaxflow.measure.from_text("To be, or not.", 16, key=jax.random.key(0))
    >>> mu.points.shape, words
    ((6, 16), ['To', 'be', ',', 'or', 'not', '.'])

    ```
    """
    instance("text", text, str, "'a prompt'")
    count("d", d, 2)
    prng_key(key)
    position_scale = real("position_scale", position_scale)
    most = None if max_tokens is None else count("max_tokens", max_tokens)
    words = islice(re.finditer(r"\w+|[^\w\s]", text), most)
    tokens = [word.group() for word in words]
    if not tokens:
        raise ValueError("the text has no token: it must hold at least one word or mark.")
    _sizes(len(tokens), d)
    lower = [token.lower() for token in tokens]
    vocabulary = {word: k for k, word in enumerate(sorted(set(lower)))}
    index = np.array([vocabulary[word] for word in lower])
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

    **Returns:** a measure with points `(n, d)` and equal weights, n the number of patches.

    **Raises:** `ValueError` or `TypeError` for shapes that are no image, sides that are no
    multiples of `patch`, and pixels that are not finite (under `jit` such an image has no finite
    tokens).

    ```python
    >>> jaxflow.measure.from_image(jnp.eye(8), 4).points.shape  # four patches of 4 x 4
    (4, 16)

    ```
    """
    pixels = _pixels(image)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3:
        raise ValueError(
            f"an image must have shape (height, width[, channels]), got {pixels.shape}."
        )
    h, w, c = pixels.shape
    patch = count("patch", patch)
    if 0 in pixels.shape or h % patch or w % patch:
        raise ValueError(f"the sides of the image {(h, w)} must be multiples of patch = {patch}.")
    x = pixels.reshape(h // patch, patch, w // patch, patch, c).swapaxes(1, 2)
    x = x.reshape(-1, patch * patch * c)
    if not unit:
        return Measure(x)
    x = x - x.mean(axis=0, keepdims=True)
    length = jnp.linalg.norm(x, axis=1, keepdims=True)
    axis = jnp.zeros(x.shape[1], x.dtype).at[0].set(1)
    return Measure(jnp.where(length == 0, axis[None], x / jnp.where(length == 0, 1, length)))


def _sizes(n: Any, d: Any) -> tuple[int, int]:
    """The sizes of a measure that is drawn; it, and two arrays of its size, must fit."""
    n, d = count("n", n), count("d", d)
    check_fits(
        3 * n * d * jax.dtypes.canonicalize_dtype(float).itemsize,
        f"a measure of {n} tokens in dimension {d}",
        "Take fewer tokens or dimensions.",
    )
    return n, d


def _pixels(image: ArrayLike) -> Array:
    """The pixels in floating point; black and white ones are 0 and 1."""
    pixels = array("image", image)
    return reals("pixels", pixels.astype(float) if pixels.dtype == bool else pixels)
