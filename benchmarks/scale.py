"""The suite `scale`: many tokens, where not all n^2 pairs are asked.

    compressed  X[mu](x_i) of n uniform tokens on S^1 and S^2 by `jaxflow.Compressed`, O(n)
    pruned      E_{mu_x}[y] of n tokens in blobs, in any dimension, by the backend "pruned"

Rivals compute all pairs, of some of the queries where n is large: their time is that of all queries
then, n over the number of queries as long. Answers are compared with float64 for `CHECKED` queries.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf
from jaxflow.kernels.reference import definition

from . import rivals
from .pace import Watch
from .peak import peak
from .slopes import fit
from .timing import (
    Options,
    Runner,
    Samples,
    UnavailableError,
    add_note,
    compete,
    compiled,
    rank,
)

BUDGET_S = {"quick": 60, "full": 120}
BLOBS, CHECKED = 200, 256
PAIRS = 2e9  # of a rival's call: it computes as many queries as that allows
# Scores of size 128 are rounded at 8e-6 in float32; answers beyond this are wrong.
TOLERANCE = 1e-3


class Ball(NamedTuple):
    """Uniform tokens on S^{d-1} at inverse temperature beta, and what is computed of them."""

    d: int
    beta: float
    n: int
    mode: str = "forward"
    tolerance: float = 1e-5

    @property
    def shape(self) -> str:
        return f"compressed S^{self.d - 1} beta {self.beta:g}"

    @property
    def name(self) -> str:
        return f"{self.shape} n {self.n} {self.mode}"

    @property
    def scale(self) -> float:
        return self.beta

    def tokens(self) -> np.ndarray:
        return unit(np.random.default_rng(self.n).standard_normal((self.n, self.d)))


class Blobs(NamedTuple):
    """Tokens in blobs about uniform points of a sphere, or about points of N(0, I_d) with the scale
    beta / sqrt(d) of scaled dot products; without a spread, uniform on the sphere.

    The spread of a blob is the distance of its tokens from its centre, in units of the distance of
    two centres.
    """

    where: str
    d: int
    spread: float
    beta: float
    n: int
    mode: str = "forward"

    @property
    def shape(self) -> str:
        blobs = f"spread {self.spread:g} " if self.spread else ""
        return f"pruned {self.where} d {self.d} {blobs}beta {self.beta:g}"

    @property
    def name(self) -> str:
        return f"{self.shape} n {self.n}"

    @property
    def scale(self) -> float:
        return self.beta / (np.sqrt(self.d) if self.where == "gaussian" else 1)

    def tokens(self) -> np.ndarray:
        rng = np.random.default_rng(self.n)
        noise = rng.standard_normal((self.n, self.d))
        if not self.spread:
            return unit(noise)
        centres = rng.standard_normal((BLOBS, self.d))
        if self.where == "sphere":
            centres, noise = unit(centres), noise / np.sqrt(self.d)
        x = centres[rng.integers(0, BLOBS, self.n)] + np.sqrt(2) * self.spread * noise
        return unit(x) if self.where == "sphere" else x


Case = Ball | Blobs


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cases(quick: bool) -> list[Case]:
    if quick:
        balls: list[Case] = [Ball(d, 9.0, n) for d in (2, 3) for n in (10_000, 40_000)]
        return [*balls, Blobs("sphere", 16, 0.05, 64.0, 20_000)]
    sizes = 30_000, 100_000, 300_000, 1_000_000
    out: list[Case] = [Ball(d, 9.0, n) for d in (2, 3) for n in sizes]
    out += [Ball(3, 25.0, sizes[-1]), Ball(2, 9.0, sizes[-1], "gradient")]
    out += [Ball(3, 9.0, sizes[-2], "gradient")]
    for where, d in (("sphere", 16), ("sphere", 64), ("gaussian", 16), ("gaussian", 64)):
        out += [Blobs(where, d, 0.05, beta, 100_000) for beta in (16.0, 64.0)]
    return [*out, *(Blobs("uniform", d, 0.0, 1.0, 100_000) for d in (16, 64))]


def names(case: Case) -> list[str]:
    """The rivals of a case, jaxflow's way around all pairs last."""
    if case.mode == "gradient":
        return ["jaxflow compressed"]
    exact = ["jaxflow blocked", *rivals.beside_one_thread(["torch"]), "keops"]
    if isinstance(case, Ball):
        return [*exact, "jaxflow compressed"]
    return [*exact, "jaxflow pruned:1e-4", "jaxflow pruned:1e-6"]


# ------------------------------------------------------------------ answers


def attended(x, case: Case, backend: str, queries: int):
    """Means of the first queries over all tokens."""
    return jf.softmax_expectation(x[:queries], x, x, scale=case.scale, backend=backend)[0]


def velocity(x, case: Ball):
    """X[mu](x_i) by the compressed measure; on the sphere means lose what is along x."""
    field = jf.Compressed(jf.SelfAttention(beta=case.beta), case.tolerance)
    return field(0.0, x, jf.Measure(x))


def gradient(fn: Callable, x):
    """The gradient along the sphere of what the first queries see."""
    weights = jnp.cos(jnp.arange(CHECKED * x.shape[1], dtype=x.dtype)).reshape(CHECKED, -1)
    found = jax.grad(lambda x: (weights * fn(x)[:CHECKED]).sum())(x)
    return jf.Sphere().project(x, found)


def of_case(found: Any, x: Any, case: Case):
    """Answers of the first queries that can be compared, as velocities on a sphere."""
    found, x = (np.asarray(a, np.float64)[:CHECKED] for a in (found, x))
    if isinstance(case, Blobs):
        return found
    return found - (found * x).sum(axis=1, keepdims=True) * x


def exact(x: np.ndarray, case: Case) -> np.ndarray:
    """The answer in float64."""
    with jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64)

        def mean(x):
            weights = jnp.zeros(len(x))
            q, scale = x[:CHECKED], jnp.asarray(case.scale)
            out = definition(q, x, x, weights, scale, band=(None, None))[0]
            return jf.Sphere().project(q, out) if isinstance(case, Ball) else out

        answer = gradient(mean, wide) if case.mode == "gradient" else mean(wide)
        return np.asarray(answer)


# ------------------------------------------------------------------ rivals


def queries(name: str, case: Case) -> int:
    """How many of them a rival computes."""
    if name.startswith(("jaxflow compressed", "jaxflow pruned")) or isinstance(case, Blobs):
        return case.n
    return int(np.clip(PAIRS / case.n, CHECKED, case.n))


def prepare(name: str, case: Case, x: np.ndarray) -> Runner:
    few = queries(name, case)
    if name == "jaxflow compressed":
        assert isinstance(case, Ball)
        fn = partial(velocity, case=case)
        return compiled(partial(gradient, fn) if case.mode == "gradient" else fn, x)
    if name.startswith("jaxflow"):
        return compiled(lambda x: attended(x, case, name.split()[1], few), x)
    if name == "keops" and jax.default_backend() == "cpu" and few * case.n > rivals.KEOPS_LIMIT:
        raise UnavailableError("too slow")
    [y] = rivals.to_torch([x])
    if name.startswith("torch"):
        attend = rivals.module("torch").nn.functional.scaled_dot_product_attention
        whole = y[None, None]
        launch = lambda: attend(whole[:, :, :few], whole, whole, scale=case.scale)[0, 0]
        return rivals.torch_runner(launch, threads=rivals.torch_threads(name))
    lazy = rivals.module("pykeops.torch").LazyTensor
    s = case.scale * (lazy(y[:few, None, :]) | lazy(y[None, :, :]))
    return rivals.torch_runner(lambda: s.sumsoftmaxweight(lazy(y[None, :, :]), axis=1))


def contest(case: Case, samples: Samples, *, with_memory: bool) -> list[dict]:
    x = case.tokens().astype(np.float32)
    truth = exact(x, case)
    about = {"shape": case.shape, "n": case.n, "mode": case.mode}
    rows: list[dict[str, Any]] = [about | {"rival": name} for name in names(case)]

    def error(found) -> float:
        if case.mode == "gradient":
            return float(np.abs(np.asarray(found, np.float64) - truth).max() / np.abs(truth).max())
        [found] = rivals.from_torch([found]) if hasattr(found, "detach") else [found]
        return float(np.abs(of_case(found, x, case) - truth).max())

    runners = compete(
        rows, lambda row: prepare(row["rival"], case, x), error, TOLERANCE, samples=samples
    )
    for row in rows:
        if "ms" in row and (few := queries(row["rival"], case)) < case.n:
            row |= {key: row[key] * case.n / few for key in ("ms", "ms_min")}
            add_note(row, f"of {few} queries")
        if "pruned" in row["rival"]:
            row |= shares(x, case, float(row["rival"].split(":")[1]))
    rank(rows)
    base = rows[0].get("ms")
    for row in rows[1:] if base else ():
        row["vs_default"] = row["ms"] / base if "ms" in row else None
    for row in rows if with_memory else ():
        if row["rival"] == "jaxflow compressed" and row["rival"] in runners:
            which = {"case": case._asdict(), "name": row["rival"]}
            row |= peak("scale", which, runners[row["rival"]])
    return rows


def runner(case: dict, name: str) -> Runner:
    ball = Ball(**case)
    return prepare(name, ball, ball.tokens().astype(np.float32))


def shares(x: np.ndarray, case: Case, tolerance: float) -> dict:
    """The shares of all pairs that are asked, replaced and skipped."""
    y = jnp.asarray(x)
    found = jf.kernels.pruning(y, y, y, scale=case.scale, tolerance=tolerance)
    return {k: getattr(found, k) / len(x) ** 2 for k in ("asked", "replaced", "skipped")}


def fits(rows: Sequence[dict]) -> list[dict]:
    """time ~ n^a for compressed measures."""
    out = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = {
            row["n"]: row["ms"]
            for row in rows
            if (row["shape"], row["rival"], row["mode"]) == (shape, "jaxflow compressed", "forward")
            and "ms" in row
        }
        if len(mine) > 1:
            out.append({"shape": shape, "rival": "jaxflow compressed"} | fit(mine, {}))
    return out


def run(options: Options, watch: Watch) -> dict:
    rivals.preload()
    chosen = [case for case in cases(options.quick) if case.name.startswith(options.only)]
    for case in watch.each(chosen, lambda case: case.name):
        watch.rows += contest(case, options.samples, with_memory=not options.quick)
    return {"rows": watch.rows, "fits": fits(watch.rows)}
