"""What training makes small: a loss of the outputs, and costs along the flow.

L = mean loss(outputs, targets) + sum_c weight_c int_0^T c(t, mu_t) dt
    + w mean |outputs - outputs with half the step|^2
"""

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._rules import constant, count, instance
from .._types import accumulation_dtype
from ..fields import AbstractField
from ..models import AbstractExit, LanguageModel
from ..models.ends import project
from ..models.exits import check_exit
from ..models.exits import solve as exited
from ..models.generation import can_be_cached
from .data import IGNORED

CHUNK = 2**24  # logits at a time
LARGE = 2**14  # classes, of which a batch never has all logits at once

# Makes the observable (t, mu) -> number of a field, such as `jaxflow.observables.KineticEnergy`.
Cost = Callable[[AbstractField], Callable]


class Valued(eqx.Module):
    """A loss: its value, whether the solve behind it went well, and numbers to log."""

    value: Float[Array, ""]
    ok: Bool[Array, ""]
    metrics: dict[str, Any]


class AbstractLoss(eqx.Module):
    """A loss of a model on a batch."""

    @abc.abstractmethod
    def __call__(self, model: Any, inputs: Array, targets: Array, key: PRNGKeyArray) -> Valued:
        """The value on a batch; the key is of this step alone."""


class FlowLoss(AbstractLoss):
    """L = loss(outputs, targets) + sum_c weight_c int_0^T c(t, mu_t) dt + w mean |o_h - o_{h/2}|^2.

    **Arguments:**

    - `outputs`: (outputs, targets) -> a number, such as `jaxflow.training.cross_entropy`.
    - `costs`: `{name: (weight, cost)}`; `cost(field)` is an observable (t, mu) -> number, such as
      `jaxflow.observables.KineticEnergy`, the transport regulariser int |x'|^2 dt (Finlay et al.,
      arXiv 2002.02798). Its integral over the steps of the solve, a mean over the batch, is
      logged under its name, and the loss without costs as "outputs_loss". Each costs an
      evaluation of the field a step.
    - `consistency`: w, the weight of what the outputs o_h change when each step of the solver is
      cut into two, which Richardson takes for the error of the solve: a model that makes it small
      has a flow that other solvers find as well. The outputs of a
      `jaxflow.models.LanguageModel` are its normalised tokens, before the vocabulary. The
      solves take three times the evaluations, which are all counted; the mean is logged as
      "consistency", and the depth must have fixed steps.

    **Raises:** `ValueError` or `TypeError` for a consistency that is no weight.
    """

    outputs: Callable
    costs: dict[str, tuple[float, Cost]]
    consistency: float

    def __init__(
        self,
        outputs: Callable,
        costs: Mapping[str, tuple[float, Cost]] | None = None,
        *,
        consistency: float = 0.0,
    ):
        self.outputs = outputs
        self.costs = dict(costs or {})
        rule = "finite and at least 0"
        self.consistency = constant("consistency", consistency, rule, lambda w: w >= 0)

    def __call__(self, model, inputs, targets, key):
        observe = {name: cost(model.field) for name, (_, cost) in self.costs.items()}
        solved = model.solve(inputs, observe)
        value = self._of_outputs(model, solved.final, targets)
        metrics = {"num_evaluations": solved.stats["num_evaluations"]}
        ok = solved.ok
        if self.costs or self.consistency:
            metrics["outputs_loss"] = value
        for name, (weight, _) in self.costs.items():
            metrics[name] = solved.integral(name).mean()
            value = value + weight * metrics[name]
        if self.consistency:
            halved = model.with_depth(model.depth.halved()).solve(inputs)
            change = _compared(model, halved.final) - _compared(model, solved.final)
            metrics["consistency"] = (change**2).mean()
            if metrics["num_evaluations"] is not None:  # implicit methods count none
                metrics["num_evaluations"] += halved.stats["num_evaluations"]
            value, ok = value + self.consistency * metrics["consistency"], ok & halved.ok
        return Valued(value, ok, {k: v for k, v in metrics.items() if v is not None})

    def _of_outputs(self, model, mu, targets):
        if self.outputs is cross_entropy and isinstance(model, LanguageModel):
            hidden, matrix = model.hidden(mu), model.unembedding
            return chunked_cross_entropy(hidden, matrix, targets, dtype=model.dtype)
        return self.outputs(model.read_out(mu), targets)


class ExitLoss(AbstractLoss):
    """The cross-entropy of a language model each token of which exits early, as at generation.

    "num_evaluations" is then the mean over the tokens of what each takes when it is generated; the
    loss is measured with all of them at once, which skips nothing.

        evaluate(model, batches, ExitLoss(jaxflow.models.DistributionExit(0.01)))

    **Arguments:** `exit`: when, as in `jaxflow.models.LanguageModel.generate_early`.

    **Raises:** `TypeError` for what is no exit.
    """

    exit: AbstractExit

    def __check_init__(self):
        instance("exit", self.exit, AbstractExit, "jaxflow.models.DistributionExit(0.01)")

    def __call__(self, model, inputs, targets, key):
        example = "jaxflow.models.LanguageModel(...)"
        check_exit(self.exit, can_be_cached(instance("model", model, LanguageModel, example)))
        final, evaluations = exited(model, inputs, self.exit)
        value = cross_entropy(model.read_out(final), targets)
        mean = evaluations.astype(value.dtype).mean()
        return Valued(value, jnp.isfinite(value), {"num_evaluations": mean})


def _compared(model, mu):
    """The outputs; those of a language model before there are as many as words."""
    outputs = model.hidden(mu) if isinstance(model, LanguageModel) else model.read_out(mu)
    return outputs.astype(accumulation_dtype(outputs.dtype))


def cross_entropy(logits: Float[Array, "*batch classes"], targets: Int[Array, "*batch"]) -> Array:
    """-mean log softmax(logits)[target], in nats, over the targets that are not negative.

    Computed in float32 at least. For a `jaxflow.models.LanguageModel` the losses of this
    package take `jaxflow.training.chunked_cross_entropy` in its place: one value, less memory.

    **Arguments:** `logits`: shape `(*batch, classes)`; `targets`: classes, integers `(*batch,)`.

    **Returns:** a scalar.

    ```python
    >>> loss = jaxflow.training.cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
    >>> round(float(loss), 4)  # log 4
    1.3863

    ```
    """
    return _summed(logits, targets) / _counted_in(targets, logits.dtype)


def chunked_cross_entropy(
    hidden: Float[Array, "*batch d"],
    matrix: Float[Array, "classes d"],
    targets: Int[Array, "*batch"],
    *,
    rows: int | None = None,
    dtype: Any = None,
) -> Array:
    """The cross-entropy of the logits hidden matrix^T, without all of them at once.

        L = -1/N sum_i log softmax(R h_i)[target_i],   over the N targets that are not negative

    Logits are made for some rows h_i at a time, and made again for their gradient, so that the
    memory is that of (rows, classes) numbers for any batch, at the price of a third more products
    with R. Values and gradients are those of `jaxflow.training.cross_entropy` up to the order
    of sums.

    **Arguments:**

    - `hidden`: h, what the output matrix is applied to. `matrix`: R. `targets`: classes.
    - `rows`: so many at a time, in whole tokens of all systems of the batch, and one token at
      least; `None` takes as many as 2^24 logits hold (64 MiB in float32), but of 2^14 classes or
      more half of the batch at most. All at once are not made again.
    - `dtype`: of the product, such as bfloat16; default that of `hidden`.

    **Returns:** L, a scalar, in nats.

    **Raises:** `ValueError` or `TypeError` for `rows` that is no whole number of at least 1.

    ```python
    >>> h, r = jnp.ones((2, 3, 4)), jnp.zeros((5, 4))
    >>> loss = jaxflow.training.chunked_cross_entropy(h, r, jnp.zeros((2, 3), int), rows=2)
    >>> round(float(jnp.exp(loss)), 4)
    5.0

    ```
    """
    if hidden.ndim == 1:
        hidden, targets = hidden[None], targets[None]
    *batch, n, d = hidden.shape
    rows = _rows(targets.size, len(matrix)) if rows is None else count("rows", rows)
    summed = lambda h, target: _summed(project(h, matrix, dtype), target)
    counted = _counted_in(targets, hidden.dtype)
    # Cut along the tokens: a batch that is divided among devices stays so.
    each = max(1, rows // max(1, math.prod(batch)))
    if each >= n:
        return summed(hidden, targets) / counted
    short = (0, -n % each)
    whole = [(0, 0)] * len(batch)
    hidden = jnp.pad(hidden, [*whole, short, (0, 0)]).reshape(*batch, -1, each, d)
    targets = jnp.pad(targets, [*whole, short], constant_values=IGNORED).reshape(*batch, -1, each)
    chunks = jnp.moveaxis(hidden, -3, 0), jnp.moveaxis(targets, -2, 0)
    add = jax.checkpoint(lambda total, chunk: (total + summed(*chunk), None))
    zero = jnp.zeros((), accumulation_dtype(hidden.dtype))
    return jax.lax.scan(add, zero, chunks)[0] / counted


def _rows(n: int, classes: int) -> int:
    most = max(1, CHUNK // classes)
    return most if classes < LARGE else min(most, -(-n // 2))


def _counted_in(targets, dtype):
    """How many targets count, at least 1, as a number of the dtype of sums."""
    return jnp.maximum((targets >= 0).sum(), 1).astype(accumulation_dtype(dtype))


def _summed(logits, targets):
    """-sum log softmax(logits)[target] over the targets that are not negative."""
    wide = logits.astype(accumulation_dtype(logits.dtype))
    losses = optax.softmax_cross_entropy_with_integer_labels(wide, jnp.maximum(targets, 0))
    return jnp.where(targets >= 0, losses, 0).sum()


def squared_error(outputs: Float[Array, "*shape"], targets: Float[Array, "*shape"]) -> Array:
    """mean |output - target|^2 over all entries.

    **Arguments:** `outputs`, `targets`: real arrays of one shape.

    **Returns:** a scalar.

    **Raises:** `ValueError` where outputs and targets differ in shape.

    ```python
    >>> jaxflow.training.squared_error(jnp.array([1.0, 3.0]), jnp.zeros(2)).tolist()
    5.0

    ```
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"outputs and targets must have one shape, got {outputs.shape} and {targets.shape}."
        )
    return ((outputs - targets) ** 2).mean()


def evaluate(
    model: eqx.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: AbstractLoss | Callable[[Array, Array], Array] = cross_entropy,
    *,
    key: PRNGKeyArray | None = None,
    place: Callable[[Any], Array] = jnp.asarray,
) -> dict[str, float]:
    """The mean loss of a model over batches, and the means of what the loss logs.

    A model that was trained at one depth is so measured at another:

    `evaluate(model.with_depth(Depth(t1=4.0, tolerance=1e-3, solver=diffrax.Tsit5())), batches)`

    **Arguments:**

    - `batches`: pairs (inputs, targets), such as `data.validation_batches()`; classes of -1
      count for nothing.
    - `loss`, `key`: as in `jaxflow.training.fit`.
    - `place`: puts an array of a batch on a device, or divides it among several.

    **Returns:** `{"loss": ..., "num_evaluations": ...}` and the costs along the flow. The loss is
    nan where a solve failed, and where there is no batch.

    ```python
    >>> digits = jaxflow.training.image_data(batch_size=8)
    >>> model = jaxflow.models.ResidualNetwork(64, 10, 4, 1, width=4, key=jax.random.key(0))
    >>> found = jaxflow.training.evaluate(model, [digits.batch(0)])
    >>> found["loss"] > 0
    True

    ```
    """
    loss = loss if isinstance(loss, AbstractLoss) else FlowLoss(loss)
    key = jax.random.key(0) if key is None else key
    sums: dict[str, float] = {"loss": 0.0}
    weight = 0
    for inputs, targets in batches:
        size = _counted(np.asarray(targets))
        out = valued(loss, model, place(inputs), place(targets), key)
        value, ok, metrics = jax.device_get((out.value, out.ok, out.metrics))
        for name, number in {"loss": value if ok else math.nan, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + size * float(number)
        weight += size
    return {name: total / weight if weight else math.nan for name, total in sums.items()}


def _counted(targets: np.ndarray) -> int:
    """How many targets count: classes that are not negative, or all numbers."""
    return int((targets != IGNORED).sum()) if targets.dtype.kind in "iu" else targets.size


@eqx.filter_jit
def valued(loss, model, inputs, targets, key) -> Valued:
    """The loss on a batch, compiled."""
    return loss(model, inputs, targets, key)


def accuracy(model: eqx.Module, batches) -> float:
    """The part of the targets that is the most likely class.

    **Arguments:** `model`: gives logits `(*batch, classes)`; `batches`: pairs (inputs, targets),
    whose negative targets do not count.

    **Returns:** a number in [0, 1].

    **Raises:** `ValueError` where there is no batch.

    ```python
    >>> right = jaxflow.training.accuracy(model, data.validation_batches())  # doctest: +SKIP

    ```
    """
    right, total = 0, 0
    predict = eqx.filter_jit(lambda m, x: jnp.argmax(m(x), axis=-1))
    for inputs, targets in batches:
        found = jax.device_get(predict(model, jnp.asarray(inputs)))
        right, total = right + int((found == targets).sum()), total + int((targets >= 0).sum())
    if not total:
        raise ValueError("accuracy needs at least one batch.")
    return right / total
