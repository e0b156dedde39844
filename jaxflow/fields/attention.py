"""Attention as a vector field.

    SelfAttention        X[mu](x) = P_x ( V E_{mu_x}[y] )                  mu_x by the interaction
    MultiHeadAttention   X[mu](x) = P_x ( sum_h O_h E_{mu_x^h}[V_h y] )

Divergence at fixed mu: with s(x, y) = beta <Q x, K y> and k' = beta Q^T K y its derivative in x,
D E_{mu_x}[v] = Cov_{mu_x}(v, k') for softmax, so tr DF = E[<k', v>] - <E[k'], E[v]> is one call of
the operation with the channels (v, k', <k', v>). On a submanifold with unit normals nu,

    div (P F) = tr DF - sum_nu <nu, DF nu> + correction      sphere: - (d-1) <x, F> / R^2

(in the inner product of the geometry) where DF nu is one tangent of the operation.
"""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import array, constant, count, finite, flag, instance, positive, prng_key, real
from .._types import ArrayLike, Scalar, ScalarLike, accumulation_dtype
from ..geometry import AbstractGeometry, Euclidean, Sphere
from ..kernels.base import Window, band
from ..masks import AbstractMask, Hierarchical, is_mask
from ..measure import Measure
from .base import (
    AbstractCausalField,
    AbstractDivergenceField,
    apply,
    divergence_by_derivatives,
    visible_log_weights,
)
from .biased import L2, ALiBi
from .interactions import AbstractInteraction, Hardmax, Softmax, Tokens

# A of x -> A x, a function x -> A(x) of a token, or the identity.
Map = Array | Callable | None


class SelfAttention(AbstractDivergenceField, AbstractCausalField):
    """Single-head self-attention dynamics (Geshkovski et al., arXiv 2312.10794, eq. 2.6).

        X[mu](x) = P_x ( V E_{mu_x}[y] ),    mu_x(dy) proportional to exp(beta <Q x, K y>) mu(dy)

    **Arguments:**

    - `query`, `key`: matrices Q and K, shape `(p, d)`; `None` is the identity and costs nothing.
    - `value`: the matrix V, shape `(d, d)`; `None` is the identity.
    - Each of the three may be a function of one token instead, such as an Equinox module from R^d
      to R^p, or to R^d for the value: then X[mu](x) = P_x E_{mu_x}[V(y)], with the scores
      beta <Q(x), K(y)>. The arrays of a module are parameters as matrices are.
    - `beta`: the inverse temperature, a scalar; a change does not recompile.
    - `interaction`: `Softmax()`, `Unnormalised()`, `Linear()`, `Hardmax()`, `Sinkhorn(...)`,
      `L2()`, `Sigmoid(bias)`, `ALiBi(slope)`, or one of your own, a
      `jaxflow.fields.AbstractInteraction`.
    - `causal`, `window`, `mask`, `backend`: as in `jaxflow.softmax_expectation`. They compare
      the index of a query with the index of a token; `mask=jaxflow.masks.TopK(k)` instead is top-k
      attention, softmax over the k largest scores of a query.
    - `geometry`: where the tokens live, and what P_x is.

    **Raises:** `ValueError` for shapes that do not fit and numbers that are not finite, `TypeError`
    for what is of another kind than these.

    ```python
    >>> mu = jaxflow.measure.circle(2)  # x and -x: each sees the other with weight 1 / (1 + e^2b)
    >>> jnp.abs(jaxflow.SelfAttention(beta=2.0)(0.0, mu.points, mu)).max() < 1e-6
    Array(True, dtype=bool)

    ```
    """

    query: Float[Array, "p d"] | Callable | None
    key: Float[Array, "p d"] | Callable | None
    value: Float[Array, "d d"] | Callable | None
    beta: Scalar
    interaction: AbstractInteraction
    causal: bool = eqx.field(static=True)
    window: Window = eqx.field(static=True)
    mask: AbstractMask | None = eqx.field(static=True)
    geometry: AbstractGeometry
    backend: str | None = eqx.field(static=True)

    def __init__(
        self,
        query: ArrayLike | Callable | None = None,
        key: ArrayLike | Callable | None = None,
        value: ArrayLike | Callable | None = None,
        *,
        beta: ScalarLike = 1.0,
        interaction: AbstractInteraction = Softmax(),
        causal: bool = False,
        window: Window = None,
        mask: AbstractMask | None = None,
        geometry: AbstractGeometry = Sphere(),
        backend: str | None = None,
    ):
        self.query = _map("query", query)
        self.key = _map("key", key)
        self.value = _map("value", value)
        self.beta = _temperature(beta)
        self.interaction = _interaction(interaction)
        self.causal = flag("causal", causal)
        self.window = _window(window)
        self.mask = is_mask(mask)
        self.geometry = _geometry(geometry)
        self.backend = _backend(backend)

    def __check_init__(self):
        _check_order(self.interaction, self.causal)
        q, k, v = (None if a is None or callable(a) else a.shape for a in self.maps)
        rule = "query and key must have shape (p, d), value (d, d)"
        if v is not None and v[0] != v[1]:
            raise ValueError(f"{rule}; got value {v}.")
        if q is not None and k is not None and q != k:
            raise ValueError(f"{rule}; got query {q} and key {k}.")
        either = q or k
        # With one of the two the identity, the other must be square.
        one = (self.query is None) != (self.key is None)
        if either and one and either[0] != either[1]:
            raise ValueError(f"{rule}; with the other one the identity, got {either}.")
        if v and either and either[1] != v[1]:
            raise ValueError(f"{rule}, on one dimension d; got {either} and value {v}.")

    def __call__(self, t, x, mu):
        return self.geometry.project(x, self._force(x, mu))

    def divergence(self, t, x, mu):
        # k' depends on the query for a hierarchy, and where Q is a function.
        simple = not (isinstance(self.mask, Hierarchical) or callable(self.query))
        if not simple or (trace := self._trace(x, mu)) is None:
            return divergence_by_derivatives(self, t, x, mu)
        return _divergence(self.geometry, partial(self._force, mu=mu), trace, x)

    def keys_values(self, t, y, start=0):
        """The tokens themselves."""
        return y

    def attend(self, t, x, keys_values, index):
        _check_attend(self.interaction, self.mask)
        left = None if self.window is None else band(True, self.window)[0]
        mu = Measure(keys_values, visible_log_weights(keys_values, index, left))
        tokens = self.tokens(mu)._replace(causal=False, window=None)
        return self.geometry.project(x, self._force(x, mu, tokens))

    def tokens(self, mu: Measure) -> Tokens:
        """What the interaction sees of mu: Q y, K y, the log-weights and the mask."""
        y = mu.points
        queries, keys = apply(self.query, y), apply(self.key, y)
        return Tokens(queries, keys, mu.log_weights, *self._masks, self.backend, mu.signs)

    @property
    def maps(self) -> tuple[Map, Map, Map]:
        """Q, K and V."""
        return self.query, self.key, self.value

    @property
    def _masks(self):
        return self.causal, self.window, self.mask

    def scores(self, mu: Measure) -> tuple[Scalar, tuple[Array, Array]]:
        """beta, and queries and keys of the tokens, `(1, n, p)`."""
        tokens = self.tokens(mu)
        return self.beta, (tokens.queries[None], tokens.keys[None])

    def _force(self, x, mu, tokens=None):
        """F(x) = V E_{mu_x}[y], a matrix V on the queries; or E_{mu_x}[V(y)]."""
        _check_query(x, mu)
        q, tokens = apply(self.query, x), tokens or self.tokens(mu)
        function = callable(self.value)
        values = apply(self.value, mu.points) if function else mu.points
        mean = self.interaction.expectation(q, tokens, values, self.beta)
        return mean if function else apply(self.value, mean)

    def _trace(self, x, mu):
        q, tokens = apply(self.query, x), self.tokens(mu)
        assert not callable(self.query)
        slopes = self.beta.astype(x.dtype) * _apply_transpose(self.query, tokens.keys)
        values = apply(self.value, mu.points)
        return self.interaction.trace(q, tokens, values, slopes, self.beta)


class MultiHeadAttention(AbstractDivergenceField, AbstractCausalField):
    """Multi-head attention of a transformer, as a field.

        X[mu](x) = P_x ( sum_h O_h E_{mu_x^h}[V_h y] )
        mu_x^h(dy) proportional to exp(beta <Q_h x, K_h y>) mu(dy)

    **Arguments:**

    - `dim`: the dimension d of a token; `heads`: H. `head_dim`: the head dimension p, by default
      d/H, for which H must divide d.
    - `kv_heads`: G, a divisor of H: grouped-query attention (Ainslie et al., arXiv 2305.13245), in
      which H/G heads after each other have the same K and V. Default H.
    - `bias`: affine maps Q_h x + b_h, likewise K, V and the output; the biases start at 0.
    - `beta`: a number or array is a parameter; `None` is the constant 1/sqrt(p)
      (Vaswani et al. 2017).
    - `rotary`: `None`, or the base of rotary position embeddings, usually 10000 (Su et al., arXiv
      2104.09864): the query and key of the token with index i are turned by the angles
      i base^{-2k/p}, k < p/2, in the planes (k, k + p/2). A tuple of p/2 numbers has the rates
      themselves in place of base^{-2k/p}.
    - `interaction`, `causal`, `window`, `mask`, `geometry`, `backend`: as in
      `jaxflow.SelfAttention`. Vectors `(H,)` inside an interaction, such as the slopes of
      `jaxflow.ALiBi`, have one number a head.
    - `key`: PRNG key of the parameters: Q, K, V ~ N(0, 1/d), O ~ N(0, 1/d).

    The parameters are `query`, shape `(H, p, d)`, `key` and `value`, shape `(G, p, d)`, `output`,
    shape `(H, d, p)`, and the biases of each, one vector `(H p,)`, `(G p,)` or `(d,)`, or `None`.

    **Raises:** `ValueError` for heads that do not divide the dimension, and numbers out of their
    range; `TypeError` for what is of another kind than these.

    ```python
    >>> field = jaxflow.MultiHeadAttention(8, 2, key=jax.random.key(0))
    >>> mu = jaxflow.measure.gaussian(5, 8, key=jax.random.key(1))
    >>> field(0.0, mu.points, mu).shape
    (5, 8)

    ```
    """

    query: Float[Array, "H p d"]
    key: Float[Array, "G p d"]
    value: Float[Array, "G p d"]
    output: Float[Array, "H d p"]
    query_bias: Float[Array, " Hp"] | None
    key_bias: Float[Array, " Gp"] | None
    value_bias: Float[Array, " Gp"] | None
    output_bias: Float[Array, " d"] | None
    beta: Scalar | None
    rotary: float | tuple[float, ...] | None = eqx.field(static=True)
    interaction: AbstractInteraction
    causal: bool = eqx.field(static=True)
    window: Window = eqx.field(static=True)
    mask: AbstractMask | None = eqx.field(static=True)
    geometry: AbstractGeometry
    backend: str | None = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        beta: ScalarLike | None = None,
        rotary: float | tuple[float, ...] | None = None,
        interaction: AbstractInteraction = Softmax(),
        causal: bool = False,
        window: Window = None,
        mask: AbstractMask | None = None,
        geometry: AbstractGeometry = Euclidean(),
        backend: str | None = None,
        key: PRNGKeyArray,
    ):
        dim, heads = count("dim", dim), count("heads", heads)
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}.")
        p = dim // heads if head_dim is None else count("head_dim", head_dim)
        groups = heads if kv_heads is None else count("kv_heads", kv_heads)
        if heads % groups:
            raise ValueError(f"kv_heads must divide heads, got {groups} and {heads}.")
        self.rotary = None if rotary is None else _rotary(rotary, p)
        shapes = [(heads, p, dim), (groups, p, dim), (groups, p, dim), (heads, dim, p)]
        keys = jax.random.split(prng_key(key), 4)
        matrices = [
            jax.random.normal(k, s) / np.sqrt(dim) for k, s in zip(keys, shapes, strict=True)
        ]
        self.query, self.key, self.value, self.output = matrices
        zeros = (heads * p, groups * p, groups * p, dim) if flag("bias", bias) else (None,) * 4
        biases = [None if n is None else jnp.zeros(n) for n in zeros]
        self.query_bias, self.key_bias, self.value_bias, self.output_bias = biases
        self.beta = None if beta is None else _temperature(beta)
        self.interaction = _interaction(interaction)
        self.causal = flag("causal", causal)
        self.window = _window(window)
        self.mask = is_mask(mask)
        self.geometry = _geometry(geometry)
        self.backend = _backend(backend)
        _check_order(self.interaction, self.causal)
        for vector in jax.tree.leaves(_per_head(self.interaction)[0]):
            if vector.shape != (heads,):
                raise ValueError(
                    f"the vectors of an interaction have one number a head, shape ({heads},); got "
                    f"{vector.shape} in {self.interaction}."
                )

    def __call__(self, t, x, mu):
        return self.geometry.project(x, self._force(x, mu))

    def divergence(self, t, x, mu):
        # k' depends on the query for a hierarchy, and for rotary embeddings.
        simple = self.rotary is None and not isinstance(self.mask, Hierarchical)
        if not simple or (trace := self._trace(x, mu)) is None:
            return divergence_by_derivatives(self, t, x, mu)
        return _divergence(self.geometry, partial(self._force, mu=mu), trace, x)

    def keys_values(self, t, y, start=0):
        """K_h y and V_h y, `(n, G, p)` each."""
        return self._keys(y, start), _heads(self.value, y, self.value_bias)

    def attend(self, t, x, keys_values, index):
        _check_attend(self.interaction, self.mask)
        keys, values = keys_values
        left = None if self.window is None else band(True, self.window)[0]
        log_weights = visible_log_weights(keys, index, left)
        queries = self._queries(x, index)
        tokens = lambda own, k: Tokens(own, k, log_weights, backend=self.backend)
        return self.geometry.project(x, self._mean(queries, tokens, keys, values, None))

    def scores(self, mu: Measure) -> tuple[Scalar, tuple[Array, Array]]:
        """beta, and queries and keys of the tokens for each head, `(H, n, p)`."""
        pair = self._queries(mu.points, 0), self.of_heads(self._keys(mu.points, 0), 1)
        queries, keys = (a.transpose(1, 0, 2) for a in pair)
        return jnp.asarray(self._scale), (queries, keys)

    @property
    def _masks(self):
        return self.causal, self.window, self.mask

    @property
    def _scale(self) -> ScalarLike:
        """A Python number where it is constant, which cuDNN asks for."""
        return self.query.shape[1] ** -0.5 if self.beta is None else self.beta

    def _queries(self, x, start):
        return self._turn(_heads(self.query, x, self.query_bias), start)

    def _keys(self, y, start):
        return self._turn(_heads(self.key, y, self.key_bias), start)

    def of_heads(self, a, axis):
        """What the groups have, for each of their heads."""
        shared = len(self.query) // len(self.key)
        return a if shared == 1 else jnp.repeat(a, shared, axis=axis)

    def _turn(self, z, start):
        """Rotary position embedding of queries or keys (n, H, p)."""
        if self.rotary is None:
            return z
        n, _, p = z.shape
        rates = _rates(self.rotary, p)
        places = (start + jnp.arange(n)).astype(accumulation_dtype(z.dtype))
        angles = (places[:, None] * jnp.asarray(rates, places.dtype)[None])[:, None, :]
        cos, sin = jnp.cos(angles).astype(z.dtype), jnp.sin(angles).astype(z.dtype)
        a, b = z[..., : p // 2], z[..., p // 2 :]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def _force(self, x, mu):
        _check_query(x, mu)

        def tokens(q, k):
            return Tokens(q, k, mu.log_weights, *self._masks, self.backend, mu.signs)

        if x is mu.points:
            own, keys, values = self._projected(x)
            return self._mean(own, tokens, keys, values, own)
        keys, values = self.keys_values(0.0, mu.points)
        # Sinkhorn attention scores tokens with tokens, so it takes their queries too.
        own = self._queries(mu.points, 0)
        return self._mean(self._queries(x, 0), tokens, keys, values, own)

    def _projected(self, y):
        """Q_h y, K_h y and V_h y, `(n, H or G, p)`, by one product, which is faster than three."""
        matrices = self.query, self.key, self.value
        rows = [a.astype(y.dtype).reshape(-1, y.shape[1]) for a in matrices]
        found = apply(jnp.concatenate(rows), y)
        parts = jnp.split(found, np.cumsum([len(a) for a in rows[:-1]]), axis=1)
        biases = self.query_bias, self.key_bias, self.value_bias
        triple = zip(parts, biases, matrices, strict=True)
        q, k, v = (_plus(a, b).reshape(len(y), *m.shape[:2]) for a, b, m in triple)
        return self._turn(q, 0), self._turn(k, 0), v

    def _mean(self, queries, tokens, keys, values, own):
        """sum_h O_h E^h[v] from queries (m, H, p), and keys and values (n, G, p)."""
        keys, values = self.of_heads(keys, 1), self.of_heads(values, 1)
        vectors, shared = _per_head(self.interaction)

        def head(vectors, q, own, k, v):
            interaction = eqx.combine(vectors, shared)
            return interaction.expectation(q, tokens(own, k), v, self._scale)

        axes = 0, 1, None if own is None else 1, 1, 1
        means = jax.vmap(head, in_axes=axes, out_axes=1)(vectors, queries, own, keys, values)
        m, heads, p = means.shape
        output = self.output.transpose(1, 0, 2).reshape(-1, heads * p)
        return _plus(apply(output, means.reshape(m, heads * p)), self.output_bias)

    def _trace(self, x, mu):
        vectors, shared = _per_head(self.interaction)

        def head(vectors, q, own, keys, values, query, output):
            tokens = Tokens(own, keys, mu.log_weights, *self._masks, self.backend, mu.signs)
            slopes = jnp.asarray(self._scale, x.dtype) * _apply_transpose(query, keys)
            interaction = eqx.combine(vectors, shared)
            return interaction.trace(q, tokens, apply(output, values), slopes, self._scale)

        keys, values = (self.of_heads(a, 1) for a in self.keys_values(0.0, mu.points))
        queries, own = self._queries(x, 0), self._queries(mu.points, 0)
        axes = 0, 1, 1, 1, 1, 0, 0
        found = jax.vmap(head, in_axes=axes)(
            vectors, queries, own, keys, values, self.query, self.output
        )
        return None if found is None else found.sum(axis=0)


# ------------------------------------------------------------------ pieces


def _divergence(geometry, force, trace, x):
    """div (P F) from tr DF, by the formula at the head of this file."""
    if isinstance(geometry, Euclidean):
        return trace
    for normal in geometry.normals(x):
        f, df = jax.jvp(force, (x,), (normal,))
        trace = trace - geometry.inner(normal, df)
    return trace + geometry.divergence_correction(x, f)


def _heads(
    matrices: Float[Array, "H p d"], x: Float[Array, "n d"], bias: Float[Array, " Hp"] | None
) -> Float[Array, "n H p"]:
    """x_j -> A_h x_j + b_h for each head, as one product."""
    heads, p, d = matrices.shape
    return _plus(apply(matrices.reshape(heads * p, d), x), bias).reshape(len(x), heads, p)


def _plus(x: Float[Array, "n d"], bias: Float[Array, " d"] | None) -> Float[Array, "n d"]:
    return x if bias is None else x + bias.astype(x.dtype)[None]


def _apply_transpose(matrix: Array | None, x: Float[Array, "n p"]):
    return x if matrix is None else apply(matrix.T, x)


def _per_head(interaction: AbstractInteraction) -> tuple[AbstractInteraction, AbstractInteraction]:
    """The vectors of an interaction, which have one number a head, and the rest of it."""
    return eqx.partition(interaction, lambda a: eqx.is_array(a) and a.ndim > 0)


def _map(name: str, value: ArrayLike | Callable | None) -> Map:
    if value is None or callable(value):
        return value
    matrix = array(name, value)
    if matrix.ndim != 2:
        raise ValueError(
            f"{name} must be a matrix, or a function of a token; got shape {matrix.shape}."
        )
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {matrix.dtype}. Cast it first.")
    return finite(name, matrix)


def _temperature(beta: ScalarLike) -> Scalar:
    return real("beta", beta)


def _rotary(rotary: float | tuple[float, ...], p: int) -> float | tuple[float, ...]:
    if p % 2:
        raise ValueError(f"rotary embeddings need an even head dimension, got {p}.")
    if not isinstance(rotary, tuple):
        name = "rotary, the base of the embeddings,"
        return constant(name, rotary, "positive and finite", positive)
    if len(rotary) != p // 2:
        raise ValueError(
            f"rotary embeddings of heads of dimension {p} have {p // 2} rates, got {len(rotary)}."
        )
    return tuple(constant("a rate of rotary embeddings", rate) for rate in rotary)


def _rates(rotary: float | tuple[float, ...], p: int) -> np.ndarray:
    return np.asarray(
        rotary if isinstance(rotary, tuple) else rotary ** (-2 * np.arange(p // 2) / p)
    )


def _interaction(value: AbstractInteraction) -> AbstractInteraction:
    return instance("interaction", value, AbstractInteraction, "jaxflow.Softmax()")


def _geometry(value: AbstractGeometry) -> AbstractGeometry:
    return instance("geometry", value, AbstractGeometry, "jaxflow.Sphere()")


def _window(value: Window) -> Window:
    if isinstance(value, bool):
        raise TypeError(f"window must be a number of keys, a pair of them, or None; got {value}.")
    band(False, value)  # raises for what is none
    return value


def _backend(value: str | None) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f'backend must be a name such as "blocked", or None; got {value!r}.')
    return value


def _check_attend(interaction: AbstractInteraction, mask: AbstractMask | None):
    if mask is not None:
        raise NotImplementedError(
            f"{mask!r} shows tokens by their indices among all, of which there are more with each "
            "token, so keys and values cannot be kept for it: pass cache=False."
        )
    if not isinstance(interaction, Softmax | Hardmax | L2 | ALiBi):
        raise NotImplementedError(
            f"{type(interaction).__name__} weighs a token by the number of all, also of those to "
            "come, so keys and values cannot be kept for them: pass cache=False."
        )


def _check_order(interaction: AbstractInteraction, causal: bool):
    if isinstance(interaction, ALiBi) and not causal:
        raise ValueError(
            "ALiBi falls with the distance i - j to the tokens before a query: pass causal=True. "
            "Without an order of tokens there is no distance in index."
        )


def _check_query(x: Array, mu: Measure):
    if x.ndim != 2 or x.shape[1] != mu.d or mu.points.ndim != 2:
        raise ValueError(
            "a field takes query points (m, d) and a measure of points (n, d); got "
            f"{x.shape} and {mu.points.shape}. Batches go through jax.vmap or jaxflow.flow."
        )
