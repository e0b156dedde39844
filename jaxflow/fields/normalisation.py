"""Normalisation, inside fields and as geometry.

    Post-LN        X[mu](x) = P_x F[mu](x)                      on the sphere
    nGPT           X[mu](x) = alpha P_x ( F[mu](x) / |F[mu](x)| )    on the sphere
    sqrt-scaling   X_t[mu](x) = X[mu](x) / sqrt(t + 1)
    Pre-LN         X[mu](x) = F[N_# mu](N(x))                   on R^d
    Peri-LN        X[mu](x) = N_2( F[N_# mu](N(x)) )            on R^d
    add and norm   X[mu](x) = N(x + F[mu](x)) - x               on R^d

F is a field on R^d; N is UnitNorm, LayerNorm or RMSNorm, N_# mu the law of N(y) for y of law mu
(arXiv 2510.22026). In all of them the direction theta = x / |x| moves with the attention A of the
directions, theta' = P_theta A / s, at a speed s of its own: Post 1, Pre |x|, Peri |x| |A|,
nGPT |A| / alpha, sqrt-scaling sqrt(t + 1).

What LayerNorm's gain and bias do to Post-LN is the geometry `jaxflow.Ellipsoid`.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._rules import constant, count, floating, instance, not_negative, positive, real
from .._types import Scalar, ScalarLike, accumulation_dtype
from ..geometry import AbstractGeometry, Euclidean, Sphere
from .base import AbstractDivergenceField, AbstractField, AbstractWrapper, divergence, is_field


class AbstractNorm(eqx.Module):
    """A normalisation of each token."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """N(x)."""


class UnitNorm(AbstractNorm):
    """N(x) = radius x / |x|, and N(0) = 0.

    **Arguments:** `radius`, a positive number, 1 if not given; it may be traced.

    **Raises:** `ValueError` or `TypeError` for a radius that is no positive number.
    """

    radius: Scalar

    def __init__(self, radius: ScalarLike = 1.0):
        self.radius = real("the radius of UnitNorm", radius, "positive and finite", positive)

    def __call__(self, x):
        wide = _wide(x)
        square = (wide**2).sum(axis=-1, keepdims=True)
        scale = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
        return (self.radius.astype(wide.dtype) * scale * wide).astype(x.dtype)


class LayerNorm(AbstractNorm):
    """N(x) = gain (x - mean(x)) / sqrt(var(x) + epsilon) + bias (arXiv 1607.06450).

    Its image is the ellipsoid of radius sqrt(d) in the hyperplane sum_i x_i = 0, stretched by the
    gain. Moments are taken in float32 at least.

    **Arguments:** `dim`, the dimension d of a token; `epsilon`, added to the variance, 0 or more.
    The gain starts at 1 and the bias at 0, shape `(d,)`.

    **Raises:** `ValueError` or `TypeError` where these are no such numbers.
    """

    gain: Float[Array, " d"]
    bias: Float[Array, " d"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, dim: int, epsilon: float = 1e-5):
        dim = count("dim", dim)
        self.gain, self.bias = jnp.ones(dim), jnp.zeros(dim)
        self.epsilon = constant("epsilon", epsilon, "finite and not negative", not_negative)

    def __call__(self, x):
        wide = _wide(x)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        scale = jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return (_rows(self.gain, wide) * (scale * centred) + _rows(self.bias, wide)).astype(x.dtype)


class RMSNorm(AbstractNorm):
    """N(x) = gain x / sqrt(mean(x^2) + epsilon) (arXiv 1910.07467).

    Its image is the sphere of radius sqrt(d), stretched by the gain.

    **Arguments:** `dim`, the dimension d of a token; `epsilon`, added to the mean square, 0 or
    more. The gain starts at 1, shape `(d,)`.

    **Raises:** `ValueError` or `TypeError` where these are no such numbers.
    """

    gain: Float[Array, " d"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, dim: int, epsilon: float = 1e-5):
        self.gain = jnp.ones(count("dim", dim))
        self.epsilon = constant("epsilon", epsilon, "finite and not negative", not_negative)

    def __call__(self, x):
        wide = _wide(x)
        scale = jax.lax.rsqrt((wide**2).mean(axis=-1, keepdims=True) + self.epsilon)
        return (_rows(self.gain, wide) * (scale * wide)).astype(x.dtype)


class PreNorm(AbstractWrapper):
    """X[mu](x) = F[N_# mu](N(x)) on R^d: a field that sees normalised tokens.

    **Arguments:** `field` F, on R^d; `norm` N; `dtype`, in which F is computed (its parameters and
    the state keep theirs), such as bfloat16; `None` is that of the state.

    **Raises:** `ValueError` for a field on another geometry, `TypeError` for what is no field, norm
    or floating-point dtype.
    """

    field: AbstractField
    norm: AbstractNorm
    dtype: jnp.dtype | None = eqx.field(static=True)
    linear: ClassVar[bool] = True

    def __init__(self, field: AbstractField, norm: AbstractNorm, *, dtype: Any = None):
        self.field = _flat(field)
        self.norm = _norm(norm)
        self.dtype = floating("dtype", dtype)

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def enter(self, x):
        return self.norm(x).astype(self.dtype or x.dtype)

    def leave(self, t, x, v):
        return v.astype(x.dtype)


class PeriNorm(AbstractWrapper):
    """X[mu](x) = N( F[mu](x) ) on R^d: a field whose velocity is normalised.

    Around a `PreNorm` it is Peri-LN.

    **Arguments:** `field` F, on R^d; `norm` N.

    **Raises:** `ValueError` for a field on another geometry, `TypeError` for what is no field or
    norm.
    """

    field: AbstractField
    norm: AbstractNorm
    linear: ClassVar[bool] = False

    def __init__(self, field: AbstractField, norm: AbstractNorm):
        self.field = _flat(field)
        self.norm = _norm(norm)

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def enter(self, x):
        return x

    def leave(self, t, x, v):
        return self.norm(v)


class AddNorm(AbstractWrapper):
    """X[mu](x) = N(x + F[mu](x)) - x on R^d: the layer of the first transformer and of BERT.

    Euler's step of length 1 is theirs, N(x + F[mu](x)) (Vaswani et al., arXiv 1706.03762). As a
    flow x relaxes to it. Where all norms have one gain and bias, tokens lie on one ellipsoid, on
    which `jaxflow.PostNorm` moves them.

    **Arguments:** `field` F, on R^d; `norm` N; `dtype`, in which F is computed, as in
    `jaxflow.PreNorm`.

    **Raises:** `ValueError` for a field on another geometry, `TypeError` for what is no field, norm
    or floating-point dtype.
    """

    field: AbstractField
    norm: AbstractNorm
    dtype: jnp.dtype | None = eqx.field(static=True)
    linear: ClassVar[bool] = False

    def __init__(self, field: AbstractField, norm: AbstractNorm, *, dtype: Any = None):
        self.field = _flat(field)
        self.norm = _norm(norm)
        self.dtype = floating("dtype", dtype)

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def enter(self, x):
        return x.astype(self.dtype or x.dtype)

    def leave(self, t, x, v):
        return self.norm(x + v.astype(x.dtype)) - x


class PostNorm(AbstractWrapper):
    """X[mu](x) = P_x F[mu](x): a field of R^d on a sphere or ellipsoid, as Post-LN puts it there.

    **Arguments:** `field` F, on R^d; `geometry`, such as `Sphere()`, `Sphere(sqrt(d))`, or
    `Ellipsoid(gain, bias)`.

    **Raises:** `ValueError` for a field on another geometry, `TypeError` for what is no field or
    geometry.
    """

    field: AbstractField
    geometry: AbstractGeometry
    linear: ClassVar[bool] = True

    def __init__(self, field: AbstractField, geometry: AbstractGeometry = Sphere()):
        self.field = _flat(field)
        self.geometry = instance("geometry", geometry, AbstractGeometry, "jaxflow.Sphere()")

    def enter(self, x):
        return x

    def leave(self, t, x, v):
        return self.geometry.project(x, v)


class NGPT(AbstractWrapper):
    """X[mu](x) = alpha P_x ( F[mu](x) / |F[mu](x)| ) on the unit sphere (nGPT, arXiv 2410.01131).

    **Arguments:** `field` F, on R^d; `alpha`, the step towards the normalised output, a positive
    number, which may be traced.

    **Raises:** `ValueError` for a field on another geometry; `ValueError` or `TypeError` for an
    alpha that is no positive number, and for what is no field.
    """

    field: AbstractField
    alpha: Scalar
    linear: ClassVar[bool] = False

    def __init__(self, field: AbstractField, alpha: ScalarLike = 1.0):
        self.field = _flat(field)
        self.alpha = real("alpha", alpha, "positive and finite", positive)

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Sphere()

    def enter(self, x):
        return x

    def leave(self, t, x, v):
        # Not UnitNorm(alpha), which would check a number that training has moved.
        return self.geometry.project(x, self.alpha.astype(x.dtype) * UnitNorm()(v))


class SqrtScaling(AbstractDivergenceField, AbstractWrapper):
    """X_t[mu](x) = F_t[mu](x) / sqrt(t + 1), for t > -1: residual branches that shrink with depth.

    **Arguments:** `field` F, on any geometry.

    **Raises:** `TypeError` for what is no field.
    """

    field: AbstractField
    linear: ClassVar[bool] = True

    def __init__(self, field: AbstractField):
        self.field = is_field(field)

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def enter(self, x):
        return x

    def leave(self, t, x, v):
        return v * jax.lax.rsqrt(jnp.asarray(t, v.dtype) + 1)

    def divergence(self, t, x, mu):
        return self.leave(t, x, divergence(self.field, t, x, mu))


def _flat(field: AbstractField) -> AbstractField:
    if not isinstance(is_field(field).geometry, Euclidean):
        raise ValueError(
            f"normalised tokens move in R^d, got a field on {field.geometry}. Pass "
            "geometry=jaxflow.Euclidean() to it."
        )
    return field


def _norm(norm: AbstractNorm) -> AbstractNorm:
    return instance("norm", norm, AbstractNorm, "jaxflow.LayerNorm(dim)")


def _wide(x):
    return x.astype(accumulation_dtype(x.dtype))


def _rows(vector, x):
    """The vector, for each token of x."""
    if len(vector) != x.shape[-1]:
        raise ValueError(
            f"a norm of dimension {len(vector)} takes tokens of that dimension, got {x.shape[-1]}."
        )
    return jnp.broadcast_to(vector.astype(x.dtype), x.shape)
