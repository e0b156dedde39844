"""Fields that move each token on its own.

FeedForward        X(x) = P_x ( W2 sigma(W1 x + b1) + b2 )
GatedFeedForward   X(x) = P_x ( W2 (sigma(W1 x) * W3 x) )
LinearDrift        X(x) = P_x ( A x )
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import count, function, instance, prng_key, reals
from .._types import ArrayLike, ScalarLike
from ..geometry import AbstractGeometry, Euclidean
from .base import AbstractCausalField, apply


class AbstractTokenwiseField(AbstractCausalField):
    """X(x), which sees no other token: only `velocity` is to be written."""

    @abc.abstractmethod
    def velocity(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """X at each of n tokens."""

    def keys_values(self, t, y, start=0):
        return None

    def attend(self, t, x, keys_values, index):
        return self.velocity(x)

    def __call__(self, t, x, mu):
        return self.velocity(x)


class FeedForward(AbstractTokenwiseField):
    """The two-layer perceptron of a residual network or neural ODE (E 2017; Chen et al. 2018).

        X(x) = P_x ( W2 sigma(W1 x + b1) + b2 )

    **Arguments:** `dim` d; `width` of the hidden layer; `activation`, sigma, a function of arrays;
    `geometry`; `key`, PRNG key of W1 ~ N(0, 1/d) and W2 ~ N(0, 1/width) (the biases start at 0).

    **Raises:** `ValueError` for sizes below 1, `TypeError` for what is of another kind than these.

    ```python
    >>> field = jaxflow.FeedForward(8, 16, key=jax.random.key(0))
    >>> mu = jaxflow.measure.gaussian(5, 8, key=jax.random.key(1))
    >>> (jaxflow.MultiHeadAttention(8, 2, key=jax.random.key(2)) + field)(0.0, mu.points, mu).shape
    (5, 8)

    ```
    """

    weight_in: Float[Array, "width d"]
    bias_in: Float[Array, " width"]
    weight_out: Float[Array, "d width"]
    bias_out: Float[Array, " d"]
    activation: Callable = eqx.field(static=True)
    geometry: AbstractGeometry

    def __init__(
        self,
        dim: int,
        width: int,
        activation: Callable = jax.nn.relu,
        *,
        geometry: AbstractGeometry = Euclidean(),
        key: PRNGKeyArray,
    ):
        dim, width = count("dim", dim), count("width", width)
        key_in, key_out = jax.random.split(prng_key(key))
        self.weight_in = jax.random.normal(key_in, (width, dim)) / np.sqrt(dim)
        self.bias_in = jnp.zeros(width)
        self.weight_out = jax.random.normal(key_out, (dim, width)) / np.sqrt(width)
        self.bias_out = jnp.zeros(dim)
        self.activation = function("activation", activation)
        self.geometry = instance("geometry", geometry, AbstractGeometry, "jaxflow.Sphere()")

    def velocity(self, x):
        affine = lambda w, x, b: apply(w, x) + b.astype(x.dtype)[None]
        hidden = self.activation(affine(self.weight_in, x, self.bias_in))
        return self.geometry.project(x, affine(self.weight_out, hidden, self.bias_out))


class GatedFeedForward(AbstractTokenwiseField):
    """The gated perceptron of Llama and its kind (Shazeer, arXiv 2002.05202), SwiGLU with SiLU.

        X(x) = P_x ( W2 (sigma(W1 x) * W3 x) ),    * entry by entry

    **Arguments:** as in `jaxflow.FeedForward`; W1, W3 ~ N(0, 1/d) are `weight_in` and
    `weight_gated`, W2 ~ N(0, 1/width) is `weight_out`. There are no biases.

    **Raises:** `ValueError` for sizes below 1, `TypeError` for what is of another kind than these.

    ```python
    >>> field = jaxflow.fields.GatedFeedForward(8, 16, key=jax.random.key(0))
    >>> mu = jaxflow.measure.gaussian(5, 8, key=jax.random.key(1))
    >>> field(0.0, mu.points, mu).shape
    (5, 8)

    ```
    """

    weight_in: Float[Array, "width d"]
    weight_gated: Float[Array, "width d"]
    weight_out: Float[Array, "d width"]
    activation: Callable = eqx.field(static=True)
    geometry: AbstractGeometry

    def __init__(
        self,
        dim: int,
        width: int,
        activation: Callable = jax.nn.silu,
        *,
        geometry: AbstractGeometry = Euclidean(),
        key: PRNGKeyArray,
    ):
        dim, width = count("dim", dim), count("width", width)
        keys = jax.random.split(prng_key(key), 3)
        self.weight_in = jax.random.normal(keys[0], (width, dim)) / np.sqrt(dim)
        self.weight_gated = jax.random.normal(keys[1], (width, dim)) / np.sqrt(dim)
        self.weight_out = jax.random.normal(keys[2], (dim, width)) / np.sqrt(width)
        self.activation = function("activation", activation)
        self.geometry = instance("geometry", geometry, AbstractGeometry, "jaxflow.Sphere()")

    def velocity(self, x):
        hidden = self.activation(apply(self.weight_in, x)) * apply(self.weight_gated, x)
        return self.geometry.project(x, apply(self.weight_out, hidden))


class LinearDrift(AbstractTokenwiseField):
    """X(x) = P_x ( A x ).

    `SelfAttention(interaction=Hardmax(), geometry=Euclidean()) + LinearDrift(-1.0)` has the leaders
    of arXiv 2407.01602. To hardmax attention, whose weights do not change when all tokens are
    scaled, adding it is also the change of variable z = e^{-t} x; to softmax attention it is not:
    the rescaled tokens of arXiv 2305.05465 are `jaxflow.Rescaled`.

    **Arguments:** `matrix`, A: a number a (for a I) or shape `(d, d)`; `geometry`.

    **Raises:** `ValueError` for another shape or entries that are not finite, `TypeError` for what
    is of another kind than these.
    """

    matrix: Float[Array, ""] | Float[Array, "d d"]
    geometry: AbstractGeometry

    def __init__(self, matrix: ArrayLike | ScalarLike, *, geometry: AbstractGeometry = Euclidean()):
        matrix = reals("matrix", matrix)
        if matrix.ndim not in (0, 2) or len(set(matrix.shape)) > 1:
            raise ValueError(f"matrix must be a number or (d, d), got shape {matrix.shape}.")
        self.matrix = matrix
        self.geometry = instance("geometry", geometry, AbstractGeometry, "jaxflow.Sphere()")

    def velocity(self, x):
        multiple = self.matrix.ndim == 0
        moved = self.matrix.astype(x.dtype) * x if multiple else apply(self.matrix, x)
        return self.geometry.project(x, moved)
