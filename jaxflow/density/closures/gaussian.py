"""Gaussian laws N(m, S) on R^d under attention (Castin, Ablin, Carrillo, Peyré, arXiv 2501.18322).

Where X[N(m, S)](x) = V (c + M (x - m)) is affine, N(m, S) stays Gaussian, with

    m' = V c,    S' = V M S + S M^T V^T

With A = beta K^T Q, so that beta <Q x, K y> = <A x, y>, the law mu_x of attention is Gaussian:

    softmax   exp(<A x, y>) tilts N(m, S) to N(m + S A x, S):         c = m + S A m,  M = S A
    linear    E[y <A x, y>] = (S + m m^T) A x:                        c = T A m,      M = T A
    L2        exp(-beta |Q x - K y|^2 / 2), with B = beta K^T K:      T = S + m m^T
              N(C (S^{-1} m + A x), C),  C = (S^{-1} + B)^{-1}:       c = N (m + S A m),  M = N S A
    Sinkhorn  the coupling of N(m, S) with itself of density          N = (I + S B)^{-1}
              proportional to exp(<A x, y> + f(x) + g(y)):            c = m,  M below

The coupling has blocks S, and G = Cov(y, x) = M S off the diagonal. Minus the block of its inverse
there is A = (S - M S M^T)^{-1} M. With S = R^2, K = R A R and M = R N R^{-1} this is
(I - N N^T) K = N. K and N have the same singular vectors, and singular values s and d with
(1 - d^2) s = d:

    N = 2 (I + (I + 4 K K^T)^{1/2})^{-1} K
"""

import abc
import math
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..._rules import finite, instance, known, positive, real, reals
from ..._types import ArrayLike, ScalarLike
from ...fields import L2, Linear, SelfAttention, Sinkhorn, Softmax
from ...geometry import Euclidean
from ...measure import Measure
from .base import AbstractClosure


class Moments(NamedTuple):
    """The parameters of N(m, S): the mean `(d,)` and the covariance `(d, d)`."""

    mean: Float[Array, "*times d"]
    covariance: Float[Array, "*times d d"]

    @classmethod
    def of(cls, mu: Measure) -> "Moments":
        """Those of a measure."""
        return cls(mu.mean, mu.covariance)

    def log_density(self, x: Float[Array, " d"]) -> Float[Array, ""]:
        """log of the density of N(m, S) at a point."""
        logs = jax.scipy.stats.multivariate_normal.logpdf(x, self.mean, self.covariance)
        return jnp.asarray(logs)


class AbstractGaussianClosure(AbstractClosure):
    """(m, S)' under a field that is affine at a Gaussian law."""

    value: eqx.AbstractVar[Float[Array, "d d"]]

    @abc.abstractmethod
    def affine(self, z: Moments) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
        """c and M of E_{mu_x}[y] = c + M (x - m)."""

    def __call__(self, z: Moments) -> Moments:
        centre, slope = self.affine(z)
        growth = _product(self.value, slope, z.covariance)
        return Moments(_product(self.value, centre), growth + growth.T)

    def check(self, z: Any) -> None:
        instance("z0", z, Moments, "jaxflow.density.closures.Moments(mean, covariance)")
        d = len(self.value)
        shapes = tuple(np.shape(a) for a in z)
        if shapes != ((d,), (d, d)):
            raise ValueError(
                f"z0 must have a mean of shape {(d,)} and a covariance of shape {(d, d)}, as the "
                f"matrices of the closure ask; got {shapes[0]} and {shapes[1]}."
            )
        covariance = known(z.covariance)
        if covariance is not None and not _is_covariance(covariance):
            raise ValueError(
                f"the covariance of z0 must be symmetric and positive definite, got {covariance}."
            )


class SoftmaxGaussian(AbstractGaussianClosure):
    """m' = V (I + S A) m,  S' = V S A S + S A^T S V^T: softmax attention.

    With A = a I and V = v I, S(t) = (S(0)^{-1} - 2 v a t)^{-1}, which is infinite at
    t = 1 / (2 v a |S(0)|) for v a > 0.

    **Arguments:** `matrix`, A = beta K^T Q, and `value`, V, shape `(d, d)`.

    **Raises:** `ValueError` or `TypeError` for what are no such matrices.
    """

    matrix: Float[Array, "d d"]
    value: Float[Array, "d d"]

    def __init__(self, matrix: ArrayLike, value: ArrayLike):
        self.matrix, self.value = _square(matrix, value)

    def affine(self, z):
        slope = _product(z.covariance, self.matrix)
        return z.mean + _product(slope, z.mean), slope


class LinearGaussian(AbstractGaussianClosure):
    """m' = V T A m,  S' = V T A S + S A^T T V^T,  T = S + m m^T: linear attention.

    The moments of any law move so, Gaussian or not.

    **Arguments:** `matrix`, A = beta K^T Q, and `value`, V, shape `(d, d)`.

    **Raises:** `ValueError` or `TypeError` for what are no such matrices.
    """

    matrix: Float[Array, "d d"]
    value: Float[Array, "d d"]

    def __init__(self, matrix: ArrayLike, value: ArrayLike):
        self.matrix, self.value = _square(matrix, value)

    def affine(self, z):
        second = z.covariance + z.mean[:, None] * z.mean[None]
        slope = _product(second, self.matrix)
        return _product(slope, z.mean), slope


class L2Gaussian(AbstractGaussianClosure):
    """m' = V N (I + S A) m,  S' = V N S A S + its transpose,  N = (I + S B)^{-1}: L2 attention,
    mu_x(dy) proportional to exp(-beta |Q x - K y|^2 / 2) mu(dy), A = beta K^T Q, B = beta K^T K.

    **Arguments:** `query`, `key`: Q and K, shape `(p, d)`; `value`: V, shape `(d, d)`; `beta`.

    **Raises:** `ValueError` or `TypeError` for what are no such matrices, or beta not positive.
    """

    matrix: Float[Array, "d d"]
    gram: Float[Array, "d d"]
    value: Float[Array, "d d"]

    def __init__(
        self, query: ArrayLike, key: ArrayLike, value: ArrayLike, *, beta: ScalarLike = 1.0
    ):
        query, key = reals("query", query), reals("key", key)
        if query.ndim != 2 or query.shape != key.shape:
            raise ValueError(
                f"query and key must have one shape (p, d), got {query.shape} and {key.shape}."
            )
        beta = real("beta", beta, "positive and finite", positive).astype(query.dtype)
        self.matrix, self.value = _square(beta * _product(key.T, query), value)
        self.gram = beta * _product(key.T, key)

    def affine(self, z):
        tilted = _product(z.covariance, self.matrix)
        system = jnp.eye(len(tilted), dtype=tilted.dtype) + _product(z.covariance, self.gram)
        centre = z.mean + _product(tilted, z.mean)
        both = jnp.linalg.solve(system, jnp.concatenate([centre[:, None], tilted], axis=1))
        return both[:, 0], both[:, 1:]


class SinkhornGaussian(AbstractGaussianClosure):
    """m' = V m,  S' = V R N R + R N^T R V^T,  R = S^{1/2},  N = 2 (I + (I + 4 K K^T)^{1/2})^{-1} K,
    K = R A R: doubly stochastic attention. |N| < 1, so that nothing blows up.

    Derivatives through it ask for distinct eigenvalues of S and K K^T.

    **Arguments:** `matrix`, A = beta K^T Q, and `value`, V, shape `(d, d)`.

    **Raises:** `ValueError` or `TypeError` for what are no such matrices.
    """

    matrix: Float[Array, "d d"]
    value: Float[Array, "d d"]

    def __init__(self, matrix: ArrayLike, value: ArrayLike):
        self.matrix, self.value = _square(matrix, value)

    def affine(self, z):
        root = _of_symmetric(jnp.sqrt, z.covariance)
        inner = _product(root, self.matrix, root)
        ratio = _of_symmetric(lambda s: 2 / (1 + jnp.sqrt(1 + 4 * s)), _product(inner, inner.T))
        inverse = _of_symmetric(lambda s: 1 / jnp.sqrt(s), z.covariance)
        return z.mean, _product(root, ratio, inner, inverse)


def gaussian(field: SelfAttention, d: int) -> AbstractGaussianClosure:
    """The closure of attention on R^d for Gaussian laws.

    **Arguments:** `field`, with the interaction `Softmax()`, `Linear()`, `L2()` or `Sinkhorn()`
    and `geometry=Euclidean()`, without masks; `d`, the dimension.

    **Returns:** a `SoftmaxGaussian`, `LinearGaussian`, `L2Gaussian` or `SinkhornGaussian`, with the
    matrices of the field, `(d, d)`.

    **Raises:** `TypeError` or `ValueError` for other fields, under which no Gaussian law stays one.

    ```python
    >>> from jaxflow.density import closures
    >>> field = jaxflow.SelfAttention(beta=0.5, geometry=jaxflow.Euclidean())
    >>> z0 = closures.Moments(jnp.zeros(2), jnp.eye(2))
    >>> blow_up = closures.until_blow_up()
    >>> sol = closures.evolve(closures.gaussian(field, 2), z0, t1=9.0, event=blow_up)
    >>> round(float(sol.ts[-1]), 2)  # 1 / (2 v a)
    1.0

    ```
    """
    instance("field", field, SelfAttention, "jaxflow.SelfAttention(geometry=jaxflow.Euclidean())")
    masks = field.causal, field.window, field.mask
    if not isinstance(field.geometry, Euclidean) or masks != (False, None, None):
        raise ValueError(
            "Gaussian laws stay Gaussian under attention on R^d without masks; got a field on "
            f"{field.geometry} with (causal, window, mask) = {masks}. Pass "
            "geometry=jaxflow.Euclidean() and no mask."
        )
    eye = jnp.eye(d, dtype=field.beta.dtype)
    query, key, value = (_matrix(a, eye) for a in (field.query, field.key, field.value))
    if isinstance(field.interaction, L2):
        return L2Gaussian(query, key, value, beta=field.beta)
    matrix = field.beta * _product(key.T, query)
    for interaction, closure in (
        (Softmax, SoftmaxGaussian), (Linear, LinearGaussian), (Sinkhorn, SinkhornGaussian),
    ):  # fmt: skip
        if isinstance(field.interaction, interaction):
            return closure(matrix, value)
    raise TypeError(
        f"{type(field.interaction).__name__} attention keeps no Gaussian law: pass Softmax(), "
        "Linear(), L2() or Sinkhorn()."
    )


def _matrix(value: Any, eye: Array) -> Array:
    if callable(value):
        raise ValueError(f"a Gaussian law stays one under matrices alone, got the map {value!r}.")
    return eye if value is None else value


def until_blow_up(bound: ScalarLike | None = None) -> diffrax.Event:
    """Stops at the first step at which tr S is above `bound`: there S' grows like S^2, and what is
    left until S is infinite is of the size 1 / bound.

    **Arguments:** `bound`; `None` is 1 / sqrt(epsilon): 7e7 in float64, 3e3 in float32.

    **Returns:** a diffrax event, for the flow of a Gaussian law.

    **Raises:** `ValueError` or `TypeError` where it is not positive.

    ```python
    >>> from jaxflow.density import closures
    >>> closure = closures.LinearGaussian(jnp.eye(1), jnp.eye(1))
    >>> start = closures.Moments(jnp.zeros(1), jnp.eye(1))
    >>> stop = closures.until_blow_up()
    >>> sol = closures.evolve(closure, start, t1=1.0, event=stop)  # doctest: +SKIP

    ```
    """
    if bound is None:
        bound = 1 / math.sqrt(jnp.finfo(jnp.zeros(()).dtype).eps)
    return diffrax.Event(_Passed(real("bound", bound, "positive and finite", positive)))


class _Passed(eqx.Module):
    bound: Float[Array, ""]

    def __call__(self, t: Any, y: Moments, args: Any, **_: Any) -> Array:
        return jnp.trace(y.covariance) > self.bound.astype(y.covariance.dtype)


# ------------------------------------------------------------------ pieces


def _product(*matrices: Array) -> Array:
    out = matrices[0]
    for matrix in matrices[1:]:
        out = jnp.matmul(out, matrix, precision="highest")
    return out


def _of_symmetric(fn, matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """A function of a symmetric matrix, by its eigenvalues."""
    values, vectors = jnp.linalg.eigh(matrix)
    return _product(vectors * fn(values)[None], vectors.T)


def _square(matrix: ArrayLike, value: ArrayLike) -> tuple[Array, Array]:
    matrix, value = reals("matrix", matrix), reals("value", value)
    if matrix.ndim != 2 or len({*matrix.shape, *value.shape}) > 1 or value.ndim != 2:
        raise ValueError(
            f"matrix and value must have one shape (d, d), got {matrix.shape} and {value.shape}."
        )
    return finite("matrix", matrix), value


def _is_covariance(matrix: np.ndarray) -> bool:
    slack = 1e-5 * np.abs(matrix).max()  # entries may have been rounded to float32
    symmetric = np.allclose(matrix, matrix.T, rtol=0, atol=slack)
    return symmetric and bool(np.linalg.eigvalsh(matrix)[0] > 0)
