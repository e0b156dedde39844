"""Fused kernels for TPUs, in Pallas: scores live in VMEM alone.

The three functions are those of base.py. forward folds max_j s_ij, sum_j e^{s_ij - max} and
sum_j e^{s_ij - max} v_j over key blocks; the cotangent is two kernels: gu folds key blocks, and
(gk, gv, gb) fold row blocks.

Layout. All operands are (batch, channels, tokens): tokens fill the 128 lanes, so that a particle
of dimension 3 costs 8 sublanes and not 128 lanes. A tile of scores is (keys, rows): what belongs
to a row is a (1, rows) vector, and a sum over keys is a sum of registers.

Precision. Bfloat16 goes to the matrix unit as it is, accumulated in float32, the scale applied
after. A float32-accurate product takes six bfloat16 passes; but the matrix unit sums 128 channels
in one pass, so where six times the channels are not more, one pass makes all six products.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array

from .base import (
    AbstractBackend,
    Band,
    Cotangent,
    Forward,
    Mode,
    Problem,
    Results,
    Shapes,
    Tangent,
    finite,
    pad,
)

# The most rows and keys of a tile: the largest that compile for every generation from v4 (16 MiB
# of VMEM) on. The schedules of larger tiles need fewer cycles a pair.
ROWS, KEYS = 512, 1024
# Float32 sums of at most so many channels take fewer cycles on the vector unit.
VECTOR_CHANNELS = 4
# Wider operands do not leave room for a tile.
MOST_CHANNELS = 1024
LANES = 128

Named = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class PallasTPU(AbstractBackend):
    """The kernels of this file; `interpret` runs them on any machine, in Pallas's interpreter."""

    interpret: bool = False

    def forward(self, operands: Forward, problem: Problem) -> Results:
        q, k, v, b, scale = operands
        tiles = _Tiles.of(q, k, v, problem.band)
        rows = tiles.queries(q, scale)
        keys = tiles.keys(k, b, problem.weighted) | {"v": tiles.pad_keys(v)}

        def step(rows, keys, sums, mask):
            top, total, z = sums
            s = _scores(rows, keys, mask)
            new = jnp.maximum(top, jnp.max(s, axis=0, keepdims=True))
            known = finite(new)
            weights = jnp.exp(s - known)
            shrink = jnp.exp(top - known)
            total = total * shrink + _over_keys(keys["v"], weights)
            return new, total, z * shrink + weights.sum(axis=0, keepdims=True)

        def finish(sums):
            top, total, z = sums
            empty = z == 0
            z = jnp.where(empty, 1.0, z)
            return total / z, jnp.where(empty, -jnp.inf, jnp.log(z) + finite(top))

        sums = (1, -jnp.inf), (v.shape[-1], 0.0), (1, 0.0)
        outs = (v.shape[-1], v.dtype), (1, b.dtype)
        mean, lse = tiles.fold(step, finish, rows, keys, sums, outs, interpret=self.interpret)
        return tiles.unpad(mean, q), tiles.unpad(lse, q)[..., 0]

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        q, k, v, b, scale, mean, lse, du, dk, dv, _ = operands
        tiles = _Tiles.of(q, k, v, problem.band)
        db = operands.moving_db
        rows = tiles.queries(q, scale, lse) | {"du": tiles.pad_rows(du.astype(q.dtype))}
        keys = tiles.keys(k, b, problem.weighted) | {
            "v": tiles.pad_keys(v),
            "dk": tiles.pad_keys(dk),
            "dv": tiles.pad_keys(dv),
            "db": tiles.pad_keys(db[..., None]),
        }

        def step(rows, keys, sums, mask):
            total, dlse = sums
            p = jnp.exp(_scores(rows, keys, mask) - rows["lse"])
            ds = _pairs(keys["k"], rows["du"]) + _scaled_pairs(keys["dk"], rows) + keys["db"].T
            ds = p * ds
            total = total + _over_keys(keys["dv"], p) + _over_keys(keys["v"], ds)
            return total, dlse + ds.sum(axis=0, keepdims=True)

        sums = (v.shape[-1], 0.0), (1, 0.0)
        outs = (v.shape[-1], b.dtype), (1, b.dtype)
        total, dlse = tiles.fold(step, tuple, rows, keys, sums, outs, interpret=self.interpret)
        dlse = tiles.unpad(dlse, q)
        dmean = tiles.unpad(total, q) - dlse * mean.astype(b.dtype)
        return dmean.astype(v.dtype), dlse[..., 0]

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        q, k, v, b, scale, _, lse, g, _ = operands
        tiles = _Tiles.of(q, k, v, problem.band)
        dtype = b.dtype
        rows = tiles.queries(q, scale, lse) | {
            "g": tiles.pad_rows(g),
            "centre": tiles.pad_rows(operands.centre[..., None]),
        }
        keys = tiles.keys(k, b, problem.weighted) | {"v": tiles.pad_keys(v)}

        def weights(rows, keys, mask):
            p = jnp.exp(_scores(rows, keys, mask) - rows["lse"])
            return p, p * (_pairs(keys["v"], rows["g"]) - rows["centre"])

        def over_keys(rows, keys, sums, mask):
            _, w = weights(rows, keys, mask)
            return (sums[0] + _over_keys(keys["k"], w),)

        def over_rows(rows, keys, sums, mask):
            p, w = weights(rows, keys, mask)
            gk, gv, gb = sums
            gb = gb + w.sum(axis=1, keepdims=True).T
            # The unscaled queries of low precision enter with the scale on their weights.
            w = w * rows["gain"] if "gain" in rows else w
            return gk + _over_rows(rows["u"], w), gv + _over_rows(rows["g"], p), gb

        width, values = q.shape[-1], v.shape[-1]
        fold = partial(tiles.fold, interpret=self.interpret)
        sums, outs = ((width, 0.0),), ((width, dtype),)
        (gu,) = fold(over_keys, tuple, rows, keys, sums, outs)
        sums = (width, 0.0), (values, 0.0), (1, 0.0)
        outs = (width, k.dtype), (values, v.dtype), (1, dtype)
        gk, gv, gb = fold(over_rows, tuple, rows, keys, sums, outs, keys_outer=True)
        gk, gv, gb = (tiles.unpad(a, k) for a in (gk, gv, gb))
        return tiles.unpad(gu, q), gk, gv, gb[..., 0]

    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        if self.interpret:
            return None
        if shapes.q.dtype not in (jnp.float32, jnp.bfloat16):
            return f"the TPU compiler has no {shapes.q.dtype} vectors: use float32 or bfloat16"
        if shapes.channels > MOST_CHANNELS:
            return f"at most {MOST_CHANNELS} channels fit into VMEM, got {shapes.channels}"
        return None

    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        return "on Mosaic TPU"


# ------------------------------------------------------------------ tiles


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Tokens in `count` blocks of `size`: whole lanes."""

    size: int
    count: int

    @staticmethod
    def of(length: int, most: int) -> "_Axis":
        count = pl.cdiv(length, most)
        return _Axis(pl.cdiv(pl.cdiv(length, count), LANES) * LANES, count)

    @property
    def length(self) -> int:
        return self.size * self.count


@dataclasses.dataclass(frozen=True)
class _Fold:
    """A fold over inner blocks for each outer one; outer i sees i - before <= j <= i + after."""

    outer: _Axis
    inner: _Axis
    before: int | None
    after: int | None
    keys_outer: bool

    @property
    def steps(self) -> int:
        """No outer block sees more inner blocks than this."""
        if self.before is None or self.after is None:
            return self.inner.count
        span = self.outer.size - 1 + self.before + self.after
        return min(self.inner.count, span // self.inner.size + 2)

    def block(self, i, step):
        """The inner block of a step; after the last visible one that one again, without a copy."""
        return jnp.minimum(self._first(i) + step, self._last(i))

    def visible(self, i, step):
        return self._first(i) + step <= self._last(i)

    def whole(self, i, step):
        """Whether each token of the outer block sees each of the inner block."""
        start, low = i * self.outer.size, self.block(i, step) * self.inner.size
        inside = jnp.bool_(True)
        if self.before is not None:
            inside &= low - (start + self.outer.size - 1) >= -self.before
        if self.after is not None:
            inside &= low + self.inner.size - 1 - start <= self.after
        return inside

    def mask(self, i, step):
        """The visible pairs of a tile, (keys, rows)."""
        sizes = self.outer.size, self.inner.size
        shape = sizes if self.keys_outer else sizes[::-1]
        token = lambda axis: jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        outer, inner = (token(0), token(1)) if self.keys_outer else (token(1), token(0))
        shift = self.block(i, step) * self.inner.size - i * self.outer.size
        offset = inner - outer + shift
        mask = None
        if self.before is not None:
            mask = offset >= -self.before
        if self.after is not None:
            close = offset <= self.after
            mask = close if mask is None else mask & close
        return mask

    def _first(self, i):
        if self.before is None:
            return jnp.int32(0)
        return _quotient(jnp.maximum(i * self.outer.size - self.before, 0), self.inner.size)

    def _last(self, i):
        last = jnp.int32(self.inner.count - 1)
        if self.after is None:
            return last
        return jnp.minimum(
            last, _quotient((i + 1) * self.outer.size - 1 + self.after, self.inner.size)
        )


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The tiles of an m x n score matrix, and the operands laid out for them."""

    rows: _Axis
    columns: _Axis
    band: Band

    @staticmethod
    def of(q, k, v, band: Band) -> "_Tiles":
        # Each doubling of a row over 256 bytes halves the tile: v4 has no more than 16 MiB.
        width = max(q.shape[-1], v.shape[-1]) * q.dtype.itemsize
        halvings = ((width - 1) // 256).bit_length()
        most = lambda size: max(LANES, size >> halvings)
        return _Tiles(_Axis.of(q.shape[-2], most(ROWS)), _Axis.of(k.shape[-2], most(KEYS)), band)

    def queries(self, q, scale, lse=None) -> Named:
        """What the scores need of a row."""
        scale = scale[..., None, None]
        if q.dtype == jnp.float32:
            rows = {"u": self.pad_rows(scale * q)}
        else:
            gain = jnp.broadcast_to(scale, (*q.shape[:-1], 1))
            rows = {"u": self.pad_rows(q), "gain": self.pad_rows(gain)}
        if lse is not None:
            rows["lse"] = self.pad_rows(finite(lse)[..., None], jnp.inf)
        return rows

    def keys(self, k, b, weighted: bool) -> Named:
        """What the scores need of a key; padding is masked by its weight."""
        keys = {"k": self.pad_keys(k)}
        if weighted or k.shape[-2] < self.columns.length:
            keys["b"] = self.pad_keys(b[..., None], -jnp.inf)
        return keys

    def pad_rows(self, a, fill=0.0):
        return _channels_first(a, self.rows.length, fill)

    def pad_keys(self, a, fill=0.0):
        return _channels_first(a, self.columns.length, fill)

    def unpad(self, a, like):
        """(batch, channels, padded tokens) to (*batch, tokens, channels)."""
        a = jnp.swapaxes(a[:, :, : like.shape[-2]], 1, 2)
        return a.reshape((*like.shape[:-2], *a.shape[1:]))

    def fold(
        self,
        step: Callable,
        finish: Callable,
        rows: Named,
        keys: Named,
        sums: tuple[tuple[int, float], ...],
        outs: tuple[tuple[int, DTypeLike], ...],
        *,
        keys_outer: bool = False,
        interpret: bool,
    ) -> Results:
        """finish(sums), with sums = step(rows, keys, sums, mask) over the tiles in sight.

        `sums` gives the channels and the initial value of each sum, `outs` the channels and the
        dtype of each result: both have the tokens of the outer axis.
        """
        left, right = self.band
        if keys_outer:
            fold = _Fold(self.columns, self.rows, right, left, keys_outer)
            outer, inner = keys, rows
        else:
            fold = _Fold(self.rows, self.columns, left, right, keys_outer)
            outer, inner = rows, keys
        size, length = fold.outer.size, fold.outer.length

        def kernel(outer, inner, *refs):
            results, totals = refs[: len(outs)], refs[len(outs) :]
            i, j = pl.program_id(1), pl.program_id(2)

            @pl.when(j == 0)
            def _():
                for total, (_, fill) in zip(totals, sums, strict=True):
                    total[...] = jnp.full(total.shape, fill, total.dtype)

            def accumulate(mask):
                blocks = [
                    {name: ref[...] for name, ref in named.items()} for named in (outer, inner)
                ]
                rows, keys = reversed(blocks) if keys_outer else blocks
                news = step(rows, keys, tuple(total[...] for total in totals), mask)
                for total, new in zip(totals, news, strict=True):
                    total[...] = new

            visible = fold.visible(i, j)
            if self.band == (None, None):
                accumulate(None)
            else:
                whole = fold.whole(i, j)
                pl.when(visible & whole)(lambda: accumulate(None))
                pl.when(visible & ~whole)(lambda: accumulate(fold.mask(i, j)))

            @pl.when(j == fold.steps - 1)
            def _():
                finished = finish(tuple(total[...] for total in totals))
                for ref, value in zip(results, finished, strict=True):
                    ref[...] = value.astype(ref.dtype)

        outside = lambda channels: pl.BlockSpec((None, channels, size), _outer_index)
        inside = lambda channels: pl.BlockSpec(
            (None, channels, fold.inner.size), lambda batch, i, j: (batch, 0, fold.block(i, j))
        )
        batch = rows["u"].shape[0]
        return pl.pallas_call(
            kernel,
            grid=(batch, fold.outer.count, fold.steps),
            in_specs=(
                {name: outside(a.shape[1]) for name, a in outer.items()},
                {name: inside(a.shape[1]) for name, a in inner.items()},
            ),
            out_specs=tuple(outside(channels) for channels, _ in outs),
            out_shape=tuple(jax.ShapeDtypeStruct((batch, c, length), dtype) for c, dtype in outs),
            scratch_shapes=[pltpu.VMEM((c, size), jnp.float32) for c, _ in sums],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=interpret,
        )(outer, inner)


def _outer_index(batch, i, j):
    return batch, 0, i


def _quotient(x, y: int):
    return jax.lax.div(x, jnp.int32(y))


def _channels_first(a, length: int, fill):
    """(*batch, tokens, channels) to (batch, channels, tokens), tokens padded."""
    a = jnp.swapaxes(a, -1, -2)
    a = a.reshape((math.prod(a.shape[:-2]), *a.shape[-2:]))
    return pad(a, length, fill, axis=2)


# ------------------------------------------------------------------ pieces of a tile (keys, rows)


def _scores(rows: Named, keys: Named, mask):
    s = _scaled_pairs(keys["k"], rows)
    if "b" in keys:
        s = s + keys["b"].T
    return s if mask is None else jnp.where(mask, s, -jnp.inf)


def _scaled_pairs(k, rows: Named):
    """<k_j, u_i>."""
    s = _pairs(k, rows["u"])
    return s * rows["gain"] if "gain" in rows else s


def _pairs(x, y):
    """<x_j, y_i> of (channels, keys) and (channels, rows)."""
    if x.dtype == jnp.float32 and 6 * x.shape[0] <= LANES:
        x0, x1, x2 = _split(x)
        y0, y1, y2 = _split(y)
        x = jnp.concatenate([x0, x0, x1, x1, x0, x2], axis=0)
        y = jnp.concatenate([y0, y1, y0, y1, y2, y0], axis=0)
    return _product(x, y, 0, 0)


def _split(x):
    """Three bfloat16 that add up to a float32.

    Rounding by bits: a compiler may take the cast to bfloat16 and back for nothing.
    """
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x8000)
        part = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _over_keys(x, w):
    """sum_j x_j w_ji, (channels, rows)."""
    if _few(x):
        x = x.T
        sums = [(w * x[:, c : c + 1]).sum(axis=0, keepdims=True) for c in range(x.shape[1])]
        return jnp.concatenate(sums, axis=0)
    return _product(x, w.astype(x.dtype), 1, 0)


def _over_rows(y, w):
    """sum_i y_i w_ji, (channels, keys)."""
    if _few(y):
        sums = [(w * y[c : c + 1]).sum(axis=1, keepdims=True) for c in range(y.shape[0])]
        return jnp.concatenate(sums, axis=1).T
    return _product(y, w.astype(y.dtype), 1, 1)


def _few(x) -> bool:
    return x.dtype == jnp.float32 and x.shape[0] <= VECTOR_CHANNELS


def _product(x, y, x_axis: int, y_axis: int):
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
