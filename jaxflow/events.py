"""Where a flow stops, and when it is looked at.

    until_clustered   the first time with at most so many clusters
    until_steady      the first time at which no token is faster than a speed
    until_below, until_above   the first time at which an observable passes a level
    merges            the time and the pair of each merge of clusters
    log_times         times spread evenly on a logarithmic scale

Metastable states last exponentially long in beta (arXiv 2410.06833), and the times at which they
end are what is asked for. The `until_*` are diffrax events, `flow(..., event=until_clustered())`;
the time is found by bisection in the solver's interpolation, so an observable may jump, as a count
does. The flow ends just past the crossing: its last measure satisfies the condition.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, Float

from ._functions import by_code
from ._memory import PAIRS_AT_ONCE
from ._rules import count as whole
from ._types import Points, Scalar, ScalarLike, accumulation_dtype, is_concrete
from .fields import AbstractField
from .flow import FlowArgs, FlowError, flow, over_systems, particle_velocity
from .measure import Measure
from .observables import ClusterCount, MergeTree

__all__ = [
    "Crossing",
    "log_times",
    "merges",
    "until_above",
    "until_below",
    "until_clustered",
    "until_steady",
]


def __dir__() -> list[str]:
    return __all__


class Crossing(eqx.Module):
    """The condition of an event: observable(t, mu) - level, of several systems the largest.

    **Arguments:** `observable`, any function of (t, mu); `level`; `sign`, 1 to stop below the level
    and -1 above it.

    **Raises:** `ValueError`, when it is called, for an observable that is no scalar.
    """

    observable: Callable[[Any, Measure], Any]
    level: Scalar
    sign: float = eqx.field(static=True)

    def __call__(self, t: Array, y: Points, args: FlowArgs, *, t0: Array, **_: Any) -> Array:
        def one(y, log_weights):
            return jnp.asarray(self.observable(t, Measure(y, log_weights)))

        values = over_systems(one, y, args.log_weights)
        if values.ndim != y.ndim - 2:
            raise ValueError(
                "an event needs an observable with a scalar value, got shape "
                f"{values.shape[y.ndim - 2 :]}."
            )
        values, level = values.astype(y.dtype), self.level.astype(y.dtype)
        # Past the level by more than the rounding of the value, which another program may have.
        rounding = 16 * jnp.finfo(y.dtype).eps * jnp.maximum(jnp.abs(values), jnp.abs(level))
        excess = self.sign * (values - level) + rounding
        return _from_above(excess.max(), t <= t0)


class _Slowest(eqx.Module):
    """The condition of a steady state: the largest |X_t[mu](x_i)| less a speed."""

    speed: Scalar

    def __call__(self, t: Array, y: Points, args: FlowArgs, *, t0: Array, **_: Any) -> Array:
        fastest = jnp.linalg.norm(particle_velocity(t, y, args), axis=-1).max()
        return _from_above(fastest - self.speed.astype(fastest.dtype), t <= t0)


def until_below(observable: Callable[[Any, Measure], Any], level: ScalarLike) -> diffrax.Event:
    """Stops at the first time at which observable(t, mu) < level, in every system.

    **Arguments:** `observable`, as in `flow(observe=...)`, with a scalar value: any function of
    (t, mu); `level`, which may be traced.

    **Returns:** a diffrax event, for `flow(event=...)`.

    **Raises:** `ValueError` for a level that is no scalar.

    ```python
    >>> mu0 = jaxflow.measure.from_angles([0.0, 1.0])
    >>> near = jaxflow.events.until_below(lambda t, mu: jaxflow.observables.diameter(mu), 0.1)
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(beta=1.0), mu0, t1=10.0, event=near)
    >>> bool(sol.ts[-1] < 10.0)
    True

    ```
    """
    return _event(Crossing(by_code(observable), _level(level), 1.0))


def until_above(observable: Callable[[Any, Measure], Any], level: ScalarLike) -> diffrax.Event:
    """Stops at the first time at which observable(t, mu) > level, in every system.

    **Arguments:** as in `jaxflow.events.until_below`.

    **Returns:** a diffrax event, for `flow(event=...)`.

    **Raises:** `ValueError` for a level that is no scalar.

    ```python
    >>> mu0 = jaxflow.measure.from_angles([0.0, 1.0])
    >>> together = lambda t, mu: jaxflow.observables.order_parameter(mu)
    >>> event = jaxflow.events.until_above(together, 0.99)
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(), mu0, t1=10.0, event=event)  # doctest: +SKIP

    ```
    """
    return _event(Crossing(by_code(observable), _level(level), -1.0))


def until_clustered(
    count: int = 1,
    threshold: ScalarLike = 0.999,
    *,
    radius: ScalarLike | None = None,
    min_mass: ScalarLike = 0.0,
) -> diffrax.Event:
    """Stops at the first time with at most `count` clusters, and at least one, in every system.

    **Arguments:** `count`; `threshold`, the least cosine of linked tokens, or `radius`, their
    largest distance; `min_mass`, the share of all mass from which on a component is a cluster: of
    very many tokens a few stragglers then do not count (`jaxflow.observables.cluster_labels`).

    **Returns:** a diffrax event, for `flow(event=...)`.

    **Raises:** `ValueError` or `TypeError` for a count below 1, a share outside of [0, 1] and what
    links no tokens.

    ```python
    >>> mu0 = jaxflow.measure.uniform_sphere(8, 3, key=jax.random.key(0))
    >>> stop = jaxflow.events.until_clustered()
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(), mu0, t1=100.0, event=stop)
    >>> int(jaxflow.observables.cluster_count(sol.last))
    1

    ```
    """
    if whole("count", count, 0) < 1:
        raise ValueError(f"tokens have at least one cluster, got count={count}.")
    clusters = ClusterCount(threshold, radius=radius, min_mass=min_mass)
    return until_below(_Formed(clusters), count + 0.5)


class _Formed(eqx.Module):
    """The number of clusters; of tokens where none has the least mass yet."""

    clusters: ClusterCount

    def __call__(self, t: Any, mu: Measure) -> Array:
        found = self.clusters(t, mu)
        return jnp.where(found == 0, mu.n, found)


def until_steady(speed: ScalarLike = 1e-6) -> diffrax.Event:
    """Stops at the first time at which no token is faster than `speed`: max_i |x_i'| < speed.

    One evaluation of the field a step. A metastable state moves exponentially slowly: a small
    speed tells it from a steady state no better than the eye does.

    **Arguments:** `speed`: positive, a length of R^d per time; it may be traced.

    **Returns:** a diffrax event, for `flow(event=...)`.

    **Raises:** `ValueError` where the speed is not positive.

    ```python
    >>> mu0 = jaxflow.measure.from_angles([0.0, 1.0])
    >>> event = jaxflow.events.until_steady(1e-3)
    >>> sol = jaxflow.flow(jaxflow.SelfAttention(), mu0, t1=50.0, event=event)  # doctest: +SKIP

    ```
    """
    if is_concrete(speed) and not speed > 0:
        raise ValueError(f"the speed of a steady state must be positive, got {speed}.")
    return _event(_Slowest(_level(speed)))


def log_times(
    first: float | int, t1: float | int, count: int, *, t0: float | int = 0.0
) -> Float[Array, " times"]:
    """t0, and then `count` times from t0 + first to t1, evenly spread in log (t - t0).

    For `SaveAt(ts=log_times(...))`: each decade of time is seen equally well.

    **Arguments:** `first`: how long after t0 the first time is; `t1`: the last time; `count`: at
    least 2; `t0`: the start.

    **Returns:** the times, ascending, shape `(count + 1,)`.

    **Raises:** `ValueError` where `first` is not between 0 and t1 - t0, and for fewer than 2 times.

    ```python
    >>> jaxflow.events.log_times(1.0, 1000.0, 4).round().tolist()
    [0.0, 1.0, 10.0, 100.0, 1000.0]

    ```
    """
    if not 0 < first < t1 - t0:
        raise ValueError(f"log_times needs 0 < first < t1 - t0; got {first} and {t1 - t0}.")
    if count < 2:
        raise ValueError(f"log_times needs at least 2 times, got count={count}.")
    after = np.geomspace(first, t1 - t0, count)
    after[-1] = t1 - t0
    return jnp.asarray(np.concatenate([[t0], t0 + after]), float)


# ------------------------------------------------------------------ merges


def merges(
    field: AbstractField,
    mu0: Measure,
    *,
    t1: ScalarLike,
    threshold: float | int = 0.999,
    t0: ScalarLike = 0.0,
    dt0: ScalarLike | None = None,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    max_steps: int | None = 4096,
    progress: Callable[[float, int], None] | None = None,
) -> MergeTree:
    """Each merge of two clusters along a flow: its time and its pair of tokens.

    The flow itself is not changed, so that this is the one for any field, masks and motion in time
    included, and for any distance, far ones too. Where tokens that have met stay together and
    clusters last long, `jaxflow.coarsen` finds the same tree in one solve and in far fewer
    steps, for a small distance.

    Two clusters merge when a token of the one and a token of the other first have a cosine of
    `threshold`; clusters that have merged count as one from then on. The time is found by
    bisection, and the flow goes on from there: one solve and n^2 products of tokens a merge. For
    more than some thousand tokens take `jaxflow.observables.merge_tree`, whose times are those
    that a solution saved.

    **Arguments:** `threshold`; `progress(t, clusters)`, called after each merge; the others as in
    `jaxflow.flow`, for one system, outside `jit`.

    **Returns:** a `jaxflow.observables.MergeTree` with `links`, the two tokens that met; it is
    complete if one cluster is left at t1. Where a solve fails on the way, the tree holds the
    mergers before, its `failure` says what happened, and a warning does, too.

    **Raises:** `ValueError` for several systems, and what `jaxflow.flow` raises for bad input.

    ```python
    >>> mu0 = jaxflow.measure.simplex(4, 4)  # four tokens at right angles meet at one time
    >>> tree = jaxflow.events.merges(jaxflow.SelfAttention(), mu0, t1=20.0)
    >>> len(tree.times), int(tree.sizes[-1])
    (3, 4)

    ```
    """
    if mu0.points.ndim != 2:
        raise ValueError(
            f"merges follows one system of points (n, d), got shape {mu0.points.shape}: call it "
            "for each."
        )
    massive = ~np.isneginf(np.asarray(mu0.log_probabilities))
    labels = np.where(massive, np.arange(mu0.n), -1)
    found: list[_Merge] = []
    # As the flow rounds it, so that an event at the end is one.
    t1 = float(np.asarray(t1, accumulation_dtype(mu0.points.dtype)))
    t, mu, failure = float(t0), mu0, None
    while True:
        labels = _merge(labels, _linked(mu, labels, threshold), t, found)
        clusters = len(np.unique(labels[massive]))
        if progress is not None:
            progress(t, clusters)
        if clusters == 1 or t >= t1:
            break
        try:
            sol = flow(
                field,
                mu,
                t0=t,
                t1=t1,
                dt0=dt0,
                solver=solver,
                stepsize_controller=stepsize_controller,
                max_steps=max_steps,
                event=_event(_Gap(jnp.asarray(labels), _level(threshold))),
            )
        except FlowError as error:
            failure = str(error)
            warnings.warn(f"merges found {len(found)} of the mergers, then {error}", stacklevel=2)
            break
        t, mu = float(sol.ts[-1]), sol.measures[-1]
    as_pairs = lambda values: np.array(values, int).reshape(-1, 2)
    return MergeTree(
        mu0.n,
        times=np.array([merge.t for merge in found], float),
        pairs=as_pairs([merge.pair for merge in found]),
        sizes=np.array([merge.size for merge in found], int),
        leaves=None if massive.all() else np.flatnonzero(massive),
        links=as_pairs([merge.link for merge in found]),
        failure=failure,
    )


class _Merge(NamedTuple):
    t: float
    pair: tuple[int, int]  # the first tokens of the two clusters
    link: tuple[int, int]  # the tokens that met
    size: int


class _Gap(eqx.Module):
    """The condition of a merge: threshold - max cos(x_i, x_j) over tokens of two clusters."""

    labels: Array
    threshold: Scalar

    def __call__(self, t: Array, y: Points, args: FlowArgs, *, t0: Array, **_: Any) -> Array:
        unit = y / jnp.linalg.norm(y, axis=1, keepdims=True)

        def nearest(args):
            x, label = args
            apart = (label != self.labels) & (label >= 0) & (self.labels >= 0)
            return jnp.where(apart, jnp.matmul(unit, x, precision="highest"), -1).max()

        rows = min(len(y), max(1, PAIRS_AT_ONCE // len(y)))
        closest = jax.lax.map(nearest, (unit, self.labels), batch_size=rows).max()
        return _from_above(self.threshold.astype(closest.dtype) - closest, t <= t0)


def _linked(mu: Measure, labels: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """The pairs of tokens of two clusters that are linked, the closest first.

    At the time of an event a cosine is the threshold up to rounding.
    """
    x = np.asarray(mu.points)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit @ unit.T
    apart = (labels[:, None] < labels[None]) & (labels[:, None] >= 0)
    close = apart & (cosines >= threshold - 64 * np.finfo(x.dtype).eps)
    i, j = np.nonzero(close)
    order = np.argsort(-cosines[i, j], kind="stable")
    return [
        (min(a, b), max(a, b)) for a, b in zip(i[order].tolist(), j[order].tolist(), strict=True)
    ]


def _merge(labels, links, t, found):
    """The labels after the links; each one that merges two clusters is added to `found`."""
    for i, j in links:
        one, other = sorted((labels[i], labels[j]))
        if one != other:
            labels = np.where(labels == other, one, labels)
            size = int((labels == one).sum())
            found.append(_Merge(t, (int(one), int(other)), (i, j), size))
    return labels


# ------------------------------------------------------------------ pieces


def _from_above(value, at_start):
    """An event is a change of sign: a flow that starts below the level stops right at its start."""
    return jnp.where(at_start, jnp.maximum(value, 1), value)


def _level(value: ScalarLike) -> Array:
    level = jnp.asarray(value, float)
    if level.shape != ():
        raise ValueError(f"an event has a scalar level, got shape {level.shape}.")
    return level


class _Bisection(optimistix.AbstractRootFinder):
    """Halves the interval of a change of sign until it is as short as rounding allows.

    Unlike optimistix.Bisection it asks no small value of the function, which a jump has not.
    """

    rtol: float
    atol: float
    norm: ClassVar[Callable] = jnp.abs

    def init(self, fn, y, args, options, f_struct, aux_struct, tags):
        return jnp.asarray(options["lower"], y.dtype), jnp.asarray(options["upper"], y.dtype)

    def step(self, fn, y, args, options, state, tags):
        lower, upper = state
        middle = lower + 0.5 * (upper - lower)
        value, aux = fn(middle, args)
        lower, upper = jnp.where(value > 0, middle, lower), jnp.where(value > 0, upper, middle)
        return upper, (lower, upper), aux

    def terminate(self, fn, y, args, options, state, tags):
        lower, upper = state
        short = upper - lower <= self.atol + self.rtol * jnp.abs(upper)
        return short, optimistix.RESULTS.successful

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        # Past the crossing by a part of the step in which a token moves by more than rounding:
        # what is saved has then crossed, also as another program computes it.
        lower, upper = options["lower"], options["upper"]
        eps = jnp.finfo(y.dtype).eps
        past = jnp.maximum(math.sqrt(eps) * (upper - lower), 8 * eps * jnp.abs(y))
        past = jnp.minimum(y + past, upper)
        return jnp.where(fn(past, args)[0] <= 0, past, y), aux, {}


def _event(condition: Callable) -> diffrax.Event:
    rounding = 4 * float(jnp.finfo(jnp.zeros(()).dtype).eps)
    return diffrax.Event(condition, _Bisection(rounding, rounding), direction=False)
