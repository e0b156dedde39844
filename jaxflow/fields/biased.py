"""Softmax attention with a potential on the keys.

    L2      mu_x(dy) proportional to exp(-beta/2 |Q x - K y|^2) mu(dy)
    ALiBi   mu_{x_i}(dy_j) proportional to exp(s(x_i, y_j) - slope (i - j)) mu(dy_j),   j <= i

What depends on the query alone cancels in the mean, so each is one call of the operation with a
potential on the keys: -beta/2 |K y|^2, and slope j.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._rules import count, reals
from .._types import ArrayLike, ScalarLike
from .interactions import AbstractInteraction, covariance_trace, moment_channels, positive_weights


class L2(AbstractInteraction):
    """L2 attention: mu_x(dy) proportional to exp(-beta/2 |Q x - K y|^2) mu(dy).

    With Q and K of full rank it is Lipschitz on R^d, which dot products are not (Kim, Papamakarios
    and Mnih, arXiv 2006.04710). Where all |K y| are equal, as on the sphere with K = I, it is
    softmax attention.

    ```python
    >>> mu = jaxflow.measure.uniform_sphere(5, 3, key=jax.random.key(0))
    >>> distances = jaxflow.SelfAttention(beta=2.0, interaction=jaxflow.L2())
    >>> products = jaxflow.SelfAttention(beta=2.0)
    >>> difference = distances(0.0, mu.points, mu) - products(0.0, mu.points, mu)
    >>> bool(jnp.abs(difference).max() < 1e-6)
    True

    ```
    """

    def expectation(self, q, tokens, values, scale):
        return tokens.attend(q, values, scale, _half_squares(tokens, scale))[0]

    def trace(self, q, tokens, values, slopes, scale):
        # The slope of the score is k' - beta Q^T Q x; what is the same for all keys cancels.
        channels = moment_channels(values, slopes)
        return covariance_trace(tokens.attend(q, channels, scale, _half_squares(tokens, scale))[0])


def _half_squares(tokens, scale: ScalarLike) -> Float[Array, " n"]:
    """-beta/2 |k_j|^2."""
    positive_weights(tokens, "L2")
    logs = tokens.log_probabilities
    squares = (tokens.keys.astype(logs.dtype) ** 2).sum(axis=1)
    return -0.5 * jnp.asarray(scale, logs.dtype) * squares


class ALiBi(AbstractInteraction):
    """Attention with linear biases: the score of a key falls with its distance in index.

        s_ij = beta <Q x_i, K y_j> - slope (i - j),    j <= i

    (Press, Smith and Lewis, arXiv 2108.12409.) It is for causal fields: of the distance only j
    depends on the key. (Rotary embeddings, the other encoding of positions, are the `rotary` of
    `jaxflow.MultiHeadAttention`.)

    **Arguments:** `slope`: a number, or one a head, shape `(H,)`, for
    `jaxflow.MultiHeadAttention`; `jaxflow.fields.alibi_slopes` are the published ones.

    **Raises:** `ValueError` or `TypeError` for what is neither; a field that is not causal refuses
    it.

    ```python
    >>> mu = jaxflow.Measure(jnp.eye(3))  # all scores of others are 0
    >>> field = jaxflow.SelfAttention(
    ...     beta=0.0, interaction=jaxflow.ALiBi(jnp.log(2.0)), causal=True,
    ...     geometry=jaxflow.Euclidean(),
    ... )
    >>> (7 * field(0.0, mu.points, mu))[2].round(4).tolist()
    [1.0, 2.0, 4.0]

    ```
    """

    slope: Float[Array, "*heads"]

    def __init__(self, slope: ArrayLike | ScalarLike):
        self.slope = reals("slope", slope)
        if self.slope.ndim > 1:
            raise ValueError(
                f"slope must be a number, or one a head, shape (H,); got {self.slope.shape}."
            )

    def expectation(self, q, tokens, values, scale):
        return tokens.attend(q, values, scale, self._potential(tokens))[0]

    def trace(self, q, tokens, values, slopes, scale):
        channels = moment_channels(values, slopes)
        return covariance_trace(tokens.attend(q, channels, scale, self._potential(tokens))[0])

    def _potential(self, tokens):
        if self.slope.ndim:
            raise ValueError(
                f"{len(self.slope)} slopes are those of as many heads: use MultiHeadAttention, or "
                "give one slope."
            )
        dtype = tokens.log_probabilities.dtype
        return self.slope.astype(dtype) * jnp.arange(tokens.keys.shape[0]).astype(dtype)


def alibi_slopes(heads: int) -> Float[Array, " H"]:
    """2^{-8 h / H} for the heads h = 1, ..., H (arXiv 2108.12409, for H a power of 2).

    **Arguments:** `heads`: H, at least 1.

    **Returns:** the slopes, descending, shape `(H,)`.

    **Raises:** `ValueError` or `TypeError` for no number of heads.

    ```python
    >>> jaxflow.fields.alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]

    ```
    """
    heads = count("heads", heads)
    return 2.0 ** (-8 * jnp.arange(1, heads + 1).astype(float) / heads)
