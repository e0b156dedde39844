"""The definition, in jnp: the specification that every other backend is tested against.

    s_ij = scale <q_i, k_j> + b_j                   over the visible keys j of query i
    log_partition_i = logsumexp_j s_ij
    mean_i = sum_j exp(s_ij - log_partition_i) v_j

It materialises the m x n scores and may be differentiated to any order: its tangent and cotangent
are those of JAX.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import (
    AbstractBackend,
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
    visible,
)


@dataclasses.dataclass(frozen=True)
class Reference(AbstractBackend):
    """The definition."""

    def forward(self, operands: Forward, problem: Problem) -> Results:
        return _over_batch(lambda one: definition(*one, band=problem.band), operands)

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        def one(o: Tangent):
            fn, primals = _in_u(o, problem.band)
            return jax.jvp(fn, primals, (o.du, o.dk, o.dv, o.db))[1]

        return _over_batch(one, operands)

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        def one(o: Cotangent):
            fn, primals = _in_u(o, problem.band)
            return jax.vjp(fn, *primals)[1]((o.g, o.h))

        return _over_batch(one, operands)

    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        return None

    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        return "the definition in jnp"


def definition(
    q: Float[Array, "m p"],
    k: Float[Array, "n p"],
    v: Float[Array, "n r"],
    b: Float[Array, " n"],
    scale: Float[Array, ""],
    *,
    band: Band,
) -> tuple[Float[Array, "m r"], Float[Array, " m"]]:
    """(mean, log_partition) of one system."""
    dtype = b.dtype
    s = inner_products(scale * q.astype(dtype), k.astype(dtype)) + b[None, :]
    mask = visible(jnp.arange(q.shape[0]), jnp.arange(k.shape[0]), band)
    if mask is not None:
        s = jnp.where(mask, s, -jnp.inf)
    shift = jax.lax.stop_gradient(s.max(axis=1))
    shift = jnp.where(jnp.isneginf(shift), 0, shift)
    weights = jnp.exp(s - shift[:, None])
    z = weights.sum(axis=1)
    empty = z == 0
    z = jnp.where(empty, 1, z)
    mean = jnp.matmul(weights, v.astype(dtype), precision=jax.lax.Precision.HIGHEST) / z[:, None]
    log_partition = jnp.where(empty, -jnp.inf, jnp.log(z) + shift)
    return mean.astype(v.dtype), log_partition


def _in_u(o: Tangent | Cotangent, band: Band) -> tuple[Callable, tuple[Array, ...]]:
    """The definition as a function of (u, k, v, b), and the point."""
    one = jnp.ones((), o.b.dtype)
    fn = lambda u, k, v, b: definition(u, k, v, b, one, band=band)
    return fn, (o.scale * o.q.astype(o.b.dtype), o.k, o.v, o.b)


def _over_batch(one: Callable[..., Results], operands: Operands) -> Results:
    for _ in operands.scale.shape:
        one = jax.vmap(one)
    return one(operands)
