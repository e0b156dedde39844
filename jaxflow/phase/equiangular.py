"""Tokens at right angles meet at one time.

Equiangular tokens, <x_i, x_j> = rho for all i != j, stay so. With c(rho) the weight of another
token,

    rho' = 2 c(rho) (1 - rho) ((n-1) rho + 1)     c = 1 / (e^{beta (1 - rho)} + n - 1)  softmax
                                                  c = e^{beta rho} / n                  unnormalised

Uniform tokens are nearly orthogonal where d is large, and p goes from 0 to 1 about the time at
which rho(0) = 0 has grown to the threshold.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from .._types import ArrayLike, ScalarLike
from ..fields import Softmax, Unnormalised
from ..fields.interactions import AbstractInteraction
from .checks import checked_threshold, numbers, whole

# A Gauss-Legendre rule on equal panels: exact to rounding up to beta = 50 n or so.
PANELS, NODES = 64, 16


def equiangular_time(
    betas: ArrayLike,
    *,
    n: ScalarLike,
    threshold: ScalarLike = 0.999,
    interaction: AbstractInteraction = Softmax(),
) -> Float[np.ndarray, " betas"]:
    """The time at which n tokens at right angles reach the inner product `threshold`.

    Of rho' as at the head of this file. With u = log(((n-1) rho + 1) / (1 - rho)), which is 0 at
    rho = 0, it is the integral of du / (2 n c(rho(u))), smooth in u; in float64.
    """
    n, betas = whole("n", n, 2), numbers("betas", betas)
    level = checked_threshold(threshold)
    slowness = SLOWNESS[type(known_interaction(interaction))]
    end = np.log(((n - 1) * level + 1) / (1 - level))
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    starts = np.arange(PANELS)[:, None]
    u = (end / PANELS * (starts + (nodes[None, :] + 1) / 2)).ravel()
    weights = np.tile(weights * end / PANELS / 2, PANELS)
    rho = np.expm1(u) / (np.expm1(u) + n)
    with np.errstate(over="ignore"):  # At a huge beta they never meet: inf.
        return slowness(betas[:, None], rho[None, :], n) @ weights


# 1 / (2 n c(rho)), for each interaction.
SLOWNESS: dict[type, Callable] = {
    Softmax: lambda beta, rho, n: (np.exp(beta * (1 - rho)) + n - 1) / (2 * n),
    Unnormalised: lambda beta, rho, n: np.exp(-beta * rho) / 2,
}


def known_interaction(interaction: AbstractInteraction) -> AbstractInteraction:
    if type(interaction) not in SLOWNESS:
        names = " or ".join(f"{kind.__name__}()" for kind in SLOWNESS)
        raise ValueError(f"interaction must be {names}, got {interaction!r}.")
    return interaction
