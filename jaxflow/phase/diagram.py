"""The phase diagram of clustering: how likely two tokens have met, by temperature and time.

    dx_i/dt = P_{x_i} sum_j softmax_j(beta <x_i, x_j>) x_j,   x_i(0) independent, uniform on S^{d-1}
    p(beta, t) = P( <x_i(t), x_j(t)> >= threshold ),    i != j      (arXiv 2312.10794, section 6)

The points move by combinations of themselves, so they stay in the span of the initial ones; where
d > n they are rotated into R^n first, which changes no inner product. The least inner product c
cannot fall while it is positive, for sum_k A_ik (<x_k, x_j> - <x_k, x_i> <x_i, x_j>) is at least
c sum_k A_ik (1 - <x_k, x_i>) where <x_i, x_j> = c: once all pairs have met, p stays 1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from .._memory import PAIRS_AT_ONCE
from .._types import ArrayLike, Points, Scalar, ScalarLike
from ..fields import SelfAttention, Softmax
from ..fields.interactions import AbstractInteraction
from ..flow import FlowArgs, flow
from ..measure import Measure, uniform_sphere
from ..observables import AbstractObservable
from .checks import checked_threshold, increasing_times, numbers, positive, whole
from .equiangular import equiangular_time, known_interaction
from .rows import Rows


class PhaseRow(NamedTuple):
    """The part of a phase diagram at one beta."""

    beta: float
    probability: Float[np.ndarray, " ts"]
    standard_error: Float[np.ndarray, " ts"]
    kept: bool  # read from the folder, not solved for


class PhaseDiagram(eqx.Module):
    """p(beta, t), the probability that two tokens have met.

    - `betas`, `ts`: the axes. `probability`, of shape `(betas, ts)`: the mean over the pairs i < j
      and the systems. `standard_error`: its standard error, by the spread between systems (nan
      for one system). The systems start alike at each beta, so that rows err alike.
    - `curve`: for each beta the time at which equiangular tokens that start at right angles meet,
      [`jaxflow.phase.equiangular_time`][]: the boundary for d -> infinity.
    - `threshold`, `n`, `d`, `systems`: of what.
    """

    betas: Float[np.ndarray, " betas"]
    ts: Float[np.ndarray, " ts"]
    probability: Float[np.ndarray, "betas ts"]
    standard_error: Float[np.ndarray, "betas ts"]
    curve: Float[np.ndarray, " betas"]
    threshold: float
    n: int
    d: int
    systems: int

    def boundary(self, level: float = 0.5) -> Float[np.ndarray, " betas"]:
        """The first time at which p reaches the level, between times by a line; inf where none."""
        return np.array([crossing(self.ts, row, level) for row in self.probability])


class MetPairs(AbstractObservable):
    """(t, mu) -> the fraction of the pairs i < j with <x_i, x_j> >= threshold.

    For tokens on the unit sphere and a threshold below 1. O(n * block) memory.
    """

    threshold: Scalar

    def __init__(self, threshold: ScalarLike = 0.999):
        self.threshold = jnp.asarray(threshold, float)

    def __call__(self, t, mu):
        return self.shares(mu.points).mean()

    def shares(self, points: Float[Array, "n d"]) -> Float[Array, " n"]:
        """The share of the others that each token has met."""
        n, level = len(points), self.threshold.astype(points.dtype)

        def met(x):
            # Each token meets itself.
            return (jnp.matmul(points, x, precision="highest") >= level).sum() - 1

        counts = jax.lax.map(met, points, batch_size=min(n, max(1, PAIRS_AT_ONCE // n)))
        return counts.astype(points.dtype) / (n - 1)


def phase_diagram(
    betas: ArrayLike,
    ts: ArrayLike,
    *,
    n: ScalarLike,
    d: ScalarLike,
    systems: ScalarLike = 64,
    threshold: ScalarLike = 0.999,
    interaction: AbstractInteraction = Softmax(),
    tolerance: ScalarLike = 1e-5,
    key: PRNGKeyArray,
    path: str | Path | None = None,
    progress: Callable[[PhaseRow], Any] = lambda row: None,
) -> PhaseDiagram:
    """The probability that two tokens have met, by inverse temperature and time.

        p(beta, t) = P( <x_i(t), x_j(t)> >= threshold ),    i != j,    V = Q = K = I

    over pairs and over independent uniform initial laws on S^{d-1} (arXiv 2312.10794, section 6).
    One program serves all betas; the systems of a beta are solved together and share their steps,
    the pairs are counted inside the solve, and it stops when all have met. A beta costs some
    hundred evaluations, of about `4 systems n^2 min(n, d)` operations each, and half of one for
    each time.

    **Arguments:**

    - `betas`: inverse temperatures, shape `(betas,)`; `ts`: times in order, from 0 on, shape
      `(ts,)`.
    - `n` tokens in each of `systems` initial laws in dimension `d`.
    - `threshold`: the inner product from which on two tokens have met, between 0 and 1.
    - `interaction`: `Softmax()` or `Unnormalised()`.
    - `tolerance`: rtol = atol of the solver.
    - `key`: PRNG key of the initial laws, the same for all betas.
    - `path`: a folder that keeps each beta when it is done. Called again with it, the diagram goes
      on where it was; it is the same, bit for bit, as one that was not interrupted.
    - `progress`: called with the [`jaxflow.phase.PhaseRow`][] of each beta in turn.

    **Returns:** a [`jaxflow.phase.PhaseDiagram`][].

    **Raises:** `ValueError` for bad input and for a folder that holds another diagram; `FlowError`
    where a solve fails.
    """
    problem = _Problem(
        n=whole("n", n, 2),
        d=whole("d", d, 2),
        systems=whole("systems", systems, 1),
        threshold=checked_threshold(threshold, float(jnp.finfo(jnp.result_type(float)).eps)),
        interaction=known_interaction(interaction),
        tolerance=positive("tolerance", tolerance),
        betas=numbers("betas", betas),
        ts=increasing_times(ts),
    )
    initial = _sample(problem, key)
    rows = Rows(None if path is None else Path(path))
    rows.check(problem.settings(initial.dtype, key))
    found = []
    for i, beta in enumerate(problem.betas.tolist()):
        moments = rows.read(i, len(problem.ts))
        kept = moments is not None
        if moments is None:
            moments = _moments(_met(problem, beta, initial))
            rows.write(i, moments)
        found.append(PhaseRow(beta, moments[0], moments[1], kept))
        progress(found[-1])
    return PhaseDiagram(
        betas=problem.betas,
        ts=problem.ts,
        probability=np.stack([row.probability for row in found]),
        standard_error=np.stack([row.standard_error for row in found]),
        curve=equiangular_time(
            problem.betas, n=problem.n, threshold=problem.threshold, interaction=interaction
        ),
        threshold=problem.threshold,
        n=problem.n,
        d=problem.d,
        systems=problem.systems,
    )


def crossing(ts: Float[np.ndarray, " ts"], values: Float[np.ndarray, " ts"], level: float) -> float:
    """The first time at which the values reach the level, between times by a line, or inf."""
    above = values >= level
    if not above.any():
        return float("inf")
    k = int(above.argmax())
    if k == 0:
        return float(ts[0])
    part = (level - values[k - 1]) / (values[k] - values[k - 1])
    return float(ts[k - 1] + part * (ts[k] - ts[k - 1]))


# ------------------------------------------------------------------ the solve


class _Problem(NamedTuple):
    """What is solved for, checked."""

    n: int
    d: int
    systems: int
    threshold: float
    interaction: AbstractInteraction
    tolerance: float
    betas: Float[np.ndarray, " betas"]
    ts: Float[np.ndarray, " ts"]

    def settings(self, dtype: np.dtype, key: PRNGKeyArray) -> dict[str, Any]:
        """All that a row depends on, for JSON."""
        plain = {
            k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self._asdict().items()
        }
        return plain | {
            "interaction": type(self.interaction).__name__,
            "dtype": str(dtype),
            "key": np.asarray(jax.random.key_data(key)).tolist(),
        }


class _AllMet(eqx.Module):
    """The condition of the event that all pairs of all systems have met."""

    met: MetPairs

    def __call__(self, t: Array, y: Points, args: FlowArgs, **_: Any) -> Bool[Array, ""]:
        return (jax.vmap(self.met.shares)(y) >= 1).all()


def _sample(problem: _Problem, key: PRNGKeyArray) -> Points:
    """Uniform tokens (systems, n, min(n, d)).

    With X^T = Q R, row i of R^T holds the coordinates of x_i in the basis Q of their span.
    """
    points = uniform_sphere(problem.systems * problem.n, problem.d, key=key).points
    points = points.reshape(problem.systems, problem.n, problem.d)
    if problem.d <= problem.n:
        return points
    return jnp.linalg.qr(points.swapaxes(1, 2), mode="r").swapaxes(1, 2)


def _met(problem: _Problem, beta: float, points: Points) -> Float[np.ndarray, "ts systems"]:
    """The fraction of pairs that have met, in each system at each time."""
    # All scores may be kept: the definition is then the fastest.
    few = problem.systems * problem.n**2 <= PAIRS_AT_ONCE
    met = MetPairs(problem.threshold)
    sol = flow(
        SelfAttention(
            beta=beta,
            interaction=problem.interaction,
            backend="reference" if few else None,
        ),
        Measure(points),
        t1=problem.ts[-1],
        stepsize_controller=diffrax.PIDController(rtol=problem.tolerance, atol=problem.tolerance),
        saveat=diffrax.SaveAt(ts=jnp.asarray(problem.ts, points.dtype), fn=_nothing),
        event=diffrax.Event(_AllMet(met)),
        max_steps=None,
        observe={"met": met},
    )
    reached = np.isfinite(np.asarray(sol.ts))
    return np.where(reached[:, None], np.asarray(sol.observed["met"], float), 1.0)


def _nothing(t, y, args):
    """The points are not saved."""


def _moments(met: Float[np.ndarray, "ts systems"]) -> Float[np.ndarray, "2 ts"]:
    """The mean over the systems, and its standard error."""
    systems = met.shape[1]
    if systems == 1:
        return np.stack([met[:, 0], np.full(len(met), np.nan)])
    return np.stack([met.mean(axis=1), met.std(axis=1, ddof=1) / np.sqrt(systems)])
