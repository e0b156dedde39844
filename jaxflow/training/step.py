"""One step of training, compiled once.

    g = mean over batches of d/dtheta loss(model_theta(inputs), targets)
    theta, s <- optimiser(theta, s, g)

A step that is not finite, in its loss, its gradient or what the optimiser makes of it, changes
nothing, and nor do those after it: the update is dropped inside the compiled step, so the last good
parameters are at hand when the loop, which hears of it a step later, stops to say what went wrong.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from ..flow import FlowError
from ..models import AbstractModel, Depth
from .devices import Placement
from .losses import AbstractLoss, evaluate


class TrainingError(RuntimeError):
    """A step that is not finite, a solve or a callback that failed; the message says where."""


class State(eqx.Module):
    """What a step changes, and the key of the run."""

    params: Any
    optimiser: Any
    key: PRNGKeyArray


class Step(eqx.Module):
    """What a step is made of, beside its state."""

    static: Any
    optimiser: optax.GradientTransformation  # whose functions may hold arrays
    loss: AbstractLoss
    placement: Placement = eqx.field(static=True, default=Placement())
    depth: Depth | None = None  # in place of the model's own
    jitter: float = eqx.field(static=True, default=0.0)  # of the ends of the solver's steps

    def model(self, state: State) -> Any:
        return self._with(state.params)

    def gradient(self, state: State, batch, step):
        """Means over the batches along the first axis: (gradient, loss, ok, metrics)."""
        inputs, targets = batch
        grad = eqx.filter_value_and_grad(self._value, has_aux=True)

        def one(total, item):
            (value, (ok, metrics)), gradient = grad(state.params, *item)
            return jax.tree.map(jnp.add, total, gradient), (value, ok, metrics)

        keys = jax.random.split(jax.random.fold_in(state.key, step), len(inputs))
        zero = jax.tree.map(jnp.zeros_like, state.params)
        total, (values, ok, metrics) = jax.lax.scan(one, zero, (inputs, targets, keys))
        mean = lambda x: jnp.asarray(x, float).mean(axis=0)
        gradient = jax.tree.map(lambda g: g / len(inputs), total)
        return gradient, values.mean(), ok.all(), jax.tree.map(mean, metrics)

    def moved(self, state: State, gradient) -> State:
        """The state after the optimiser's update."""
        with jax.numpy_dtype_promotion("standard"):  # Optax needs it
            updates, optimiser = self.optimiser.update(gradient, state.optimiser, state.params)
            return State(optax.apply_updates(state.params, updates), optimiser, state.key)

    def _value(self, params, inputs, targets, key):
        model = self._with(params)
        if self.jitter:
            moves, key = jax.random.split(key)
            model = model.with_depth(model.depth.jittered(self.jitter, moves))
        out = self.loss(model, inputs, targets, key)
        return out.value, (out.ok, out.metrics)

    def _with(self, params) -> Any:
        model = eqx.combine(params, self.static)
        return model if self.depth is None else model.with_depth(self.depth)


@eqx.filter_jit(donate="all-except-first")
def update(given: tuple[Step, Any, Any, Any], state: State):
    """Makes a step, given (step, batch, number, before): (state, ok, metrics).

    `before`: whether the steps before were ok; where one was not, neither is this one. The state's
    memory goes to the new one, which is as it was where the step is not ok.
    """
    step, batch, number, before = given
    gradient, value, ok, metrics = step.gradient(state, batch, number)
    norm = optax.tree.norm(gradient)
    moved = step.moved(state, gradient)
    ok = before & ok & jnp.isfinite(value) & jnp.isfinite(norm) & _still_finite(state, moved)
    new = jax.tree.map(lambda new, old: jnp.where(ok, new, old), moved, state)
    new = step.placement.kept(new)
    own = {"loss": value, "gradient_norm": norm, "update_to_weight": _ratio(state, moved)}
    return new, ok, own | metrics


def _ratio(old: State, new: State) -> Float[Array, ""]:
    """|theta_new - theta| / |theta|, of all parameters; 0 where all of them are."""
    size = optax.tree.norm(old.params)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, new.params, old.params))
    return jnp.where(size > 0, moved / jnp.where(size > 0, size, 1), 0)


def _still_finite(old: State, new: State) -> Bool[Array, ""]:
    """Whether no number stopped being finite; an optimiser may start from an infinite one."""
    ok = jnp.array(True)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if eqx.is_inexact_array(a):
            ok = ok & (jnp.isfinite(b) | ~jnp.isfinite(a)).all()
    return ok


def evaluated(
    step: Step, state: State, number: int, batches: Callable[[], Iterator]
) -> dict[str, float]:
    """Means over the validation batches, validation_loss among them; none without a batch.

    **Raises:** TrainingError if the loss of a batch is not finite.
    """
    model = step.model(state)
    place = step.placement.batch
    means = lambda batches: evaluate(model, batches, step.loss, key=state.key, place=place)
    found = means(batches())
    if math.isfinite(found["loss"]):
        return {f"validation_{name}": value for name, value in found.items()}
    for batch in batches():
        if not math.isfinite(value := means([batch])["loss"]):
            failed = f"the evaluation after step {number} failed (loss {value:.6g}): "
            batch = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)
            raise TrainingError(failed + diagnosis(step, state, batch, number))
    return {}


def diagnosis(step: Step, state: State, batch, number: int) -> str:
    """What was not finite, computed again outside of jit for the time and the tensor."""
    remedy = " Lower the learning rate, clip gradients, or look at the batch."
    model = step.model(state)
    for inputs in batch[0]:
        if not isinstance(model, AbstractModel):
            break
        try:
            sol = model.depth.flow(model.field, model.embed(inputs), throw=True)
        except (FlowError, ValueError) as error:  # a ValueError for x(0) itself
            return str(error)
        if not np.isfinite(np.asarray(model.read_out(sol.final))).all():
            return f"the outputs at t = {model.depth.t1:g} are not finite." + remedy
    gradient, value, *_ = eqx.filter_jit(step.gradient)(state, batch, np.int32(number))
    if leaf := _infinite(gradient):
        return f"the gradient of {leaf} is not finite." + remedy
    if not np.isfinite(np.asarray(value)):
        return "the loss is not finite." + remedy
    if not np.isfinite(np.asarray(optax.tree.norm(gradient))):
        return "the gradient's norm overflows." + remedy
    moved = eqx.filter_jit(step.moved)(state, gradient)
    leaf = _infinite(moved.params) or _infinite(moved.optimiser)
    return f"the optimiser's update of {leaf} is not finite: look at its learning rate."


def _infinite(tree: Any) -> str:
    """The name of the first array that is not finite; "" where all are."""
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if eqx.is_inexact_array(leaf) and not jnp.isfinite(leaf).all():
            return jtu.keystr(path)
    return ""
