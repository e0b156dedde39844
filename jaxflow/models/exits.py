"""Early exit: the flow of a token ends where it hardly changes any more.

    x_i(t) = x_i(t_k) for t >= t_k,   t_k the end of the first step that changes x_i little

The text goes on with what is there at that time. Tokens that follow see the keys and values which
the state that stays has at later times (depth-adaptive transformers, arXiv 1910.10073; state
propagation, arXiv 2207.07061), so that a token costs its steps up to t_k, and after that its keys
and values alone. As a token moves without regard to those that follow, when it exits depends on
what is before it alone: a text goes on from any part of it as it does from its beginning, and all
its tokens at once have the distributions that they have one after another.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._rules import instance, not_negative, real
from .._types import Scalar
from ..explicit import evaluations_per_step, explicit_step
from ..fields.time import jumps
from ..measure import Measure
from ..solvers import along, step_times


class AbstractExit(eqx.Module):
    """When a token exits: where a step changed less than `tolerance`.

    To write one: subclass, and say what is compared, and how far it changed.
    """

    tolerance: eqx.AbstractVar[Scalar]

    @abc.abstractmethod
    def of(self, model: Any, x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        """What is compared of tokens at x."""

    @abc.abstractmethod
    def change(
        self, before: Float[Array, "n k"], after: Float[Array, "n k"], h: Any
    ) -> Float[Array, " n"]:
        """How far it changed in a step of length h."""


class VelocityExit(AbstractExit):
    """A token exits where its relative velocity |x(t + h) - x(t)| / (h |x(t + h)|) is small.

    **Arguments:** `tolerance`, per unit of time; 0 lets no token exit.

    **Raises:** `ValueError` or `TypeError` for a tolerance that is negative or no number.
    """

    tolerance: Scalar = eqx.field(converter=lambda a: _tolerance(a))

    def of(self, model, x):
        return x

    def change(self, before, after, h):
        size = jnp.linalg.norm(after, axis=-1)
        return jnp.linalg.norm(after - before, axis=-1) / (jnp.asarray(h, size.dtype) * size)


class DistributionExit(AbstractExit):
    """A token exits where the distribution of the next one, read out after each step, settles.

        1/2 sum_w |p_{t+h}(w) - p_t(w)| < tolerance,   in total variation

    Each step then reads out once, which with a large vocabulary can cost more than it saves.

    **Arguments:** `tolerance`, a probability: 0 lets no token exit, and more than 1 each one after
    its first step.

    **Raises:** `ValueError` or `TypeError` for a tolerance that is negative or no number.
    """

    tolerance: Scalar = eqx.field(converter=lambda a: _tolerance(a))

    def of(self, model, x):
        return jax.nn.softmax(model.read_out(Measure(x)))

    def change(self, before, after, h):
        return jnp.abs(after - before).sum(axis=-1) / 2


def _tolerance(value: Any) -> Scalar:
    return real("the tolerance of an exit", value, "finite and at least 0", not_negative)


def check_exit(exit: Any, cached: bool):
    """**Raises:** `TypeError` for what is no exit, `ValueError` for a model without a cache."""
    instance("exit", exit, AbstractExit, "jaxflow.models.DistributionExit(0.01)")
    if not cached:
        raise ValueError(
            "a token exits between steps that are known, and leaves its keys and values: the depth "
            "must have fixed steps of an explicit method, and the field must be causal and say "
            "what it keeps (jaxflow.fields.AbstractCausalField). Take exit=None."
        )


# ------------------------------------------------------------------ steps of tokens that stay

# (part, t, z, moves) -> its velocity at z; where no token moves any more it is not asked.
Velocity = Callable[[Any, Any, Array], Array]


class Exited(NamedTuple):
    """Tokens `(b, n, d)` at time T, the steps `(b, n)` that each took, the number of steps that
    were made, of all together, and what a step kept, along a first axis."""

    points: Array
    steps: Int[Array, "b n"]
    made: Int[Array, ""]
    kept: Any


def step(model, t0, t1, y: Float[Array, "n d"], done: Bool[Array, " n"], velocity: Velocity):
    """The tokens after a step, in which those that are done stay, at each stage of it."""
    field, solver = model.field, along(model.depth.solver, model.field)
    stay = lambda z: jnp.where(done[:, None], y, z)
    at = lambda part, t, z: velocity(part, t, stay(field.geometry.retract(z)))
    return stay(explicit_step(solver, field, t0, t1, y, at))


def over_steps(model, exit: AbstractExit, y: Float[Array, "b n d"], one: Callable, kept: Any):
    """The steps of the depth, of which those after the last exit do not move a token.

    **Arguments:** `one(moves, t0, t1, y, done, kept)`, a step of one system: (y, kept); where
    `moves` is False, all are done. `kept`: what the steps take, along a first axis.
    """
    ts = jnp.asarray(step_times(model.depth.times, jumps(model.field)))

    def body(carry, inputs):
        y, seen, done, steps, made = carry
        t0, t1, kept = inputs

        def move(y, seen, done, kept):
            y, kept = jax.vmap(lambda *a: one(True, t0, t1, *a))(y, done, kept)
            now = jax.vmap(lambda x: exit.of(model, x))(y)
            change = jax.vmap(lambda a, b: exit.change(a, b, t1 - t0))(seen, now)
            return y, now, done | (change < exit.tolerance.astype(change.dtype)), kept

        def stay(y, seen, done, kept):
            _, kept = jax.vmap(lambda *a: one(False, t0, t1, *a))(y, done, kept)
            return y, seen, done, kept

        ended = done.all()
        one_more = lambda counted, more: counted + more.astype(counted.dtype)
        steps, made = one_more(steps, ~done), one_more(made, ~ended)
        y, seen, done, kept = jax.lax.cond(ended, stay, move, y, seen, done, kept)
        return (y, seen, done, steps, made), kept

    seen = jax.vmap(lambda x: exit.of(model, x))(y)
    none = jnp.zeros(y.shape[:2], int)
    start = y, seen, none > 0, none, jnp.zeros((), int)
    (y, _, _, steps, made), kept = jax.lax.scan(body, start, (ts[:-1], ts[1:], kept))
    return Exited(y, steps, made, kept)


def evaluations(model, steps: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """The evaluations of the field that steps take."""
    per_step = evaluations_per_step(model.depth.solver, len(model.field.parts))
    assert per_step is not None  # of explicit methods
    return per_step[1] * steps


def solve(model, inputs: Any, exit: AbstractExit) -> tuple[Measure, Int[Array, "*batch n"]]:
    """The tokens of texts `(*batch, n)` at time T, where each exits by itself, and the evaluations
    that each takes when it is generated; here all are computed together.

    **Raises:** as `jaxflow.models.LanguageModel` called with the tokens.
    """
    x = model.embed(inputs).points

    def one(moves, t0, t1, y, done, kept):
        velocity = lambda part, t, z: part(t, z, Measure(z))
        return (step(model, t0, t1, y, done, velocity) if moves else y), kept

    found = over_steps(model, exit, x.reshape(-1, *x.shape[-2:]), one, None)
    counted = evaluations(model, found.steps).reshape(x.shape[:-1])
    return Measure(found.points.reshape(x.shape)), counted
