"""The flow of hardmax attention, exact between changes of leaders (arXiv 2407.01602).

    X' = L X,    L X = sum_k c_k A_k X V_k^T + X M^T    A_k = the rows of token i are the mean over
                                                             C_i = argmax_j <Q_k x_i, K_k x_j>

While no C_i changes, A is constant and the flow linear: X(t + s) = e^{sL} X(t). The exponential is
its Taylor series, whose terms L^k X s^k / k! are found once a step of length 1 / |L|, and then give
X at any s to rounding. A change of leaders is found by bisection, to the last bit of its time.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._flow_input import check_measure
from ._rules import check_real, count, instance, positive
from ._types import ArrayLike, Points, ScalarLike, accumulation_dtype
from .fields import AbstractField, Hardmax, LinearDrift, Scaled, SelfAttention, Sum
from .geometry import Euclidean
from .measure import Measure
from .measure import check_measure as check_is_measure

__all__ = [
    "HardmaxFlow",
    "hardmax_flow",
]


def __dir__() -> list[str]:
    return __all__


TERMS = 24  # of the series of e^s, |s| <= 1: the rest is below 1e-24
LOOKS = 8  # times a step at which the leaders are looked at


class HardmaxFlow(NamedTuple):
    """What `jaxflow.hardmax_flow` returns.

    - `ts`: the times, shape `(ts,)`; `measures`: the measures at them, points `(ts, n, d)`.
    - `events`: the times at which leaders change, in order, `(events,)`.
    - `leaders`: the weight of token j for token i, `(events + 1, n, n)`, between the events; of
      several attentions, the sum.
    """

    ts: Float[np.ndarray, " ts"]
    measures: Measure
    events: Float[np.ndarray, " events"]
    leaders: Float[np.ndarray, "pieces n n"]


class _Linear(NamedTuple):
    """A field sum_k c_k (hardmax attention k) + M x."""

    attentions: tuple[tuple[Array | float, SelfAttention], ...]
    drifts: tuple[tuple[Array | float, LinearDrift], ...]

    def matrices(self, x: Points, log_weights: Array | None) -> tuple[Array, ...]:
        """A_k, the weights of the tokens for each token."""
        mu, identity = Measure(x, log_weights), jnp.eye(len(x), dtype=x.dtype)
        both = ((field, field.tokens(mu)) for _, field in self.attentions)
        return tuple(
            field.interaction.expectation(tokens.queries, tokens, identity, field.beta)
            for field, tokens in both
        )

    def apply(self, matrices: tuple[Array, ...], x: Points) -> Points:
        """L X."""
        velocity = jnp.zeros_like(x)
        for (factor, field), matrix in zip(self.attentions, matrices, strict=True):
            mean = jnp.matmul(matrix, x, precision="highest")
            velocity = velocity + factor * _map(field.value, mean)
        for factor, drift in self.drifts:
            velocity = velocity + factor * _map(drift.matrix, x)
        return velocity

    def norm(self) -> float:
        """A bound of |L|: rows of A add up to 1."""
        size = lambda a: 1.0 if a is None else float(np.linalg.norm(np.atleast_2d(a), 2))
        terms = [abs(float(c)) * size(f.value) for c, f in self.attentions]
        return sum(terms) + sum(abs(float(c)) * size(f.matrix) for c, f in self.drifts)


def hardmax_flow(
    field: AbstractField,
    mu0: Measure,
    *,
    t1: ScalarLike,
    ts: ArrayLike | None = None,
    max_events: ScalarLike = 10_000,
) -> HardmaxFlow:
    """Moves a measure along hardmax attention in R^d, by exact exponentials between events.

        x_i' = sum_k c_k V_k mean_{C_i} x_j + M x_i,    C_i = argmax_j <Q_k x_i, K_k x_j>

    Where an adaptive method would reject steps at each change of leaders, this one finds its time
    to rounding; between two of them nothing is approximated. Ties are averaged, as in
    `jaxflow.Hardmax`, whose tolerance says what a tie is.

    **Arguments:**

    - `field`: `jaxflow.SelfAttention` with `Hardmax()` on `Euclidean()`, sums and multiples of
      such, and of `jaxflow.LinearDrift`: `SelfAttention(interaction=Hardmax(),
      geometry=Euclidean()) + LinearDrift(-1.0)` are the leaders of arXiv 2407.01602 in continuous
      time.
    - `mu0`: one measure, best in float64.
    - `t1`: the last time, from t = 0 on; `ts`: times to save, increasing, default t1 alone.
    - `max_events`: changes of leaders, at most.

    **Returns:** a `jaxflow.HardmaxFlow`.

    **Raises:** `ValueError` or `TypeError` for other fields and measures, and times that do not
    increase within [0, t1]; `RuntimeError` where leaders change more often than `max_events` times,
    as where a token slides along a boundary between two leaders (V < 0).

    ```python
    >>> leaders = 3 * jaxflow.measure.circle(3).points
    >>> mu0 = jaxflow.Measure(jnp.concatenate([leaders, jnp.array([[0.3, 0.1]])]))
    >>> attention = jaxflow.SelfAttention(
    ...     interaction=jaxflow.Hardmax(), geometry=jaxflow.Euclidean()
    ... )
    >>> sol = jaxflow.hardmax_flow(attention + jaxflow.LinearDrift(-1.0), mu0, t1=1.0)
    >>> gap = jnp.exp(1.0) * (sol.measures.points[-1, 3] - leaders[0])
    >>> bool(jnp.allclose(gap, jnp.array([-2.7, 0.1])))
    True

    ```
    """
    linear = _linear(instance("field", field, AbstractField, "jaxflow.SelfAttention()"), 1.0)
    check_is_measure("mu0", mu0)
    check_measure(field, mu0)
    if mu0.points.ndim != 2:
        raise ValueError(
            f"hardmax_flow moves one measure of points (n, d), got shape {mu0.points.shape}; loop "
            "over several, since each has its own events."
        )
    times = _times(t1, ts)
    ends = np.unique(np.append(times, float(t1)))
    x = mu0.points.astype(accumulation_dtype(mu0.points.dtype))
    most = count("max_events", max_events, 0)
    found = _follow(linear, x, mu0.log_weights, ends, most)
    kept = found.measures.points[jnp.asarray(np.searchsorted(ends, times))]
    return found._replace(ts=times, measures=Measure(kept, mu0.log_weights))


# ------------------------------------------------------------------ pieces


def _follow(linear, x, log_weights, ends, most) -> HardmaxFlow:
    """The flow from one event to the next."""
    look = lambda x: _matrices(linear, x, log_weights)
    step = 1 / max(linear.norm(), 1e-300)
    t, matrices, saved = 0.0, look(x), []
    events, leaders = [], [_total(matrices)]
    for end in ends:
        while t < end:
            length = min(step, end - t)
            terms = _series(linear, matrices, x)
            s, after = _first_change(look, matrices, terms, length)
            x = _at(terms, s)
            t = end if s == end - t else t + s
            if after is None:
                continue
            matrices = after
            if events and t - events[-1] <= 1e-12 * (1 + t):
                leaders[-1] = _total(matrices)  # a tie on the way from one leader to the next
            else:
                events.append(t)
                leaders.append(_total(matrices))
            if len(events) > most:
                raise RuntimeError(
                    f"leaders changed more than max_events = {most} times up to t = {t:.6g} of "
                    f"{ends[-1]:g}. Raise it; or a token slides along a boundary between two "
                    "leaders, where hardmax attention has no flow: take Softmax(), a large beta."
                )
        saved.append(x)
    return HardmaxFlow(
        ts=ends,
        measures=Measure(jnp.stack(saved), log_weights),
        events=np.array(events),
        leaders=np.stack(leaders),
    )


def _first_change(look, matrices, terms, length: float):
    """The first time up to `length` after which leaders differ, and who leads from then on; the
    length and None where none does."""
    changed = lambda s: not _same(found := look(_at(terms, s)), matrices) and found
    low = 0.0
    for k in range(1, LOOKS + 1):
        high = length * k / LOOKS
        if found := changed(high):
            break
        low = high
    else:
        return length, None
    while (middle := 0.5 * (low + high)) not in (low, high):
        if other := changed(middle):
            high, found = middle, other
        else:
            low = middle
    return high, found


@eqx.filter_jit
def _matrices(linear: _Linear, x, log_weights):
    return linear.matrices(x, log_weights)


@eqx.filter_jit
def _series(linear: _Linear, matrices, x):
    """L^k X / k!, (TERMS + 1, n, d)."""

    def term(x, k):
        x = linear.apply(matrices, x) / k.astype(x.dtype)
        return x, x

    orders = jnp.arange(1, TERMS + 1)
    return jnp.concatenate([x[None], jax.lax.scan(term, x, orders)[1]])


@jax.jit
def _at(terms, s):
    """sum_k s^k L^k X / k!, by Horner's rule."""
    step = lambda total, term: (term + jnp.asarray(s, term.dtype) * total, None)
    return jax.lax.scan(step, jnp.zeros_like(terms[0]), terms[::-1])[0]


def _same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _total(matrices) -> np.ndarray:
    return np.sum([np.asarray(a) for a in matrices], axis=0)


def _map(matrix: Any, x: Points) -> Points:
    """x_i -> V x_i; a number is a multiple of I, and None is I."""
    if matrix is None:
        return x
    matrix = matrix.astype(x.dtype)
    return matrix * x if matrix.ndim == 0 else jnp.matmul(x, matrix.T, precision="highest")


# ------------------------------------------------------------------ checks


def _linear(field: AbstractField, factor: Array | float) -> _Linear:
    """The field as a sum of multiples of hardmax attention and drifts."""
    if isinstance(field, Sum):
        found = [_linear(part, factor) for part in field.fields]
        joined = lambda lists: tuple(pair for pairs in lists for pair in pairs)
        return _Linear(joined(f.attentions for f in found), joined(f.drifts for f in found))
    if isinstance(field, Scaled):
        return _linear(field.field, factor * field.factor)
    flat = isinstance(field.geometry, Euclidean)
    if flat and isinstance(field, LinearDrift):
        return _Linear((), ((factor, field),))
    if flat and isinstance(field, SelfAttention) and not callable(field.value):
        if isinstance(field.interaction, Hardmax):
            return _Linear(((factor, field),), ())
    raise ValueError(
        "hardmax_flow takes SelfAttention(interaction=Hardmax(), geometry=Euclidean()) with a "
        "matrix V, LinearDrift, and sums and multiples of them; got "
        f"{type(field).__name__} on {field.geometry}. Take jaxflow.flow for other fields."
    )


def _times(t1: ScalarLike, ts: ArrayLike | None) -> Float[np.ndarray, " ts"]:
    check_real("t1", t1, "positive and finite", positive)
    times = np.asarray([t1] if ts is None else ts, float)
    if times.ndim != 1 or not times.size or not (0 <= times[0] and times[-1] <= float(t1)):
        raise ValueError(f"ts must be times within [0, t1] = [0, {t1}], shape (ts,); got {ts!r}.")
    if (np.diff(times) < 0).any():
        raise ValueError(f"ts must increase, got {ts!r}. Sort them.")
    return times
