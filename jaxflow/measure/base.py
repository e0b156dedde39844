"""Measures: prompts as weighted point clouds.

mu = sum_j w_j delta_{x_j},  w_j >= 0,  sum_j w_j = 1
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._rules import array, function, known
from .._types import ArrayLike, LogWeights, Points, accumulation_dtype


class Measure(eqx.Module):
    """An empirical probability measure mu = sum_j w_j delta_{x_j} on R^d.

    **Arguments:**

    - `points`: shape `(*batch, n, d)`. Leading axes are systems, or saved times.
    - `log_weights`: log w_j up to a constant, shape `(n,)` (shared by every system and time) or
      `(*batch, n)`. `-inf` is a token without mass (padding). `None` is the uniform weight 1/n.

    - `signs`: `None`, or 1 and -1, `(*batch, n)`, for weights exp(log_weights) signs that are not
      all positive: what `jaxflow.measure.compress` gives. Fields of attention take such a
      measure, and what needs positive weights, such as a count of clusters, refuses it.

    Indexing, iteration and `len` run over the leading axis: `sol.measures[-1]`.

    **Raises:** `ValueError` or `TypeError` for shapes and dtypes that make no measure, and, where
    the log-weights are known, for nan, inf, and systems without any mass.

    ```python
    >>> mu = jaxflow.Measure([[1.0, 0.0], [0.0, 1.0]], log_weights=[0.0, -jnp.inf])
    >>> mu.mean.tolist()
    [1.0, 0.0]

    ```
    """

    points: Points
    log_weights: LogWeights | None = None
    signs: LogWeights | None = None

    def __init__(
        self,
        points: ArrayLike,
        log_weights: ArrayLike | None = None,
        signs: Array | None = None,
    ):
        points = array("points", points)
        if points.ndim < 2 or 0 in points.shape:
            raise ValueError(
                "points must have shape (*batch, n, d) with at least one token and one dimension; "
                f"got {points.shape}."
            )
        if not jnp.issubdtype(points.dtype, jnp.floating):
            raise TypeError(f"points must be floating point, got {points.dtype}. Cast them first.")
        if log_weights is not None:
            log_weights = array("log_weights", log_weights)
            if log_weights.shape not in (points.shape[-2:-1], points.shape[:-1]):
                raise ValueError(
                    f"log_weights must have one entry a token, shape {points.shape[-2:-1]} or "
                    f"{points.shape[:-1]} for points {points.shape}; got {log_weights.shape}."
                )
            if not jnp.issubdtype(log_weights.dtype, jnp.floating):
                raise TypeError(f"log_weights must be floating point, got {log_weights.dtype}.")
            _check_mass(known(log_weights))
        self.points = jnp.asarray(points, points.dtype)  # Never weakly typed.
        self.log_weights = log_weights
        if signs is not None and (log_weights is None or signs.shape != log_weights.shape):
            raise ValueError("signs must have the shape of log_weights, which they go with.")
        self.signs = signs

    @property
    def n(self) -> int:
        """The number of tokens."""
        return self.points.shape[-2]

    @property
    def d(self) -> int:
        """The dimension of a token."""
        return self.points.shape[-1]

    @property
    def log_probabilities(self) -> Float[Array, "*batch n"]:
        """log w_j, normalised to sum_j w_j = 1.

        **Raises:** `TypeError` for weights with signs, which have no logarithms.
        """
        if self.signs is not None:
            raise TypeError("a compressed measure has weights of both signs, without logarithms.")
        if self.log_weights is None:
            return jnp.full(
                self.points.shape[:-1], -np.log(self.n), accumulation_dtype(self.points.dtype)
            )
        logs = jax.nn.log_softmax(
            self.log_weights.astype(accumulation_dtype(self.points.dtype)), axis=-1
        )
        return jnp.broadcast_to(logs, self.points.shape[:-1])

    @property
    def weights(self) -> Float[Array, "*batch n"]:
        """w_j, with sum_j w_j = 1."""
        if self.log_weights is not None and self.signs is not None:
            return jnp.exp(self.log_weights) * self.signs
        return jnp.exp(self.log_probabilities)

    def __len__(self) -> int:
        self._check_leading()
        return self.points.shape[0]

    def __getitem__(self, index: Any) -> "Measure":
        self._check_leading()
        index = np.asarray(index) if isinstance(index, list | int | np.integer) else index
        self._check_index(index)
        if self.log_weights is None or self.log_weights.ndim == 1:
            return Measure(self.points[index], self.log_weights, self.signs)
        signs = None if self.signs is None else self.signs[index]
        return Measure(self.points[index], self.log_weights[index], signs)

    def _check_index(self, index: Any):
        """JAX would take the nearest entry for an index beyond the last."""
        if isinstance(index, np.ndarray | jax.Array):
            if jnp.issubdtype(index.dtype, jnp.integer):
                there, least, most = known(index), -len(self), len(self) - 1
                if there is None or ((there >= least) & (there <= most)).all():
                    return
                raise IndexError(
                    f"index {there} is out of range: the leading axis has {len(self)} entries."
                )
            if index.dtype == bool and index.shape == (len(self),):
                return
        if not isinstance(index, slice | tuple | type(Ellipsis)):
            raise IndexError(
                "a measure is indexed by integers, slices, and masks of its leading axis of "
                f"{len(self)} entries; got {index!r}."
            )

    def _check_leading(self):
        if self.points.ndim == 2:
            raise TypeError(
                "this measure has no leading axis of times or systems to index; "
                "index `measure.points` for its tokens."
            )

    def expectation(self, fn: Callable[[Float[Array, " d"]], Array]) -> Array:
        """E_mu[fn(x)] = sum_j w_j fn(x_j), for a function of one token.

        **Raises:** `TypeError` where fn is no function with an array as its value.
        """
        values = self._map(fn)
        axis = self.points.ndim - 2
        weights = self.weights.astype(values.dtype)
        weights = weights.reshape(weights.shape + (1,) * (values.ndim - axis - 1))
        return (weights * values).sum(axis=axis)

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        """m = E_mu[x]."""
        return jnp.einsum("...n,...nd->...d", self.weights.astype(self.points.dtype), self.points)

    @property
    def covariance(self) -> Float[Array, "*batch d d"]:
        """E_mu[(x - m)(x - m)^T]."""
        centred = self.points - self.mean[..., None, :]
        weights = self.weights.astype(self.points.dtype)
        return jnp.einsum("...n,...ni,...nj->...ij", weights, centred, centred)

    def push_forward(self, fn: Callable[[Float[Array, " d"]], Float[Array, " k"]]) -> "Measure":
        """fn_# mu: the law of fn(x), for a map of one token.

        **Raises:** `ValueError` or `TypeError` where fn maps no token to a vector.
        """
        return Measure(self._map(fn), self.log_weights, self.signs)

    def _map(self, fn: Callable) -> Array:
        function("what maps a token", fn)
        token = jax.ShapeDtypeStruct((self.d,), self.points.dtype)
        value = jax.eval_shape(fn, token)
        if not isinstance(value, jax.ShapeDtypeStruct):
            raise TypeError(f"a function of one token must return one array, got {value!r}.")
        for _ in range(self.points.ndim - 1):
            fn = jax.vmap(fn)
        return fn(self.points)


def _check_mass(log_weights: np.ndarray | None):
    """What is known of log-weights: that they are those of a measure, in each system."""
    if log_weights is None or (np.isfinite(log_weights.max(axis=-1))).all():
        return
    if np.isnan(log_weights).any() or np.isposinf(log_weights).any():
        raise ValueError("log_weights must be finite, or -inf for a token without mass.")
    raise ValueError(
        "log_weights must leave some mass: one of them above -inf in each system, and not all -inf."
    )


def check_measure(name: str, value: Any, *, signed: bool = False):
    """A measure, as functions of a measure ask for one; with signs only where they say so.

    **Arguments:** `name`: what errors call it; `value`: what must be a measure; `signed`: whether
    its weights may have signs.

    **Raises:** `TypeError` for anything else.

    ```python
    >>> jaxflow.measure.check_measure("mu", jaxflow.measure.circle(3))  # and no more

    ```
    """
    if isinstance(value, Measure) and value.signs is not None and not signed:
        raise TypeError(
            f"{name} must have positive weights, and those of a compressed measure have signs: "
            "pass the measure that was compressed."
        )
    if not isinstance(value, Measure):
        raise TypeError(
            f"{name} must be a jaxflow.Measure, got {type(value).__name__}. Wrap points (n, d) in "
            "jaxflow.Measure(points), or take a solution's: sol.last."
        )
