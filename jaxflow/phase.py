"""The phase diagram of clustering: how likely two tokens have met, by temperature and time.

    dx_i/dt = P_{x_i} sum_j softmax_j(beta <x_i, x_j>) x_j,   x_i(0) independent, uniform on S^{d-1}
    p(beta, t) = P( <x_i(t), x_j(t)> >= threshold ),    i != j      (arXiv 2312.10794, section 6)

The points move by combinations of themselves, so they stay in the span of the initial ones; where
d > n they are rotated into R^n first, which changes no inner product. The least inner product c
cannot fall while it is positive, for sum_k A_ik (<x_k, x_j> - <x_k, x_i> <x_i, x_j>) is at least
c sum_k A_ik (1 - <x_k, x_i>) where <x_i, x_j> = c: once all pairs have met, p stays 1.

Tokens at right angles meet at one time.

Equiangular tokens, <x_i, x_j> = rho for all i != j, stay so. With c(rho) the weight of another
token,

    rho' = 2 c(rho) (1 - rho) ((n-1) rho + 1)     c = 1 / (e^{beta (1 - rho)} + n - 1)  softmax
                                                  c = e^{beta rho} / n                  unnormalised

Uniform tokens are nearly orthogonal where d is large, and p goes from 0 to 1 about the time at
which rho(0) = 0 has grown to the threshold.

With `matrices`, each system has Q, K and V of its own, drawn once. What is said above then does not
hold: points stay in R^d, and tokens that have met may part.
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

from ._memory import PAIRS_AT_ONCE, check_fits
from ._rules import constant, count, instance, positive
from ._types import ArrayLike, Points, Scalar, ScalarLike
from .fields import AbstractMatrices, SelfAttention, Softmax, Unnormalised
from .fields.interactions import AbstractInteraction
from .flow import FlowArgs, FlowError, flow
from .measure import Measure, uniform_sphere
from .observables import AbstractObservable
from .phase_rows import Rows, short

__all__ = [
    "PhaseDiagram",
    "PhaseRow",
    "crossing",
    "equiangular_time",
    "phase_diagram",
]


def __dir__() -> list[str]:
    return __all__


# A Gauss-Legendre rule on equal panels: exact to rounding up to beta = 50 n or so.
PANELS, NODES = 64, 16


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
      `jaxflow.phase.equiangular_time`: the boundary for d -> infinity. nan where matrices
      were drawn.
    - `threshold`: the inner product from which on two tokens count as met.
    - `n`, `d`, `systems`: how many tokens a system has, in which dimension, and how many systems
      of independent initial tokens the probability is a mean over.
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
    matrices: AbstractMatrices | None = None,
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
    - `matrices`: `None` for V = Q = K = I, or a law such as
      `jaxflow.fields.GaussianMatrices(rank=2)`, of which each system has a draw of its own,
      the same for all betas. Each system then takes its own steps, up to the last time, and
      `curve` is nan.
    - `key`: PRNG key of the initial laws, the same for all betas, and of the matrices.
    - `path`: a folder that keeps each beta when it is done. Called again with it, the diagram goes
      on where it was; it is the same, bit for bit, as one that was not interrupted.
    - `progress`: called with the `jaxflow.phase.PhaseRow` of each beta in turn.

    **Returns:** a `jaxflow.phase.PhaseDiagram`.

    **Raises:** `ValueError` for bad input, for a folder that holds another diagram, and for a kept
    beta that is damaged; `MemoryError` where the systems would not fit; `FlowError` where a solve
    fails.

    ```python
    >>> diagram = jaxflow.phase_diagram(
    ...     [1.0, 4.0], [0.0, 5.0, 10.0], n=8, d=3, systems=4, key=jax.random.key(0)
    ... )
    >>> diagram.probability.shape
    (2, 3)

    ```
    """
    problem = _Problem(
        n=count("n", n, 2),
        d=count("d", d, 2),
        systems=count("systems", systems, 1),
        threshold=checked_threshold(threshold, float(jnp.finfo(jnp.result_type(float)).eps)),
        interaction=known_interaction(interaction),
        tolerance=constant("tolerance", tolerance, "positive and finite", positive),
        betas=numbers("betas", betas),
        ts=increasing_times(ts),
        matrices=_law(matrices),
    )
    _check_memory(problem)
    initial = _sample(problem, key)
    drawn = _draw(problem, key)
    settings = problem.settings(initial.dtype, key)
    rows = Rows(None if path is None else Path(path), settings)
    rows.check()
    found = []
    for i, beta in enumerate(problem.betas.tolist()):
        moments = rows.read(i)
        kept = moments is not None
        if moments is None:
            moments = _moments(_met(problem, beta, initial, drawn))
            rows.write(i, moments)
        found.append(PhaseRow(beta, moments[0], moments[1], kept))
        progress(found[-1])
    return PhaseDiagram(
        betas=problem.betas,
        ts=problem.ts,
        probability=np.stack([row.probability for row in found]),
        standard_error=np.stack([row.standard_error for row in found]),
        curve=_curve(problem),
        threshold=problem.threshold,
        n=problem.n,
        d=problem.d,
        systems=problem.systems,
    )


def crossing(ts: Float[np.ndarray, " ts"], values: Float[np.ndarray, " ts"], level: float) -> float:
    """The first time at which the values reach the level, between times by a line, or inf.

    **Arguments:** `ts`: ascending times, shape `(ts,)`; `values`: at these times, of the same
    shape; `level`: what they are to reach.

    **Returns:** a time, or inf where no value reaches the level.
    """
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
    matrices: AbstractMatrices | None

    def settings(self, dtype: np.dtype, key: PRNGKeyArray) -> dict[str, Any]:
        """All that a row depends on, for JSON."""
        plain = {
            k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self._asdict().items()
        }
        # No entry where none are drawn: the folders of earlier versions are of that.
        law = plain.pop("matrices")
        drawn = {} if law is None else {"matrices": told(law)}
        return (
            plain
            | drawn
            | {
                "interaction": type(self.interaction).__name__,
                "dtype": str(dtype),
                "key": np.asarray(jax.random.key_data(key)).tolist(),
            }
        )


class _AllMet(eqx.Module):
    """The condition of the event that all pairs of all systems have met."""

    met: MetPairs

    def __call__(self, t: Array, y: Points, args: FlowArgs, **_: Any) -> Bool[Array, ""]:
        return (jax.vmap(self.met.shares)(y) >= 1).all()


def _check_memory(problem: _Problem):
    """The Gaussian draws and their QR, and what a solve of all systems holds."""
    tokens = problem.systems * problem.n
    drawn = problem.matrices is not None
    numbers = tokens * (3 * problem.d + 24 * min(problem.n, problem.d))
    numbers += drawn * (3 * problem.systems * problem.d**2 + 24 * tokens * problem.d)
    check_fits(
        jnp.finfo(float).bits // 8 * (numbers + min(tokens * problem.n, PAIRS_AT_ONCE)),
        f"a diagram of {problem.systems} systems of {problem.n} tokens in R^{problem.d}",
        "Take fewer systems, tokens or dimensions.",
    )


def _sample(problem: _Problem, key: PRNGKeyArray) -> Points:
    """Uniform tokens (systems, n, min(n, d)).

    With X^T = Q R, row i of R^T holds the coordinates of x_i in the basis Q of their span.
    """
    points = uniform_sphere(problem.systems * problem.n, problem.d, key=key).points
    points = points.reshape(problem.systems, problem.n, problem.d)
    if problem.d <= problem.n or problem.matrices is not None:
        return points
    return jnp.linalg.qr(points.swapaxes(1, 2), mode="r").swapaxes(1, 2)


def _law(matrices: AbstractMatrices | None) -> AbstractMatrices | None:
    example = "jaxflow.fields.GaussianMatrices(rank=2)"
    return None if matrices is None else instance("matrices", matrices, AbstractMatrices, example)


def _draw(problem: _Problem, key: PRNGKeyArray):
    """Q, K and V of each system, (systems, ...); `None` is the identity."""
    if problem.matrices is None:
        return None
    law, keys = problem.matrices, jax.random.split(jax.random.fold_in(key, 1), problem.systems)
    return jax.vmap(lambda key: law(problem.d, key=key))(keys)


def told(law: AbstractMatrices) -> str:
    """A law in full, arrays included."""
    arrays = [np.asarray(a).tolist() for a in jax.tree.leaves(eqx.filter(law, eqx.is_array))]
    return f"{law!r} {arrays}" if arrays else repr(law)


def _curve(problem: _Problem) -> Float[np.ndarray, " betas"]:
    if problem.matrices is not None:
        return np.full(len(problem.betas), np.nan)
    of = {"n": problem.n, "threshold": problem.threshold, "interaction": problem.interaction}
    return equiangular_time(problem.betas, **of)


def _met(problem: _Problem, beta: float, points: Points, drawn) -> Float[np.ndarray, "ts systems"]:
    """The fraction of pairs that have met, in each system at each time."""
    # All scores may be kept: the definition is then the fastest.
    few = problem.systems * problem.n**2 <= PAIRS_AT_ONCE
    met = MetPairs(problem.threshold)
    ts = jnp.asarray(problem.ts, points.dtype)

    def solve(points, matrices, event, **options):
        field = SelfAttention(
            *matrices,
            beta=beta,
            interaction=problem.interaction,
            backend="reference" if few else None,
        )
        tolerance = problem.tolerance
        return flow(
            field,
            Measure(points),
            t1=problem.ts[-1],
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            saveat=diffrax.SaveAt(ts=ts, fn=_nothing),
            event=event,
            max_steps=None,
            observe={"met": met},
            **options,
        )

    if drawn is None:
        sol = solve(points, (), diffrax.Event(_AllMet(met)))
        reached = np.isfinite(np.asarray(sol.ts))
        return np.where(reached[:, None], np.asarray(sol.observed["met"], float), 1.0)

    def one(points, matrices):
        sol = solve(points, matrices, None, throw=False)
        return sol.ok, sol.observed["met"]

    ok, shares = eqx.filter_vmap(one)(points, drawn)
    if not np.asarray(ok).all():
        raise FlowError(
            f"at beta = {beta:g} the flow of {int((~np.asarray(ok)).sum())} systems failed. Loosen "
            "the tolerance, or take smaller betas or matrices."
        )
    return np.asarray(shares, float).T


def _nothing(t, y, args):
    """The points are not saved."""


def _moments(met: Float[np.ndarray, "ts systems"]) -> Float[np.ndarray, "2 ts"]:
    """The mean over the systems, and its standard error."""
    systems = met.shape[1]
    if systems == 1:
        return np.stack([met[:, 0], np.full(len(met), np.nan)])
    return np.stack([met.mean(axis=1), met.std(axis=1, ddof=1) / np.sqrt(systems)])


# ------------------------------------------------------------------ equiangular tokens


def equiangular_time(
    betas: ArrayLike,
    *,
    n: ScalarLike,
    threshold: ScalarLike = 0.999,
    interaction: AbstractInteraction = Softmax(),
) -> Float[np.ndarray, " betas"]:
    """The time at which n tokens at right angles reach the inner product `threshold`.

    Of rho' as at the head of the module. With u = log(((n-1) rho + 1) / (1 - rho)), which is 0 at
    rho = 0, it is the integral of du / (2 n c(rho(u))), smooth in u; in float64.

    **Arguments:**

    - `betas`: inverse temperatures, shape `(betas,)`.
    - `n`: the number of tokens, at least 2.
    - `threshold`: the inner product to reach, between 0 and 1.
    - `interaction`: `Softmax()` or `Unnormalised()`.

    **Returns:** the times, shape `(betas,)`; inf where they are beyond the range of float64.

    **Raises:** `ValueError` for numbers out of these ranges and for another interaction.
    """
    n, betas = count("n", n, 2), numbers("betas", betas)
    level = checked_threshold(threshold)
    slowness = SLOWNESS[type(known_interaction(interaction))]
    end = np.log(((n - 1) * level + 1) / (1 - level))
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    starts = np.arange(PANELS)[:, None]
    u = (end / PANELS * (starts + (nodes[None, :] + 1) / 2)).ravel()
    weights = np.tile(weights * end / PANELS / 2, PANELS)
    rho = np.expm1(u) / (np.expm1(u) + n)
    with np.errstate(over="ignore"):  # At a huge beta they never meet: inf.
        return slowness(betas[:, None], rho[None, :], n) @ weights


# 1 / (2 n c(rho)), for each interaction.
SLOWNESS: dict[type, Callable] = {
    Softmax: lambda beta, rho, n: (np.exp(beta * (1 - rho)) + n - 1) / (2 * n),
    Unnormalised: lambda beta, rho, n: np.exp(-beta * rho) / 2,
}


def known_interaction(interaction: AbstractInteraction) -> AbstractInteraction:
    if type(interaction) not in SLOWNESS:
        names = " or ".join(f"{kind.__name__}()" for kind in SLOWNESS)
        raise ValueError(f"interaction must be {names}, got {interaction!r}.")
    return interaction


# ------------------------------------------------------------------ checks


def checked_threshold(threshold: ScalarLike, eps: float = 0.0) -> float:
    """The threshold, which products that round by `eps` can tell from 1."""
    level = float(threshold)
    if not 0 < level < 1:
        raise ValueError(
            f"threshold must lie between 0 and 1, got {level}: tokens come ever nearer to an inner "
            "product of 1 and never reach it. 0.999 is the default."
        )
    if 1 - level < 100 * eps:
        raise ValueError(
            f"1 - threshold must be at least 100 roundings of {eps:.1e}, got {1 - level:.1e}. "
            'Use float64, jax.config.update("jax_enable_x64", True), or a lower threshold.'
        )
    return level


def numbers(name: str, values: ArrayLike) -> Float[np.ndarray, " values"]:
    axis = np.asarray(values, float)
    if axis.ndim != 1 or not axis.size or not np.isfinite(axis).all():
        raise ValueError(
            f"{name} must be finite numbers, at least one, of shape ({name},); got {short(axis)}."
        )
    return axis


def increasing_times(values: ArrayLike) -> Float[np.ndarray, " ts"]:
    ts = numbers("ts", values)
    if ts[0] < 0 or (np.diff(ts) <= 0).any():
        raise ValueError(f"ts must increase from 0 or later, got {short(ts)}. Sort them.")
    return ts
