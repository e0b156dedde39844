"""The language-model regime on Hopper: 16-bit operands, warpgroup matrix products, TMA.

With x_ij = log2(e) (scale <q_i, k_j> + b_j) and p_ij = 2^(x_ij - log2(e) lse_i):

    forward    mean_i = sum_j p_ij v_j,  lse_i     by a fold over key tiles with a running maximum
    tangent    ds_ij = sigma_i <du_i / sigma_i, k_j> + scale <q_i, dk_j> + db_j
               dmean_i = sum_j p_ij (dv_j + ds_ij v_j) - dlse_i mean_i,  dlse_i = sum_j p_ij ds_ij
    cotangent  w_ij = p_ij (<g_i, v_j> - centre_i),  centre_i = <g_i, mean_i> - h_i
               gu_i = sum_j w_ij k_j                                            over keys
               gk_j = scale sum_i w_ij q_i, gv_j = sum_i p_ij g_i, gb_j = sum_i w_ij  over queries

All sums have one shape, `_stream`: a block keeps 64 rows a compute warpgroup in shared memory, one
more warpgroup streams tiles of columns past them through TMA, and the sums stay in registers.
Two compute warpgroups take turns: one has the tensor cores while the other takes exponentials.

Sums are float32. Rounded to 16 bits are p, p ds and w (as factors of the second product) and
du_i / sigma_i, where sigma_i = max |du_i| keeps float16 in range. Written for Mosaic GPU with the
lane semantics, in which every layout is spelled out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..base import (
    LOG2E,
    Band,
    Cotangent,
    Forward,
    Mode,
    Problem,
    Results,
    Shapes,
    Tangent,
    pad,
    vanishing,
)
from .family import NO_INDEX, AbstractFamily

ROWS = 64  # of one compute warpgroup: the M of every WGMMA instruction
DTYPES = (jnp.bfloat16, jnp.float16)
WIDEST = 256  # head dimension; wider sums leave the registers
TINY = 1e-37
SHARED_BYTES = 226 * 1024  # of a block, less the barriers
TILE = plgpu.Layout.WGMMA
ROW = TILE.reduce(1)  # one number a row of a tile
COLUMN = TILE.reduce(0)

# Where plgpu.store exists, plain assignment refuses rows of a 16-bit tile in device memory.
STORE = getattr(plgpu, "store", None)

# From the first to before the second version of CUDA, `ptxas` makes wrong code of masks beside
# warpgroup products: jax.experimental.pallas.ops.gpu.attention_mgpu refuses there as well.
MISCOMPILES = 12080, 12091

# Registers a thread of (compute, memory) warpgroups, by the number of the former; 512 in all.
REGISTERS = {2: (240, 24), 3: (160, 32)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Of one kernel: columns in a tile, tiles in flight, compute warpgroups in a block."""

    columns: int
    stages: int = 2
    groups: int = 2


@dataclasses.dataclass(frozen=True)
class Hopper(AbstractFamily):
    """The kernels of this file.

    `config` is a `Config`, or None for the default. A cotangent is two kernels with one each: it
    takes a pair, of the kernel that streams keys (gu) and of the one that streams queries.
    """

    config: Any = None
    interpret: Any = False

    name: ClassVar[str] = "hopper"

    def forward(self, operands: Forward, problem: Problem) -> Results:
        q, k, v, b, scale = operands
        weighted = problem.weighted
        return _stream(
            _Forward(weighted),
            self.config or default("forward", q, v),
            scale,
            fixed=(q,),
            streamed=(((k, 0), *_bias(b, weighted)), ((v, 0),)),
            direct=(),
            outs=((v.shape[2:], v.dtype), ((), b.dtype)),
            band=problem.band,
            interpret=self.interpret,
        )

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        q, k, v, b, scale, mean, lse, du, dk, dv, _ = operands
        weighted = problem.weighted
        sigma = jnp.abs(du).max(axis=2)
        sigma = jnp.where(sigma == 0, 1, sigma)
        du = (du / sigma[..., None]).astype(q.dtype)
        bias = (*_bias(b, weighted), (operands.moving_db, 0)) if weighted else ()
        return _stream(
            _Tangent(weighted),
            self.config or default("tangent", q, v),
            scale,
            fixed=(q, du),
            streamed=(((k, 0), (dk, 0), *bias), ((v, 0), (dv, 0))),
            direct=(vanishing(lse * LOG2E), sigma, mean),
            outs=((v.shape[2:], v.dtype), ((), b.dtype)),
            band=problem.band,
            interpret=self.interpret,
        )

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        q, k, v, b, scale, _, lse, g, _ = operands
        weighted, band, centre = problem.weighted, problem.band, operands.centre
        lse = vanishing(lse * LOG2E)
        over_keys, over_queries = self.config or (default("gu", q, v), default("gk", q, v))
        run = partial(_stream, scale=scale, interpret=self.interpret)
        (gu,) = run(
            _QueryCotangent(weighted),
            over_keys,
            fixed=(q, g),
            streamed=(((k, 0), *_bias(b, weighted)), ((v, 0),)),
            direct=(lse, centre),
            outs=((q.shape[2:], b.dtype),),
            band=band,
        )
        of_scores = (k.shape[2:], k.dtype), ((), b.dtype)
        of_values = ((v.shape[2:], v.dtype),)
        # Sums of more than 256 columns do not fit the registers: gk and gv then take a pass each.
        together = q.shape[2] + v.shape[2] <= WIDEST
        parts = [
            run(
                _KeyCotangent(weighted, scores, values),
                over_queries,
                fixed=(k, v),
                streamed=(((q, 0), (lse, math.inf)), ((g, 0), (centre, 0))),
                direct=(b * LOG2E,),
                outs=of_scores * scores + of_values * values,
                band=(band[1], band[0]),
            )
            for scores, values in ([(True, True)] if together else [(True, False), (False, True)])
        ]
        gk, gb, gv = (a for part in parts for a in part)
        return gu, gk, gv, gb if weighted else jnp.zeros_like(b)

    def candidates(self, mode: Mode, shapes: Shapes) -> Sequence[Any]:
        q, _, v = shapes
        if mode != "cotangent":
            return _fitting(mode, q, v)
        first, *over_keys = _fitting("gu", q, v)
        second, *over_queries = _fitting("gk", q, v)
        pairs = [*((c, second) for c in over_keys), *((first, c) for c in over_queries)]
        return [(first, second), *pairs]


def refusal(shapes: Shapes, problem: Problem) -> str | None:
    """Why these kernels cannot run, or None."""
    if problem.band != (None, None) and MISCOMPILES[0] <= _cuda_version() < MISCOMPILES[1]:
        return (
            "the compiler of CUDA 12.8 makes wrong code of masks in them: install 12.9.1 or later"
        )
    if shapes.q.dtype not in DTYPES:
        return f"the Hopper kernels take bfloat16 and float16, got {shapes.q.dtype}"
    for width in (shapes.k.shape[-1], shapes.v.shape[-1]):
        if width % 16 or not 0 < width <= WIDEST:
            return f"the Hopper kernels take head dimensions 16, 32, ..., {WIDEST}, got {width}"
    return None


def _cuda_version() -> int:
    """Of the plugin's CUDA, as 12090 for 12.9; 0 where there is none."""
    try:
        from jax._src.lib import cuda_versions  # No public module tells it.

        return 0 if cuda_versions is None else cuda_versions.cuda_runtime_get_version()
    except (ImportError, RuntimeError):
        return 0


# ------------------------------------------------------------------ the four sums


@dataclasses.dataclass(frozen=True)
class _Forward:
    weighted: bool

    def start(self, group):
        if not self.weighted:
            # The fold takes the maximum before the scale; a negative one would need the minimum.
            pl.when(group.scale < 0)(partial(group.negate, 0))
        total = group.zeros(ROWS)
        return group.zeros(ROWS, group.width), total - jnp.inf, total

    def step(self, group, tiles, carry):
        mean, top, total = carry
        (q,) = group.fixed
        k, *bias = tiles.wait(0)
        (s,) = group.products(_scores(q, k), then=group.turn)
        # Not zero, so that masked scores stay -inf under the scale.
        factor = jnp.maximum(jnp.abs(group.scale) * LOG2E, TINY)
        if self.weighted:
            s = s * (group.scale * LOG2E) + group.column(bias[0])
            factor = 1.0
        tiles.free(0)
        s = tiles.visible(s)
        new = jnp.maximum(top, s.max(axis=1) * factor)
        shift = jnp.where(new == -jnp.inf, 0.0, new)
        decay = jnp.exp2(top - shift)
        p = jnp.exp2(s * factor - _row(shift, s))
        total = total * decay + p.sum(axis=1)
        mean = mean * _row(decay, mean)
        # Keeps the exponentials on this side of the turn.
        mean, total, new, p = lax.optimization_barrier((mean, total, new, p.astype(group.dtype)))
        (v,) = tiles.wait(1)
        group.turn()
        (mean,) = group.products(_sums(mean, (p, v)))
        tiles.free(1)
        return mean, new, total

    def finish(self, group, carry):
        mean, top, total = carry
        total = jnp.where(total == 0, 1.0, total)
        group.write(0, mean * _row(1 / total, mean))
        group.write(1, top / LOG2E + jnp.log(total))


@dataclasses.dataclass(frozen=True)
class _Tangent:
    weighted: bool

    def start(self, group):
        return group.zeros(ROWS, group.width), group.zeros(ROWS), group.read(0), group.read(1)

    def step(self, group, tiles, carry):
        dmean, dlse, lse, sigma = carry
        q, du = group.fixed
        k, dk, *bias = tiles.wait(0)
        products = _scores(q, k), _scores(du, k), _scores(q, dk)
        s, du_k, q_dk = group.products(*products, then=group.turn)
        b, db = [group.column(x) for x in bias] or (None, None)
        tiles.free(0)
        p = _weights(group, tiles, s, lse, b)
        ds = q_dk * group.scale + du_k * _row(sigma, s)
        ds = p * (ds if db is None else ds + db)
        dlse = dlse + ds.sum(axis=1)
        pair = p.astype(group.dtype), ds.astype(group.dtype)
        p, ds, dlse = lax.optimization_barrier((*pair, dlse))
        v, dv = tiles.wait(1)
        group.turn()
        (dmean,) = group.products(_sums(dmean, (p, dv), (ds, v)))
        tiles.free(1)
        return dmean, dlse, lse, sigma

    def finish(self, group, carry):
        dmean, dlse, *_ = carry
        step = math.gcd(group.width, 64)  # The whole mean would not fit beside its tangent.
        for i in range(0, group.width, step):
            part = lax.slice(dmean, (0, i), (ROWS, i + step))
            mean = group.read(2, pl.ds(i, step)).astype(jnp.float32)
            group.write(0, part - _row(dlse, part) * mean, pl.ds(i, step))
        group.write(1, dlse)


@dataclasses.dataclass(frozen=True)
class _QueryCotangent:
    weighted: bool

    def start(self, group):
        return group.zeros(ROWS, group.width), group.read(0), group.read(1)

    def step(self, group, tiles, carry):
        gu, lse, centre = carry
        q, g = group.fixed
        k, *bias = tiles.wait(0)
        (v,) = tiles.wait(1)
        s, g_v = group.products(_scores(q, k), _scores(g, v), then=group.turn)
        tiles.free(1)
        b = group.column(bias[0]) if bias else None
        w = _weights(group, tiles, s, lse, b) * (g_v - _row(centre, s))
        w = lax.optimization_barrier(w.astype(group.dtype))
        group.turn()
        (gu,) = group.products(_sums(gu, (w, k)))
        tiles.free(0)
        return gu, lse, centre

    def finish(self, group, carry):
        group.write(0, carry[0])


@dataclasses.dataclass(frozen=True)
class _KeyCotangent:
    """Rows are keys here and columns are queries; `scores`: gk and gb, `values`: gv."""

    weighted: bool
    scores: bool
    values: bool

    def start(self, group):
        k, v = group.fixed
        b = group.read(0) if self.weighted else group.zeros(ROWS)
        gk = (group.zeros(ROWS, k.shape[1]), group.zeros(ROWS)) if self.scores else ()
        gv = (group.zeros(ROWS, v.shape[1]),) if self.values else ()
        return b, gk, gv

    def step(self, group, tiles, carry):
        b, gk, gv = carry
        k, v = group.fixed
        q, lse = tiles.wait(0)
        g, centre = tiles.wait(1)
        products = _scores(k, q), _scores(v, g)
        s, *v_g = group.products(*products[: 1 + self.scores], then=group.turn)
        p = _weights(group, tiles, s, group.column(lse), _row(b, s) if self.weighted else None)
        sums = []
        if self.values:
            sums.append(_sums(gv[0], (p.astype(group.dtype), g)))
        if self.scores:
            w = p * (v_g[0] - group.column(centre))
            gb = gk[1] + w.sum(axis=1) if self.weighted else gk[1]
            sums.append(_sums(gk[0], (w.astype(group.dtype), q)))
        group.turn()
        sums = group.products(*sums)
        tiles.free(0)
        tiles.free(1)
        return b, (sums[-1], gb) if self.scores else (), tuple(sums[: self.values])

    def finish(self, group, carry):
        _, gk, gv = carry
        if self.scores:
            group.write(0, gk[0] * group.scale)
            group.write(1, gk[1])
        if self.values:
            group.write(2 * self.scores, gv[0])


def _weights(group, tiles, s, lse, bias):
    x = s * (group.scale * LOG2E)
    if bias is not None:
        x = x + bias
    return jnp.exp2(tiles.visible(x - (lse if lse.ndim == 2 else _row(lse, x))))


def _row(x, like):
    """One number a row, over the columns."""
    return lax.broadcast_in_dim(x, like.shape, (0,))


# ------------------------------------------------------------------ inside a block


class _Product(NamedTuple):
    total: Any  # in registers; None starts at zero
    factors: tuple  # pairs
    transposed: bool  # the second of each pair


def _scores(a, b) -> _Product:
    """a b^T"""
    return _Product(None, ((a, b),), True)


def _sums(total, *factors) -> _Product:
    """total + a b + ..."""
    return _Product(total, factors, False)


@dataclasses.dataclass(frozen=True)
class _Group:
    """A compute warpgroup: 64 rows, their sums in registers."""

    at: Any  # index of its rows in device memory
    scale: Any
    fixed: tuple
    direct: tuple
    outs: tuple
    columns: int
    baton: Any
    interpret: Any

    @property
    def dtype(self):
        return self.fixed[0].dtype

    @property
    def width(self):
        return self.outs[0].shape[-1]

    def cast(self, x, layout):
        # The interpreter keeps whole arrays and knows no layouts.
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def zeros(self, *shape):
        return self.cast(jnp.zeros(shape, jnp.float32), TILE if len(shape) == 2 else ROW)

    def read(self, i, *columns):
        ref = self.direct[i].at[(*self.at, *columns)]
        if self.interpret:
            return ref[...]
        layout = TILE if len(ref.shape) == 2 else ROW
        return plgpu.load(ref, *NO_INDEX, layout=layout, optimized=False)

    def write(self, i, x, *columns):
        ref = self.outs[i].at[(*self.at, *columns)]
        if STORE is not None and not self.interpret:
            STORE(ref, x.astype(ref.dtype), optimized=False)
        else:
            ref[...] = x.astype(ref.dtype)

    def column(self, ref):
        """One number a column, over the rows."""
        x = self.cast(ref[...], COLUMN)
        return lax.broadcast_in_dim(x, (ROWS, self.columns), (1,))

    def negate(self, i):
        ref = self.fixed[i]
        ref[...] = -self.cast(ref[...], TILE)
        plgpu.commit_smem()

    def turn(self):
        """Hands the tensor cores to the other warpgroup and waits for them."""
        if self.baton is not None:
            plgpu.barrier_arrive(self.baton)
            plgpu.barrier_wait(self.baton)

    def products(self, *products: _Product, then: Callable = lambda: None):
        """All of them on the tensor cores at once; `then` is called before they are awaited."""
        if self.interpret:
            outs = [self._plain_product(p) for p in products]
            then()
            return outs

        def issue(refs):
            for ref, p in zip(refs, products, strict=True):
                for a, b in p.factors:
                    plgpu.wgmma(ref, a, b.transpose((1, 0)) if p.transposed else b)
            then()

        return pl.run_state(issue)(
            tuple(plgpu.WGMMAAccumulatorRef.init(self._total(p)) for p in products)
        )

    def _total(self, p: _Product):
        return self.zeros(ROWS, self.columns) if p.total is None else p.total

    def _plain_product(self, p: _Product):
        total = self._total(p)
        axes = ((1,), (1 if p.transposed else 0,)), ((), ())
        for a, b in p.factors:
            a, b = a[...].astype(jnp.float32), b[...].astype(jnp.float32)
            total = total + lax.dot_general(a, b, axes, precision=lax.Precision.HIGHEST)
        return total


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Tiles of the streamed operands in shared memory, `stages` of them in flight.

    A packet is what arrives together: it has one barrier a stage that says full, one empty.
    """

    sources: tuple
    buffers: tuple
    full: tuple
    empty: tuple
    config: Config
    interpret: Any

    def slot(self, step):
        return lax.rem(step, jnp.int32(self.config.stages))

    def feed(self, batch, count, tile):
        """The memory warpgroup's whole work."""
        stages, columns = self.config.stages, self.config.columns
        packets = [*zip(self.sources, self.buffers, self.full, self.empty, strict=True)]

        def load(step, _):
            slot = self.slot(step)
            for sources, buffers, full, empty in packets:
                pl.when(step >= stages)(partial(plgpu.barrier_wait, empty.at[slot]))

                @pl.when(step < count)
                def _(sources=sources, buffers=buffers, full=full):
                    at = batch, pl.ds(tile(step) * columns, columns)
                    for source, buffer in zip(sources, buffers, strict=True):
                        plgpu.copy_gmem_to_smem(source.at[at], buffer.at[slot], full.at[slot])

        # The last steps only wait: every tile is seen to be empty before the warpgroup leaves.
        lax.fori_loop(0, count + stages, load, None)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The tiles of one step, as a compute warpgroup sees them."""

    ring: _Ring
    slot: Any
    mask: Callable | None  # of the visible pairs; None where all are

    def wait(self, packet):
        plgpu.barrier_wait(self.ring.full[packet].at[self.slot])
        return [buffer.at[self.slot] for buffer in self.ring.buffers[packet]]

    def free(self, packet):
        if self.ring.interpret:
            # Reads by WGMMA need no fence before the next copy; the plain reads in its place do.
            plgpu.commit_smem()
        plgpu.barrier_arrive(self.ring.empty[packet].at[self.slot])

    def visible(self, x):
        return x if self.mask is None else jnp.where(self.mask(), x, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class _Extent:
    """The columns that a block of rows sees; `limit` of them are no padding (None: masked)."""

    band: Band
    limit: int | None
    count: int  # tiles of columns
    config: Config

    def order(self, row):
        """(number of tiles to mask, number in all, tile at each step): the masked ones go first."""
        left, right = self.band
        columns, last = self.config.columns, row + ROWS * self.config.groups - 1
        whole = lambda x: lax.div(jnp.maximum(x, 0), jnp.int32(columns))
        first, first_full, end_full, end = (jnp.int32(i) for i in (0, 0, self.count, self.count))
        if left is not None:
            first = jnp.minimum(whole(row - left), end)
            first_full = whole(last - left + columns - 1)
        if right is not None:
            end_full = whole(row + right + 1)
            end = jnp.minimum(whole(last + right) + 1, end)
        if self.limit is not None:
            end_full = jnp.minimum(end_full, self.limit // columns)
        first_full = jnp.clip(first_full, first, end)
        end_full = jnp.clip(end_full, first_full, end)
        heads, tails = first_full - first, end - end_full

        def tile(step):
            full = first_full + step - heads - tails
            masked = jnp.where(step < heads, first + step, end_full + step - heads)
            return jnp.where(step < heads + tails, masked, full) if self.masks else step

        return heads + tails, end - first, tile

    @property
    def masks(self) -> bool:
        return self.band != (None, None) or self.limit is not None

    def mask(self, row, column, interpret):
        left, right = self.band
        shape = (ROWS, self.config.columns)
        iota = lambda axis: (
            lax.broadcasted_iota(jnp.int32, shape, axis)
            if interpret
            else plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)
        )
        i, j = iota(0) + row, iota(1) + column
        masks = []
        if left is not None:
            masks.append(j >= i - left)
        if right is not None:
            masks.append(j <= i + right)
        if self.limit is not None:
            masks.append(j < self.limit)
        return functools.reduce(jnp.logical_and, masks)


# ------------------------------------------------------------------ the stream


def _stream(
    total, config: Config, scale, *, fixed, streamed, direct, outs, band: Band, interpret
) -> tuple[Array, ...]:
    """One kernel: `total` folds tiles of columns into sums of one warpgroup's rows.

    `fixed` and `direct` have one entry a row; the former go to shared memory, the latter are read
    once. `streamed` are packets of (array, what pads it) with one entry a column. `outs` are pairs
    of a shape after the rows, and a dtype.
    """
    length, block = fixed[0].shape[1], ROWS * config.groups
    rows = -(-length // block) * block
    limit, columns = streamed[0][0][0].shape[1], config.columns
    count = -(-limit // columns)
    infinite = any(math.isinf(fill) for packet in streamed for _, fill in packet)
    padded = limit % columns != 0 and not infinite
    extent = _Extent(band, limit if padded else None, count, config)
    packets = [[pad(a, count * columns, fill, axis=1) for a, fill in packet] for packet in streamed]
    fixed, direct = ([pad(a, rows, axis=1) for a in arrays] for arrays in (fixed, direct))
    size, blocks = scale.shape[0], rows // block

    def kernel(scale_ref, *refs, tiles, fixed_tiles, full, empty, loaded, batons):
        n = iter(refs)
        take = lambda like: tuple(next(n) for _ in like)
        fixed_refs, ring_refs = take(fixed), tuple(take(p) for p in packets)
        direct_refs, out_refs = take(direct), take(outs)
        index = lax.axis_index("block")
        batch, first = lax.div(index, jnp.int32(blocks)), lax.rem(index, jnp.int32(blocks)) * block
        if band[0] is None and band[1] is not None:
            first = rows - block - first  # The longest first: they end together.
        masked, steps, tile = extent.order(first)
        ring = _Ring(ring_refs, tiles, full, empty, config, interpret)
        wg = lax.axis_index("wg")

        @pl.when(wg == config.groups)
        def _():
            if config.groups in REGISTERS:
                plgpu.set_max_registers(REGISTERS[config.groups][1], action="decrease")
            ring.feed(batch, steps, tile)

        @pl.when(wg < config.groups)
        def _():
            if config.groups in REGISTERS:
                plgpu.set_max_registers(REGISTERS[config.groups][0], action="increase")
            row = first + wg * ROWS
            at = batch, pl.ds(row, ROWS)
            own = tuple(buffer.at[wg] for buffer in fixed_tiles)
            for ref, buffer in zip(fixed_refs, own, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[at], buffer, loaded.at[wg])
            plgpu.barrier_wait(loaded.at[wg])
            baton = batons if config.groups == 2 else None
            group = _Group(
                at, scale_ref[batch], own, direct_refs, out_refs, columns, baton, interpret
            )
            carry = total.start(group)
            pl.when(wg == 1)(group.turn)  # Half a step behind the other.

            def step(i, carry):
                return total.step(group, _Tiles(ring, ring.slot(i), None), carry)

            def masked_step(i, carry):
                mask = partial(extent.mask, row, tile(i) * columns, interpret)
                return total.step(group, _Tiles(ring, ring.slot(i), mask), carry)

            if extent.masks:
                carry = lax.fori_loop(0, masked, masked_step, carry)
            carry = lax.fori_loop(masked, steps, step, carry)
            pl.when(wg == 0)(group.turn)
            total.finish(group, carry)

    arrays = [*fixed, *(a for p in packets for a in p), *direct]
    results = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((size, rows, *shape), dtype) for shape, dtype in outs],
        grid=(size * blocks,),
        grid_names=("block",),
        num_threads=config.groups + 1,
        thread_name="wg",
        scratch_types={
            "fixed_tiles": tuple(_shared(a, config.groups, ROWS, columns) for a in fixed),
            "tiles": tuple(
                tuple(_shared(a, config.stages, columns, columns) for a in p) for p in packets
            ),
            "full": tuple(_barrier(len(p), config.stages) for p in packets),
            "empty": tuple(_barrier(config.groups, config.stages) for p in packets),
            "loaded": _barrier(len(fixed), config.groups),
            "batons": _barrier(config.groups),
        },
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(scale, *arrays)
    return tuple(a[:, :length] for a in results)


def _barrier(arrivals: int, copies: int = 1):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=copies)


def _shared(a, copies: int, length: int, columns: int):
    """Room for tiles of `length` entries; matrices as the tensor cores read them."""
    if a.ndim == 2:
        return plgpu.SMEM((copies, length), a.dtype)
    # A product over the columns needs a swizzle that those fill, and both factors of one the same.
    swizzle = min(plgpu.find_swizzle(a.shape[2] * 16), 2 * columns)
    transforms = plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM((copies, length, a.shape[2]), a.dtype, transforms=transforms)


def _bias(b, weighted: bool):
    return ((b * LOG2E, -math.inf),) if weighted else ()


# ------------------------------------------------------------------ tile sizes


def default(kernel: str, q, v) -> Config:
    """For "forward", "tangent", "gu" (cotangent over keys) or "gk" (over queries)."""
    width = max(q.shape[-1], v.shape[-1])
    if kernel == "forward":
        return Config(128) if width <= 128 else Config(64)
    if width <= 128:
        return Config(64)
    return Config(32, groups=1) if kernel == "tangent" and width > 192 else Config(32)


def _fitting(kernel: str, q, v) -> list[Config]:
    first = default(kernel, q, v)
    tiles = [Config(c, s, g) for c in (128, 64, 32) for s in (2, 3) for g in (2, 3, 1)]
    return [first, *(c for c in tiles if _fits(kernel, c, q, v) and c != first)]


def _fits(kernel: str, config: Config, q, v) -> bool:
    """Whether tiles and sums leave room in shared memory and in the registers."""
    p, r = q.shape[-1], v.shape[-1]
    fixed, streamed = {
        "forward": (p, p + r),
        "tangent": (2 * p, 2 * (p + r)),
        "gu": (p + r, p + r),
        "gk": (p + r, p + r),
    }[kernel]
    shared = 2 * (ROWS * config.groups * fixed + config.stages * config.columns * (streamed + 4))
    products, sums = {
        "forward": (1, r),
        "tangent": (3, r),
        "gu": (2, p),
        "gk": (2, p + r if p + r <= WIDEST else max(p, r)),
    }[kernel]
    registers = (products * config.columns + sums) // 2
    return shared <= SHARED_BYTES and registers <= REGISTERS.get(config.groups, (240, 0))[0] - 60
