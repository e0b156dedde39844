"""What attention does to a measure, as an operator on functions of its tokens.

A_ij        the weight of token j in mu_{x_i}
columns     sum_i w_i A_ij / w_j, the mass that token j receives; 1 for Sinkhorn attention
entropy     -sum_j A_ij log A_ij
spectrum    the singular values of A on L^2(mu), those of the matrix sqrt(w_i) A_ij / sqrt(w_j)
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._memory import PAIRS_AT_ONCE, check_fits
from .._rules import count, prng_key, real, reals
from .._types import Scalar, ScalarLike, accumulation_dtype
from ..fields import (
    AbstractCompositeField,
    AbstractField,
    AbstractWrapper,
    Hardmax,
    MultiHeadAttention,
    SelfAttention,
    Softmax,
    TiedAttention,
)
from ..kernels import softmax_expectation
from ..masks import Hierarchical, TopK
from ..measure import Measure, check_measure
from .base import AbstractObservable, over_leading

# Up to this many tokens the singular values are those of the whole matrix.
DENSE = 512


def attention_matrix(
    field: SelfAttention, mu: Measure, x: Float[Array, "*batch m d"] | None = None
) -> Float[Array, "*batch m n"]:
    """A_ij, the weight of token j under mu_{x_i}, for any interaction; x defaults to the tokens.

    The rows of softmax, hardmax and Sinkhorn attention sum to 1.

    **Arguments:** `field`: one `jaxflow.SelfAttention`; `mu`: the tokens, points `(*batch, n, d)`;
    `x`: queries, shape `(*batch, m, d)`.

    **Returns:** the matrix A, shape `(*batch, m, n)`.

    **Raises:** `ValueError` or `TypeError` for a field without one matrix and for bad queries;
    `MemoryError` where the matrix does not fit: `attention_spectrum`, `attention_entropy` and
    `column_defect` do without it.

    ```python
    >>> field, mu = jaxflow.SelfAttention(beta=0.0), jaxflow.measure.circle(4)
    >>> jaxflow.observables.attention_matrix(field, mu)[0].tolist()
    [0.25, 0.25, 0.25, 0.25]

    ```
    """
    _check_single(field, mu)
    points = mu.points if x is None else reals("x", x).astype(mu.points.dtype)
    if points.ndim < 2 or points.shape[-1] != mu.d:
        raise ValueError(f"queries x must have shape (*batch, m, {mu.d}), got {points.shape}.")
    entries = math.prod(points.shape[:-1]) * mu.n + mu.n**2
    check_fits(
        entries * points.dtype.itemsize,
        f"the attention matrix of {points.shape[-2]} x {mu.n} tokens",
        "Pass fewer queries x, or take attention_spectrum, attention_entropy or column_defect.",
    )

    def one(x, y, logs):
        tokens = field.tokens(Measure(y, logs))
        queries = field.tokens(Measure(x)).queries
        identity = jnp.eye(mu.n, dtype=y.dtype)
        return field.interaction.expectation(queries, tokens, identity, field.beta)

    mapped = jnp.vectorize(one, signature="(m,d),(n,d),(n)->(m,n)")
    return mapped(points, mu.points, mu.log_probabilities)


def column_defect(field: SelfAttention, mu: Measure) -> Float[Array, "*batch"]:
    """max_j |sum_i w_i A_ij / w_j - 1|: how far attention is from preserving the mass of tokens.

    0 for Sinkhorn attention at convergence, so that the token mean obeys m' = V m.

    **Arguments:** `field`: one `jaxflow.SelfAttention`; `mu`: points `(*batch, n, d)`.

    **Returns:** the largest defect of a token with mass, shape `(*batch,)`.

    **Raises:** `TypeError` for a field without one matrix; `MemoryError` for hardmax attention
    whose matrix, which its transpose keeps, does not fit.

    ```python
    >>> field, mu = jaxflow.SelfAttention(beta=0.0), jaxflow.measure.circle(4)
    >>> bool(jaxflow.observables.column_defect(field, mu) < 1e-6)  # doubly stochastic
    True

    ```
    """
    _check_single(field, mu)
    _check_transpose(field, mu)

    def one(y, logs):
        tokens = field.tokens(Measure(y, logs))
        # The columns' masses are the gradient in v of sum_i w_i E_{mu_i}[v], for one channel v.
        received = lambda v: jnp.vdot(
            jnp.exp(logs),
            field.interaction.expectation(tokens.queries, tokens, v, field.beta)[:, 0],
        )
        columns = jax.grad(received)(jnp.ones((y.shape[0], 1), y.dtype))[:, 0]
        massive = ~jnp.isneginf(logs)
        ratio = columns / jnp.where(massive, jnp.exp(logs), 1)
        return jnp.max(jnp.where(massive, jnp.abs(ratio - 1), 0))

    return over_leading(one, mu)


# ------------------------------------------------------------------ spectrum and rank


def attention_spectrum(
    field: SelfAttention, mu: Measure, *, probes: int = 32, key: PRNGKeyArray | None = None
) -> Float[Array, "*batch values"]:
    """The singular values of attention on L^2(mu), largest first.

    Those of sqrt(w_i) A_ij / sqrt(w_j), for equal weights those of A: they do not change when a
    token is split into two that share its mass. Tokens without mass add zeros.

    All n of them for n <= 512, from the matrix. For more tokens the largest `probes`, by the
    randomised range finder with one power iteration (Halko, Martinsson and Tropp 2011, algorithms
    4.4 and 5.1), through the expectation and its transpose: four passes over n^2 pairs with
    `probes` channels and O(n (d + probes)) memory (hardmax, whose transpose keeps the weights,
    O(n^2)). The last few are then underestimated, and a spectrum that does not decay all are.

    **Arguments:** `field`: one `jaxflow.SelfAttention`; `mu`: points `(*batch, n, d)`; `probes`: at
    least 1; `key`: of the probes, `jax.random.key(0)` by default.

    **Returns:** shape `(*batch, n)`, or `(*batch, min(n, probes))` for n > 512.

    **Raises:** `ValueError` or `TypeError` for bad arguments and a field without one matrix;
    `MemoryError` for hardmax attention whose matrix, which its transpose keeps, does not fit.

    ```python
    >>> field, mu = jaxflow.SelfAttention(beta=0.0), jaxflow.measure.circle(4)
    >>> round(float(jaxflow.observables.attention_spectrum(field, mu)[0]), 3)
    1.0

    ```
    """
    _check_single(field, mu)
    probes = count("probes", probes)
    if key is not None:
        prng_key(key)
    if mu.n > DENSE:
        _check_transpose(field, mu)
    return _spectrum(field, mu, jax.random.key(0) if key is None else key, probes)


def attention_rank(
    field: SelfAttention,
    mu: Measure,
    *,
    tolerance: ScalarLike = 1e-3,
    probes: int = 32,
    key: PRNGKeyArray | None = None,
) -> Int[Array, "*batch"]:
    """The number of singular values above `tolerance` times the largest.

    In d = 1 with V > 0, QK > 0 the matrix tends to a Boolean one of rank <= 2 (arXiv 2305.05465).
    Of `jaxflow.observables.attention_spectrum`: for n > 512 it saturates at `probes`, and is
    to be believed below it. It is -1 where a token with mass is not finite.

    **Arguments:** `field`: one `jaxflow.SelfAttention`; `mu`: points `(*batch, n, d)`; `tolerance`:
    in [0, 1); `probes`, `key`: as in `jaxflow.observables.attention_spectrum`.

    **Returns:** integers, shape `(*batch,)`.

    **Raises:** as `jaxflow.observables.attention_spectrum`, and where the tolerance is not in
    [0, 1).

    ```python
    >>> field, mu = jaxflow.SelfAttention(beta=0.0), jaxflow.measure.circle(4)
    >>> int(jaxflow.observables.attention_rank(field, mu))  # all rows are equal
    1

    ```
    """
    tolerance = _tolerance(tolerance)
    values = attention_spectrum(field, mu, probes=probes, key=key)
    rank = (values > tolerance.astype(values.dtype) * values[..., :1]).sum(axis=-1)
    return jnp.where(jnp.isnan(values).any(axis=-1), -1, rank)


def _tolerance(tolerance: ScalarLike) -> Scalar:
    return real("tolerance", tolerance, "in [0, 1)", lambda tol: (0 <= tol) & (tol < 1))


def effective_rank(
    field: SelfAttention, mu: Measure, *, probes: int = 32, key: PRNGKeyArray | None = None
) -> Float[Array, "*batch"]:
    """exp(-sum_k p_k log p_k), p_k = s_k / sum_l s_l, s the singular values (Roy and Vetterli
    2007).

    Of `jaxflow.observables.attention_spectrum`: for n > 512 of its `probes` largest.

    **Arguments:** `field`: one `jaxflow.SelfAttention`; `mu`: points `(*batch, n, d)`; `probes`,
    `key`: as in `jaxflow.observables.attention_spectrum`.

    **Returns:** numbers from 1 to that of the singular values, shape `(*batch,)`.

    **Raises:** as `jaxflow.observables.attention_spectrum`.

    ```python
    >>> field, mu = jaxflow.SelfAttention(beta=0.0), jaxflow.measure.circle(4)
    >>> round(float(jaxflow.observables.effective_rank(field, mu)), 3)
    1.0

    ```
    """
    values = attention_spectrum(field, mu, probes=probes, key=key)
    p = values / values.sum(axis=-1, keepdims=True)
    return jnp.exp(jax.scipy.special.entr(p).sum(axis=-1))


class AttentionRank(AbstractObservable):
    """t, mu -> `jaxflow.observables.attention_rank`, nan where that is -1.

    **Arguments:** `field`, a `jaxflow.SelfAttention`; `tolerance`, which may be traced, and
    `probes` as in `jaxflow.observables.attention_rank`.

    **Raises:** `ValueError` or `TypeError` for bad arguments.
    """

    field: SelfAttention
    tolerance: Scalar
    probes: int = eqx.field(static=True)

    def __init__(self, field: SelfAttention, *, tolerance: ScalarLike = 1e-3, probes: int = 32):
        self.field = field
        self.tolerance = _tolerance(tolerance)
        self.probes = count("probes", probes)

    def __call__(self, t, mu):
        rank = attention_rank(self.field, mu, tolerance=self.tolerance, probes=self.probes)
        rank = rank.astype(accumulation_dtype(mu.points.dtype))
        return jnp.where(rank < 0, jnp.nan, rank)


def _check_single(field, mu):
    """A field with one matrix A, and a measure."""
    check_measure("mu", mu)
    if not isinstance(field, SelfAttention):
        raise TypeError(
            f"one matrix A has a jaxflow.SelfAttention alone, got {type(field).__name__}. Of a sum "
            "pass one of its parts; attention_entropy takes any field with attention in it."
        )


def _check_transpose(field, mu):
    """The transpose of hardmax attention keeps its matrix."""
    if isinstance(field.interaction, Hardmax):
        check_fits(
            2 * mu.n**2 * mu.points.dtype.itemsize,
            f"hardmax attention of {mu.n} tokens, transposed,",
            "Take fewer tokens, or softmax attention with a large beta.",
        )


@eqx.filter_jit
def _spectrum(field, mu, key, probes):
    def one(y, logs):
        dtype = accumulation_dtype(y.dtype)
        root = jnp.exp(logs / 2).astype(dtype)
        inverse = jnp.where(jnp.isneginf(logs), 0, jnp.exp(-logs / 2)).astype(dtype)
        tokens = field.tokens(Measure(y, logs))

        def apply(v):
            v = (inverse[:, None] * v).astype(y.dtype)
            mean = field.interaction.expectation(tokens.queries, tokens, v, field.beta)
            return root[:, None] * mean.astype(dtype)

        if len(y) <= DENSE:
            return jnp.linalg.svd(apply(jnp.eye(len(y), dtype=dtype)), compute_uv=False)
        return _largest(apply, len(y), min(probes, len(y)), dtype, key)

    return over_leading(one, mu, batch_size=max(1, PAIRS_AT_ONCE // mu.n**2))


def _largest(apply, n, probes, dtype, key):
    """The largest singular values of a linear map of (n, probes) arrays."""
    transpose = lambda v: jax.vjp(apply, jnp.zeros_like(v))[1](v)[0]
    basis = lambda v: jnp.linalg.qr(v)[0]
    image = basis(apply(jax.random.normal(key, (n, probes), dtype)))
    image = basis(apply(basis(transpose(image))))
    return jnp.linalg.svd(transpose(image), full_matrices=False, compute_uv=False)


# ------------------------------------------------------------------ entropy


def attention_entropy(
    field: AbstractField, mu: Measure, *, t: ScalarLike = 0.0
) -> Float[Array, "*batch"]:
    """The mean over heads and tokens of -sum_j A_ij log A_ij, A the softmax attention.

    Between 0, each token sees one other, and log n. Of a field with several attention parts, such
    as a sum, the mean over them. O(n * block) memory, as -sum_j A_ij s_ij + log-partition.

    **Arguments:** `field`, with softmax attention somewhere in it; `t`, the time at which a
    time-dependent field is taken.

    **Returns:** nats, shape `(*batch,)`.

    **Raises:** `TypeError` for a field without softmax attention, and where mu is no measure;
    `NotImplementedError` for the masks `TopK` and `Hierarchical`.

    ```python
    >>> field, mu = jaxflow.SelfAttention(beta=0.0), jaxflow.measure.circle(4)
    >>> round(float(jaxflow.observables.attention_entropy(field, mu)), 3)  # log 4, as if alike
    1.386

    ```
    """
    check_measure("mu", mu)
    return over_leading(lambda x, logs: _mean_entropy(field, t, Measure(x, logs)), mu)


class AttentionEntropy(AbstractObservable):
    """(t, mu) -> `jaxflow.observables.attention_entropy` of the field at time t.

    **Arguments:** `field`, with softmax attention somewhere in it.
    """

    field: AbstractField

    def __call__(self, t, mu):
        return _mean_entropy(self.field, t, mu)


def _mean_entropy(field, t, mu):
    entropies = [_entropy(part, seen) for part, seen in attentions(field, t, mu)]
    if not entropies:
        raise TypeError(f"{type(field).__name__} has no attention whose entropy could be taken.")
    return sum(entropies) / len(entropies)


def attentions(
    field: AbstractField, t: ScalarLike, mu: Measure
) -> list[tuple[SelfAttention | MultiHeadAttention | TiedAttention, Measure]]:
    """The attention fields inside a field at time t, each with the measure that it sees."""
    if isinstance(field, SelfAttention | MultiHeadAttention | TiedAttention):
        return [(field, mu)]
    seen = field.seen(mu) if isinstance(field, AbstractWrapper) else mu
    inside = field.inside(t) if isinstance(field, AbstractCompositeField) else ()
    return [pair for inner in inside for pair in attentions(inner, t, seen)]


def _entropy(field, mu):
    if not isinstance(field.interaction, Softmax):
        raise TypeError(f"the entropy of attention is that of softmax, got {field.interaction!r}.")
    if isinstance(field.mask, TopK | Hierarchical):
        raise NotImplementedError(
            f"the entropy of attention is a mean of its scores, which {field.mask!r} changes. Take "
            "a field with a pattern, such as jaxflow.masks.Blocks, or sum -A log A of "
            "attention_matrix."
        )
    scale, pairs = field.scores(mu)

    def head(q, k):
        log_weights = mu.log_weights
        finite = (
            jnp.zeros(mu.n)
            if log_weights is None
            else jnp.where(jnp.isneginf(log_weights), 0, log_weights)
        )
        values = jnp.concatenate([k, finite.astype(k.dtype)[:, None]], axis=1)
        mean, log_partition = softmax_expectation(
            q, k, values, log_weights, scale=scale, causal=field.causal, window=field.window,
            mask=field.mask, backend=field.backend,
        )  # fmt: skip
        q, mean, beta = (a.astype(log_partition.dtype) for a in (q, mean, scale))
        return log_partition - beta * (q * mean[:, :-1]).sum(axis=1) - mean[:, -1]

    entropies = jnp.maximum(jax.vmap(head)(*pairs).mean(axis=0), 0)  # but for rounding
    return (entropies * mu.weights.astype(entropies.dtype)).sum()
