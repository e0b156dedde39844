"""Compressed: the field of the compressed measure, O(n) instead of O(n^2) in low dimension."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float

from .._rules import constant, positive
from .._types import ScalarLike, error_where, is_concrete
from ..geometry import AbstractGeometry, Sphere
from ..measure import Box, Measure, compress
from ..measure.compression import Space, check_tolerance, grid_of
from .attention import MultiHeadAttention, SelfAttention
from .base import AbstractDivergenceField, AbstractField, Scaled, Sum, apply, divergence, is_field
from .feedforward import FeedForward, LinearDrift
from .interactions import Linear, Softmax, Unnormalised
from .normalisation import SqrtScaling
from .time import TimeDependent

ROUNDING = 1e-5  # of queries that are as long as the reach


class Compressed(AbstractDivergenceField):
    """A field of attention in which few signed points stand for the measure.

        X_t[mu](x)  =  X_t[compress(mu)](x)    up to the tolerance

    Attention asks a measure for its integrals against exp(<q, .>) alone, and
    `jaxflow.measure.compress` keeps those for all |q| up to a reach. A field evaluation then
    costs O(n) with a number of points that depends on beta and the tolerance: on the circle 46 at
    beta = 9 and 1e-5, on S^2 some 1,800. A measure with no more tokens than points is left as it
    is.

    **Arguments:**

    - `field`: `jaxflow.SelfAttention` or `jaxflow.MultiHeadAttention` without masks or
      rotary embeddings, with an interaction that is smooth in the scores (`Softmax()`,
      `Unnormalised()`, `Linear()`); sums and multiples of such, with fields that move each token on
      its own; or a `jaxflow.TimeDependent` of these.
    - `tolerance`: of the relative error of Z and of means, as in `jaxflow.measure.compress`.
    - `space`: where the tokens are: a sphere in R^2 or R^3, by default the field's geometry, or a
      `jaxflow.measure.Box` in one to three dimensions.
    - `reach`: the length of the longest query, beta |K^T Q x|. `None` takes the largest on the
      space, of the parameters at hand. A field that moves in time, is trained or traced needs a
      number that it will not exceed.

    **Raises:** `ValueError` or `TypeError` for fields, spaces, reaches and tolerances that are not
    such. A query beyond the reach, or a token outside of the space, is a `ValueError` when the
    field is called, or under `jit` the run-time error of `equinox.error_if`; it is never answered.

    ```python
    >>> mu = jaxflow.measure.uniform_sphere(10_000, 2, key=jax.random.key(0))
    >>> exact = jaxflow.SelfAttention(beta=9.0)
    >>> field = jaxflow.Compressed(exact, tolerance=1e-5)
    >>> error = field(0.0, mu.points, mu) - exact(0.0, mu.points, mu)
    >>> bool(jnp.abs(error).max() < 1e-5)
    True

    ```
    """

    field: AbstractField
    tolerance: float = eqx.field(static=True)
    space: Space = eqx.field(static=True)
    reach: float = eqx.field(static=True)

    def __init__(
        self,
        field: AbstractField,
        tolerance: float = 1e-6,
        *,
        space: Space | None = None,
        reach: float | None = None,
    ):
        self.field = is_field(field)
        for inner in _smooth(field, 0.0):
            _check_attention(inner)
        self.tolerance = check_tolerance(tolerance)
        self.space = _space(field, space)
        name = "reach, the longest query,"
        self.reach = (
            _longest(field, self.space)
            if reach is None
            else constant(name, reach, "positive and finite", positive)
        )

    @property
    def geometry(self) -> AbstractGeometry:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.field.geometry

    def points(self, d: int, dtype=jnp.float32) -> int:
        """The number of points that stand for a measure of tokens of dimension d."""
        return grid_of(self.space, d, self.reach, self.tolerance, dtype).points

    def __call__(self, t, x, mu):
        x, few = self._seen(t, x, mu)
        return self.field(t, x, few)

    def divergence(self, t, x, mu):
        x, few = self._seen(t, x, mu)
        return divergence(self.field, t, x, few)

    def _seen(self, t, x, mu: Measure) -> tuple[Float[Array, "m d"], Measure]:
        """The queries, which are within the reach, and the compressed measure."""
        if mu.n <= self.points(mu.d, mu.points.dtype):
            return x, mu
        few = compress(mu, self.space, reach=self.reach, tolerance=self.tolerance)
        longest = jax.lax.stop_gradient(_lengths(self.field, t, x)).max()
        beyond = ~(longest <= self.reach * (1 + ROUNDING))
        rule = f"queries must be within the reach of {self.reach:g} that Compressed was made for"
        remedy = "Pass reach=, the largest beta |K^T Q x|, to jaxflow.Compressed."
        if not is_concrete(beyond):
            return error_where(beyond, x, f"{rule}. {remedy}"), few
        if beyond:
            raise ValueError(f"{rule}; the longest has length {longest:.6g}. {remedy}")
        return x, few


def _space(field: AbstractField, space: Space | None) -> Space:
    if space is None:
        space = field.geometry if isinstance(field.geometry, Sphere) else None
    if not isinstance(space, Sphere | Box):
        raise ValueError(
            f"Compressed needs the space where the tokens are, got space={space!r} and the field's "
            f"geometry {field.geometry!r}: pass space=jaxflow.Sphere(), or "
            "jaxflow.measure.Box(low, high)."
        )
    if not is_concrete(*jtu.tree_leaves(space)):
        raise TypeError("the space sets the number of points and cannot be traced.")
    return space


# ------------------------------------------------------------------ queries of a field


def _smooth(field: AbstractField, t: ScalarLike) -> list[SelfAttention | MultiHeadAttention]:
    """The attention in a field, which asks for nothing else of a measure."""
    if isinstance(field, SelfAttention | MultiHeadAttention):
        return [field]
    if isinstance(field, FeedForward | LinearDrift):
        return []
    if isinstance(field, Sum | Scaled | SqrtScaling | TimeDependent):
        return [found for inner in field.inside(t) for found in _smooth(inner, t)]
    raise ValueError(
        f"Compressed does not know what {type(field).__name__} asks a measure for: compress "
        "SelfAttention, MultiHeadAttention, and their sums and multiples; wrap the result."
    )


def _check_attention(field: SelfAttention | MultiHeadAttention):
    """Tokens are exchangeable, and smooth in the scores."""
    masks = [field.causal or None, *(getattr(field, n, None) for n in ("window", "mask", "rotary"))]
    for name, value in zip(("causal", "window", "mask", "rotary"), masks, strict=True):
        if value is not None:
            raise ValueError(
                f"a compressed measure has no order of tokens, which {name}={value} asks for: "
                "compress attention without masks and positions."
            )
    if not isinstance(field.interaction, Softmax | Unnormalised | Linear):
        raise ValueError(
            f"{type(field.interaction).__name__} is no integral of exp(<q, y>): compress attention "
            "with Softmax(), Unnormalised() or Linear()."
        )
    if isinstance(field, MultiHeadAttention) and field.query_bias is not None:
        raise ValueError(
            "the reach of queries with a bias is not known: compress attention without biases."
        )
    if isinstance(field, SelfAttention) and any(map(callable, field.maps)):
        raise ValueError(
            "the reach of queries and keys that are functions is not known: compress attention "
            "with matrices."
        )


def _matrices(field: SelfAttention | MultiHeadAttention, d: int, dtype) -> Float[Array, "H d d"]:
    """beta K^T Q of each head: what makes q of x in the score <q, y>."""
    if isinstance(field, SelfAttention):
        identity = jnp.eye(d, dtype=dtype)
        query, key = apply(field.query, identity).T[None], apply(field.key, identity).T[None]
        beta = field.beta
    else:
        query, key, beta = field.query, field.of_heads(field.key, 0), field._scale
    product = jnp.einsum(
        "hpi,hpj->hij", key.astype(dtype), query.astype(dtype), precision="highest"
    )
    return jnp.asarray(beta, dtype) * product


def _lengths(field: AbstractField, t: ScalarLike, x: Float[Array, "m d"]) -> Float[Array, " m"]:
    """The length of the longest query that is asked at each x."""
    longest = jnp.zeros(len(x), x.dtype)
    for inner in _smooth(field, t):
        for matrix in _matrices(inner, x.shape[1], x.dtype):
            q = jnp.matmul(x, matrix.T, precision="highest")
            longest = jnp.maximum(longest, jnp.sqrt((q * q).sum(axis=1)))
    return longest


def _longest(field: AbstractField, space: Space) -> float:
    """The longest query on a space."""
    moving = isinstance(field, TimeDependent)
    if moving or not is_concrete(*jtu.tree_leaves(eqx.filter(field, eqx.is_array))):
        raise ValueError(
            "the reach of a field that moves in time or is traced is not known: pass "
            "Compressed(field, reach=...), the largest beta |K^T Q x|."
        )
    if isinstance(space, Sphere):
        radius, d = space.radius, None
    else:
        corner = np.maximum(np.abs(space.low), np.abs(space.high))
        radius, d = float(np.linalg.norm(corner)), space.d
    attention = _smooth(field, 0.0)
    with jax.ensure_compile_time_eval():
        matrices = [
            _matrices(one, d or _dimension(one), jnp.result_type(float)) for one in attention
        ]
    norms = [np.linalg.norm(np.asarray(m, float), 2, axis=(1, 2)).max() for m in matrices]
    return float(radius * max(norms, default=1.0)) or 1.0


def _dimension(field: SelfAttention | MultiHeadAttention) -> int:
    """Of the tokens that a field on a sphere takes; any, where all matrices are the identity."""
    for matrix in (field.query, field.key):
        if matrix is not None:
            return matrix.shape[-1]
    return 2
