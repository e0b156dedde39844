"""What observables share: the class for `flow(observe=...)` and the map over leading axes."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._types import ScalarLike, accumulation_dtype
from ..measure import Measure


class AbstractObservable(eqx.Module):
    """A function (t, mu) -> array that a flow evaluates at each saved time."""

    @abc.abstractmethod
    def __call__(self, t: ScalarLike, mu: Measure) -> Array:
        """The value at time t."""


def over_leading(
    fn: Callable,
    mu: Measure,
    *args: Array,
    each: tuple[Array, ...] = (),
    batch_size: int | None = None,
):
    """fn(points (n, d), log_probabilities (n,), *each, *args) over the leading axes of mu.

    The arrays of `each` have those axes too. `batch_size` systems are computed together, one batch
    after the other, so that memory is that of one batch; `None` computes all together.
    """
    shape = mu.points.shape[:-2]
    systems = (mu.points, mu.log_probabilities, *each)
    if not shape:
        return fn(*systems, *args)
    flat = [a.reshape(-1, *a.shape[len(shape) :]) for a in systems]
    one = lambda system: fn(*system, *args)
    if batch_size is None:
        out = jax.vmap(one)(flat)
    else:
        out = jax.lax.map(one, flat, batch_size=min(batch_size, len(flat[0])))
    return jax.tree.map(lambda a: a.reshape(shape + a.shape[1:]), out)


def one_by_one(fn: Callable, mu: Measure, *args: Array):
    """fn over the leading axes of mu as in `over_leading`, systems one after the other.

    They stay so under any `jax.vmap` outside, which would make each branch of a system run both of
    its sides. Not differentiable.
    """
    fn = jax.custom_batching.sequential_vmap(fn)
    mu, args = jax.lax.stop_gradient((mu, args))
    mapped = fn
    for _ in mu.points.shape[:-2]:
        mapped = jax.vmap(mapped, in_axes=(0, 0, *(None for _ in args)))
    return mapped(mu.points, mu.log_probabilities, *args)


def over_two(fn: Callable, mu: Measure, nu: Measure, *args: Any):
    """fn(x, v, y, w, *args) of the points and weights of two measures, over their leading axes.

    Leading axes are broadcast; both measures come in the wider of their dtypes.
    """
    dtype = np.promote_types(*(accumulation_dtype(m.points.dtype) for m in (mu, nu)))
    leading = mu.points.shape[:-2], nu.points.shape[:-2]
    try:
        shape = np.broadcast_shapes(*leading)
    except ValueError:
        raise ValueError(
            f"the leading axes of two measures must broadcast, got {leading[0]} and {leading[1]}."
        ) from None

    def arrays(measure):
        pair = (measure.points, (measure.n, measure.d)), (measure.weights, (measure.n,))
        return (jnp.broadcast_to(a.astype(dtype), shape + core) for a, core in pair)

    mapped = lambda *systems: fn(*systems, *args)
    for _ in shape:
        mapped = jax.vmap(mapped)
    return mapped(*arrays(mu), *arrays(nu))


def present(x: Array, logs: Array) -> Array:
    """Which tokens count: those with mass and finite coordinates; shape `(n,)`."""
    return ~jnp.isneginf(logs) & jnp.isfinite(x).all(axis=1)


def whole(x: Array, logs: Array) -> Array:
    """Whether tokens (*batch, n, d) make a measure: finite where they have mass, of which there is
    some (the normalised logarithms of no mass at all are nan); shape `(*batch,)`."""
    finite = jnp.isfinite(x).all(axis=-1) & jnp.isfinite(logs)
    return (jnp.isneginf(logs) | finite).all(axis=-1)


def or_nan(value: Array, *measures: Measure) -> Array:
    """The value `(*batch, ...)` where each measure is whole, nan elsewhere."""
    held = jnp.array(True)
    for mu in measures:
        held = held & whole(mu.points, mu.log_probabilities)
    return jnp.where(held.reshape(held.shape + (1,) * (value.ndim - held.ndim)), value, jnp.nan)
