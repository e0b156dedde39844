"""Energies of a measure.

interaction   E_beta[mu] = 1/(2 beta) int int exp(beta <x, y>) mu(dx) mu(dy)
kinetic       int |X_t[mu](x)|^2 mu(dx)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._types import Scalar, ScalarLike, is_concrete
from ..fields import AbstractField
from ..kernels import softmax_expectation
from ..measure import Measure
from .base import AbstractObservable, over_leading


def interaction_energy(mu: Measure, beta: ScalarLike) -> Float[Array, "*batch"]:
    """E_beta[mu] = 1/(2 beta) sum_ij w_i w_j exp(beta <x_i, x_j>) (arXiv 2312.10794, eq. 3.4).

    With V = Q = K = I it grows along the flow: dE/dt = E|x'|^2 for the unnormalised dynamics.
    Computed in O(n) memory from the log-partition.
    """
    if is_concrete(beta) and not (np.isfinite(beta) and beta != 0):
        raise ValueError(f"the energy needs a finite beta other than 0, got {beta}.")

    def one(x, logs):
        ones = jnp.ones((x.shape[0], 1), x.dtype)
        log_partition = softmax_expectation(x, x, ones, logs, scale=beta)[1]
        # E = exp(logsumexp): no overflow before the last step.
        total = jnp.exp(jax.nn.logsumexp(logs + log_partition))
        return total / (2 * jnp.asarray(beta, total.dtype))

    return over_leading(one, mu)


class InteractionEnergy(AbstractObservable):
    """t, mu -> [`jaxflow.observables.interaction_energy`][]; beta may be traced."""

    beta: Scalar

    def __init__(self, beta: ScalarLike):
        self.beta = jnp.asarray(beta, float)

    def __call__(self, t, mu):
        return interaction_energy(mu, self.beta)


class KineticEnergy(AbstractObservable):
    """(t, mu) -> int |X_t[mu](x)|^2 mu(dx); its integral in time is the transport cost of a flow
    (Benamou and Brenier 2000; as a regulariser: arXiv 2002.02798).

    **Arguments:** `field`, X.
    """

    field: AbstractField

    def __call__(self, t, mu):
        velocity = self.field(t, mu.points, mu)
        return ((velocity**2).sum(axis=1) * mu.weights.astype(velocity.dtype)).sum()
