"""Normalisation, inside fields and as geometry.

    Pre-LN    X[mu](x) = F[N_# mu](N(x))            on R^d
    Peri-LN   X[mu](x) = N_2( F[N_# mu](N(x)) )     on R^d
    Post-LN   the geometry Sphere(sqrt(d)) of any field: its retraction is layer normalisation

N is LayerNorm or RMSNorm, N_# mu the law of N(y) for y of law mu (arXiv 2510.22026).
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import accumulation_dtype
from ..geometry import AbstractGeometry, Euclidean
from ..measure import Measure
from .base import AbstractField


class AbstractNorm(eqx.Module):
    """A normalisation of each token."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """N(x)."""


class LayerNorm(AbstractNorm):
    """N(x) = gain (x - mean(x)) / sqrt(var(x) + epsilon) + bias (arXiv 1607.06450).

    Its image is the ellipsoid of radius sqrt(d) in the hyperplane sum_i x_i = 0, stretched by the
    gain. Moments are taken in float32 at least.
    """

    gain: Float[Array, " d"]
    bias: Float[Array, " d"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, dim: int, epsilon: float = 1e-5):
        self.gain, self.bias = jnp.ones(dim), jnp.zeros(dim)
        self.epsilon = epsilon

    def __call__(self, x):
        wide = _wide(x)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        scale = jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + self.epsilon)
        gain, bias = self.gain.astype(wide.dtype), self.bias.astype(wide.dtype)
        return (_rows(gain, wide) * (scale * centred) + _rows(bias, wide)).astype(x.dtype)


class RMSNorm(AbstractNorm):
    """N(x) = gain x / sqrt(mean(x^2) + epsilon) (arXiv 1910.07467).

    Its image is the sphere of radius sqrt(d), stretched by the gain.
    """

    gain: Float[Array, " d"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, dim: int, epsilon: float = 1e-5):
        self.gain = jnp.ones(dim)
        self.epsilon = epsilon

    def __call__(self, x):
        wide = _wide(x)
        scale = jax.lax.rsqrt((wide**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return (_rows(self.gain.astype(wide.dtype), wide) * (scale * wide)).astype(x.dtype)


class PreNorm(AbstractField):
    """X[mu](x) = F[N_# mu](N(x)) on R^d: a field that sees normalised tokens.

    **Arguments:** `field` F, on R^d; `norm` N; `dtype`, in which F is computed (its parameters and
    the state keep theirs), such as bfloat16; `None` is that of the state.
    """

    field: AbstractField
    norm: AbstractNorm
    dtype: jnp.dtype | None = eqx.field(static=True, converter=lambda x: x and jnp.dtype(x))

    def __init__(self, field: AbstractField, norm: AbstractNorm, *, dtype=None):
        _check_flat(field)
        self.field = field
        self.norm = norm
        self.dtype = dtype

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def _seen(self, x):
        return self.norm(x).astype(self.dtype or x.dtype)

    def seen(self, mu: Measure) -> Measure:
        """N_# mu."""
        return Measure(self._seen(mu.points), mu.log_weights)

    def __call__(self, t, x, mu):
        law = self.seen(mu)
        queries = law.points if mu.points is x else self._seen(x)
        return self.field(t, queries, law).astype(x.dtype)

    def keys_values(self, t, y, start=0):
        return self.field.keys_values(t, self._seen(y), start)

    def attend(self, t, x, keys_values, index):
        return self.field.attend(t, self._seen(x), keys_values, index).astype(x.dtype)


class PeriNorm(AbstractField):
    """X[mu](x) = N( F[mu](x) ) on R^d: a field whose velocity is normalised.

    Around a `PreNorm` it is Peri-LN.

    **Arguments:** `field` F, on R^d; `norm` N.
    """

    field: AbstractField
    norm: AbstractNorm

    def __init__(self, field: AbstractField, norm: AbstractNorm):
        _check_flat(field)
        self.field = field
        self.norm = norm

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def __call__(self, t, x, mu):
        return self.norm(self.field(t, x, mu))

    def keys_values(self, t, y, start=0):
        return self.field.keys_values(t, y, start)

    def attend(self, t, x, keys_values, index):
        return self.norm(self.field.attend(t, x, keys_values, index))


def _check_flat(field: AbstractField):
    if not isinstance(field.geometry, Euclidean):
        raise ValueError(
            f"normalised tokens move in R^d, got a field on {field.geometry}. Pass "
            "geometry=jaxflow.Euclidean() to it."
        )


def _wide(x):
    return x.astype(accumulation_dtype(x.dtype))


def _rows(vector, x):
    """The vector, for each token of x."""
    return jnp.broadcast_to(vector, x.shape)
