"""The continuity and the Fokker-Planck equation on a grid.

d_t rho + div(rho X_t[rho]) = (1/kappa) Laplace rho
"""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float

from .._rules import instance, positive, real
from .._saving import save_points
from .._types import ArrayLike, Scalar, ScalarLike, error_where, is_concrete
from ..fields import AbstractField
from ..fields.base import is_field, tells_apart
from ..flow import FlowError, default_controller, integrate, why_stopped
from .grids import AbstractGrid
from .solution import DEFECT, DensitySolution
from .steps import Diagonal, is_imex


def solve(
    field: AbstractField,
    rho0: ArrayLike | Callable[[Float[Array, " d"]], Array],
    grid: AbstractGrid,
    *,
    t1: ScalarLike,
    t0: ScalarLike = 0.0,
    kappa: ScalarLike | None = None,
    dt0: ScalarLike | None = None,
    solver: diffrax.AbstractSolver | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    max_steps: int | None = 4096,
    throw: bool = True,
) -> DensitySolution:
    """Moves a density along a field, the limit n -> infinity of `jaxflow.flow`.

        d_t rho + div(rho X_t[rho]) = (1/kappa) Laplace rho

    The density on a grid is a measure with weights, and X_t[rho] is the field at that measure: any
    field moves it that does not ask in which order tokens come. With `kappa` it is the law of
    dx = X dt + sqrt(2/kappa) dW.

    **Arguments:**

    - `field`: X, on the geometry of the grid.
    - `rho0`: the density at t0, a function of one point `(d,)`, or its values at `grid.points`,
      shape `(n,)`; up to a constant, since it is given mass 1.
    - `grid`: `jaxflow.density.Circle` and `jaxflow.density.Box` (finite volumes: positive,
      second order), `jaxflow.density.FourierCircle` and `jaxflow.density.SphereHarmonics`
      (spectral, for densities that stay smooth).
    - `kappa`: the inverse strength of the noise, positive; `None` is none.
    - `solver`: `None` is that of the grid, or with `kappa` `diffrax.KenCarp4()`: any method with an
      explicit and an implicit part takes the field explicitly and the Laplacian implicitly, which
      is diagonal in the grid's modes. Other methods take both together.
    - `stepsize_controller`: `None` is adaptive, with rtol = atol = 1e-5 in float32 and 1e-8 in
      float64; steps end at the saved times.
    - `t0`, `t1`, `dt0`, `saveat`, `adjoint`, `max_steps`: as in `jaxflow.flow`; of `saveat` the
      times: `ts`, `t0`, `t1`, `steps`.
    - `throw`: raise if the solve fails, or the density loses mass or is negative by more than 1e-4
      of its mass; otherwise look at `ok` and `result`.

    **Returns:** a `jaxflow.density.DensitySolution`.

    **Raises:** `ValueError` or `TypeError` for bad input, `FlowError` where the solve fails (under
    `jit`, the run-time error of `equinox.error_if`).

    ```python
    >>> field = jaxflow.SelfAttention(beta=1.0)
    >>> tilted = lambda x: 1 + 0.5 * x[0]
    >>> sol = jaxflow.density.solve(field, tilted, jaxflow.density.Circle(32), t1=1.0)
    >>> bool(sol.mean[-1, 0] > 0.25), bool(abs(sol.mass[-1] - 1) < 1e-5)
    (True, True)

    ```
    """
    instance("grid", grid, AbstractGrid, "jaxflow.density.Circle(128)")
    _check_field(is_field(field), grid)
    rho = grid.sample(rho0)
    strength = None if kappa is None else real("kappa", kappa, "positive and finite", positive)
    method = _solver(grid, solver, strength is not None)
    state = grid.encode(rho)
    ts = _saved_times(saveat)
    if stepsize_controller is None:
        stepsize_controller = default_controller(method, dt0, state.dtype)
        if ts is not None and isinstance(stepsize_controller, diffrax.PIDController):
            # An interpolant between two densities need not be positive.
            stepsize_controller = diffrax.ClipStepSizeController(
                stepsize_controller, step_ts=ts.astype(state.dtype)
            )
    sol = integrate(
        _terms(strength, is_imex(method)),
        state,
        _Args(field, grid, None if strength is None else strength.astype(state.dtype)),
        t0=t0,
        t1=t1,
        dt0=dt0,
        solver=method,
        stepsize_controller=stepsize_controller,
        saveat=saveat,
        adjoint=adjoint,
        max_steps=max_steps,
    )
    assert sol.ts is not None and sol.ys is not None and sol.stats is not None
    out = DensitySolution(grid, sol.ts, _decode(grid, sol.ys), sol.stats, sol.result)
    return _checked(out, sol, method, max_steps) if throw else out


class _Args(eqx.Module):
    field: AbstractField
    grid: AbstractGrid
    kappa: Scalar | None


def _transport(t, state, args: _Args):
    return args.grid.transport(args.field, t, state)


def _diffusion(t, state, args: _Args):
    assert args.kappa is not None
    return args.grid.diffusion(state) / args.kappa


def _both(t, state, args: _Args):
    return _transport(t, state, args) + _diffusion(t, state, args)


def _terms(kappa, imex: bool):
    if kappa is None:
        return diffrax.ODETerm(_transport)
    if imex:
        return diffrax.MultiTerm(diffrax.ODETerm(_transport), diffrax.ODETerm(_diffusion))
    return diffrax.ODETerm(_both)


def _saved_times(saveat: diffrax.SaveAt) -> Array | None:
    """SaveAt(ts=...), where there is one."""
    instance("saveat", saveat, diffrax.SaveAt, "diffrax.SaveAt(ts=ts)")
    sub = saveat.subs
    if not isinstance(sub, diffrax.SubSaveAt) or sub.fn is not save_points or saveat.dense:
        raise ValueError(
            "a solve saves densities: pass SaveAt with t0, t1, ts or steps, and neither fn, subs "
            "nor dense."
        )
    return sub.ts


def _solver(grid, solver, diffuses: bool) -> diffrax.AbstractSolver:
    """The method; implicit steps of the Laplacian are solved in the grid's modes."""
    if solver is None:
        solver = diffrax.KenCarp4() if diffuses else grid.solver
    instance("solver", solver, diffrax.AbstractSolver, "diffrax.Tsit5()")
    if not is_imex(solver):
        return solver
    if not diffuses:
        raise ValueError(
            f"{type(solver).__name__} takes the Laplacian implicitly, and without kappa there is "
            "none: pass kappa, or an explicit method such as diffrax.Tsit5()."
        )
    return eqx.tree_at(lambda s: s.root_finder, solver, Diagonal(grid=grid))


def _check_field(field: AbstractField, grid: AbstractGrid):
    """The field is tangent to the points of the grid, and asks for no order of tokens."""
    if ordered := tells_apart(field):
        raise ValueError(
            f"{ordered} asks in which order tokens come, and a density has none: pass a field "
            "without it, or call jaxflow.flow."
        )
    mine, its = type(grid.geometry), type(field.geometry)
    with jax.ensure_compile_time_eval():
        points = np.asarray(grid.points)
    known = is_concrete(*jax.tree.leaves(field.geometry))
    on = not known or np.asarray(field.geometry.contains(points)).all()
    if mine is not its or not on:
        raise ValueError(
            f"{type(grid).__name__} is a grid of {grid.geometry}, and the field lives on "
            f"{field.geometry}. Pass geometry=jaxflow.{grid.geometry} to the field."
        )


@eqx.filter_jit
def _decode(grid: AbstractGrid, states: Array) -> Float[Array, "times n"]:
    return jax.vmap(grid.decode)(states)


def _checked(out: DensitySolution, sol, solver, max_steps) -> DensitySolution:
    if not is_concrete(out.densities):
        message = "the density was lost: call solve outside jit for the time and cause."
        return error_where(~out.ok, out, message)
    if out.ok:
        return out
    if not diffrax.is_okay(sol.result):
        raise FlowError(why_stopped(sol, solver, max_steps))
    mass, negative = np.asarray(out.mass), np.asarray(out.negative_mass)
    first = int(np.argmin(np.asarray(out.kept)))
    raise FlowError(
        f"the mass of a density is 1 and none of it negative, to {DEFECT:g}; at t = "
        f"{float(out.ts[first]):.6g} {type(out.grid).__name__} holds a mass of {mass[first]:.6g}, "
        f"of which {negative[first]:.2g} is negative: it does not resolve the density. Take a "
        "finer grid, finite volumes (Circle, Box), a smaller kappa, or stop earlier."
    )
