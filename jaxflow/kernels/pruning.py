"""What the backend "pruned" would do with given operands."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._types import ArrayLike, ScalarLike, accumulation_dtype, is_concrete
from .base import Forward, Problem, Shapes
from .expectation import _array, _check, _log_weights, _scale
from .pruned import DEFAULT, System, few
from .registry import check_named, tolerance_of


class Pruning(NamedTuple):
    """How many of the pairs of queries and keys are computed, and what that costs in accuracy.

    `asked + replaced + skipped` is the number m n of all pairs.
    """

    asked: int  # pairs computed one by one
    replaced: int  # pairs for which the moments of a ball of keys stand
    skipped: int  # pairs that are left out
    handed_over: bool  # "blocked" runs instead, and asks all pairs
    error: float  # the mean differs by at most this in norm, beside rounding


def pruning(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    log_weights: ArrayLike | None = None,
    *,
    scale: ScalarLike = 1.0,
    tolerance: float | None = None,
) -> Pruning:
    """What `softmax_expectation` does where its backend is "pruned", and what it promises.

    Keys are ordered into balls and queries into blocks. Of a ball that cannot matter to a block all
    pairs are skipped; a ball whose keys act like their mean is replaced by its mass, mean key and
    mean value; the pairs with all other balls are asked one by one. With R the largest distance of
    a value from the mean of all values (of positive weight), the backend promises

        |mean - exact mean| <= tolerance R,    |log_partition - exact log-partition| <= tolerance

    for each query, beside the rounding of its dtype; jaxflow/kernels/pruned.py has the proof.
    Where most pairs would have to be asked, or all are few, it hands over to "blocked".

    **Arguments:** `q`, `k`, `v`, `log_weights` and `scale` as for
    `jaxflow.softmax_expectation`, and

    - `tolerance`: a number below 1. The least is 1e-6 where sums are kept in float32 and 1e-13 in
      float64; `None` is 1e-6 and 1e-10. As a backend it is written "pruned:1e-4", or "pruned" for
      the default.

    **Returns:** a `jaxflow.kernels.Pruning`: the numbers of pairs asked, replaced and skipped,
    whether it hands over, and the promised bound tolerance R of the error of the mean, which is 0
    where it hands over.

    **Raises:** the errors of `jaxflow.softmax_expectation` with the backend "pruned";
    `TypeError` for traced operands, for pairs are counted outside of `jax.jit`.

    **Example:**

    ```python
    import jax
    import jax.numpy as jnp
    import jaxflow as jf

    # 2,000 tokens in 10 tight clusters on the sphere in R^16: too few for it to be worth its cost.
    centres = jf.measure.uniform_sphere(10, 16, key=jax.random.key(0)).points
    noise = 0.01 * jax.random.normal(jax.random.key(1), (2_000, 16))
    x = jnp.tile(centres, (200, 1)) + noise
    found = jf.kernels.pruning(x, x, x, scale=64.0, tolerance=1e-4)
    assert found.asked + found.replaced + found.skipped == 2_000**2 and found.handed_over
    mean, log_partition = jf.softmax_expectation(x, x, x, scale=64.0, backend="pruned:1e-4")
    ```
    """
    shapes = Shapes(_array("q", q), _array("k", k), _array("v", v))
    b = None if log_weights is None else _array("log_weights", log_weights)
    _check(shapes, b, batched=False)
    dtype = accumulation_dtype(shapes.q.dtype)
    scale = _scale(scale, dtype)
    tolerance = DEFAULT[dtype.name] if tolerance is None else tolerance_of(tolerance)
    check_named(f"pruned:{tolerance!r}", shapes, Problem())
    if not is_concrete(*shapes, *(() if b is None else (b,)), scale):
        raise TypeError(
            "pruning counts pairs outside of jax.jit, and these operands are traced. Call it with "
            "the arrays themselves."
        )
    b = jnp.zeros(len(shapes.k), dtype) if b is None else _log_weights(b, dtype)
    return _counted(Forward(*shapes, b, jnp.asarray(scale, dtype)), tolerance)


def _counted(operands: Forward, tolerance: float) -> Pruning:
    pairs = len(operands.q) * len(operands.k)
    everything = Pruning(pairs, 0, 0, True, 0.0)
    if few(operands):
        return everything
    asked, near, rows, keys, sparse, radius = jax.device_get(_looked(operands, tolerance))
    if not sparse:
        return everything
    count = lambda mask: int(rows @ (mask.astype(np.int64) @ keys))
    asked, near = count(asked), count(near)
    return Pruning(asked, near - asked, pairs - near, False, float(tolerance * radius))


@jax.jit
def _looked(operands: Forward, tolerance):
    system = System.of(operands, tolerance)
    look = system.look(replace=True)
    rows, keys = (g.valid.sum(axis=1) for g in (system.rows, system.keys))
    return look.asked, look.near, rows, keys, system.sparse(look.asked), system.radius
