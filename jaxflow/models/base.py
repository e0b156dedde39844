"""What models share: their depth, and embed -> flow -> read out."""

import abc
import math
from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..fields import AbstractField
from ..flow import FlowSolution, Observables, flow, memory_estimate
from ..measure import Measure
from ..solvers import LieTrotter, default_adjoint


class Depth(eqx.Module):
    """How a model is integrated: the interval [0, t1], the method and its steps.

    **Arguments:**

    - `t1`: T, the depth.
    - `steps`: the number of equal steps; `None` for adaptive ones.
    - `tolerance`: rtol = atol of adaptive steps.
    - `solver`: any diffrax solver. The default is Lie-Trotter splitting with Euler's method, a
      transformer's residual stream; adaptive steps need an embedded error, such as
      `diffrax.Tsit5()`.
    - `adjoint`: any diffrax adjoint; `None` is [`jaxflow.solvers.default_adjoint`][] of the steps.
    - `max_steps`: of an adaptive solve: the budget of function evaluations is this times the
      stages of the method.
    """

    t1: float = eqx.field(static=True, converter=float)
    steps: int | None = eqx.field(static=True, default=None)
    tolerance: float | None = eqx.field(static=True, default=None)
    solver: diffrax.AbstractSolver = LieTrotter()
    adjoint: diffrax.AbstractAdjoint | None = None
    max_steps: int = eqx.field(static=True, default=256)

    def __check_init__(self):
        if (self.steps is None) == (self.tolerance is None):
            raise ValueError("a depth has either `steps` or a `tolerance`; give one of them.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"the tolerance must be positive, got {self.tolerance}.")
        if not (math.isfinite(self.t1) and self.t1 > 0):
            raise ValueError(f"the depth t1 must be positive and finite, got {self.t1}.")
        if self.tolerance is not None and not isinstance(
            self.solver, diffrax.AbstractAdaptiveSolver
        ):
            raise ValueError(
                f"{type(self.solver).__name__} takes fixed steps: give `steps`, or a solver with "
                "an error estimate such as diffrax.Tsit5()."
            )

    def memory(self, mu0: Measure) -> int:
        """The bytes of the states that a gradient through the flow of mu0 keeps, and of a step."""
        steps = self.steps or self.max_steps
        adjoint = self.adjoint or default_adjoint(steps)
        kept = adjoint if isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint) else None
        return memory_estimate(mu0, solver=self.solver, max_steps=steps, adjoint=kept)

    @property
    def times(self) -> np.ndarray:
        """The ends of the steps, shape `(steps + 1,)`, where they are fixed."""
        if self.steps is None:
            raise ValueError("adaptive steps are not known beforehand.")
        return np.linspace(0.0, self.t1, self.steps + 1)

    def flow(
        self,
        field: AbstractField,
        mu0: Measure,
        observe: Observables | None = None,
        *,
        throw: bool = False,
    ) -> FlowSolution:
        """The flow of mu0 along the field over [0, t1].

        The solution has the measure at t1 and, with `observe`, what is observed at each step.
        `throw`: raise if it fails, as in [`jaxflow.flow`][].
        """
        if self.steps is not None:
            with jax.ensure_compile_time_eval():  # The flow checks the times, also under jit.
                controller, max_steps = diffrax.StepTo(jnp.asarray(self.times)), self.steps
        else:
            tolerance = cast(float, self.tolerance)
            controller, max_steps = diffrax.PIDController(tolerance, tolerance), self.max_steps
        end = diffrax.SubSaveAt(t1=True)
        path = diffrax.SubSaveAt(t0=True, steps=True, fn=lambda t, y, args: None)
        return flow(
            field,
            mu0,
            t1=self.t1,
            solver=self.solver,
            stepsize_controller=controller,
            adjoint=self.adjoint or default_adjoint(max_steps),
            max_steps=max_steps,
            throw=throw,
            saveat=diffrax.SaveAt(subs=[end, path] if observe else [end]),
            observe=observe,
        )


class Solved(eqx.Module):
    """A solve inside a model.

    - `final`: the measure at time T. `ok`: whether the solve succeeded and is finite.
    - `stats`: as in [`jaxflow.FlowSolution`][].
    - `ts`, `observed`: with `observe`, the ends of the steps (inf where there was none) and the
      observed values there.
    """

    final: Measure
    ok: Bool[Array, ""]
    stats: dict[str, Any]
    ts: Float[Array, " times"] | None
    observed: Any

    def integral(self, name: str) -> Array:
        """int_0^T of what was observed by that name, by the trapezoidal rule over the steps."""
        if self.ts is None:
            raise ValueError(f"nothing was observed: pass observe={{{name!r}: fn}} to solve.")
        values, reached = self.observed[name], jnp.isfinite(self.ts)
        shape = (-1, *[1] * (values.ndim - 1))
        gaps = jnp.where(reached[1:], self.ts[1:] - jnp.where(reached[:-1], self.ts[:-1], 0), 0)
        values = jnp.where(reached.reshape(shape), values, 0)
        return (gaps.reshape(shape) * (values[1:] + values[:-1]) / 2).sum(axis=0)


class AbstractModel(eqx.Module):
    """embed -> flow -> read out. Inputs and outputs carry any leading batch axes; the systems of a
    batch share their steps."""

    field: eqx.AbstractVar[AbstractField]
    depth: eqx.AbstractVar[Depth]

    @abc.abstractmethod
    def embed(self, inputs: Array) -> Measure:
        """The measure at time 0."""

    @abc.abstractmethod
    def read_out(self, mu: Measure) -> Array:
        """The outputs, from the measure at time T."""

    def solve(self, inputs: Array, observe: Observables | None = None) -> Solved:
        """The flow of the embedded inputs; `observe` is evaluated at each step."""
        sol = self.depth.flow(self.field, self.embed(inputs), observe)
        final = sol.measures[0][-1]
        ok = diffrax.is_okay(sol.result) & jnp.isfinite(final.points).all()
        path = (sol.ts[1], sol.observed[1]) if observe else (None, None)
        return Solved(final, ok, sol.stats, *path)

    def __call__(self, inputs: Array) -> Array:
        """read_out(flow(embed(inputs)))."""
        return self.read_out(self.solve(inputs).final)
