"""Closures: families of laws that a flow keeps, and the equation of their parameters.

    z' = F(z)    where the law with parameters z(0) has those of z(t) at time t

    SoftmaxGaussian, LinearGaussian, L2Gaussian, SinkhornGaussian    N(m, S) on R^d
    OttAntonsen     Poisson kernels on the circle
    Equiangular     n tokens with <x_i, x_j> = rho for all i != j
    TwoTokens       two tokens, also with a causal mask

`gaussian(field)` is the closure of a field of attention on R^d; `evolve` solves any of them.
"""

from .base import AbstractClosure, ClosureSolution, evolve
from .gaussian import (
    AbstractGaussianClosure,
    L2Gaussian,
    LinearGaussian,
    Moments,
    SinkhornGaussian,
    SoftmaxGaussian,
    gaussian,
    until_blow_up,
)
from .reductions import Equiangular, OttAntonsen, TwoTokens

__all__ = [
    "AbstractClosure",
    "AbstractGaussianClosure",
    "ClosureSolution",
    "Equiangular",
    "L2Gaussian",
    "LinearGaussian",
    "Moments",
    "OttAntonsen",
    "SinkhornGaussian",
    "SoftmaxGaussian",
    "TwoTokens",
    "evolve",
    "gaussian",
    "until_blow_up",
]


def __dir__() -> list[str]:
    return __all__
