"""Laws of tokens as densities: along a flow, on a grid, and in a few parameters.

    d_t rho + div(rho X_t[rho]) = (1/kappa) Laplace rho

    log_density   log rho_t at tokens and probes that move with the flow
    solve         the equation itself on a grid: Circle, Box, FourierCircle, SphereHarmonics
    closures      families of laws that the flow keeps: Gaussian, equiangular, Poisson kernels

A grid is a measure with weights, so any field is the velocity of a density as it is of tokens.
"""

from .characteristics import log_density

__all__ = ["log_density"]
