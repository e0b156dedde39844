"""The usual optimiser of transformers, with weight decay on matrices only."""

from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .._rules import count, not_negative, positive, real
from ..fields.time import AbstractLinearCurve


def adamw(
    steps: int,
    *,
    learning_rate: float = 1e-3,
    warmup: int = 100,
    final: float = 0.1,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    b1: float = 0.9,
    b2: float = 0.99,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) with clipped gradients, a linear warm-up and a cosine to the end.

    **Arguments:**

    - `steps`: of the whole training. `warmup`: the steps in which the rate grows, at most a tenth
      of them.
    - `learning_rate`: the largest. `final`: the last one, as a part of it. Neither another number
      of steps nor another rate is a new compilation of a step.
    - `weight_decay`: of matrices alone, see `jaxflow.training.matrices`.
    - `clip`: the largest norm of the whole gradient; `None` for no limit. `b1`, `b2`: Adam's.

    **Returns:** an Optax optimiser, for `jaxflow.training.fit`.

    **Raises:** TypeError for a number of steps that is not whole, ValueError for any number that is
    not finite or not in its range.

    ```python
    >>> optimiser = jaxflow.training.adamw(1000, learning_rate=3e-4)
    >>> fitted = jaxflow.training.fit(  # doctest: +SKIP
    ...     model, data, steps=1000, optimiser=optimiser
    ... )

    ```
    """
    count("steps", steps)
    count("warmup", warmup, least=0)
    for name, value in {
        "learning_rate": learning_rate,
        "final": final,
        "weight_decay": weight_decay,
    }.items():
        real(name, value, "finite and at least 0", not_negative)
    for name, value in {"b1": b1, "b2": b2}.items():
        real(name, value, "at least 0 and below 1", lambda b: 0 <= b < 1)
    if clip is not None:
        real("clip", clip, "finite and greater than 0, or None for no limit", positive)
    found = _AdamW(
        jnp.asarray(steps, float), jnp.asarray(learning_rate, float), warmup, final, weight_decay,
        clip, b1, b2,
    )  # fmt: skip
    return optax.GradientTransformation(found.init, found.update)


class _AdamW(eqx.Module):
    """Its methods are pytrees, whose arrays are operands of the compiled step."""

    steps: Float[Array, ""]
    learning_rate: Float[Array, ""]
    warmup: int = eqx.field(static=True)
    final: float = eqx.field(static=True)
    weight_decay: float = eqx.field(static=True)
    clip: float | None = eqx.field(static=True)
    b1: float = eqx.field(static=True)
    b2: float = eqx.field(static=True)

    def init(self, params):
        return self.chain.init(params)

    def update(self, updates, state, params=None):
        return self.chain.update(updates, state, params)

    @property
    def chain(self) -> optax.GradientTransformation:
        decay, clip = self.weight_decay, self.clip
        rate = cast(optax.Schedule, self.rate)
        adam = optax.adamw(rate, self.b1, self.b2, weight_decay=decay, mask=matrices)
        return adam if clip is None else optax.chain(optax.clip_by_global_norm(clip), adam)

    def rate(self, made: Int[Array, ""]) -> Float[Array, ""]:
        """Of the step after so many: Optax counts from 0, where the rate would be 0."""
        step, steps = (made + 1).astype(self.steps.dtype), self.steps
        warm = jnp.minimum(self.warmup, steps // 10)
        along = jnp.clip((step - warm) / jnp.maximum(steps - warm, 1), 0, 1)
        cosine = self.final + (1 - self.final) * (1 + jnp.cos(jnp.pi * along)) / 2
        return self.learning_rate * jnp.where(step < warm, step / jnp.maximum(warm, 1), cosine)


def matrices(model: Any) -> Any:
    """Which arrays of a model are matrices, so that weight decay acts on them.

    The coefficients of a curve are stacked along a first axis, which does not count.

    **Arguments:** `model`: a model, or any tree of arrays.

    **Returns:** a tree of the same structure, True at each matrix and False elsewhere.

    ```python
    >>> jaxflow.training.matrices({"gain": jnp.ones(3), "weight": jnp.ones((3, 3))})
    {'gain': False, 'weight': True}

    ```
    """
    return _matrices([model], axes=2)[0]


def _matrices(tree, axes: int):
    curve = lambda x: isinstance(x, AbstractLinearCurve) and x is not tree

    def mask(x):
        if curve(x):
            return _matrices(x, axes + 1)
        return x.ndim >= axes if eqx.is_array(x) else False

    return jax.tree.map(mask, tree, is_leaf=curve)
