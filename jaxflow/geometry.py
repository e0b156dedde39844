"""The spaces that tokens live on: project, retract, exp, distance, divergence correction.

    Euclidean         R^d       P_x = I
    Sphere(R)         |x| = R   P_x v = v - <x, v> x / R^2
    Ellipsoid(g, b)   x = g z + b,  |z| = sqrt(d),  sum_i z_i = 0: where LayerNorm puts tokens

A field owns its geometry; solvers and densities read `field.geometry`. Every method acts on the
last axis and maps over all others.
"""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._rules import check_real, known, positive, reals
from ._types import ArrayLike, accumulation_dtype, is_concrete

__all__ = [
    "AbstractGeometry",
    "Ellipsoid",
    "Euclidean",
    "Sphere",
]


def __dir__() -> list[str]:
    return __all__


Vectors = Float[Array, "*shape d"]
AnyVectors = Float[Array | np.ndarray, "*shape d"]
AnyBools = Bool[Array | np.ndarray, "*shape"]


class AbstractGeometry(eqx.Module):
    """A submanifold of R^d in coordinates of R^d.

    Lengths and angles are those of `inner`, a constant inner product on R^d.
    """

    @abc.abstractmethod
    def inner(self, u: Vectors, v: Vectors) -> Float[Array, "*shape"]:
        """The inner product of two vectors."""

    @abc.abstractmethod
    def project(self, x: Vectors, v: Vectors) -> Vectors:
        """P_x v: the orthogonal projection of v on the tangent space at x.

        **Raises:** `ValueError` where x and v differ in shape.
        """

    @abc.abstractmethod
    def retract(self, x: Vectors) -> Vectors:
        """The point of the space nearest to x; nan where none is nearest (the sphere's centre)."""

    @abc.abstractmethod
    def exp(self, x: Vectors, v: Vectors) -> Vectors:
        """The point at time 1 of the geodesic from x with velocity v (tangent at x)."""

    @abc.abstractmethod
    def exp_inverse_derivative(self, x: Vectors, u: Vectors, v: Vectors) -> Vectors:
        """(D exp_x(u))^{-1} v, for v tangent at exp_x(u): the velocity in normal coordinates at x
        of a point at u that moves with v. For u shorter than the way to the cut locus."""

    @abc.abstractmethod
    def distance(self, x: Vectors, y: Vectors) -> Float[Array, "*shape"]:
        """The length of the shortest geodesic from x to y.

        **Raises:** `ValueError` where x and y differ in shape.
        """

    @abc.abstractmethod
    def normals(self, x: Vectors) -> tuple[Vectors, ...]:
        """An orthonormal basis of the normal space at x; empty on R^d."""

    @abc.abstractmethod
    def divergence_correction(self, x: Vectors, f: Vectors) -> Float[Array, "*shape"]:
        """What div(P f) has beyond tr(P_x Df) at x.

        On the sphere, D(f - <x, f> x / R^2) leaves -(d - 1) <x, f> / R^2.
        """

    @abc.abstractmethod
    def contains(self, x: AnyVectors) -> AnyBools:
        """Whether x is a point of the space, up to ten times the root of its dtype's epsilon.

        Of an array of NumPy the answer is one too, found on the host without a compilation.
        """


class Euclidean(AbstractGeometry):
    """R^d."""

    def inner(self, u: Vectors, v: Vectors) -> Float[Array, "*shape"]:
        return _dot(u, v)

    def project(self, x: Vectors, v: Vectors) -> Vectors:
        return v

    def retract(self, x: Vectors) -> Vectors:
        return x

    def exp(self, x: Vectors, v: Vectors) -> Vectors:
        return x + v

    def exp_inverse_derivative(self, x: Vectors, u: Vectors, v: Vectors) -> Vectors:
        return v

    def distance(self, x: Vectors, y: Vectors) -> Float[Array, "*shape"]:
        _check_shapes(x, y)
        return _norm(x - y)

    def normals(self, x: Vectors) -> tuple[Vectors, ...]:
        return ()

    def divergence_correction(self, x: Vectors, f: Vectors) -> Float[Array, "*shape"]:
        return jnp.zeros(x.shape[:-1], x.dtype)

    def contains(self, x: AnyVectors) -> AnyBools:
        return _array_library(x).ones(x.shape[:-1], bool)


class Sphere(AbstractGeometry):
    """The sphere |x| = radius in R^d.

    **Arguments:** `radius`, a positive number (layer normalisation without its gain has
    radius sqrt(d)).

    **Raises:** `ValueError` or `TypeError` where the radius is not positive and finite.

    ```python
    >>> jaxflow.Sphere(10.0).retract(jnp.array([3.0, 4.0])).tolist()
    [6.0, 8.0]

    ```
    """

    radius: float = 1.0

    def __check_init__(self):
        check_real("the radius of a sphere", self.radius, "positive and finite", positive)

    def inner(self, u: Vectors, v: Vectors) -> Float[Array, "*shape"]:
        return _dot(u, v)

    def project(self, x: Vectors, v: Vectors) -> Vectors:
        return v - _dot(x, v)[..., None] * x / self.radius**2

    def retract(self, x: Vectors) -> Vectors:
        length = _norm(x)[..., None]
        return self.radius * x / length

    def exp(self, x: Vectors, v: Vectors) -> Vectors:
        angle = (_norm(v) / self.radius)[..., None]
        # jnp.sinc(a / pi) = sin(a) / a, smooth at 0.
        return jnp.cos(angle) * x + jnp.sinc(angle / jnp.pi) * v

    def exp_inverse_derivative(self, x: Vectors, u: Vectors, v: Vectors) -> Vectors:
        # With a = |u| / R, y = exp_x(u) = cos a x + (sin a / a) u: D exp_x(u) keeps the length of
        # what is along the geodesic and multiplies what is orthogonal to it, and to x, by
        # sin a / a. Since <v, y> = 0, with e = <v, x> / R^2, its inverse is
        #     (a / sin a) (v - e (x + g u)),    g = (1 - a cot a) / a^2.
        square = (_dot(u, u) / self.radius**2)[..., None]
        stretch, bend = _normal_coordinates(square)
        along = (_dot(v, x) / self.radius**2)[..., None]
        return stretch * (v - along * (x + bend * u))

    def distance(self, x: Vectors, y: Vectors) -> Float[Array, "*shape"]:
        _check_shapes(x, y)
        # atan2 keeps its accuracy where arccos(<x, y>) loses half the digits: near 0 and pi.
        return self.radius * 2 * jnp.atan2(_norm(x - y), _norm(x + y))

    def normals(self, x: Vectors) -> tuple[Vectors, ...]:
        return (x / self.radius,)

    def divergence_correction(self, x: Vectors, f: Vectors) -> Float[Array, "*shape"]:
        return -(x.shape[-1] - 1) * _dot(x, f) / self.radius**2

    def contains(self, x: AnyVectors) -> AnyBools:
        _check_array(x)
        wide = x.astype(accumulation_dtype(x.dtype))  # 16 bits hold no squares beyond 256.
        radius = _array_library(x, self.radius).asarray(self.radius, wide.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            return abs(_dot(wide, wide) ** 0.5 / radius - 1) <= _slack(x.dtype)


class Ellipsoid(AbstractGeometry):
    """Where normalisation with a gain g and a bias b puts tokens:

        x = g z + b,    |z| = sqrt(d),  and with `centred` (LayerNorm) also sum_i z_i = 0

    It has the geometry of the sphere of z, whose inner product is sum_i u_i v_i / g_i^2. Then
    the retraction of x is g N((x - b) / g) + b, N layer normalisation (or, not `centred`, RMS
    normalisation) without gain, and P_x is its derivative: the flow of P_x F is the limit of small
    steps x <- retract(x + h F(x)), which is Post-LN.

    **Arguments:** `gain`, positive, and `bias` (`None`: zero), shape `(d,)`; `centred`: whether
    the coordinates of z add up to zero, as those of LayerNorm do and those of RMS normalisation do
    not.

    **Raises:** `ValueError` or `TypeError` for a gain that is not positive, numbers that are not
    finite, shapes that differ, and centred tokens in fewer than three dimensions.
    """

    gain: Float[Array, " d"]
    bias: Float[Array, " d"]
    centred: bool = eqx.field(static=True)

    def __init__(self, gain: ArrayLike, bias: ArrayLike | None = None, *, centred: bool = True):
        self.gain = reals("the gain of an ellipsoid", gain)
        self.bias = (
            jnp.zeros_like(self.gain) if bias is None else reals("the bias of an ellipsoid", bias)
        )
        self.centred = centred

    def __check_init__(self):
        if self.gain.ndim != 1 or self.gain.shape != self.bias.shape:
            raise ValueError(
                "gain and bias of an ellipsoid must have one shape (d,), got "
                f"{self.gain.shape} and {self.bias.shape}."
            )
        gain = known(self.gain)
        if gain is not None and not (gain > 0).all():
            raise ValueError(f"the gain of an ellipsoid must be positive, got {gain}.")
        if self.centred and self.gain.shape[0] < 3:
            raise ValueError(
                "centred tokens with |z| = sqrt(d) form a sphere from d = 3 on, got "
                f"d={self.gain.shape[0]}. Pass centred=False."
            )

    def inner(self, u: Vectors, v: Vectors) -> Float[Array, "*shape"]:
        return _dot(self._scaled(u), self._scaled(v))

    def project(self, x: Vectors, v: Vectors) -> Vectors:
        return self._stretched(self._sphere.project(self._z(x), self._flat(self._scaled(v))))

    def retract(self, x: Vectors) -> Vectors:
        return self._x(self._sphere.retract(self._flat(self._z(x))))

    def exp(self, x: Vectors, v: Vectors) -> Vectors:
        return self._x(self._sphere.exp(self._z(x), self._scaled(v)))

    def exp_inverse_derivative(self, x: Vectors, u: Vectors, v: Vectors) -> Vectors:
        scaled = self._scaled(u), self._scaled(v)
        return self._stretched(self._sphere.exp_inverse_derivative(self._z(x), *scaled))

    def distance(self, x: Vectors, y: Vectors) -> Float[Array, "*shape"]:
        return self._sphere.distance(self._z(x), self._z(y))

    def normals(self, x: Vectors) -> tuple[Vectors, ...]:
        radial = self._stretched(self._z(x)) / self._sphere.radius
        if not self.centred:
            return (radial,)
        return radial, self._stretched(jnp.full_like(x, 1 / self._sphere.radius))

    def divergence_correction(self, x: Vectors, f: Vectors) -> Float[Array, "*shape"]:
        dimension = len(self.gain) - 1 - self.centred
        return -dimension * _dot(self._z(x), self._scaled(f)) / len(self.gain)

    def contains(self, x: AnyVectors) -> AnyBools:
        with np.errstate(over="ignore", invalid="ignore"):
            z = self._z(x)
            off_plane = abs(z - self._flat(z)).max(axis=-1)
            return self._sphere.contains(self._flat(z)) & (off_plane <= _slack(x.dtype))

    @property
    def _sphere(self) -> Sphere:
        return Sphere(math.sqrt(len(self.gain)))

    def _scaled(self, v):
        return v / _rows(self.gain, v)

    def _stretched(self, v) -> Any:
        return v * _rows(self.gain, v)

    def _z(self, x):
        return (x - _rows(self.bias, x)) / _rows(self.gain, x)

    def _x(self, z) -> Any:
        return _rows(self.gain, z) * z + _rows(self.bias, z)

    def _flat(self, z):
        return z - z.mean(axis=-1, keepdims=True) if self.centred else z


def _normal_coordinates(square):
    """a / sin a and (1 - a cot a) / a^2, from a^2."""
    small = square < 0.04
    # By their series where the quotients would cancel: the terms left out are below 1e-13.
    stretch = 1 + square * (1 / 6 + square * (7 / 360 + square * (31 / 15120 + square * (
        127 / 604800 + square * 73 / 3421440))))  # fmt: skip
    bend = 1 / 3 + square * (1 / 45 + square * (2 / 945 + square * (1 / 4725 + square * (
        2 / 93555 + square * 1382 / 638512875))))  # fmt: skip
    angle = jnp.sqrt(jnp.where(small, 1, square))
    cotangent = jnp.cos(angle) / jnp.sin(angle)
    far = angle / jnp.sin(angle), (1 - angle * cotangent) / angle**2
    return jnp.where(small, stretch, far[0]), jnp.where(small, bend, far[1])


def _rows(vector, x):
    """The vector, for each token of x."""
    _check_array(x)
    if x.shape[-1:] != vector.shape:
        raise ValueError(
            f"tokens on this ellipsoid have d = {len(vector)} coordinates, got shape {x.shape}."
        )
    library = _array_library(x, vector)
    return library.broadcast_to(library.asarray(vector, x.dtype), x.shape)


def _array_library(x, *parameters) -> Any:
    """NumPy for points and parameters that are known on the host, where no program is compiled."""
    return np if isinstance(x, np.ndarray) and is_concrete(*parameters) else jnp


def _slack(dtype) -> float:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"points must be floating point, got {dtype}. Cast them first.")
    return 10 * math.sqrt(jnp.finfo(dtype).eps)


def _check_array(x):
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"points and vectors must be arrays, got {type(x).__name__}.")


def _check_shapes(x, y):
    _check_array(x)
    _check_array(y)
    if x.shape != y.shape:
        raise ValueError(
            f"points and vectors must have one shape (..., d), got {x.shape} and {y.shape}."
        )


def _dot(x, y):
    _check_shapes(x, y)
    return (x * y).sum(axis=-1)


def _norm(x):
    """|x|, with derivative 0 at 0."""
    square = _dot(x, x)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
