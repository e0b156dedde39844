"""The suite `scaling`: how do time and memory grow with the number of particles?

    time ~ n^a,    peak memory ~ n^b

in float32 on the sphere S^2; a and b by least squares on the logarithms, over the upper half of
the sizes. Attention over all pairs has a = 2; only a method that stores n^2 scores has b = 2.
"""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from . import kernels, rivals, shapes
from .peak import peak
from .timing import TOLERANCE, Options, Runner, Watch, compete

BUDGET_S = {"quick": 60, "full": 45}
RIVALS = ("jaxflow", "jnp", "torch")
LEAST_MIB = 1.0  # of memory in a fit: below it, pages of other origin show


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
    names = (*RIVALS, *(f"jaxflow {name}" for name in options.backends))
    names += tuple(kernels.CPU_RIVALS) if platform == "cpu" else ()
    rows = []
    for mode, ns in sizes(platform, options.quick).items():
        upper = upper_half(ns)
        label = lambda n, mode=mode: f"particles-{n}-3 {mode}"
        chosen = [n for n in ns if label(n).startswith(options.only)]
        for n in watch.each(chosen, label):
            rows += contest(n, mode, names, n in upper, options.repeats)
    return {"rows": rows, "fits": fits(rows)}


def upper_half(ns: Sequence[int]) -> tuple[int, ...]:
    first = max(0, min(len(ns) // 2, len(ns) - 2))  # a slope needs two
    return tuple(sorted(ns))[first:]


def contest(
    n: int, mode: str, names: Sequence[str], with_memory: bool, repeats: tuple[int, int]
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
        repeats=repeats,
    )
    for row in rows:
        if with_memory and row["rival"] in runners:
            which = {"n": n, "mode": mode, "name": row["rival"]}
            row |= peak("scaling", which, runners[row["rival"]])
    return rows


def runner(n: int, mode: str, name: str) -> Runner:
    shape = shapes.particles(n, 3)
    return kernels.prepare(name, shape, mode, kernels.draw(shape))


def fits(rows: Sequence[dict]) -> list[dict]:
    """The exponents a and b of each mode and rival."""
    out = []
    for mode, rival in sorted({(row["mode"], row["rival"]) for row in rows}):
        some = [row for row in rows if (row["mode"], row["rival"]) == (mode, rival)]
        timed = {row["n"]: row["ms"] for row in some if "ms" in row}
        if not timed:
            continue
        grown = {row["n"]: row["peak_mib"] for row in some if row.get("peak_mib", 0) > LEAST_MIB}
        upper = upper_half(list(timed))  # a rival that stops early has its own
        exponents = {
            "time_exponent": exponent({n: timed[n] for n in upper}),
            "memory_exponent": exponent({n: grown[n] for n in upper if n in grown}),
        }
        out.append({"mode": mode, "rival": rival, "from_n": min(upper)} | exponents)
    return out


def exponent(values: dict[int, float]) -> float | None:
    """The slope of log value against log n."""
    if len(values) < 2:
        return None
    return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])
