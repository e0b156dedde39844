"""What a training costs, known before it starts."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..explicit import evaluations_per_step
from ..fields import TimeDependent
from ..models import AbstractModel


def operations(
    model: AbstractModel, inputs: Any, *, steps: float | int | None = None
) -> float | None:
    """The floating-point operations of the products with parameters, in one step of training.

        2 n (4 e P + 3 R)

    for n tokens, e evaluations of a field of P parameters, and R parameters outside of it: a
    multiply-add a parameter in the forward pass, the same once more where a step is computed again
    for its gradient, and twice in the backward pass. Attention's products of tokens with tokens are
    left out; with a context shorter than d they are the smaller part.

    **Arguments:** `model`; `inputs`, a batch; `steps` of the solver, by default those of the model.

    **Returns:** a number, or `None` where the steps are adaptive or the method is implicit.

    ```python
    >>> model = jaxflow.models.ResidualNetwork(64, 10, 8, 2, width=8, key=jax.random.key(0))
    >>> jaxflow.training.operations(model, jnp.zeros((32, 64)))
    190848.0

    ```
    """
    depth, field = model.depth, model.field
    steps = depth.steps if steps is None else steps
    counts = evaluations_per_step(depth.solver, len(field.parts))
    if steps is None or counts is None:
        return None
    at_once = eqx.filter_eval_shape(field.at, 0.0) if isinstance(field, TimeDependent) else field
    mu0 = eqx.filter_eval_shape(model.embed, jnp.asarray(inputs))
    tokens = mu0.points.size // mu0.points.shape[-1]
    rest = _size(model) - _size(field)
    return 2.0 * tokens * (4 * counts[1] * steps * _size(at_once) + 3 * rest)


def _size(tree: Any) -> int:
    arrays = (a for a in jax.tree.leaves(tree) if isinstance(a, jax.Array | jax.ShapeDtypeStruct))
    return sum(a.size for a in arrays if jnp.issubdtype(a.dtype, jnp.floating))
