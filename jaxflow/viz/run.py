"""One system of a solution in numpy, at the times that it reached."""

import sys
from typing import NamedTuple

import jax.tree_util as jtu
import numpy as np

from .._memory import PAIRS_AT_ONCE
from .._rules import count, instance
from .._types import ScalarLike
from ..flow import FlowSolution
from ..geometry import AbstractGeometry, Sphere
from ..measure import Measure
from ..observables import cluster_count, cluster_labels
from .style import log_spaced

System = int | tuple[int, ...] | None


class Run(NamedTuple):
    """What a picture needs of a flow."""

    ts: np.ndarray  # (t,)
    points: np.ndarray  # (t, n, d)
    log_weights: np.ndarray  # (t, n)
    energy: np.ndarray | None  # (t,)
    observed_counts: np.ndarray | None  # (t,)
    radius: float | None  # of the sphere to draw
    log_time: bool

    @property
    def n(self) -> int:
        return self.points.shape[1]

    @property
    def d(self) -> int:
        return self.points.shape[2]

    def measure(self, k: int, tokens: np.ndarray | slice = slice(None)) -> Measure:
        """The measure at the k-th time, or some of its tokens."""
        return Measure(self.points[k, tokens], self.log_weights[k, tokens])

    def clusters(self, threshold: ScalarLike, k: int = -1) -> np.ndarray:
        """The cluster of each token at the k-th time, by default the last."""
        return np.asarray(cluster_labels(self.measure(k), threshold))

    def colouring(self, threshold: ScalarLike) -> tuple[np.ndarray, int]:
        """The clusters that a picture colours, and the time of which they are: the last one, or,
        where one cluster is left there, the last at which there were two or more.

        Clusters merge, so that the time is found by bisection.
        """
        labels, high = self.clusters(threshold), len(self.ts) - 1
        if labels.max() > 0 or high == 0:
            return labels, high
        low, found = 0, self.clusters(threshold, 0)
        if found.max() == 0:
            return labels, high
        while high - low > 1:
            middle = (low + high) // 2
            several = self.clusters(threshold, middle)
            if several.max() > 0:
                low, found = middle, several
            else:
                high = middle
        return found, low

    def cluster_counts(self, threshold: ScalarLike) -> tuple[np.ndarray, np.ndarray]:
        """Times and the number of clusters at them.

        They are what the flow observed as "clusters", by the threshold of that observable, or else
        counted here: one time after the other, evenly spaced ones if there are many tokens.
        """
        if self.observed_counts is not None:
            return self.ts, self.observed_counts
        times = evenly(len(self.ts), max(2, PAIRS_AT_ONCE // self.n))
        counts = [cluster_count(self.measure(k), threshold) for k in times.tolist()]
        return self.ts[times], np.array(counts)

    def directions(self) -> np.ndarray:
        """The columns to project on, (d, 2 or 3).

        What the last measure does not span is decided by the first.
        """
        if self.d <= 3:
            return np.eye(self.d, max(2, self.d))
        vectors = np.linalg.eigh(self._moment(-1) + 1e-6 * self._moment(0))[1][:, :-4:-1]
        return vectors * np.sign(vectors[abs(vectors).argmax(axis=0), range(3)])

    def _moment(self, k):
        """E[x x^T], of trace 1."""
        x = self.points[k].astype(float) * np.exp(self.log_weights[k, :, None] / 2)
        return x.T @ x / (x**2).sum()


def read_run(sol: FlowSolution, system: System = None, max_frames: int | None = None) -> Run:
    """One system of a solution, at the times that it reached."""
    instance("sol", sol, FlowSolution, "jaxflow.flow(field, mu0, t1=1.0, saveat=...)")
    if not isinstance(sol.measures, Measure):
        raise ValueError(
            "a picture needs the points: flow with saveat=diffrax.SaveAt(ts=...), and neither fn "
            "nor subs."
        )
    ts, mu, observed, within = _choose(sol, system)
    x, log_weights = (a[within] for a in arrays(mu))
    reached = np.isfinite(ts) & np.isfinite(x).all(axis=(1, 2))
    if reached.sum() < 2:
        raise ValueError(
            f"a picture over time needs two or more saved times, got {reached.sum()}: flow with "
            "saveat=diffrax.SaveAt(ts=...)."
        )
    keep = np.flatnonzero(reached)
    keep = keep if max_frames is None else keep[evenly(len(keep), max_frames)]
    energy, counts = (None if a is None else a[within][keep] for a in observed)
    return Run(
        ts=ts[keep],
        points=x[keep],
        log_weights=log_weights[keep],
        energy=energy,
        # Another array of that name is not the number of clusters.
        observed_counts=None if counts is None or counts.ndim != 1 else counts.astype(int),
        radius=radius(sol.geometry),
        log_time=log_spaced(ts[reached]),
    )


def _choose(sol: FlowSolution, system: System):
    """Times, measures and what was observed, in numpy; and the index of the system in the latter.

    The systems of jax.vmap(flow) come before the times, those within one flow after them.
    """
    chosen = () if system is None else system if isinstance(system, tuple) else (system,)
    index = tuple(count("system", k, -sys.maxsize) for k in chosen)
    ahead = np.ndim(sol.ts) - 1
    shape = tuple(np.delete(sol.measures.points.shape[:-2], ahead).tolist())
    if len(index) != len(shape):
        choose = f"choose one, such as system={(0,) * len(shape)}" if shape else "drop system"
        raise ValueError(f"the solution holds systems of shape {shape}: {choose}.")
    if any(not -size <= k < size for k, size in zip(index, shape, strict=True)):
        raise ValueError(f"the solution holds systems of shape {shape}, and none at {index}.")
    tree = sol.ts, sol.measures, [sol.observed.get(name) for name in ("energy", "clusters")]
    ts, mu, observed = jtu.tree_map(lambda a: np.asarray(a)[index[:ahead]], tree)
    return ts, mu, observed, (slice(None), *index[ahead:])


def arrays(mu: Measure) -> tuple[np.ndarray, np.ndarray]:
    """Points and log w in single precision or better, both with the leading axes of the points."""
    x = np.asarray(mu.points)
    x = x.astype(np.promote_types(x.dtype, np.float32), copy=False)
    return x, np.asarray(mu.log_probabilities)


def radius(geometry: AbstractGeometry) -> float | None:
    """That of the sphere to draw, if the tokens live on one."""
    return float(np.ravel(geometry.radius)[0]) if isinstance(geometry, Sphere) else None


def evenly(n: int, at_most: int) -> np.ndarray:
    """At most so many of the indices 0, ..., n - 1, with both ends."""
    at_most = count("max_points or max_frames", at_most, 2)
    return np.linspace(0, n - 1, min(n, at_most)).round().astype(int)
