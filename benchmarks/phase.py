"""A phase diagram at equal error, for the suite `observables`.

    p(beta, t) = P(<x_i(t), x_j(t)> >= 0.999),    32 uniform tokens on S^127, 0 <= t <= 30

Each rival walks down its ladder, as in the suite `flow`, to the first setting whose p is within
the target of a float64 solve to 1e-9, at every t.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf

from . import machine
from .flow import TOLERANCES, Rival, Solve, race
from .timing import Runner, Samples, seconds

N, D, THRESHOLD = 32, 128, 0.999
TIMES = np.linspace(0, 30, 151)  # every 0.2, which the published step divides
PUBLISHED_DT = 0.1
TARGET = 1e-2  # of 64 systems, p has a standard error of 3e-2
LIMIT_S = 24.0  # a rival whose next setting would take longer stops


class Phase(NamedTuple):
    """One beta of a phase diagram."""

    beta: float
    systems: int

    @property
    def name(self) -> str:
        return f"phase-{N}-{D}-{self.systems} beta {self.beta:g}"


def cases(quick: bool) -> list[Phase]:
    return [Phase(4.0, 8)] if quick else [Phase(4.0, 64), Phase(1.0, 64)]


def key() -> jax.Array:
    return jax.random.key(0)


def start(case: Phase) -> np.ndarray:
    """The points that `jaxflow.phase_diagram` draws in float32."""
    with jax.enable_x64(False):
        points = jf.measure.uniform_sphere(case.systems * N, D, key=key()).points
        return np.asarray(points).reshape(case.systems, N, D)


def ours(case: Phase) -> Solve:
    """As a user calls it, points drawn and rotated included."""
    numbers = {"n": N, "d": D, "systems": case.systems, "threshold": THRESHOLD}

    def solve(tolerance):
        found = jf.phase_diagram([case.beta], TIMES, tolerance=tolerance, key=key(), **numbers)
        return found.probability[0], None

    return solve


def velocity(t, x, beta):
    """Of systems (batch, n, d), by the definition."""
    s = jnp.einsum("bid,bjd->bij", x, x, precision="highest")
    mean = jnp.matmul(jax.nn.softmax(beta * s, axis=-1), x, precision="highest")
    return mean - (mean * x).sum(-1, keepdims=True) * x


def share(t, x, args):
    """The fraction of ordered pairs that have met, of all systems."""
    met = jnp.einsum("bid,bjd->bij", x, x, precision="highest") >= THRESHOLD
    return (met.sum() / x.shape[0] - N) / (N * (N - 1))


def with_diffrax(case: Phase, solver: diffrax.AbstractSolver = diffrax.Tsit5()) -> Solve:
    """In the dtype that JAX is set to."""
    x0 = jnp.asarray(start(case), float)
    x0 = x0 / jnp.linalg.norm(x0, axis=-1, keepdims=True)

    @jax.jit
    def run(x0, beta, rtol):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(velocity),
            solver,
            0.0,
            TIMES[-1],
            None,
            x0,
            beta,
            saveat=diffrax.SaveAt(ts=jnp.asarray(TIMES, x0.dtype), fn=share),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol),
            max_steps=512,
            throw=False,  # Where the tolerance is too loose the points leave the sphere for good.
        )

    def solve(setting):
        sol = run(x0, case.beta, setting)
        assert sol.ys is not None
        return np.asarray(sol.ys), 3 + 6 * int(sol.stats["num_steps"])

    return solve


def with_numpy(case: Phase) -> Solve:
    """The published scheme: explicit Euler, renormalised; p is read off the products at hand."""
    x0, beta = start(case).astype(np.float32), np.float32(case.beta)

    def solve(setting):
        x, p = x0, []
        steps = round(TIMES[-1] / setting)
        dt, between = np.float32(TIMES[-1] / steps), steps // (len(TIMES) - 1)
        for k in range(steps + 1):
            s = x @ x.transpose(0, 2, 1)
            if k % between == 0:
                p.append(((s >= THRESHOLD).sum() / len(x) - N) / (N * (N - 1)))
            weights = np.exp(beta * s)
            mean = weights @ x / weights.sum(axis=-1, keepdims=True)
            x = x + dt * (mean - (mean * x).sum(axis=-1, keepdims=True) * x)
            x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return np.array(p), steps

    return solve


RIVALS = {
    "jaxflow": Rival(ours, "rtol", TOLERANCES),
    "diffrax": Rival(with_diffrax, "rtol", TOLERANCES),
    "numpy": Rival(with_numpy, "dt", tuple(PUBLISHED_DT / 2**k for k in range(12))),
}


@functools.cache
def exact(case: Phase) -> np.ndarray:
    with jax.enable_x64(True):
        return with_diffrax(case, diffrax.Dopri8())(1e-9)[0]


def contest(case: Phase, named: dict[str, Rival], samples: Samples) -> list[dict]:
    expected = exact(case)
    rows, _ = race({"shape": case.name, "target": TARGET}, named, case, expected, samples, LIMIT_S)
    if "numpy" in named:
        script = [row for row in rows if row["rival"] == "numpy" and "ms" in row]
        for row in rows if script else ():
            row["vs_numpy"] = row["ms"] / script[0]["ms"] if "ms" in row else None
        rows.append(published(case, expected))
    return rows


def published(case: Phase, expected: np.ndarray) -> dict[str, Any]:
    """The script with its own step, whatever its error."""
    launch = Runner(partial(with_numpy(case), PUBLISHED_DT))
    p, steps = launch()
    error = float(np.abs(p - expected).max())
    return {
        "shape": case.name,
        "rival": "numpy as published",
        "setting": f"dt {PUBLISHED_DT}",
        "error": error,
        "evaluations": steps,
        "ms": 1e3 * seconds(launch),
        "load": machine.load(),
        "note": f"over the target of {TARGET:.0e}" if error > TARGET else None,
    }
