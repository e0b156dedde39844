"""The suite `observables`: what does it cost to look at a flow?

    phase    p(beta, t) = P(<x_i(t), x_j(t)> >= 0.999), a row of a phase diagram, at equal error
    others   one function of n tokens: clusters, energy, correlations, diameter, hull, transport

The functions are checked against scipy or numpy, and timed in turn with them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxflow as jf

from . import phase, rivals
from .pace import Watch
from .peak import peak
from .timing import TOLERANCE, Options, Runner, Samples, compete, compiled, relative_error

BUDGET_S = {"quick": 60, "full": 80}

BETA = 4.0
EDGES = np.linspace(-1, 1, 41)
MODES = np.arange(1, 33)
LINK = 0.9999  # cosine; an angle of 0.014
ALL_PAIRS = ("energy", "correlations")
BLOBS = 1000  # of tokens, 0.1 apart and 0.005 wide


class Operation(NamedTuple):
    """`draw(n)` gives arrays in float64; `ours` takes measures, `other` the arrays."""

    draw: Callable[[int], tuple[np.ndarray, ...]]
    ours: Callable[..., Any]
    rival: str
    other: Callable[..., Any]


def normal(n: int, d: int, systems: int = 1) -> tuple[np.ndarray, ...]:
    return tuple(np.random.default_rng(n).standard_normal((systems, n, d)))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def blobs(n: int) -> tuple[np.ndarray]:
    """Tokens about the points of a Fibonacci lattice on S^2, as they are while they cluster."""
    k = np.arange(BLOBS)
    z, angle = 1 - (2 * k + 1) / BLOBS, np.pi * (1 + 5**0.5) * k
    side = np.sqrt(1 - z**2)
    centres = np.stack([side * np.cos(angle), side * np.sin(angle), z], axis=1)
    rng = np.random.default_rng(n)
    return (unit(centres[rng.integers(0, BLOBS, n)] + 1e-3 * rng.standard_normal((n, 3))),)


def narrow(n: int) -> tuple[np.ndarray]:
    """On the circle, angles of N(0, 1/4)."""
    angles = 0.5 * normal(n, 1)[0][:, 0]
    return (np.stack([np.cos(angles), np.sin(angles)], axis=1),)


def components(x):
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    i, j = KDTree(x).query_pairs(np.sqrt(2 - 2 * LINK), output_type="ndarray").T
    graph = coo_array((np.ones(len(i), bool), (i, j)), shape=(len(x), len(x)))
    return connected_components(graph, directed=False)[1]


def blocks(x):
    """The rows in blocks of which the products with all stay in the cache: five times as fast."""
    block = max(1, 2**16 // len(x))
    return (x[i : i + block] for i in range(0, len(x), block))


def blocked_energy(x):
    """Exponentials in float32, sums in float64."""
    x = x.astype(np.float32)
    y, total = np.float32(BETA) * x.T, 0.0
    for rows in blocks(x):
        s = rows @ y
        total += np.exp(s, out=s).sum(dtype=np.float64)
    return total / (2 * BETA * len(x) ** 2)


def blocked_correlations(x):
    """Products in float32, bins of equal width."""
    x, bins = x.astype(np.float32), len(EDGES) - 1
    counts = np.zeros(bins, int)
    for rows in blocks(x):
        place = ((rows @ x.T + 1) * np.float32(bins / 2)).astype(np.int32)
        counts += np.bincount(np.clip(place, 0, bins - 1).ravel(), minlength=bins)
    counts[-1] -= len(x)  # each token with itself
    return counts / (len(x) * (len(x) - 1)) / np.diff(EDGES)


def hull_diameter(x):
    from scipy.spatial import ConvexHull
    from scipy.spatial.distance import pdist

    return pdist(x[ConvexHull(x).vertices]).max()


def hull_area(x):
    from scipy.spatial import ConvexHull

    return ConvexHull(x).volume


def sorted_distance(x, y):
    return np.sqrt(((np.sort(x[:, 0]) - np.sort(y[:, 0])) ** 2).mean())


def powers(x):
    """E e^{i k theta} = E z^k."""
    z = x[:, 0] + 1j * x[:, 1]
    modes, power = [], np.ones_like(z)
    for _ in MODES:
        power = power * z
        modes.append(power.mean())
    return np.stack([np.real(modes), np.imag(modes)])


def our_modes(mu):
    modes = jf.observables.fourier_modes(mu, MODES)
    return jnp.stack([modes.real, modes.imag])


def our_correlations(mu):
    return jf.observables.pair_correlations(mu, EDGES, queries=mu.n)


OPERATIONS = {
    "clusters": Operation(
        blobs, lambda mu: jf.observables.cluster_labels(mu, LINK), "scipy", components
    ),
    "energy": Operation(
        lambda n: (unit(normal(n, 3)[0]),),
        lambda mu: jf.observables.interaction_energy(mu, BETA),
        "numpy",
        blocked_energy,
    ),
    "correlations": Operation(
        lambda n: (unit(normal(n, 3)[0]),), our_correlations, "numpy", blocked_correlations
    ),
    "diameter": Operation(lambda n: normal(n, 3), jf.observables.diameter, "scipy", hull_diameter),
    "hull": Operation(lambda n: normal(n, 2), jf.observables.hull_area, "scipy", hull_area),
    "wasserstein": Operation(
        lambda n: normal(n, 1, 2), jf.observables.wasserstein, "numpy", sorted_distance
    ),
    "modes": Operation(narrow, our_modes, "numpy", powers),
}


class Sample(NamedTuple):
    """A function of n tokens."""

    what: str
    n: int

    @property
    def name(self) -> str:
        return f"{self.what}-{self.n}"


def cases(quick: bool) -> list[Sample]:
    """n = 1e5; all pairs are counted of fewer, for numpy needs half a minute there."""
    sizes = {what: 100_000 for what in OPERATIONS} | dict.fromkeys(ALL_PAIRS, 32_768)
    return [Sample(what, 10_000 if quick else n) for what, n in sizes.items()]


def runner(what: str, n: int, name: str) -> Runner:
    operation = OPERATIONS[what]
    arrays = operation.draw(n)
    if name != "jaxflow":
        return Runner(partial(operation.other, *arrays))
    narrowed = (a.astype(np.float32) for a in arrays)
    return compiled(lambda *points: operation.ours(*map(jf.Measure, points)), *narrowed)


def contest(case: Sample, samples: Samples, *, with_memory: bool) -> list[dict]:
    names = OPERATIONS[case.what].rival, "jaxflow"
    rows = [{"shape": case.name, "rival": name, "n": case.n} for name in names]
    first: list[np.ndarray] = []

    def error(found) -> float:
        """From the first rival, which is in float64 but for the exponentials of the energy."""
        first.append(np.asarray(found, np.float64))
        return relative_error([first[-1]], [first[0]])

    prepare = lambda row: runner(case.what, case.n, row["rival"])
    runners = compete(rows, prepare, error, TOLERANCE["float32"], samples=samples)
    if names[0] not in runners:  # nothing to be compared with
        rows[1].pop("error", None)
    for row in rows if with_memory else ():
        if row["rival"] in runners:
            which = {**case._asdict(), "name": row["rival"]}
            row |= peak("observables", which, runners[row["rival"]])
    return rows[::-1]


# ------------------------------------------------------------------ the suite


def run(options: Options, watch: Watch) -> dict:
    rivals.preload()
    every = [*phase.cases(options.quick), *cases(options.quick)]
    chosen = [case for case in every if case.name.startswith(options.only)]
    for case in watch.each(chosen, lambda case: case.name):
        if isinstance(case, phase.Phase):
            watch.rows += phase.contest(case, phase.RIVALS, options.samples)
        else:
            watch.rows += contest(case, options.samples, with_memory=not options.quick)
    return {"rows": watch.rows}
