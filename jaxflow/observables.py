"""What is measured of a flow: functions of a measure, and of (t, mu) for `flow(observe=...)`.

    energy        E_beta[mu] = 1/(2 beta) int int exp(beta <x, y>) mu(dx) mu(dy)
    clusters      the components of the graph x_i ~ x_j  iff  cos(x_i, x_j) >= threshold
    correlations  <x_i, x_j>
    attention     A_ij = the weight of token j in mu_{x_i};   entropy  -sum_j A_ij log A_ij
    kinetic       int |X_t[mu](x)|^2 mu(dx)

Functions of a measure map over its leading axes (saved times, systems).
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._types import Scalar, ScalarLike, is_concrete
from .fields import (
    AbstractField,
    MultiHeadAttention,
    PeriNorm,
    PreNorm,
    Scaled,
    SelfAttention,
    Softmax,
    Sum,
    TimeDependent,
)
from .kernels import softmax_expectation
from .measure import Measure


def interaction_energy(mu: Measure, beta: ScalarLike) -> Float[Array, "*batch"]:
    """E_beta[mu] = 1/(2 beta) sum_ij w_i w_j exp(beta <x_i, x_j>) (arXiv 2312.10794, eq. 3.4).

    With V = Q = K = I it grows along the flow: dE/dt = E|x'|^2 for the unnormalised dynamics.
    Computed in O(n) memory from the log-partition.
    """
    if is_concrete(beta) and not (np.isfinite(beta) and beta != 0):
        raise ValueError(f"the energy needs a finite beta other than 0, got {beta}.")

    def one(x, logs):
        ones = jnp.ones((x.shape[0], 1), x.dtype)
        log_partition = softmax_expectation(x, x, ones, logs, scale=beta)[1]
        # E = exp(logsumexp): no overflow before the last step.
        total = jnp.exp(jax.nn.logsumexp(logs + log_partition))
        return total / (2 * jnp.asarray(beta, total.dtype))

    return _over_leading(one, mu, "()")


def inner_products(mu: Measure) -> Float[Array, "*batch n n"]:
    """The Gram matrix <x_i, x_j>, shape `(*batch, n, n)`."""
    return jnp.einsum("...id,...jd->...ij", mu.points, mu.points, precision="highest")


def cluster_labels(mu: Measure, threshold: ScalarLike = 0.999) -> Int[Array, "*batch n"]:
    """Single-linkage clusters of tokens in direction.

    Two tokens are linked where cos(x_i, x_j) >= threshold; a cluster is a connected component.
    Clusters are numbered 0, 1, ... by their first token; a token without mass (log-weight -inf)
    is -1. Works under jit, in O(n * block) memory: each sweep takes the least label among the
    neighbours and then follows labels to their root.
    """

    def one(x, logs):
        n = x.shape[0]
        unit = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        massive = ~jnp.isneginf(logs)
        level = jnp.asarray(threshold, x.dtype)

        def sweep(labels):
            def least(args):
                xi, label, i_massive = args
                linked = (jnp.matmul(unit, xi, precision="highest") >= level) & massive & i_massive
                return jnp.minimum(label, jnp.min(jnp.where(linked, labels, n)))

            rows = unit, labels, massive
            new = jax.lax.map(least, rows, batch_size=min(n, max(1, 2**21 // n)))
            # A root takes over the least label that any of its members has seen.
            new = labels.at[labels].min(new)
            return jax.lax.while_loop(lambda a: (a != a[a]).any(), lambda a: a[a], new)

        start = jnp.arange(n), jnp.array(True)
        roots, _ = jax.lax.while_loop(
            lambda carry: carry[1],
            lambda carry: (new := sweep(carry[0]), (new != carry[0]).any()),
            start,
        )
        first = (roots == jnp.arange(n)) & massive
        return jnp.where(massive, jnp.cumsum(first)[roots] - 1, -1)

    return _over_leading(one, mu, "(n)")


def cluster_count(mu: Measure, threshold: ScalarLike = 0.999) -> Int[Array, "*batch"]:
    """The number of clusters of [`jaxflow.observables.cluster_labels`][]."""
    return cluster_labels(mu, threshold).max(axis=-1) + 1


def attention_matrix(
    field: SelfAttention, mu: Measure, x: Float[Array, "*batch m d"] | None = None
) -> Float[Array, "*batch m n"]:
    """A_ij, the weight of token j under mu_{x_i}, for any interaction; x defaults to the tokens.

    The rows of softmax, hardmax and Sinkhorn attention sum to 1.
    """

    def one(x, y, logs):
        tokens = field.tokens(Measure(y, logs))
        queries = field.tokens(Measure(x)).queries
        identity = jnp.eye(mu.n, dtype=y.dtype)
        return field.interaction.expectation(queries, tokens, identity, field.beta)

    mapped = jnp.vectorize(one, signature="(m,d),(n,d),(n)->(m,n)")
    return mapped(mu.points if x is None else x, mu.points, mu.log_probabilities)


def column_defect(field: SelfAttention, mu: Measure) -> Float[Array, "*batch"]:
    """max_j |sum_i w_i A_ij / w_j - 1|: how far attention is from preserving the mass of tokens.

    0 for Sinkhorn attention at convergence, so that the token mean obeys m' = V m.
    """

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

    return _over_leading(one, mu, "()")


# ------------------------------------------------------------------ for flow(observe=...)


class AbstractObservable(eqx.Module):
    """A function (t, mu) -> array that a flow evaluates at each saved time."""

    @abc.abstractmethod
    def __call__(self, t: ScalarLike, mu: Measure) -> Array:
        """The value at time t."""


class InteractionEnergy(AbstractObservable):
    """t, mu -> [`jaxflow.observables.interaction_energy`][]; beta may be traced."""

    beta: Scalar

    def __init__(self, beta: ScalarLike):
        self.beta = jnp.asarray(beta, float)

    def __call__(self, t, mu):
        return interaction_energy(mu, self.beta)


class ClusterCount(AbstractObservable):
    """t, mu -> [`jaxflow.observables.cluster_count`][]."""

    threshold: Scalar

    def __init__(self, threshold: ScalarLike = 0.999):
        self.threshold = jnp.asarray(threshold, float)

    def __call__(self, t, mu):
        return cluster_count(mu, self.threshold)


class KineticEnergy(AbstractObservable):
    """(t, mu) -> int |X_t[mu](x)|^2 mu(dx); its integral in time is the transport cost of a flow
    (Benamou and Brenier 2000; as a regulariser: arXiv 2002.02798).

    **Arguments:** `field`, X.
    """

    field: AbstractField

    def __call__(self, t, mu):
        velocity = self.field(t, mu.points, mu)
        return ((velocity**2).sum(axis=1) * mu.weights.astype(velocity.dtype)).sum()


class AttentionEntropy(AbstractObservable):
    """(t, mu) -> the mean over heads and tokens of -sum_j A_ij log A_ij, A the softmax attention.

    Between 0, each token sees one other, and log n. Of a field with several attention parts, such
    as a sum, the mean over them. O(n * block) memory, as -sum_j A_ij s_ij + log-partition.

    **Arguments:** `field`, with softmax attention somewhere in it.
    """

    field: AbstractField

    def __call__(self, t, mu):
        entropies = [_entropy(part, seen) for part, seen in _attentions(self.field, t, mu)]
        if not entropies:
            raise TypeError(
                f"{type(self.field).__name__} has no attention whose entropy could be taken."
            )
        return sum(entropies) / len(entropies)


def _attentions(field, t, mu):
    """The attention fields inside a field at time t, each with the measure that it sees."""
    match field:
        case SelfAttention() | MultiHeadAttention():
            return [(field, mu)]
        case TimeDependent():
            return _attentions(field.at(t), t, mu)
        case Sum():
            return [pair for part in field.fields for pair in _attentions(part, t, mu)]
        case PreNorm():
            return _attentions(field.field, t, field.seen(mu))
        case PeriNorm() | Scaled():
            return _attentions(field.field, t, mu)
    return []


def _entropy(field, mu):
    if not isinstance(field.interaction, Softmax):
        raise TypeError(f"the entropy of attention is that of softmax, got {field.interaction!r}.")
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
            backend=field.backend,
        )  # fmt: skip
        q, mean, beta = (a.astype(log_partition.dtype) for a in (q, mean, scale))
        return log_partition - beta * (q * mean[:, :-1]).sum(axis=1) - mean[:, -1]

    entropies = jax.vmap(head)(*pairs).mean(axis=0)
    return (entropies * mu.weights.astype(entropies.dtype)).sum()


def _over_leading(fn: Callable, mu: Measure, output: str):
    mapped = jnp.vectorize(fn, signature=f"(n,d),(n)->{output}")
    return mapped(mu.points, mu.log_probabilities)
