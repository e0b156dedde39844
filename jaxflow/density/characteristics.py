"""The density along the flow, at tokens and probes.

    dx/dt = X_t[mu_t](x),    d/dt log rho_t(x_t) = -div X_t[mu_t](x_t)

is the continuity equation d_t rho + div(rho X) = 0 along its characteristics. On a submanifold
densities are with respect to its surface measure, and div is its divergence.

Tokens and probes are solved for together: a row (x, log rho_t(x_t) - log rho_0(x_0)) each, of which
mu has the first n.
"""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import array, count, known, prng_key, reals
from .._types import ArrayLike, LogWeights, ScalarLike, accumulation_dtype
from ..fields import AbstractField, divergence
from ..flow import flow
from ..geometry import AbstractGeometry
from ..measure import Measure, check_measure


def log_density(
    field: AbstractField,
    mu0: Measure,
    x0: ArrayLike,
    log_rho0: ArrayLike | Callable[[Float[Array, " d"]], Array],
    *,
    t1: ScalarLike,
    t0: ScalarLike = 0.0,
    key: PRNGKeyArray | None = None,
    samples: int = 1,
    dt0: ScalarLike | None = None,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    max_steps: int | None = 4096,
    throw: bool = True,
) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
    """Moves points with the flow of a measure, and the logarithm of a density with them.

        dx/dt = X_t[mu_t](x),    d/dt log rho_t(x_t) = -div X_t[mu_t](x_t)

    rho_t is the density at time t of the law that had rho_0 at time t0, each token of which is
    moved by mu (Chen et al., arXiv 1806.07366, theorem 1, for fields that depend on mu). With mu0
    drawn from rho_0 it is that of mu itself as n -> infinity. On the sphere it is a density with
    respect to the surface measure, on an ellipsoid to that of the sphere it is the image of.

    **Arguments:**

    - `field`: X, whose divergence is exact in closed form for attention
      (`jaxflow.divergence`).
    - `mu0`: the measure that moves the points, one system `(n, d)`.
    - `x0`: where the points start, shape `(m, d)`: tokens of mu0, or any probes. They move in the
      precision of mu0.
    - `log_rho0`: log rho_0 at x0, shape `(m,)`, or a function of one point `(d,)`; up to a
      constant, which stays; -inf where there is no mass.
    - `key`, `samples`: `None` for the exact divergence; a PRNG key for Hutchinson's estimate with
      so many probes, the same ones at all times. The estimate of log rho is unbiased.
    - `t0`, `t1`, `dt0`, `solver`, `stepsize_controller`, `adjoint`, `max_steps`: as in
      `jaxflow.flow`. The error of a step counts log rho too. Splitting methods step with the
      field as a whole.
    - `throw`: raise if the solve fails; otherwise its numbers are nan.

    **Returns:** the points at t1, `(m, d)`, and log rho there, `(m,)`.

    **Raises:** `ValueError` or `TypeError` for bad input, `FlowError` where the solve fails.

    ```python
    >>> mu0 = jaxflow.measure.circle(8)
    >>> x0 = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> pull = jaxflow.LinearDrift(jnp.diag(jnp.array([1.0, 0.0])), geometry=jaxflow.Sphere())
    >>> x, log_rho = jaxflow.log_density(pull, mu0, x0, jnp.zeros(2), t1=1.0)
    >>> log_rho.round(4).tolist()  # tokens leave x_1 = 0 and gather at x_1 = 1, at rate 1
    [-1.0, 1.0]

    ```
    """
    check_measure("mu0", mu0)
    if mu0.points.ndim != 2:
        raise ValueError(
            "log_density takes one system of points (n, d), got shape "
            f"{mu0.points.shape}: jax.vmap it over several."
        )
    dtype = accumulation_dtype(mu0.points.dtype)
    x0 = _probes(x0, field, mu0).astype(dtype)
    log_rho0 = _initial(log_rho0, x0)
    n = mu0.n
    points = jnp.concatenate([mu0.points.astype(dtype), x0])
    gained = jnp.zeros((len(points), 1), dtype)
    sol = flow(
        _Characteristics(
            field,
            mu0.log_weights,
            n,
            None if key is None else prng_key(key),
            count("samples", samples),
        ),
        Measure(jnp.concatenate([points, gained], axis=1)),
        t0=t0,
        t1=t1,
        dt0=dt0,
        solver=solver,
        stepsize_controller=stepsize_controller,
        adjoint=adjoint,
        max_steps=max_steps,
        throw=throw,
    )
    both = sol.measures.points[-1, n:]
    both = jnp.where(sol.ok, both, jnp.nan)
    return both[:, :-1], log_rho0 + both[:, -1]


class _Characteristics(AbstractField):
    """(x, l)' = (X[mu](x), -div X[mu](x)), mu the first n rows."""

    field: AbstractField
    log_weights: LogWeights | None
    n: int = eqx.field(static=True)
    key: PRNGKeyArray | None
    samples: int = eqx.field(static=True)
    geometry: AbstractGeometry

    def __init__(self, field, log_weights, n, key, samples):
        self.field = field
        self.log_weights = log_weights
        self.n = n
        self.key = key
        self.samples = samples
        self.geometry = _WithLine(field.geometry)

    def __call__(self, t, x, mu):
        tokens = Measure(mu.points[: self.n, :-1], self.log_weights)
        velocity = self.field(t, x[:, :-1], tokens)
        # Of the tokens of mu no density is asked.
        div = divergence(
            self.field, t, x[self.n :, :-1], tokens, key=self.key, samples=self.samples
        )
        still = jnp.zeros(self.n, x.dtype)
        slopes = jnp.concatenate([still, -div.astype(x.dtype)])
        return jnp.concatenate([velocity.astype(x.dtype), slopes[:, None]], axis=1)


class _WithLine(AbstractGeometry):
    """The product of a geometry with a line, the last coordinate."""

    space: AbstractGeometry

    def inner(self, u, v):
        return self.space.inner(u[..., :-1], v[..., :-1]) + u[..., -1] * v[..., -1]

    def project(self, x, v):
        return _join(self.space.project(x[..., :-1], v[..., :-1]), v)

    def retract(self, x):
        return _join(self.space.retract(x[..., :-1]), x)

    def exp(self, x, v):
        return _join(self.space.exp(x[..., :-1], v[..., :-1]), x + v)

    def exp_inverse_derivative(self, x, u, v):
        inner = self.space.exp_inverse_derivative(x[..., :-1], u[..., :-1], v[..., :-1])
        return _join(inner, v)

    def distance(self, x, y):
        return jnp.hypot(self.space.distance(x[..., :-1], y[..., :-1]), x[..., -1] - y[..., -1])

    def normals(self, x):
        nothing = jnp.zeros_like(x)
        return tuple(_join(normal, nothing) for normal in self.space.normals(x[..., :-1]))

    def divergence_correction(self, x, f):
        return self.space.divergence_correction(x[..., :-1], f[..., :-1])

    def contains(self, x):
        return self.space.contains(x[..., :-1])


def _join(inner, whole):
    """The coordinates in the space, with the last one of the whole."""
    return jnp.concatenate([inner, whole[..., -1:]], axis=-1)


def _probes(x0: ArrayLike, field: AbstractField, mu0: Measure) -> Array:
    """The points x0: finite, and on the field's geometry, where they are known."""
    x0 = reals("x0", x0)
    if x0.ndim != 2 or x0.shape[1] != mu0.d or not len(x0):
        raise ValueError(
            f"x0 must have shape (m, {mu0.d}), the dimension of mu0's tokens; got {x0.shape}."
        )
    points = known(x0)
    if points is not None and known(mu0.points) is not None:
        inside = np.asarray(field.geometry.contains(points))
        if not inside.all():
            raise ValueError(
                f"x0 must lie on the field's geometry {field.geometry}, got "
                f"{points[~inside][0]}. Retract it first: field.geometry.retract(x0)."
            )
    return x0


def _initial(log_rho0, x0: Float[Array, "m d"]) -> Float[Array, " m"]:
    """log rho_0 at the points x0."""
    if callable(log_rho0):
        log_rho0 = jax.vmap(log_rho0)(x0)
    log_rho0 = array("log_rho0", log_rho0)
    if not jnp.issubdtype(log_rho0.dtype, jnp.floating):
        raise TypeError(f"log_rho0 must be floating point, got {log_rho0.dtype}. Cast it first.")
    if log_rho0.shape != x0.shape[:1]:
        raise ValueError(
            f"log_rho0 must be one number a point, shape {x0.shape[:1]}, or a function of one "
            f"point that gives a number; got shape {log_rho0.shape}."
        )
    logs = known(log_rho0)
    if logs is not None and not (logs < np.inf).all():
        raise ValueError(
            "log_rho0 must be finite, or -inf where there is no mass; got "
            f"{logs[~(logs < np.inf)][0]}."
        )
    return log_rho0.astype(x0.dtype)
