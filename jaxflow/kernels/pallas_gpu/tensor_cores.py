"""Many channels: kernels on the tensor cores of any NVIDIA GPU since Ampere, by Triton.

With t_ij = log2(e) s_ij over the visible pairs and p_ij = 2^(t_ij - lse_i) from the log-partition,

    forward    a fold over key blocks of (shift, sum_j 2^(t_ij - shift), sum_j 2^(t_ij - shift) v_j)
    tangent    sum_j p_ij (dv_j + ds_ij v_j),  sum_j p_ij ds_ij,   ds = <du, k> + <u, dk> + db
    rows       gu_i = sum_j w_ij k_j,   w_ij = p_ij (<g_i, v_j> - centre_i)
    columns    gk_j = sum_i w_ij u_i,  gv_j = sum_i p_ij g_i,  gb_j = sum_i w_ij

as FlashAttention-2 (Dao 2023) does it: a block of queries stays in registers while blocks of keys
pass (for `columns` the other way round), weights are rounded to the operands' dtype between two
products, sums are float32. A float32 product is three TF32 products, which keep about 21 bits.

Blocks of pairs outside the band are never visited; only blocks on its rim are masked. JAX has
deprecated Pallas on Triton since 0.11: this file serves what the Mosaic GPU kernels refuse and goes
with it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..._types import accumulation_dtype
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
    finite,
    vanishing,
)
from .family import AbstractFamily, exp2


@dataclasses.dataclass(frozen=True)
class Config:
    """Queries and keys of a tile of scores, warps of a block, loads in flight.

    Where keys stay in registers and queries pass, `rows` are keys and `keys` are queries.
    """

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of an m x n matrix of scores that a kernel visits, all but the band's rim unmasked.

    Tiles cover the matrix exactly: padding weighs nothing without a mask.
    """

    m: int
    n: int
    band: Band
    config: Config
    interpret: bool

    @property
    def transposed(self) -> "Tiles":
        """With keys as rows, and queries as what passes them."""
        return dataclasses.replace(self, m=self.n, n=self.m, band=self.band[::-1])

    def mask(self, row, column, scores):
        """Scores of the tile that starts at (row, column), -inf outside the band."""
        i = row + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        j = column + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        left, right = self.band
        if left is not None:
            scores = jnp.where(j >= i - left, scores, -jnp.inf)
        if right is not None:
            scores = jnp.where(j <= i + right, scores, -jnp.inf)
        return scores

    def over_columns(self, row, step: Callable, init):
        """Folds step(column, masked, carry) over the key blocks that the queries from `row` see;
        transposed, over the query blocks that see the keys from `row`."""
        left, right = self.band
        first = None if left is None else row - left
        last = None if right is None else row + self.config.rows - 1 + right
        # Every query of the block sees the keys from `whole` to `until`.
        whole = None if left is None else row + self.config.rows - 1 - left
        until = None if right is None else row + right
        return _sweep(self.config.keys, self.n, first, whole, until, last, step, init)

    def exp2(self, x):
        """Without assembly Triton's exp2 spends three more instructions on subnormal numbers."""
        return jnp.exp2(x) if self.interpret else exp2(x)

    def dot(self, x, y, axes: tuple[int, int]):
        """The product of two blocks over these axes, accumulated in float32."""
        precision = None if x.dtype.itemsize == 2 else jax.lax.Precision.HIGHEST
        if x.dtype == jnp.float32 and not self.interpret:
            precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return jax.lax.dot_general(
            x,
            y,
            ((axes[:1], axes[1:]), ((), ())),
            precision=precision,
            preferred_element_type=accumulation_dtype(x.dtype),
        )


def _sweep(block, length, first, whole, until, last, step, init):
    """Blocks that touch [first, last], unmasked where they lie in [whole, until]."""
    blocks = length // block
    start = 0 if first is None else jnp.clip(first // block, 0, blocks)
    stop = blocks if last is None else jnp.clip(last // block + 1, 0, blocks)
    inner = start if whole is None else jnp.clip(-(-whole // block), start, stop)
    outer = stop if until is None else jnp.clip((until + 1) // block, inner, stop)
    run = lambda masked: lambda j, carry: step(j * block, masked, carry)
    if whole is not None:
        init = jax.lax.fori_loop(start, inner, run(True), init)
    init = jax.lax.fori_loop(inner, outer, run(False), init)
    if until is not None:
        init = jax.lax.fori_loop(outer, stop, run(True), init)
    return init


# ------------------------------------------------------------------ the kernels
# References to arrays by name; where no key has a weight db is absent, and b too without padding.


def _scores(tiles, masked, row, column, q, k, b, scale):
    s = scale * tiles.dot(q, k, axes=(1, 1))
    if b is not None:
        s += b if b.ndim == 2 else b[None, :]
    return tiles.mask(row, column, s) if masked else s


def _part(tiles, column, *refs) -> list[Any]:
    part = pl.ds(column, tiles.config.keys)
    return [None if ref is None else ref[0, part] for ref in refs]


def _forward_kernel(tiles, *, q, k, v, scale, mean, lse, b=None):
    rows, dtype = tiles.config.rows, lse.dtype
    row, queries, beta = pl.program_id(0) * rows, q[0], scale[0]

    def step(column, masked, carry):
        shift, z, total = carry
        kj, vj, bj = _part(tiles, column, k, v, b)
        s = _scores(tiles, masked, row, column, queries, kj, bj, beta)
        new = jnp.maximum(shift, s.max(axis=1))
        finite = jnp.where(new == -jnp.inf, 0, new)
        weights = tiles.exp2(s - finite[:, None])
        old = tiles.exp2(shift - finite)
        total = total * old[:, None] + tiles.dot(weights.astype(vj.dtype), vj, axes=(1, 0))
        return new, z * old + weights.sum(axis=1), total

    start = jnp.zeros((rows, v.shape[2]), dtype)
    init = jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype), start
    shift, z, total = tiles.over_columns(row, step, init)
    empty = z == 0
    z = jnp.where(empty, 1, z)
    mean[0] = (total / z[:, None]).astype(mean.dtype)
    lse[0] = jnp.where(empty, -jnp.inf, (shift + jnp.log2(z)) / LOG2E)


def _tangent_kernel(tiles, *, q, du, lse, k, dk, v, dv, scale, total, dlse, b=None, db=None):
    rows, dtype = tiles.config.rows, lse.dtype
    row, queries, moves, shift = pl.program_id(0) * rows, q[0], du[0], lse[0][:, None]
    beta = scale[0]

    def step(column, masked, carry):
        sums, dz = carry
        kj, dkj, vj, dvj, bj, dbj = _part(tiles, column, k, dk, v, dv, b, db)
        p = tiles.exp2(_scores(tiles, masked, row, column, queries, kj, bj, beta) - shift)
        ds = (beta / LOG2E) * tiles.dot(queries, dkj, axes=(1, 1))
        ds += tiles.dot(moves, kj, axes=(1, 1))
        if dbj is not None:
            ds += dbj[None, :]
        pds = p * ds
        sums += tiles.dot(p.astype(vj.dtype), dvj, axes=(1, 0))
        sums += tiles.dot(pds.astype(vj.dtype), vj, axes=(1, 0))
        return sums, dz + pds.sum(axis=1)

    init = jnp.zeros((rows, v.shape[2]), dtype), jnp.zeros(rows, dtype)
    total[0], dlse[0] = tiles.over_columns(row, step, init)


def _rows_kernel(tiles, *, q, g, lse, centre, k, v, scale, gu, b=None):
    row, queries, cotangents = pl.program_id(0) * tiles.config.rows, q[0], g[0]
    shift, middle, beta = lse[0][:, None], centre[0][:, None], scale[0]

    def step(column, masked, total):
        kj, vj, bj = _part(tiles, column, k, v, b)
        p = tiles.exp2(_scores(tiles, masked, row, column, queries, kj, bj, beta) - shift)
        w = p * (tiles.dot(cotangents, vj, axes=(1, 1)) - middle)
        return total + tiles.dot(w.astype(kj.dtype), kj, axes=(1, 0))

    gu[0] = tiles.over_columns(row, step, jnp.zeros(gu.shape[1:], gu.dtype))


def _columns_kernel(tiles, *, q, g, lse, centre, k, v, scale, gk, gv, gb, b=None):
    # A key a row: so the weights leave one product as they enter the next. The other way round
    # each thread would take every exponential two to four times.
    tiles = tiles.transposed
    row, keys, values = pl.program_id(0) * tiles.config.rows, k[0], v[0]
    bias, beta, dtype = None if b is None else b[0][:, None], scale[0], lse.dtype

    def step(column, masked, carry):
        sum_k, sum_v, sum_b = carry
        queries, cotangents, shift, middle = _part(tiles, column, q, g, lse, centre)
        s = _scores(tiles, masked, row, column, keys, queries, bias, beta)
        p = tiles.exp2(s - shift[None, :])
        w = p * (tiles.dot(values, cotangents, axes=(1, 1)) - middle[None, :])
        sum_k += tiles.dot(w.astype(keys.dtype), queries, axes=(1, 0))
        sum_v += tiles.dot(p.astype(values.dtype), cotangents, axes=(1, 0))
        return sum_k, sum_v, sum_b + w.sum(axis=1)

    init = tuple(jnp.zeros(ref.shape[1:], dtype) for ref in (gk, gv, gb))
    sum_k, sum_v, gb[0] = tiles.over_columns(row, step, init)
    gk[0] = ((beta / LOG2E) * sum_k).astype(gk.dtype)
    gv[0] = sum_v.astype(gv.dtype)


# ------------------------------------------------------------------ the operation


@dataclasses.dataclass(frozen=True)
class TensorCores(AbstractFamily):
    """The kernels of this file; with a `small_memory` of 99 KiB a block, wide tiles are smaller."""

    small_memory: bool = False
    config: Config | None = None
    interpret: bool = False

    name: ClassVar[str] = "tensor_cores"

    def forward(self, operands: Forward, problem: Problem) -> Results:
        q, k, v, b, scale = operands
        outs = {"mean": ("m", v.shape[-1], v.dtype), "lse": ("m", None, b.dtype)}
        keys = {"k": (k, 0), "v": (v, 0)} | _weights(problem, b)
        call = partial(self._call, "forward", problem.band)
        return call(_forward_kernel, {"q": (q, 0)}, keys, scale, outs)

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        q, k, v, b, scale, mean, lse, du, dk, dv, _ = operands
        rows = {"q": (q, 0), "du": (du.astype(k.dtype), 0), "lse": (LOG2E * finite(lse), 0)}
        keys = {"k": (k, 0), "dk": (dk, 0), "v": (v, 0), "dv": (dv, 0)} | _weights(problem, b)
        if problem.weighted:
            keys["db"] = operands.moving_db, 0
        outs = {"total": ("m", v.shape[-1], b.dtype), "dlse": ("m", None, b.dtype)}
        call = partial(self._call, "tangent", problem.band)
        total, dlse = call(_tangent_kernel, rows, keys, scale, outs)
        return (total - dlse[..., None] * mean.astype(b.dtype)).astype(v.dtype), dlse

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        q, k, v, b, scale, _, lse, g, _ = operands
        dtype = b.dtype
        # A query without a visible key weighs nothing, like padding; its rows are all masked.
        away = vanishing(LOG2E * lse)
        rows: dict[str, Any] = {"q": (q, 0), "g": (g, 0), "lse": (LOG2E * finite(lse), 0)}
        rows["centre"] = operands.centre, 0
        keys = {"k": (k, 0), "v": (v, 0)} | _weights(problem, b)
        outs: dict[str, Any] = {"gu": ("m", q.shape[-1], dtype)}
        (gu,) = self._call("gu", problem.band, _rows_kernel, rows, keys, scale, outs)
        outs = {
            "gk": ("n", k.shape[-1], k.dtype),
            "gv": ("n", v.shape[-1], v.dtype),
            "gb": ("n", None, dtype),
        }
        rows["lse"] = away, jnp.inf
        gk, gv, gb = self._call("gk", problem.band, _columns_kernel, rows, keys, scale, outs)
        return gu, gk, gv, gb

    def candidates(self, mode: Mode, shapes: Shapes) -> Sequence[Config | None]:
        # None fits each kernel of a mode.
        tiles = [(r, c) for r in (32, 64, 128) for c in (16, 32, 64, 128)]
        return [None, *(Config(*tile, w, s) for tile in tiles for w in (4, 8) for s in (2, 3))]

    def _call(self, kernel: str, band: Band, body, rows, keys, scale, outs) -> Results:
        """Runs a kernel on a grid over blocks of its outputs' tokens: "m" queries or "n" keys.

        `rows` and `keys` hold operands (batch, tokens[, channels]) with what pads their tokens,
        `outs` the outputs' tokens, channels and dtype.
        """
        from jax.experimental.pallas import triton  # JAX will remove it

        q, k, r = rows["q"][0], keys["k"][0], keys["v"][0].shape[-1]
        (batch, m, p), n = q.shape, k.shape[1]
        (over,) = {axis for axis, _, _ in outs.values()}
        sizes, config = (m, n) if over == "m" else (n, m), self.config
        if config is None:
            config = default_config(
                kernel, *sizes, max(p, r), q.dtype, small_memory=self.small_memory
            )
        blocks = dict(zip("mn" if over == "m" else "nm", (config.rows, config.keys), strict=True))
        lengths = {"m": _up(m, blocks["m"]), "n": _up(n, blocks["n"])}
        if over == "m" and n != lengths["n"] and "b" not in keys:
            # A loop of its own for the last keys costs registers, up to 18 KB a thread of spills.
            zeros = jnp.zeros((batch, n), accumulation_dtype(q.dtype))
            keys = keys | {"b": (zeros, -jnp.inf)}
        tiles = Tiles(lengths["m"], lengths["n"], band, config, self.interpret)

        def spec(axis, channels):
            whole = () if channels is None else (channels,)
            tail = (0,) * len(whole)
            if axis == over:
                return pl.BlockSpec((1, blocks[axis], *whole), lambda i, b: (b, i, *tail))
            return pl.BlockSpec((1, lengths[axis], *whole), lambda i, b: (b, 0, *tail))

        operands, specs = {}, {}
        for axis, named in (("m", rows), ("n", keys)):
            for name, (a, fill) in named.items():
                operands[name] = _padded(a, lengths[axis], fill)
                specs[name] = spec(axis, *operands[name].shape[2:] or (None,))
        operands["scale"], specs["scale"] = LOG2E * scale, pl.BlockSpec((1,), lambda i, b: (b,))
        names = [*operands, *outs]
        widths = {
            name: () if c is None else (_power_of_two(c),) for name, (_, c, _) in outs.items()
        }
        found = pl.pallas_call(
            lambda *refs: body(tiles, **dict(zip(names, refs, strict=True))),
            grid=(lengths[over] // blocks[over], batch),
            in_specs=[specs[name] for name in operands],
            out_specs=[spec(axis, *widths[name] or (None,)) for name, (axis, _, _) in outs.items()],
            out_shape=[
                jax.ShapeDtypeStruct((batch, lengths[over], *widths[name]), dtype)
                for name, (_, _, dtype) in outs.items()
            ],
            compiler_params=triton.CompilerParams(num_warps=config.warps, num_stages=config.stages),
            interpret=self.interpret,
            name=f"jaxflow{body.__name__}",
        )(*operands.values())
        tokens = {"m": m, "n": n}[over]
        cut = lambda a, c: a[:, :tokens] if c is None else a[:, :tokens, :c]
        return tuple(cut(a, c) for a, (_, c, _) in zip(found, outs.values(), strict=True))


def _weights(problem: Problem, b):
    return {"b": (LOG2E * b, -jnp.inf)} if problem.weighted else {}


def _padded(a, length, fill):
    widths = [(0, 0), (0, length - a.shape[1])]
    if a.ndim == 3:
        widths.append((0, _power_of_two(a.shape[2]) - a.shape[2]))
    return jnp.pad(a, widths, constant_values=fill)


def _power_of_two(size: int) -> int:
    """Triton's tiles are powers of two, and a tensor core takes 16 channels at least."""
    return max(16, 1 << (size - 1).bit_length())


def _up(length: int, block: int) -> int:
    return block * -(-length // block)


# Tiles by the bytes of an operand and the channels up to a limit: of those whose registers ptxas
# does not spill in the loop (compute capability 8.0 and 9.0) the one with the fewest instructions a
# pair. At 256 channels of float32 every tile spills; these the least.
TILES = {
    ("forward", 2): {128: Config(128, 64, 8), 256: Config(32, 32)},
    ("tangent", 2): {64: Config(128, 64, 8), 128: Config(64, 32), 256: Config(32, 32)},
    ("gu", 2): {256: Config(64, 32)},
    ("gk", 2): {128: Config(64, 32), 256: Config(32, 32)},
    ("forward", 4): {
        16: Config(64, 64),
        64: Config(64, 32),
        128: Config(32, 32),
        256: Config(16, 16, warps=8),
    },
    ("tangent", 4): {
        32: Config(64, 32),
        64: Config(32, 32),
        128: Config(32, 16),
        256: Config(16, 16),
    },
    ("gu", 4): {
        32: Config(64, 32),
        64: Config(32, 32),
        128: Config(32, 16),
        256: Config(16, 16, warps=8),
    },
    ("gk", 4): {
        32: Config(64, 32),
        64: Config(32, 32),
        128: Config(16, 32),
        256: Config(16, 16, stages=1),
    },
}


def default_config(
    kernel: str, kept: int, passing: int, channels: int, dtype, *, small_memory: bool = False
) -> Config:
    """For "forward", "tangent", "gu" (the cotangent over keys) or "gk" (over queries), by the
    number of tokens that blocks keep and that pass them."""
    row = channels * jnp.dtype(dtype).itemsize  # bytes
    tiles = TILES[kernel, min(jnp.dtype(dtype).itemsize, 4)]
    config = tiles[min((c for c in tiles if channels <= c), default=max(tiles))]
    rows, keys = min(config.rows, _power_of_two(kept)), min(config.keys, _power_of_two(passing))
    config = dataclasses.replace(config, rows=rows, keys=keys)
    if small_memory and row > 512:
        return dataclasses.replace(config, stages=1)
    if small_memory and row > 256:
        return dataclasses.replace(config, rows=max(16, rows // 2))
    return config
