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
maximum. Biases and shifts enter the scores as channels of keys and queries:

    s_ij - shift_i = <(u_i, 1, -shift_i), (k_j, b_j, 1)>

so that a tile is one matrix product, one pass of exp and one more product.

Each function takes and returns arrays with any number of leading batch axes (the same on all of
them). `unrolled=True` gives the same numbers by loops of static length, which JAX can
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
# Under a band, a system of one tile is cut into up to four strips of at least this many rows, so
# that fewer of the pairs outside the band are computed.
STRIP = 64

# A masked key: in a matrix product -inf would become nan where the platform splits its operands.
MASKED = -1e30

Operands = tuple[Array, ...]


def forward(q, k, v, b, scale, *, band: Band, unrolled: bool = False) -> Operands:
    """mean (m, r) and log_partition (m,)."""
    fn = partial(_forward, band=band, unrolled=unrolled)
    operands = (q, k, v, b, scale)
    if unrolled:
        return _over_batch(fn, operands)
    # One choice for the whole batch: a batched `cond` would compute both sides.
    shift, safe = _known_bound(q, k, b, scale)
    return jax.lax.cond(
        safe, lambda: _over_batch(fn, (*operands, shift)), lambda: _over_batch(fn, operands)
    )


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


def _forward(q, k, v, b, scale, shift=None, *, band, unrolled):
    dtype = b.dtype
    loops = _Loops(q.shape[0], k.shape[0], band, unrolled, dtype)
    u, k = scale * q.astype(dtype), k.astype(dtype)
    # The column of ones sums the weights within the product that sums the values.
    keys = loops.pad_keys((loops.keys_of(k, b), _with_columns(v.astype(dtype), 1)))
    width = v.shape[1] + 1

    def online(offset, u):
        def step(carry, column, k, values):
            shift, total = carry
            s = loops.scores(u, k, offset, column)
            new = jnp.maximum(shift, s.max(axis=1))
            finite = _finite(new)
            weights = loops.exp(s - finite[:, None])
            total = total * loops.exp(shift - finite)[:, None] + _matmul(weights, values)
            return new, total

        rows = u.shape[0]
        init = jnp.full(rows, -jnp.inf, dtype), jnp.zeros((rows, width), dtype)
        shift, total = loops.fold_keys(step, init, keys, offset)
        return _normalise(_finite(shift) / loops.unit, total)

    def bounded(offset, u, shift):
        def step(total, column, k, values):
            return total + _matmul(loops.exp(loops.scores(u, k, offset, column)), values)

        init = jnp.zeros((u.shape[0], width), dtype)
        return _normalise(shift, loops.fold_keys(step, init, keys, offset))

    if shift is None:
        mean, lse = loops.map_rows(online, (_with_columns(u, 1, 0),))
    else:
        mean, lse = loops.map_rows(bounded, (_with_columns(u, 1, -shift), shift))
    return mean.astype(v.dtype), lse


def _tangent(q, k, v, b, scale, mean, lse, du, dk, dv, db, *, band, unrolled):
    dtype = b.dtype
    loops = _Loops(q.shape[0], k.shape[0], band, unrolled, dtype)
    u, k, dk = scale * q.astype(dtype), k.astype(dtype), dk.astype(dtype)
    # <u, dk> + <du, k> + db is one product. A key of weight zero moves nothing.
    db = jnp.where(jnp.isneginf(b), 0, db)
    k2, u2 = _with_columns(dk, k, db), _with_columns(u, du, 1)
    values, dvalues = _with_columns(v.astype(dtype), 1), _with_columns(dv.astype(dtype), 0)
    keys = loops.pad_keys((loops.keys_of(k, b), k2, values, dvalues))

    def rows_tangent(offset, u, u2, mean):
        def step(total, column, k, k2, values, dvalues):
            p = loops.exp(loops.scores(u, k, offset, column))
            ds = inner_products(u2, k2)
            return total + _matmul(p, dvalues) + _matmul(p * ds, values)

        init = jnp.zeros((u.shape[0], values.shape[1]), dtype)
        total = loops.fold_keys(step, init, keys, offset)
        dlse = total[:, -1]
        return total[:, :-1] - dlse[:, None] * mean, dlse

    rows = (_with_columns(u, 1, -_finite(lse)), u2, mean.astype(dtype))
    dmean, dlse = loops.map_rows(rows_tangent, rows)
    return dmean.astype(v.dtype), dlse


def _cotangent(q, k, v, b, scale, mean, lse, g, h, *, band, unrolled):
    dtype = b.dtype
    loops = _Loops(q.shape[0], k.shape[0], band, unrolled, dtype)
    u, g = scale * q.astype(dtype), g.astype(dtype)
    centre = (g * mean.astype(dtype)).sum(axis=1) - h
    keys = loops.pad_keys((loops.keys_of(k.astype(dtype), b), _with_columns(v.astype(dtype), 1)))
    # Tiles have keys as rows here: then all products but one sum over the last axis of a tile,
    # and that one takes the keys transposed. Libraries are slow with a transposed tile.
    transposed = loops.pad_keys((k.astype(dtype),))[0].T

    def rows_cotangent(sums, offset, u, u1, g, g1):
        def step(carry, column, k, v1):
            gu, sums = carry
            p = loops.exp(loops.scores(u, k, offset, column, transposed=True))
            w = p * inner_products(v1, g1)
            # The column of ones beside u sums w to the gradient in b.
            parts = _matmul(w, u1), _matmul(p, g)
            part = _matmul(jax.lax.dynamic_slice_in_dim(transposed, column, len(k), 1), w)
            return gu + part, jax.tree.map(partial(_add_at, column), sums, parts)

        init = jnp.zeros((transposed.shape[0], u.shape[0]), dtype), sums
        gu, sums = loops.fold_keys(step, init, keys, offset)
        return sums, (gu.T,)

    rows = _with_columns(u, 1, -_finite(lse)), _with_columns(u, 1), g, _with_columns(g, -centre)
    sums = tuple(jnp.zeros((transposed.shape[1], a.shape[1]), dtype) for a in rows[1:3])
    (gk, gv), (gu,) = loops.scan_rows(rows_cotangent, sums, rows)
    gk, gv = gk[: k.shape[0]], gv[: k.shape[0]]
    return gu, gk[:, :-1].astype(k.dtype), gv.astype(v.dtype), gk[:, -1]


# ------------------------------------------------------------------ loops over tiles


@dataclasses.dataclass(frozen=True)
class _Loops:
    """The loops over the tiles of an m x n score matrix, tiles outside the band left out."""

    m: int
    n: int
    band: Band
    unrolled: bool
    dtype: jnp.dtype

    @property
    def one_tile(self) -> bool:
        return self.m * self.n <= ROWS * KEYS

    @property
    def rows(self) -> tuple[int, int]:
        """(rows in a block, number of blocks)."""
        if not self.one_tile:
            return _blocks(self.m, max(ROWS, ROWS * KEYS // self.n))
        strips = 1 if self.band == (None, None) else 4
        return _blocks(self.m, max(STRIP, -(-self.m // strips)))

    @property
    def keys(self) -> tuple[int, int]:
        return _blocks(self.n, self.n if self.one_tile else max(KEYS, ROWS * KEYS // self.m))

    @property
    def fast(self) -> bool:
        return self.dtype == jnp.float32 and not self.unrolled

    @property
    def unit(self) -> float:
        """Scores are kept times this factor: powers of two are the faster ones."""
        return math.log2(math.e) if self.fast else 1.0

    def exp(self, x):
        """The exponential of scores in that unit."""
        return _exp2(x) if self.fast else jnp.exp(x)

    def keys_of(self, k, b):
        """(k_j, b_j, 1), padded with masked keys."""
        (k,) = self.pad_keys((k,))
        (b,) = self.pad_keys((jnp.where(jnp.isneginf(b), MASKED, b),), MASKED)
        return self.unit * _with_columns(k, b, 1)

    def scores(self, u, k, row, column, transposed=False):
        rows, columns = row + jnp.arange(u.shape[0]), column + jnp.arange(k.shape[0])
        band = self.band
        if transposed:
            u, k, rows, columns, band = k, u, columns, rows, (band[1], band[0])
        s, mask = inner_products(u, k), visible(rows, columns, band)
        return s if mask is None else jnp.where(mask, s, -jnp.inf)

    def pad_keys(self, operands: Operands, fill: float | int = 0) -> Operands:
        return _pad(operands, math.prod(self.keys), fill)

    def fold_keys(self, step: Callable, init, keys: Operands, offset):
        """carry = step(carry, column, *key block) over the key blocks that a row can see."""
        block, count = self.keys
        left, right = self.band
        if self.one_tile:
            first = 0 if left is None else min(max(offset - left, 0), self.n - 1)
            last = self.n if right is None else min(offset + self.rows[0] + right, self.n)
            return step(init, first, *_slice(keys, first, max(last - first, 1)))
        first, last = 0, count
        if left is not None and not self.unrolled:
            first = jnp.clip((offset - left) // block, 0, count)
        if right is not None and not self.unrolled:
            last = jnp.clip((offset + self.rows[0] - 1 + right) // block + 1, 0, count)

        def body(j, carry):
            return step(carry, j * block, *_slice(keys, j * block, block))

        return jax.lax.fori_loop(first, last, self._remat(body), init)

    def scan_rows(self, fn: Callable, carry, rows: Operands):
        """carry, outs = fn(carry, offset, *row block) over the row blocks."""
        height, count = self.rows
        rows = _pad(rows, height * count)

        def body(carry, i):
            return fn(carry, i * height, *_slice(rows, i * height, height))

        if self.one_tile:
            blocks = []
            for i in range(count):
                carry, outs = body(carry, i)
                blocks.append(outs)
            outs = tuple(jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
        else:
            carry, outs = jax.lax.scan(self._remat(body), carry, jnp.arange(count))
            outs = tuple(a.reshape((height * count, *a.shape[2:])) for a in outs)
        return carry, tuple(a[: self.m] for a in outs)

    def map_rows(self, fn: Callable, rows: Operands) -> Operands:
        return self.scan_rows(lambda _, *args: (None, fn(*args)), None, rows)[1]

    def _remat(self, step: Callable) -> Callable:
        """Keeps what a differentiated loop saves to its carries."""
        return jax.checkpoint(step) if self.unrolled else step


def _blocks(length: int, most: int) -> tuple[int, int]:
    """Blocks of about equal size, at most `most` each: (size, count)."""
    count = -(-length // most)
    return -(-length // count), count


def _pad(operands: Operands, length: int, fill: float | int = 0) -> Operands:
    def pad(a):
        widths = [(0, length - a.shape[0])] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, widths, constant_values=fill)

    return tuple(a if a.shape[0] == length else pad(a) for a in operands)


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


def _exp2(x):
    """2^x for float32 x < 127 within 2 units of rounding, and 0 below -127.

    2^x = 2^n 2^f, n = round(x). Adding 1.5 * 2^23 leaves n in the last bits of the sum, cheaper
    than rounding and converting. 2^f is the polynomial of degree 5 that is 1 at 0 and has the
    least relative error, 9e-8, on |f| <= 1/2.
    """
    x = jnp.where(x < -127.0, -127.0, x)  # Unlike a maximum this is one instruction and keeps nan.
    n = jax.lax.bitcast_convert_type(x + 12582912.0, jnp.int32) - 0x4B400000
    f = x - n.astype(jnp.float32)
    y = 0.0013264699 * f + 0.0096715335
    for coefficient in (0.05550734, 0.24022242, 0.693147, 1.0):
        y = y * f + coefficient
    return y * jax.lax.bitcast_convert_type((n + 127) << 23, jnp.float32)


def _with_columns(a, *columns):
    """The columns, arrays or constants, to the right of a matrix."""

    def matrix(c):
        c = jnp.asarray(c, a.dtype)
        return c if c.ndim == 2 else jnp.broadcast_to(c.reshape(-1, 1), (len(a), 1))

    return jnp.concatenate([a, *map(matrix, columns)], axis=1)


def _finite(x):
    """A row without a visible key has log-partition -inf and only zero weights."""
    return jnp.where(x < MASKED / 2, 0, x)


def _normalise(shift, total):
    z = total[:, -1]
    empty = z == 0
    z = jnp.where(empty, 1, z)
    return total[:, :-1] / z[:, None], jnp.where(empty, -jnp.inf, jnp.log(z) + shift)


def _known_bound(q, k, b, scale):
    """|u_i| max|k| + max b >= s_ij, and whether no weight can underflow under it."""
    dtype = b.dtype
    length = lambda x: jnp.sqrt((x.astype(dtype) ** 2).sum(axis=-1))
    most = lambda x: x.max(axis=-1, keepdims=True)
    lengths = jnp.abs(scale)[..., None] * length(q)
    longest, top = most(length(k)), most(b)
    span = 2 * most(lengths) * longest + top + most(jnp.where(jnp.isneginf(b), -top, -b))
    safe = jnp.isfinite(top) & (span < -0.9 * math.log(jnp.finfo(dtype).tiny))
    return lengths * longest + top, safe.all()
