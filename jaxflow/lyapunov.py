"""Lyapunov exponents: the exponential rates at which nearby flows part.

    lambda_k = lim_{T -> inf} (1/T) log of the k-th singular value of D Phi_T,    Phi_T the flow map

By Benettin's method (Benettin, Galgani, Giorgilli, Strelcyn 1980): k tangent vectors follow the
variational equation v' = D X v over a short interval, are orthonormalised by QR, and the logarithms
of the diagonal of R are averaged.
"""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._types import ScalarLike
from .fields import AbstractField, token_velocities
from .flow import flow
from .geometry import AbstractGeometry, Euclidean
from .measure import Measure

__all__ = [
    "LyapunovExponents",
    "lyapunov_exponents",
]


def __dir__() -> list[str]:
    return __all__


class LyapunovExponents(NamedTuple):
    """What `jaxflow.lyapunov_exponents` returns.

    - `exponents`: lambda_1, ..., lambda_k per unit of time, averages over the whole flow; in
      descending order once it is long enough to tell them apart.
    - `ts`, `running`: the ends of the intervals, `(intervals,)`, and the averages up to them,
      `(intervals, k)`: how far they have converged.
    - `measure`: mu(t1).
    """

    exponents: Float[Array, " k"]
    ts: Float[Array, " intervals"]
    running: Float[Array, "intervals k"]
    measure: Measure


def lyapunov_exponents(
    field: AbstractField,
    mu0: Measure,
    *,
    t1: ScalarLike,
    k: int = 1,
    intervals: int = 32,
    t0: ScalarLike = 0.0,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    dt0: ScalarLike | None = None,
    max_steps: int | None = 4096,
    key: PRNGKeyArray | None = None,
) -> LyapunovExponents:
    """The k largest Lyapunov exponents of all tokens together, along the flow from mu0.

    The tangent vectors are those of the space of n tokens, n times the dimension of their
    geometry; of a self-consistent field the derivative includes how mu moves with its tokens. The
    sum of all exponents is the mean in time of the divergence of the particle system.

    **Arguments:**

    - `field`, `mu0`, `t0`, `t1`, `dt0`, `solver`, `stepsize_controller`, `max_steps`: as in
      `jaxflow.flow`; `max_steps` holds for each interval. One system of points `(n, d)`.
    - `k`: how many exponents; memory and time grow with it.
    - `intervals`: between two orthonormalisations tangent vectors should grow by less than 1e5 in
      float32, 1e12 in float64.
    - `key`: of the first tangent vectors, random; default `jax.random.key(0)`.

    **Returns:** a `jaxflow.lyapunov.LyapunovExponents`.

    **Raises:** `ValueError` where k is not between 1 and n times the dimension, for fewer than one
    interval and several systems; what `jaxflow.flow` raises for bad input.

    ```python
    >>> mu0 = jaxflow.measure.uniform_sphere(4, 3, key=jax.random.key(0))
    >>> found = jaxflow.lyapunov_exponents(jaxflow.SelfAttention(), mu0, t1=2.0, intervals=4)
    >>> found.exponents.shape
    (1,)

    ```
    """
    if mu0.points.ndim != 2:
        raise ValueError(
            "lyapunov_exponents takes one system of points (n, d), got shape "
            f"{mu0.points.shape}: jax.vmap it over several."
        )
    most = mu0.n * (mu0.d - len(field.geometry.normals(mu0.points)))
    if not 1 <= k <= most:
        raise ValueError(
            f"{mu0.n} tokens on {field.geometry} in R^{mu0.d} have {most} exponents, got k={k}."
        )
    if intervals < 1:
        raise ValueError(f"intervals must be at least 1, got {intervals}.")
    return _exponents(
        field,
        mu0,
        jnp.linspace(t0, t1, intervals + 1, dtype=mu0.points.dtype),
        k,
        None if dt0 is None else jnp.asarray(dt0, mu0.points.dtype),
        (solver, stepsize_controller, max_steps),
        jax.random.key(0) if key is None else key,
    )


@eqx.filter_jit
def _exponents(field, mu0, edges, k, dt0, options, key):
    solver, controller, max_steps = options
    geometry, (n, d) = field.geometry, mu0.points.shape
    variational = _Variational(field, d)

    def orthonormal(y, tangents):
        """Q and |diag R| of tangent vectors (n, k, d)."""
        tangents = jax.vmap(lambda v: geometry.project(y, v), 1, 1)(tangents)
        q, r = jnp.linalg.qr(tangents.swapaxes(1, 2).reshape(n * d, k))
        return q.reshape(n, d, k).swapaxes(1, 2), jnp.abs(jnp.diagonal(r))

    def interval(carry, ends):
        y, tangents = carry
        both = jnp.concatenate([y, tangents.reshape(n, k * d)], axis=1)
        sol = flow(
            variational,
            Measure(both, mu0.log_weights),
            t0=ends[0],
            t1=ends[1],
            dt0=dt0,
            solver=solver,
            stepsize_controller=controller,
            adjoint=diffrax.ForwardMode(),
            max_steps=max_steps,
        )
        both = sol.measures.points[-1]
        y = geometry.retract(both[:, :d])
        tangents, growth = orthonormal(y, both[:, d:].reshape(n, k, d))
        return (y, tangents), jnp.log(growth)

    y0 = geometry.retract(mu0.points)
    first, _ = orthonormal(y0, jax.random.normal(key, (n, k, d), y0.dtype))
    (y1, _), logs = jax.lax.scan(interval, (y0, first), (edges[:-1], edges[1:]))
    running = jnp.cumsum(logs, axis=0) / (edges[1:] - edges[0])[:, None]
    return LyapunovExponents(running[-1], edges[1:], running, Measure(y1, mu0.log_weights))


class _Variational(AbstractField):
    """(x, v^1, ..., v^k)' = (X[mu](x), D X v^1, ..., D X v^k), one row a token.

    X is the velocity of all tokens, at the retracted points. The step size then heeds the tangent
    vectors too: near a fixed point the tokens alone would let it grow without bound.
    """

    field: AbstractField
    d: int = eqx.field(static=True)
    geometry: AbstractGeometry

    def __init__(self, field: AbstractField, d: int):
        self.field = field
        self.d = d
        self.geometry = Euclidean()

    def __call__(self, t, x, mu):
        n, d = mu.n, self.d
        tangents = mu.points[:, d:].reshape(n, -1, d)

        def move(y):
            y = self.field.geometry.retract(y)
            return token_velocities(self.field, t, Measure(y, mu.log_weights))

        velocity, push = jax.linearize(move, mu.points[:, :d])
        pushed = jax.vmap(push, 1, 1)(tangents)
        return jnp.concatenate([velocity, pushed.reshape(n, -1)], axis=1)
