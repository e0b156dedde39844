"""Fields whose parameters move in time.

    TimeDependent(curve)   X_t[mu](x) = F_{theta(t)}[mu](x),    theta(t) = curve.at(t)

Between its breakpoints a field in time is smooth. A flow asks three things of it: where a step has
to end (`breakpoints`), where a step that is given must end (`jumps`), and what the field is within
a step, which no jump divides (`frozen`).

The curves themselves and their conversion are here by name too: `jaxflow.fields.time.sample`,
`fit` and `relative_distance`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._rules import instance
from .._types import ScalarLike
from ..geometry import AbstractGeometry
from .base import (
    AbstractCompositeField,
    AbstractDivergenceField,
    AbstractField,
    causal,
    divergence,
)
from .conversion import fit, relative_distance, sample
from .curves import (
    AbstractCurve,
    AbstractLinearCurve,
    Constant,
    Fourier,
    Kink,
    Legendre,
    PiecewiseConstant,
    PiecewiseLinear,
    as_time,
    stack,
)
from .hypernetwork import HyperNetwork

__all__ = [
    "AbstractCurve",
    "AbstractLinearCurve",
    "Constant",
    "Fourier",
    "HyperNetwork",
    "Kink",
    "Legendre",
    "PiecewiseConstant",
    "PiecewiseLinear",
    "TimeDependent",
    "breakpoints",
    "fit",
    "frozen",
    "jumps",
    "relative_distance",
    "sample",
    "stack",
]


def __dir__() -> list[str]:
    return __all__


class TimeDependent(AbstractDivergenceField, AbstractCompositeField):
    """X_t[mu](x) = F_{theta(t)}[mu](x), theta a curve.

    `.at(t)` gives the field F_{theta(t)}, frozen at that time. A curve of sums is a sum of curves:
    splitting methods step with each part.

    **Arguments:** `curve`, such as `PiecewiseConstant(fields, ts)`.

    **Raises:** `TypeError` for what is no curve of fields.

    ```python
    >>> cold, hot = jaxflow.SelfAttention(beta=4.0), jaxflow.SelfAttention(beta=1.0)
    >>> field = jaxflow.TimeDependent(jaxflow.PiecewiseLinear([cold, hot], [0.0, 2.0]))
    >>> float(field.at(1.0).beta)
    2.5

    ```
    """

    curve: AbstractCurve
    # The geometry, where it holds no arrays; those are parameters, which have one place only.
    space: AbstractGeometry | None

    def __init__(self, curve: AbstractCurve):
        if not isinstance(curve, AbstractCurve):
            raise TypeError(
                "TimeDependent takes a curve, such as jaxflow.PiecewiseConstant(fields, ts); got "
                f"{type(curve).__name__}."
            )
        self.curve = curve
        space = _shapes(curve).geometry
        self.space = None if any(map(_is_shape, jtu.tree_leaves(space))) else space

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.at(0.0).geometry if self.space is None else self.space

    def at(self, t: ScalarLike) -> AbstractField:
        """The field at time t, frozen."""
        return self.curve.at(t)

    def __call__(self, t, x, mu):
        return self.at(t)(t, x, mu)

    def divergence(self, t, x, mu):
        return divergence(self.at(t), t, x, mu)

    def keys_values(self, t, y, start=0):
        return causal(self.at(t)).keys_values(t, y, start)

    def attend(self, t, x, keys_values, index):
        return causal(self.at(t)).attend(t, x, keys_values, index)

    def inside(self, t):
        return (self.at(t),)

    def split(self):
        count = len(_shapes(self.curve).parts)
        part = lambda k: eqx.tree_at(lambda f: f.curve, self, _Part(self.curve, k))
        return (self,) if count == 1 else tuple(part(k) for k in range(count))


class _Part(AbstractCurve):
    """One part of the fields of a curve, which are sums."""

    curve: AbstractCurve
    index: int = eqx.field(static=True)

    @property
    def breakpoints(self):
        return self.curve.breakpoints

    def at(self, t):
        return self.curve.at(t).parts[self.index]


class _Piece(AbstractCurve):
    """A curve on the piece between two jumps that holds a given time."""

    curve: AbstractCurve
    inside: Array

    @property
    def breakpoints(self):
        return self.curve.breakpoints

    def at(self, t):
        t = as_time(t)
        jumps = jnp.asarray(self.curve.jumps, t.dtype)
        after = jnp.where(jumps > self.inside, jumps, jnp.inf).min()
        before = jnp.where(jumps > self.inside, -jnp.inf, jumps).max()
        return self.curve.at(jnp.clip(t, before, jnp.nextafter(after, before)))


# ------------------------------------------------------------------ what a flow asks of a field


def breakpoints(field: Any) -> tuple[float, ...]:
    """The breakpoints of all curves inside a field, in order.

    **Arguments:** `field`: a field, or any tree of fields.

    **Returns:** the times, ascending, each once; empty where nothing depends on time.
    """
    return tuple(sorted({float(t) for curve in _curves(field) for t in curve.breakpoints}))


def jumps(field: Any) -> tuple[float, ...]:
    """The times at which parameters inside a field jump, in order.

    **Arguments:** `field`: a field, or any tree of fields.

    **Returns:** the times, ascending, each once; empty where nothing jumps.
    """
    return tuple(sorted({t for curve in _curves(field) for t in curve.jumps}))


def frozen(field: Any, t: ScalarLike) -> Any:
    """The field within the piece that holds time t: curves that are constant there are frozen, and

    **Arguments:** `field`: a field, or any tree of fields; `t`: the time.

    **Returns:** a tree of the same kind.
    others go no further than to their limits at its ends."""

    def freeze(x):
        if not isinstance(x, TimeDependent):
            return x
        if isinstance(x.curve, Constant | PiecewiseConstant):
            return frozen(x.at(t), t)
        piece = _Piece(x.curve, as_time(t))
        return eqx.tree_at(lambda f: f.curve, x, piece) if x.curve.jumps else x

    return jax.tree.map(freeze, field, is_leaf=lambda x: isinstance(x, TimeDependent))


def _curves(tree) -> list[AbstractCurve]:
    """All curves inside a tree, and those inside of them."""
    is_curve = lambda x: isinstance(x, AbstractCurve) and x is not tree
    found = [x for x in jtu.tree_leaves(tree, is_leaf=is_curve) if is_curve(x)]
    return found + [inner for curve in found for inner in _curves(curve)]


def _shapes(curve: AbstractCurve) -> AbstractField:
    """The field of a curve, with shapes for arrays: at any time, since only arrays move."""
    found = eqx.filter_eval_shape(lambda curve: curve.at(0.0), curve)
    return instance("what a curve is at a time", found, AbstractField, "jaxflow.SelfAttention()")


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
