"""What models share: their depth, and embed -> flow -> read out."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._memory import check_fits
from .._rules import constant, count, instance, positive
from .._solution import FlowSolution, Sides
from .._types import ArrayLike, ScalarLike, error_where
from ..explicit import is_explicit
from ..fields import AbstractCurve, AbstractField, Legendre, LowRank, TimeDependent
from ..fields.time import fit, jumps
from ..flow import Observables, flow, memory_estimate
from ..measure import Measure
from ..reversible import ReversibleAdjoint
from ..solvers import Grid, LieTrotter, ScanAdjoint, default_adjoint

SCANNED = 64  # steps


class Depth(eqx.Module):
    """How a model is integrated: the interval [0, t1], the method and its steps.

    **Arguments:**

    - `t1`: T, the depth.
    - `steps`: the number of equal steps; `None` for adaptive ones.
    - `tolerance`: rtol = atol of adaptive steps.
    - `solver`: any diffrax solver. The default is Lie-Trotter splitting with Euler's method, a
      transformer's residual stream; adaptive steps need an embedded error, such as
      `diffrax.Tsit5()`.
    - `adjoint`: any diffrax adjoint; `None` is `jaxflow.solvers.default_adjoint` of the steps.
    - `max_steps`: of an adaptive solve: the budget of function evaluations is this times the
      stages of the method.
    - `grid`: the ends of the steps where they are not equal, which `jittered` draws.

    **Raises:** `ValueError` or `TypeError` for numbers that are no depth, both or neither of
    `steps` and `tolerance`, and a tolerance for a method of fixed steps.
    """

    t1: float = eqx.field(
        static=True,
        converter=lambda t1: constant("the depth t1", t1, "positive and finite", positive),
    )
    steps: int | None = eqx.field(static=True, default=None)
    tolerance: float | None = eqx.field(static=True, default=None)
    solver: diffrax.AbstractSolver = LieTrotter()
    adjoint: diffrax.AbstractAdjoint | None = None
    max_steps: int = eqx.field(static=True, default=256)
    grid: Float[Array, " steps_and_1"] | None = None

    def __check_init__(self):
        if (self.steps is None) == (self.tolerance is None):
            raise ValueError("a depth has either `steps` or a `tolerance`; give one of them.")
        if self.steps is not None:
            if isinstance(self.steps, tuple | list | range):
                raise TypeError(
                    f"a depth has one number of steps, got {self.steps!r}. To draw it anew for "
                    "each step of training, pass fit(depths=jaxflow.training.Elastic(range(2, 13)))"
                    "; the model's own depth is that of its evaluations."
                )
            count("steps", self.steps)
            check_fits(32 * self.steps, f"the times of {self.steps} steps", "Take fewer steps.")
        if self.tolerance is not None:
            constant("the tolerance", self.tolerance, "positive", positive)
        count("max_steps", self.max_steps)
        instance("solver", self.solver, diffrax.AbstractSolver, "diffrax.Tsit5()")
        if self.adjoint is not None:
            example = "diffrax.RecursiveCheckpointAdjoint()"
            instance("adjoint", self.adjoint, diffrax.AbstractAdjoint, example)
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
        adjoint = self._adjoint(steps, observed=False)
        if isinstance(adjoint, ScanAdjoint):
            adjoint = diffrax.RecursiveCheckpointAdjoint(steps)
        kept = adjoint if isinstance(adjoint, diffrax.RecursiveCheckpointAdjoint) else None
        return memory_estimate(mu0, solver=self.solver, max_steps=steps, adjoint=kept)

    @property
    def times(self) -> np.ndarray:
        """The ends of the steps, shape `(steps + 1,)`, where they are fixed."""
        if self.steps is None:
            raise ValueError("adaptive steps are not known beforehand.")
        if self.grid is not None:
            return np.asarray(self.grid)
        return np.linspace(0.0, self.t1, self.steps + 1)

    def with_steps(self, steps: int) -> "Depth":
        """The same depth with another number of equal steps."""
        return dataclasses.replace(self, steps=steps, tolerance=None, grid=None)

    def halved(self) -> "Depth":
        """The same depth with each step cut into two.

        **Raises:** `ValueError` where steps are adaptive.
        """
        if self.steps is None:
            raise ValueError("adaptive steps are not known beforehand, so none can be halved.")
        finer = self.with_steps(2 * self.steps)
        if self.grid is None:
            return finer
        middles = (self.grid[1:] + self.grid[:-1]) / 2
        between = jnp.stack([self.grid[:-1], middles], axis=1).reshape(-1)
        return dataclasses.replace(finer, grid=jnp.append(between, self.grid[-1]))

    def jittered(self, jitter: ScalarLike, key: PRNGKeyArray) -> "Depth":
        """The same depth with the ends of its steps moved at random.

            t_k = (k + jitter u_k) T / N,   u_k uniform on [-1/2, 1/2),   t_0 = 0,   t_N = T

        so that a step is (1 - jitter) to (1 + jitter) times as long as T / N.

        **Raises:** `ValueError` where steps are adaptive.
        """
        times = jnp.asarray(self.times, float)
        moves = jax.random.uniform(key, (len(times) - 2,), minval=-0.5, maxval=0.5)
        moved = times[1:-1] + jitter * (self.t1 / (len(times) - 1)) * moves
        return dataclasses.replace(self, grid=times.at[1:-1].set(moved))

    def _adjoint(self, steps: int, *, observed: bool) -> diffrax.AbstractAdjoint:
        if self.adjoint is not None:
            return self.adjoint
        few = self.steps is not None and steps <= SCANNED and is_explicit(self.solver)
        # What is saved at each step is part of the state, which a scan would keep as often.
        return ScanAdjoint() if few and not observed else default_adjoint(steps)

    def flow(
        self,
        field: AbstractField,
        mu0: Measure,
        observe: Observables | None = None,
        *,
        throw: bool = False,
    ) -> FlowSolution:
        """The flow of mu0 along the field over [0, t1].

        The solution has the measure at t1 as its `final` one; with `observe`, what is observed at
        each step.
        `throw`: raise if it fails, as in `jaxflow.flow`.
        """
        if self.grid is not None:
            controller, max_steps = Grid(self.grid), len(self.grid) - 1
        elif self.steps is not None:
            with jax.ensure_compile_time_eval():  # The flow checks the times, also under jit.
                controller, max_steps = diffrax.StepTo(jnp.asarray(self.times)), self.steps
        else:
            tolerance = cast(float, self.tolerance)
            controller, max_steps = diffrax.PIDController(tolerance, tolerance), self.max_steps
        saveat = diffrax.SaveAt(t1=True)
        if observe:
            if isinstance(self.adjoint, diffrax.BacksolveAdjoint | ReversibleAdjoint):
                raise ValueError(
                    f"{type(self.adjoint).__name__} keeps no path to observe along: take "
                    "diffrax.RecursiveCheckpointAdjoint(), or no costs along the flow."
                )
            saveat = diffrax.SaveAt(t0=True, steps=True, fn=lambda t, y, args: None)
        return flow(
            field,
            mu0,
            t1=self.t1,
            solver=self.solver,
            stepsize_controller=controller,
            adjoint=_backwards(self._adjoint(max_steps, observed=bool(observe)), controller),
            max_steps=max_steps,
            throw=throw,
            saveat=saveat,
            observe=observe,
        )


def _backwards(adjoint, controller):
    """The adjoint; an equation that is solved backwards takes the given steps in that order."""
    given = isinstance(controller, diffrax.StepTo | Grid)
    if not given or not isinstance(adjoint, diffrax.BacksolveAdjoint):
        return adjoint
    steps = {"stepsize_controller": type(controller)(controller.ts[::-1])}
    return diffrax.BacksolveAdjoint(**steps | adjoint.kwargs)


def depth_or_steps(depth: Depth | None, t1: float, steps: int) -> Depth:
    """The depth of a model, by default so many steps."""
    if depth is None:
        return Depth(t1=t1, steps=steps)
    return instance("depth", depth, Depth, "jaxflow.models.Depth(t1=1.0, steps=4)")


class AbstractModel(eqx.Module):
    """embed -> flow -> read out. Inputs and outputs carry any leading batch axes; the systems of a
    batch share their steps."""

    field: eqx.AbstractVar[AbstractField]
    depth: eqx.AbstractVar[Depth]

    @abc.abstractmethod
    def embed(self, inputs: ArrayLike) -> Measure:
        """The measure at time 0."""

    @abc.abstractmethod
    def read_out(self, mu: Measure) -> Array:
        """The outputs, from the measure at time T."""

    def with_depth(self, depth: Depth):
        """The same parameters with other steps, tolerance, solver, adjoint or T.

        **Raises:** `TypeError` where this is no depth.
        """
        depth = depth_or_steps(depth, 1.0, 1)
        return eqx.tree_at(lambda model: model.depth, self, depth)

    def with_curve(self, curve: AbstractCurve):
        """The same model with its parameters along another curve of its blocks, such as layers that
        `jaxflow.fields.time.sample` takes from its own."""
        return eqx.tree_at(lambda model: model.field, self, TimeDependent(curve))

    def smoothed(self, coefficients: int):
        """The same model with its parameters along a smooth curve of so many Legendre polynomials,
        nearest by least squares to its own where its steps begin.

        There Euler's method reads them, so that with as many coefficients as layers, and one step
        a layer, the outputs are what they were, and the curve may be trained on from there at
        other steps. Of many layers take few coefficients, at most 2 sqrt(layers) or so: polynomials
        through many equidistant points oscillate between them.

        **Raises:** `ValueError` or `TypeError` for more coefficients than steps, for adaptive
        steps, and for a model whose parameters are no curve in time.
        """
        curve, times, t1 = self._curve, self.depth.times[:-1], self.depth.t1
        if count("coefficients", coefficients) > len(times):
            raise ValueError(
                f"{len(times)} steps determine as many coefficients, got {coefficients}."
            )
        like = Legendre([curve.at(0.0)] * coefficients, 0.0, t1)
        return self.with_curve(fit(curve, like, t1=t1, at=times))

    def adapted(self, rank: int, *, key: PRNGKeyArray):
        """The same model with a low-rank change of each matrix of its curve, nothing at the start,
        to be trained alone:

        `fit(model, data, steps=500, trainable=jaxflow.fields.adapters(model))`

        **Arguments:** `rank` and `key`, as of `jaxflow.fields.LowRank`.

        **Raises:** as that, and `TypeError` for a model whose parameters are no curve in time.
        """
        return self.with_curve(LowRank(self._curve, rank, key=key))

    def merged(self):
        """The same model with its low-rank changes added to what they change: the curve that it
        had before it was adapted, with other numbers, and the same outputs to rounding.

        **Raises:** `TypeError` for a model that is not adapted.
        """
        example = "that of model.adapted(rank, key=...)"
        adapted = instance("the curve to merge", self._curve, LowRank, example)
        return self.with_curve(adapted.merged())

    @property
    def _curve(self) -> AbstractCurve:
        instance("the field of the model", self.field, TimeDependent, "one of a LanguageModel")
        return cast(TimeDependent, self.field).curve

    def solve(self, inputs: ArrayLike, observe: Observables | None = None) -> FlowSolution:
        """The flow of the embedded inputs; its `final` measure is what `read_out` takes.

        `observe` is evaluated at each step, and on both sides of it where parameters of the field
        jump: `observed` then holds two arrays, `before` and `after`. Look at `ok`: a solve that
        fails raises nothing.
        """
        watched = dict(instance("observe", observe or {}, Mapping, "{name: fn}"))
        if jumps(self.field):
            watched = {name: _on_both_sides(fn) for name, fn in watched.items()}
        return self.depth.flow(self.field, self.embed(inputs), watched)

    def __call__(self, inputs: ArrayLike) -> Array:
        """read_out(flow(embed(inputs))).

        **Raises:** `ValueError` or `TypeError` for bad inputs; an error if adaptive steps do not
        reach T, which `solve` says in its `ok` instead.
        """
        solved = self.solve(inputs)
        if self.depth.steps is None:
            message = "the flow did not reach T: raise max_steps or the tolerance of the depth."
            solved = error_where(~solved.ok, solved, message)
        return self.read_out(solved.final)


def _on_both_sides(fn: Callable) -> Callable:
    """The observable at the left limit of its time and at the time itself."""
    before = lambda t: jax.lax.stop_gradient(jnp.nextafter(t, -jnp.inf))
    return lambda t, mu: Sides(fn(before(t), mu), fn(t, mu))
