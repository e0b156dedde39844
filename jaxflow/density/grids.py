"""What a grid is: points with volumes, on which a density moves with a field and diffuses.

    d_t rho = -div(rho X_t[rho]) + (1/kappa) Laplace rho

A state is what a grid keeps of a density: cell averages, values, or coefficients. The Laplacian is
diagonal in the modes of a grid, so that its implicit steps cost a transform and no matrix.
"""

import abc
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._rules import array, known
from .._types import ArrayLike, ScalarLike
from ..fields import AbstractField
from ..geometry import AbstractGeometry, Sphere
from ..measure import Measure


class AbstractGrid(eqx.Module):
    """A grid of n points of a geometry, with a volume each."""

    @property
    @abc.abstractmethod
    def geometry(self) -> AbstractGeometry:
        """The space that the grid covers, that of the fields on it."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of its axes, of product n: `density.reshape(grid.shape)` is a picture."""

    @property
    @abc.abstractmethod
    def axes(self) -> tuple[Float[np.ndarray, " k"], ...]:
        """The coordinate along each axis of `shape`."""

    @property
    @abc.abstractmethod
    def points(self) -> Float[Array, "n d"]:
        """The points."""

    @property
    @abc.abstractmethod
    def volumes(self) -> Float[Array, " n"]:
        """The weights of an integral: int f is the sum of volumes f(points)."""

    @property
    @abc.abstractmethod
    def solver(self) -> diffrax.AbstractSolver:
        """The method in time that suits it, for a density that does not diffuse."""

    @abc.abstractmethod
    def encode(self, density: Float[Array, " n"]) -> Float[Array, "*state"]:
        """The state of a density."""

    @abc.abstractmethod
    def decode(self, state: Float[Array, "*state"]) -> Float[Array, " n"]:
        """The density of a state."""

    @abc.abstractmethod
    def transport(
        self, field: AbstractField, t: ScalarLike, state: Float[Array, "*state"]
    ) -> Float[Array, "*state"]:
        """-div(rho X_t[rho])."""

    @property
    @abc.abstractmethod
    def eigenvalues(self) -> Float[Array, "*modes"]:
        """Those of -Laplace, mode by mode."""

    @abc.abstractmethod
    def transform(self, state: Float[Array, "*state"]) -> Array:
        """The modes of a state, in which the Laplacian is diagonal."""

    @abc.abstractmethod
    def inverse(self, modes: Array) -> Float[Array, "*state"]:
        """The state of modes."""

    def measure(self, density: Float[Array, "*times n"]) -> Measure:
        """The measure with mass density times volume at each point; none where it is negative."""
        points = jnp.broadcast_to(self.points, (*density.shape, self.points.shape[1]))
        masses = density * jnp.broadcast_to(self.volumes, density.shape)
        return Measure(points, jnp.log(jnp.maximum(masses, jnp.finfo(density.dtype).tiny)))

    def diffusion(self, state: Float[Array, "*state"]) -> Float[Array, "*state"]:
        """Laplace rho."""
        modes = self.transform(state)
        return -self.inverse(self.eigenvalues.astype(modes.dtype) * modes)

    def sample(
        self, density: ArrayLike | Callable[[Float[Array, " d"]], Array]
    ) -> Float[Array, " n"]:
        """A density at the points, of mass 1, from its values there, or a function of one point.

        **Raises:** `ValueError` or `TypeError` for what is no density.
        """
        if callable(density):
            density = jax.vmap(density)(self.points)
        values = array("rho0", density)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise TypeError(f"rho0 must be floating point, got {values.dtype}. Cast it first.")
        n = len(self.volumes)
        if values.shape != (n,):
            raise ValueError(
                f"rho0 must be one number a point of the grid, shape {(n,)}, or a function of one "
                f"point that gives a number; got shape {values.shape}."
            )
        there = known(values)
        if there is not None and not (np.isfinite(there) & (there >= 0)).all():
            wrong = there[~(np.isfinite(there) & (there >= 0))][0]
            raise ValueError(f"rho0, a density, must be finite and not negative; got {wrong}.")
        if there is not None and not there.any():
            raise ValueError("rho0 must have some mass on the grid, got 0 at each of its points.")
        values = values.astype(self.volumes.dtype)
        return values / (values * self.volumes).sum()


class AbstractCircle(AbstractGrid):
    """The unit circle at the angles 2 pi i / n."""

    n: eqx.AbstractVar[int]

    @property
    def geometry(self):
        return Sphere()

    @property
    def shape(self):
        return (self.n,)

    @property
    def axes(self):
        return (2 * np.pi * np.arange(self.n) / self.n,)

    @property
    def points(self):
        return on_circle(self.axes[0])

    @property
    def volumes(self):
        return jnp.full(self.n, 2 * np.pi / self.n, float)


def on_circle(angles: np.ndarray) -> Float[Array, "n 2"]:
    """The points of the unit circle at these angles."""
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1), float)
