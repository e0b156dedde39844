"""The suite `compile`: what does the first call cost, and does any later one cost it again?

For the operation, a flow, and the gradients of both: the seconds to trace, lower and compile, all
caches empty; how often Python traces the function over four calls with a new beta, t1 and
tolerance each; and the programs that XLA compiles for the three calls after the first.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp

import jaxflow as jf

from . import machine
from .flow import naive_velocity
from .pace import Watch
from .timing import Options, failure

BUDGET_S = {"quick": 60, "full": 40}
N = 512
NOT_JITTED = "flow, not jitted"
COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of jax.monitoring

# beta, t1, tolerance
VALUES = ((4.0, 2.0, 1e-3), (9.0, 2.0, 1e-3), (9.0, 1.0, 1e-3), (9.0, 1.0, 1e-4))


class Case(NamedTuple):
    what: str
    rival: str
    fn: Callable  # of (x, beta, t1, tolerance)


def operation(x, beta, t1, tolerance, *, backend=None):
    return jf.softmax_expectation(x, x, x, scale=beta, backend=backend)[0]


def naive_operation(x, beta, t1, tolerance):
    return jax.nn.softmax(beta * (x @ x.T), axis=-1) @ x


def flow(x, beta, t1, tolerance, *, backend=None):
    control = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    field = jf.SelfAttention(beta=beta, backend=backend)
    return jf.flow(field, jf.Measure(x), t1=t1, stepsize_controller=control).measures[-1].points


def naive_flow(x, beta, t1, tolerance):
    control = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    term, solver = diffrax.ODETerm(naive_velocity), diffrax.Tsit5()
    sol = diffrax.diffeqsolve(
        term, solver, 0.0, t1, None, x, beta, stepsize_controller=control, throw=False
    )
    assert sol.ys is not None
    return sol.ys[-1]


def gradient_of(fn: Callable) -> Callable:
    return jax.grad(lambda x, *values: (fn(x, *values)[:, 0]).sum())


def cases(backends: tuple[str, ...]) -> list[Case]:
    named = {f"jaxflow {name}": name for name in backends}
    out = []
    for what, ours, naive in (
        ("operation", operation, naive_operation),
        ("flow", flow, naive_flow),
    ):
        fns = {"jaxflow": ours, "jnp": naive}
        bind = lambda name, ours=ours: lambda *a: ours(*a, backend=name)
        fns |= {rival: bind(name) for rival, name in named.items()}
        out += [Case(what, rival, fn) for rival, fn in fns.items()]
        out += [Case(f"{what} gradient", rival, gradient_of(fn)) for rival, fn in fns.items()]
    return [*out, Case(NOT_JITTED, "jaxflow", flow)]


def run(options: Options, watch: Watch) -> dict:
    chosen = [case for case in cases(options.backends) if case.what.startswith(options.only)]
    for case in watch.each(chosen, lambda case: f"{case.what} {case.rival}"):
        row = {"shape": case.what, "rival": case.rival, "n": N, "load": machine.load()}
        try:
            row |= (called if case.what == NOT_JITTED else stages)(case.fn)
        except Exception as e:  # must not cost the others their rows
            row["note"] = failure(e)
        watch.rows.append(row)
    return {"rows": watch.rows}


def stages(fn: Callable) -> dict:
    jax.clear_caches()
    x, traces = points(), 0

    def counted(x, *values):
        nonlocal traces
        traces += 1
        return fn(x, *values)

    jitted, clock = jax.jit(counted), [time.perf_counter()]
    traced = jitted.trace(x, *VALUES[0])
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    lowered.compile()
    clock.append(time.perf_counter())
    names = ("trace_s", "lower_s", "compile_s")
    spans = {name: b - a for name, a, b in zip(names, clock, clock[1:], strict=False)}
    again = later(jitted, x)
    return spans | {"traces": traces} | again


def called(fn: Callable) -> dict:
    """As a user calls it: checks of the result on the host included."""
    jax.clear_caches()
    x, begin = points(), time.perf_counter()
    jax.block_until_ready(fn(x, *VALUES[0]))
    return {"compile_s": time.perf_counter() - begin} | later(fn, x)


def later(fn: Callable, x: jax.Array) -> dict:
    jax.block_until_ready(fn(x, *VALUES[0]))
    with compilations() as programs:
        for values in VALUES[1:]:
            jax.block_until_ready(fn(x, *values))
    return {"programs_again": len(programs)}


def points() -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (N, 3))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The programs that XLA compiles meanwhile."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int):
        if event == COMPILED:
            names.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
