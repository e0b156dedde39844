"""Spectral grids: an error that falls faster than any power of n where densities are smooth.

    circle   rho(a) = sum_k c_k e^{ika}              d rho/da by the fast Fourier transform
    S^2      rho(x) = sum_lm c_lm Y_lm(x), l <= L    c_lm' = int rho <X[rho], grad Y_lm*>

Products are formed at the points, with modes to spare, so that none is taken for another. What a
grid cannot resolve oscillates, and is then not positive: a solve says so.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._rules import count
from ..geometry import Sphere
from .grids import AbstractCircle, AbstractGrid, on_circle


class FourierCircle(AbstractCircle):
    """The unit circle by n values at the angles 2 pi i / n and their Fourier series.

    Modes above n/3 do not move, by the rule of two thirds (Orszag 1971): the product of two others
    is no mode below n/3.

    **Arguments:** `n`, at least 4.

    **Raises:** `ValueError` or `TypeError` where it is no such number.
    """

    n: int = eqx.field(static=True)

    def __init__(self, n: int):
        self.n = count("n", n, 4)

    @property
    def solver(self):
        return diffrax.Tsit5()

    def encode(self, density):
        return density

    def decode(self, state):
        return state

    def transport(self, field, t, state):
        velocity = field(t, self.points, self.measure(state))
        along = (velocity * on_circle(self.axes[0] + np.pi / 2)).sum(axis=1)
        flux = self.transform(state * along)
        k = np.arange(self.n // 2 + 1)
        slope = jnp.asarray(np.where(k <= self.n / 3, 1j * k, 0), flux.dtype)
        return -self.inverse(slope * flux)

    @property
    def eigenvalues(self):
        return jnp.asarray(np.arange(self.n // 2 + 1) ** 2, float)

    def transform(self, state):
        return jnp.fft.rfft(state)

    def inverse(self, modes):
        return jnp.fft.irfft(modes, self.n)


class SphereHarmonics(AbstractGrid):
    """S^2 by the coefficients of spherical harmonics up to a degree L.

        c_lm' = int rho <X[rho], grad Y_lm*> - l (l+1) c_lm / kappa

    (Galerkin; mass is kept since grad Y_00 = 0). Integrals are Gauss-Legendre in the height and the
    trapezoidal rule in the longitude, on (3L+2)/2 by 3L+1 points, exact for polynomials of degree
    3L. A transform costs O(L^3), a velocity the field on 4.5 L^2 points.

    **Arguments:** `degree`, L, at least 1.

    **Raises:** `ValueError` or `TypeError` where it is no such number.
    """

    degree: int = eqx.field(static=True)
    legendre: Float[Array, "l m heights"]  # Y_lm = legendre e^{im phi}, orthonormal
    slopes: Float[Array, "l m heights"]  # its derivative in the colatitude

    def __init__(self, degree: int):
        from scipy.special import sph_legendre_p_all  # not where a module loads

        self.degree = count("degree", degree)
        colatitudes, _ = self._heights
        tables = sph_legendre_p_all(degree, degree, colatitudes, diff_n=1)[:, :, : degree + 1]
        self.legendre, self.slopes = jnp.asarray(tables, float)

    @property
    def geometry(self):
        return Sphere()

    @property
    def shape(self):
        return (3 * self.degree + 2) // 2, 3 * self.degree + 1

    @property
    def axes(self):
        """Colatitudes and longitudes."""
        k = self.shape[1]
        return self._heights[0], 2 * np.pi * np.arange(k) / k

    @property
    def points(self):
        theta, phi = np.meshgrid(*self.axes, indexing="ij")
        return _rows(np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta))

    @property
    def volumes(self):
        return jnp.asarray(np.repeat(self._heights[1], self.shape[1]), float)

    @property
    def solver(self):
        return diffrax.Tsit5()

    def encode(self, density):
        return jnp.einsum("lmj,cjm->clm", self.legendre, self._integrals(density))

    def decode(self, state):
        real, imaginary = jnp.einsum("lmj,clm->cjm", self.legendre, state)
        unused = self.shape[1] // 2 - self.degree
        modes = jnp.pad(jax.lax.complex(real, imaginary), ((0, 0), (0, unused)))
        return self.shape[1] * jnp.fft.irfft(modes, self.shape[1]).ravel()

    def transport(self, field, t, state):
        rho = self.decode(state)
        flux = rho[:, None] * field(t, self.points, self.measure(rho))
        south, east = (self._integrals((flux * frame).sum(axis=1)) for frame in self._frame)
        # The conjugate of grad Y is (slopes, -i m legendre / sin) e^{-im phi} in this frame.
        theta, m = self._heights[0], np.arange(self.degree + 1)
        turning = jnp.asarray(m / np.sin(theta)[:, None], float)
        turned = jnp.stack([east[1], -east[0]]) * turning[None]
        return jnp.einsum("lmj,cjm->clm", self.slopes, south) + jnp.einsum(
            "lmj,cjm->clm", self.legendre, turned
        )

    @property
    def eigenvalues(self):
        l = np.arange(self.degree + 1)
        shape = (2, self.degree + 1, self.degree + 1)
        return jnp.asarray(np.broadcast_to((l * (l + 1))[None, :, None], shape), float)

    def transform(self, state):
        return state

    def inverse(self, modes):
        return modes

    @property
    def _heights(self) -> tuple[np.ndarray, np.ndarray]:
        """Colatitudes, and the area that a point at each stands for."""
        nodes, weights = np.polynomial.legendre.leggauss(self.shape[0])
        return np.arccos(nodes), weights * 2 * np.pi / self.shape[1]

    @property
    def _frame(self) -> tuple[Any, Any]:
        """Unit tangents to the south and to the east."""
        theta, phi = np.meshgrid(*self.axes, indexing="ij")
        south = _rows(np.cos(theta) * np.cos(phi), np.cos(theta) * np.sin(phi), -np.sin(theta))
        return south, _rows(-np.sin(phi), np.cos(phi), 0 * phi)

    def _integrals(self, values: Float[Array, " n"]) -> Float[Array, "2 heights m"]:
        """int f e^{-im phi} at each height, with its weight; real and imaginary parts."""
        modes = jnp.fft.rfft(values.reshape(self.shape))[:, : self.degree + 1]
        weights = jnp.asarray(self._heights[1], values.dtype)[:, None]
        return jnp.stack([modes.real, modes.imag]) * weights[None]


def _rows(*coordinates: np.ndarray) -> Float[Array, "n 3"]:
    return jnp.asarray(np.stack([a.ravel() for a in coordinates], axis=1), float)
