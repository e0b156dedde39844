"""Fields: the velocity X_t[mu](x) of a token at x when the tokens have the law mu.

A field is called `field(t, x, mu)` with query points x of shape (m, d), which need not be the
points of mu: probes and cross-attention come free. The field owns its geometry, and its values
are tangent to it.
"""

import abc
from functools import reduce

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._types import ScalarLike
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
        if len({(type(f.geometry), *jax.tree.leaves(f.geometry)) for f in fields}) != 1:
            raise ValueError(
                "the fields of a sum must live on one geometry, got "
                f"{', '.join(repr(f.geometry) for f in fields)}. Pass the same `geometry=` to each."
            )
        self.fields = fields
        self.geometry = fields[0].geometry

    def __call__(self, t, x, mu):
        return reduce(jnp.add, [field(t, x, mu) for field in self.fields])

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

    def __call__(self, t, x, mu):
        return self.factor.astype(x.dtype) * self.field(t, x, mu)

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
    project, velocity = field.geometry.project, lambda x: field(t, x, mu)

    def along(z):
        """<P z, DX P z>, one row a query."""
        tangent = project(x, jnp.broadcast_to(z, x.shape))
        return (tangent * jax.jvp(velocity, (x,), (tangent,))[1]).sum(axis=1)

    if key is None:
        return jax.vmap(along)(jnp.eye(mu.d, dtype=x.dtype)).sum(axis=0)
    if samples < 1:
        raise ValueError(f"Hutchinson's estimate needs at least one sample, got {samples}.")
    z = jax.random.rademacher(key, (samples, *x.shape), x.dtype)
    return jax.vmap(along)(z).mean(axis=0)
