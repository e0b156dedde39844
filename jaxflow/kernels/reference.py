"""The definition, in jnp: the specification that every other backend is tested against.

    s_ij = scale <q_i, k_j> + b_j                   over the visible keys j of query i
    log_partition_i = logsumexp_j s_ij
    mean_i = sum_j exp(s_ij - log_partition_i) v_j

It materialises the m x n scores and may be differentiated to any order.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._types import Keys, Queries, Scalar, Values

# Keys j with i - left <= j <= i + right are visible to query i; None is no limit.
Band = tuple[int | None, int | None]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for, beside shapes and dtypes."""

    band: Band = (None, None)
    weighted: bool = True  # without, b = 0
    constant_scale: float | None = None  # a scale that is a Python number, of 16-bit operands
    mean_only: bool = False  # the log-partition has no cotangent


def visible(
    rows: Int[Array, " m"], columns: Int[Array, " n"], band: Band
) -> Bool[Array, "m n"] | None:
    """The mask of the visible pairs, or None where all are."""
    left, right = band
    offset = columns[None, :] - rows[:, None]
    masks = []
    if left is not None:
        masks.append(offset >= -left)
    if right is not None:
        masks.append(offset <= right)
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]


def inner_products(x: Float[Array, "m p"], y: Float[Array, "n p"]) -> Float[Array, "m n"]:
    """<x_i, y_j>, in full precision also where the platform's default is TF32 or bf16."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def forward(
    q: Queries,
    k: Keys,
    v: Values,
    b: Float[Array, " n"],
    scale: Scalar,
    *,
    band: Band,
) -> tuple[Float[Array, "m r"], Float[Array, " m"]]:
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
