"""Fields: the velocity X_t[mu](x) of a token at x when the tokens have the law mu.

A field is called `field(t, x, mu)` with query points x of shape (m, d), which need not be the
points of mu: probes and cross-attention come free. The field owns its geometry, and its values
are tangent to it.
"""

import abc
from functools import reduce
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._types import ScalarLike, accumulation_dtype, is_concrete
from ..geometry import AbstractGeometry
from ..measure import Measure


class AbstractField(eqx.Module):
    """A mean-field vector field (t, x, mu) -> X_t[mu](x).

    To write one: subclass, give it a `geometry` and `__call__`, and project the result by
    `self.geometry.project(x, v)`.
    """

    geometry: eqx.AbstractVar[AbstractGeometry]

    @abc.abstractmethod
    def __call__(self, t: ScalarLike, x: Float[Array, "m d"], mu: Measure) -> Float[Array, "m d"]:
        """X_t[mu](x_i) for each row of x."""

    # A causal flow can be continued by one token without moving the others again: a field is the
    # composition of what it keeps of the tokens and what a query makes of that.

    def keys_values(self, t: ScalarLike, y: Float[Array, "n d"], start: ScalarLike = 0) -> Any:
        """What the field keeps of tokens, of which `start` is the index of the first: arrays with
        the tokens along their first axis. By default the tokens themselves."""
        return y

    def attend(
        self, t: ScalarLike, x: Float[Array, "1 d"], keys_values: Any, index: ScalarLike
    ) -> Float[Array, "1 d"]:
        """X_t[mu](x) of the one query with this index, mu the tokens of `keys_values` up to it."""
        return self(t, x, Measure(keys_values, visible_log_weights(keys_values, index)))

    @property
    def parts(self) -> "tuple[AbstractField, ...]":
        """X_1, ..., X_K of a field X_1 + ... + X_K: what splitting methods step with."""
        return (self,)

    def __add__(self, other: "AbstractField") -> "Sum":
        return Sum((self, other))

    def __sub__(self, other: "AbstractField") -> "Sum":
        return Sum((self, -1.0 * other))

    def __mul__(self, factor: ScalarLike) -> "Scaled":
        return Scaled(factor, self)

    def __rmul__(self, factor: ScalarLike) -> "Scaled":
        return Scaled(factor, self)

    def __neg__(self) -> "Scaled":
        return Scaled(-1.0, self)


class AbstractDivergenceField(AbstractField):
    """A field that knows its divergence in closed form."""

    @abc.abstractmethod
    def divergence(self, t: ScalarLike, x: Float[Array, "m d"], mu: Measure) -> Float[Array, " m"]:
        """div X_t[mu](x_i) at fixed mu, for each row of x."""


class Sum(AbstractDivergenceField):
    """X = sum_k X_k, of fields on one geometry."""

    fields: tuple[AbstractField, ...]
    geometry: AbstractGeometry

    def __init__(self, fields: tuple[AbstractField, ...]):
        for field in fields:
            if not isinstance(field, AbstractField):
                raise TypeError(f"only fields can be added to a field, got {field!r}.")
        if not all(_same(f.geometry, fields[0].geometry) for f in fields):
            raise ValueError(
                "the fields of a sum must live on one geometry, got "
                f"{', '.join(repr(f.geometry) for f in fields)}. Pass the same `geometry=` to each."
            )
        self.fields = fields
        self.geometry = fields[0].geometry

    @property
    def parts(self):
        return tuple(part for field in self.fields for part in field.parts)

    def __call__(self, t, x, mu):
        return reduce(jnp.add, [field(t, x, mu) for field in self.fields])

    def keys_values(self, t, y, start=0):
        return tuple(field.keys_values(t, y, start) for field in self.fields)

    def attend(self, t, x, keys_values, index):
        pairs = zip(self.fields, keys_values, strict=True)
        return reduce(jnp.add, [field.attend(t, x, kept, index) for field, kept in pairs])

    def divergence(self, t, x, mu):
        return reduce(jnp.add, [divergence(field, t, x, mu) for field in self.fields])


class Scaled(AbstractDivergenceField):
    """factor * X. The factor may be traced."""

    factor: Float[Array, ""]
    field: AbstractField

    def __init__(self, factor: ScalarLike, field: AbstractField):
        self.factor = jnp.asarray(factor, float)
        if self.factor.shape != ():
            raise ValueError(f"a field is multiplied by a scalar, got shape {self.factor.shape}.")
        self.field = field

    @property
    def geometry(self) -> AbstractGeometry:
        return self.field.geometry

    @property
    def parts(self):
        return tuple(Scaled(self.factor, part) for part in self.field.parts)

    def __call__(self, t, x, mu):
        return self.factor.astype(x.dtype) * self.field(t, x, mu)

    def keys_values(self, t, y, start=0):
        return self.field.keys_values(t, y, start)

    def attend(self, t, x, keys_values, index):
        return self.factor.astype(x.dtype) * self.field.attend(t, x, keys_values, index)

    def divergence(self, t, x, mu):
        return self.factor.astype(x.dtype) * divergence(self.field, t, x, mu)


def divergence(
    field: AbstractField,
    t: ScalarLike,
    x: Float[Array, "m d"],
    mu: Measure,
    *,
    key: PRNGKeyArray | None = None,
    samples: int = 1,
) -> Float[Array, " m"]:
    """div X_t[mu](x) at fixed mu, within the field's geometry.

    On R^d it is tr DX; on a submanifold tr(P_x DX P_x), which for X = P F on the sphere is
    tr(P_x DF) - (d-1) <x, F>. Along the flow, d/dt log rho_t(x_t) = -div X_t[mu_t](x_t).

    **Arguments:**

    - `field`, `t`, `x`, `mu`: as in `field(t, x, mu)`.
    - `key`: `None` for the exact divergence (closed form for attention and for sums and multiples
      of fields that have one, d forward-mode derivatives for any other field); a PRNG key for
      Hutchinson's estimate E[z^T P DX P z] with Rademacher z (Hutchinson 1990).
    - `samples`: the number of Hutchinson's probes, with `key`.

    **Returns:** shape `(m,)`.
    """
    x = jnp.asarray(x)
    if x.ndim != 2 or x.shape[1] != mu.d:
        raise ValueError(
            f"x must have shape (m, {mu.d}), the dimension of mu's tokens; got {x.shape}."
        )
    if key is None and isinstance(field, AbstractDivergenceField):
        return field.divergence(t, x, mu)
    if key is None:
        return divergence_by_derivatives(field, t, x, mu)
    if samples < 1:
        raise ValueError(f"Hutchinson's estimate needs at least one sample, got {samples}.")
    z = jax.random.rademacher(key, (samples, *x.shape), x.dtype)
    return jax.vmap(_derivative_along(field, t, x, mu))(z).mean(axis=0)


def divergence_by_derivatives(field: AbstractField, t, x: Float[Array, "m d"], mu: Measure):
    """The exact divergence of any field, by d forward-mode derivatives."""
    along = _derivative_along(field, t, x, mu)
    return jax.vmap(along)(jnp.eye(mu.d, dtype=x.dtype)).sum(axis=0)


def _derivative_along(field, t, x, mu):
    """z -> <z, P DX P z>, one row a query."""

    def along(z):
        z = jnp.broadcast_to(z, x.shape)
        tangent = field.geometry.project(x, z)
        moved = jax.jvp(lambda x: field(t, x, mu), (x,), (tangent,))[1]
        return (z * field.geometry.project(x, moved)).sum(axis=1)

    return along


def _same(one: AbstractGeometry, other: AbstractGeometry) -> bool:
    """Whether two geometries are one; numbers that are not known yet may be."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    known = [(a, b) for a, b in pairs if is_concrete(a, b)]
    return all(np.array_equal(a, b) for a, b in known)


def visible_log_weights(kept: Array, index: ScalarLike, left: int | None = None):
    """Log-weights that show a query the tokens up to its index, and `left` before it at most."""
    j = jnp.arange(len(kept))
    seen = j <= index if left is None else (j <= index) & (j >= index - left)
    return jnp.where(seen, 0.0, -jnp.inf).astype(accumulation_dtype(kept.dtype))
