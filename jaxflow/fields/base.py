"""Fields: the velocity X_t[mu](x) of a token at x when the tokens have the law mu.

A field is called `field(t, x, mu)` with query points x of shape (m, d), which need not be the
points of mu: probes and cross-attention come free. The field owns its geometry, and its values
are tangent to it.
"""

import abc
from collections.abc import Callable
from functools import reduce
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import array, count, instance, real
from .._types import ScalarLike, accumulation_dtype, is_concrete
from ..geometry import AbstractGeometry, Euclidean
from ..measure import Measure


class AbstractField(eqx.Module):
    """A mean-field vector field (t, x, mu) -> X_t[mu](x).

    To write one: subclass, give it a `geometry` and `__call__`, and project the result by
    `self.geometry.project(x, v)`.
    """

    geometry: eqx.AbstractVar[AbstractGeometry]
    __array_ufunc__: ClassVar[None] = None  # NumPy leaves `array * field` to the field.

    @abc.abstractmethod
    def __call__(self, t: ScalarLike, x: Float[Array, "m d"], mu: Measure) -> Float[Array, "m d"]:
        """X_t[mu](x_i) for each row of x."""

    @property
    def parts(self) -> "tuple[AbstractField, ...]":
        """X_1, ..., X_K of a field X_1 + ... + X_K: what splitting methods step with."""
        return self.split() if isinstance(self, AbstractCompositeField) else (self,)

    def __add__(self, other: "AbstractField") -> "Sum":
        return Sum((self, other))

    def __sub__(self, other: "AbstractField") -> "Sum":
        return Sum((self, Scaled(-1.0, other)))

    def __mul__(self, factor: ScalarLike) -> "Scaled":
        return Scaled(factor, self)

    def __rmul__(self, factor: ScalarLike) -> "Scaled":
        return Scaled(factor, self)

    def __neg__(self) -> "Scaled":
        return Scaled(-1.0, self)


def token_velocities(field: AbstractField, t: ScalarLike, mu: Measure) -> Float[Array, "n d"]:
    """X_t[mu](x_i) at the tokens x_i of mu: where the equation of the flow closes on itself.

    **Arguments:** `field`: X; `t`: the time; `mu`: a measure with points `(n, d)`.

    **Returns:** the velocities, shape `(n, d)`.

    **Raises:** `ValueError` where the field gives velocities of another shape.

    ```python
    >>> mu = jaxflow.measure.circle(3)  # at rest: no token is nearer to another
    >>> v = jaxflow.fields.token_velocities(jaxflow.SelfAttention(beta=2.0), 0.0, mu)
    >>> bool(jnp.abs(v).max() < 1e-6)
    True

    ```
    """
    velocity = field(t, mu.points, mu)
    if velocity.shape != mu.points.shape:
        raise ValueError(
            f"the field must map points {mu.points.shape} to velocities of that shape, got "
            f"{velocity.shape}."
        )
    return velocity


def is_field(value: Any) -> AbstractField:
    """The value, which is a field.

    **Raises:** `TypeError` if it is not.
    """
    if isinstance(value, AbstractField):
        return value
    raise TypeError(
        f"only fields can be added, multiplied, wrapped or moved in time, got {value!r}: pass an "
        "instance such as jaxflow.SelfAttention(), or subclass jaxflow.AbstractField."
    )


def unprojected(field: AbstractField) -> AbstractField:
    """F of a field X = P F: the same field in R^d, each geometry inside it replaced.

    **Raises:** `ValueError` where the field's geometry is not one of its attributes, so that it
    stays what it is.
    """
    is_geometry = lambda x: isinstance(x, AbstractGeometry)
    flat = jax.tree.map(lambda x: Euclidean() if is_geometry(x) else x, field, is_leaf=is_geometry)
    if not isinstance(flat.geometry, Euclidean):
        raise ValueError(
            f"the force of {type(field).__name__} before its projection is asked for by its "
            "`geometry`, which must be an attribute of the field, or of a field inside it."
        )
    return flat


class AbstractDivergenceField(AbstractField):
    """A field that knows its divergence in closed form."""

    @abc.abstractmethod
    def divergence(self, t: ScalarLike, x: Float[Array, "m d"], mu: Measure) -> Float[Array, " m"]:
        """div X_t[mu](x_i) at fixed mu, for each row of x."""


# ------------------------------------------------------------------ token by token


class AbstractCausalField(AbstractField):
    """A field whose causal flow can be continued by one token without moving the others again.

    It is the composition of what it keeps of the tokens and of what a query makes of that. Only
    the generation of text asks for it; a model with any other field in it generates without.
    """

    @abc.abstractmethod
    def keys_values(self, t: ScalarLike, y: Float[Array, "n d"], start: ScalarLike = 0) -> Any:
        """What the field keeps of tokens, of which `start` is the index of the first: arrays with
        the tokens along their first axis."""

    @abc.abstractmethod
    def attend(
        self, t: ScalarLike, x: Float[Array, "1 d"], keys_values: Any, index: ScalarLike
    ) -> Float[Array, "1 d"]:
        """X_t[mu](x) of the one query with this index, mu the tokens of `keys_values` up to it."""


def can_be_continued(field: AbstractField) -> bool:
    """Whether a causal flow of the field can be continued token by token: whether it, and every
    field inside it, is an `jaxflow.fields.AbstractCausalField`."""
    if isinstance(field, AbstractCompositeField):
        return all(can_be_continued(inner) for inner in field.inside(0.0))
    return isinstance(field, AbstractCausalField)


def causal(field: AbstractField) -> AbstractCausalField:
    """The field, which keeps something of the tokens.

    **Raises:** `TypeError` if it does not.
    """
    if isinstance(field, AbstractCausalField):
        return field
    raise TypeError(
        f"{type(field).__name__} does not say what it keeps of a token, so its flow cannot be "
        "continued token by token. Subclass jaxflow.fields.AbstractCausalField, with keys_values "
        "and attend, or generate with cache=False."
    )


def apply(matrix: Array | Callable | None, x: Float[Array, "n d"]) -> Array:
    """x_j -> A x_j for each row, or A(x_j) where A is a function; no matrix is the identity.

    **Raises:** `ValueError` for tokens of another dimension.
    """
    if matrix is None:
        return x
    if callable(matrix):
        return jax.vmap(matrix)(x)
    if matrix.shape[1] != x.shape[1]:
        raise ValueError(
            f"a matrix of shape {matrix.shape} acts on tokens of dimension {matrix.shape[1]}; got "
            f"tokens of dimension {x.shape[1]}."
        )
    return jnp.matmul(x, matrix.astype(x.dtype).T, precision="highest")


def visible_log_weights(kept: Array, index: ScalarLike, left: int | None = None):
    """Log-weights that show a query the tokens up to its index, and `left` before it at most."""
    j = jnp.arange(len(kept))
    seen = j <= index if left is None else (j <= index) & (j >= index - left)
    return jnp.where(seen, 0.0, -jnp.inf).astype(accumulation_dtype(kept.dtype))


# ------------------------------------------------------------------ fields made of fields


class AbstractCompositeField(AbstractCausalField):
    """A field made of other fields; its flow can be continued if those of all of them can."""

    @abc.abstractmethod
    def inside(self, t: ScalarLike) -> tuple[AbstractField, ...]:
        """The fields it is made of, at time t."""

    @abc.abstractmethod
    def split(self) -> tuple[AbstractField, ...]:
        """Its `parts`: fields that add up to it."""


class AbstractWrapper(AbstractCompositeField):
    """A field around another one, in coordinates of its own.

        X_t[mu](x) = leave(t, x, F_t[enter_# mu](enter(x)))

    To write one: subclass, and give it the field F as `field`, the `geometry` on which X lives
    (that of F, or its own), whether X is `linear` in F, and two methods. Splitting methods, the
    generation of text and observables of attention then see through it:

    ```python
    from typing import ClassVar

    class Clipped(jaxflow.fields.AbstractWrapper):
        field: jaxflow.AbstractField
        linear: ClassVar[bool] = False

        @property
        def geometry(self):
            return self.field.geometry

        def enter(self, x):
            return x

        def leave(self, t, x, v):
            return jnp.clip(v, -1, 1)
    ```
    """

    field: eqx.AbstractVar[AbstractField]
    linear: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def enter(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """The points where F is asked, and tokens that it sees, for those of X."""

    @abc.abstractmethod
    def leave(
        self, t: ScalarLike, x: Float[Array, "m d"], v: Float[Array, "m d"]
    ) -> Float[Array, "m d"]:
        """The velocity at x, from the velocity v of F at enter(x)."""

    def seen(self, mu: Measure) -> Measure:
        """enter_# mu, the measure that F sees."""
        return eqx.tree_at(lambda mu: mu.points, mu, self.enter(mu.points))

    def __call__(self, t, x, mu):
        seen = self.seen(mu)  # where x are the tokens of mu, the field is told so
        entered = seen.points if x is mu.points else self.enter(x)
        return self.leave(t, x, self.field(t, entered, seen))

    def keys_values(self, t, y, start=0):
        return causal(self.field).keys_values(t, self.enter(y), start)

    def attend(self, t, x, keys_values, index):
        velocity = causal(self.field).attend(t, self.enter(x), keys_values, index)
        return self.leave(t, x, velocity)

    def inside(self, t):
        return (self.field,)

    def split(self):
        if not self.linear:
            return (self,)
        around = lambda part: eqx.tree_at(lambda wrapper: wrapper.field, self, part)
        return tuple(around(part) for part in self.field.parts)


class Whole(AbstractDivergenceField, AbstractWrapper):
    """The field itself, which splitting methods step with as a whole.

    Of a sum they take the parts one after another; of `Whole(a + b)` both at once, as transformers
    do with attention and feed-forward in parallel.

    **Arguments:** `field`, any field.

    **Raises:** `TypeError` for what is no field.
    """

    field: AbstractField
    linear: ClassVar[bool] = False

    def __init__(self, field: AbstractField):
        self.field = is_field(field)

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def enter(self, x):
        return x

    def leave(self, t, x, v):
        return v

    def divergence(self, t, x, mu):
        return divergence(self.field, t, x, mu)


class Sum(AbstractDivergenceField, AbstractCompositeField):
    """X = sum_k X_k, of fields on one geometry.

    **Arguments:** `fields`, X_1 to X_K, at least one; `a + b` makes such a sum.

    **Raises:** `TypeError` if one of them is no field, `ValueError` if there is none, or if they
    live on different geometries.
    """

    fields: tuple[AbstractField, ...]
    geometry: AbstractGeometry

    def __init__(self, fields: tuple[AbstractField, ...]):
        if not isinstance(fields, tuple | list) or not fields:
            raise ValueError(f"a sum takes a tuple of at least one field, got {fields!r}.")
        for field in fields:
            is_field(field)
        if not all(same_geometry(f.geometry, fields[0].geometry) for f in fields):
            raise ValueError(
                "the fields of a sum must live on one geometry, got "
                f"{', '.join(repr(f.geometry) for f in fields)}. Pass the same `geometry=` to each."
            )
        self.fields = tuple(fields)
        self.geometry = fields[0].geometry

    def __call__(self, t, x, mu):
        return reduce(jnp.add, [field(t, x, mu) for field in self.fields])

    def keys_values(self, t, y, start=0):
        return tuple(causal(field).keys_values(t, y, start) for field in self.fields)

    def attend(self, t, x, keys_values, index):
        pairs = zip(self.fields, keys_values, strict=True)
        return reduce(jnp.add, [causal(f).attend(t, x, kept, index) for f, kept in pairs])

    def divergence(self, t, x, mu):
        return reduce(jnp.add, [divergence(field, t, x, mu) for field in self.fields])

    def inside(self, t):
        return self.fields

    def split(self):
        return tuple(part for field in self.fields for part in field.parts)


class Scaled(AbstractDivergenceField, AbstractWrapper):
    """factor * X.

    **Arguments:** `factor`, a finite number, which may be traced; `field`, X. `2.0 * field` makes
    such a multiple.

    **Raises:** `ValueError` or `TypeError` for a factor that is no finite real number, or for what
    is no field.
    """

    factor: Float[Array, ""]
    field: AbstractField
    linear: ClassVar[bool] = True

    def __init__(self, factor: ScalarLike, field: AbstractField):
        self.factor = real("the factor of a field", factor)
        self.field = is_field(field)

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def enter(self, x):
        return x

    def leave(self, t, x, v):
        return self.factor.astype(x.dtype) * v

    def divergence(self, t, x, mu):
        return self.leave(t, x, divergence(self.field, t, x, mu))


def all_fields(field: AbstractField) -> list[AbstractField]:
    """The field and all that it is made of."""
    inside = field.inside(0.0) if isinstance(field, AbstractCompositeField) else ()
    return [field, *(found for inner in inside for found in all_fields(inner))]


def tells_apart(field: AbstractField) -> str | None:
    """What in the field asks in which order tokens come, as far as it says so itself."""
    for inner in all_fields(field):
        for name in ("causal", "window", "mask", "rotary"):
            value = getattr(inner, name, None)
            if value is None or value is False:
                continue
            shown = value if np.ndim(value) == 0 else f"an array of shape {np.shape(value)}"
            return f"{type(inner).__name__}({name}={shown})"
    return None


# ------------------------------------------------------------------ divergence


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

    **Raises:** `ValueError` or `TypeError` for points of another shape, or no samples.

    ```python
    >>> mu = jaxflow.measure.gaussian(5, 3, key=jax.random.key(0))
    >>> field = jaxflow.LinearDrift(jnp.eye(3), geometry=jaxflow.Euclidean())  # X(x) = x
    >>> jaxflow.divergence(field, 0.0, mu.points, mu).tolist()
    [3.0, 3.0, 3.0, 3.0, 3.0]

    ```
    """
    is_field(field)
    instance("mu", mu, Measure, "jaxflow.Measure(points)")
    x = array("x", x)
    if x.ndim != 2 or x.shape[1] != mu.d:
        raise ValueError(
            f"x must have shape (m, {mu.d}), the dimension of mu's tokens; got {x.shape}."
        )
    if key is None and isinstance(field, AbstractDivergenceField):
        return field.divergence(t, x, mu)
    if key is None:
        return divergence_by_derivatives(field, t, x, mu)
    z = jax.random.rademacher(key, (count("samples", samples), *x.shape), x.dtype)
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


def same_geometry(one: AbstractGeometry, other: AbstractGeometry) -> bool:
    """Whether two geometries are one; numbers that are not known yet may be."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    known = [(a, b) for a, b in pairs if is_concrete(a, b)]
    return all(np.array_equal(a, b) for a, b in known)
