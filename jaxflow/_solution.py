"""What a flow returns."""

from typing import Any, NamedTuple, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ._dataset import dataset
from ._flow_input import check_number
from ._mergers import Mergers, check_known, representatives
from ._types import ArrayLike, LogWeights, ScalarLike, is_concrete
from .geometry import AbstractGeometry
from .measure import Measure


class Sides(NamedTuple):
    """What an observable is on both sides of each saved time, where parameters may jump."""

    before: Array
    after: Array


class FlowSolution(eqx.Module):
    """What a flow returns.

    - `ts`: the saved times, shape `(times,)`; padded with inf where nothing was saved (after an
      event, or past the last step of `SaveAt(steps=True)`), as diffrax does.
    - `measures`: the measures at those times, points `(times, *batch, n, d)`; `measures[-1]` is
      the last one, and `last` the last one that was reached. `None` if `SaveAt(fn=...)` saved
      something else.
    - `observed`: `{name: values}` of `observe`, one entry a saved time, in floating point (counts
      too, so that a time that was not reached can hold inf).
    - `ys`: what a `SaveAt(fn=...)` of the user's own saved, else `None`.
    - `t0`, `end`, `final`: where the flow began, how far it came (t1, or the time of an event), and
      the measure there. With `BacksolveAdjoint` and `ImplicitAdjoint`: what was saved last.
    - `stats`: `num_steps`, `num_accepted_steps`, `num_rejected_steps`, `max_steps`, and
      `num_evaluations` of the field (of its first part, for a splitting method; `None` for
      implicit solvers, where it is not known).
    - `result`: a `diffrax.RESULTS`; `event_mask`: which event stopped the flow.

    With `SaveAt(subs=...)` these hold trees like `subs`.

    A solution of `jaxflow.coarsen` also has `merges`, `labels`, `labels_at(t)`, `coarse` and
    `bound`, of the tokens that have become one.

    ```python
    >>> mu0 = jaxflow.measure.uniform_sphere(8, 3, key=jax.random.key(0))
    >>> sol = jaxflow.flow(
    ...     jaxflow.SelfAttention(), mu0, t1=2.0, saveat=diffrax.SaveAt(ts=jnp.linspace(0, 2, 5)),
    ...     observe={"order": lambda t, mu: jaxflow.observables.order_parameter(mu)},
    ... )
    >>> sol.measures.points.shape, sol.observed["order"].shape
    ((5, 8, 3), (5,))

    ```
    """

    ts: Any
    measures: Any
    observed: Any
    ys: Any
    t0: Array
    end: Array
    final: Measure
    stats: dict[str, Any]
    result: diffrax.RESULTS
    event_mask: Any
    interpolation: diffrax.DenseInterpolation | None
    geometry: AbstractGeometry
    log_weights: LogWeights | None
    mergers: Mergers | None = None

    @property
    def last(self) -> Measure:
        """The measure at the last time that was saved, before the padding that an event leaves."""
        if not isinstance(self.measures, Measure):
            raise ValueError(
                "last needs saved points: neither SaveAt(fn=...) nor SaveAt(subs=...)."
            )
        if self.ts.ndim != 1:
            raise ValueError(
                f"last is of one flow, got times of shape {self.ts.shape}: jax.vmap it, too."
            )
        return self.measures[jnp.isfinite(self.ts).sum() - 1]

    @property
    def ok(self) -> Bool[Array, ""]:
        """Whether the solve succeeded and its end is finite."""
        return diffrax.is_okay(self.result) & jnp.isfinite(self.final.points).all()

    def to_xarray(self) -> Any:
        """The flow as an `xarray.Dataset`, to slice by name, plot, or write to a file.

        Its variables are `points` (time, token, component), `weight` (token) and what was
        observed (time, ...), at the times that were reached. Of a batch, an axis `system` comes
        before the tokens, or `system_0`, ... if it has several.

        **Raises:** `ImportError` without xarray, which `jaxflow[xarray]` brings; `ValueError` for
        several flows, without saved points, and where something observed is called `points`,
        `weight` or `time`.
        """
        if not isinstance(self.measures, Measure):
            raise ValueError(
                "a dataset needs saved points: neither SaveAt(fn=...) nor SaveAt(subs=...)."
            )
        if self.ts.ndim != 1:
            raise ValueError(
                f"to_xarray is of one flow, got times of shape {self.ts.shape}: choose one, such "
                "as jax.tree.map(lambda a: a[0], sol)."
            )
        return dataset(self.ts, self.measures, self.observed or {}, self.geometry)

    def integral(self, name: str) -> Array:
        """int of what was observed by that name over [t0, end], by the trapezoidal rule between the
        saved times; they should be the steps, `SaveAt(t0=True, steps=True)`, or dense.

        **Raises:** `ValueError` where nothing was observed by that name.
        """
        if name not in (self.observed or {}):
            others = ", ".join(self.observed or {}) or "nothing"
            raise ValueError(f"{others} was observed, not {name}: pass observe={{{name!r}: fn}}.")
        values = self.observed[name]
        sides = values if isinstance(values, Sides) else Sides(values, values)
        reached = jnp.isfinite(self.ts)
        shape = (-1, *[1] * (sides.after.ndim - 1))
        gaps = jnp.where(reached[1:], self.ts[1:] - jnp.where(reached[:-1], self.ts[:-1], 0), 0)
        there = lambda side: jnp.where(reached.reshape(shape), side, 0)
        ends = there(sides.after)[:-1] + there(sides.before)[1:]
        return (gaps.reshape(shape) * ends / 2).sum(axis=0)

    @property
    def merges(self) -> Any:
        """The mergers of tokens in the order of time: when, of which two clusters, and their size.

        A `jaxflow.observables.MergeTree`; of a batch of systems a list, one tree each.

        **Raises:** `ValueError` for a flow without coarsening, `TypeError` while it is traced.
        """
        mergers = self._merged("merges")
        check_known("merges", mergers)
        return mergers.tree(self.end, self.log_weights)

    @property
    def labels(self) -> Int[Array, "*batch n"]:
        """The token that stands for each at the end of the flow: the first of its cluster.

        **Raises:** `ValueError` for a flow without coarsening.
        """
        return self._merged("labels").labels(self.end)

    def labels_at(self, t: ScalarLike) -> Int[Array, "*batch n"]:
        """The token that stood for each at time t; mergers at that time have happened.

        **Raises:** `ValueError` for a flow without coarsening.
        """
        mergers = self._merged("labels_at")
        check_number("t", t)
        return mergers.labels(t)

    @property
    def coarse(self) -> Measure:
        """The measure at the end of the flow, of one token a cluster with the weights of all in it.

        **Raises:** `ValueError` for a flow without coarsening and for several systems, `TypeError`
        while it is traced.
        """
        mergers = self._merged("coarse")
        check_known("coarse", mergers)
        if self.final.points.ndim != 2:
            raise ValueError(
                f"coarse is of one system, got points of shape {self.final.points.shape}: take "
                "final and labels, which have all of them."
            )
        return representatives(self.final, self.labels, self.geometry)

    @property
    def bound(self) -> Float[Array, "*batch n"] | None:
        """How far each token may be from where it stands, to first order: what merging has moved it
        by, times exp(int of the largest rate at which tokens part there). `None` where tokens
        merged only while they contract.

        **Raises:** `ValueError` for a flow without coarsening.
        """
        logs = self._merged("bound").log_bound
        return None if logs is None else jnp.exp(logs)

    def _merged(self, name: str) -> Mergers:
        if self.mergers is None:
            raise ValueError(
                f"{name} is of a flow whose tokens merge: call jaxflow.coarsen in place of "
                "jaxflow.flow. For the merges of any flow there is jaxflow.events.merges."
            )
        return self.mergers

    def evaluate(self, t: ScalarLike | ArrayLike) -> Measure:
        """The measure at any time between t0 and `end`, for a flow with `SaveAt(dense=True)`.

        **Arguments:** `t`, one time, or several of shape `(times,)`, which become the leading axis
        of the points.

        **Raises:** `ValueError` where the solution is not dense, and for times outside of the
        interval that was solved (under `jit`, an error when the program runs).
        """
        if self.interpolation is None:
            raise ValueError("evaluate needs a dense solution: pass saveat=SaveAt(dense=True).")
        if self.t0.ndim:
            raise ValueError(
                f"evaluate is of one flow, got {self.t0.shape} flows: jax.vmap it, too."
            )
        check_number("t", t)
        if np.ndim(t) > 1:
            raise ValueError(f"t must be one time or a list of times, got shape {np.shape(t)}.")
        known = is_concrete(t, self.t0, self.end)
        outside = f"t must lie in the interval that was solved, [{self.t0}, {self.end}]; got {t}."
        if known and not _inside(np.asarray(t), np.asarray(self.t0), np.asarray(self.end)).all():
            raise ValueError(outside)
        ts = jnp.asarray(t, self.t0.dtype)
        if not known:
            out = ~_inside(ts, self.t0, self.end)
            ts = eqx.error_if(ts, out, "t must lie in the interval that was solved, [t0, end].")
        return _evaluate(self, jnp.clip(ts, self.t0, self.end))


def _inside(t, t0, end):
    slack = 1e-6 * (end - t0)  # of times rounded to float32
    return (t >= t0 - slack) & (t <= end + slack)


@eqx.filter_jit
def _evaluate(sol: FlowSolution, ts: Array) -> Measure:
    at = cast(diffrax.DenseInterpolation, sol.interpolation).evaluate
    ys = jax.vmap(at)(ts) if ts.ndim else at(ts)
    return cast(Measure, measures_at(sol.geometry.retract(ys), sol.log_weights))


def measures_at(points, log_weights) -> Measure | None:
    """Measures at several times, with the weights of the one."""
    if points is None:
        return None
    if log_weights is not None and log_weights.ndim > 1:
        log_weights = jnp.broadcast_to(log_weights, points.shape[:-1])
    return Measure(points, log_weights)
