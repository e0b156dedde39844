"""What a solve of a density returns."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._types import ScalarLike
from ..measure import Measure
from ..observables import interaction_energy
from .grids import AbstractGrid

# What of the mass may be lost, or stand below 0, before the numbers are no density.
DEFECT = 1e-4


class DensitySolution(eqx.Module):
    """What `jaxflow.density.solve` returns.

    - `grid`; `ts`, the saved times, shape `(times,)`, padded with inf as diffrax does.
    - `densities`: rho at the points of the grid, `(times, n)`, in the shape of pictures
      `densities.reshape(-1, *grid.shape)`.
    - `stats`, `result`: those of diffrax.
    """

    grid: AbstractGrid
    ts: Float[Array, " times"]
    densities: Float[Array, "times n"]
    stats: dict[str, Any]
    result: diffrax.RESULTS

    @property
    def mass(self) -> Float[Array, " times"]:
        """int rho, which the equation keeps."""
        return self.densities @ self.grid.volumes

    @property
    def negative_mass(self) -> Float[Array, " times"]:
        """int max(-rho, 0), 0 where rho is a density."""
        return jnp.maximum(-self.densities, 0) @ self.grid.volumes

    @property
    def mean(self) -> Float[Array, "times d"]:
        """int x rho."""
        return jnp.einsum("tn,n,nd->td", self.densities, self.grid.volumes, self.grid.points)

    @property
    def entropy(self) -> Float[Array, " times"]:
        """-int rho log rho."""
        there = self.densities > 0
        logs = jnp.log(jnp.where(there, self.densities, 1))
        return -(self.densities * logs) @ self.grid.volumes

    @property
    def measures(self) -> Measure:
        """The measures at the saved times, points `(times, n, d)`: what fields and observables
        take; `measures[-1]` is the last."""
        return self.grid.measure(self.densities)

    def energy(self, beta: ScalarLike) -> Float[Array, " times"]:
        """E_beta[rho] = 1/(2 beta) int int exp(beta <x, y>) rho(x) rho(y).

        **Raises:** `ValueError` or `TypeError` where beta is 0 or not finite.
        """
        return interaction_energy(self.measures, beta)

    @property
    def ok(self) -> Bool[Array, ""]:
        """Whether the solve succeeded, and each density has mass 1 and is not negative."""
        return diffrax.is_okay(self.result) & self.kept.all()

    @property
    def kept(self) -> Bool[Array, " times"]:
        """Whether the density has mass 1 and is not negative, up to 1e-4, at each saved time; true
        at those that were not reached."""
        good = (jnp.abs(self.mass - 1) < DEFECT) & (self.negative_mass < DEFECT)
        return good | jnp.isinf(self.ts)
