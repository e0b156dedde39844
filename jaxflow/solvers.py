"""One-step methods that respect the geometry and the parts of a field, as diffrax solvers.

Retracted(solver)    y_{k+1} = retract(step(y_k)): any diffrax method, projected back
LieTrotter(solver)   step_K o ... o step_1, over the parts of a sum of fields
Strang(solver)       half steps of 1, ..., K-1, a step of K, half steps of K-1, ..., 1
PiecewiseSteps       fixed steps that end at the breakpoints of a field
"""

import abc
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ._types import ScalarLike
from .fields import AbstractField, Sum
from .fields.time import frozen
from .geometry import AbstractGeometry


class AbstractFieldSolver(diffrax.AbstractWrappedSolver):
    """A diffrax solver around another one, for `jaxflow.flow`, whose `args` hold the field."""

    solver: eqx.AbstractVar[diffrax.AbstractSolver]

    @property
    def term_structure(self):
        return self.solver.term_structure

    @property
    def interpolation_cls(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self):
        return self.solver.term_compatible_contr_kwargs

    # diffrax sets these two on a Runge-Kutta method from the adjoint and the controller.

    @property
    def scan_kind(self):
        return self.solver.scan_kind  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def root_finder(self):
        return self.solver.root_finder  # pyright: ignore[reportAttributeAccessIssue]

    def order(self, terms):
        return self.solver.order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)


class Retracted(AbstractFieldSolver):
    """Any diffrax solver, with each step followed by the geometry's retraction.

    Projecting the result of a method of order p on the manifold keeps the order p, since the
    exact solution lies on it (Hairer, Lubich, Wanner, Geometric Numerical Integration, IV.4).
    A method that reuses its last stage (FSAL) stays right for a field that is evaluated at the
    retracted point, as `jaxflow.flow` does.

    How far a step y leaves the manifold is an error that is known, so the estimate e of an
    embedded pair becomes |e| + |y - retract(y)|. On long steps the pair alone is blind to it,
    since the field at the retracted point does not change along the normal; on short ones the
    distance is of higher order than e.

    **Arguments:** `solver`, any diffrax solver; `geometry`.
    """

    solver: diffrax.AbstractSolver
    geometry: AbstractGeometry

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, error, dense_info, solver_state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        retracted = self.geometry.retract(y1)
        if error is not None:
            error = jnp.abs(error) + jnp.abs(y1 - retracted)
        return retracted, error, dense_info, solver_state, result


class Frozen(AbstractFieldSolver):
    """Any diffrax solver, in each step of which a field made of pieces is the piece of that step.

    No stage then meets the next piece at its end, and the piece is read once a step.

    **Arguments:** `solver`, any diffrax solver; `breakpoints`, at which steps begin.
    """

    solver: diffrax.AbstractSolver
    breakpoints: tuple[float, ...] = eqx.field(static=True)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
        args = args._replace(field=frozen(args.field, t0 + 0.5 * (t1 - t0)))
        made_jump = made_jump | (t0 == jnp.asarray(self.breakpoints, t0.dtype)).any()
        return self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)


# ------------------------------------------------------------------ splitting


class AbstractSplitting(diffrax.AbstractSolver):
    """A composition of steps, each with one of the parts X_1 + ... + X_K of a field."""

    solver: eqx.AbstractVar[diffrax.AbstractSolver]

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    @abc.abstractmethod
    def substeps(self, parts: int) -> list[tuple[int, float, float]]:
        """(part, start, end) of each substep, times in units of the step."""

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y, result = y0, diffrax.RESULTS.successful
        for part, start, end in self.over(args.field, t0, t1):
            inner = args._replace(field=part)
            state = self.solver.init(terms, start, end, y, inner)
            y, _, _, _, done = self.solver.step(terms, start, end, y, inner, state, False)
            result = diffrax.RESULTS.where(diffrax.is_okay(result), done, result)
        return y, None, {"y0": y0, "y1": y}, None, result

    def over(self, field: AbstractField, t0, t1) -> Iterator[tuple[AbstractField, Any, Any]]:
        """(part of the field, start, end) of each substep of the step from t0 to t1."""
        parts = field.fields if isinstance(field, Sum) else (field,)
        at = lambda u: t1 if u == 1 else t0 + u * (t1 - t0)
        return ((parts[k], at(a), at(b)) for k, a, b in self.substeps(len(parts)))

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


class LieTrotter(AbstractSplitting):
    """Steps with X_1, then X_2, ..., then X_K, for a field X_1 + ... + X_K; of order 1.

    With Euler's method, one step a piece and attention + feed-forward this is the transformer
    block x <- x + attention(x), x <- x + feedforward(x) (Trotter 1959).

    **Arguments:** `solver`, any one-step method, used for each part.
    """

    solver: diffrax.AbstractSolver = diffrax.Euler()

    def order(self, terms):
        return 1

    def substeps(self, parts):
        return [(k, 0, 1) for k in range(parts)]


class Strang(AbstractSplitting):
    """Half steps with X_1, ..., X_{K-1}, a step with X_K, half steps back; of order 2.

    (Strang 1968.) The method used for the parts must have order 2 as well.

    **Arguments:** `solver`, any one-step method, used for each part.
    """

    solver: diffrax.AbstractSolver = diffrax.Midpoint()

    def order(self, terms):
        return min(2, self.solver.order(terms) or 1)

    def substeps(self, parts):
        first = [(k, 0, 0.5) for k in range(parts - 1)]
        last = [(k, 0.5, 1) for k in reversed(range(parts - 1))]
        return [*first, (parts - 1, 0, 1), *last]


# ------------------------------------------------------------------ fixed steps


class PiecewiseSteps(diffrax.AbstractStepSizeController):
    """Fixed steps of at most `dt0` that end at each breakpoint.

    Each piece is divided into the fewest equal steps.
    """

    breakpoints: tuple[float, ...] = eqx.field(static=True)

    def wrap(self, direction):
        return self

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        if dt0 is None:
            raise ValueError("fixed steps need a value for `dt0`.")
        t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
        inside = jnp.clip(jnp.asarray(self.breakpoints, t0.dtype), t0, t1)
        edges = jnp.concatenate([t0[None], inside, t1[None]])
        return self._next(edges, dt0, t0), (edges, dt0)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):
        end = self._next(state[0], state[1], jnp.asarray(t1))
        return True, t1, end, False, state, diffrax.RESULTS.successful

    def _next(self, edges: Array, dt0: ScalarLike, t: Array):
        """The end of the step from t, by its number in the piece: nothing accumulates."""
        piece = jnp.clip(jnp.searchsorted(edges, t, side="right"), 1, len(edges) - 1)
        start, end = edges[piece - 1], edges[piece]
        # A rounding error in dt0 must not add a step.
        count = jnp.ceil((end - start) / dt0 * (1 - 4 * jnp.finfo(t.dtype).eps))
        done = jnp.round((t - start) / (end - start) * count) + 1
        return jnp.where(done >= count, end, start + (end - start) * (done / count))


def default_adjoint(steps: int) -> diffrax.RecursiveCheckpointAdjoint:
    """The adjoint for a known number of steps.

    Each state is kept for up to 64 steps, where a gradient then costs what it does for a
    rematerialised `jax.lax.scan`; of more, 8 sqrt(steps) are, and memory grows as the square root.
    """
    if steps < 1:
        raise ValueError(f"a solve has at least one step, got {steps}.")
    return diffrax.RecursiveCheckpointAdjoint(min(steps, math.ceil(8 * math.sqrt(steps))))


# ------------------------------------------------------------------ methods written out


def evaluations_per_step(solver: diffrax.AbstractSolver) -> tuple[int, int] | None:
    """(evaluations once, evaluations a step) of an explicit method; None where it varies."""
    if isinstance(solver, AbstractFieldSolver):
        return evaluations_per_step(solver.solver)
    if isinstance(solver, AbstractSplitting):
        # Each part once makes one evaluation of the field; Strang takes all but one part twice.
        inner = evaluations_per_step(solver.solver)
        return inner and (0, sum(inner) * (2 if isinstance(solver, Strang) else 1))
    if isinstance(solver, diffrax.Euler):
        return 0, 1
    tableau = getattr(solver, "tableau", None)
    if isinstance(solver, diffrax.AbstractERK) and isinstance(tableau, diffrax.ButcherTableau):
        return (1, tableau.num_stages - 1) if tableau.fsal else (0, tableau.num_stages)
    return None


def is_explicit(solver: diffrax.AbstractSolver) -> bool:
    """Whether `explicit_step` can write the method out."""
    if isinstance(solver, AbstractFieldSolver | AbstractSplitting):
        return is_explicit(solver.solver)
    tableau = getattr(solver, "tableau", None)
    plain = isinstance(solver, diffrax.AbstractERK) and isinstance(tableau, diffrax.ButcherTableau)
    return plain or isinstance(solver, diffrax.Euler)


def explicit_step(
    solver: diffrax.AbstractSolver,
    field: AbstractField,
    t0: Array,
    t1: Array,
    y: Array,
    evaluate: Callable[[AbstractField, Array, Array], Array],
) -> Array:
    """y after one step of an explicit method, written out.

    `evaluate(field, t, y)` is called once a stage, always in the same order: what it keeps of a
    stage, such as keys and values, can be found again by its number.
    """
    if isinstance(solver, Retracted):
        y = explicit_step(solver.solver, field, t0, t1, y, evaluate)
        return solver.geometry.retract(y)
    if isinstance(solver, AbstractSplitting):
        for part, start, end in solver.over(field, t0, t1):
            y = explicit_step(solver.solver, part, start, end, y, evaluate)
        return y
    h = t1 - t0
    if isinstance(solver, diffrax.Euler):
        return y + h * evaluate(field, t0, y)
    if not is_explicit(solver):
        raise ValueError(
            f"{type(solver).__name__} is not an explicit Runge-Kutta method, or a splitting into "
            "such, so its stages cannot be written out. Use diffrax.Euler(), Heun(), Tsit5(), ..."
        )
    tableau = cast(diffrax.ButcherTableau, getattr(solver, "tableau", None))
    slopes = [evaluate(field, t0, y)]
    # The last stage of a method that reuses it (FSAL) is the first of the next step.
    rows = tableau.a_lower[:-1] if tableau.fsal else tableau.a_lower
    for c, row in zip(tableau.c, rows, strict=False):
        moved = sum(float(a) * k for a, k in zip(row, slopes, strict=True))
        slopes.append(evaluate(field, t0 + float(c) * h, y + h * moved))
    return y + h * sum(float(b) * k for b, k in zip(tableau.b_sol, slopes, strict=False))
