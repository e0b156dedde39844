"""Curves t -> theta(t) of the parameters of a field.

    Constant           theta(t) = theta                                one block, weights shared
    PiecewiseConstant  theta(t) = theta_l for t_l <= t < t_{l+1}       layers
    PiecewiseLinear    interpolates theta_l at t_l
    Fourier            theta_0 + sum_k theta_{2k-1} cos(w k t) + theta_{2k} sin(w k t)
    Legendre           sum_k theta_k P_k(2 (t - t0)/(t1 - t0) - 1)

A curve is made of fields: of each, every floating-point array is a parameter, and the rest is the
same in all.
"""

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._rules import constant, positive
from .._types import ArrayLike, ScalarLike, is_concrete
from .base import AbstractField, is_field


class Kink(float):
    """A breakpoint of a curve at which its slope jumps, and its value does not."""


class AbstractCurve(eqx.Module):
    """t -> a field, smooth between its breakpoints.

    To write one: subclass, and give it `at(t)` and `breakpoints`. `flow` ends a step at each of
    them, and no stage of a step looks beyond a jump.
    """

    @property
    @abc.abstractmethod
    def breakpoints(self) -> tuple[float, ...]:
        """The ends of the smooth pieces, in order: the times at which the parameters jump, and, as
        `jaxflow.fields.Kink`, those at which their slopes alone do."""

    @abc.abstractmethod
    def at(self, t: ScalarLike) -> AbstractField:
        """The field at time t, frozen."""

    @property
    def jumps(self) -> tuple[float, ...]:
        """The breakpoints at which the parameters jump."""
        return tuple(t for t in self.breakpoints if not isinstance(t, Kink))


class AbstractLinearCurve(AbstractCurve):
    """theta(t) = sum_k w_k(t) theta_k, with coefficients theta_k stacked in a field."""

    coefficients: eqx.AbstractVar[AbstractField]

    @abc.abstractmethod
    def weights(self, t: ScalarLike) -> Float[Array, " k"]:
        """w_k(t)."""


class Constant(AbstractCurve):
    """theta(t) = theta: the same block at every depth, as in ALBERT (arXiv 1909.11942).

    **Arguments:** `field`, any field.

    **Raises:** `TypeError` for what is no field.
    """

    field: AbstractField

    def __check_init__(self):
        is_field(self.field)

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

    **Raises:** `ValueError` for fields of different structures, or times that do not fit them;
    `TypeError` for what is no field, and for traced times.

    ```python
    >>> layers = [jaxflow.SelfAttention(beta=b) for b in (1.0, 4.0)]
    >>> field = jaxflow.TimeDependent(jaxflow.PiecewiseConstant(layers, [0.0, 1.0, 2.0]))
    >>> float(field.at(0.5).beta), float(field.at(1.0).beta)
    (1.0, 4.0)

    ```
    """

    coefficients: AbstractField
    ts: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, fields: Sequence[AbstractField], ts: ArrayLike):
        self.coefficients = stack(fields)
        ts = increasing(ts)
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
        t = as_time(t)
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

    **Raises:** as `jaxflow.PiecewiseConstant`.
    """

    coefficients: AbstractField
    ts: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, fields: Sequence[AbstractField], ts: ArrayLike):
        self.coefficients = stack(fields)
        self.ts = increasing(ts)
        if len(self.ts) != len(fields):
            raise ValueError(f"one time a field: got {len(self.ts)} for {len(fields)} fields.")

    @property
    def breakpoints(self):
        return tuple(Kink(t) for t in self.ts)

    def weights(self, t):
        t = as_time(t)
        nodes, hats = jnp.asarray(self.ts, t.dtype), jnp.eye(len(self.ts), dtype=t.dtype)
        return jax.vmap(lambda hat: jnp.interp(t, nodes, hat))(hats)

    def at(self, t):
        return _combine(self.weights(t), self.coefficients)


class Fourier(AbstractLinearCurve):
    """theta(t) = theta_0 + sum_{k>=1} theta_{2k-1} cos(2 pi k t/T) + theta_{2k} sin(2 pi k t/T).

    **Arguments:** `fields`: an odd number of fields of one structure, whose arrays are the
    coefficients in that order; `period`: T, positive.

    **Raises:** `ValueError` for fields of different structures, an even number of them, or a period
    that is not positive; `TypeError` for what is no field, and for a traced period.
    """

    coefficients: AbstractField
    period: float = eqx.field(static=True)

    def __init__(self, fields: Sequence[AbstractField], period: float):
        self.coefficients = stack(fields)
        if len(fields) % 2 == 0:
            raise ValueError(
                "a Fourier curve has a constant and pairs (cos, sin), so an odd number of fields; "
                f"got {len(fields)}."
            )
        self.period = constant("the period", period, "positive and finite", positive)

    @property
    def breakpoints(self):
        return ()

    def weights(self, t):
        orders = jnp.arange(1, _count(self.coefficients) // 2 + 1)
        phase = 2 * jnp.pi * (as_time(t) / self.period)
        angles = orders.astype(phase.dtype) * phase
        waves = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1).reshape(-1)
        return jnp.concatenate([jnp.ones(1, waves.dtype), waves])

    def at(self, t):
        return _combine(self.weights(t), self.coefficients)


class Legendre(AbstractLinearCurve):
    """theta(t) = sum_k theta_k P_k(s), s = 2 (t - t0)/(t1 - t0) - 1, P_k the Legendre polynomials.

    **Arguments:** `fields`: fields of one structure, whose arrays are the coefficients; `t0`, `t1`:
    the interval on which the polynomials are orthogonal, t0 < t1.

    **Raises:** as `jaxflow.PiecewiseConstant`.
    """

    coefficients: AbstractField
    t0: float = eqx.field(static=True)
    t1: float = eqx.field(static=True)

    def __init__(self, fields: Sequence[AbstractField], t0: float, t1: float):
        self.coefficients = stack(fields)
        self.t0, self.t1 = increasing([t0, t1])

    @property
    def breakpoints(self):
        return ()

    def weights(self, t):
        s = 2 * (as_time(t) - self.t0) / (self.t1 - self.t0) - 1
        # (k + 1) P_{k+1} = (2k + 1) s P_k - k P_{k-1}
        values = [jnp.ones_like(s), s]
        for k in range(1, _count(self.coefficients)):
            values.append(((2 * k + 1) * s * values[k] - k * values[k - 1]) / (k + 1))
        return jnp.stack(values[: _count(self.coefficients)])

    def at(self, t):
        return _combine(self.weights(t), self.coefficients)


# ------------------------------------------------------------------ pieces


def stack(fields: Sequence[AbstractField]) -> Any:
    """One field whose floating-point arrays are those of all fields, stacked along a new axis.

    **Arguments:** `fields`: a sequence of L fields of one structure.

    **Returns:** a field of their class, each floating-point array of which has a first axis of
    length L.

    **Raises:** `ValueError` where there is none, where they differ in structure, or where their
    geometry holds arrays; `TypeError` for what is no field.
    """
    if not isinstance(fields, Sequence):
        raise TypeError(f"a curve takes a list of fields, got {fields!r}.")
    if not fields:
        raise ValueError("a curve needs at least one field.")
    for field in fields:
        is_field(field)
    fixed(fields[0])
    arrays, rests = zip(*(eqx.partition(f, eqx.is_inexact_array) for f in fields), strict=True)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), a) for a in arrays]
    same = all(s == shapes[0] for s in shapes) and all(eqx.tree_equal(r, rests[0]) for r in rests)
    if not same:
        raise ValueError(
            "the fields of a curve must have one structure: the same classes, shapes, dtypes and "
            "options, so that only their arrays differ."
        )
    return eqx.combine(jax.tree.map(lambda *a: jnp.stack(a), *arrays), rests[0])


def fixed(field: AbstractField) -> AbstractField:
    """The field, whose geometry does not move when its arrays do.

    **Raises:** `ValueError` where the geometry holds arrays.
    """
    if jax.tree.leaves(eqx.filter(field.geometry, eqx.is_inexact_array)):
        raise ValueError(
            f"the geometry {field.geometry} has arrays, which would move in time with the "
            "parameters, and a flow lives on one geometry: take Constant(field), or another one."
        )
    return field


def _map(fn, field):
    return jax.tree.map(lambda a: fn(a) if eqx.is_inexact_array(a) else a, field)


def _combine(weights, coefficients):
    product = lambda a: jnp.tensordot(weights.astype(a.dtype), a, 1, precision="highest")
    return _map(product, coefficients)


def _count(coefficients) -> int:
    leaves = jtu.tree_leaves(eqx.filter(coefficients, eqx.is_inexact_array))
    if not leaves:
        raise ValueError("the fields of a curve hold no floating-point array to move in time.")
    return len(leaves[0])


def as_time(t: ScalarLike) -> Array:
    """t as an array; a floating-point one keeps its dtype."""
    if isinstance(t, jax.Array) and jnp.issubdtype(t.dtype, jnp.floating):
        return t
    return jnp.asarray(t, float)


def increasing(ts: ArrayLike) -> tuple[float, ...]:
    """The times of a curve, which are finite and increase.

    **Raises:** `ValueError` if they do not, `TypeError` for traced times and what is no number.
    """
    if not is_concrete(*jtu.tree_leaves(ts)):
        raise TypeError("the times of a curve are part of its structure and cannot be traced.")
    try:
        found = np.asarray(ts, float)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"the times of a curve must be real numbers, got {ts!r}.") from None
    if any(isinstance(t, bool | str | complex) for t in jtu.tree_leaves(ts)):
        raise TypeError(f"the times of a curve must be real numbers, got {ts!r}.")
    if found.ndim != 1 or not np.isfinite(found).all() or (np.diff(found) <= 0).any():
        raise ValueError(f"times must be finite and increasing, shape (L,); got {found.tolist()}.")
    return tuple(found.tolist())
