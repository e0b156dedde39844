"""Which adjoint: the time, the memory and the error of a gradient through a flow.

The flow is that of 4 x 32 tokens in d = 32 along one pre-LN block of attention and feed-forward,
whose parameters are 3 Legendre coefficients on [0, 4], in float32 and N equal steps of Heun's
method; the reversible adjoint, which is of one method, takes the reversible Heun. "default" is that
of `jaxflow.models.Depth`: a scan that keeps each state, beyond 64 steps 8 sqrt(N) of them.

`ms` is the least time of a gradient in all parameters, `temp_mib` the temporary memory that XLA
plans for it, and `error` |g - g64| / |g64| where g64 is the gradient of the same steps in float64.
"""

import math
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

import jaxflow as jf
from jaxflow.models import Depth
from jaxflow.reversible import ReversibleAdjoint
from jaxflow.solvers import ScanAdjoint

from ..timing import Runner, seconds
from .study import RATE, Case, Place, Study

QUESTION = "what do adjoints cost in time, memory and error of the gradient?"
STEPS = (4, 16, 64, 256)
SIZES = {"batch": 4, "tokens": 32, "dim": 32, "heads": 4, "coefficients": 3, "t1": 4.0}
REPEATS = 5
COMPILING_S = 10  # of the program and of the one in float64
ADJOINTS: dict[str, diffrax.AbstractAdjoint | None] = {
    "default": None,
    "ScanAdjoint(keep=True)": ScanAdjoint(keep=True),
    "RecursiveCheckpointAdjoint": diffrax.RecursiveCheckpointAdjoint(),
    "DirectAdjoint": diffrax.DirectAdjoint(),
    "BacksolveAdjoint": diffrax.BacksolveAdjoint(),
    "ReversibleAdjoint": ReversibleAdjoint(),
}


def study(steps=STEPS, **smaller: Any) -> Study:
    sizes = SIZES | smaller
    made = [
        Case(f"{name}, {n} steps", sizes | {"adjoint": name, "steps": n}, _flops(sizes, n))
        for n in steps
        for name in ADJOINTS
    ]
    return Study("adjoints", QUESTION, made, measure)


def _flops(sizes: dict[str, Any], steps: int) -> float:
    products = 12 * sizes["dim"] ** 2 * sizes["tokens"] * sizes["batch"]
    return RATE * COMPILING_S + 2 * 2 * 4 * steps * products * (1 + REPEATS)


def measure(case: Case, seed: int, place: Place) -> dict[str, Any]:
    """The gradient of a case, timed, beside that in float64."""
    setting = case.setting
    steps, reversible = setting["steps"], setting["adjoint"] == "ReversibleAdjoint"
    solver = diffrax.ReversibleHeun() if reversible else diffrax.Heun()
    with jax.enable_x64(True):
        system = _system(setting, jax.random.key(seed))
        exact, _ = _gradient(Depth(setting["t1"], steps, solver=solver), system)
        exact = jax.device_get(exact())
    single = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_inexact_array(a) else a, system)
    adjoint = ADJOINTS[setting["adjoint"]]
    run, temporary = _gradient(Depth(setting["t1"], steps, solver=solver, adjoint=adjoint), single)
    found = jax.device_get(run())
    return {
        "flops": case.flops,
        "ms": 1e3 * min(seconds(run) for _ in range(REPEATS)),
        "temp_mib": temporary / 2**20,
        "error": _distance(found, exact),
    }


def _system(sizes: dict[str, Any], key) -> tuple[jf.TimeDependent, jax.Array, jax.Array]:
    """The field, the tokens, and what their ends are multiplied by."""
    dim, heads = sizes["dim"], sizes["heads"]
    *keys, first, second = jax.random.split(key, 2 * sizes["coefficients"] + 2)

    def block(k1, k2):
        attention = jf.MultiHeadAttention(dim, heads, causal=True, key=k1)
        forward = jf.FeedForward(dim, 4 * dim, jax.nn.gelu, key=k2)
        norm = jf.fields.LayerNorm(dim)
        return jf.PreNorm(attention, norm) + jf.PreNorm(forward, norm)

    blocks = [block(*pair) for pair in zip(keys[::2], keys[1::2], strict=True)]
    shape = sizes["batch"], sizes["tokens"], dim
    curve = jf.fields.Legendre(blocks, 0.0, sizes["t1"])
    of = lambda key: jax.random.normal(key, shape)
    return jf.TimeDependent(curve), of(first), of(second)


def _gradient(depth: Depth, system) -> tuple[Runner, int]:
    """The compiled gradient, and the bytes of its temporaries."""
    field, points, target = system
    arrays, static = eqx.partition(field, eqx.is_inexact_array)

    def loss(arrays, points, target):
        sol = depth.flow(eqx.combine(arrays, static), jf.Measure(points))
        return (target * sol.final.points).mean()

    program = jax.jit(jax.grad(loss)).lower(arrays, points, target).compile()
    run = lambda: jax.block_until_ready(program(arrays, points, target))
    account = program.memory_analysis()
    assert account is not None
    return Runner(run), account.temp_size_in_bytes


def _distance(found, exact) -> float:
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True))
    total = lambda squares: math.sqrt(sum(float(square) for square in squares))
    return total(((a - b) ** 2).sum() for a, b in pairs) / total((b**2).sum() for _, b in pairs)
