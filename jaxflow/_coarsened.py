"""A solver around another one, in which tokens that meet become one token.

Each step is the inner solver's, with the velocities of the tokens that stand for others. At its
end tokens that are close and contract are put on one point, and the next step starts anew. diffrax
discards what a step that it rejects has changed, mergers included.
"""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._meeting import (
    contracting,
    floats_stopped,
    frame,
    least_close,
    lengths,
    parting_rates,
)
from ._saving import FlowArgs
from ._types import LogWeights, Points, Scalar, ScalarLike, accumulation_dtype
from .explicit import evaluations_per_step
from .fields import token_velocities
from .measure import Measure
from .solvers import AbstractFieldSolver

LEAST = 64  # tokens, below which a smaller measure saves nothing
PARTS = 16  # of a step, within which the time of a merger is interpolated


class Merged(NamedTuple):
    """The tokens that are one, each array `(*batch, n)`.

    - `labels`: the token that stands for each.
    - `times`, `into`, `log_bound`: as in `Mergers`.
    """

    labels: Int[Array, "*batch n"]
    times: Float[Array, "*batch n"]
    into: Int[Array, "*batch n"]
    log_bound: Float[Array, "*batch n"] | None


class Turn(NamedTuple):
    """Of the last step: its number, whether tokens merged at its end, and how many evaluations of
    the field all mergers have cost so far."""

    number: Int[Array, ""]
    merged: Array
    again: Int[Array, ""]


def nothing_merged(y: Points, t: Array, bounded: bool) -> Merged:
    """All tokens apart."""
    own = jnp.broadcast_to(jnp.arange(y.shape[-2]), y.shape[:-1])
    filled = lambda value, like: jnp.full(own.shape, value, like.dtype)
    return Merged(
        labels=own,
        times=filled(jnp.inf, t),
        into=own,
        log_bound=filled(-jnp.inf, y) if bounded else None,
    )


class Coarsened(AbstractFieldSolver):
    """Any solver, at the end of each step of which tokens that meet become one.

    The first step meets tokens that are close at its start, so that none has to at the start.

    **Arguments:** `wrapped`, a solver for the field and its geometry; `delta`, the angle or the
    distance at which tokens meet, `None` for never; `everywhere`, merge tokens that part as well,
    and carry a bound.
    """

    wrapped: diffrax.AbstractSolver
    delta: Scalar | None
    everywhere: bool = eqx.field(static=True)

    def init(self, terms, t0, t1, y0, args):
        inner = self.wrapped.init(terms, t0, t1, y0, args)
        zero = jnp.array(0)
        apart = nothing_merged(y0, jnp.asarray(t0), self.everywhere)
        return inner, apart, Turn(zero, jnp.array(False), zero)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        inner, merged, turn = solver_state
        system = _over(y0.ndim - 2, system_of)(merged.labels, _logs(y0, args))
        y1, error, dense_info, inner, result = self.wrapped.step(
            diffrax.ODETerm(system.velocity), t0, t1, y0, args, inner, made_jump | turn.merged
        )
        path = self.interpolation_cls(t0=t0, t1=t1, **dense_info)
        y1 = _stand(y1, merged.labels)
        y1, after = self._met(t0, t1, path, y0, y1, args, merged, turn.number)
        changed = (after.labels != merged.labels).any()
        first, _ = evaluations_per_step(self.wrapped, len(args.field.parts)) or (0, 0)
        turn = Turn(turn.number + 1, changed, turn.again + jnp.where(changed, first, 0))
        return y1, error, dense_info, (inner, after, turn), result

    def compose(self, step, field, t0, t1, y):
        return step(field, t0, t1, y)

    def _met(self, t0, t1, path, y0, y1, args, merged, number):
        """The points after those that are close at the end of a step have merged."""
        if self.delta is None:
            return y1, merged
        field, delta, t0, t1, path = floats_stopped((args.field, self.delta, t0, t1, path))
        parts = jnp.linspace(0, 1, PARTS + 1, dtype=y1.dtype)[1:-1]
        inside = jax.vmap(lambda part: path.evaluate(t0 + part.astype(t0.dtype) * (t1 - t0)))(parts)
        ys = jnp.concatenate([y0[None], field.geometry.retract(inside), y1[None]])

        def one(y1, ys, logs, merged):
            return self._meet(field, delta, t0, t1, number, y1, ys, logs, merged)

        return _over(y1.ndim - 2, one)(y1, jnp.moveaxis(ys, 0, -3), _logs(y1, args), merged)

    def _meet(self, field, delta, t0, t1, number, y1, ys, logs, merged):
        """The same of one system.

        A token with another one close to it, and before it, is crowded. It goes into the first of
        those close to it that is not crowded: clusters are balls around such a token, and a dense
        ring of tokens does not become one. What is left meets at the end of the next step.
        """
        own, geometry = jnp.arange(len(y1)), field.geometry
        dtype = accumulation_dtype(y1.dtype)
        ys = floats_stopped(ys.astype(dtype))  # at the ends of equal parts of the step
        end = ys[-1]
        radius, chord = lengths(geometry, delta, y1.shape[1])
        standing = (merged.labels == own) & (jnp.exp(logs) > 0)
        root = frame(geometry, end)
        places = jnp.matmul(end, root, precision="highest")
        places = jnp.where(standing[:, None], places, jnp.nan)
        crowded = least_close(places, standing, chord) < len(y1)
        if merged.log_bound is not None:
            merged = self._longer(field, t0, t1, ys[PARTS // 2], logs, merged)

        def meet():
            target = least_close(places, standing & ~crowded, chord)
            absorbed = crowded & (target < len(y1))
            into = jnp.where(absorbed, target, own)
            centres = _centres(geometry, y1, into, absorbed, merged.labels, logs)
            together = jnp.zeros_like(absorbed).at[into].max(absorbed)
            if not self.everywhere:
                system = system_of(merged.labels, logs)
                tokens = floats_stopped((end, centres, system))
                together = self._contracting(field, t1, tokens, together, number)
            absorbed = absorbed & together[into]
            into = jnp.where(absorbed, into, own)
            labels = into[merged.labels]
            y = _stand(jnp.where(together[:, None], centres, y1), labels)
            times = _crossing(geometry, t0, t1, ys, into, radius)
            bound = merged.log_bound
            if bound is not None:
                moved = geometry.distance(end, floats_stopped(y.astype(dtype)))
                bound = jnp.logaddexp(bound, jnp.log(moved))
            return y, merged._replace(
                labels=labels,
                times=jnp.where(absorbed, times, merged.times),
                into=jnp.where(absorbed, into, merged.into),
                log_bound=bound,
            )

        return jax.lax.cond(eqxi.unvmap_any(crowded.any()), meet, lambda: (y1, merged))

    def _contracting(self, field, t, tokens, candidates, number):
        """Those of the candidates at whose centres tokens come closer.

        As many of them at once as cost less than an evaluation of the field, others in turn: those
        that do not contract would be asked first for ever.
        """
        end, centres, system = tokens
        n, d = end.shape
        total, rank = jnp.maximum(candidates.sum(), 1), jnp.cumsum(candidates) - 1

        def check(index):
            mu = system.measure(end, index)
            most = min(n, max(16, mu.n // (2 * d)))
            chosen = candidates & ((rank - number * most) % total < most)
            places = jnp.nonzero(chosen, size=most, fill_value=0)[0]
            rates, sizes = parting_rates(field, t, centres[places], mu)
            found = jnp.zeros_like(candidates).at[places].max(contracting(rates, sizes, d))
            return found & chosen

        return system.over_capacities(check)

    def _longer(self, field, t0, t1, y, logs, merged):
        """What is merged, with bounds that have grown for a step.

        By the rule of the midpoint, where tokens are at y: no jump of the field divides a step, and
        where a step ends there may be one."""
        system = floats_stopped(system_of(merged.labels, logs))

        def rates(index):
            mu = system.measure(y, index)
            return system.spread(parting_rates(field, (t0 + t1) / 2, mu.points, mu)[0], index)

        grown = (t1 - t0).astype(y.dtype) * system.over_capacities(rates)
        return merged._replace(log_bound=merged.log_bound + grown)


# ------------------------------------------------------------------ systems of fewer tokens


class System(eqx.Module):
    """Tokens of which some stand for others.

    **Arguments:** `labels`, the token that stands for each; `log_masses`, the weights of those with
    all that they stand for, -inf for the others; `order`, those that stand first; all
    `(*batch, n)`.

    The field is evaluated at the first of n, n/4, n/16, ... tokens that have room for all that
    stand for others: one program, whose cost falls as clusters form.
    """

    labels: Int[Array, "*batch n"]
    log_masses: LogWeights
    order: Int[Array, "*batch n"]

    def velocity(self, t: ScalarLike, y: Points, args: FlowArgs) -> Points:
        """X_t[mu](x_i) of all tokens, at the retracted points."""
        y = args.field.geometry.retract(y)

        def one(system, y):
            def at(index):
                mu = system.measure(y, index)
                return system.spread(token_velocities(args.field, t, mu), index)

            return system.over_capacities(at)

        return _over(y.ndim - 2, one)(self, y)

    def measure(self, y, index):
        """The measure of the tokens of this index; `None` is all."""
        if index is None:
            return Measure(y, self.log_masses)
        return Measure(y[index], self.log_masses[index])

    def spread(self, values, index):
        """What the tokens of an index have, given to all that they stand for."""
        if index is not None:
            empty = jnp.zeros((len(self.labels), *values.shape[1:]), values.dtype)
            values = empty.at[index].set(values)
        return values[self.labels]

    def over_capacities(self, fn):
        """fn(index) with the first capacity for all tokens that stand for others, or `None`."""
        n = self.labels.shape[0]
        standing = self.labels == jnp.arange(n)
        capacities = [n]
        while capacities[-1] > 4 * LEAST:
            capacities.append(-(-capacities[-1] // 4))
        if len(capacities) == 1:
            return fn(None)
        branch = lambda c: lambda: fn(None if c == n else self.order[:c])
        enough = (eqxi.unvmap_max(standing.sum()) <= jnp.asarray(capacities)).sum() - 1
        return jax.lax.switch(enough, [branch(c) for c in capacities])


def system_of(labels: Int[Array, " n"], logs: LogWeights) -> System:
    """The system of tokens with these log-weights."""
    mass = jnp.zeros_like(logs).at[labels].add(jnp.exp(logs))
    some = mass > 0
    log_masses = jnp.where(some, jnp.log(jnp.where(some, mass, 1)), -jnp.inf)
    return System(labels, log_masses, jnp.argsort(labels != jnp.arange(len(labels))))


def _over(axes: int, fn: Callable) -> Callable:
    """fn over so many leading axes of all its arguments."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


def _logs(y, args):
    return Measure(y, args.log_weights).log_probabilities


def _stand(y, labels):
    """Each token on the point of the one that stands for it."""
    return jnp.take_along_axis(y, labels[..., None], axis=-2)


def _centres(geometry, y, into, absorbed, labels, logs):
    """The weighted means of tokens and those that go into them, on the geometry."""
    mass = jnp.zeros_like(logs).at[labels].add(jnp.exp(logs))
    total = jnp.zeros_like(logs).at[into].add(mass)[into]
    # One that nothing goes into keeps its place, whatever its mass.
    alone = (total == mass) | (total == 0)
    share = jnp.where(alone, 1, mass / jnp.where(alone, 1, total))
    wide = y.astype(share.dtype)
    means = jnp.zeros_like(wide).at[into].add(share[:, None] * wide)
    return geometry.retract(jnp.where(absorbed[:, None], wide, means)).astype(y.dtype)


def _crossing(geometry, t0, t1, ys, into, radius):
    """When the distance to the token that each one goes into fell to the radius, last of all; the
    start of the step for tokens that were as close there.

    In each of equal parts of the step distances fall exponentially.
    """
    gaps = jnp.log(geometry.distance(ys, ys[:, into]) / radius)
    parts = len(gaps) - 1
    before, after = gaps[:-1], gaps[1:]
    fell = (before > 0) & (after <= 0)
    share = jnp.where(fell, before / jnp.where(fell, before - after, 1), 0)
    ends = (jnp.arange(parts, dtype=gaps.dtype)[:, None] + share) / parts
    part = jnp.where(fell, ends, 0).max(axis=0)
    return t0 + part.astype(t0.dtype) * (t1 - t0)
