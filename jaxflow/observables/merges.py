"""The tree of mergers of clusters along a flow.

Clusters of tokens at successive times, made cumulative: tokens that have once been in one cluster
stay together. What is left is a sequence of mergers in time, the dendrogram of the flow.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from .._rules import instance
from .._types import ArrayLike, ScalarLike
from ..measure import Measure, check_measure
from .clusters import cluster_labels


@dataclasses.dataclass(frozen=True, eq=False)
class MergeTree:
    """The mergers of clusters of n tokens, in the order of time; arrays of NumPy.

    - `n`: the number of tokens.
    - `times`: of the k mergers, ascending, shape `(k,)`.
    - `pairs`: the first tokens of the two clusters that merge, shape `(k, 2)`.
    - `sizes`: the number of tokens of the cluster that they become, shape `(k,)`.
    - `leaves`: the tokens that take part, ascending; `None` is all n.
    - `links`: the two tokens that met, shape `(k, 2)`, where they are known.
    - `failure`: what ended the search for mergers before its time, or `None`.

    **Raises:** `ValueError` or `TypeError` where these are no mergers of n tokens.
    """

    n: int
    times: Float[np.ndarray, " k"]
    pairs: Int[np.ndarray, "k 2"]
    sizes: Int[np.ndarray, " k"]
    leaves: Int[np.ndarray, " m"] | None = None
    links: Int[np.ndarray, "k 2"] | None = None
    failure: str | None = None

    def __post_init__(self):
        for name in ("times", "pairs", "sizes"):
            instance(name, getattr(self, name), np.ndarray, "numpy.array([...])")
        k, most = len(self.times), len(self.tokens) - 1
        if k > most or self.pairs.shape != (k, 2) or self.sizes.shape != (k,):
            raise ValueError(
                f"{most + 1} tokens merge at most {most} times, with times (k,), pairs (k, 2) and "
                f"sizes (k,); got {self.times.shape}, {self.pairs.shape} and {self.sizes.shape}."
            )
        if not (np.isfinite(self.times).all() and (np.diff(self.times) >= 0).all()):
            raise ValueError(
                "the times of mergers must be finite and ascend: sort the mergers by time."
            )
        if not np.isin(self.pairs, self.tokens).all():
            raise ValueError("pairs must hold tokens that take part, by their index.")

    @property
    def tokens(self) -> Int[np.ndarray, " m"]:
        """The tokens that take part, ascending."""
        return np.arange(self.n) if self.leaves is None else self.leaves

    def counts(self, ts: ArrayLike) -> Int[np.ndarray, " times"]:
        """The number of clusters at each time of ts: mergers at that time have happened.

        **Raises:** `ValueError` or `TypeError` where ts are no times.
        """
        ts = np.asarray(ts)
        if ts.dtype.kind not in "iuf" or np.isnan(ts).any():
            raise ValueError(
                "the number of clusters is known at times, which are numbers, not nan."
            )
        merged = np.searchsorted(self.times, ts, side="right")
        return len(self.tokens) - merged

    def linkage(
        self, height: Callable | None = None, *, end: ScalarLike | None = None
    ) -> Float[np.ndarray, "mergers 4"]:
        """The tree in the format of `scipy.cluster.hierarchy.linkage`, for its `dendrogram`.

        Row k joins nodes a < b at a height into node m + k of so many tokens; the m leaves are
        `tokens`, in that order.

        **Arguments:**

        - `height`: a function of time, increasing and at least 0, applied to the array of times;
          `None` is the time itself. `numpy.log1p` suits metastable flows.
        - `end`: the time at which clusters that have not met are drawn as one, at least that of
          the last merger.

        **Raises:** `ValueError` where the flow has not ended in one cluster and `end` is not
        given, where the pairs are not those of clusters, and where heights decrease or are
        negative.
        """
        if not (height is None or callable(height)):
            raise TypeError(f"height must be a function of the array of times, got {height!r}.")
        leaves = self.tokens
        node = {int(token): (leaf, 1) for leaf, token in enumerate(leaves)}
        times, rows = list(self.times), []
        pairs = [(int(a), int(b)) for a, b in self.pairs]

        def join(a, b):
            if a == b or a not in node or b not in node:
                raise ValueError(f"({a}, {b}) are not the first tokens of two clusters.")
            (u, p), (v, q) = node.pop(a), node.pop(b)
            node[min(a, b)] = len(leaves) + len(rows), p + q
            rows.append((min(u, v), max(u, v), p + q))

        for a, b in pairs:
            join(a, b)
        if len(node) > 1:
            if end is None or (times and not end >= times[-1]):
                raise ValueError(
                    f"{len(node)} clusters have not met by the last merger: pass end=, the time "
                    f"at which to draw them as one, not before that merger; got {end}."
                )
            first, *others = sorted(node)
            times += [float(end)] * len(others)
            for other in others:
                join(first, other)
        heights = np.asarray(times if height is None else height(np.asarray(times)), float)
        if not ((heights >= 0).all() and (np.diff(heights) >= 0).all()):
            raise ValueError("heights must ascend from at least 0: use numpy.log1p, not numpy.log.")
        columns = np.asarray(rows, float).reshape(-1, 3)
        return np.insert(columns, 2, heights, axis=1)


def merge_tree(
    ts: ArrayLike,
    measures: Measure,
    threshold: ScalarLike = 0.999,
    *,
    radius: ScalarLike | None = None,
) -> MergeTree:
    """The mergers of clusters over the saved times of a flow: `merge_tree(sol.ts, sol.measures)`.

    The clusters are those of `jaxflow.observables.cluster_labels`, made cumulative: what has
    merged stays merged, even where tokens part again. A merger carries the first saved time at
    which its tokens are in one cluster; clusters of the first time merge at that time. Tokens
    without mass are left out. On the host, one time after the other, O(n) memory.

    **Arguments:**

    - `ts`: the times, ascending, shape `(times,)`; times that are not finite (not reached) are
      left out.
    - `measures`: points `(times, n, d)`.
    - `threshold`, `radius`: as in `jaxflow.observables.cluster_labels`.

    **Returns:** a `jaxflow.observables.MergeTree`.

    **Raises:** `ValueError` or `TypeError` for times and measures that are not those of a flow, and
    where a token with mass is not finite at a time that was reached.
    """
    check_measure("measures", measures)
    ts = _numbers("ts", ts)
    if measures.points.ndim != 3 or ts.shape != (len(measures),):
        raise ValueError(
            "merge_tree takes times (times,) and points (times, n, d), got "
            f"{ts.shape} and {measures.points.shape}."
        )
    if not (np.diff(ts[np.isfinite(ts)]) >= 0).all():
        raise ValueError(f"the times of a flow ascend, got {ts}.")
    parents = np.arange(measures.n)
    sizes = np.ones(measures.n, int)
    times, mergers, leaves = [], [], np.arange(measures.n)
    for k in np.flatnonzero(np.isfinite(ts)):
        labels = np.asarray(cluster_labels(measures[int(k)], threshold, radius=radius))
        leaves = np.flatnonzero(labels >= 0)
        if not len(leaves):
            raise ValueError(
                f"the measure at t = {ts[k]:g} has points that are not finite, and no clusters."
            )
        new = _join(parents, sizes, labels)
        times += [ts[k]] * len(new)
        mergers += new
    columns = np.asarray(mergers, int).reshape(-1, 3)
    absent = len(leaves) < measures.n
    return MergeTree(
        measures.n, np.asarray(times, float), columns[:, :2], columns[:, 2],
        leaves if absent else None,
    )  # fmt: skip


def _numbers(name: str, values: ArrayLike) -> np.ndarray:
    """Numbers in double precision."""
    try:
        return np.asarray(values, float)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of numbers, got {values!r}.") from None


def _join(parents, sizes, labels) -> list[tuple[int, int, int]]:
    """Joins clusters that share a label; the new mergers as (first, first, size).

    `parents[i]` is the first token of the cluster of token i, `sizes` by first token; both are
    brought up to date.
    """
    massive = labels >= 0
    _, first, inverse = np.unique(labels[massive], return_index=True, return_inverse=True)
    mine = parents[massive]
    other = mine[first][inverse]
    differ = mine != other
    mergers = []
    for a, b in np.unique(np.stack([other, mine], axis=1)[differ], axis=0).tolist():
        a, b = sorted((_root(parents, a), _root(parents, b)))
        if a != b:
            parents[b] = a
            sizes[a] += sizes[b]
            mergers.append((a, b, int(sizes[a])))
    while (parents != parents[parents]).any():
        parents[:] = parents[parents]
    return mergers


def _root(parents, i):
    while parents[i] != i:
        i = int(parents[i])
    return i
