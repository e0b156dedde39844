"""Energies of a measure.

interaction   E_beta[mu] = 1/(2 beta) int int exp(beta <Q x, K y>) mu(dx) mu(dy)
kinetic       int |X_t[mu](x)|^2 mu(dx)
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._rules import real, reals
from .._types import ArrayLike, Scalar, ScalarLike
from ..fields import AbstractField, token_velocities
from ..fields.base import apply
from ..kernels import softmax_expectation
from ..measure import Measure, check_measure
from .base import AbstractObservable, or_nan, over_leading


def interaction_energy(
    mu: Measure,
    beta: ScalarLike,
    *,
    query: ArrayLike | None = None,
    key: ArrayLike | None = None,
) -> Float[Array, "*batch"]:
    """E_beta[mu] = 1/(2 beta) sum_ij w_i w_j exp(beta <Q x_i, K x_j>) (arXiv 2312.10794, eq. 3.4).

    With V = Q = K = I it grows along the flow: dE/dt = E|x'|^2 for the unnormalised dynamics; and
    so it does where Q^T K is symmetric and V equal to it (arXiv 2501.03096). Computed in O(n)
    memory from the log-partition.

    **Arguments:** `mu`: points `(*batch, n, d)`; `beta`: the inverse temperature, not 0; `query`,
    `key`: the matrices Q and K, shape `(p, d)`; `None` is the identity.

    **Returns:** the energy, shape `(*batch,)`.

    **Raises:** `ValueError` or `TypeError` where beta is 0 or not finite, mu no measure, or Q and K
    no matrices that go with it.

    ```python
    >>> mu = jaxflow.measure.from_angles([0.0, 0.0])  # one cluster: e^beta / (2 beta)
    >>> round(float(jaxflow.observables.interaction_energy(mu, 1.0)), 4)
    1.3591

    ```
    """
    check_measure("mu", mu, signed=True)
    beta = _inverse_temperature(beta)
    energy = partial(_energy, beta, _matrix("query", query), _matrix("key", key))
    if mu.signs is None or mu.log_weights is None:
        return or_nan(over_leading(energy, mu), mu)
    sizes = Measure(mu.points, mu.log_weights)
    mass = jnp.exp(jax.nn.logsumexp(mu.log_weights, axis=-1))  # of the normalised sizes
    signs = jnp.broadcast_to(mu.signs.astype(mu.points.dtype), mu.points.shape[:-1])
    return mass**2 * or_nan(over_leading(energy, sizes, each=(signs,)), sizes)


def _energy(beta, query, key, x, logs, signs=None):
    v = jnp.ones((len(x), 1), x.dtype) if signs is None else signs[:, None]
    pair = apply(query, x), apply(key, x)
    mean, log_partition = softmax_expectation(*pair, v, logs, scale=beta)
    signs = None if signs is None else signs * mean[:, 0]
    # One logsumexp: no overflow before the last step.
    total = jnp.exp(jax.nn.logsumexp(logs + log_partition, b=signs))
    return total / (2 * jnp.asarray(beta, total.dtype))


def _matrix(name: str, value: ArrayLike | None) -> Array | None:
    if value is None:
        return None
    if (matrix := reals(name, value)).ndim != 2:
        raise ValueError(f"{name} must be a matrix (p, d), or None; got shape {matrix.shape}.")
    return matrix


def _inverse_temperature(beta: ScalarLike) -> Scalar:
    return real("beta", beta, "finite and other than 0", lambda b: b != 0)


class InteractionEnergy(AbstractObservable):
    """t, mu -> `jaxflow.observables.interaction_energy`.

    **Arguments:** `beta`, the inverse temperature, and the matrices `query` and `key`, of which
    `None` is the identity; all may be traced.

    **Raises:** `ValueError` or `TypeError` where beta is 0 or not finite, or these are no matrices.

    ```python
    >>> mu = jaxflow.measure.circle(2)  # x and -x: E = (e^beta + e^-beta) / (4 beta)
    >>> energy = jaxflow.observables.InteractionEnergy(beta=1.0)
    >>> round(float(energy(0.0, mu)), 4)
    0.7715

    ```
    """

    beta: Scalar
    query: Float[Array, "p d"] | None
    key: Float[Array, "p d"] | None

    def __init__(
        self,
        beta: ScalarLike,
        *,
        query: ArrayLike | None = None,
        key: ArrayLike | None = None,
    ):
        self.beta = _inverse_temperature(beta)
        self.query, self.key = _matrix("query", query), _matrix("key", key)

    def __call__(self, t, mu):
        return interaction_energy(mu, self.beta, query=self.query, key=self.key)


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
