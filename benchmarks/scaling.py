"""The suite `scaling`: how do time and memory grow with the number of particles?

    time ~ n^a,    peak memory ~ n^b

in float32 on the sphere S^2; a and b are those of slopes.py, where measurements carry one.
Attention over all pairs has a = 2; only a method that stores n^2 scores has b = 2.
"""

from collections.abc import Sequence
from functools import partial

import jax

from . import kernels, rivals, shapes
from .pace import Watch
from .peak import peak
from .slopes import fits, largest
from .timing import TOLERANCE, Options, Runner, Samples, compete

BUDGET_S = {"quick": 60, "full": 45}
RIVALS = ("jaxflow", "jnp", "torch")


def sizes(platform: str, quick: bool) -> dict[str, tuple[int, ...]]:
    """The numbers of particles of each mode."""
    powers = lambda *exponents: tuple(2**k for k in range(*exponents))
    if platform == "cpu":
        if quick:
            return {"forward": powers(10, 15)}
        return {"forward": powers(10, 17), "gradient": powers(10, 15)}
    if quick:
        return {"forward": powers(12, 18, 2)}
    return {"forward": powers(12, 21, 2), "gradient": powers(12, 19, 2)}


def run(options: Options, watch: Watch) -> dict:
    rivals.preload()
    platform = jax.default_backend()
    names = [*rivals.beside_one_thread(RIVALS), *(f"jaxflow {name}" for name in options.backends)]
    for mode, ns in sizes(platform, options.quick).items():
        fitted = largest(ns)
        label = lambda n, mode=mode: f"particles-{n}-3 {mode}"
        chosen = [n for n in ns if label(n).startswith(options.only)]
        for n in watch.each(chosen, label):
            watch.rows += contest(n, mode, names, n in fitted, options.samples)
    return {"rows": watch.rows, "fits": fits(watch.rows)}


def contest(
    n: int, mode: str, names: Sequence[str], with_memory: bool, samples: Samples
) -> list[dict]:
    shape = shapes.particles(n, 3)
    operands = kernels.draw(shape)
    expected = kernels.exact(shape, mode, operands)
    rows = [{"shape": shape.name, "mode": mode, "rival": name, "n": n} for name in names]
    runners = compete(
        rows,
        lambda row: kernels.prepare(row["rival"], shape, mode, operands),
        partial(kernels.error, shape, mode, expected),
        TOLERANCE["float32"],
        samples=samples,
    )
    for row in rows:
        if with_memory and row["rival"] in runners:
            which = {"n": n, "mode": mode, "name": row["rival"]}
            row |= peak("scaling", which, runners[row["rival"]])
    return rows


def runner(n: int, mode: str, name: str) -> Runner:
    shape = shapes.particles(n, 3)
    return kernels.prepare(name, shape, mode, kernels.draw(shape))
