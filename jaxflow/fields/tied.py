"""Attention with one matrix a head for query, key and value: the symmetric case of the theory."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import array, count, finite, flag, instance, prng_key
from .._types import ArrayLike, Scalar, ScalarLike
from ..geometry import AbstractGeometry, Sphere
from ..measure import Measure
from .base import AbstractCausalField, apply, visible_log_weights
from .interactions import Softmax, Tokens


class TiedAttention(AbstractCausalField):
    """Attention whose query, key and value are one matrix A_h a head, and whose output is A_h^T.

        X[mu](x) = P_x ( sum_h A_h^T E_{mu_x^h}[A_h y] )
        mu_x^h(dy) proportional to exp(beta_h <A_h x, A_h y>) mu(dy)

    For one head it is `jaxflow.SelfAttention` with Q = K = A and V = A^T A = Q^T K, the case in
    which attention ascends an interaction energy (Burger et al., arXiv 2501.03096); with A = I it
    is the model of Geshkovski et al. (arXiv 2312.10794). A token keeps one vector a head.

    **Arguments:**

    - `dim`: d; `heads`: H; `head_dim`: p, by default d/H, for which H must divide d.
    - `beta`: inverse temperatures, a number or one a head, shape `(H,)`; they are parameters.
    - `causal`, `geometry`, `backend`: as in `jaxflow.SelfAttention`.
    - `key`: PRNG key of A_h ~ N(0, 1/d).

    **Raises:** `ValueError` for heads that do not divide the dimension, and numbers that are not
    finite; `TypeError` for what is of another kind than these.

    ```python
    >>> field = jaxflow.fields.TiedAttention(4, 1, beta=2.0, key=jax.random.key(0))
    >>> mu, A = jaxflow.measure.uniform_sphere(5, 4, key=jax.random.key(1)), field.matrix[0]
    >>> same = jaxflow.SelfAttention(A, A, A.T @ A, beta=2.0)
    >>> bool(jnp.allclose(field(0.0, mu.points, mu), same(0.0, mu.points, mu), atol=1e-6))
    True

    ```
    """

    matrix: Float[Array, "H p d"]
    beta: Float[Array, " H"]
    interaction: ClassVar[Softmax] = Softmax()
    window: ClassVar[None] = None
    mask: ClassVar[None] = None
    causal: bool = eqx.field(static=True)
    geometry: AbstractGeometry
    backend: str | None = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        beta: ArrayLike | ScalarLike = 1.0,
        causal: bool = False,
        geometry: AbstractGeometry = Sphere(),
        backend: str | None = None,
        key: PRNGKeyArray,
    ):
        dim, heads = count("dim", dim), count("heads", heads)
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}.")
        p = dim // heads if head_dim is None else count("head_dim", head_dim)
        self.matrix = jax.random.normal(prng_key(key), (heads, p, dim)) / np.sqrt(dim)
        given = finite("beta", jnp.asarray(array("beta", beta), float))
        if given.ndim > 1 or given.shape not in ((), (heads,)):
            raise ValueError(
                f"beta must be a number, or one a head, ({heads},); got {given.shape}."
            )
        self.beta = jnp.broadcast_to(given, (heads,))
        self.causal = flag("causal", causal)
        self.geometry = instance("geometry", geometry, AbstractGeometry, "jaxflow.Sphere()")
        self.backend = backend

    def __call__(self, t, x, mu):
        y = self.keys_values(t, mu.points)
        options = {"causal": self.causal, "backend": self.backend, "signs": mu.signs}
        return self._velocity(x, y, lambda keys: Tokens(keys, keys, mu.log_weights, **options))

    def keys_values(self, t, y, start=0):
        """A_h y, `(n, H, p)`: both."""
        heads, p, d = self.matrix.shape
        return apply(self.matrix.reshape(heads * p, d), y).reshape(len(y), heads, p)

    def attend(self, t, x, keys_values, index):
        seen = visible_log_weights(keys_values, index)
        tokens = lambda keys: Tokens(keys, keys, seen, backend=self.backend)
        return self._velocity(x, keys_values, tokens)

    def scores(self, mu: Measure) -> tuple[Scalar, tuple[Array, Array]]:
        """1, and queries beta_h A_h y and keys A_h y of the tokens for each head, `(H, n, p)`."""
        keys = self.keys_values(0.0, mu.points).transpose(1, 0, 2)
        queries = self.beta.astype(keys.dtype)[:, None, None] * keys
        return jnp.ones((), keys.dtype), (queries, keys)

    def _velocity(self, x, y, tokens):
        head = lambda beta, q, k: tokens(k).attend(q, k, beta)[0]
        queries = self.keys_values(0.0, x)
        means = jax.vmap(head, in_axes=(0, 1, 1), out_axes=1)(self.beta, queries, y)
        heads, p, d = self.matrix.shape
        force = jnp.matmul(
            means.reshape(len(x), heads * p),
            self.matrix.astype(means.dtype).reshape(heads * p, d),
            precision="highest",
        )
        return self.geometry.project(x, force)
