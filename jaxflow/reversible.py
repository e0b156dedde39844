"""The gradient of a solve whose steps are undone, not kept: exact, in the memory of one step.

`diffrax.ReversibleHeun` (arXiv 2105.13493) makes, with v_k = f(t_k, z_k) and z_0 = y_0,

    z_{k+1} = 2 y_k - z_k + h_k v_k,     y_{k+1} = y_k + h_k (v_k + v_{k+1}) / 2

so that y_{k+1}, z_{k+1} and v_{k+1} determine y_k, z_k and v_k:

    z_k = 2 y_{k+1} - z_{k+1} - h_k v_{k+1},     y_k = y_{k+1} - h_k (v_k + v_{k+1}) / 2

With a, b, c the derivatives of the loss by y_k, z_k and v_k, and P_k that of f at (t_k, z_k),

    c_k = h_{k-1} a_k / 2 + h_k a_{k+1} / 2 + h_k b_{k+1},   a_k = a_{k+1} + 2 b_{k+1}
    b_k = -b_{k+1} + P_k^T c_k,     a_0 <- a_0 + b_0

where all of k + 1 is 0 at the end, but for a. One evaluation and one P_k^T c_k a step, both ways.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .solvers import Grid

__all__ = ["ReversibleAdjoint"]


def __dir__() -> list[str]:
    return __all__


class ReversibleAdjoint(diffrax.AbstractAdjoint):
    """Derivatives of the steps themselves, whose states are made again from the last one.

    The memory is that of one step, whatever their number, and the time that of a solve that keeps
    all of them. Rounding errors come back with the states, enlarged by what the flow contracts, so
    that of long or contracting solves the gradient is less exact; `diffrax.ReversibleHeun` is also
    less stable than other methods, and wants short steps.

    Steps are not retracted on a manifold, but their field is evaluated at the nearest points there,
    and the end is retracted.

    For `diffrax.ReversibleHeun()`, steps that are given (`diffrax.StepTo`, or the `steps` of a
    `jaxflow.models.Depth`), parameters without jumps in time, and the last state alone. Reverse
    mode of first order; forward mode takes `diffrax.ForwardMode()`.

    **Raises:** `ValueError`, when a solve begins, for what is not undone so.

    ```python
    >>> mu0 = jaxflow.measure.uniform_sphere(4, 3, key=jax.random.key(0))
    >>> def energy(beta):
    ...     sol = jaxflow.flow(
    ...         jaxflow.SelfAttention(beta=beta), mu0, t1=1.0, solver=diffrax.ReversibleHeun(),
    ...         stepsize_controller=diffrax.StepTo(jnp.linspace(0, 1, 9)),
    ...         adjoint=jaxflow.reversible.ReversibleAdjoint(),
    ...     )
    ...     return (sol.final.points.sum(axis=0) ** 2).sum()
    >>> jax.grad(energy)(2.0).shape
    ()

    ```
    """

    def check(
        self,
        solver: diffrax.AbstractSolver,
        stepsize_controller: diffrax.AbstractStepSizeController,
        saveat: diffrax.SaveAt,
        jumps: tuple[float, ...] = (),
    ):
        """Raises ValueError for a solve that cannot be undone; `jumps` are those of its field."""
        instead = ", or adjoint=diffrax.RecursiveCheckpointAdjoint()."
        if type(solver) is not diffrax.ReversibleHeun:
            name = type(solver).__name__
            raise ValueError(
                "ReversibleAdjoint undoes the steps of one method, and the solver is "
                f"{name}: take solver=diffrax.ReversibleHeun(){instead}"
            )
        if not isinstance(stepsize_controller, diffrax.StepTo | Grid):
            name = type(stepsize_controller).__name__
            raise ValueError(
                f"ReversibleAdjoint undoes steps that are given, got {name}: take "
                f"stepsize_controller=diffrax.StepTo(ts), the `steps` of a depth{instead}"
            )
        if jumps:
            raise ValueError(
                "ReversibleAdjoint undoes steps of one smooth equation, and the parameters of this "
                f"field jump, at {list(jumps)}: take a curve such as jaxflow.models.smooth{instead}"
            )
        if saveat.dense or saveat.subs != diffrax.SubSaveAt(t1=True):
            raise ValueError(
                "ReversibleAdjoint keeps the last state alone: take "
                f"saveat=diffrax.SaveAt(t1=True){instead}"
            )

    def loop(
        self,
        *,
        args,
        terms,
        solver,
        stepsize_controller,
        event,
        saveat,
        t0,
        t1,
        dt0,
        max_steps,
        throw,
        init_state,
        passed_solver_state,
        passed_controller_state,
        progress_meter,
    ):
        self.check(solver, stepsize_controller, saveat)
        if event is not None:
            raise ValueError("ReversibleAdjoint takes no event: steps are given, and all are made.")
        final, stats = diffrax.RecursiveCheckpointAdjoint().loop(
            args=_known(args), terms=_known(terms), solver=solver, event=event, saveat=saveat,
            stepsize_controller=stepsize_controller, t0=t0, t1=t1, dt0=dt0, max_steps=max_steps,
            throw=throw, init_state=_known(init_state), progress_meter=progress_meter,
            passed_solver_state=passed_solver_state,
            passed_controller_state=passed_controller_state,
        )  # fmt: skip
        ts = stepsize_controller.ts.astype(jnp.result_type(t0))
        end = _Undone(final.save_state.ys, final.solver_state[0], ts)
        ys = _ends((init_state.y, args, terms), end)
        return eqx.tree_at(lambda state: state.save_state.ys, final, ys), stats


def _known(tree: Any) -> Any:
    """The values, without their derivatives."""
    return jtu.tree_map(lambda a: jax.lax.stop_gradient(a) if eqx.is_array(a) else a, tree)


class _Undone(eqx.Module):
    """Where the backward solve begins: y at the end, saved along an axis of length 1, z, and all
    times."""

    ys: Any
    z: Any
    ts: jax.Array


@eqx.filter_custom_vjp
def _ends(start, end: _Undone):
    """y at the end, as a function of (y0, args, terms)."""
    return end.ys


@_ends.def_fwd
def _(perturbed, start, end):
    return end.ys, None


@_ends.def_bwd
def _(residuals, grad, perturbed, start, end):
    y0, args, terms = start
    dynamic, static = eqx.partition((args, terms), eqx.is_inexact_array)

    def field(t, z, dynamic):
        args, terms = eqx.combine(dynamic, static)
        return terms.vf(t, z, args)

    combine = lambda fn, *trees: jtu.tree_map(fn, *trees)
    zero = lambda tree: jtu.tree_map(jnp.zeros_like, tree)
    lengths = jnp.diff(end.ts)
    after = jnp.append(lengths, 0.0).astype(end.ts.dtype)  # h_k
    before = jnp.append(0.0, lengths).astype(end.ts.dtype)  # h_{k-1}

    def undo(state, step):
        part, z, a, b, c, gradient = state
        t, h, h_before = step
        v, pull = jax.vjp(lambda z, dynamic: field(t, z, dynamic), z, dynamic)
        y = combine(lambda part, v: part - _as(h / 2, v) * v, part, v)
        a = combine(lambda a, b: a + 2 * b, a, b)
        c = combine(lambda c, a: c + _as(h_before / 2, a) * a, c, a)
        of_z, of_rest = pull(c)
        b = combine(lambda new, b: new - b, of_z, b)
        gradient = combine(jnp.add, gradient, of_rest)
        z = combine(lambda y, z, v: 2 * y - z - _as(h_before, v) * v, y, z, v)
        part = combine(lambda y, v: y - _as(h_before / 2, v) * v, y, v)
        c = combine(lambda a, b: _as(h_before / 2, a) * a + _as(h_before, b) * b, a, b)
        return (part, z, a, b, c, gradient), None

    last = lambda tree: jtu.tree_map(lambda leaf: leaf[-1], tree)
    given = combine(lambda g, y: jnp.zeros_like(y) if g is None else g, grad, end.ys)
    y, a = last(end.ys), last(given)
    nothing = zero(y)
    state = y, end.z, a, nothing, nothing, zero(dynamic)
    (_, _, a, b, _, gradient), _ = jax.lax.scan(undo, state, (end.ts, after, before), reverse=True)
    return combine(jnp.add, a, b), *gradient


def _as(h, like):
    return h.astype(like.dtype)
