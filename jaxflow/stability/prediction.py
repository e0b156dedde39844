"""Into how many clusters a nearly uniform law on the circle breaks, where, and when.

    rho_t(a) = 1 + sum_k 2 |c_k| e^{lambda_k t} cos(k a - phi_k),    c_k = E_mu[e^{ika}]

with phi_k the phase of c_k. The mode whose size 2 |c_k| e^{lambda_k t} is the first to reach 1
leads: as many clusters form as it has maxima, and there. In the limit of small modes that is the
fastest (arXiv 2410.23228).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from .._rules import count
from .._types import Scalar, ScalarLike, is_concrete
from ..fields import AbstractField
from ..measure import Measure, check_measure, from_angles
from ..observables import fourier_modes
from .uniform import growth_rates


class ClusterPrediction(NamedTuple):
    """What `jaxflow.predict_clusters` returns.

    - `degree`: of the mode that leads, which is the number of clusters.
    - `phase`: of that mode, phi in cos(degree a - phi).
    - `time`: when its size would be 1, from which on the law is no longer near the uniform one.
    - `rates`, `modes`: lambda_k and c_k for k = 1, 2, ...
    - `angles`, `measure`: the places of the clusters, `(degree,)`, outside `jit`.
    """

    degree: Int[Array, ""]
    phase: Scalar
    time: Scalar
    rates: Float[Array, " most"]
    modes: Complex[Array, " most"]

    @property
    def angles(self) -> Float[np.ndarray, " degree"]:
        """The maxima of cos(degree a - phase)."""
        k = int(self.degree)
        return (float(self.phase) + 2 * np.pi * np.arange(k)) / k

    @property
    def measure(self) -> Measure:
        """Equal masses there."""
        return from_angles(self.angles)


def predict_clusters(
    field: AbstractField,
    mu: Measure,
    *,
    most: int = 32,
    kappa: ScalarLike | None = None,
    t: ScalarLike = 0.0,
) -> ClusterPrediction:
    """The number, the places and the time of the clusters of tokens that are nearly uniform.

        k = argmin log(1 / 2 |c_k|) / lambda_k,    angles (phi_k + 2 pi j) / k

    It is linear response, from the Fourier modes c_k of mu and the rates of
    `jaxflow.growth_rates`. It is right where one mode leads by far: other modes, within a
    factor of some tens when the first has size 1, move clusters and can join two. These are the
    metastable clusters; a flow joins them later.

    **Arguments:**

    - `field`: on the circle, as `jaxflow.growth_rates` takes it; so are `kappa` and `t`.
    - `mu`: tokens near the uniform law, d = 2, with any weights.
    - `most`: how many modes compete.

    **Returns:** a `jaxflow.stability.ClusterPrediction`.

    **Raises:** `ValueError` for other dimensions and several systems, where the uniform law is
    stable, and as `jaxflow.growth_rates`; `TypeError` for what is no field or no measure.

    ```python
    >>> a = jnp.linspace(0, 2 * jnp.pi, 64, endpoint=False)
    >>> mu = jaxflow.measure.from_angles(a + 0.01 * jnp.cos(3 * a))  # denser at 3 a = pi / 2
    >>> found = jaxflow.predict_clusters(jaxflow.SelfAttention(beta=5.0), mu)
    >>> int(found.degree), (found.angles * 180 / jnp.pi).round(1).tolist()
    (3, [30.0, 150.0, 270.0])

    ```
    """
    check_measure("mu", mu)
    if mu.points.ndim != 2 or mu.d != 2:
        raise ValueError(
            "clusters are predicted of one system on the circle, points (n, 2); got "
            f"{mu.points.shape}. jaxflow.fastest_mode gives the fastest mode for any d."
        )
    degrees = np.arange(1, count("most", most) + 1)
    rates = growth_rates(field, degrees.tolist(), 2, kappa=kappa, t=t)
    modes = fourier_modes(mu, degrees)
    sizes = jnp.maximum(2 * jnp.abs(modes).astype(rates.dtype), jnp.finfo(rates.dtype).tiny)
    times = jnp.where(rates > 0, jnp.maximum(-jnp.log(sizes), 0) / rates, jnp.inf)
    lead = times.argmin()
    if is_concrete(times) and np.isinf(np.asarray(times)).all():
        raise ValueError(
            "no mode grows off the uniform law, so it breaks into no clusters: the largest rate is "
            f"{float(rates.max()):.3g}."
        )
    return ClusterPrediction(lead + 1, jnp.angle(modes[lead]), times[lead], rates, modes)
