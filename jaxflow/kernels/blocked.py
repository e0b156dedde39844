"""Rows in blocks, keys folded: O(n * block) memory in plain XLA, on any platform.

The three functions are those of base.py; forward is a fold over key blocks of
(shift, sum_j e^{s_ij - shift} [v_j, 1]).

Where |s_ij - b_j| <= |u_i| max|k| bounds all weights well enough, one shift that is known
beforehand replaces the running maximum. Biases and shifts enter the scores as channels of keys and
queries:

    s_ij - shift_i = <(u_i, 1, -shift_i), (k_j, b_j, 1)>

so that a tile is one matrix product, one pass of exp and one more product.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..masks import AbstractPattern, Tiles, TopK
from .base import (
    LOG2E,
    MASKED,
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
    finite,
    inner_products,
    known_shift,
    pad,
    pairs_of,
    visible,
)
from .reference import Derived, definition

# A tile of scores is about this many rows times this many keys. Tuned on two Zen 3 cores with
# 0.5 MiB of L2 each: tiles of 256 rows lose a third, larger tiles fall out of the cache.
ROWS, KEYS = 2048, 512
# Under a band, a system of one tile is cut into up to four strips of at least this many rows, so
# that fewer of the pairs outside the band are computed.
STRIP = 64
# Under a mask, tiles down to so many rows and keys are tried. Each costs as much as so many pairs
# beside its own: 5,000 to 12,000 in tiles of 64 x 64 to 256 x 512 on those cores, d = 64.
SMALLEST, TILE = 64, 2**13

Arrays = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Blocked(AbstractBackend):
    """The portable backend.

    `unrolled` gives the same numbers by loops of static length, which JAX can differentiate in
    both modes: the derivative rules of second and higher order use it.
    """

    unrolled: bool = False

    def forward(self, operands: Forward, problem: Problem) -> Results:
        if isinstance(problem.mask, TopK):
            return IN_ROWS.forward(operands, problem)
        one = partial(_forward, problem=problem, unrolled=self.unrolled)
        if self.unrolled:
            return _over_batch(one, operands)
        # One choice for the whole batch: a batched `cond` would compute both sides.
        q, k, v, b, scale = operands
        u, k, v = scale[..., None, None] * q.astype(b.dtype), k.astype(b.dtype), v.astype(b.dtype)
        shift, safe = known_shift(u, k, v, b, problem, math.log)
        return jax.lax.cond(
            safe.all(),
            lambda: _over_batch(one, operands, shift),
            lambda: _over_batch(one, operands),
        )

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        if isinstance(problem.mask, TopK):
            return IN_ROWS.tangent(operands, problem)
        one = partial(_tangent, problem=problem, unrolled=self.unrolled)
        return _over_batch(one, operands)

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        if isinstance(problem.mask, TopK):
            return IN_ROWS.cotangent(operands, problem)
        one = partial(_cotangent, problem=problem, unrolled=self.unrolled)
        return _over_batch(one, operands)

    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        return None

    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        if isinstance(problem.mask, TopK):
            return "the largest scores of blocks of rows in XLA"
        return "blocks of rows in XLA"


# ------------------------------------------------------------------ one system of m x n pairs


def _forward(operands: Forward, shift: Array | None = None, *, problem: Problem, unrolled: bool):
    q, k, v, b, scale = operands
    dtype = b.dtype
    loops = _Loops.of(q, k, problem, unrolled, dtype)
    u, k = scale * q.astype(dtype), k.astype(dtype)
    # The column of ones sums the weights within the product that sums the values.
    keys = loops.pad_keys((loops.keys_of(k, b), _with_columns(v.astype(dtype), 1)))
    width = v.shape[1] + 1

    def online(offset, u):
        def step(carry, column, k, values):
            shift, total = carry
            s = loops.scores(u, k, offset, column)
            new = jnp.maximum(shift, s.max(axis=1))
            known = _unmasked(new)
            weights = loops.exp(s - known[:, None])
            total = total * loops.exp(shift - known)[:, None] + _matmul(weights, values)
            return new, total

        rows = u.shape[0]
        init = jnp.full(rows, -jnp.inf, dtype), jnp.zeros((rows, width), dtype)
        shift, total = loops.fold_keys(step, init, keys, offset)
        return _normalise(_unmasked(shift) / loops.unit, total)

    def bounded(offset, u):
        def step(total, column, k, values):
            return total + _matmul(loops.exp(loops.scores(u, k, offset, column)), values)

        init = jnp.zeros((u.shape[0], width), dtype)
        return _normalise(shift, loops.fold_keys(step, init, keys, offset))

    if shift is None:
        mean, lse = loops.map_rows(online, (_with_columns(u, 1, 0),))
    else:
        mean, lse = loops.map_rows(bounded, (_with_columns(u, 1, -shift),))
    return mean.astype(v.dtype), lse


def _tangent(operands: Tangent, *, problem: Problem, unrolled: bool):
    q, k, v, b, scale, mean, lse, du, dk, dv, _ = operands
    dtype = b.dtype
    loops = _Loops.of(q, k, problem, unrolled, dtype)
    u, k, dk = scale * q.astype(dtype), k.astype(dtype), dk.astype(dtype)
    # <u, dk> + <du, k> + db is one product.
    k2, u2 = _with_columns(dk, k, operands.moving_db), _with_columns(u, du, 1)
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

    rows = (_with_columns(u, 1, -finite(lse)), u2, mean.astype(dtype))
    dmean, dlse = loops.map_rows(rows_tangent, rows)
    return dmean.astype(v.dtype), dlse


def _cotangent(operands: Cotangent, *, problem: Problem, unrolled: bool):
    q, k, v, b, scale, _, lse, g, _ = operands
    dtype = b.dtype
    loops = _Loops.of(q, k, problem, unrolled, dtype)
    u, g = scale * q.astype(dtype), g.astype(dtype)
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

    shifted, centred = _with_columns(u, 1, -finite(lse)), _with_columns(g, -operands.centre)
    rows = shifted, _with_columns(u, 1), g, centred
    sums = tuple(jnp.zeros((transposed.shape[1], a.shape[1]), dtype) for a in rows[1:3])
    (gk, gv), (gu,) = loops.scan_rows(rows_cotangent, sums, rows)
    gk, gv = gk[: k.shape[0]], gv[: k.shape[0]]
    return gu, gk[:, :-1].astype(k.dtype), gv.astype(v.dtype), gk[:, -1]


# ------------------------------------------------------------------ loops over tiles


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """The tiles of a masked score matrix: their size, and which of them hold a visible pair."""

    rows: tuple[int, int]  # (rows in a block, number of blocks)
    keys: tuple[int, int]
    met: np.ndarray  # (row blocks, key blocks)

    @staticmethod
    def of(pattern: AbstractPattern, shape: tuple[int, int], height: int, width: int) -> "_Tiling":
        rows, keys = _blocks(shape[0], height), _blocks(shape[1], width)
        return _Tiling(rows, keys, pattern.meets(Tiles.of(shape, rows[0], keys[0]), shape))

    @property
    def cost(self) -> int:
        """Of the tiles that are computed, in pairs."""
        return int(self.met.sum()) * (self.rows[0] * self.keys[0] + TILE)

    @property
    def listed(self) -> tuple[np.ndarray, np.ndarray]:
        """For each row block the key blocks that it meets, first, and their number."""
        order = np.argsort(~self.met, axis=1, kind="stable")
        return order, self.met.sum(axis=1)


@lru_cache(maxsize=64)
def _tiling(pattern: AbstractPattern, shape: tuple[int, int], most: tuple[int, int]) -> _Tiling:
    """The cheapest tiles, from `most` rows and keys down to SMALLEST."""
    heights, widths = (_halves(n, min(n, SMALLEST)) for n in most)
    tried = [_Tiling.of(pattern, shape, h, w) for h in heights for w in widths]
    return min(tried, key=lambda tiling: tiling.cost)


def _halves(length: int, least: int) -> list[int]:
    sizes = [length]
    while sizes[-1] > least:
        sizes.append(max(sizes[-1] // 2, least))
    return sizes


@dataclasses.dataclass(frozen=True)
class _Loops:
    """The loops over the tiles of an m x n score matrix, tiles outside the band or the mask left
    out."""

    m: int
    n: int
    band: Band
    pattern: AbstractPattern | None  # of the band too, where there is one
    unrolled: bool
    dtype: jnp.dtype

    @staticmethod
    def of(q: Array, k: Array, problem: Problem, unrolled: bool, dtype) -> "_Loops":
        pattern = pairs_of(problem.band, problem.mask)
        return _Loops(q.shape[0], k.shape[0], problem.band, pattern, unrolled, dtype)

    @property
    def tiling(self) -> _Tiling | None:
        """The tiles of a masked matrix."""
        return self.pattern and _tiling(self.pattern, (self.m, self.n), (ROWS, KEYS))

    @property
    def one_tile(self) -> bool:
        return self.pattern is None and self.m * self.n <= ROWS * KEYS

    @property
    def rows(self) -> tuple[int, int]:
        """(rows in a block, number of blocks)."""
        if self.tiling is not None:
            return self.tiling.rows
        if not self.one_tile:
            return _blocks(self.m, max(ROWS, ROWS * KEYS // self.n))
        strips = 1 if self.band == (None, None) else 4
        return _blocks(self.m, max(STRIP, -(-self.m // strips)))

    @property
    def keys(self) -> tuple[int, int]:
        if self.tiling is not None:
            return self.tiling.keys
        return _blocks(self.n, self.n if self.one_tile else max(KEYS, ROWS * KEYS // self.m))

    @property
    def fast(self) -> bool:
        return self.dtype == jnp.float32 and not self.unrolled

    @property
    def unit(self) -> float:
        """Scores are kept times this factor: powers of two are the faster ones."""
        return LOG2E if self.fast else 1.0

    def exp(self, x):
        """The exponential of scores in that unit."""
        return _exp2(x) if self.fast else jnp.exp(x)

    def keys_of(self, k, b):
        """(k_j, b_j, 1), padded with masked keys."""
        (k,) = self.pad_keys((k,))
        b = pad(jnp.where(jnp.isneginf(b), MASKED, b), math.prod(self.keys), MASKED, axis=0)
        return self.unit * _with_columns(k, b, 1)

    def scores(self, u, k, row, column, transposed=False):
        rows, columns = row + jnp.arange(u.shape[0]), column + jnp.arange(k.shape[0])
        if self.pattern is None:
            mask = visible(rows, columns, self.band)
        else:
            mask = self.pattern.visible(rows, columns, (self.m, self.n))
        s = inner_products(k, u) if transposed else inner_products(u, k)
        if mask is None:
            return s
        return jnp.where(mask.T if transposed else mask, s, -jnp.inf)

    def pad_keys(self, operands: Arrays) -> Arrays:
        return tuple(pad(a, math.prod(self.keys), axis=0) for a in operands)

    def fold_keys(self, step: Callable, init, keys: Arrays, offset):
        """carry = step(carry, column, *key block) over the key blocks that a row can see."""
        block, count = self.keys
        left, right = self.band
        if self.one_tile:
            first = 0 if left is None else min(max(offset - left, 0), self.n - 1)
            last = self.n if right is None else min(offset + self.rows[0] + right, self.n)
            return step(init, first, *_slice(keys, first, max(last - first, 1)))
        if self.tiling is not None:
            return self._fold_met(self.tiling, step, init, keys, offset // self.rows[0])
        first, last = 0, count
        if left is not None and not self.unrolled:
            first = jnp.clip((offset - left) // block, 0, count)
        if right is not None and not self.unrolled:
            last = jnp.clip((offset + self.rows[0] - 1 + right) // block + 1, 0, count)

        def body(j, carry):
            return step(carry, j * block, *_slice(keys, j * block, block))

        return jax.lax.fori_loop(first, last, self._remat(body), init)

    def _fold_met(self, tiling: _Tiling, step: Callable, init, keys: Arrays, row):
        """The same over the key blocks that this row block meets."""
        block, count = tiling.keys

        def body(j, carry):
            return step(carry, j * block, *_slice(keys, j * block, block))

        if self.unrolled:
            met = jnp.asarray(tiling.met)[row]
            visit = lambda j, carry: jax.lax.cond(met[j], body, lambda _, c: c, j, carry)
            return jax.lax.fori_loop(0, count, self._remat(visit), init)
        order, counts = map(jnp.asarray, tiling.listed)
        visit = lambda i, carry: body(order[row, i], carry)
        return jax.lax.fori_loop(0, counts[row], visit, init)

    def scan_rows(self, fn: Callable, carry, rows: Arrays):
        """carry, outs = fn(carry, offset, *row block) over the row blocks."""
        height, count = self.rows
        rows = tuple(pad(a, height * count, axis=0) for a in rows)

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

    def map_rows(self, fn: Callable, rows: Arrays) -> Arrays:
        return self.scan_rows(lambda _, *args: (None, fn(*args)), None, rows)[1]

    def _remat(self, step: Callable) -> Callable:
        """Keeps what a differentiated loop saves to its carries."""
        return jax.checkpoint(step) if self.unrolled else step


def _blocks(length: int, most: int) -> tuple[int, int]:
    """Blocks of about equal size, at most `most` each: (size, count)."""
    count = -(-length // most)
    return -(-length // count), count


def _slice(operands: Arrays, start, size: int) -> Arrays:
    return tuple(jax.lax.dynamic_slice_in_dim(a, start, size) for a in operands)


def _add_at(start, total, part):
    if total.shape == part.shape:
        return total + part
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 0)


def _over_batch(one: Callable, operands: Operands, *more: Array) -> Results:
    """Maps `one` over the leading batch axes, as many systems at a time as fill a tile."""
    batch = operands.scale.shape
    if not batch:
        return one(operands, *more)
    size = math.prod(batch)
    flat = jax.tree.map(lambda a: a.reshape((size, *a.shape[len(batch) :])), (operands, *more))
    together = ROWS * KEYS // (operands.q.shape[-2] * operands.k.shape[-2])
    if together >= size:
        outs = jax.vmap(one)(*flat)
    else:
        batch_size = together if together > 1 else None
        outs = jax.lax.map(lambda args: one(*args), flat, batch_size=batch_size)
    return tuple(a.reshape((*batch, *a.shape[1:])) for a in outs)


# ------------------------------------------------------------------ the largest scores


def _in_rows(q, k, v, b, scale, problem: Problem) -> Results:
    """The definition, of blocks of rows; what a derivative keeps of them are its operands."""
    (m, width), n = q.shape, k.shape[0]
    height, count = _blocks(m, max(1, ROWS * KEYS // n))
    blocks = pad(q, height * count, axis=0).reshape(count, height, width)

    @jax.checkpoint
    def rows(first, q):
        return definition(
            q, k, v, b, scale, band=problem.band, mask=problem.mask, queries=m, first=first
        )

    outs = jax.lax.map(lambda block: rows(*block), (height * jnp.arange(count), blocks))
    mean, lse = (a.reshape((height * count, *a.shape[2:]))[:m] for a in outs)
    return mean, lse


IN_ROWS = Derived(_in_rows, _over_batch)


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


def _unmasked(x):
    """`finite` for a maximum over keys that are masked here."""
    return jnp.where(x < MASKED / 2, 0, x)


def _normalise(shift, total):
    z = total[:, -1]
    empty = z == 0
    z = jnp.where(empty, 1, z)
    return total[:, :-1] / z[:, None], jnp.where(empty, -jnp.inf, jnp.log(z) + shift)
