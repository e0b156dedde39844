"""One step of an explicit method, written out: a second integrator beside diffrax's.

    k_i = X(t0 + c_i h, y0 + h sum_{j<i} a_ij k_j),    y1 = y0 + h sum_i b_i k_i

Every flow is integrated by diffrax. Two places cannot leave a step to it. The substeps of a
splitting method would each run in a loop of a kind that diffrax chooses for the outermost method
alone, and not every adjoint passes through the other kind. And the generation of text has to meet
each stage by its number, to find the keys and values that it kept there. Both call
`explicit_step`, and `evaluations_per_step` says what such a step costs; tests/test_explicit.py
holds them to diffrax's own steps and to counted calls.
"""

import abc
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import diffrax
import jax.numpy as jnp
from jaxtyping import Array

from ._types import ScalarLike
from .fields import AbstractField

__all__ = [
    "AbstractComposition",
    "AbstractMethod",
    "combined",
    "evaluations_per_step",
    "explicit_step",
    "is_explicit",
    "is_method",
    "tableau",
]


def __dir__() -> list[str]:
    return __all__


Step = Callable[[AbstractField, Any, Any, Array], Array]
Kind = TypeVar("Kind", bound=diffrax.AbstractSolver)


class AbstractMethod(diffrax.AbstractSolver):
    """A method of ours, which knows what it costs."""

    @abc.abstractmethod
    def evaluations(self, parts: int) -> tuple[int, int] | None:
        """As `jaxflow.explicit.evaluations_per_step`."""


class AbstractComposition(AbstractMethod):
    """A method whose step consists of steps of another one, `inner`."""

    @property
    @abc.abstractmethod
    def inner(self) -> diffrax.AbstractSolver:
        """The method inside."""

    @abc.abstractmethod
    def compose(self, step: Step, field: AbstractField, t0: Any, t1: Any, y: Array) -> Array:
        """y after a step, by `step(field, t0, t1, y)`, a step of the method inside."""


def is_method(solver: diffrax.AbstractSolver, kind: type[Kind]) -> TypeGuard[Kind]:
    """isinstance of the method itself: diffrax's answers for the one that is wrapped as well.

    **Arguments:** `solver`: a diffrax solver; `kind`: a class of solvers.

    **Returns:** True where the class of `solver` is `kind` or below it.
    """
    return issubclass(type(solver), kind)


def tableau(solver: diffrax.AbstractSolver) -> diffrax.ButcherTableau | None:
    """The tableau of an explicit Runge-Kutta method, but for Euler's, which has none.

    **Arguments:** `solver`: any diffrax solver.

    **Returns:** its Butcher tableau, or `None`.
    """
    found = solver.tableau if is_method(solver, diffrax.AbstractERK) else None
    return found if isinstance(found, diffrax.ButcherTableau) else None


def combined(weights: Any, slopes: list[Array]) -> Array:
    """sum_j a_j k_j, without the terms that are zero.

    **Arguments:** `weights`: the numbers a_j; `slopes`: as many arrays k_j of one shape.

    **Returns:** the sum, of that shape.

    **Raises:** `ValueError` where there are more or fewer weights than slopes.
    """
    pairs = zip(weights, slopes, strict=True)
    return sum(float(a) * k for a, k in pairs if a) + jnp.zeros_like(slopes[0])


def evaluations_per_step(solver: diffrax.AbstractSolver, parts: int = 1) -> tuple[int, int] | None:
    """(evaluations at the start and after a jump, evaluations a step) of an explicit method.

    None where it varies. Of a field of several `parts`, which a splitting method evaluates one by
    one, the evaluations of the first are counted.

    **Arguments:** `solver`: any diffrax solver; `parts`: how many the field has.

    **Returns:** two counts, or `None`.
    """
    if is_method(solver, AbstractMethod):
        return solver.evaluations(parts)
    if is_method(solver, diffrax.HalfSolver):
        inner = evaluations_per_step(solver.solver, parts)
        # Reused slopes are those of the first half step, also at the start of the whole one.
        return inner and (2 * inner[0], 3 * inner[1])
    if is_method(solver, diffrax.Euler):
        return 0, 1
    if is_method(solver, diffrax.ReversibleHeun):
        return 1, 1
    if found := tableau(solver):
        return (1, found.num_stages - 1) if found.fsal else (0, found.num_stages)
    return None


def is_explicit(solver: diffrax.AbstractSolver) -> bool:
    """Whether `explicit_step` can write the method out.

    **Arguments:** `solver`: any diffrax solver; of a composition, the method inside it counts.

    **Returns:** True for Euler's method and those that have a tableau.
    """
    if is_method(solver, AbstractComposition):
        return is_explicit(solver.inner)
    return is_method(solver, diffrax.Euler) or tableau(solver) is not None


def explicit_step(
    solver: diffrax.AbstractSolver,
    field: AbstractField,
    t0: ScalarLike,
    t1: ScalarLike,
    y: Array,
    evaluate: Callable[[AbstractField, Any, Array], Array],
) -> Array:
    """y after one step of an explicit method, written out.

    **Arguments:** `solver`, the method; `field`, which its step is along; `t0`, `t1`, the ends of
    the step; `y`, the state at t0; `evaluate(field, t, y)`, the velocity. It is called once a stage
    and always in the same order: what it keeps of a stage, such as keys and values, can be found
    again by its number.

    **Returns:** the state at t1.

    **Raises:** `ValueError` for a method of another kind.
    """
    if not is_explicit(solver):
        raise ValueError(
            f"{type(solver).__name__} is not an explicit Runge-Kutta method, or a splitting into "
            "such, so its stages cannot be written out. Use diffrax.Euler(), Heun(), Tsit5(), ..."
        )
    if is_method(solver, AbstractComposition):
        step = lambda field, t0, t1, y: explicit_step(solver.inner, field, t0, t1, y, evaluate)
        return solver.compose(step, field, t0, t1, y)
    h, slopes = t1 - t0, [evaluate(field, t0, y)]
    if (found := tableau(solver)) is None:  # Euler's method
        return y + h * slopes[0]
    # The last stage of a method that reuses it (FSAL) is the first of the next step.
    rows = found.a_lower[:-1] if found.fsal else found.a_lower
    for c, row in zip(found.c, rows, strict=False):
        slopes.append(evaluate(field, t0 + float(c) * h, y + h * combined(row, slopes)))
    return y + h * combined(found.b_sol[: len(slopes)], slopes)
