"""Attention as a vector field.

    SelfAttention        X[mu](x) = P_x ( V E_{mu_x}[y] )                  mu_x by the interaction
    MultiHeadAttention   X[mu](x) = P_x ( sum_h O_h E_{mu_x^h}[V_h y] )

Divergence at fixed mu: with s(x, y) = beta <Q x, K y> and k' = beta Q^T K y its derivative in x,
D E_{mu_x}[v] = Cov_{mu_x}(v, k') for softmax, so tr DF = E[<k', v>] - <E[k'], E[v]> is one call of
the operation with the channels (v, k', <k', v>). On a submanifold with unit normals nu,

    div (P F) = tr DF - sum_nu <nu, DF nu> + correction      sphere: - (d-1) <x, F> / R^2

where DF nu is one tangent of the operation.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._types import ArrayLike, Scalar, ScalarLike, is_concrete
from ..geometry import AbstractGeometry, Euclidean, Sphere
from ..kernels.expectation import Window
from ..measure import Measure
from .base import AbstractDivergenceField
from .interactions import AbstractInteraction, Softmax, Tokens


class SelfAttention(AbstractDivergenceField):
    """Single-head self-attention dynamics (Geshkovski et al., arXiv 2312.10794, eq. 2.6).

        X[mu](x) = P_x ( V E_{mu_x}[y] ),    mu_x(dy) proportional to exp(beta <Q x, K y>) mu(dy)

    **Arguments:**

    - `query`, `key`: matrices Q and K, shape `(p, d)`; `None` is the identity and costs nothing.
    - `value`: the matrix V, shape `(d, d)`; `None` is the identity.
    - `beta`: the inverse temperature, a scalar; a change does not recompile.
    - `interaction`: `Softmax()`, `Unnormalised()`, `Linear()`, `Hardmax()` or `Sinkhorn(...)`.
    - `causal`, `window`, `backend`: as in [`jaxflow.softmax_expectation`][]. Masks compare the
      index of a query with the index of a token.
    - `geometry`: where the tokens live, and what P_x is.
    """

    query: Float[Array, "p d"] | None
    key: Float[Array, "p d"] | None
    value: Float[Array, "d d"] | None
    beta: Scalar
    interaction: AbstractInteraction
    causal: bool = eqx.field(static=True)
    window: Window = eqx.field(static=True)
    geometry: AbstractGeometry
    backend: str | None = eqx.field(static=True)

    def __init__(
        self,
        query: ArrayLike | None = None,
        key: ArrayLike | None = None,
        value: ArrayLike | None = None,
        *,
        beta: ScalarLike = 1.0,
        interaction: AbstractInteraction = Softmax(),
        causal: bool = False,
        window: Window = None,
        geometry: AbstractGeometry = Sphere(),
        backend: str | None = None,
    ):
        self.query = _matrix("query", query)
        self.key = _matrix("key", key)
        self.value = _matrix("value", value)
        self.beta = _temperature(beta)
        self.interaction = interaction
        self.causal = causal
        self.window = window
        self.geometry = geometry
        self.backend = backend

    def __check_init__(self):
        q, k, v = (None if a is None else a.shape for a in (self.query, self.key, self.value))
        rule = "query and key must have shape (p, d), value (d, d)"
        if v is not None and v[0] != v[1]:
            raise ValueError(f"{rule}; got value {v}.")
        if q is not None and k is not None and q != k:
            raise ValueError(f"{rule}; got query {q} and key {k}.")
        either = q or k
        # With one of the two the identity, the other must be square.
        if either and (q is None) != (k is None) and either[0] != either[1]:
            raise ValueError(f"{rule}; with the other one the identity, got {either}.")
        if v and either and either[1] != v[1]:
            raise ValueError(f"{rule}, on one dimension d; got {either} and value {v}.")

    def __call__(self, t, x, mu):
        return self.geometry.project(x, self._force(x, mu))

    def divergence(self, t, x, mu):
        force = partial(self._force, mu=mu)
        return _divergence(self.geometry, force, self._trace(x, mu), x)

    def tokens(self, mu: Measure) -> Tokens:
        """What the interaction sees of mu: Q y, K y, the log-weights and the mask."""
        y = mu.points
        queries, keys = _apply(self.query, y), _apply(self.key, y)
        return Tokens(queries, keys, mu.log_weights, self.causal, self.window, self.backend)

    def _force(self, x, mu):
        """F(x) = V E_{mu_x}[y]; V acts on whichever is fewer, tokens or queries."""
        _check_query(x, mu)
        q, tokens = _apply(self.query, x), self.tokens(mu)
        mean = self.interaction.expectation(q, tokens, mu.points, self.beta)
        return _apply(self.value, mean)

    def _trace(self, x, mu):
        q, tokens = _apply(self.query, x), self.tokens(mu)
        slopes = self.beta.astype(x.dtype) * _apply_transpose(self.query, tokens.keys)
        values = _apply(self.value, mu.points)
        return self.interaction.trace(q, tokens, values, slopes, self.beta)


class MultiHeadAttention(AbstractDivergenceField):
    """Multi-head attention of a transformer, as a field.

        X[mu](x) = P_x ( sum_h O_h E_{mu_x^h}[V_h y] )
        mu_x^h(dy) proportional to exp(beta <Q_h x, K_h y>) mu(dy)

    **Arguments:**

    - `dim`: the dimension d of a token; `heads`: H, a divisor of d. The head dimension is p = d/H.
    - `beta`: default 1/sqrt(p) (Vaswani et al. 2017).
    - `interaction`, `causal`, `window`, `geometry`, `backend`: as in [`jaxflow.SelfAttention`][].
    - `key`: PRNG key of the parameters: Q, K, V ~ N(0, 1/d), O ~ N(0, 1/d).

    The parameters are `query`, `key`, `value`, shape `(H, p, d)`, and `output`, shape `(H, d, p)`.
    """

    query: Float[Array, "H p d"]
    key: Float[Array, "H p d"]
    value: Float[Array, "H p d"]
    output: Float[Array, "H d p"]
    beta: Scalar
    interaction: AbstractInteraction
    causal: bool = eqx.field(static=True)
    window: Window = eqx.field(static=True)
    geometry: AbstractGeometry
    backend: str | None = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        beta: ScalarLike | None = None,
        interaction: AbstractInteraction = Softmax(),
        causal: bool = False,
        window: Window = None,
        geometry: AbstractGeometry = Euclidean(),
        backend: str | None = None,
        key: PRNGKeyArray,
    ):
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}.")
        p = dim // heads
        shapes = [(heads, p, dim)] * 3 + [(heads, dim, p)]
        keys = jax.random.split(key, 4)
        matrices = [
            jax.random.normal(k, s) / np.sqrt(dim) for k, s in zip(keys, shapes, strict=True)
        ]
        self.query, self.key, self.value, self.output = matrices
        self.beta = _temperature(1 / np.sqrt(p) if beta is None else beta)
        self.interaction = interaction
        self.causal = causal
        self.window = window
        self.geometry = geometry
        self.backend = backend

    def __call__(self, t, x, mu):
        return self.geometry.project(x, self._force(x, mu))

    def divergence(self, t, x, mu):
        force = partial(self._force, mu=mu)
        return _divergence(self.geometry, force, self._trace(x, mu), x)

    def _tokens(self, query, key, mu):
        queries, keys = _apply(query, mu.points), _apply(key, mu.points)
        return Tokens(queries, keys, mu.log_weights, self.causal, self.window, self.backend)

    def _force(self, x, mu):
        _check_query(x, mu)

        def head(query, key, value):
            q, tokens = _apply(query, x), self._tokens(query, key, mu)
            return self.interaction.expectation(q, tokens, _apply(value, mu.points), self.beta)

        means = jax.vmap(head)(self.query, self.key, self.value)
        return jnp.einsum("hmp,hdp->md", means, self.output.astype(x.dtype), precision="highest")

    def _trace(self, x, mu):
        def head(query, key, value, output):
            q, tokens = _apply(query, x), self._tokens(query, key, mu)
            slopes = self.beta.astype(x.dtype) * _apply_transpose(query, tokens.keys)
            values = _apply(output, _apply(value, mu.points))
            return self.interaction.trace(q, tokens, values, slopes, self.beta)

        return jax.vmap(head)(self.query, self.key, self.value, self.output).sum(axis=0)


# ------------------------------------------------------------------ pieces


def _divergence(geometry, force, trace, x):
    """div (P F) from tr DF, by the formula at the head of this file."""
    if isinstance(geometry, Euclidean):
        return trace
    for normal in geometry.normals(x):
        f, df = jax.jvp(force, (x,), (normal,))
        trace = trace - (normal * df).sum(axis=1)
    return trace + geometry.divergence_correction(x, f)


def _apply(matrix: Array | None, x: Float[Array, "n d"]):
    """x_j -> A x_j for each row."""
    if matrix is None:
        return x
    return jnp.matmul(x, matrix.astype(x.dtype).T, precision="highest")


def _apply_transpose(matrix: Array | None, x: Float[Array, "n p"]):
    return x if matrix is None else _apply(matrix.T, x)


def _matrix(name: str, value: ArrayLike | None):
    if value is None:
        return None
    matrix = jnp.asarray(value)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {matrix.shape}.")
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {matrix.dtype}. Cast it first.")
    return matrix


def _temperature(beta: ScalarLike):
    # A dtype of its own, never a weak one: a literal and an array then run the same program.
    beta = jnp.asarray(beta, beta.dtype if isinstance(beta, jax.Array) else float)
    if beta.shape != ():
        raise ValueError(f"beta must be a scalar, got shape {beta.shape}; jax.vmap runs over many.")
    if not jnp.issubdtype(beta.dtype, jnp.floating):
        raise TypeError(f"beta must be floating point, got {beta.dtype}.")
    if is_concrete(beta) and not np.isfinite(beta):
        raise ValueError(f"beta (the inverse temperature) must be finite, got {beta}.")
    return beta


def _check_query(x: Array, mu: Measure):
    if x.ndim != 2 or x.shape[1] != mu.d or mu.points.ndim != 2:
        raise ValueError(
            "a field takes query points (m, d) and a measure of points (n, d); got "
            f"{x.shape} and {mu.points.shape}. Batches go through jax.vmap or jaxflow.flow."
        )
