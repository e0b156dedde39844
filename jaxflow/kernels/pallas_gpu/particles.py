"""Few channels, many tokens: kernels on the ordinary floating-point pipe.

Every kernel here is one fold over the pairs (row i, column j),

    out_i = sum_j f(row_i, column_j)        or the maximum over j,

with a few float32 channels a row and a column. With t_ij = <u_i, k_j> and u = scale log2(e) q,

    maximum    t_ij + b_j
    forward    e_ij (v_j, w_j),   e_ij = 2^(t_ij - shift_i)
    tangent    p_ij (dv_j + ds_ij v_j, ds_ij),   ds_ij = <du_i, k_j> + <u_i, dk_j> + db_j
    rows       w_ij k_j,   w_ij = p_ij (<g_i, v_j> - centre_i)            of the cotangent
    columns    (w_ij u_i, p_ij g_i, w_ij), rows and columns exchanged     of the cotangent

Why like this: for d = 3 a pair costs 3 fused multiply-adds for its score, one exp2 and 4 more to
add it up. At 16 exp2 and 128 lanes a clock and multiprocessor both limits are 8 issue slots, so
each further instruction a pair is lost speed. A thread therefore keeps a private accumulator for
each of its pairs of a tile (rows x keys) and sums across threads once, at the end; the shift is
known beforehand where that is safe (the pass for the maximum then returns at once); log-weights are
left out where there are none; and no dimension is padded. `python -m benchmarks predict` counts the
instructions. Columns travel through shared memory, channel after channel.

At 16 channels the sums over queries spill some 250 bytes a thread: gk and gv in a pass each would
take a fifth more instructions.

Two lowerings of the same fold: Mosaic GPU on Hopper and data centre Blackwell, where the tile has
the layout of a warpgroup's accumulators, and Triton on other devices.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..base import (
    LOG2E,
    MASKED,
    Cotangent,
    Forward,
    Mode,
    Problem,
    Results,
    Shapes,
    Tangent,
    finite,
    known_shift,
    pad,
    vanishing,
)
from .family import NO_INDEX, AbstractFamily, exp2, fma

CHUNK = 256  # columns of one copy into shared memory: the most that the copy engine takes
FEWEST = 32  # and the fewest
THREADS = 128  # of a block: one warpgroup
BLOCKS = 2048  # to fill a device: some five times what runs at once


@dataclasses.dataclass(frozen=True)
class Config:
    """The tile of pairs that a block of 128 threads holds in registers."""

    rows: int
    keys: int = 8
    unroll: int = 1
    stages: int = 2  # copies in flight


class Arithmetic(NamedTuple):
    """What a tile computes with: Triton on XLA contracts nothing, so it is told by assembly."""

    fma: Callable[[Array, Array, Array], Array]
    exp2: Callable[[Array], Array]


PLAIN = Arithmetic(lambda x, y, z: x * y + z, jnp.exp2)
ASSEMBLY = Arithmetic(fma, exp2)


# ------------------------------------------------------------------ the folds

Tile = Sequence[Array]  # one array (rows, keys) a channel


def _inner(a: Arithmetic, x: Tile, y: Tile, start: Array | None = None) -> Array:
    if start is None:
        return _inner(a, x[1:], y[1:], x[0] * y[0])
    for xc, yc in zip(x, y, strict=True):
        start = a.fma(xc, yc, start)
    return start


def _maximum(biased: bool, a: Arithmetic, rows: Tile, columns: Tile, totals: Tile) -> Tile:
    k, b = (columns[:-1], columns[-1]) if biased else (columns, None)
    return [jnp.maximum(totals[0], _inner(a, rows, k, b))]


def _forward(p: int, biased: bool, a: Arithmetic, rows: Tile, columns: Tile, totals: Tile) -> Tile:
    (*u, shift), k, (*v, last) = rows, columns[:p], columns[p:]
    e = a.exp2(_inner(a, u, k, last - shift if biased else -shift))
    z = totals[-1] + e if biased else a.fma(e, last, totals[-1])
    return [*(a.fma(e, vc, t) for vc, t in zip(v, totals[:-1], strict=True)), z]


def _tangent(p: int, r: int, biased: bool, a: Arithmetic, rows: Tile, columns: Tile, totals: Tile):
    u, du, (lse,) = _split(rows, p, p, 1)
    k, dk, v, dv, (last, *db) = _split(columns, p, p, r, r, 1 + biased)
    weight = a.exp2(_inner(a, u, k, last - lse if biased else -lse))
    moved = weight * _inner(a, u, dk, _inner(a, du, k, *db))
    sums = [a.fma(weight, dc, t) for dc, t in zip(dv, totals[:-1], strict=True)]
    sums = [a.fma(moved, vc, t) for vc, t in zip(v, sums, strict=True)]
    return [*sums, totals[-1] + moved if biased else a.fma(moved, last, totals[-1])]


def _rows(p: int, r: int, biased: bool, a: Arithmetic, rows: Tile, columns: Tile, totals: Tile):
    u, g, (lse, centre) = _split(rows, p, r, 2)
    k, v, b = _split(columns, p, r, biased)
    start = b[0] - lse if biased else -lse
    w = a.exp2(_inner(a, u, k, start)) * _inner(a, g, v, -centre)
    return [a.fma(w, kc, t) for kc, t in zip(k, totals, strict=True)]


def _columns(p: int, r: int, biased: bool, a: Arithmetic, rows: Tile, columns: Tile, totals: Tile):
    k, v, b = _split(rows, p, r, biased)
    u, g, (lse, centre) = _split(columns, p, r, 2)
    weight = a.exp2(_inner(a, u, k, b[0] - lse if biased else -lse))
    w = weight * _inner(a, g, v, -centre)
    gk, gv, gb = _split(totals, p, r, biased)
    gk = [a.fma(w, uc, t) for uc, t in zip(u, gk, strict=True)]
    gv = [a.fma(weight, gc, t) for gc, t in zip(g, gv, strict=True)]
    return [*gk, *gv, *(t + w for t in gb)]


def _split(channels: Sequence[Array], *sizes: int) -> list[list[Array]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(channels[start : start + size]))
        start += size
    return parts


# ------------------------------------------------------------------ the operation


@dataclasses.dataclass(frozen=True)
class Particles(AbstractFamily):
    """The kernels of this file; `mosaic` ones run from Hopper on, the others anywhere."""

    mosaic: bool = True
    config: Config | None = None
    interpret: Any = False

    name: ClassVar[str] = "particles"

    def forward(self, operands: Forward, problem: Problem) -> Results:
        q, k, v, b, scale = operands
        p, dtype, weighted = q.shape[-1], b.dtype, problem.weighted
        u, k, v, b2 = _base2(q, scale), k.astype(dtype), v.astype(dtype), LOG2E * b[..., None]
        shift, safe = known_shift(u, k, v, b2[..., 0], problem, math.log2)
        columns = [(k, None), (b2, None)][: 1 + weighted]
        exact = self._fold(partial(_maximum, weighted), [u], columns, 1, skip=safe)
        shift = jnp.where(safe[:, None, None], shift[:, None, None], exact)
        columns = [(k, None), (v, 0.0), _last(problem, b2)]
        tile = partial(_forward, p, weighted)
        totals = self._fold(tile, [u, shift], columns, v.shape[-1] + 1)
        z = totals[..., -1:]
        empty = z == 0
        z = jnp.where(empty, 1, z)
        lse = jnp.where(empty, -jnp.inf, shift / LOG2E + jnp.log(z))
        return (totals[..., :-1] / z).astype(v.dtype), lse[..., 0]

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        q, k, v, b, scale, mean, lse, du, dk, dv, _ = operands
        p, r, dtype = q.shape[-1], v.shape[-1], b.dtype
        k, v, dk, dv, mean = (a.astype(dtype) for a in (k, v, dk, dv, mean))
        rows = [_base2(q, scale), du, LOG2E * finite(lse)[..., None]]
        # The scores are in base 2 and their derivative is not, so dk takes the factor that u has.
        columns = [(k, None), (dk / LOG2E, 0.0), (v, 0.0), (dv, 0.0)]
        columns.append(_last(problem, LOG2E * b[..., None]))
        if problem.weighted:
            columns.append((operands.moving_db[..., None], 0.0))
        tile = partial(_tangent, p, r, problem.weighted)
        totals = self._fold(tile, rows, columns, r + 1)
        dlse = totals[..., -1:]
        return totals[..., :-1] - dlse * mean, dlse[..., 0]

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        q, k, v, b, scale, _, lse, g, _ = operands
        p, r, dtype = q.shape[-1], v.shape[-1], b.dtype
        k, v, g = (a.astype(dtype) for a in (k, v, g))
        u, b2, lse = _base2(q, scale), LOG2E * b[..., None], LOG2E * lse[..., None]
        centre, weighted = operands.centre[..., None], problem.weighted
        rows, columns = [u, g, finite(lse), centre], [(k, None), (v, 0.0)]
        # Padding must weigh nothing, which takes log-weights here.
        biased = weighted or self._division(rows, columns, p).width > k.shape[1]
        columns = [*columns, (b2, -jnp.inf)][: 2 + biased]
        gu = self._fold(partial(_rows, p, r, biased), rows, columns, p)
        # A query without a visible key weighs nothing, like padding.
        columns = [(u, 0.0), (g, 0.0), (vanishing(lse), jnp.inf), (centre, 0.0)]
        rows, tile = [k, v, b2][: 2 + weighted], partial(_columns, p, r, weighted)
        sums = self._fold(tile, rows, columns, p + r + weighted)
        gk, gv, gb = jnp.split(sums, [p, p + r], axis=-1)
        return gu, gk / LOG2E, gv, gb[..., 0] if weighted else jnp.zeros_like(b)

    def candidates(self, mode: Mode, shapes: Shapes) -> Sequence[Config | None]:
        # None fits each fold of a mode.
        sizes = [(rows, keys) for rows in (64, 128, 192, 256) for keys in (8, 16)]
        tries = [
            Config(*s, unroll, stages) for s in sizes for unroll in (1, 2) for stages in (2, 4)
        ]
        return [None, *tries]

    def _fold(
        self,
        tile: Callable[..., Tile],
        rows: Sequence[Array],
        columns: Sequence[tuple[Array, float | None]],
        outputs: int,
        *,
        skip: Array | None = None,
    ) -> Array:
        """sum_j tile(row_i, column_j), shape (batch, m, outputs); with `skip`, max_j instead, where
        batches to skip hold anything.

        `rows` are (batch, m, channels) each, `columns` (batch, n, channels) with what pads them
        (None: the last column again).
        """
        (batch, m, _), division = rows[0].shape, self._division(rows, columns, outputs)
        x = jnp.concatenate([pad(a, division.height, axis=1) for a in rows], axis=-1)
        y = jnp.concatenate([_padded(a, division.width, fill) for a, fill in columns], axis=-1)
        largest = skip is not None
        skip = skip.astype(jnp.int32) if largest else jnp.zeros(batch, jnp.int32)
        options = {"outputs": outputs, "segments": division.segments, "largest": largest}
        options |= {"config": division.config, "interpret": self.interpret}
        run = _mosaic if self.mosaic else _triton
        out = run(tile, jnp.swapaxes(x, 1, 2), jnp.swapaxes(y, 1, 2), skip, **options)
        out = out.max(axis=1) if largest else out.sum(axis=1)
        return jnp.swapaxes(out, 1, 2)[:, :m]

    def _division(self, rows, columns, outputs: int) -> "_Division":
        """How a fold of these rows and columns is divided among blocks."""
        (batch, m, _), n = rows[0].shape, columns[0][0].shape[1]
        channels = sum(a.shape[-1] for a in rows), sum(a.shape[-1] for a, _ in columns)
        least = 64 if self.mosaic else 16
        config = self.config or default_config(m, *channels, outputs, least)
        blocks = -(-m // config.rows)
        segments, length = _segments(blocks * batch, n)
        return _Division(config, blocks * config.rows, segments, segments * length)


class _Division(NamedTuple):
    """Rows and columns with their padding; each segment of the columns is summed by itself."""

    config: Config
    height: int
    segments: int
    width: int


def _base2(q, scale):
    return (LOG2E * scale)[:, None, None] * q.astype(scale.dtype)


# ------------------------------------------------------------------ the fold


def _last(problem: Problem, b2):
    """The log-weights; without, a channel that counts columns and leaves out padding: it multiplies
    what is added up anyway, so it costs nothing."""
    return (b2, -jnp.inf) if problem.weighted else (jnp.ones_like(b2), 0.0)


def _padded(a, length, fill):
    if fill is None:
        return jnp.pad(a, [(0, 0), (0, length - a.shape[1]), (0, 0)], mode="edge")
    return pad(a, length, fill, axis=1)


def _segments(blocks: int, n: int) -> tuple[int, int]:
    """(segments, columns of one): blocks fill the device, and no float32 sum grows long."""
    most, least = -(-n // 1024), -(-n // 2**17)
    count = max(least, min(most, -(-BLOCKS // blocks)))
    chunk = _chunk(n)
    length = chunk * -(-n // (chunk * count))
    return -(-n // length), length


def _chunk(n: int) -> int:
    """Columns of one copy: few where there are few in all."""
    return min(CHUNK, FEWEST * -(-n // FEWEST))


def default_config(
    m: int, row_channels: int, column_channels: int, outputs: int, least: int = 64
) -> Config:
    """The tallest tile whose registers, roughly counted, leave room for three blocks; for two, if
    else a thread had so few pairs that loads took one instruction in six."""
    keys = 8  # as few as the layout of a warpgroup's accumulators allows

    def registers(height):
        pairs = height * keys // THREADS
        return pairs * (outputs + 2) + height // 32 * row_channels + column_channels

    tall = [h for h, most in ((256, 150), (128, 200)) if registers(h) <= most]
    heights = [h for h in (*tall, 64, 32, 16) if least <= h < 2 * m]
    return Config(rows=max(heights, default=least), keys=keys)


def _mosaic(tile, rows, columns, skip, *, outputs, segments, largest, config, interpret):
    (batch, height, m), (_, width, n) = rows.shape, columns.shape
    block, shape = config.rows, (config.rows, config.keys)
    layout, blocks = plgpu.Layout.WGMMA, m // block
    # Three blocks share a multiprocessor's memory.
    part = _chunk(n) if width <= 34 else _chunk(n) // 2

    def load(ref, index, axis):
        at = ref.at[index]
        # The interpreter keeps whole arrays and knows no layouts.
        line = at[...] if interpret else plgpu.load(at, *NO_INDEX, layout=layout.reduce(1 - axis))
        return jax.lax.broadcast_in_dim(line, shape, (axis,))

    def constant(value):
        full = jnp.full(shape, value, rows.dtype)
        return full if interpret else plgpu.layout_cast(full, layout)

    def kernel(rows_gmem, columns_gmem, skip_gmem, out_gmem, rows_smem, out_smem, arrived):
        index = jax.lax.axis_index("block")
        first, index = jax.lax.rem(index, blocks) * block, jax.lax.div(index, blocks)
        segment, system = jax.lax.rem(index, segments), jax.lax.div(index, segments)
        block_of = pl.ds(first, block)

        @pl.when(skip_gmem[system] == 0)
        def _():
            plgpu.copy_gmem_to_smem(rows_gmem.at[system, :, block_of], rows_smem, arrived)
            plgpu.barrier_wait(arrived)
            x = [load(rows_smem, (c,), 0) for c in range(height)]

            def chunk(_, columns_smem, totals):
                def strip(j, totals):
                    keys = pl.ds(j * config.keys, config.keys)
                    y = [load(columns_smem, (0, c, keys), 1) for c in range(width)]
                    return tuple(tile(PLAIN, x, y, totals))

                strips = part // config.keys
                return jax.lax.fori_loop(0, strips, strip, totals, unroll=config.unroll)

            chunks = n // segments // part
            pipeline = plgpu.emit_pipeline(
                chunk,
                grid=(chunks,),
                in_specs=[
                    plgpu.BlockSpec((1, width, part), lambda j: (system, 0, segment * chunks + j))
                ],
                max_concurrent_steps=min(config.stages, chunks),
                init_carry=(constant(MASKED if largest else 0),) * outputs,
            )
            for c, total in enumerate(pipeline(columns_gmem)):
                out_smem[c] = total.max(axis=1) if largest else total.sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[system, segment, :, block_of])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, segments, outputs, m), rows.dtype),
        scratch_types=[
            plgpu.SMEM((height, block), rows.dtype),
            plgpu.SMEM((outputs, block), rows.dtype),
            plgpu.Barrier(),
        ],
        # One axis: CUDA's others end at 65535.
        grid=(blocks * segments * batch,),
        grid_names=("block",),
        # The pipeline refills a slot of shared memory without asking whether all warps have read
        # it: the barriers that Pallas adds by itself must stay.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(rows, columns, skip)


def _triton(tile, rows, columns, skip, *, outputs, segments, largest, config, interpret):
    from jax.experimental.pallas import triton

    (batch, height, m), (_, width, n) = rows.shape, columns.shape
    block, shape = config.rows, (config.rows, config.keys)
    length, arithmetic = n // segments, PLAIN if interpret else ASSEMBLY
    # A strip of columns lies together, with a power of two channels: then offsets are part of the
    # instructions that load, and no integer arithmetic.
    strips, room = length // config.keys, 1 << (width - 1).bit_length()
    columns = pad(columns, room, axis=1).reshape(batch, room, n // config.keys, config.keys)
    columns = columns.swapaxes(1, 2)

    def kernel(rows_ref, columns_ref, skip_ref, out_ref):
        @pl.when(skip_ref[0] == 0)
        def _():
            spread = lambda a, axis: jax.lax.broadcast_in_dim(a, shape, (axis,))
            x = [spread(rows_ref[0, c, :], 0) for c in range(height)]

            def strip(j, totals):
                y = [spread(columns_ref[0, j, c, :], 1) for c in range(width)]
                return tuple(tile(arithmetic, x, y, totals))

            start = (jnp.full(shape, MASKED if largest else 0, rows.dtype),) * outputs
            totals = jax.lax.fori_loop(0, strips, strip, start)
            for c, total in enumerate(totals):
                out_ref[0, 0, c, :] = total.max(axis=1) if largest else total.sum(axis=1)

    return pl.pallas_call(
        kernel,
        grid=(m // block, segments, batch),
        in_specs=[
            pl.BlockSpec((1, height, block), lambda i, s, b: (b, 0, i)),
            pl.BlockSpec((1, strips, room, config.keys), lambda i, s, b: (b, s, 0, 0)),
            pl.BlockSpec((1,), lambda i, s, b: (b,)),
        ],
        out_specs=pl.BlockSpec((1, 1, outputs, block), lambda i, s, b: (b, s, 0, i)),
        out_shape=jax.ShapeDtypeStruct((batch, segments, outputs, m), rows.dtype),
        compiler_params=triton.CompilerParams(num_warps=THREADS // 32, num_stages=1),
        interpret=interpret,
    )(rows, columns, skip)
