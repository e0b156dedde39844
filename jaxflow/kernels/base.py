"""The contract: three functions of named operands, and what the backends share.

With s_ij = scale <q_i, k_j> + b_j over the keys j that query i sees, p_ij = exp(s_ij - lse_i) and
u = scale q, a backend has

    forward    (q, k, v, b, scale)                              -> mean, lse
    tangent    (q, k, v, b, scale, mean, lse; du, dk, dv, db)   -> dmean, dlse
    cotangent  (q, k, v, b, scale, mean, lse; g, h)             -> gu, gk, gv, gb

    lse_i = logsumexp_j s_ij,                        mean_i = sum_j p_ij v_j
    dlse_i = sum_j p_ij ds_ij,                       ds_ij = <du_i, k_j> + <u_i, dk_j> + db_j
    dmean_i = sum_j p_ij (dv_j + ds_ij v_j) - dlse_i mean_i
    gu_i = sum_j w_ij k_j,  gk_j = sum_i w_ij u_i,   w_ij = p_ij (<g_i, v_j> - <g_i, mean_i> + h_i)
    gv_j = sum_i p_ij g_i,  gb_j = sum_i w_ij

tangent and cotangent are linear in what follows the semicolon and each other's transpose: exchange
the sums in <g, dmean> + h dlse. A query that sees no key has mean 0 and lse -inf.

All operands have the same leading batch axes, any number of them. q, k, v, mean, dk, dv and g have
one dtype; b, scale, lse, du, db and h the dtype of sums (`accumulation_dtype`), and so has gu.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..masks import AbstractPattern, TopK
from ..masks import Window as Within

LOG2E = math.log2(math.e)
# Stands for -inf where that would become nan, in a matrix product or a difference. Log-weights
# below 1e-5 of it are -inf from the start, so that no score of a visible key comes near it.
MASKED = -1e30

# Keys j with i - left <= j <= i + right are visible to query i; None is no limit.
Band = tuple[int | None, int | None]
Distance = int | np.integer
Window = Distance | tuple[Distance, Distance] | None
Mode = Literal["forward", "tangent", "cotangent"]
MODES: tuple[Mode, ...] = ("forward", "tangent", "cotangent")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel is compiled for, beside shapes and dtypes."""

    band: Band = (None, None)
    weighted: bool = True  # without, b = 0
    constant_scale: float | None = None  # a scale that is a Python number, of 16-bit operands
    mean_only: bool = False  # the log-partition has no cotangent
    mask: AbstractPattern | TopK | None = None  # of the keys in the band
    partial: bool = False  # the keys are some of those that the log-partition is of

    @property
    def all_pairs(self) -> bool:
        """Whether every query sees every key, so that the index of a query means nothing."""
        return self.band == (None, None) and self.mask is None


# ------------------------------------------------------------------ operands


class Shapes(NamedTuple):
    """Queries, keys and values, of which shape and dtype matter: arrays, or what describes them."""

    q: Any
    k: Any
    v: Any

    @property
    def channels(self) -> int:
        """The most that an operand has."""
        return max(self.q.shape[-1], self.v.shape[-1])


class Forward(NamedTuple):
    """The operands of the forward function."""

    q: Array  # (*batch, m, p)
    k: Array  # (*batch, n, p)
    v: Array  # (*batch, n, r)
    b: Array  # (*batch, n): log-weights
    scale: Array  # (*batch,)


class Tangent(NamedTuple):
    """The operands of the tangent: those of the forward function, its results, directions."""

    q: Array
    k: Array
    v: Array
    b: Array
    scale: Array
    mean: Array  # (*batch, m, r)
    lse: Array  # (*batch, m)
    du: Array  # (*batch, m, p)
    dk: Array  # (*batch, n, p)
    dv: Array  # (*batch, n, r)
    db: Array  # (*batch, n)

    @property
    def moving_db(self) -> Array:
        """db, but that a key of weight zero moves nothing."""
        return jnp.where(jnp.isneginf(self.b), 0, self.db)


class Cotangent(NamedTuple):
    """The operands of the cotangent: those of the forward function, its results, g and h."""

    q: Array
    k: Array
    v: Array
    b: Array
    scale: Array
    mean: Array  # (*batch, m, r)
    lse: Array  # (*batch, m)
    g: Array  # (*batch, m, r): of the mean
    h: Array  # (*batch, m): of the log-partition

    @property
    def centre(self) -> Array:
        """<g_i, mean_i> - h_i: what w subtracts from <g_i, v_j>."""
        dtype = self.b.dtype
        return (self.g.astype(dtype) * self.mean.astype(dtype)).sum(axis=-1) - self.h


Operands = Forward | Tangent | Cotangent
Results = tuple[Array, ...]


# ------------------------------------------------------------------ the contract


class AbstractFunctions(abc.ABC):
    """The three functions."""

    @abc.abstractmethod
    def forward(self, operands: Forward, problem: Problem) -> Results:
        """(mean, lse)."""

    @abc.abstractmethod
    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        """(dmean, dlse); db is 0 where the problem has no weights, and need not be read."""

    @abc.abstractmethod
    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        """(gu, gk, gv, gb); gb may be anything where the problem has no weights."""


class AbstractBackend(AbstractFunctions):
    """A way to compute the three functions.

    A backend serves every band, weights or none, and any batch, or refuses. It is asked for masks
    only where the registry says that it takes them.
    """

    @abc.abstractmethod
    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        """Why one of the functions cannot run on these operands; None if it can."""

    @abc.abstractmethod
    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        """What runs one of the functions on these operands, in words."""


def evaluate(functions: AbstractFunctions, operands: Operands, problem: Problem) -> Results:
    """The function that takes these operands."""
    if isinstance(operands, Forward):
        return functions.forward(operands, problem)
    if isinstance(operands, Tangent):
        return functions.tangent(operands, problem)
    return functions.cotangent(operands, problem)


# ------------------------------------------------------------------ which pairs count


def band(causal, window) -> Band:
    """The band of visible keys that the two options of a user mean.

    **Raises:** `TypeError` for a `causal` that is not a Boolean, `ValueError` for a window that is
    no distance or pair of them.
    """
    if not isinstance(causal, bool | np.bool_):
        raise TypeError(f"causal must be True or False, got {causal!r}.")
    if window is None:
        return None, 0 if causal else None
    pair = tuple(window) if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2 or not all(_distance(w) for w in pair):
        raise ValueError(
            "window must be a non-negative integer or a pair of them, the keys seen to the left "
            f"and to the right of the query; got {window!r}."
        )
    # Indices are 32-bit integers, and no array is as long as that.
    left, right = (min(int(w), 2**30) for w in pair)
    return left, 0 if causal else right


def _distance(w) -> bool:
    return isinstance(w, int | np.integer) and not isinstance(w, bool) and int(w) >= 0


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


def pairs_of(band: Band, mask: AbstractPattern | TopK | None) -> AbstractPattern | None:
    """The pairs that the band and the mask leave, as one pattern; None where that is the band's
    own business."""
    pattern = mask.among if isinstance(mask, TopK) else mask
    return pattern if pattern is None or band == (None, None) else pattern & Within(*band)


# ------------------------------------------------------------------ pieces


def inner_products(x: Float[Array, "m p"], y: Float[Array, "n p"]) -> Float[Array, "m n"]:
    """<x_i, y_j>, in full precision also where the platform's default is TF32 or bf16."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def finite(x: Array) -> Array:
    """A row without a visible key has log-partition -inf and only zero weights."""
    return jnp.where(jnp.isneginf(x), 0.0, x)


def vanishing(lse: Array) -> Array:
    """Of log-partitions: exp(s - lse) is then 0 also in rows without a visible key."""
    return jnp.where(jnp.isneginf(lse), jnp.inf, lse)


def known_shift(
    u: Array, k: Array, v: Array, b: Array, problem: Problem, log: Callable[[float], float]
) -> tuple[Array, Array]:
    """One shift c for all scores of a system, and whether the weights exp(s_ij - c) need no other.

    |s_ij - b_j| <= |u_i| max_j |k_j|, so with c in the middle of the log-weights all weights lie in
    [e^-h, e^h]. Sums of n products with values must not overflow, and products with small values
    (|v| < 1e-4, say) must not become subnormal, which some devices take for zero: that is the
    margin beside h. `log` is the logarithm in the unit of the scores, `math.log` or `math.log2`.
    """
    half_span = jnp.linalg.norm(u, axis=-1).max(axis=-1) * jnp.linalg.norm(k, axis=-1).max(axis=-1)
    shift = jnp.zeros_like(half_span)
    if problem.weighted:
        top = b.max(axis=-1)
        bottom = jnp.where(jnp.isneginf(b), top[..., None], b).min(axis=-1)
        shift, half_span = (top + bottom) / 2, half_span + (top - bottom) / 2
    margin = math.log(k.shape[-2]) + jnp.abs(jnp.log(jnp.abs(v).max(axis=(-2, -1))))
    room = 0.9 * log(float(jnp.finfo(b.dtype).max))
    # Of sums and values that are not finite nothing is known.
    return shift, jnp.isfinite(shift) & (half_span + margin * log(math.e) < room)


def pad(a: Array, length: int, fill: float | int = 0.0, *, axis: int) -> Array:
    """Up to this length along an axis."""
    if a.shape[axis] == length:
        return a
    widths = [(0, 0)] * a.ndim
    widths[axis] = 0, length - a.shape[axis]
    return jnp.pad(a, widths, constant_values=fill)


def on_one_batch_axis(
    fn: Callable[[Any, Problem], Results], operands: Operands, problem: Problem
) -> Results:
    """fn(operands, problem), for functions that take exactly one batch axis."""
    batch = operands.scale.shape
    flat = (a.reshape((math.prod(batch), *a.shape[len(batch) :])) for a in operands)
    outs = fn(type(operands)(*flat), problem)
    return tuple(a.reshape((*batch, *a.shape[1:])) for a in outs)
