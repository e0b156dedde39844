"""The definition, in jnp: the specification that every other backend is tested against.

    s_ij = scale <q_i, k_j> + b_j                   over the visible keys j of query i
                                                    (the k largest: top_k.py)
    log_partition_i = logsumexp_j s_ij
    mean_i = sum_j exp(s_ij - log_partition_i) v_j

It materialises the m x n scores and may be differentiated to any order: its tangent and cotangent
are those of JAX.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..masks import AbstractPattern, TopK
from .base import (
    AbstractBackend,
    AbstractFunctions,
    Band,
    Cotangent,
    Forward,
    Mode,
    Operands,
    Problem,
    Results,
    Shapes,
    Tangent,
    inner_products,
    pairs_of,
    visible,
)
from .top_k import largest

# Of so many pairs at most, in one system and in a batch, the definition is the faster one without
# being asked for: 96 x 96, and 4 MiB of scores. Where a gradient makes a step again, XLA finds the
# weights of the step and of its derivative equal and computes them once, so that attention in a
# training step took 0.64 to 0.81 of what tiles take, on a Zen 3 core, n = 32 to 96; as much at 128.
PAIRS, SCORES = 96**2, 2**20

# (mean, lse) = fn(q, k, v, b, scale, problem) of one system.
Definition = Callable[..., Results]


@dataclasses.dataclass(frozen=True)
class Derived(AbstractFunctions):
    """The three functions of what JAX can differentiate; `over_batch(fn, operands)` maps one system
    over a batch."""

    definition: Definition
    over_batch: Callable[[Callable, Operands], Results]

    def forward(self, operands: Forward, problem: Problem) -> Results:
        return self.over_batch(lambda one: self.definition(*one, problem), operands)

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        def one(o: Tangent):
            fn, primals = self._in_u(o, problem)
            return jax.jvp(fn, primals, (o.du, o.dk, o.dv, o.db))[1]

        return self.over_batch(one, operands)

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        def one(o: Cotangent):
            fn, primals = self._in_u(o, problem)
            return jax.vjp(fn, *primals)[1]((o.g, o.h))

        return self.over_batch(one, operands)

    def _in_u(self, o: Tangent | Cotangent, problem: Problem) -> tuple[Callable, tuple[Array, ...]]:
        """The definition as a function of (u, k, v, b), and the point."""
        one = jnp.ones((), o.b.dtype)
        fn = lambda u, k, v, b: self.definition(u, k, v, b, one, problem)
        return fn, (o.scale * o.q.astype(o.b.dtype), o.k, o.v, o.b)


@dataclasses.dataclass(frozen=True)
class Reference(AbstractBackend):
    """The definition."""

    def forward(self, operands: Forward, problem: Problem) -> Results:
        return WHOLE.forward(operands, problem)

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        return WHOLE.tangent(operands, problem)

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        return WHOLE.cotangent(operands, problem)

    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        if problem.partial:
            return "its derivatives find the log-partition anew, of the keys at hand alone"
        return None

    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        return "the definition in jnp"


def too_many(shapes: Shapes) -> str | None:
    """Why all scores at once are more than tiles of them would cost; None where they are few."""
    *batch, m, _ = shapes.q.shape
    pairs = m * shapes.k.shape[-2]
    if pairs <= PAIRS and math.prod(batch) * pairs <= SCORES:
        return None
    return f"tiles are faster beyond {PAIRS:,} pairs a system, or {SCORES:,} in a batch"


def definition(
    q: Float[Array, "m p"],
    k: Float[Array, "n p"],
    v: Float[Array, "n r"],
    b: Float[Array, " n"],
    scale: Float[Array, ""],
    *,
    band: Band,
    mask: AbstractPattern | TopK | None = None,
    queries: int | None = None,
    first: int | Array = 0,
) -> tuple[Float[Array, "m r"], Float[Array, " m"]]:
    """(mean, log_partition) of one system, or of its rows from `first` on, of so many queries."""
    dtype = b.dtype
    s = inner_products(scale * q.astype(dtype), k.astype(dtype))
    shape = queries or q.shape[0], k.shape[0]
    seen = visible_pairs(band, mask, shape, first + jnp.arange(q.shape[0]))
    if seen is not None:
        s = jnp.where(seen, s, -jnp.inf)
    if isinstance(mask, TopK):
        s = largest(jnp.where(jnp.isneginf(b)[None, :], -jnp.inf, s), mask)
    s = s + b[None, :]
    shift = jax.lax.stop_gradient(s.max(axis=1))
    shift = jnp.where(jnp.isneginf(shift), 0, shift)
    weights = jnp.exp(s - shift[:, None])
    z = weights.sum(axis=1)
    empty = z == 0
    z = jnp.where(empty, 1, z)
    mean = jnp.matmul(weights, v.astype(dtype), precision=jax.lax.Precision.HIGHEST) / z[:, None]
    log_partition = jnp.where(empty, -jnp.inf, jnp.log(z) + shift)
    return mean.astype(v.dtype), log_partition


def visible_pairs(
    band: Band,
    mask: AbstractPattern | TopK | None,
    shape: tuple[int, int],
    rows: Int[Array, " rows"],
) -> Bool[Array, "rows n"] | None:
    """The pairs that count of some queries among m and all n keys, or None where all do."""
    columns, pattern = jnp.arange(shape[1]), pairs_of(band, mask)
    if pattern is not None:
        return jnp.asarray(pattern.visible(rows, columns, shape))
    return visible(rows, columns, band)


def over_batch(one: Callable[..., Results], operands: Operands) -> Results:
    for _ in operands.scale.shape:
        one = jax.vmap(one)
    return one(operands)


def _whole(q, k, v, b, scale, problem: Problem) -> Results:
    return definition(q, k, v, b, scale, band=problem.band, mask=problem.mask)


WHOLE = Derived(_whole, over_batch)
