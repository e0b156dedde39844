"""Laws of tokens as densities: along a flow, on a grid, and in a few parameters.

    d_t rho + div(rho X_t[rho]) = (1/kappa) Laplace rho

    log_density   log rho_t at tokens and probes that move with the flow
    solve         the equation itself on a grid: Circle, Box, FourierCircle, SphereHarmonics
    closures      families of laws that a flow keeps: Gaussians, Poisson kernels, equal angles

A density on a grid is a measure with weights, so any field moves it as it moves tokens.
"""

from . import closures
from .characteristics import log_density
from .equation import solve
from .grids import AbstractGrid
from .solution import DensitySolution
from .spectral import FourierCircle, SphereHarmonics
from .steps import SSPRK43
from .volumes import Box, Circle

__all__ = [
    "AbstractGrid",
    "Box",
    "Circle",
    "DensitySolution",
    "FourierCircle",
    "SSPRK43",
    "SphereHarmonics",
    "closures",
    "log_density",
    "solve",
]


def __dir__() -> list[str]:
    return __all__
