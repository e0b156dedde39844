"""Sigmoid attention: each token is weighed by itself, not against the others."""

import jax
import jax.numpy as jnp

from .._rules import real
from .._types import Scalar, ScalarLike
from .interactions import AbstractInteraction, weighted_sums


class Sigmoid(AbstractInteraction):
    """Sigmoid attention: mu_x(dy) = sigma(s(x, y) + bias) mu(dy), sigma(s) = 1 / (1 + e^{-s}).

    (Ramapuram et al., arXiv 2409.04431, where the sum over n tokens has no 1/n and the bias is
    -log n instead: multiply the field by n.) Unnormalised: |E_{mu_x}[v]| <= E_mu[|v|], and a token
    is moved by each other one as if that were the only one. O(n * block) memory.

    **Arguments:** `bias`, a number, which may be traced.

    **Raises:** `ValueError` or `TypeError` for what is no finite number; in use as
    `jaxflow.fields.weighted_sums`.

    ```python
    >>> mu = jaxflow.measure.circle(2)  # x and -x: sigma(1) x / 2 - sigma(-1) x / 2
    >>> field = jaxflow.SelfAttention(interaction=jaxflow.Sigmoid(), geometry=jaxflow.Euclidean())
    >>> round(float(field(0.0, mu.points, mu)[0, 0]), 4)
    0.2311

    ```
    """

    bias: Scalar

    def __init__(self, bias: ScalarLike = 0.0):
        self.bias = real("bias", bias)

    def expectation(self, q, tokens, values, scale):
        weight = lambda q, keys: jax.nn.sigmoid(self._scores(q, keys, scale))
        return weighted_sums(q, tokens, values, weight)

    def trace(self, q, tokens, values, slopes, scale):
        def derivative(q, keys):  # sigma' = sigma(s) sigma(-s)
            s = self._scores(q, keys, scale)
            return jax.nn.sigmoid(s) * jax.nn.sigmoid(-s)

        pulls = (values * slopes).sum(axis=1, keepdims=True)
        return weighted_sums(q, tokens, pulls, derivative)[:, 0]

    def _scores(self, q, keys, scale):
        s = jnp.matmul(keys, q, precision="highest")
        return jnp.asarray(scale, s.dtype) * s + self.bias.astype(s.dtype)
