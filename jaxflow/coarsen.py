"""The flow in which tokens that have met are one token.

    |x_i - x_j| <= delta:    w = w_i + w_j,    x = retract((w_i x_i + w_j x_j) / w)

Clusters contract at a rate of about 1 while they drift at rates like e^{-beta (1 - cos)}: all that
makes metastable flows stiff is the contraction of tokens that are one already. Where they are one,
an explicit method takes steps as long as the drift allows (arXiv 2410.06833 for the drift).

The state of the solve stays the array of all n points, in which tokens that have met have the same
coordinates. A solver around the solver evaluates the field at one token a cluster, and lets tokens
meet at the end of each step that is accepted.
"""

import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from ._coarsened import Coarsened
from ._flow_input import Observables, check_kinds, check_tolerances
from ._mergers import Mergers
from ._rules import flag, positive, real
from ._solution import FlowSolution
from ._types import Scalar, ScalarLike, accumulation_dtype, is_concrete
from .fields import AbstractField, Constant, TimeDependent
from .fields.base import all_fields, tells_apart
from .flow import AbstractAround, default_controller, flow_around
from .geometry import AbstractGeometry, Ellipsoid, Sphere
from .measure import Measure

__all__ = [
    "Coarsening",
    "coarsen",
]


def __dir__() -> list[str]:
    return __all__


PROBES = 16  # tokens at which a field is asked whether it knows their order


def coarsen(
    field: AbstractField,
    mu0: Measure,
    *,
    t0: ScalarLike = 0.0,
    t1: ScalarLike,
    delta: ScalarLike | None = None,
    everywhere: bool = False,
    dt0: ScalarLike | None = None,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    event: diffrax.Event | None = None,
    max_steps: int | None = 4096,
    throw: bool = True,
    progress_meter: diffrax.AbstractProgressMeter = diffrax.NoProgressMeter(),
    observe: Observables | None = None,
) -> FlowSolution:
    """Moves a measure along a field, where tokens that have met are one token from then on.

        dx_i/dt = X[mu_t](x_i),    |x_i - x_j| <= delta:  w = w_i + w_j, x = retract of their mean

    Tokens come together at a rate of about 1, and clusters drift exponentially slowly (arXiv
    2410.06833): a plain solver takes short steps for a motion that is over. Where tokens merge, the
    steps of an explicit method grow with the time of the drift, and each costs less: 16 tokens on
    the circle at beta = 12 are one cluster at t = 1.7e9 after 485 steps of Tsit5.

    Two tokens of one measure obey d(x - y)/dt = D X[mu](x) (x - y) + O(|x - y|^2). They merge where
    they contract: where the largest eigenvalue of the symmetric part of D X[mu] on the tangent
    space is negative, at the place where they would be one. Elsewhere tokens are left apart, and so
    are all tokens of a field that changes in time by more than a positive factor, which may part
    them again. Merging keeps the mean of a cluster, and moves its second moments by O(delta^2);
    each token is then within about delta of where it would be.

    What has merged stays merged: whether tokens contract is asked when they meet, not later. Tokens
    that are close to the same one merge together, at the end of a step. Tokens without mass never
    merge. All systems of a batch merge on their own.

    This changes the flow, by less than it is right to, and is fast. Where the flow itself is to
    stay as it is, or the field has masks, or clusters are asked for that are far from being one
    point, `jaxflow.events.merges` finds the mergers of the plain flow.

    **Arguments:**

    - `field`: as in `jaxflow.flow`, where it depends on the law of the tokens alone: no mask by
      index (`causal`, `window`, `mask`), and no positions (`rotary`).
    - `mu0`, `t0`, `t1`, `dt0`, `solver`, `stepsize_controller`, `saveat`, `event`, `max_steps`,
      `throw`, `progress_meter`, `observe`: as in `jaxflow.flow`. All n tokens are saved; those
      that are one have the same coordinates. Use float64 for metastable times: in float32 and at
      the default tolerance, rounding alone keeps steps below about 100.
    - `delta`: the distance at which tokens merge; on a sphere or an ellipsoid an angle, in radians.
      `None` is sqrt(rtol), so that the moments of a cluster are right to rtol.
    - `everywhere`: whether tokens merge also where they part, in time-dependent fields too. The
      solution's `bound` then says how far each may be from where it stands, at the cost of d
      derivatives of the field a step.
    - `adjoint`: as in `jaxflow.flow`, but for `BacksolveAdjoint` and `ImplicitAdjoint`.
      Derivatives pass through mergers, whose times and pairs count as constants.

    **Returns:** a `jaxflow.FlowSolution`, with more of it known:

    - `merges`: a `jaxflow.observables.MergeTree`, the times at which distances fell to delta,
      the pairs of clusters and their sizes; a list of trees for a batch of systems. A time is
      interpolated within its step, as that of a distance that falls exponentially.
    - `labels`, `labels_at(t)`: the token that stands for each at the end, and at time t.
    - `coarse`: the measure at the end with one token a cluster, and the weights of all in it.
    - `bound`: with `everywhere`, a bound for each token of a cluster, to first order in delta;
      else `None`.

    **Raises:** `ValueError` for a field that tells tokens apart, a delta that is no such distance,
    and an adjoint that solves another equation; and what `jaxflow.flow` raises.

    ```python
    >>> mu0 = jaxflow.measure.simplex(4, 4)  # four tokens at right angles meet at one time
    >>> sol = jaxflow.coarsen(jaxflow.SelfAttention(), mu0, t1=20.0)
    >>> sol.merges.sizes.tolist(), sol.labels.tolist()
    ([2, 3, 4], [0, 0, 0, 0])

    ```
    """
    check_kinds(
        field, mu0, solver, stepsize_controller, saveat, adjoint, event, progress_meter, observe,
        max_steps,
    )  # fmt: skip
    _check_adjoint(adjoint)
    _check_order(field)
    dtype = accumulation_dtype(mu0.points.dtype)
    controller = stepsize_controller or default_controller(solver, dt0, dtype)
    check_tolerances(controller)
    delta = _default_delta(controller) if delta is None else delta
    delta = _checked_delta(delta, field.geometry)
    together = flag("everywhere", everywhere) or not _moves(field, mu0, t0, t1)
    return flow_around(
        Coarsening(delta.astype(dtype) if together else None, bool(everywhere)),
        field,
        mu0,
        t0=t0,
        t1=t1,
        dt0=dt0,
        solver=solver,
        stepsize_controller=controller,
        saveat=saveat,
        adjoint=adjoint,
        event=event,
        max_steps=max_steps,
        throw=throw,
        progress_meter=progress_meter,
        observe=observe,
    )


# ------------------------------------------------------------------ what is checked


def _check_adjoint(adjoint):
    if isinstance(adjoint, diffrax.BacksolveAdjoint | diffrax.ImplicitAdjoint):
        raise ValueError(
            f"{type(adjoint).__name__} solves an equation of its own, in which no tokens merge. "
            "Use diffrax.RecursiveCheckpointAdjoint(), or diffrax.DirectAdjoint() for jvp."
        )


def _check_order(field: AbstractField):
    """The field knows no order of the tokens, as far as it says so itself."""
    if ordered := tells_apart(field):
        raise ValueError(
            f"{ordered} tells tokens at one place apart, so that they are not one token. Coarsen a "
            "field without it, or call jaxflow.flow."
        )


def _default_delta(controller) -> ScalarLike:
    """sqrt(rtol): the error of a cluster's moments is then of the size of rtol."""
    is_pid = lambda x: isinstance(x, diffrax.PIDController)
    for pid in filter(is_pid, jtu.tree_leaves(controller, is_leaf=is_pid)):
        rtol = jtu.tree_leaves(pid.rtol)
        if (
            len(rtol) == 1
            and np.shape(rtol[0]) == ()
            and not (is_concrete(rtol[0]) and rtol[0] == 0)
        ):
            return rtol[0] ** 0.5
    raise ValueError(
        f"delta, the distance at which tokens become one, is sqrt(rtol) where it is not given, and "
        f"{type(controller).__name__} has no rtol: pass delta, such as delta=1e-4."
    )


def _checked_delta(delta: ScalarLike, geometry: AbstractGeometry) -> Scalar:
    if isinstance(geometry, Sphere | Ellipsoid):
        rule = "an angle above 0 and below pi/2, in radians: tokens further apart have no mean"
        return real("delta", delta, rule, lambda angle: (angle > 0) & (angle < math.pi / 2))
    return real("delta", delta, "a distance above 0, and finite", positive)


def _moves(field: AbstractField, mu0: Measure, t0, t1) -> bool:
    """Whether the field changes in time by more than a positive factor.

    What is of the user's own is looked up at a few tokens where it is known, and also whether it
    depends on the law of the tokens alone.
    """
    curves = [inner.curve for inner in all_fields(field) if isinstance(inner, TimeDependent)]
    moving = any(not isinstance(curve, Constant) for curve in curves)
    of_the_users = any(map(_is_foreign, jtu.tree_leaves(field, is_leaf=_is_foreign)))
    known = is_concrete(*jtu.tree_leaves(eqx.filter((field, mu0, t0, t1), eqx.is_array_like)))
    if not (of_the_users and known):
        return moving
    points = mu0.points.reshape(-1, mu0.n, mu0.d)[0, :PROBES]
    points = points.astype(accumulation_dtype(points.dtype))
    ts = np.linspace(float(t0), float(t1), 3).astype(points.dtype)
    with jax.ensure_compile_time_eval():
        try:
            exchangeable, steady = _probe(field, field.geometry.retract(points), jnp.asarray(ts))
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(_ORDER.format(name=type(field).__name__)) from error
    if not exchangeable:
        raise ValueError(_ORDER.format(name=type(field).__name__))
    return moving or not bool(steady)


def _is_foreign(x) -> bool:
    return isinstance(x, eqx.Module) and not type(x).__module__.startswith("jaxflow.")


_ORDER = (
    "coarsen needs a field that depends on the law of the tokens alone, and {name} does not: with "
    "its tokens in another order, and two tokens at one place made one, it has other values. Call "
    "jaxflow.flow."
)


@eqx.filter_jit
def _probe(field, x, ts):
    """Whether the field is one of measures; whether it keeps its direction in time."""
    tolerance = jnp.sqrt(jnp.finfo(x.dtype).eps)
    near = lambda a, b: jnp.abs(a - b).max() <= tolerance * jnp.abs(a).max()
    # The first token twice; and once, of twice the weight, in another order, after one without any.
    twice = Measure(jnp.concatenate([x, x[:1]]))
    weights = jnp.ones(len(x) + 1, x.dtype).at[0].set(0).at[-1].set(2)
    once = Measure(jnp.concatenate([x[-1:], x[::-1]]), jnp.log(weights))
    first, *later = (field(t, x, twice) for t in ts)
    other = field(ts[0], x[::-1], once)[::-1]
    square = (first**2).sum()
    factors = [(v * first).sum() / jnp.where(square > 0, square, 1) for v in later]
    steady = [
        near(v, c * first) & ((c > 0) | ~v.any()) for v, c in zip(later, factors, strict=True)
    ]
    return near(first, other), jnp.stack(steady).all()


# ------------------------------------------------------------------ around the solver


class Coarsening(AbstractAround):
    """A solver in which tokens that meet merge, around the one of a flow.

    **Arguments:** `delta`, the angle or distance, `None` for a flow in which none merge;
    `everywhere`, whether they merge where they part as well.
    """

    delta: Scalar | None
    everywhere: bool = eqx.field(static=True)

    def __call__(self, solver, field):
        return Coarsened(solver, self.delta, self.everywhere)

    def mergers(self, solver_state):
        _, merged, turn = solver_state
        return Mergers(merged.times, merged.into, merged.log_bound), turn.again
