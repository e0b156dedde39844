"""One-step methods that respect the geometry, as diffrax solvers.

Retracted(solver)   y_{k+1} = retract(step(y_k)): any diffrax method, projected back after each step
"""

import diffrax

from .geometry import AbstractGeometry


class Retracted(diffrax.AbstractWrappedSolver):
    """Any diffrax solver, with each step followed by the geometry's retraction.

    Projecting the result of a method of order p on the manifold keeps the order p, since the
    exact solution lies on it (Hairer, Lubich, Wanner, Geometric Numerical Integration, IV.4).
    A method that reuses its last stage (FSAL) stays right for a field that is evaluated at the
    retracted point, as `jaxflow.flow` does.

    **Arguments:** `solver`, any diffrax solver; `geometry`.
    """

    solver: diffrax.AbstractSolver
    geometry: AbstractGeometry

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

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        y1, error, dense_info, solver_state, result = self.solver.step(
            terms, t0, t1, y0, args, solver_state, made_jump
        )
        return self.geometry.retract(y1), error, dense_info, solver_state, result

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)


def evaluations_per_step(solver: diffrax.AbstractSolver) -> tuple[int, int] | None:
    """(evaluations once, evaluations a step) of an explicit method; None where it varies."""
    if isinstance(solver, Retracted):
        return evaluations_per_step(solver.solver)
    if isinstance(solver, diffrax.Euler):
        return 0, 1
    tableau = getattr(solver, "tableau", None)
    if isinstance(solver, diffrax.AbstractERK) and isinstance(tableau, diffrax.ButcherTableau):
        return (1, tableau.num_stages - 1) if tableau.fsal else (0, tableau.num_stages)
    return None
