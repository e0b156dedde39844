"""How a query weighs the tokens: the law mu_x under which attention takes the mean of the values.

    Softmax        mu_x(dy) = exp(s(x, y)) mu(dy) / Z_x              s(x, y) = beta <Q x, K y>
    Unnormalised   mu_x(dy) = exp(s(x, y)) mu(dy)                    (USA in arXiv 2312.10794)
    Linear         mu_x(dy) = s(x, y) mu(dy)                         (arXiv 2501.18322)
    Hardmax        mu_x     = mu restricted to the maximisers of s   (arXiv 2407.01602)
    Sinkhorn       mu_x(dy) = exp(s(x, y) + f(x) + g(y)) mu(dy)      doubly stochastic (Sinkformers,
                                                                     arXiv 2110.11773)

More are in biased.py and sigmoid.py. Each interaction gives `expectation`, E_{mu_x}[v], and
`trace`, the trace of the derivative of E_{mu_x}[v] in x at fixed mu, given the derivative
k'(y) = beta Q^T K y of s(x, y) in x.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._memory import PAIRS_AT_ONCE
from .._rules import constant, count, not_negative, positive, real
from .._types import Keys, LogWeights, Queries, ScalarLike, Values, accumulation_dtype
from ..kernels import softmax_expectation
from ..kernels.base import Window, pairs_of, visible
from ..kernels.base import band as _band
from ..masks import AbstractMask, AbstractPattern, check


class Tokens(NamedTuple):
    """What an interaction needs of a measure of n tokens y_j.

    - `queries`, `keys`: Q y_j and K y_j, shape `(n, p)`.
    - `log_weights`: log w_j up to a constant, shape `(n,)`, -inf for a token that is not there;
      `None` for equal weights. `weights` are the w_j, which add up to 1, `log_probabilities` their
      logarithms.
    - `causal`, `window`, `mask`, `backend`: which keys a query sees, and who computes, as in
      `jaxflow.softmax_expectation`.
    - `signs`: of the weights of a compressed measure, or `None`.

    `attend(q, values, scale, potential=None)` is the operation on them,

        mean_i = sum_j p_ij v_j,    p_ij proportional to w_j exp(scale <q_i, k_j> + potential_j),

    and the log-partition, log sum_j w_j exp(...), where there is a potential (without one the w_j
    are as they were given). `jaxflow.fields.weighted_sums` takes any other weight.
    """

    queries: Queries
    keys: Keys
    log_weights: LogWeights | None
    causal: bool = False
    window: Window = None
    mask: AbstractMask | None = None
    backend: str | None = None
    signs: LogWeights | None = None  # the signs of the weights of a compressed measure

    def attend(self, q: Queries, values: Values, scale: ScalarLike, potential=None):
        """(mean, log_partition) of the values at the queries, with a potential on the keys."""
        log_weights = self.log_weights if potential is None else self.log_probabilities + potential
        if self.signs is None:
            return self._operation(q, values, log_weights, scale)
        if self.causal or self.window is not None or self.mask is not None:
            raise ValueError(
                "a compressed measure has no order of tokens, which masks ask for: pass the one "
                "that was compressed."
            )
        # With weights w_j signs_j: E[signs v] / E[signs], and Z E[signs].
        signs = self.signs.astype(values.dtype)[:, None]
        channels = jnp.concatenate([signs * values, signs], axis=1)
        means, log_partition = self._operation(q, channels, log_weights, scale)
        total = means[:, -1]
        return means[:, :-1] / total[:, None], log_partition + jnp.log(total)

    def _operation(self, q, values, log_weights, scale):
        return softmax_expectation(
            q,
            self.keys,
            values,
            log_weights,
            scale=scale,
            causal=self.causal,
            window=self.window,
            mask=self.mask,
            backend=self.backend,
        )

    @property
    def weights(self) -> LogWeights:
        """w_j, with sum_j w_j = 1."""
        weights = jnp.exp(self.log_probabilities)
        return weights if self.signs is None else weights * self.signs

    @property
    def log_probabilities(self) -> LogWeights:
        n = self.keys.shape[0]
        dtype = accumulation_dtype(self.keys.dtype)
        if self.log_weights is None:
            return jnp.full(n, -np.log(n), dtype)
        if self.signs is not None:
            return self.log_weights  # sum_j w_j signs_j = 1 already
        return jax.nn.log_softmax(self.log_weights.astype(dtype))


def positive_weights(tokens: Tokens, name: str):
    """**Raises:** `ValueError` for a measure whose weights have signs."""
    if tokens.signs is not None:
        raise ValueError(
            f"{name} attention needs weights that are positive, and those of a compressed measure "
            "have signs: pass the measure that was compressed."
        )


def weighted_sums(
    q: Queries,
    tokens: Tokens,
    values: Values,
    weight: Callable[[Array, Array], Array],
) -> Float[Array, "m r"]:
    """sum_j w_j weight(q_i, k_j) v_j over the keys that query i sees, in O(n * block) memory.

    With a channel of ones among the values it gives what a mean is divided by. Derivatives pass
    through the weight, and are evaluated anew row by row.

    **Arguments:**

    - `q`, `tokens`, `values`: as an interaction receives them.
    - `weight`: `weight(query, keys)` of one query `(p,)` and all keys `(n, p)`, shape `(n,)`.

    **Returns:** the sums, shape `(m, r)`, in the dtype of `values`.

    **Raises:** `NotImplementedError` for masks that are no patterns of indices; `ValueError` for
    weights that have signs.

    ```python
    >>> x = jnp.eye(2)
    >>> tokens = jaxflow.fields.Tokens(x, x, log_weights=None)
    >>> weight = lambda q, k: jnp.square(q @ k)  # of one query and one key
    >>> jaxflow.fields.weighted_sums(x, tokens, 2.0 * x, weight).tolist()  # w_j = 1/2
    [[1.0, 0.0], [0.0, 1.0]]

    ```
    """
    positive_weights(tokens, "weighted")
    dtype = accumulation_dtype(q.dtype)
    keys, wide = tokens.keys.astype(dtype), values.astype(dtype)
    weights = tokens.weights.astype(dtype)
    sees = sight(tokens, (q.shape[0], keys.shape[0]))

    @jax.checkpoint
    def one(args):
        i, q = args
        found = weights * weight(q.astype(dtype), keys)
        mask = sees(i)
        found = found if mask is None else jnp.where(mask[0], found, 0)
        return jnp.matmul(found, wide, precision="highest")

    size = max(1, PAIRS_AT_ONCE // keys.shape[0])
    rows = jnp.arange(q.shape[0]), q
    return jax.lax.map(one, rows, batch_size=size).astype(values.dtype)


class AbstractInteraction(eqx.Module):
    """The law mu_x of attention.

    To write one: subclass, and give it `expectation` and `trace`, by `tokens.attend` where it is a
    Gibbs law of the scores and `jaxflow.fields.weighted_sums` elsewhere. Fields, flows,
    derivatives, energies and pictures of the attention matrix then serve it:

    ```python
    class Quadratic(jaxflow.fields.AbstractInteraction):  # mu_x(dy) = s(x, y)^2 mu(dy)
        def expectation(self, q, tokens, values, scale):
            square = lambda q, keys: (scale * (keys @ q)) ** 2
            return jaxflow.fields.weighted_sums(q, tokens, values, square)

        def trace(self, q, tokens, values, slopes, scale):
            double = lambda q, keys: 2 * scale * (keys @ q)  # ds^2 = 2 s ds
            pulls = (values * slopes).sum(axis=1, keepdims=True)
            return jaxflow.fields.weighted_sums(q, tokens, pulls, double)[:, 0]
    ```
    """

    @abc.abstractmethod
    def expectation(
        self, q: Queries, tokens: Tokens, values: Values, scale: ScalarLike
    ) -> Float[Array, "m r"]:
        """E_{mu_x}[v] for each query q = Q x, given v(y_j); `scale` is beta, which may be traced.

        It is linear in the values, so that `values` may have any number of channels r: the
        identity gives the attention matrix.
        """

    @abc.abstractmethod
    def trace(
        self,
        q: Queries,
        tokens: Tokens,
        values: Float[Array, "n d"],
        slopes: Float[Array, "n d"],
        scale: ScalarLike,
    ) -> Float[Array, " m"] | None:
        """tr D_x E_{mu_x}[v] at fixed mu, for each query, given v(y_j) and the slopes
        k'(y_j) = beta Q^T K y_j, the derivative in x of the score s(x, y_j) = beta <Q x, K y_j>.

        A law whose density is phi(s) has the trace sum_j w_j phi'(s_j) <k'_j, v_j>; a law that is
        normalised, as softmax is, E[<k', v>] - <E[k'], E[v]>. `None` where it is not known: the
        divergence is then found by d forward-mode derivatives.
        """


def moment_channels(values, slopes):
    """The channels (v, k', <k', v>): one call gives both factors and the product."""
    return jnp.concatenate([values, slopes, (values * slopes).sum(axis=1, keepdims=True)], axis=1)


def covariance_trace(channels):
    """E[<k', v>] - <E[k'], E[v]>."""
    d = channels.shape[1] // 2
    return channels[:, -1] - (channels[:, :d] * channels[:, d:-1]).sum(axis=1)


class Softmax(AbstractInteraction):
    """Softmax self-attention (SA): mu_x(dy) proportional to exp(s(x, y)) mu(dy)."""

    def expectation(self, q, tokens, values, scale):
        return tokens.attend(q, values, scale)[0]

    def trace(self, q, tokens, values, slopes, scale):
        channels, _ = tokens.attend(q, moment_channels(values, slopes), scale)
        return covariance_trace(channels)


class Unnormalised(AbstractInteraction):
    """Unnormalised self-attention (USA): mu_x(dy) = exp(s(x, y)) mu(dy), mu of mass 1."""

    def expectation(self, q, tokens, values, scale):
        mean, log_partition = tokens.attend(q, values, scale, potential=0.0)
        return jnp.exp(log_partition).astype(mean.dtype)[:, None] * mean

    def trace(self, q, tokens, values, slopes, scale):
        product = (values * slopes).sum(axis=1, keepdims=True)
        return self.expectation(q, tokens, product, scale)[:, 0]


class Linear(AbstractInteraction):
    """Linear attention: E[v] = int s(x, y) v(y) mu(dy), in O(n) by the moment E_mu[k v^T].

    With a causal mask or a window the moment becomes a difference of running sums, which hold
    n p r numbers. It takes no other mask.

    **Raises:** `NotImplementedError` for a mask.
    """

    def expectation(self, q, tokens, values, scale):
        _without_mask(tokens)
        weights = tokens.weights.astype(values.dtype)
        keys = weights[:, None] * tokens.keys
        if not tokens.causal and tokens.window is None:
            moment = jnp.matmul(keys.T, values, precision="highest")
            return jnp.asarray(scale, q.dtype) * jnp.matmul(q, moment, precision="highest")
        moments = keys[:, :, None] * values[:, None, :]
        return jnp.asarray(scale, q.dtype) * jnp.einsum(
            "mp,mpr->mr", q, _visible_sums(moments, q, tokens)
        )

    def trace(self, q, tokens, values, slopes, scale):
        _without_mask(tokens)
        weights = tokens.weights.astype(values.dtype)
        products = weights * (values * slopes).sum(axis=1)
        return _visible_sums(products, q, tokens)


def _visible_sums(a, q, tokens: Tokens):
    """sum of a_j over the keys j that query i sees, by differences of running sums."""
    n, rows = a.shape[0], jnp.arange(q.shape[0])
    sums = jnp.concatenate([jnp.zeros_like(a[:1]), jnp.cumsum(a, axis=0)])
    left, right = _band(tokens.causal, tokens.window)
    last = jnp.full_like(rows, n) if right is None else jnp.minimum(rows + right + 1, n)
    first = jnp.zeros_like(rows) if left is None else jnp.clip(rows - left, 0, n)
    return sums[jnp.maximum(last, first)] - sums[first]


def _without_mask(tokens: Tokens):
    if tokens.mask is not None:
        raise NotImplementedError(
            f"linear attention takes no mask, got {tokens.mask!r}: its sums run over intervals of "
            "keys, which `causal` and `window` are. Use Softmax() with masks."
        )


class Hardmax(AbstractInteraction):
    """Hardmax attention, the limit beta -> infinity: the mean over C(x) = argmax_j <Q x, K y_j>.

    Ties are averaged, with the weights of mu: scores within `tolerance` times the largest
    |score| of the query's maximum tie (default 32 machine epsilons). It is piecewise constant in
    x, so its divergence at fixed mu is 0. Of masks it takes patterns. `jaxflow.hardmax_flow`
    is its flow in R^d, exact between changes of leaders.

    **Raises:** `ValueError` or `TypeError` for a tolerance that is no number, or negative;
    `NotImplementedError` for masks other than patterns.
    """

    tolerance: float | None = None

    def __check_init__(self):
        if self.tolerance is not None:
            real("tolerance", self.tolerance, "finite and not negative", not_negative)

    def expectation(self, q, tokens, values, scale):
        positive_weights(tokens, "hardmax")
        dtype = accumulation_dtype(q.dtype)
        keys, values32 = tokens.keys.astype(dtype), values.astype(dtype)
        tolerance = 32 * jnp.finfo(dtype).eps if self.tolerance is None else self.tolerance
        sees = sight(tokens, (q.shape[0], keys.shape[0]))

        def one(args):
            i, q = args
            s = jnp.asarray(scale, dtype) * jnp.matmul(keys, q.astype(dtype), precision="highest")
            seen = ~jnp.isneginf(tokens.log_probabilities)
            mask = sees(i)
            if mask is not None:
                seen = seen & mask[0]
            top = jnp.max(s, where=seen, initial=-jnp.inf)
            slack = tolerance * jnp.max(jnp.abs(s), where=seen, initial=0.0)
            w = jnp.where(seen & (s >= top - slack), jnp.exp(tokens.log_probabilities), 0)
            total = w.sum()
            return jnp.matmul(w, values32, precision="highest") / jnp.where(total > 0, total, 1)

        rows = jnp.arange(q.shape[0]), jax.lax.stop_gradient(q)
        size = max(1, PAIRS_AT_ONCE // keys.shape[0])
        return jax.lax.map(one, rows, batch_size=size).astype(values.dtype)

    def trace(self, q, tokens, values, slopes, scale):
        return jnp.zeros(q.shape[0], values.dtype)


def sight(tokens: Tokens, shape: tuple[int, int]):
    """i -> the keys that query i sees, (1, n), or None where it sees all."""
    band, mask, columns = _band(tokens.causal, tokens.window), tokens.mask, jnp.arange(shape[1])
    if mask is None:
        return lambda i: visible(i[None], columns, band)
    if not isinstance(mask, AbstractPattern):
        raise NotImplementedError(
            f"hardmax and weighted sums take patterns as masks, such as Blocks, not {mask!r}: the "
            "first is top-1 attention itself, and neither has means of groups. Use Softmax() with "
            "it."
        )
    check(mask, shape)
    pattern = pairs_of(band, mask)
    assert pattern is not None
    return lambda i: pattern.visible(i[None], columns, shape)


class Sinkhorn(AbstractInteraction):
    """Sinkhorn attention: density exp(s(x, y) + f(x) + g(y)), rows and columns of mass 1.

        f_i = -log sum_j w_j e^{s_ij + g_j},    g_j = -log sum_i w_i e^{s_ij + f_i}

    The potentials are those of the self-coupling of mu; at a point outside mu only g enters.
    Rows sum to 1 exactly, columns up to what `jaxflow.observables.column_defect` reports.

    **Arguments:**

    - `iterations`: the number of (f, g) updates, from g = 0 (0 gives softmax). `None` iterates to
      convergence and differentiates implicitly, in O(n) memory.
    - `tolerance`: largest change of g at convergence; default 64 machine epsilons, relative.
    - `max_iterations`: where an iteration to convergence stops at the latest.

    **Raises:** `ValueError` or `TypeError` where these are no such numbers; in use `ValueError` for
    a causal or windowed field, `NotImplementedError` for one with a mask.
    """

    iterations: int | None = eqx.field(static=True, default=None)
    tolerance: float | None = eqx.field(static=True, default=None)
    max_iterations: int = eqx.field(static=True, default=10_000)

    def __check_init__(self):
        if self.iterations is not None:
            count("iterations", self.iterations, 0)
        if self.tolerance is not None:
            constant("tolerance", self.tolerance, "positive and finite", positive)
        count("max_iterations", self.max_iterations)

    def expectation(self, q, tokens, values, scale):
        return tokens.attend(q, values, scale, self.potential(tokens, scale))[0]

    def trace(self, q, tokens, values, slopes, scale):
        potential = self.potential(tokens, scale)
        channels, _ = tokens.attend(q, moment_channels(values, slopes), scale, potential)
        return covariance_trace(channels)

    def potential(self, tokens: Tokens, scale: ScalarLike) -> Float[Array, " n"]:
        """The column potential g, with mean 0 under mu."""
        positive_weights(tokens, "Sinkhorn")
        if tokens.causal or tokens.window is not None:
            raise ValueError(
                "Sinkhorn attention has no causal or windowed form: a triangular matrix with unit "
                "row and column sums is the identity. Use Softmax() with masks."
            )
        if tokens.mask is not None:
            raise NotImplementedError(
                f"Sinkhorn attention takes no mask, got {tokens.mask!r}: few patterns have "
                "matrices with unit row and column sums. Use Softmax() with masks."
            )
        weights = jnp.exp(tokens.log_probabilities)

        def update(g):
            g = _sinkhorn_columns(tokens, scale, g)
            return g - (weights * g).sum()  # f and g are unique up to a constant

        start = jnp.zeros_like(weights)
        if self.iterations is not None:
            return jax.lax.fori_loop(0, self.iterations, lambda _, g: update(g), start)
        return self._fixed_point(update, start)

    def _fixed_point(self, update, start):
        """g = update(g), with implicit derivatives.

        With J the derivative of the update, a contraction, (J - I) x = y is solved by
        x <- J x - y, and its transpose likewise.
        """
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = 64 * float(jnp.finfo(start.dtype).eps)

        def iterate(step, x):
            def unfinished(carry):
                x, change, count = carry
                limit = tolerance * jnp.maximum(1, jnp.abs(x).max())
                return (change > limit) & (count < self.max_iterations)

            def advance(carry):
                x, _, count = carry
                new = step(x)
                return new, jnp.abs(new - x).max(), count + 1

            init = x, jnp.asarray(jnp.inf, x.dtype), 0
            return jax.lax.while_loop(unfinished, advance, init)[0]

        def neumann(matvec, y):
            return iterate(lambda x: matvec(x) + x - y, -y)

        return jax.lax.custom_root(
            lambda g: update(g) - g,
            start,
            lambda _, g: iterate(update, g),
            lambda matvec, y: jax.lax.custom_linear_solve(matvec, y, neumann, neumann),
        )


def _sinkhorn_columns(tokens: Tokens, scale: ScalarLike, g):
    """The column potential that follows from g: a row update, then a column update."""
    logs = tokens.log_probabilities
    ones = jnp.ones((g.shape[0], 1), tokens.keys.dtype)
    options = {"scale": scale, "backend": tokens.backend}
    f = -softmax_expectation(tokens.queries, tokens.keys, ones, logs + g, **options)[1]
    return -softmax_expectation(tokens.keys, tokens.queries, ones, logs + f, **options)[1]
