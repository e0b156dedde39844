"""The flow map mu(0) -> mu(T): the only file that calls diffrax's solver.

    dx_i/dt = X_t[mu_t](x_i),    mu_t = sum_j w_j delta_{x_j(t)}

The state is the array of points. On a submanifold the field is evaluated at the retracted point
and each step is retracted, so repulsive fields keep the space to rounding as attractive ones do.
"""

import abc
import dataclasses
import math
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix
from jax.interpreters import ad
from jaxtyping import Array

from ._flow_input import (
    Observables,
    Times,
    check_kinds,
    check_measure,
    check_policy,
    check_tolerances,
    times,
    times_checked,
)
from ._functions import compared_by_code
from ._memory import check_fits
from ._mergers import Mergers
from ._saving import (
    FlowArgs,
    Saved,
    is_sub,
    looking,
    observe_saved,
    over_systems,
    save_points,
    saving,
)
from ._solution import FlowSolution, measures_at
from ._types import (
    Points,
    ScalarLike,
    accumulation_dtype,
    error_where,
    is_concrete,
    on_automatic_mesh,
)
from .explicit import evaluations_per_step
from .fields import AbstractField, token_velocities
from .fields.time import breakpoints, jumps
from .geometry import Euclidean
from .measure import Measure
from .noise import Noise, noisy_solver
from .reversible import ReversibleAdjoint
from .solvers import (
    AbstractSplitting,
    Geodesic,
    NormalisedEuler,
    PiecewiseSteps,
    along,
    check_space,
    default_adjoint,
    step_times,
)

__all__ = [
    "FlowError",
    "FlowSolution",
    "default_controller",
    "flow",
    "memory_estimate",
]


def __dir__() -> list[str]:
    return __all__


# These run the same solver on an augmented state, or save nothing but the state.
_SAVING_STATES = diffrax.BacksolveAdjoint | diffrax.ImplicitAdjoint | ReversibleAdjoint
_OF_FIRST_ORDER = diffrax.RecursiveCheckpointAdjoint | diffrax.BacksolveAdjoint | ReversibleAdjoint
# diffrax's default root finder, and the one that takes its place.
_CHORD = diffrax.with_stepsize_controller_tols(diffrax.VeryChord)()
_NEWTON = diffrax.with_stepsize_controller_tols(optimistix.Newton)()


class FlowError(RuntimeError):
    """A solve that failed; the message says how far it came and what to change."""


def flow(
    field: AbstractField,
    mu0: Measure,
    *,
    t0: ScalarLike = 0.0,
    t1: ScalarLike,
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
    noise: Noise | None = None,
) -> FlowSolution:
    """Moves a measure along a field from time t0 to t1.

        dx_i/dt = X_t[mu_t](x_i),    mu_t = sum_j w_j delta_{x_j(t)}

    Compiled once per shape: times, tolerances, the points and every array of the field (beta, Q,
    K, V) may change without a new compilation.

    **Arguments:**

    - `field`: X, a `jaxflow.fields.AbstractField`; one whose parameters move in time is a
      `jaxflow.TimeDependent`. A step ends where they or their slopes jump: adaptive and fixed
      steps stop there (`dt0` is then the longest step, and each piece has equal ones). The times of
      `StepTo(ts)` must hold the jumps of parameters; those of slopes alone cost accuracy where they
      are left out.
    - `mu0`: the initial measure. Points with leading axes `(*batch, n, d)` are separate systems
      that share one step size; `jax.vmap` of `flow` gives each its own.
    - `t0`, `t1`: the interval, t0 <= t1. To go back in time, flow along `-field`.
    - `dt0`: the step of a fixed-step solve, or the first step of an adaptive one (`None` chooses).
    - `solver`: any diffrax solver, each step of which is retracted to the geometry; or
      `jaxflow.solvers.Geodesic`, which moves along geodesics; or
      `jaxflow.solvers.NormalisedEuler` with `dt0`, the step of most published scripts; or
      `jaxflow.solvers.LieTrotter` and `jaxflow.solvers.Strang`, which step with the parts
      of a sum of fields one by one.
    - `stepsize_controller`: `None` is adaptive where the solver estimates its error, with
      rtol = atol = 1e-5 in float32 and 1e-8 in float64, and fixed steps `dt0` otherwise.
    - `saveat`, `event`, `max_steps`, `progress_meter`: as in `diffrax.diffeqsolve`. The state that
      a `SaveAt(fn=...)` or an event receives is the array of points `(*batch, n, d)`.
    - `adjoint`: as in diffrax. The default gives reverse mode; forward mode (`jax.jvp`,
      `jax.jacfwd`) needs `diffrax.ForwardMode()` or `diffrax.DirectAdjoint()`. With
      `BacksolveAdjoint`, `ImplicitAdjoint` and `jaxflow.reversible.ReversibleAdjoint`, the
      state alone is saved: points are then retracted, and observables evaluated, after the solve.
    - `throw`: raise if the solve fails; otherwise look at `ok` and `result`. Errors of a compiled
      program are callbacks to the host: `throw=False` leaves them out, which programs need that
      are kept on disk or compiled for a device that is not there.
    - `observe`: `{name: fn}` with fn(t, mu), evaluated inside the solve at each saved time.
    - `noise`: a `jaxflow.Noise`, Brownian motion beside the field. Steps are then fixed ones,
      `dt0`, unless `stepsize_controller` says otherwise, and `solver` one of diffrax's for
      stochastic equations, or `Geodesic`: `Geodesic(diffrax.Heun())` if it is left to the default.

    **Returns:** a `jaxflow.FlowSolution`.

    **Raises:** `ValueError` or `TypeError` for bad input, `MemoryError` where what is saved would
    not fit, `FlowError` where the solve fails or is not finite (under `jit`, the run-time error of
    `equinox.error_if`).

    ```python
    >>> mu0 = jaxflow.measure.uniform_sphere(8, 3, key=jax.random.key(0))
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(beta=1.0), mu0, t1=20.0)
    >>> int(jaxflow.observables.cluster_count(sol.last))
    1

    ```
    """
    check_kinds(
        field, mu0, solver, stepsize_controller, saveat, adjoint, event, progress_meter, observe,
        max_steps,
    )  # fmt: skip
    return flow_around(
        None,
        field,
        mu0,
        t0=t0,
        t1=t1,
        dt0=dt0,
        solver=solver,
        stepsize_controller=stepsize_controller,
        saveat=saveat,
        adjoint=adjoint,
        event=event,
        max_steps=max_steps,
        throw=throw,
        progress_meter=progress_meter,
        observe=observe,
        noise=noise,
    )


class AbstractAround(eqx.Module):
    """What is put around the solver of a flow, once its step is that of the field's geometry."""

    @abc.abstractmethod
    def __call__(
        self, solver: diffrax.AbstractSolver, field: AbstractField
    ) -> diffrax.AbstractSolver:
        """The solver with what is around it."""

    @abc.abstractmethod
    def mergers(self, solver_state: Any) -> tuple[Mergers, Array]:
        """From the solver's last state: which tokens it merged, and how often it evaluated the
        field anew."""


def flow_around(
    around: AbstractAround | None,
    field: AbstractField,
    mu0: Measure,
    *,
    t0: Any,
    t1: Any,
    dt0: Any,
    solver: diffrax.AbstractSolver,
    stepsize_controller: diffrax.AbstractStepSizeController | None,
    saveat: diffrax.SaveAt,
    adjoint: diffrax.AbstractAdjoint,
    event: diffrax.Event | None,
    max_steps: int | None,
    throw: bool,
    progress_meter: diffrax.AbstractProgressMeter,
    observe: Observables | None,
    noise: Noise | None = None,
) -> FlowSolution:
    """A flow, with something around its solver: `None`, or an `AbstractAround`.

    The other arguments, what is returned and what is raised are those of `jaxflow.flow`; that
    each argument is of its class is known here, but for the times.
    """
    check_measure(field, mu0)
    check_space(solver, field)
    mu0 = jtu.tree_map(on_automatic_mesh, mu0)
    dtype = accumulation_dtype(mu0.points.dtype)
    if noise is not None:
        solver = noisy_solver(noise, solver, field.geometry, dt0)
    if stepsize_controller is None:
        stepsize_controller = default_controller(solver, dt0, dtype, noise)
    check_tolerances(stepsize_controller)
    check_fits(
        memory_estimate(mu0, solver=solver, saveat=saveat, max_steps=max_steps),
        "the flow",
        "Save fewer times, or save statistics instead of points: observe={...} with "
        "saveat=SaveAt(ts=..., fn=lambda t, y, args: None).",
    )
    when = _schedule(t0, t1, dt0, saveat, stepsize_controller, field, adjoint, solver, dtype)
    if adjoint == diffrax.RecursiveCheckpointAdjoint():
        if isinstance(when.controller, diffrax.StepTo):
            adjoint = default_adjoint(len(when.controller.ts) - 1)
    arguments = field, mu0, when, noise
    forward = _check_modes(arguments, adjoint)
    on_geometry = is_concrete(mu0.points)
    try:
        sol = _solve(
            around,
            arguments,
            _with_newton(solver),
            adjoint,
            compared_by_code(event),
            max_steps,
            progress_meter,
            compared_by_code(dict(observe or {})),
            on_geometry,
            throw or on_geometry,  # one program where it makes no difference
        )
    except TypeError as error:
        if forward:
            error.add_note(_without_rule(field))
        raise
    return _check_solution(*sol, field, t1, solver, max_steps) if throw else sol[0]


@eqx.filter_jit
def _solve(
    around, arguments, solver, adjoint, event, max_steps, meter, observe, on_geometry, throw
):
    """The solution; its last time and state, whether it failed, and whether it is finite."""
    field, mu0, times, noise = arguments
    geometry, log_weights = field.geometry, mu0.log_weights
    y0 = mu0.points
    plain = isinstance(adjoint, _SAVING_STATES)
    solver = solver if plain else along(solver, field)
    if not isinstance(geometry, Euclidean):
        if not on_geometry:
            # Points that are not finite make a solve that fails, which is the caller's to see.
            off = ~geometry.contains(y0).all() & jnp.isfinite(y0).all()
            if throw:
                y0 = error_where(off, y0, f"the points must lie on {geometry}: retract them first.")
            else:
                y0 = jnp.where(off, jnp.nan, y0)
        # In 16 bits no step would be near enough.
        y0 = geometry.retract(y0.astype(accumulation_dtype(y0.dtype)))
    terms = diffrax.ODETerm(particle_velocity)
    if noise is not None:
        y0 = y0.astype(accumulation_dtype(y0.dtype))
        terms = diffrax.MultiTerm(terms, noise.term(times, y0, solver, geometry))
    saveat = times.saveat if plain else saving(times.saveat, geometry)
    if around is not None:
        solver = around(solver, field)
        saveat = dataclasses.replace(saveat, solver_state=True)
    with times_checked(times.checked):
        sol = diffrax.diffeqsolve(
            terms,
            solver,
            times.t0,
            times.t1,
            times.dt0,
            y0,
            FlowArgs(field, log_weights, observe),
            saveat=saveat,
            stepsize_controller=times.controller,
            adjoint=adjoint,
            event=event and looking(event, geometry),
            max_steps=max_steps,
            throw=False,
            progress_meter=meter,
        )
    if plain:
        saved, last, ts = observe_saved(sol, geometry, log_weights, observe), None, sol.ts
        end, final = cast(Array, ts)[-1], cast(Array, saved.points)[-1]
    else:
        (saved, last_y), (ts, last_t) = cast(tuple, sol.ys), cast(tuple, sol.ts)
        last = end, final = last_t[-1], last_y[-1]
    unpack = lambda fn: jtu.tree_map(fn, saved, is_leaf=lambda x: isinstance(x, Saved))
    evaluations = _evaluations(sol.stats, field, times, solver)
    mergers = None
    if around is not None:
        mergers, again = around.mergers(sol.solver_state)
        evaluations = None if evaluations is None else evaluations + again
    out = FlowSolution(
        ts=ts,
        measures=unpack(lambda s: measures_at(s.points, log_weights)),
        observed=unpack(lambda s: s.observed),
        ys=unpack(lambda s: s.value),
        t0=times.t0,
        end=end,
        final=Measure(geometry.retract(final), log_weights),
        stats=sol.stats | {"num_evaluations": evaluations},
        result=sol.result,
        event_mask=sol.event_mask,
        interpolation=sol.interpolation,
        geometry=geometry,
        log_weights=log_weights,
        mergers=mergers,
    )
    return out, last, jnp.invert(diffrax.is_okay(sol.result)), _finite(out)


def particle_velocity(t: ScalarLike, y: Points, args: FlowArgs) -> Points:
    """X_t[mu](x_i) of the tokens of each system, at the retracted points."""
    one = lambda y, log_weights: token_velocities(args.field, t, Measure(y, log_weights))
    return over_systems(one, args.field.geometry.retract(y), args.log_weights)


def _evaluations(stats, field, times, solver):
    counts = evaluations_per_step(solver, len(field.parts))
    if counts is None:
        return None
    t0, t1, dt0 = times.t0, times.t1, times.dt0
    adaptive = isinstance(times.controller, diffrax.AbstractAdaptiveStepSizeController)
    edges = jnp.asarray(jumps(field), t0.dtype)
    starts = 1 + ((edges > t0) & (edges < t1)).sum()
    return (
        counts[0] * starts + counts[1] * stats["num_steps"] + (2 if adaptive and dt0 is None else 0)
    )


# ------------------------------------------------------------------ equations of laws


def integrate(
    terms: diffrax.AbstractTerm | tuple[diffrax.AbstractTerm, ...],
    y0: Any,
    args: Any = None,
    *,
    t0: ScalarLike,
    t1: ScalarLike,
    dt0: ScalarLike | None,
    solver: diffrax.AbstractSolver,
    stepsize_controller: diffrax.AbstractStepSizeController | None,
    saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    event: diffrax.Event | None = None,
    max_steps: int | None = 4096,
) -> diffrax.Solution:
    """Solves an equation that is not one of tokens: of densities on a grid, of a few parameters.

    The terms, the state, `args` and times may change without a new compilation; breakpoints of
    curves inside `args` end a step, as in `jaxflow.flow`.

    **Arguments:** as in `diffrax.diffeqsolve`, and `jaxflow.flow` for the default of
    `stepsize_controller`. `y0`, arrays of one floating-point dtype.

    **Returns:** a `diffrax.Solution`, whose `result` says whether it succeeded.

    **Raises:** `ValueError` or `TypeError` for bad input.
    """
    check_policy(
        solver, stepsize_controller, saveat, adjoint, event, diffrax.NoProgressMeter(), max_steps
    )
    dtype = jtu.tree_leaves(y0)[0].dtype
    controller = stepsize_controller or default_controller(solver, dt0, dtype)
    check_tolerances(controller)
    when = _schedule(t0, t1, dt0, saveat, controller, args, adjoint, solver, dtype)
    _check_modes((terms, y0, args, when), adjoint)
    return _integrate(
        (terms, y0, args, when), _with_newton(solver), adjoint, compared_by_code(event), max_steps
    )


@eqx.filter_jit
def _integrate(arguments, solver, adjoint, event, max_steps) -> diffrax.Solution:
    terms, y0, args, times = arguments
    with times_checked(times.checked):
        return diffrax.diffeqsolve(
            terms,
            solver,
            times.t0,
            times.t1,
            times.dt0,
            y0,
            args,
            saveat=times.saveat,
            stepsize_controller=times.controller,
            adjoint=adjoint,
            event=event,
            max_steps=max_steps,
            throw=False,
        )


def why_stopped(sol: diffrax.Solution, solver: diffrax.AbstractSolver, max_steps) -> str:
    """Why a solution of `integrate` failed, and what to change."""
    steps, rejected = (int(sol.stats[name]) for name in ("num_steps", "num_rejected_steps"))
    text = f"the solve stopped after {steps} steps, of which {rejected} were rejected: "
    if steps >= (max_steps or math.inf):
        text += f"max_steps = {max_steps} was reached."
    else:
        text += str(diffrax.RESULTS[sol.result])
    return f"{text} {_advice(solver, rejected > steps / 2, cast(Array, sol.t0).dtype)}"


# ------------------------------------------------------------------ controllers


def default_controller(
    solver: diffrax.AbstractSolver,
    dt0: ScalarLike | None,
    dtype: np.dtype,
    noise: Noise | None = None,
) -> diffrax.AbstractStepSizeController:
    """Adaptive steps where the solver estimates its error, and fixed ones otherwise or with noise.

    **Arguments:** `solver`: of the flow; `dt0`: the length of fixed steps, or `None`; `dtype`: of
    the points; `noise`: of the flow, or `None`.

    **Returns:** a `diffrax.PIDController` with rtol = atol = 1e-8 in float64 and 1e-5 otherwise, or
    a `diffrax.ConstantStepSize`.

    **Raises:** `ValueError` for fixed steps without `dt0`.
    """
    if noise is None and isinstance(solver, diffrax.AbstractAdaptiveSolver):
        tolerance = 1e-8 if dtype == jnp.float64 else 1e-5
        return diffrax.PIDController(rtol=tolerance, atol=tolerance)
    if dt0 is None:
        if noise is not None:
            raise ValueError("a flow with noise takes fixed steps: pass their length, dt0.")
        raise ValueError(
            f"{type(solver).__name__} takes fixed steps: pass dt0, or a solver with an error "
            "estimate such as diffrax.Tsit5()."
        )
    return diffrax.ConstantStepSize()


def _schedule(t0, t1, dt0, saveat, controller, field, adjoint, solver, dtype) -> Times:
    """The times of a solve, whose steps end at the breakpoints of the field; tolerances and times
    are no part of its program."""
    if isinstance(adjoint, ReversibleAdjoint):
        adjoint.check(solver, controller, saveat, jumps(field))
    when = times(t0, t1, dt0, saveat, _at_jumps(controller, field), dtype)
    controller = _at_breakpoints(when.controller, field, adjoint, solver, dtype)
    return when._replace(
        saveat=compared_by_code(when.saveat, keep=(save_points,)),
        controller=_traced_tolerances(controller, dtype),
    )


def _at_jumps(controller, field):
    """Given steps that end at a jump of the field up to rounding end right there."""
    if not isinstance(controller, diffrax.StepTo) or not is_concrete(controller.ts):
        return controller
    with jax.ensure_compile_time_eval():  # Under jit too they stay known, and are checked here.
        return diffrax.StepTo(jnp.asarray(step_times(np.asarray(controller.ts), jumps(field))))


def _at_breakpoints(controller, field, adjoint, solver, dtype):
    """The controller, made to end a step at each breakpoint of the field."""
    points = breakpoints(field)
    backsolve = isinstance(adjoint, diffrax.BacksolveAdjoint)
    if backsolve and isinstance(solver, AbstractSplitting | Geodesic | NormalisedEuler):
        raise ValueError(
            "BacksolveAdjoint solves an equation of its own, which cannot be split and does not "
            "live on the geometry of the field. Use diffrax.RecursiveCheckpointAdjoint() with a "
            "splitting method, Geodesic or NormalisedEuler."
        )
    if not points:
        return controller
    if isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        return diffrax.ClipStepSizeController(controller, jump_ts=jnp.asarray(points, dtype))
    if backsolve and jumps(field):
        raise ValueError(
            "BacksolveAdjoint with a field made of pieces needs an adaptive step size, which "
            "stops before each breakpoint and restarts after it."
        )
    if isinstance(controller, diffrax.ConstantStepSize):
        return PiecewiseSteps(points)
    return controller


def _traced_tolerances(controller, dtype):
    """Tolerances as arrays: a new value is then no new program."""
    is_pid = lambda x: isinstance(x, diffrax.PIDController)

    def as_array(tol):
        # A number is cast on the host, which is no program.
        return jnp.asarray(tol if isinstance(tol, jax.Array) else np.asarray(tol, dtype), dtype)

    def trace(x):
        if not is_pid(x):
            return x
        return eqx.tree_at(lambda c: (c.rtol, c.atol), x, replace_fn=as_array)

    return jtu.tree_map(trace, controller, is_leaf=is_pid)


def _with_newton(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    """An implicit method with Newton's, unless the user chose a root finder.

    diffrax's own takes the Jacobian once a step and calls rounding errors divergence where clusters
    stand still, so that most of its steps are rejected.
    """
    implicit = isinstance(solver, diffrax.AbstractImplicitSolver)
    if not implicit or getattr(solver, "root_finder", None) != _CHORD:
        return solver
    return eqx.tree_at(lambda s: s.root_finder, solver, _NEWTON)


# ------------------------------------------------------------------ checks


def _check_modes(arguments, adjoint) -> bool:
    """Whether `flow` itself is differentiated in forward mode, which needs an adjoint for it."""
    modes = [_modes(leaf) for leaf in jtu.tree_leaves(arguments)]
    forward = any(ad.JVPTracer in kinds for kinds in modes)
    if isinstance(adjoint, _OF_FIRST_ORDER):
        name = type(adjoint).__name__
        if any(len(kinds) > 1 for kinds in modes):
            raise TypeError(
                f"a second derivative does not pass through {name}; pass "
                "adjoint=diffrax.DirectAdjoint(), which takes any order and mode."
            )
        if forward:
            raise TypeError(
                f"forward mode does not pass through {name}; pass adjoint=diffrax.ForwardMode(), "
                "or diffrax.DirectAdjoint() for both modes."
            )
    return forward


def _modes(leaf: Any) -> list[type]:
    """The tracers of derivatives around a value, the outer ones first."""
    kinds = []
    while isinstance(leaf, jax.core.Tracer):
        if hasattr(leaf, "primal"):
            kinds.append(type(leaf))
        leaf = getattr(leaf, "primal", getattr(leaf, "val", None))
    return kinds


def _without_rule(field: AbstractField) -> str:
    return (
        "Forward mode passes through this adjoint, but not through a jax.custom_vjp function: if "
        f"one is evaluated inside the solve, look in the field {type(field).__name__}, then in "
        "what is observed, saved or an event. Give it a jax.custom_jvp rule, which serves both "
        "modes, or leave the derivative to JAX."
    )


def _check_solution(
    sol: FlowSolution, last, failed, finite, field, t1, solver, max_steps
) -> FlowSolution:
    # Under grad outside of jit the values are known, behind their derivatives.
    known = lambda a: jax.lax.stop_gradient(a) if eqx.is_inexact_array(a) else a
    if not is_concrete(failed, finite):
        message = "the flow failed, or is not finite: call it outside jit for the time and cause."
        return error_where((failed | ~finite).any(), sol, message)
    if not np.asarray(failed).any() and np.asarray(finite).all():
        return sol
    last, field, t1, weights = jtu.tree_map(known, (last, field, t1, sol.log_weights))
    steps, rejected = (int(sol.stats[name]) for name in ("num_steps", "num_rejected_steps"))
    advice = _advice(solver, rejected > steps / 2, sol.t0.dtype)
    came = "" if last is None else f" at t = {float(last[0]):.6g} of t1 = {float(t1):.6g}"
    text = f"the flow stopped{came} after {steps} steps, of which {rejected} were rejected: "
    cause = None if last is None else _not_finite(FlowArgs(field, weights, {}), last, t1)
    if cause is not None:
        text += f"{cause}. Look for an overflow in the field (a large beta, a growing V), or "
        text += "stop earlier."
    elif steps >= (max_steps or math.inf):
        text += f"max_steps = {max_steps} was reached. {advice}"
    else:
        text += f"{diffrax.RESULTS[sol.result]} {advice}"
    raise FlowError(text)


def _advice(solver, mostly_rejected: bool, dtype) -> str:
    """What to change, but for what was tried."""
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        text = "Raise max_steps, or loosen rtol and atol"
        if dtype != jnp.float64:
            text += ', or use double precision (jax.config.update("jax_enable_x64", True))'
        elif mostly_rejected:
            text += (
                ": most steps were rejected, as where rounding hides the error that rtol and atol "
                "ask for"
            )
        return text + "."
    return (
        "Raise max_steps, loosen rtol and atol, or use an implicit solver such as "
        "diffrax.Kvaerno5() in double precision if the flow is stiff."
    )


def _finite(sol: FlowSolution):
    """Whether every saved point and time is finite; times not reached hold inf."""
    checks = [jnp.array(True)]
    is_leaf = lambda x: x is None or isinstance(x, Measure)  # None: a SaveAt(fn=...) kept no points
    both = (jtu.tree_leaves(tree, is_leaf=is_leaf) for tree in (sol.ts, sol.measures))
    for ts, mu in zip(*both, strict=True):
        if ts is None:
            continue
        checks.append(~jnp.isnan(ts).any())
        if mu is not None:
            finite = jnp.isfinite(mu.points).all(axis=tuple(range(1, mu.points.ndim)))
            checks.append((finite | jnp.isinf(ts)).all())
    return jnp.stack(checks).all()


def _not_finite(args: FlowArgs, last, t1):
    """Names the tensor that is not finite at the last state or just after it, or None."""
    t, y = last
    if not np.isfinite(np.asarray(y)).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(y)))[0])
        return f"the points are not finite (first at index {where})"
    ahead = t + 1e-3 * (t1 - t)
    for time in (t, ahead):
        velocity = np.asarray(particle_velocity(time, y, args))
        if not np.isfinite(velocity).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(velocity))[0])
            return f"the velocity X_t[mu](x) is not finite (first at index {where})"
    return None


# ------------------------------------------------------------------ memory


def memory_estimate(
    mu0: Measure,
    *,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),
    max_steps: int | None = 4096,
    adjoint: diffrax.RecursiveCheckpointAdjoint | None = None,
) -> int:
    """The bytes that a flow of mu0 needs: the saved points and what a step of the solver holds.

    A step holds its stages; that of an implicit method also the Jacobian of all coordinates and its
    factors, 2 (n d)^2 numbers. What attention needs beside them is not counted: some tens of MB,
    O(n * block).

    **Arguments:** as in `jaxflow.flow`. With an `adjoint`, the states that a gradient keeps are
    counted too; see `jaxflow.solvers.default_adjoint`.

    **Returns:** a number of bytes.

    ```python
    >>> mu0 = jaxflow.measure.circle(1000)
    >>> last = jaxflow.memory_estimate(mu0)
    >>> saveat = diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 101))
    >>> jaxflow.memory_estimate(mu0, saveat=saveat) - last  # 100 times more, of 1000 x 2 numbers
    800000

    ```
    """
    dtype = accumulation_dtype(mu0.points.dtype)
    numbers = math.prod(mu0.points.shape)
    tableau = getattr(solver, "tableau", None)
    stages = tableau.num_stages if isinstance(tableau, diffrax.ButcherTableau) else 16
    saves = 0
    for sub in jtu.tree_leaves(saveat.subs, is_leaf=is_sub):
        if sub.fn is save_points:
            at_times = 0 if sub.ts is None else len(sub.ts)
            steps = 0 if not sub.steps or max_steps is None else max_steps // sub.steps
            saves += sub.t0 + sub.t1 + at_times + steps
    if saveat.dense and max_steps is not None:
        saves += max_steps * (stages + 1)
    if adjoint is not None:
        saves += adjoint.checkpoints or (max_steps or 0)
    step = numbers * (stages + 8)
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        step += 2 * numbers**2
    return dtype.itemsize * (numbers * saves + step)
