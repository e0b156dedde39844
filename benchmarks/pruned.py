"""Attention that asks only for the pairs that matter: `pruned` against `blocked`.

    sphere     blobs about uniform points of S^{d-1}, at inverse temperature beta
    gaussian   blobs about points of N(0, I_d), at scale beta / sqrt(d), as in scaled dot products
    uniform    S^{d-1} without blobs, where nothing can be left out

The spread of a blob is the distance of its tokens from its centre, in units of the distance of two
centres. Answers are compared with float64 for some of the queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf
from jaxflow.kernels.reference import definition

from .timing import compete, compiled

BLOBS, CHECKED = 200, 256
# Scores of size 128 are rounded at 8e-6 in float32.
TOLERANCE = 1e-3


class Law(NamedTuple):
    """A law of tokens, and the inverse temperature at which they attend to each other."""

    where: str
    d: int
    spread: float
    beta: float
    n: int = 100_000

    @property
    def name(self) -> str:
        blobs = "" if self.where == "uniform" else f" spread {self.spread:g}"
        return f"{self.where} n {self.n} d {self.d}{blobs} beta {self.beta:g}"

    @property
    def scale(self) -> float:
        return self.beta / (np.sqrt(self.d) if self.where == "gaussian" else 1)

    def tokens(self) -> np.ndarray:
        rng = np.random.default_rng(self.n)
        noise = rng.standard_normal((self.n, self.d))
        if self.where == "uniform":
            return unit(noise)
        centres = rng.standard_normal((BLOBS, self.d))
        if self.where == "sphere":
            centres, noise = unit(centres), noise / np.sqrt(self.d)
        x = centres[rng.integers(0, BLOBS, self.n)] + np.sqrt(2) * self.spread * noise
        return unit(x) if self.where == "sphere" else x


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def laws(quick: bool) -> list[Law]:
    n = 20_000 if quick else 100_000
    blobs = [
        Law(where, d, spread, beta, n)
        for where in ("sphere", "gaussian")
        for d in (16, 64)
        for spread in (0.05, 0.3)
        for beta in (16.0, 64.0)
    ]
    return [*blobs, *(Law("uniform", d, 0.0, 1.0, n) for d in (16, 64))]


def exact(x: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and log-partition of the first queries, in float64."""
    with jax.enable_x64(True):
        x = jnp.asarray(x, jnp.float64)
        weights = jnp.zeros(len(x))
        outs = definition(x[:CHECKED], x, x, weights, jnp.asarray(scale), band=(None, None))
        return jax.device_get(outs)


def contest(
    law: Law, tolerances: tuple[str, ...] = ("1e-4", "1e-6"), repeats: tuple[int, int] = (3, 25)
) -> list[dict]:
    """A row for `blocked` and one for each tolerance: time, error, and the share of pairs asked."""
    x = law.tokens().astype(np.float32)
    truth = exact(x, law.scale)
    names = ["blocked", *(f"pruned:{t}" for t in tolerances)]
    rows = [{"shape": law.name, "rival": f"jaxflow {name}", "backend": name} for name in names]

    def prepare(row: dict):
        attend = lambda x: jf.softmax_expectation(x, x, x, scale=law.scale, backend=row["backend"])
        return compiled(attend, x)

    def error(found) -> float:
        mean, lse = (np.asarray(a, np.float64)[:CHECKED] for a in found)
        off = np.linalg.norm(mean - truth[0], axis=1).max()
        return float(max(off, np.abs(lse - truth[1]).max()))

    compete(rows, prepare, error, TOLERANCE, repeats=repeats)
    for row in rows:
        if "ms" in row and "ms" in rows[0]:
            row["vs_blocked"] = row["ms"] / rows[0]["ms"]
        if row is not rows[0]:
            row |= shares(x, law, float(row["backend"].removeprefix("pruned:")))
    return rows


def shares(x: np.ndarray, law: Law, tolerance: float) -> dict:
    found = jf.kernels.pruning(x, x, x, scale=law.scale, tolerance=tolerance)
    counted = {
        name: getattr(found, name) / len(x) ** 2 for name in ("asked", "replaced", "skipped")
    }
    return counted | {"handed_over": found.handed_over}
