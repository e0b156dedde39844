"""Rows in blocks, keys folded: O(n * block) memory in plain XLA, on any platform.

With s_ij = <u_i, k_j> + b_j, u = scale q, p_ij = exp(s_ij - log_partition_i):

    forward    a fold over key blocks of (shift, sum_j e^{s_ij - shift} [v_j, 1])
    tangent    ds_ij = <du_i, k_j> + <u_i, dk_j> + db_j
               dlog_partition_i = sum_j p_ij ds_ij
               dmean_i = sum_j p_ij (dv_j + ds_ij v_j) - dlog_partition_i mean_i
    cotangent  of (g_i, h_i) for (mean_i, log_partition_i):
               w_ij = p_ij (<g_i, v_j> - <g_i, mean_i> + h_i)
               gu_i = sum_j w_ij k_j,  gk_j = sum_i w_ij u_i,
               gv_j = sum_i p_ij g_i,  gb_j = sum_i w_ij

The cotangent follows from the tangent by exchanging the sums in <g, dmean> + h dlog_partition.

Where |s_ij| <= |u_i| max|k| + max b is known not to underflow, that bound replaces the running
maximum. Each function takes and returns arrays with any number of leading batch axes (the same on
all of them). `unrolled=True` gives the same numbers by loops of static length, which JAX can
differentiate in both modes: the derivative rules of second and higher order use it.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .reference import Band, inner_products, visible

# A tile of scores is about this many rows times this many keys. Tuned on two Zen 3 cores with
# 0.5 MiB of L2 each: tiles of 256 rows lose a third, larger tiles fall out of the cache.
ROWS, KEYS = 2048, 512

Operands = tuple[Array, ...]


def forward(q, k, v, b, scale, *, band: Band, unrolled: bool = False) -> Operands:
    """mean (m, r) and log_partition (m,)."""
    return _over_batch(partial(_forward, band=band, unrolled=unrolled), (q, k, v, b, scale))


def tangent(
    q, k, v, b, scale, mean, lse, du, dk, dv, db, *, band: Band, unrolled: bool = False
) -> Operands:
    """dmean (m, r) and dlog_partition (m,): linear in (du, dk, dv, db)."""
    operands = (q, k, v, b, scale, mean, lse, du, dk, dv, db)
    return _over_batch(partial(_tangent, band=band, unrolled=unrolled), operands)


def cotangent(
    q, k, v, b, scale, mean, lse, g, h, *, band: Band, unrolled: bool = False
) -> Operands:
    """gu (m, p), gk (n, p), gv (n, r), gb (n,): linear in (g, h)."""
    operands = (q, k, v, b, scale, mean, lse, g, h)
    return _over_batch(partial(_cotangent, band=band, unrolled=unrolled), operands)


# ------------------------------------------------------------------ one system of m x n pairs


def _forward(q, k, v, b, scale, *, band, unrolled):
    dtype = b.dtype
    loops = _Loops(q.shape[0], k.shape[0], band, unrolled)
    u, k = scale * q.astype(dtype), k.astype(dtype)
    # The column of ones sums the weights within the product that sums the values.
    keys = loops.pad_keys((k, _with_column(v.astype(dtype), 1), b), (0, 0, -jnp.inf))
    width = v.shape[1] + 1

    def online(offset, u):
        def step(carry, column, k, values, b):
            shift, total = carry
            s = loops.scores(u, k, b, offset, column)
            new = jnp.maximum(shift, s.max(axis=1))
            finite = _finite(new)
            weights = jnp.exp(s - finite[:, None])
            total = total * jnp.exp(shift - finite)[:, None] + _matmul(weights, values)
            return new, total

        rows = u.shape[0]
        init = jnp.full(rows, -jnp.inf, dtype), jnp.zeros((rows, width), dtype)
        shift, total = loops.fold_keys(step, init, keys, offset)
        return _normalise(_finite(shift), total)

    def bounded(offset, u, shift):
        def step(total, column, k, values, b):
            s = loops.scores(u, k, b, offset, column)
            return total + _matmul(jnp.exp(s - shift[:, None]), values)

        init = jnp.zeros((u.shape[0], width), dtype)
        return _normalise(shift, loops.fold_keys(step, init, keys, offset))

    if unrolled or loops.one_tile:
        mean, lse = loops.map_rows(online, (u,), (0,))
    else:
        shift, safe = _known_bound(u, k, b)
        mean, lse = jax.lax.cond(
            safe,
            lambda: loops.map_rows(bounded, (u, shift), (0, 0)),
            lambda: loops.map_rows(online, (u,), (0,)),
        )
    return mean.astype(v.dtype), lse


def _tangent(q, k, v, b, scale, mean, lse, du, dk, dv, db, *, band, unrolled):
    dtype = b.dtype
    loops = _Loops(q.shape[0], k.shape[0], band, unrolled)
    width = q.shape[1]
    # <du, k> + <u, dk> is one product of twice the width. A key of weight zero moves nothing.
    u2 = jnp.concatenate([scale * q.astype(dtype), du], axis=1)
    k2 = jnp.concatenate([dk.astype(dtype), k.astype(dtype)], axis=1)
    db = jnp.where(jnp.isneginf(b), 0, db)
    values, dvalues = _with_column(v.astype(dtype), 1), _with_column(dv.astype(dtype), 0)
    keys = loops.pad_keys((k2, values, dvalues, b, db), (0, 0, 0, -jnp.inf, 0))

    def rows_tangent(offset, u2, mean, lse):
        def step(total, column, k2, values, dvalues, b, db):
            s = loops.scores(u2[:, :width], k2[:, width:], b, offset, column)
            p = jnp.exp(s - lse[:, None])
            ds = inner_products(u2, k2) + db[None, :]
            return total + _matmul(p, dvalues) + _matmul(p * ds, values)

        init = jnp.zeros((u2.shape[0], values.shape[1]), dtype)
        total = loops.fold_keys(step, init, keys, offset)
        dlse = total[:, -1]
        return total[:, :-1] - dlse[:, None] * mean, dlse

    rows = (u2, mean.astype(dtype), _finite(lse))
    dmean, dlse = loops.map_rows(rows_tangent, rows, (0, 0, jnp.inf))
    return dmean.astype(v.dtype), dlse


def _cotangent(q, k, v, b, scale, mean, lse, g, h, *, band, unrolled):
    dtype = b.dtype
    loops = _Loops(q.shape[0], k.shape[0], band, unrolled)
    g = g.astype(dtype)
    centre = (g * mean.astype(dtype)).sum(axis=1) - h
    keys = loops.pad_keys((k.astype(dtype), v.astype(dtype), b), (0, 0, -jnp.inf))

    def rows_cotangent(sums, offset, u, g, centre, lse):
        def step(carry, column, k, v, b):
            gu, sums = carry
            s = loops.scores(u, k, b, offset, column)
            p = jnp.exp(s - lse[:, None])
            w = p * (inner_products(g, v) - centre[:, None])
            parts = _matmul(w.T, u), _matmul(p.T, g), w.sum(axis=0)
            return gu + _matmul(w, k), jax.tree.map(partial(_add_at, column), sums, parts)

        gu, sums = loops.fold_keys(step, (jnp.zeros_like(u), sums), keys, offset)
        return sums, gu

    rows = (scale * q.astype(dtype), g, centre, _finite(lse))
    sums = jax.tree.map(jnp.zeros_like, keys)
    sums, (gu,) = loops.scan_rows(rows_cotangent, sums, rows, (0, 0, 0, jnp.inf))
    gk, gv, gb = (a[: k.shape[0]] for a in sums)
    return gu, gk.astype(k.dtype), gv.astype(v.dtype), gb


# ------------------------------------------------------------------ loops over tiles


@dataclasses.dataclass(frozen=True)
class _Loops:
    """The loops over the tiles of an m x n score matrix, tiles outside the band left out."""

    m: int
    n: int
    band: Band
    unrolled: bool

    @property
    def one_tile(self) -> bool:
        return self.m * self.n <= ROWS * KEYS

    @property
    def rows(self) -> tuple[int, int]:
        """(rows in a block, number of blocks)."""
        return _blocks(self.m, self.m if self.one_tile else max(ROWS, ROWS * KEYS // self.n))

    @property
    def keys(self) -> tuple[int, int]:
        return _blocks(self.n, self.n if self.one_tile else max(KEYS, ROWS * KEYS // self.m))

    def scores(self, u, k, b, row, column):
        s = inner_products(u, k) + b[None, :]
        rows, columns = row + jnp.arange(u.shape[0]), column + jnp.arange(k.shape[0])
        mask = visible(rows, columns, self.band)
        return s if mask is None else jnp.where(mask, s, -jnp.inf)

    def pad_keys(self, operands: Operands, fills) -> Operands:
        return _pad(operands, fills, math.prod(self.keys))

    def fold_keys(self, step: Callable, init, keys: Operands, offset):
        """carry = step(carry, column, *key block) over the key blocks that a row can see."""
        block, count = self.keys
        if count == 1:
            return step(init, 0, *keys)
        left, right = (None, None) if self.unrolled else self.band
        first, last = 0, count
        if left is not None:
            first = jnp.clip((offset - left) // block, 0, count)
        if right is not None:
            last = jnp.clip((offset + self.rows[0] - 1 + right) // block + 1, 0, count)

        def body(j, carry):
            return step(carry, j * block, *_slice(keys, j * block, block))

        return jax.lax.fori_loop(first, last, self._remat(body), init)

    def scan_rows(self, fn: Callable, carry, rows: Operands, fills):
        """carry, out = fn(carry, offset, *row block) over the row blocks."""
        height, count = self.rows
        if count == 1:
            carry, out = fn(carry, 0, *rows)
            return carry, (out,) if isinstance(out, jax.Array) else out
        rows = _pad(rows, fills, height * count)

        def body(carry, i):
            return fn(carry, i * height, *_slice(rows, i * height, height))

        carry, outs = jax.lax.scan(self._remat(body), carry, jnp.arange(count))
        join = lambda a: a.reshape((height * count, *a.shape[2:]))[: self.m]
        return carry, tuple(join(a) for a in jax.tree.leaves(outs))

    def map_rows(self, fn: Callable, rows: Operands, fills) -> Operands:
        return self.scan_rows(lambda _, *args: (None, fn(*args)), None, rows, fills)[1]

    def _remat(self, step: Callable) -> Callable:
        """Keeps what a differentiated loop saves to its carries."""
        return jax.checkpoint(step) if self.unrolled else step


def _blocks(length: int, most: int) -> tuple[int, int]:
    """Blocks of about equal size, at most `most` each: (size, count)."""
    count = -(-length // most)
    return -(-length // count), count


def _pad(operands: Operands, fills, length: int) -> Operands:
    def pad(a, fill):
        widths = [(0, length - a.shape[0])] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, widths, constant_values=fill)

    if operands[0].shape[0] == length:
        return operands
    return tuple(pad(a, fill) for a, fill in zip(operands, fills, strict=True))


def _slice(operands: Operands, start, size: int) -> Operands:
    return tuple(jax.lax.dynamic_slice_in_dim(a, start, size) for a in operands)


def _add_at(start, total, part):
    if total.shape == part.shape:
        return total + part
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 0)


def _over_batch(one: Callable, operands: Operands) -> Operands:
    """Maps `one` over the leading batch axes, as many systems at a time as fill a tile."""
    q, k, scale = operands[0], operands[1], operands[4]
    batch = scale.shape
    if not batch:
        return one(*operands)
    size = math.prod(batch)
    flat = tuple(a.reshape((size, *a.shape[len(batch) :])) for a in operands)
    together = ROWS * KEYS // (q.shape[-2] * k.shape[-2])
    if together >= size:
        outs = jax.vmap(one)(*flat)
    else:
        batch_size = together if together > 1 else None
        outs = jax.lax.map(lambda args: one(*args), flat, batch_size=batch_size)
    return tuple(a.reshape((*batch, *a.shape[1:])) for a in outs)


# ------------------------------------------------------------------ pieces


def _matmul(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _with_column(a, value):
    return jnp.concatenate([a, jnp.full((a.shape[0], 1), value, a.dtype)], axis=1)


def _finite(x):
    """A row without a visible key has log-partition -inf and only zero weights."""
    return jnp.where(jnp.isneginf(x), 0, x)


def _normalise(shift, total):
    z = total[:, -1]
    empty = z == 0
    z = jnp.where(empty, 1, z)
    return total[:, :-1] / z[:, None], jnp.where(empty, -jnp.inf, jnp.log(z) + shift)


def _known_bound(u, k, b):
    """|u_i| max|k| + max b >= s_ij, and whether no weight can underflow under it."""
    longest = jnp.sqrt((k * k).sum(axis=1).max())
    lengths = jnp.sqrt((u * u).sum(axis=1))
    top = b.max()
    bottom = jnp.where(jnp.isneginf(b), top, b).min()
    span = 2 * lengths.max() * longest + top - bottom
    safe = jnp.isfinite(top) & (span < -0.9 * math.log(jnp.finfo(b.dtype).tiny))
    return lengths * longest + top, safe
