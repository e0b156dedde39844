"""Fields whose parameters move in time.

    TimeDependent(curve)   X_t[mu](x) = F_{theta(t)}[mu](x),    theta(t) = curve.at(t)

    Constant           theta(t) = theta                                one block, weights shared
    PiecewiseConstant  theta(t) = theta_l for t_l <= t < t_{l+1}       layers
    PiecewiseLinear    interpolates theta_l at t_l
    Fourier            theta_0 + sum_k theta_{2k-1} cos(w k t) + theta_{2k} sin(w k t)
    Legendre           sum_k theta_k P_k(2 (t - t0)/(t1 - t0) - 1)
    HyperNetwork       theta + A MLP(embedding of t)

A curve is made of fields: of each, every floating-point array is a parameter, and the rest is the
same in all. Where a curve or its slope jumps, `flow` ends a step; steps at times of your own, as
those of a `models.Depth` with `steps`, must end at the jumps of the curve alone.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._types import ArrayLike, ScalarLike, is_concrete
from .base import AbstractDivergenceField, AbstractField, divergence


class AbstractCurve(eqx.Module):
    """t -> a field."""

    @property
    @abc.abstractmethod
    def breakpoints(self) -> tuple[float, ...]:
        """The times at which the parameters or their slopes jump."""

    @property
    def jumps(self) -> tuple[float, ...]:
        """Those of the breakpoints at which the parameters jump; all, unless overridden."""
        return self.breakpoints

    @abc.abstractmethod
    def at(self, t: ScalarLike) -> AbstractField:
        """The field at time t, frozen."""


class AbstractLinearCurve(AbstractCurve):
    """theta(t) = sum_k w_k(t) theta_k, with coefficients theta_k stacked in a field."""

    coefficients: eqx.AbstractVar[AbstractField]

    @abc.abstractmethod
    def weights(self, t: ScalarLike) -> Float[Array, " k"]:
        """w_k(t)."""


class TimeDependent(AbstractDivergenceField):
    """X_t[mu](x) = F_{theta(t)}[mu](x), theta a curve.

    `.at(t)` gives the field F_{theta(t)}, frozen at that time. A curve of sums is a sum of curves:
    splitting methods step with each part.
    """

    curve: AbstractCurve

    def __init__(self, curve: AbstractCurve):
        if not isinstance(curve, AbstractCurve):
            raise TypeError(
                "TimeDependent takes a curve, such as jaxflow.PiecewiseConstant(fields, ts); got "
                f"{type(curve).__name__}."
            )
        self.curve = curve

    @property
    def geometry(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        # Any time does: a geometry is the same at all. Few hold arrays, which need real parameters.
        found = eqx.filter_eval_shape(self.curve.at, 0.0).geometry
        return self.curve.at(0.0).geometry if jax.tree.leaves(found) else found

    @property
    def parts(self):
        count = len(eqx.filter_eval_shape(lambda curve: curve.at(0.0).parts, self.curve))
        if count == 1:
            return (self,)
        return tuple(TimeDependent(_Part(self.curve, k)) for k in range(count))

    def at(self, t: ScalarLike) -> AbstractField:
        return self.curve.at(t)

    def __call__(self, t, x, mu):
        return self.at(t)(t, x, mu)

    def divergence(self, t, x, mu):
        return divergence(self.at(t), t, x, mu)

    def keys_values(self, t, y, start=0):
        return self.at(t).keys_values(t, y, start)

    def attend(self, t, x, keys_values, index):
        return self.at(t).attend(t, x, keys_values, index)


# ------------------------------------------------------------------ curves


class Constant(AbstractCurve):
    """theta(t) = theta: the same block at every depth, as in ALBERT (arXiv 1909.11942)."""

    field: AbstractField

    @property
    def breakpoints(self):
        return ()

    def at(self, t):
        return self.field


class PiecewiseConstant(AbstractLinearCurve):
    """theta(t) = theta_l for t_l <= t < t_{l+1}: the layers of a transformer.

    With Euler's method and one step a piece the flow is the residual network
    x <- x + (t_{l+1} - t_l) F_l[mu](x).

    **Arguments:**

    - `fields`: L fields of one structure.
    - `ts`: the L + 1 edges of the pieces, increasing; or the L - 1 of them that are inside. The
      first and last piece extend to all earlier and later times.
    """

    coefficients: AbstractField
    ts: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, fields: Sequence[AbstractField], ts: ArrayLike):
        self.coefficients = stack(fields)
        ts = _times(ts)
        if len(ts) == len(fields) + 1:
            ts = ts[1:-1]
        if len(ts) != len(fields) - 1:
            raise ValueError(
                f"{len(fields)} pieces have {len(fields) + 1} edges, or {len(fields) - 1} inside; "
                f"got {len(ts)} times."
            )
        self.ts = ts

    @property
    def breakpoints(self):
        return self.ts

    def _piece(self, t):
        t = _time(t)
        return jnp.searchsorted(jnp.asarray(self.ts, t.dtype), t, side="right")

    def weights(self, t):
        return jax.nn.one_hot(self._piece(t), len(self.ts) + 1)

    def at(self, t):
        # Not by the weights: one piece is read, not all.
        piece = self._piece(t)
        read = lambda a: jax.lax.dynamic_index_in_dim(a, piece, keepdims=False)
        return _map(read, self.coefficients)


class PiecewiseLinear(AbstractLinearCurve):
    """theta(t) interpolates theta_l at t_l, and is constant before the first and after the last.

    **Arguments:** `fields`: L fields of one structure; `ts`: L increasing times.
    """

    coefficients: AbstractField
    ts: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, fields: Sequence[AbstractField], ts: ArrayLike):
        self.coefficients = stack(fields)
        self.ts = _times(ts)
        if len(self.ts) != len(fields):
            raise ValueError(f"one time a field: got {len(self.ts)} for {len(fields)} fields.")

    @property
    def breakpoints(self):
        return self.ts

    @property
    def jumps(self):
        return ()

    def weights(self, t):
        t = _time(t)
        nodes, hats = jnp.asarray(self.ts, t.dtype), jnp.eye(len(self.ts), dtype=t.dtype)
        return jax.vmap(lambda hat: jnp.interp(t, nodes, hat))(hats)

    def at(self, t):
        return _combine(self.weights(t), self.coefficients)


class Fourier(AbstractLinearCurve):
    """theta(t) = theta_0 + sum_{k>=1} theta_{2k-1} cos(2 pi k t/T) + theta_{2k} sin(2 pi k t/T).

    **Arguments:** `fields`: an odd number of fields of one structure, whose arrays are the
    coefficients in that order; `period`: T.
    """

    coefficients: AbstractField
    period: float = eqx.field(static=True)

    def __init__(self, fields: Sequence[AbstractField], period: float):
        if len(fields) % 2 == 0:
            raise ValueError(
                "a Fourier curve has a constant and pairs (cos, sin), so an odd number of fields; "
                f"got {len(fields)}."
            )
        if not period > 0:
            raise ValueError(f"the period must be positive, got {period}.")
        self.coefficients = stack(fields)
        self.period = float(period)

    @property
    def breakpoints(self):
        return ()

    def weights(self, t):
        orders = jnp.arange(1, _count(self.coefficients) // 2 + 1)
        phase = 2 * jnp.pi * (_time(t) / self.period)
        angles = orders.astype(phase.dtype) * phase
        waves = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1).reshape(-1)
        return jnp.concatenate([jnp.ones(1, waves.dtype), waves])

    def at(self, t):
        return _combine(self.weights(t), self.coefficients)


class Legendre(AbstractLinearCurve):
    """theta(t) = sum_k theta_k P_k(s), s = 2 (t - t0)/(t1 - t0) - 1, P_k the Legendre polynomials.

    **Arguments:** `fields`: fields of one structure, whose arrays are the coefficients; `t0`, `t1`:
    the interval on which the polynomials are orthogonal.
    """

    coefficients: AbstractField
    t0: float = eqx.field(static=True)
    t1: float = eqx.field(static=True)

    def __init__(self, fields: Sequence[AbstractField], t0: float, t1: float):
        self.coefficients = stack(fields)
        self.t0, self.t1 = _times([t0, t1])

    @property
    def breakpoints(self):
        return ()

    def weights(self, t):
        s = 2 * (_time(t) - self.t0) / (self.t1 - self.t0) - 1
        # (k + 1) P_{k+1} = (2k + 1) s P_k - k P_{k-1}
        values = [jnp.ones_like(s), s]
        for k in range(1, _count(self.coefficients)):
            values.append(((2 * k + 1) * s * values[k] - k * values[k - 1]) / (k + 1))
        return jnp.stack(values[: _count(self.coefficients)])

    def at(self, t):
        return _combine(self.weights(t), self.coefficients)


class HyperNetwork(AbstractCurve):
    """theta(t) = theta + A h(t), h a perceptron of a sinusoidal embedding of t.

    The weights of each block come from one network of time, as in the neural ODE transformers of
    Tong et al. (ICLR 2025). There A has a row for each entry of theta. With `rank` a matrix moves
    by U diag(A h(t)) V^T instead, and the number of parameters does not grow with the embedding
    times the square of the dimension.

    **Arguments:**

    - `field`: theta, the field at the start of training (A = 0).
    - `width`, `depth`: of the perceptron, `depth` hidden layers; `width` is the length of h.
    - `embedding`: the number of sinusoids, frequencies 1 to 1000 spaced evenly in logarithm.
    - `t1`: the time that counts as 1 in the embedding.
    - `rank`: of the moving part of a matrix; `None` moves every entry on its own.
    - `key`: PRNG key.
    """

    base: AbstractField
    network: eqx.nn.MLP
    heads: tuple
    embedding: int = eqx.field(static=True)
    t1: float = eqx.field(static=True)

    def __init__(
        self,
        field: AbstractField,
        *,
        width: int = 64,
        depth: int = 1,
        embedding: int = 32,
        t1: float = 1.0,
        rank: int | None = None,
        key: PRNGKeyArray,
    ):
        if embedding < 2 or embedding % 2:
            raise ValueError(f"embedding must be even and at least 2, got {embedding}.")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1 or None, got {rank}.")
        leaves = jtu.tree_leaves(eqx.filter(field, eqx.is_inexact_array))
        network_key, *keys = jax.random.split(key, len(leaves) + 1)
        self.base = field
        self.network = eqx.nn.MLP(
            embedding, width, width, depth, jax.nn.silu, jax.nn.silu, key=network_key
        )
        self.heads = tuple(
            _Full(a, width) if rank is None or a.ndim < 2 else _LowRank(a, width, rank, key=k)
            for a, k in zip(leaves, keys, strict=True)
        )
        self.embedding = embedding
        self.t1 = float(t1)

    @property
    def breakpoints(self):
        return ()

    def at(self, t):
        dtype = self.network.layers[0].weight.dtype
        angles = jnp.logspace(0, 3, self.embedding // 2, dtype=dtype) * (_time(t) / self.t1).astype(
            dtype
        )
        arrays, rest = eqx.partition(self.base, eqx.is_inexact_array)
        leaves, structure = jtu.tree_flatten(arrays)
        with jax.default_matmul_precision("highest"):
            hidden = self.network(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]))
            moved = [
                a + head(hidden).reshape(a.shape).astype(a.dtype)
                for a, head in zip(leaves, self.heads, strict=True)
            ]
        return eqx.combine(jtu.tree_unflatten(structure, moved), rest)


class _Piece(AbstractCurve):
    """A curve on the piece between two jumps that holds a given time."""

    curve: AbstractCurve
    inside: Array

    @property
    def breakpoints(self):
        return self.curve.breakpoints

    def at(self, t):
        t = _time(t)
        jumps = jnp.asarray(self.curve.jumps, t.dtype)
        after = jnp.where(jumps > self.inside, jumps, jnp.inf).min()
        before = jnp.where(jumps > self.inside, -jnp.inf, jumps).max()
        return self.curve.at(jnp.clip(t, before, jnp.nextafter(after, before)))


class _Part(AbstractCurve):
    """One part of the fields of a curve, which are sums."""

    curve: AbstractCurve
    index: int = eqx.field(static=True)

    @property
    def breakpoints(self):
        return self.curve.breakpoints

    @property
    def jumps(self):
        return self.curve.jumps

    def at(self, t):
        return self.curve.at(t).parts[self.index]


class _Full(eqx.Module):
    """A h."""

    matrix: Float[Array, "size width"]

    def __init__(self, like: Array, width: int):
        self.matrix = jnp.zeros((like.size, width))

    def __call__(self, hidden):
        return self.matrix @ hidden


class _LowRank(eqx.Module):
    """U diag(A h) V^T, of an array taken as a matrix with its last axis as columns."""

    matrix: Float[Array, "rank width"]
    left: Float[Array, "rows rank"]
    right: Float[Array, "columns rank"]

    def __init__(self, like: Array, width: int, rank: int, *, key: PRNGKeyArray):
        left, right = jax.random.split(key)
        rows, columns = like.size // like.shape[-1], like.shape[-1]
        self.matrix = jnp.zeros((rank, width))
        self.left = jax.random.normal(left, (rows, rank)) / math.sqrt(rank)
        self.right = jax.random.normal(right, (columns, rank)) / math.sqrt(columns)

    def __call__(self, hidden):
        return (self.left * (self.matrix @ hidden)[None]) @ self.right.T


# ------------------------------------------------------------------ from one curve to another


def sample(curve: AbstractCurve, ts: ArrayLike) -> PiecewiseConstant:
    """The layers of a curve: its parameters in the middle of each piece between the edges `ts`.

    A model changes its depth so without being trained again.
    """
    edges = _times(ts)
    middles = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    return PiecewiseConstant([curve.at(t) for t in middles], edges)


def fit(
    curve: AbstractCurve,
    like: AbstractLinearCurve,
    *,
    t0: float = 0.0,
    t1: float,
    samples: int = 1024,
) -> Any:
    """The curve of the kind of `like` that is nearest to another one on [t0, t1], by least squares.

    **Arguments:**

    - `curve`: what to approximate.
    - `like`: a linear curve over fields of the same structure; its coefficients are replaced.
    - `t0`, `t1`: the interval; `samples`: of its midpoints.
    """
    edges = jnp.linspace(t0, t1, samples + 1)
    times = (edges[1:] + edges[:-1]) / 2
    basis = jax.vmap(like.weights)(times)
    solve = jnp.linalg.pinv(basis)

    def add(total, sample):
        t, column = sample
        values = eqx.filter(curve.at(t), eqx.is_inexact_array)
        return jax.tree.map(lambda s, v: s + _outer(column, v), total, values), None

    shapes = eqx.filter_eval_shape(lambda: eqx.filter(curve.at(edges[0]), eqx.is_inexact_array))
    zero = jax.tree.map(lambda a: jnp.zeros((len(solve), *a.shape), a.dtype), shapes)
    new, _ = jax.lax.scan(add, zero, (times, solve.T))
    old, rest = eqx.partition(like.coefficients, eqx.is_inexact_array)
    if jax.tree.map(jnp.shape, new) != jax.tree.map(jnp.shape, old):
        raise ValueError("`like` must be a curve over fields of the structure of `curve`'s.")
    return eqx.tree_at(lambda c: c.coefficients, like, eqx.combine(new, rest))


def relative_distance(
    a: AbstractCurve, b: AbstractCurve, *, t0: float = 0.0, t1: float, samples: int = 256
) -> Array:
    """(int |a(t) - b(t)|^2 dt / int |a(t)|^2 dt)^{1/2} on [t0, t1]: what a conversion lost."""
    edges = jnp.linspace(t0, t1, samples + 1)

    def squares(t):
        one, other = (jtu.tree_leaves(eqx.filter(c.at(t), eqx.is_inexact_array)) for c in (a, b))
        pairs = list(zip(one, other, strict=True))
        return sum(jnp.sum((x - y) ** 2) for x, y in pairs), sum(jnp.sum(x**2) for x, _ in pairs)

    gap, size = jax.lax.map(squares, (edges[1:] + edges[:-1]) / 2)
    return jnp.sqrt(gap.sum() / size.sum())


# ------------------------------------------------------------------ what a flow asks of a field


def breakpoints(field: Any) -> tuple[float, ...]:
    """The breakpoints of all curves inside a field, in order."""
    return tuple(sorted({t for curve in _curves(field) for t in curve.breakpoints}))


def jumps(field: Any) -> tuple[float, ...]:
    """The times at which parameters inside a field jump, in order."""
    return tuple(sorted({t for curve in _curves(field) for t in curve.jumps}))


def frozen(field: Any, t: ScalarLike) -> Any:
    """The field within the piece that holds time t: curves that are constant there are frozen, and
    others go no further than to their limits at its ends."""

    def freeze(x):
        if not isinstance(x, TimeDependent):
            return x
        if isinstance(x.curve, Constant | PiecewiseConstant):
            return frozen(x.at(t), t)
        return TimeDependent(_Piece(x.curve, _time(t))) if x.curve.jumps else x

    return jax.tree.map(freeze, field, is_leaf=lambda x: isinstance(x, TimeDependent))


def _curves(tree) -> list[AbstractCurve]:
    """All curves inside a tree, and those inside of them."""
    is_curve = lambda x: isinstance(x, AbstractCurve) and x is not tree
    found = [x for x in jtu.tree_leaves(tree, is_leaf=is_curve) if is_curve(x)]
    return found + [inner for curve in found for inner in _curves(curve)]


# ------------------------------------------------------------------ pieces


def stack(fields: Sequence[AbstractField]) -> Any:
    """One field whose floating-point arrays are those of all fields, stacked along a new axis."""
    fields = list(fields)
    if not fields:
        raise ValueError("a curve needs at least one field.")
    for field in fields:
        if not isinstance(field, AbstractField):
            raise TypeError(f"a curve is made of fields, got {type(field).__name__}.")
    if jax.tree.leaves(eqx.filter(fields[0].geometry, eqx.is_inexact_array)):
        raise ValueError(
            f"the geometry {fields[0].geometry} has arrays, which would move in time with the "
            "parameters, and a flow lives on one geometry: take Constant(field), or another one."
        )
    arrays, rests = zip(*(eqx.partition(f, eqx.is_inexact_array) for f in fields), strict=True)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), a) for a in arrays]
    same = all(s == shapes[0] for s in shapes) and all(eqx.tree_equal(r, rests[0]) for r in rests)
    if not same:
        raise ValueError(
            "the fields of a curve must have one structure: the same classes, shapes, dtypes and "
            "options, so that only their arrays differ."
        )
    return eqx.combine(jax.tree.map(lambda *a: jnp.stack(a), *arrays), rests[0])


def _map(fn, field):
    return jax.tree.map(lambda a: fn(a) if eqx.is_inexact_array(a) else a, field)


def _combine(weights, coefficients):
    return _map(lambda a: _product(weights, a), coefficients)


def _outer(column, a):
    return jnp.tensordot(column.astype(a.dtype), a, 0, precision="highest")


def _product(matrix, a):
    return jnp.tensordot(matrix.astype(a.dtype), a, 1, precision="highest")


def _count(coefficients) -> int:
    leaves = jtu.tree_leaves(eqx.filter(coefficients, eqx.is_inexact_array))
    if not leaves:
        raise ValueError("the fields of a curve hold no floating-point array to move in time.")
    return len(leaves[0])


def _time(t: ScalarLike) -> Array:
    """t as an array; a floating-point one keeps its dtype."""
    if isinstance(t, jax.Array) and jnp.issubdtype(t.dtype, jnp.floating):
        return t
    return jnp.asarray(t, float)


def _times(ts: ArrayLike) -> tuple[float, ...]:
    if not is_concrete(ts):
        raise TypeError("the times of a curve are part of its structure and cannot be traced.")
    ts = np.asarray(ts, float)
    if ts.ndim != 1 or not np.isfinite(ts).all() or (np.diff(ts) <= 0).any():
        raise ValueError(f"times must be finite and increasing, shape (L,); got {ts.tolist()}.")
    return tuple(ts.tolist())
