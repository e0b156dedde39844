"""The equation of a closure, z' = F(z), and its solution."""

import abc
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..._rules import instance, reals
from ..._types import ScalarLike, error_where, is_concrete
from ...flow import FlowError, integrate, why_stopped


class AbstractClosure(eqx.Module):
    """A few parameters z of a law, and how they move."""

    @abc.abstractmethod
    def __call__(self, z: Any) -> Any:
        """z', of the structure of z."""

    @abc.abstractmethod
    def check(self, z: Any) -> None:
        """**Raises:** `ValueError` or `TypeError` where z are no parameters of such a law."""


class ClosureSolution(eqx.Module):
    """What `jaxflow.density.closures.evolve` returns.

    - `ts`, the saved times, padded with inf after an event; `states`, the parameters there, with
      times along their first axis.
    - `event_mask`, `stats`, `result`: as in diffrax.
    """

    ts: Float[Array, " times"]
    states: Any
    event_mask: Any
    stats: dict[str, Any]
    result: diffrax.RESULTS

    @property
    def ok(self) -> Bool[Array, ""]:
        """Whether the solve succeeded."""
        return diffrax.is_okay(self.result)


def evolve(
    closure: AbstractClosure,
    z0: Any,
    *,
    t1: ScalarLike,
    t0: ScalarLike = 0.0,
    dt0: ScalarLike | None = None,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    saveat: diffrax.SaveAt = diffrax.SaveAt(t1=True),
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),
    event: diffrax.Event | None = None,
    max_steps: int | None = 4096,
    throw: bool = True,
) -> ClosureSolution:
    """Solves z' = F(z), the equation of a closure.

    **Arguments:** `closure`, F; `z0`, its parameters at t0: a number, an array or
    `jaxflow.density.closures.Moments`; the others as in `jaxflow.flow`.

    **Returns:** a `jaxflow.density.closures.ClosureSolution`.

    **Raises:** `ValueError` or `TypeError` for bad input, `FlowError` where the solve fails, as at
    a blow-up that no event stops before.

    ```python
    >>> from jaxflow.density import closures
    >>> sol = closures.evolve(closures.TwoTokens(beta=0.0), 0.0, t1=1.0)  # rho = tanh t
    >>> round(float(sol.states[-1]), 4)
    0.7616

    ```
    """
    instance("closure", closure, AbstractClosure, "jaxflow.density.closures.TwoTokens(beta=1.0)")
    closure.check(z0)
    sol = integrate(
        diffrax.ODETerm(_rate),
        jax.tree.map(lambda a: jnp.asarray(reals("z0", a)), z0),
        closure,
        t0=t0,
        t1=t1,
        dt0=dt0,
        solver=solver,
        stepsize_controller=stepsize_controller,
        saveat=saveat,
        adjoint=adjoint,
        event=event,
        max_steps=max_steps,
    )
    assert sol.ts is not None
    out = ClosureSolution(sol.ts, sol.ys, sol.event_mask, sol.stats, sol.result)
    if not throw:
        return out
    if not is_concrete(sol.ts):
        message = "the solve failed: call it outside jit for the cause."
        return error_where(~out.ok, out, message)
    if not out.ok:
        raise FlowError(why_stopped(sol, solver, max_steps))
    return out


def _rate(t, z, closure: AbstractClosure):
    return closure(z)
