"""Low-rank changes of the matrices of a curve, to be trained while the curve stays as it is.

    M(t) + sum_k w_k(t) A_k B_k = M(t) + A(t) B,    A(t) = (w_1(t) A_1, ..., w_K(t) A_K)

with the weights w_k of the curve's own coefficients, so that what was trained adds up to a curve
of the same kind: sum_k w_k(t) (M_k + A_k B_k).
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PRNGKeyArray

from .._rules import count, instance, prng_key
from .._types import ScalarLike, accumulation_dtype
from .base import AbstractField
from .curves import AbstractCurve, AbstractLinearCurve, Constant
from .hypernetwork import HyperNetwork


class LowRank(AbstractCurve):
    """A curve c(t), of which each matrix M(t) = sum_k w_k(t) M_k is changed by one of low rank.

        M(t) + sum_k w_k(t) A_k B_k,   A_k (rows, r),   B_k (r, columns)

    (Hu et al., LoRA, arXiv 2106.09685: layers in time there, so that w_k picks the layer.) At the
    start A_k = 0, so that nothing is changed, and B_k is N(0, 1 / columns). Vectors and numbers,
    such as biases, stay as they are. An array with more than two axes, such as the queries
    (H, p, d) of attention, is taken as a matrix with its last axis as columns.

    To train A and B alone, pass `jaxflow.fields.adapters` of the model to
    `jaxflow.training.fit`.

    **Arguments:**

    - `curve`: layers or another curve that is linear in its coefficients, a
      `jaxflow.Constant`, or a `jaxflow.HyperNetwork`, whose theta is changed.
    - `rank`: r, of each A_k and B_k; at most the smaller side of a matrix is taken.
    - `key`: PRNG key of the B_k.

    **Raises:** `TypeError` for a curve of another kind, `ValueError` for a rank below 1 and a curve
    without matrices.

    ```python
    >>> layers = [jaxflow.FeedForward(4, 8, jnp.tanh, key=jax.random.key(k)) for k in range(3)]
    >>> curve = jaxflow.PiecewiseConstant(layers, [0.0, 1.0, 2.0, 3.0])
    >>> adapted = jaxflow.fields.LowRank(curve, 2, key=jax.random.key(3))
    >>> {name: (a.shape, adapted.right[name].shape) for name, a in adapted.left.items()}
    {'weight_in': ((3, 8, 2), (3, 2, 4)), 'weight_out': ((3, 4, 2), (3, 2, 8))}
    >>> bool((adapted.at(1.5).weight_in == curve.at(1.5).weight_in).all())
    True

    ```
    """

    curve: AbstractCurve
    left: dict[str, Array]  # A_k, shape (K, rows, r), by the name of the array in the field
    right: dict[str, Array]  # B_k, shape (K, r, columns)

    def __init__(self, curve: AbstractCurve, rank: int, *, key: PRNGKeyArray):
        rank = count("rank", rank)
        _, stacked = _held(curve)
        arrays = _named(stacked)
        of_field = {name: a.shape[_axes(curve) :] for name, a in arrays.items()}
        matrices = {name: shape for name, shape in of_field.items() if len(shape) > 1}
        if not matrices:
            raise ValueError(
                f"{type(stacked).__name__} holds no matrix to change by one of low rank: only "
                "arrays of two axes or more are."
            )
        keys = jax.random.split(prng_key(key), len(matrices))
        self.curve, self.left, self.right = curve, {}, {}
        for (name, shape), key in zip(matrices.items(), keys, strict=True):
            rows, columns = math.prod(shape[:-1]), shape[-1]
            least, number = min(rank, rows, columns), len(arrays[name]) if _axes(curve) else 1
            dtype = accumulation_dtype(arrays[name].dtype)
            self.left[name] = jnp.zeros((number, rows, least), dtype)
            drawn = jax.random.normal(key, (number, least, columns), dtype)
            self.right[name] = drawn / math.sqrt(columns)

    @property
    def breakpoints(self):
        return self.curve.breakpoints

    def at(self, t):
        weights = self._weights(t)

        def change(left, right):
            weighted = weights.astype(left.dtype)[:, None, None] * left
            return jnp.tensordot(weighted, right, ((0, 2), (0, 1)), precision="highest")

        return self._changed(self.curve.at(t), change)

    def merged(self) -> AbstractCurve:
        """The curve with the changes in its coefficients M_k + A_k B_k: one of its own kind."""
        where, stacked = _held(self.curve)
        product = lambda left, right: jnp.matmul(left, right, precision="highest")
        return eqx.tree_at(where, self.curve, self._changed(stacked, product))

    def _weights(self, t: ScalarLike) -> Array:
        curve = self.curve
        return curve.weights(t) if isinstance(curve, AbstractLinearCurve) else jnp.ones(1)

    def _changed(self, field, change):
        """The field whose matrices M are M + change(A, B)."""

        def moved(path, a):
            if (name := _name(path)) not in self.left:
                return a
            return a + change(self.left[name], self.right[name]).reshape(a.shape).astype(a.dtype)

        return jtu.tree_map_with_path(moved, field)


def adapters(tree: Any) -> Any:
    """Which arrays of a model are those of its low-rank changes: `trainable` of
    `jaxflow.training.fit`.

    **Arguments:** `tree`, a model, field or curve.

    **Returns:** a tree of booleans like it, a filter of Equinox's.

    **Raises:** `ValueError` where it has no `jaxflow.fields.LowRank`.

    ```python
    >>> curve = jaxflow.Constant(jaxflow.LinearDrift(jnp.eye(3)))
    >>> field = jaxflow.TimeDependent(jaxflow.fields.LowRank(curve, 1, key=jax.random.key(0)))
    >>> found = eqx.filter(field, jaxflow.fields.adapters(field))
    >>> [array.shape for array in jax.tree.leaves(found)]
    [(1, 3, 1), (1, 1, 3)]

    ```
    """
    is_low_rank = lambda x: isinstance(x, LowRank)

    def mark(x):
        none = jax.tree.map(lambda _: False, x)
        factors = lambda curve: (curve.left, curve.right)
        every = lambda curve: jax.tree.map(lambda _: True, factors(curve))
        return eqx.tree_at(factors, none, every(x)) if is_low_rank(x) else False

    found = jax.tree.map(mark, tree, is_leaf=is_low_rank)
    if not any(jax.tree.leaves(found)):
        raise ValueError(
            "only what was adapted has low-rank changes to train: pass model.adapted(rank, "
            f"key=...), got a {type(tree).__name__} without."
        )
    return found


# ------------------------------------------------------------------ what a curve holds


def _held(curve: AbstractCurve) -> tuple[Any, AbstractField]:
    """Where a curve has the fields that are changed, and these; linear ones have them stacked."""
    if isinstance(curve, AbstractLinearCurve):
        where: Any = lambda c: c.coefficients
    elif isinstance(curve, Constant):
        where = lambda c: c.field
    else:
        example = (
            "jaxflow.PiecewiseConstant(fields, ts): of an adapted curve take `merged()`, of a "
            "curve of your own what jaxflow.fields.time.fit makes of it"
        )
        where = lambda c: c.base
        instance("the curve to adapt", curve, HyperNetwork, example)
    return where, where(curve)


def _axes(curve: AbstractCurve) -> int:
    """The number of axes of its arrays before those of a field's."""
    return int(isinstance(curve, AbstractLinearCurve))


def _named(field: AbstractField) -> dict[str, Array]:
    """The floating-point arrays of a field by their names in it, as `export` has them."""
    leaves = jtu.tree_leaves_with_path(field)
    return {_name(path): leaf for path, leaf in leaves if eqx.is_inexact_array(leaf)}


def _name(path: Any) -> str:
    return jtu.keystr(path, simple=True, separator=".")
