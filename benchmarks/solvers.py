"""The suite `solvers`: which method follows metastable tokens, and up to what beta?

    two      the time at which two tokens, <x_1, x_2> = 0 at first, come to a cosine of 0.9:
             int_0^0.9 (e^{beta (1 - r)} + 1) / (2 (1 - r^2)) dr
    circle   the time at which 16 uniform tokens on the circle have become one cluster

In double precision, with the default tolerance 1e-8. Two tokens are not stiff, whatever beta:
steps may be as long as the metastable state. Clusters of several tokens are: they contract at rate
1 while they drift at rates like e^{-beta}, so that explicit steps stay short and implicit ones do
not.
"""

from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf

from .pace import Watch
from .timing import Options, Runner, Samples, UnavailableError, compete

BUDGET_S = {"quick": 30, "full": 20}

SOLVERS = {
    "Tsit5": diffrax.Tsit5(),
    "Dopri8": diffrax.Dopri8(),
    "Geodesic(RK4)": jf.solvers.Geodesic(),
    "Kvaerno3": diffrax.Kvaerno3(),
    "Kvaerno5": diffrax.Kvaerno5(),
}
MAX_STEPS = 100_000
LATEST = 1e12
# Errors of 1e-8 a step, over a few hundred steps, of a time whose relative error they are.
TOLERANCE = 1e-5


class Wait(NamedTuple):
    """Tokens until they are one cluster."""

    tokens: str
    beta: float

    @property
    def name(self) -> str:
        return f"{self.tokens} beta {self.beta:g}"

    @property
    def threshold(self) -> float:
        return 0.9 if self.tokens == "two" else 0.999

    def start(self) -> jf.Measure:
        if self.tokens == "two":
            return jf.Measure(jnp.eye(2))
        return jf.measure.uniform_sphere(16, 2, key=jax.random.key(0))


def cases(quick: bool) -> list[Wait]:
    two, circle = (
        ((1.0, 8.0), (1.0, 4.0)) if quick else ((1.0, 4.0, 8.0, 16.0), (1.0, 4.0, 6.0, 8.0, 12.0))
    )
    return [*(Wait("two", beta) for beta in two), *(Wait("circle", beta) for beta in circle)]


def exact_time(beta: float) -> float:
    """The quadrature of the time for two tokens, by Gauss and Legendre on 40 panels."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(0, 0.9, 41)
    half = np.diff(edges)[:, None] / 2
    r = edges[:-1, None] + half * (nodes + 1)
    return float((half * weights * (np.exp(beta * (1 - r)) + 1) / (2 * (1 - r * r))).sum())


def solve(case: Wait, solver: diffrax.AbstractSolver, tolerance: float = 1e-8) -> jf.FlowSolution:
    return jf.flow(
        jf.SelfAttention(beta=case.beta),
        case.start(),
        t1=LATEST,
        solver=solver,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        event=jf.events.until_clustered(threshold=case.threshold),
        max_steps=MAX_STEPS,
        throw=False,
    )


def truth(case: Wait) -> float:
    if case.tokens == "two":
        return exact_time(case.beta)
    return float(solve(case, diffrax.Kvaerno5(), 1e-10).ts[-1])


def contest(case: Wait, samples: Samples) -> list[dict]:
    rows = [{"shape": case.name, "rival": name} for name in SOLVERS]
    expected = truth(case)

    def prepare(row):
        run = Runner(lambda: jax.block_until_ready(solve(case, SOLVERS[row["rival"]])))
        sol = run()
        row["steps"] = int(sol.stats["num_steps"])
        evaluations = sol.stats["num_evaluations"]
        row["evaluations"] = None if evaluations is None else int(evaluations)
        if not bool(sol.event_mask):
            raise UnavailableError(f"at t = {float(sol.ts[-1]):.3g} after {row['steps']} steps")
        row["setting"] = f"t = {float(sol.ts[-1]):.9g}"
        return run

    error = lambda sol: abs(float(sol.ts[-1]) / expected - 1)
    compete(rows, prepare, error, TOLERANCE, samples=samples)
    return rows


def run(options: Options, watch: Watch) -> dict:
    chosen = [case for case in cases(options.quick) if case.name.startswith(options.only)]
    with jax.enable_x64(True):
        for case in watch.each(chosen, lambda case: case.name):
            watch.rows += contest(case, options.samples)
    return {"rows": watch.rows}
