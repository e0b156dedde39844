"""A backend out of a function of one system, as users register it.

    fn(q, k, v, log_weights, scale)             -> (mean, log_partition)
    fn(q, k, v, log_weights, scale, visible)    -> (mean, log_partition)        if it takes masks

The function is asked for what everybody writes: it gets one system, numbers in the dtype of sums,
and no query that sees no key, for which softmax is 0/0. The batch is `jax.vmap`'s, and tangent and
cotangent are JAX's derivatives of the function, or of the rule that `jax.custom_jvp` or
`jax.custom_vjp` gave it.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ..masks import TopK
from .base import AbstractBackend, Cotangent, Forward, Mode, Problem, Results, Shapes, Tangent
from .reference import Derived, over_batch, visible_pairs


@dataclasses.dataclass(frozen=True)
class Unbatched(AbstractBackend):
    """The function, and whether it takes the visible pairs as its last argument."""

    fn: Callable[..., Results]
    masks: bool = False

    def forward(self, operands: Forward, problem: Problem) -> Results:
        return self._derived.forward(operands, problem)

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        return self._derived.tangent(operands, problem)

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        return self._derived.cotangent(operands, problem)

    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        if isinstance(problem.mask, TopK):
            return "it is told the pairs that count, and those of TopK depend on the scores"
        if not (self.masks or problem.all_pairs):
            return "it is a function of all pairs, registered without masks=True"
        return None

    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        return "a function of one system"

    @property
    def _derived(self) -> Derived:
        return Derived(self._of_one, over_batch)

    def _of_one(self, q, k, v, b, scale, problem: Problem) -> Results:
        pairs, empty = _guarded(b, self._pairs(q, k, problem))
        # A system without any key has zero mass, and is asked with equal masses.
        operands = (*(a.astype(b.dtype) for a in (q, k, v)), jnp.where(empty.all(), 0, b), scale)
        found = self.fn(*operands, *((pairs,) if self.masks else ()))
        mean, log_partition = _checked(found, ((len(q), v.shape[1]), (len(q),)))
        mean = jnp.where(empty[:, None], 0, mean)
        return mean.astype(v.dtype), jnp.where(empty, -jnp.inf, log_partition).astype(b.dtype)

    def _pairs(self, q, k, problem: Problem) -> Bool[Array, "m n"]:
        shape = len(q), len(k)
        pairs = visible_pairs(problem.band, problem.mask, shape, jnp.arange(shape[0]))
        return jnp.ones(shape, bool) if pairs is None else pairs


def _guarded(b: Array, pairs: Bool[Array, "m n"]) -> tuple[Bool[Array, "m n"], Bool[Array, " m"]]:
    """The pairs, and the queries that see no key of positive mass: they are shown all."""
    empty = ~(pairs & ~jnp.isneginf(b)[None, :]).any(axis=1)
    return pairs | empty[:, None], empty


def _checked(found, shapes: tuple[tuple[int, ...], ...]) -> Results:
    """What a function returned, if it is two arrays of these shapes."""
    pair = tuple(found) if isinstance(found, tuple | list) else (found,)
    given = [getattr(a, "shape", type(a).__name__) for a in pair]
    if given != list(shapes):
        raise ValueError(
            "a backend that is a function must return (mean, log_partition), one row a query, of "
            f"the shapes {shapes[0]} and {shapes[1]} here; got {', '.join(map(str, given))}."
        )
    return pair
