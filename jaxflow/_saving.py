"""What a flow saves, and what its events see: points on the geometry, and observables of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ._types import LogWeights, Points
from .fields import AbstractField
from .geometry import AbstractGeometry
from .measure import Measure

save_points = diffrax.SubSaveAt(t1=True).fn  # diffrax's default: save the state


class FlowArgs(NamedTuple):
    """What a user's own `SaveAt(fn=...)` or event receives as `args`."""

    field: AbstractField
    log_weights: LogWeights | None
    observe: dict[str, Callable]


def over_systems(fn: Callable, y: Points, log_weights: Array | None):
    """fn(points, log_weights) over the leading axes of the points."""
    shared = log_weights is None or log_weights.ndim == 1
    for _ in range(y.ndim - 2):
        fn = jax.vmap(fn, in_axes=(0, None if shared else 0))
    return fn(y, log_weights)


class Looking(eqx.Module):
    """The condition of an event, which sees the points as they are saved."""

    condition: Callable
    geometry: AbstractGeometry

    def __call__(self, t: Any, y: Points, args: FlowArgs, **about: Any) -> Array:
        return self.condition(t, self.geometry.retract(y), args, **about)


def looking(event: diffrax.Event, geometry: AbstractGeometry) -> diffrax.Event:
    """The event, whose conditions see the points as they are saved."""
    wrap = lambda condition: Looking(condition, geometry)
    conditions = jtu.tree_map(wrap, event.cond_fn, is_leaf=callable)
    return diffrax.Event(conditions, event.root_finder, event.direction)


class Saved(eqx.Module):
    """What is saved at a time: the points, or the value of a user's own function; observables."""

    points: Points | None
    value: Any
    observed: dict[str, Any]


def is_sub(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def saving(saveat: diffrax.SaveAt, geometry: AbstractGeometry) -> diffrax.SaveAt:
    """Saves retracted points and the observables; and the last state, to report failures."""

    def wrap(sub):
        def fn(t, y, args):
            y = geometry.retract(y)
            observed = _observe(t, y, args.log_weights, args.observe)
            if sub.fn is save_points:
                return Saved(y, None, observed)
            return Saved(None, sub.fn(t, y, args), observed)

        return eqx.tree_at(lambda s: s.fn, sub, fn)

    subs = jtu.tree_map(wrap, saveat.subs, is_leaf=is_sub)
    last = diffrax.SubSaveAt(t1=True)
    return eqx.tree_at(lambda s: s.subs, saveat, (subs, last), is_leaf=lambda x: x is None)


def _observe(t, y, log_weights, observe):
    def all_of(y, log_weights):
        mu = Measure(y, log_weights)
        return {name: fn(t, mu) for name, fn in observe.items()}

    def as_float(value):
        value = jnp.asarray(value)
        return value if eqx.is_inexact_array(value) else value.astype(y.dtype)

    return jtu.tree_map(as_float, over_systems(all_of, y, log_weights))


def observe_saved(sol, geometry, log_weights, observe):
    """The same of a solution that saved nothing but states, after the solve."""
    points = geometry.retract(sol.ys)
    one = lambda saved: _observe(saved[0], saved[1], log_weights, observe)
    return Saved(points, None, jax.lax.map(one, (sol.ts, points)))
