"""Energies of a measure.

interaction   E_beta[mu] = 1/(2 beta) int int exp(beta <x, y>) mu(dx) mu(dy)
kinetic       int |X_t[mu](x)|^2 mu(dx)
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._rules import real
from .._types import Scalar, ScalarLike
from ..fields import AbstractField, token_velocities
from ..kernels import softmax_expectation
from ..measure import Measure, check_measure
from .base import AbstractObservable, or_nan, over_leading


def interaction_energy(mu: Measure, beta: ScalarLike) -> Float[Array, "*batch"]:
    """E_beta[mu] = 1/(2 beta) sum_ij w_i w_j exp(beta <x_i, x_j>) (arXiv 2312.10794, eq. 3.4).

    With V = Q = K = I it grows along the flow: dE/dt = E|x'|^2 for the unnormalised dynamics.
    Computed in O(n) memory from the log-partition.

    **Raises:** `ValueError` or `TypeError` where beta is 0 or not finite, or mu no measure.
    """
    check_measure("mu", mu, signed=True)
    beta = _inverse_temperature(beta)
    energy = partial(_energy, beta)
    if mu.signs is None or mu.log_weights is None:
        return or_nan(over_leading(energy, mu), mu)
    sizes = Measure(mu.points, mu.log_weights)
    mass = jnp.exp(jax.nn.logsumexp(mu.log_weights, axis=-1))  # of the normalised sizes
    signs = jnp.broadcast_to(mu.signs.astype(mu.points.dtype), mu.points.shape[:-1])
    return mass**2 * or_nan(over_leading(energy, sizes, each=(signs,)), sizes)


def _energy(beta, x, logs, signs=None):
    v = jnp.ones((len(x), 1), x.dtype) if signs is None else signs[:, None]
    mean, log_partition = softmax_expectation(x, x, v, logs, scale=beta)
    signs = None if signs is None else signs * mean[:, 0]
    # One logsumexp: no overflow before the last step.
    total = jnp.exp(jax.nn.logsumexp(logs + log_partition, b=signs))
    return total / (2 * jnp.asarray(beta, total.dtype))


def _inverse_temperature(beta: ScalarLike) -> Scalar:
    return real("beta", beta, "finite and other than 0", lambda b: b != 0)


class InteractionEnergy(AbstractObservable):
    """t, mu -> [`jaxflow.observables.interaction_energy`][].

    **Arguments:** `beta`, the inverse temperature, which may be traced.

    **Raises:** `ValueError` or `TypeError` where beta is 0 or not finite.

    ```python
    >>> mu = jaxflow.measure.circle(2)  # x and -x: E = (e^beta + e^-beta) / (4 beta)
    >>> energy = jaxflow.observables.InteractionEnergy(beta=1.0)
    >>> round(float(energy(0.0, mu)), 4)
    0.7715

    ```
    """

    beta: Scalar

    def __init__(self, beta: ScalarLike):
        self.beta = _inverse_temperature(beta)

    def __call__(self, t, mu):
        return interaction_energy(mu, self.beta)


class KineticEnergy(AbstractObservable):
    """(t, mu) -> int |X_t[mu](x)|^2 mu(dx); its integral in time is the transport cost of a flow
    (Benamou and Brenier 2000; as a regulariser: arXiv 2002.02798).

    **Arguments:** `field`, X.

    **Raises:** `TypeError` where the field is no function.
    """

    field: AbstractField

    def __check_init__(self):
        if not callable(self.field):
            raise TypeError(f"field must be a function of (t, x, mu), got {self.field!r}.")

    def __call__(self, t, mu):
        velocity = token_velocities(self.field, t, mu)
        return ((velocity**2).sum(axis=1) * mu.weights.astype(velocity.dtype)).sum()
