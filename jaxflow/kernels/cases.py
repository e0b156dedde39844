"""Cases of the three functions of base.py, what is right on them, and what is close enough."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ..masks import AbstractPattern
from .base import (
    Band,
    Cotangent,
    Forward,
    Mode,
    Operands,
    Problem,
    Results,
    Shapes,
    Tangent,
    evaluate,
)
from .blocked import Blocked

# The largest difference over the largest entry. Float32: sums of some 1,000 terms that are rounded
# by 6e-8 each, also where they are three products in TF32; one product in TF32 is off by 5e-4. In
# 16 bits ten roundings: operands are exact as given; weights, their derivatives, the mean and the
# result are rounded once each, and differences of them cancel.
TOLERANCE = {"float32": 1e-4, "bfloat16": 10 * 2.0**-8, "float16": 10 * 2.0**-11}


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape of operands; with weights, every seventh key has the log-weight -inf, and all keys of
    the first system."""

    name: str
    m: int
    n: int
    p: int
    r: int
    batch: int = 1
    band: Band = (None, None)
    weighted: bool = False
    mean_only: bool = False
    mask: AbstractPattern | None = None

    def problem(self, dtype: str) -> Problem:
        constant = self.p**-0.5 if jnp.dtype(dtype).itemsize == 2 else None
        return Problem(self.band, self.weighted, constant, self.mean_only, self.mask)

    def shapes(self, dtype: str) -> Shapes:
        describe = lambda *shape: jax.ShapeDtypeStruct((self.batch, *shape), jnp.dtype(dtype))
        return Shapes(describe(self.m, self.p), describe(self.n, self.p), describe(self.n, self.r))

    def operands(self, mode: Mode, dtype: str) -> Operands:
        """Normal ones, the same for a case, whatever runs it."""
        rng = np.random.default_rng(self.m + self.n)
        normal = lambda *shape: jnp.asarray(rng.standard_normal((self.batch, *shape), np.float32))
        low = lambda *shape: normal(*shape).astype(dtype)
        q, k, v = low(self.m, self.p), low(self.n, self.p), low(self.n, self.r)
        b, db = jnp.zeros((2, self.batch, self.n), jnp.float32)
        if self.weighted:
            b = normal(self.n).at[:, ::7].set(-jnp.inf).at[0].set(-jnp.inf)
            db = normal(self.n)
        primal = Forward(q, k, v, b, jnp.full(self.batch, self.p**-0.5, jnp.float32))
        if mode == "forward":
            return primal
        mean, lse = portable(primal, self.problem(dtype))
        mean = mean.astype(dtype)
        if mode == "cotangent":
            h = jnp.zeros_like(lse) if self.mean_only else normal(self.m)
            return Cotangent(*primal, mean, lse, low(self.m, self.r), h)
        directions = low(self.n, self.p), low(self.n, self.r)
        return Tangent(*primal, mean, lse, normal(self.m, self.p), *directions, db)


@functools.partial(jax.jit, static_argnames="problem")
def _blocked(operands: Operands, problem: Problem) -> Results:
    return evaluate(Blocked(), operands, problem)


def portable(operands: Operands, problem: Problem) -> Results:
    """By the portable backend, in float32; one program for all dtypes."""
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), operands)
    return _blocked(wide, Problem(problem.band, problem.weighted, mask=problem.mask))


def difference(found: np.ndarray, expected: np.ndarray, tolerance: float) -> str | None:
    """In what an answer is wrong; None if it is right."""
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite]):
        return "a query that sees no key must have the log-partition -inf"
    if not np.isfinite(found[finite]).all():
        return "it gave numbers that are not finite"
    largest = np.abs(expected[finite]).max(initial=0) or 1.0
    error = np.abs(found[finite] - expected[finite]).max(initial=0) / largest
    if error > tolerance:
        return f"it is off by {error:.1e} of the largest entry, over {tolerance:.0e}"
    return None


def line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
