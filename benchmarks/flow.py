"""The suite `flow`: what does a whole solve cost, at equal error?

    dx_i/dt = P_x sum_j softmax_j(beta <x_i, x_j>) x_j,    |x_i| = 1,   0 <= t <= T

A float64 solve to 1e-9 gives the points at T. Each rival walks down its ladder, tolerance by
sqrt(10) or step by 2, to the first setting whose points are within the target, in the largest
coordinate; that setting is timed.
"""

import functools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf

from . import rivals
from .pace import Watch
from .peak import peak
from .timing import (
    Options,
    Runner,
    Samples,
    UnavailableError,
    failure,
    refuse_scores,
    seconds,
    take_times,
)

BUDGET_S = {"quick": 60, "full": 45}
BETA, T1 = 4.0, 5.0
LIMIT_S = 4.0  # a rival whose next setting would take longer stops
MEASURE_PEAK_FROM = 2048  # tokens
NUMPY_LIMIT = 4096  # tokens


class Case(NamedTuple):
    name: str
    n: int
    target: float


def cases(platform: str, quick: bool) -> list[Case]:
    sizes = ((512, 1e-3), (512, 1e-5), (2048, 1e-3))
    sizes += ((16384, 1e-3),) if platform == "gpu" else ()
    sizes = ((256, 1e-3), (256, 1e-5)) if quick else sizes
    return [Case(f"flow-{n}-3 to {target:.0e}", n, target) for n, target in sizes]


def start(n: int) -> np.ndarray:
    x = np.random.default_rng(n).standard_normal((n, 3))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ------------------------------------------------------------------ rivals

# setting -> points at T1, and evaluations of the field where they are known
Solve = Callable[[float], tuple[Any, int | None]]


class Rival(NamedTuple):
    """`make(x0)` is a solve; `ladder` holds its settings, which are of a `kind`."""

    make: Callable[..., Solve]
    kind: str
    ladder: Sequence[float]


def ours(x0: np.ndarray, *, fixed: bool, backend: str | None = None) -> Solve:
    field, mu = jf.SelfAttention(beta=BETA, backend=backend), jf.Measure(jnp.asarray(x0))

    def solve(setting):
        adaptive = diffrax.PIDController(rtol=setting, atol=setting)
        control = diffrax.ConstantStepSize() if fixed else adaptive
        dt0 = setting if fixed else None
        sol = jf.flow(field, mu, t1=T1, dt0=dt0, stepsize_controller=control, max_steps=None)
        return sol.measures[-1].points, int(sol.stats["num_evaluations"])

    return solve


def naive_velocity(t, x, beta):
    """With n^2 weights, as in published scripts."""
    mean = jnp.matmul(jax.nn.softmax(beta * jnp.matmul(x, x.T, precision="highest"), axis=-1), x)
    return mean - (mean * x).sum(-1, keepdims=True) * x


def with_diffrax(
    x0: np.ndarray, solver: diffrax.AbstractSolver = diffrax.Tsit5(), max_steps: int | None = None
) -> Solve:
    refuse_scores(len(x0) ** 2)

    @jax.jit
    def run(x0, rtol):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(naive_velocity),
            solver,
            0.0,
            T1,
            None,
            x0,
            BETA,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=rtol),
            max_steps=max_steps,
        )

    def solve(setting):
        sol = run(jnp.asarray(x0), setting)
        assert sol.ys is not None
        return jax.block_until_ready(sol.ys[-1]), 3 + 6 * int(sol.stats["num_steps"])

    return solve


def with_torchdiffeq(x0: np.ndarray, *, threads: int | None = None) -> Solve:
    torch, odeint = rivals.module("torch"), rivals.module("torchdiffeq").odeint
    attend = torch.nn.functional.scaled_dot_product_attention
    (points,) = rivals.to_torch([x0])
    times = torch.tensor([0.0, T1], device=points.device)

    def solve(setting):
        evaluations = 0

        def velocity(t, x):
            nonlocal evaluations
            evaluations += 1
            mean = attend(x[None, None], x[None, None], x[None, None], scale=BETA)[0, 0]
            return mean - (mean * x).sum(-1, keepdim=True) * x

        with torch.inference_mode():
            solved = partial(odeint, velocity, points, times, rtol=setting, atol=setting)
            last = rivals.with_threads(threads, solved)[-1]
        if points.is_cuda:
            torch.cuda.synchronize()
        return last, evaluations

    return solve


def with_numpy(x0: np.ndarray) -> Solve:
    """The script that people write: explicit Euler, renormalised."""
    if len(x0) > NUMPY_LIMIT:
        raise UnavailableError("too slow")

    def solve(setting):
        x, steps = x0, round(T1 / setting)
        for _ in range(steps):
            weights = np.exp(BETA * (x @ x.T))
            mean = weights @ x / weights.sum(1, keepdims=True)
            x = x + np.float32(T1 / steps) * (mean - (mean * x).sum(1, keepdims=True) * x)
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return x, steps

    return solve


TOLERANCES = tuple(10.0 ** (-k / 2) for k in range(4, 15))
RIVALS = {
    "jaxflow adaptive": Rival(partial(ours, fixed=False), "rtol", TOLERANCES),
    "jaxflow fixed": Rival(partial(ours, fixed=True), "dt", tuple(1.25 / 2**k for k in range(8))),
    "diffrax": Rival(with_diffrax, "rtol", TOLERANCES),
    "torchdiffeq": Rival(with_torchdiffeq, "rtol", TOLERANCES),
    "numpy": Rival(with_numpy, "dt", tuple(0.1 / 2**k for k in range(10))),
}


def competitors(backends: Sequence[str]) -> dict[str, Rival]:
    """The rivals, and adaptive solves with named backends of jaxflow."""
    make = lambda backend: partial(ours, fixed=False, backend=backend)
    names = {f"jaxflow adaptive {b}": Rival(make(b), "rtol", TOLERANCES) for b in backends}
    return {name: _rival(name) for name in rivals.beside_one_thread(RIVALS)} | names


def _rival(name: str) -> Rival:
    rival = RIVALS[name.removesuffix(rivals.ONE_THREAD)]
    if (threads := rivals.torch_threads(name)) is None:
        return rival
    return rival._replace(make=partial(rival.make, threads=threads))


# ------------------------------------------------------------------ the suite


@functools.cache
def exact(n: int) -> np.ndarray:
    """Float64, of order 8, with n^2 weights up to 2048 points and `blocked` beyond."""
    with jax.enable_x64(True):
        if n <= 2048:
            return np.asarray(with_diffrax(start(n), diffrax.Dopri8())(1e-9)[0])
        mu = jf.Measure(jnp.asarray(start(n)))
        control = diffrax.PIDController(rtol=1e-9, atol=1e-9)
        field = jf.SelfAttention(beta=BETA, backend="blocked")
        sol = jf.flow(
            field, mu, t1=T1, solver=diffrax.Dopri8(), stepsize_controller=control, max_steps=None
        )
        return np.asarray(sol.measures[-1].points)


def run(options: Options, watch: Watch) -> dict:
    rivals.preload()
    chosen = cases(jax.default_backend(), options.quick)
    chosen = [case for case in chosen if case.name.startswith(options.only)]
    for case in watch.each(chosen, lambda case: case.name):
        watch.rows += contest(case, competitors(options.backends), options.samples)
    return {"rows": watch.rows}


def contest(case: Case, named: dict[str, Rival], samples: Samples) -> list[dict]:
    row = {"shape": case.name, "n": case.n, "target": case.target}
    rows, runners = race(row, named, start(case.n).astype(np.float32), exact(case.n), samples)
    for row in rows:
        if row["rival"] in runners and case.n >= MEASURE_PEAK_FROM:
            which = {"name": row["rival"], "n": case.n, "setting": row["value"]}
            row |= peak("flow", which, runners[row["rival"]])
    return rows


def race(
    row: dict[str, Any],
    named: dict[str, Rival],
    begin: Any,
    expected: np.ndarray,
    samples: Samples,
    limit_s: float = LIMIT_S,
) -> tuple[list[dict], dict[str, Runner]]:
    """A row for each rival, from `row`, whose "target" is theirs; and the runners that were timed.

    `begin` is what a rival makes its solve of.
    """
    rows, runners, first_s = [], {}, {}
    for name, rival in named.items():
        rows.append(row | {"rival": name})
        # A rival that fails, in whatever way, must not cost the others their rows.
        try:
            solve = rival.make(begin)
            first, again = (seconds(Runner(partial(solve, rival.ladder[0]))) for _ in range(2))
            reached, first_s[name] = descend(solve, rival, expected, row["target"], limit_s)
        except Exception as e:
            rows[-1]["note"] = failure(e)
            continue
        rows[-1] |= {"compile_s": max(first - again, 0.0)} | reached
        if "note" not in reached:
            launch = partial(solve, reached["value"])
            runners[name] = rivals.torch_runner(launch) if "torch" in name else Runner(launch)
    take_times(rows, runners, first_s, samples=samples)
    return rows, runners


def descend(
    solve: Solve, rival: Rival, expected: np.ndarray, target: float, limit_s: float = LIMIT_S
) -> tuple[dict[str, Any], float]:
    """The first setting within the target, or the last one tried and a note; and its seconds."""
    out, took = {}, 0.0
    for value in rival.ladder:
        if 2 * took > limit_s:
            return out | {"note": f"the next step takes over {limit_s:.0f} s"}, took
        begin = time.perf_counter()
        points, evaluations = solve(value)
        took = time.perf_counter() - begin
        (points,) = rivals.from_torch([points])
        error = float(np.abs(np.asarray(points, np.float64) - expected).max())
        setting = f"{rival.kind} {value:.2g}"
        out = {"setting": setting, "value": value, "error": error, "evaluations": evaluations}
        if error <= target:
            return out, took
    return out | {"note": "the target is out of reach"}, took


def runner(name: str, n: int, setting: float) -> Runner:
    backend = name.removeprefix("jaxflow adaptive").strip()
    rival = competitors([backend] if backend else [])[name]
    solve = rival.make(start(n).astype(np.float32))
    launch = partial(solve, setting)
    return rivals.torch_runner(launch) if "torch" in name else Runner(launch)
