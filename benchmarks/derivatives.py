"""The suite `derivatives`: what do both modes, and both together, cost?

    gradient of L(x) = <g, F(x)>,    dF(x) dx,    Hessian of L times dx

for F the attention operation with q = k = v = x, and for F a flow of STEPS Heun steps; against the
definition in jnp and against an attention with a derivative rule for reverse mode alone, as fused
attentions have. The reference is the definition in float64.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jaxflow as jf

from .pace import Watch
from .peak import peak
from .timing import (
    TOLERANCE,
    Options,
    Runner,
    Samples,
    compete,
    compiled,
    refuse_scores,
    relative_error,
)

BUDGET_S = {"quick": 90, "full": 40}
BETA, STEPS, T1 = 4.0, 8, 1.0
MEASURE_PEAK_FROM = {"operation": 4096, "flow": 1024}  # points
ROWS = 256  # of a block
MODES = ("gradient", "tangent", "hessian")


class Case(NamedTuple):
    what: str
    n: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.what}-{self.n}-3"


def cases(platform: str, quick: bool) -> list[Case]:
    sizes = {"operation": 1024, "flow": 256} if quick else {"operation": 4096, "flow": 1024}
    if platform != "cpu" and not quick:
        sizes = {"operation": 8192, "flow": 2048}
    return [Case(what, n, mode) for what, n in sizes.items() for mode in MODES]


# ------------------------------------------------------------------ attention of the rivals


def naive(q, k, v):
    s = BETA * jnp.matmul(q, k.T, precision="highest")
    return jnp.matmul(jax.nn.softmax(s, axis=1), v, precision="highest")


def ours(q, k, v, *, backend: str | None = None):
    return jf.softmax_expectation(q, k, v, scale=BETA, backend=backend)[0]


@jax.custom_vjp
def reverse_only(q, k, v):
    """Blocks of rows, recomputed in the reverse pass: O(n * ROWS) memory."""
    return _reverse_forward(q, k, v)[0]


def _reverse_forward(q, k, v):
    def block(q):
        s = BETA * jnp.matmul(q, k.T, precision="highest")
        lse = jax.nn.logsumexp(s, axis=1)
        return jnp.matmul(jnp.exp(s - lse[:, None]), v, precision="highest"), lse

    mean, lse = jax.lax.map(block, _blocks(q))
    mean, lse = mean.reshape(q.shape), lse.reshape(-1)
    return mean, (q, k, v, mean, lse)


def _reverse_backward(residuals, g):
    q, k, v, mean, lse = residuals
    product = partial(jnp.matmul, precision="highest")

    def block(carry, rows):
        q, g, mean, lse = rows
        p = jnp.exp(BETA * product(q, k.T) - lse)
        w = BETA * p * (product(g, v.T) - (g * mean).sum(1, keepdims=True))
        gk, gv = carry
        return (gk + product(w.T, q), gv + product(p.T, g)), product(w, k)

    rows = tuple(map(_blocks, (q, g, mean, lse[:, None])))
    (gk, gv), gq = jax.lax.scan(block, (jnp.zeros_like(k), jnp.zeros_like(v)), rows)
    return gq.reshape(q.shape), gk, gv


reverse_only.defvjp(_reverse_forward, _reverse_backward)


def _blocks(a):
    return a.reshape(-1, min(ROWS, a.shape[0]), a.shape[1])


class Attention(jf.AbstractField):
    """Any attention as a field on the sphere."""

    attend: Callable = eqx.field(static=True)
    geometry: jf.Sphere

    def __call__(self, t, x, mu):
        return self.geometry.project(x, self.attend(x, mu.points, mu.points))


# ------------------------------------------------------------------ derivatives


def flowed(x, attend: Callable, adjoint: diffrax.AbstractAdjoint):
    sol = jf.flow(
        Attention(attend=attend, geometry=jf.Sphere()),
        jf.Measure(x),
        t1=T1,
        dt0=T1 / STEPS,
        solver=diffrax.Heun(),
        stepsize_controller=diffrax.ConstantStepSize(),
        adjoint=adjoint,
        max_steps=STEPS,
        throw=False,
    )
    return sol.measures[-1].points


ADJOINTS = {
    "gradient": diffrax.RecursiveCheckpointAdjoint(),
    "tangent": diffrax.ForwardMode(),
    "hessian": diffrax.DirectAdjoint(),
}
TRANSFORMS = {
    "gradient": lambda f, x, dx, g: jax.vjp(f, x)[1](g),
    "tangent": lambda f, x, dx, g: (jax.jvp(f, (x,), (dx,))[1],),
    "hessian": lambda f, x, dx, g: jax.jvp(lambda x: jax.vjp(f, x)[1](g), (x,), (dx,))[1],
}
RIVALS = {"jaxflow": ours, "jnp": naive, "custom_vjp": reverse_only}


def derivative(case: Case, attend: Callable) -> Callable:
    if case.what == "operation":
        f = lambda x: attend(x, x, x)
    else:
        f = partial(flowed, attend=attend, adjoint=ADJOINTS[case.mode])
    return partial(TRANSFORMS[case.mode], f)


def draw(case: Case) -> tuple[np.ndarray, ...]:
    x, dx, g = np.random.default_rng(case.n).standard_normal((3, case.n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True), dx, g


def prepare(case: Case, name: str) -> Runner:
    stored = {"gradient": 2, "tangent": 1, "hessian": 4}[case.mode]
    if name == "jnp":
        refuse_scores(stored * case.n**2)
    library, _, backend = name.partition(" ")
    attend = partial(ours, backend=backend or None) if library == "jaxflow" else RIVALS[name]
    operands = (a.astype(np.float32) for a in draw(case))
    return compiled(derivative(case, attend), *operands)


def exact(case: Case) -> list[np.ndarray]:
    with jax.enable_x64(True):
        operands = (jnp.asarray(a.astype(np.float32), jnp.float64) for a in draw(case))
        return [np.asarray(a) for a in jax.jit(derivative(case, naive))(*operands)]


# ------------------------------------------------------------------ the suite


def run(options: Options, watch: Watch) -> dict:
    names = (*RIVALS, *(f"jaxflow {name}" for name in options.backends))
    chosen = cases(jax.default_backend(), options.quick)
    chosen = [case for case in chosen if case.name.startswith(options.only)]
    for case in watch.each(chosen, lambda case: f"{case.name} {case.mode}"):
        watch.rows += contest(case, names, options.samples)
    return {"rows": watch.rows}


def contest(case: Case, names: tuple[str, ...], samples: Samples) -> list[dict]:
    rows = [{"shape": case.name, "mode": case.mode, "rival": name} for name in names]
    expected = exact(case)
    error: Callable[[Any], float] = lambda found: relative_error(found, expected)
    prepared = lambda row: prepare(case, row["rival"])
    runners = compete(rows, prepared, error, TOLERANCE["float32"], samples=samples)
    for row in rows:
        if row["rival"] in runners and case.n >= MEASURE_PEAK_FROM[case.what]:
            row |= peak(
                "derivatives", case._asdict() | {"name": row["rival"]}, runners[row["rival"]]
            )
    return rows


def runner(what: str, n: int, mode: str, name: str) -> Runner:
    return prepare(Case(what, n, mode), name)
