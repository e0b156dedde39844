"""Methods in time for densities.

SSPRK43       explicit, keeps a density positive where Euler's method does, of half the step
Diagonal      the root finder of implicit steps of a Laplacian, diagonal in the modes of a grid
"""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix

from .grids import AbstractGrid


class SSPRK43(diffrax.AbstractERK):
    """The strong-stability-preserving method of order 3 in 4 stages (Kraaijevanger 1991), with the
    error estimate of order 2 of Conde, Fekete and Shadid (arXiv 1806.08693).

    Its stages are averages of Euler steps of half its length: what those keep, it keeps.
    """

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 2]), np.array([1 / 2, 1 / 2]), np.array([1 / 6, 1 / 6, 1 / 6])),
        b_sol=np.array([1 / 6, 1 / 6, 1 / 6, 1 / 2]),
        b_error=np.array([1 / 6, 1 / 6, 1 / 6, 1 / 2]) - 1 / 4,
        c=np.array([1 / 2, 1.0, 1 / 2]),
    )
    interpolation_cls: ClassVar[Callable] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 3


class Diagonal(optimistix.AbstractRootFinder):
    """Solves f(y) = 0 of an affine f whose linear part is diagonal in the modes of a grid.

        y <- y - T^{-1} (T f(y) / lambda),    lambda = T (Df w) / T w

    with any w that has all modes: one derivative and one step, exact up to rounding.
    """

    grid: AbstractGrid
    rtol: float = 0.0
    atol: float = 0.0
    norm: ClassVar[Callable] = optimistix.max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        if "init_state" in options:
            return options["init_state"]
        modes = jnp.ones_like(self.grid.transform(y))
        moved = jax.jvp(lambda y: fn(y, args)[0], (y,), (self.grid.inverse(modes),))[1]
        return jnp.real(self.grid.transform(moved)), jnp.zeros((), int)

    def step(self, fn, y, args, options, state, tags):
        eigenvalues, steps = state
        residual, aux = fn(y, args)
        modes = self.grid.transform(residual)
        moved = self.grid.inverse(modes / eigenvalues.astype(modes.dtype))
        return y - moved, (eigenvalues, steps + 1), aux

    def terminate(self, fn, y, args, options, state, tags):
        return state[1] >= 1, optimistix.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        return y, aux, {}


def is_imex(solver: diffrax.AbstractSolver) -> bool:
    """Whether a method takes an explicit and an implicit term."""
    return isinstance(getattr(solver, "tableau", None), diffrax.MultiButcherTableau)
