"""Normalisation, inside fields and as geometry.

    Post-LN        X[mu](x) = P_x F[mu](x)                      on the sphere
    nGPT           X[mu](x) = alpha P_x ( F[mu](x) / |F[mu](x)| )    on the sphere
    sqrt-scaling   X_t[mu](x) = X[mu](x) / sqrt(t + 1)
    Pre-LN         X[mu](x) = F[N_# mu](N(x))                   on R^d
    Peri-LN        X[mu](x) = N_2( F[N_# mu](N(x)) )            on R^d

F is a field on R^d; N is UnitNorm, LayerNorm or RMSNorm, N_# mu the law of N(y) for y of law mu
(arXiv 2510.22026). In all of them the direction theta = x / |x| moves with the attention A of the
directions, theta' = P_theta A / s, at a speed s of its own: Post 1, Pre |x|, Peri |x| |A|,
nGPT |A| / alpha, sqrt-scaling sqrt(t + 1).

What LayerNorm's gain and bias do to Post-LN is the geometry [`jaxflow.Ellipsoid`][].
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import Scalar, ScalarLike, accumulation_dtype
from ..geometry import AbstractGeometry, Euclidean, Sphere
from ..measure import Measure
from .base import AbstractField


class AbstractNorm(eqx.Module):
    """A normalisation of each token."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """N(x)."""


class UnitNorm(AbstractNorm):
    """N(x) = radius x / |x|, and N(0) = 0.

    **Arguments:** `radius`, 1 if not given; it may be traced.
    """

    radius: Scalar

    def __init__(self, radius: ScalarLike = 1.0):
        self.radius = jnp.asarray(radius, float)

    def __call__(self, x):
        wide = _wide(x)
        square = (wide**2).sum(axis=-1, keepdims=True)
        scale = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
        return (self.radius.astype(wide.dtype) * scale * wide).astype(x.dtype)


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


class PostNorm(AbstractField):
    """X[mu](x) = P_x F[mu](x): a field of R^d on a sphere or ellipsoid, as Post-LN puts it there.

    **Arguments:** `field` F, on R^d; `geometry`, such as `Sphere()`, `Sphere(sqrt(d))`, or
    `Ellipsoid(gain, bias)`.
    """

    field: AbstractField
    geometry: AbstractGeometry

    def __init__(self, field: AbstractField, geometry: AbstractGeometry = Sphere()):
        _check_flat(field)
        self.field = field
        self.geometry = geometry

    def __call__(self, t, x, mu):
        return self.geometry.project(x, self.field(t, x, mu))

    def keys_values(self, t, y, start=0):
        return self.field.keys_values(t, y, start)

    def attend(self, t, x, keys_values, index):
        return self.geometry.project(x, self.field.attend(t, x, keys_values, index))


class NGPT(AbstractField):
    """X[mu](x) = alpha P_x ( F[mu](x) / |F[mu](x)| ) on the unit sphere (nGPT, arXiv 2410.01131).

    **Arguments:** `field` F, on R^d; `alpha`, the step towards the normalised output, which may be
    traced.
    """

    field: AbstractField
    alpha: Scalar

    def __init__(self, field: AbstractField, alpha: ScalarLike = 1.0):
        _check_flat(field)
        self.field = field
        self.alpha = jnp.asarray(alpha, float)

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Sphere()

    def _projected(self, x, force):
        return self.geometry.project(x, UnitNorm(self.alpha)(force))

    def __call__(self, t, x, mu):
        return self._projected(x, self.field(t, x, mu))

    def keys_values(self, t, y, start=0):
        return self.field.keys_values(t, y, start)

    def attend(self, t, x, keys_values, index):
        return self._projected(x, self.field.attend(t, x, keys_values, index))


class SqrtScaling(AbstractField):
    """X_t[mu](x) = F_t[mu](x) / sqrt(t + 1), for t > -1: residual branches that shrink with depth.

    **Arguments:** `field` F, on any geometry.
    """

    field: AbstractField

    def __init__(self, field: AbstractField):
        self.field = field

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def _scaled(self, t, velocity):
        return velocity * jax.lax.rsqrt(jnp.asarray(t, velocity.dtype) + 1)

    def __call__(self, t, x, mu):
        return self._scaled(t, self.field(t, x, mu))

    def keys_values(self, t, y, start=0):
        return self.field.keys_values(t, y, start)

    def attend(self, t, x, keys_values, index):
        return self._scaled(t, self.field.attend(t, x, keys_values, index))


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
