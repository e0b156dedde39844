"""The spaces that tokens live on: project, retract, exp, distance, divergence correction.

    Euclidean   R^d       P_x = I
    Sphere(R)   |x| = R   P_x v = v - <x, v> x / R^2

A field owns its geometry; solvers and densities read `field.geometry`. Every method acts on the
last axis and maps over all others.
"""

import abc
import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Vectors = Float[Array, "*shape d"]


class AbstractGeometry(eqx.Module):
    """A submanifold of R^d in coordinates of R^d."""

    @abc.abstractmethod
    def project(self, x: Vectors, v: Vectors) -> Vectors:
        """P_x v: the orthogonal projection of v on the tangent space at x."""

    @abc.abstractmethod
    def retract(self, x: Vectors) -> Vectors:
        """The point of the space nearest to x."""

    @abc.abstractmethod
    def exp(self, x: Vectors, v: Vectors) -> Vectors:
        """The point at time 1 of the geodesic from x with velocity v (tangent at x)."""

    @abc.abstractmethod
    def distance(self, x: Vectors, y: Vectors) -> Float[Array, "*shape"]:
        """The length of the shortest geodesic from x to y."""

    @abc.abstractmethod
    def normals(self, x: Vectors) -> tuple[Vectors, ...]:
        """An orthonormal basis of the normal space at x; empty on R^d."""

    @abc.abstractmethod
    def divergence_correction(self, x: Vectors, f: Vectors) -> Float[Array, "*shape"]:
        """What div(P f) has beyond tr(P_x Df) at x.

        On the sphere, D(f - <x, f> x / R^2) leaves -(d - 1) <x, f> / R^2.
        """

    @abc.abstractmethod
    def contains(self, x: Vectors) -> Bool[Array, "*shape"]:
        """Whether x is a point of the space, up to ten times the root of its dtype's epsilon."""


class Euclidean(AbstractGeometry):
    """R^d."""

    def project(self, x: Vectors, v: Vectors) -> Vectors:
        return v

    def retract(self, x: Vectors) -> Vectors:
        return x

    def exp(self, x: Vectors, v: Vectors) -> Vectors:
        return x + v

    def distance(self, x: Vectors, y: Vectors) -> Float[Array, "*shape"]:
        return _norm(x - y)

    def normals(self, x: Vectors) -> tuple[Vectors, ...]:
        return ()

    def divergence_correction(self, x: Vectors, f: Vectors) -> Float[Array, "*shape"]:
        return jnp.zeros(x.shape[:-1], x.dtype)

    def contains(self, x: Vectors) -> Bool[Array, "*shape"]:
        return jnp.ones(x.shape[:-1], bool)


class Sphere(AbstractGeometry):
    """The sphere |x| = radius in R^d.

    **Arguments:** `radius`, a positive number (layer normalisation without its gain has
    radius sqrt(d)).
    """

    radius: float = 1.0

    def __check_init__(self):
        if not self.radius > 0:
            raise ValueError(f"the radius of a sphere must be positive, got {self.radius}.")

    def project(self, x: Vectors, v: Vectors) -> Vectors:
        return v - _dot(x, v)[..., None] * x / self.radius**2

    def retract(self, x: Vectors) -> Vectors:
        return self.radius * x / _norm(x)[..., None]

    def exp(self, x: Vectors, v: Vectors) -> Vectors:
        angle = (_norm(v) / self.radius)[..., None]
        # jnp.sinc(a / pi) = sin(a) / a, smooth at 0.
        return jnp.cos(angle) * x + jnp.sinc(angle / jnp.pi) * v

    def distance(self, x: Vectors, y: Vectors) -> Float[Array, "*shape"]:
        # atan2 keeps its accuracy where arccos(<x, y>) loses half the digits: near 0 and pi.
        return self.radius * 2 * jnp.atan2(_norm(x - y), _norm(x + y))

    def normals(self, x: Vectors) -> tuple[Vectors, ...]:
        return (x / self.radius,)

    def divergence_correction(self, x: Vectors, f: Vectors) -> Float[Array, "*shape"]:
        return -(x.shape[-1] - 1) * _dot(x, f) / self.radius**2

    def contains(self, x: Vectors) -> Bool[Array, "*shape"]:
        tolerance = 10 * math.sqrt(jnp.finfo(x.dtype).eps)
        return jnp.abs(_norm(x) / self.radius - 1) <= tolerance


def _dot(x, y):
    return (x * y).sum(axis=-1)


def _norm(x):
    """|x|, with derivative 0 at 0."""
    square = _dot(x, x)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
