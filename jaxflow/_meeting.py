"""Which tokens are close, and whether tokens that are close stay together.

Distances and eigenvalues are those of a geometry's inner product, a constant one on R^d: with the
Cholesky factor L of its matrix, u -> L^T u are coordinates in which it is the usual one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ._types import Scalar, ScalarLike, accumulation_dtype
from .fields import AbstractField
from .geometry import AbstractGeometry, Ellipsoid, Sphere
from .measure import Measure
from .observables.tiles import squared_distances

BLOCK = 128  # tokens that are compared with each other at a time


def frame(geometry: AbstractGeometry, like: Float[Array, "*shape d"]) -> Float[Array, "d d"]:
    """L, with <u, v> = (L^T u)^T (L^T v) in the inner product of the geometry."""
    basis = jnp.eye(like.shape[-1], dtype=accumulation_dtype(like.dtype))
    inner = jax.vmap(jax.vmap(geometry.inner, (None, 0)), (0, None))
    return jnp.linalg.cholesky(inner(basis, basis))


def lengths(geometry: AbstractGeometry, delta: Scalar, d: int) -> tuple[Scalar, Scalar]:
    """The distance on the geometry to which delta belongs, an angle on spheres and ellipsoids, and
    that along a straight line."""
    if not isinstance(geometry, Sphere | Ellipsoid):
        return delta, delta
    radius = geometry.radius if isinstance(geometry, Sphere) else math.sqrt(d)
    radius = jnp.asarray(radius, delta.dtype)
    return radius * delta, radius * 2 * jnp.sin(delta / 2)


# ------------------------------------------------------------------ close tokens


def least_close(
    places: Float[Array, "n d"], asked: Bool[Array, " n"], radius: Scalar
) -> Int[Array, " n"]:
    """The least j < i that is `asked` for, with |x_i - x_j| <= radius; n where there is none.

    Tokens whose places are nan are close to none. Many tokens are sorted along their widest
    coordinate and compared in blocks, those alone that come within the radius along it: O(n log n)
    and a few blocks for each one where tokens are far apart compared with the radius.
    """
    n = len(places)
    if n <= 2 * BLOCK:
        return _least(places, jnp.arange(n), places, jnp.arange(n), asked, radius, n)
    there = jnp.isfinite(places).all(axis=1)
    high = jnp.where(there[:, None], places, -jnp.inf).max(axis=0)
    low = jnp.where(there[:, None], places, jnp.inf).min(axis=0)
    along = jnp.where(there, places[:, jnp.argmax(high - low)], jnp.inf)
    count = -(-n // BLOCK)
    padding = (0, count * BLOCK - n)
    order = jnp.pad(jnp.argsort(along), padding, constant_values=n)
    take = lambda a, fill: jnp.take(a, order, axis=0, mode="fill", fill_value=fill)
    blocks = lambda a: a.reshape(count, BLOCK, *a.shape[1:])
    x, index, open_ = blocks(take(places, jnp.nan)), blocks(order), blocks(take(asked, False))
    along = blocks(take(along, jnp.inf))
    starts = along[:, 0]
    ends = jnp.where(jnp.isfinite(along), along, -jnp.inf).max(axis=1)
    # A block without tokens comes last; none begins after it or ends before it.
    reach = radius * (1 + 16 * jnp.finfo(places.dtype).eps)
    reached = jnp.where(jnp.isfinite(ends), ends, jnp.inf)
    first = (reached[None, :] < (starts - reach)[:, None]).sum(axis=1)
    last = (starts[None, :] <= (ends + reach)[:, None]).sum(axis=1)

    def of_block(a):
        def with_block(b, least):
            found = _least(x[a], index[a], x[b], index[b], open_[b], radius, n)
            return jnp.minimum(least, found)

        start = jnp.full(BLOCK, n, index.dtype)
        return jax.lax.fori_loop(first[a], last[a], with_block, start)

    found = jax.lax.map(of_block, jnp.arange(count))
    return jnp.full(n, n, index.dtype).at[index].set(found, mode="drop")


def _least(x, index_x, y, index_y, asked, radius, n):
    close = squared_distances(x, y) <= radius**2
    close = close & (index_y[None, :] < index_x[:, None]) & asked[None, :]
    return jnp.min(jnp.where(close, index_y[None, :], n), axis=1)


# ------------------------------------------------------------------ tokens that part


def parting_rates(
    field: AbstractField,
    t: ScalarLike,
    x: Float[Array, "m d"],
    mu: Measure,
) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """The largest rate at which two tokens near x part, and the size of what it is made of.

    The difference u of two tokens of one measure obeys u' = D X[mu](x) u + O(|u|^2), and so
    d|u|/dt <= lambda |u| with lambda the largest eigenvalue of the symmetric part of P D X P on the
    tangent space (Coppel, Stability and asymptotic behavior of differential equations, 1965: the
    logarithmic norm). By d forward derivatives in the queries alone.

    **Returns:** lambda, and the Frobenius norm of P D X P.
    """
    geometry = field.geometry
    root = frame(geometry, x)
    basis = jnp.linalg.inv(root).astype(x.dtype)  # rows are orthonormal in the inner product
    _, push = jax.linearize(lambda x: field(t, x, mu), x)

    def along(v):
        v = geometry.project(x, jnp.broadcast_to(v, x.shape))
        return geometry.project(x, push(v))

    moved = jax.vmap(along)(basis).astype(root.dtype)
    matrix = jnp.einsum("kmd,de->mek", moved, root, precision="highest")
    symmetric = (matrix + matrix.swapaxes(1, 2)) / 2
    size = jnp.sqrt((matrix**2).sum(axis=(1, 2)))
    for normal in geometry.normals(x):  # moved below all others
        normal = jnp.matmul(normal.astype(root.dtype), root, precision="highest")
        outer = normal[:, :, None] * normal[:, None, :]
        symmetric = symmetric - (1 + size)[:, None, None] * outer
    return jnp.linalg.eigvalsh(symmetric)[:, -1], size


def contracting(rates: Float[Array, " m"], sizes: Float[Array, " m"], d: int) -> Bool[Array, " m"]:
    """Whether tokens come closer, by more than rounding."""
    return rates < -64 * d * jnp.finfo(rates.dtype).eps * sizes


def floats_stopped(tree: Any) -> Any:
    """The tree, through which no derivative passes: for decisions."""
    inexact = lambda a: isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jnp.inexact)
    stop = lambda a: jax.lax.stop_gradient(a) if inexact(a) else a
    return jax.tree.map(stop, tree)
