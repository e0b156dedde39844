"""`python -m benchmarks tune`: which tiles suit the GPU kernels on this device?

For each named shape and each of the modes forward, tangent and cotangent, the family of
`jaxflow.kernels.pallas_gpu` that runs it proposes configurations, its own choice first. Those that
compile and agree with the portable backend are timed in turn. `TUNED` in configs.py has one entry
for all shapes of a key (family, mode, bytes, channels): the configuration whose ratio to the
default has the least geometric mean over them, if it gains.
"""

import ast
import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxflow.kernels import pallas_gpu
from jaxflow.kernels.base import (
    MODES,
    Cotangent,
    Forward,
    Mode,
    Operands,
    Problem,
    Results,
    Shapes,
    Tangent,
    band,
    evaluate,
)
from jaxflow.kernels.blocked import Blocked
from jaxflow.kernels.pallas_gpu import PallasGPU, configs

from . import shapes
from .pace import Watch
from .shapes import Shape
from .timing import TOLERANCE, Options, Samples, compete, compiled, relative_error

BUDGET_S = {"quick": 900, "full": 5400}
COMPILE_S = 3.0  # of a candidate, about
CASE_S = 5.0  # of the check and the samples of a case, about
MOST_PAIRS = 2**33  # the tiles of larger shapes are those of smaller ones with the same key
GAIN = 0.02  # less is noise, and the default stays
OLDER = (8, 0)  # the compute capability whose kernels Pallas's own interpreter runs
CONFIGS = Path(configs.__file__)

Key = tuple[str, str, int, int]  # family, mode, bytes of an operand, channels


class Case(NamedTuple):
    """One shape in one mode; `candidates` begins with what the family chooses by itself."""

    shape: Shape
    mode: Mode
    family: str
    candidates: Sequence[configs.Config]

    @property
    def key(self) -> Key:
        width = 1 << (self.shape.d - 1).bit_length()
        return self.family, self.mode, jnp.dtype(self.shape.dtype).itemsize, width


def missing() -> str | None:
    """What this machine lacks, or None."""
    try:
        jax.local_devices(backend="cuda")
    except RuntimeError:
        return (
            f"tune needs an NVIDIA GPU and a JAX for it (pip install 'jaxflow[cuda]'); "
            f"JAX sees {jax.default_backend()} only."
        )
    return None


def cases(named: Sequence[Shape], capability: tuple[int, int]) -> list[Case]:
    """Those that leave a choice."""
    every = (case(shape, mode, capability) for shape in named for mode in MODES)
    return [c for c in every if len(c.candidates) > 1]


def case(shape: Shape, mode: Mode, capability: tuple[int, int]) -> Case:
    x = jax.ShapeDtypeStruct((shape.batch, shape.n, shape.d), jnp.dtype(shape.dtype))
    family = pallas_gpu.family(Shapes(x, x, x), problem(shape), capability)
    return Case(shape, mode, family.name, family.candidates(mode, Shapes(x, x, x)))


def problem(shape: Shape) -> Problem:
    limits = band(shape.causal, shape.window)
    return Problem(limits, weighted=False, constant_scale=shape.scale)


def _plan(options: Options) -> list[Case]:
    named = shapes.chosen("gpu", quick=options.quick, only=options.only)
    named = [shape for shape in named if shape.pairs <= MOST_PAIRS]
    return cases(named, pallas_gpu.compute_capability())


def estimate(options: Options) -> str:
    """The work ahead, in words."""
    plan = _plan(options)
    count = sum(len(c.candidates) for c in plan)
    minutes = (COMPILE_S * count + CASE_S * len(plan)) / 60
    return f"tune: {len(plan)} cases, {count} configurations, about {minutes:.0f} min"


def run(options: Options, watch: Watch) -> dict:
    """One row for each shape, mode and configuration."""
    # Without this the default of a device that was tuned before would be what was found then.
    with mock.patch.dict(configs.TUNED, clear=True):
        for c in watch.each(_plan(options), lambda c: f"{c.shape.name} {c.mode}"):
            watch.rows += contest(c, options.samples, log=watch.log)
            jax.clear_caches()  # a few dozen programs a case would fill the memory
    return {"rows": watch.rows}


# ------------------------------------------------------------------ one case


def contest(
    case: Case,
    samples: Samples,
    *,
    log: Callable[[str], Any] = lambda text: None,
    interpret: bool = False,
) -> list[dict]:
    """The rows of a case; `interpret` runs the kernels on any machine."""
    about = {"shape": case.shape.name, "mode": case.mode, "key": case.key}
    rows = [
        about | {"rival": f"candidate {i}" if i else "jaxflow", "config": text(config)}
        for i, config in enumerate(case.candidates)
    ]
    configuration = {row["rival"]: c for row, c in zip(rows, case.candidates, strict=True)}
    operands = draw(case.shape, case.mode)
    expected = truth(case, operands)

    def prepare(row):
        config = configuration[row["rival"]]
        log(f"{row['shape']} {row['mode']} {row['rival']} of {len(rows) - 1}: {row['config']}")
        backend = PallasGPU(config, interpret)
        return compiled(partial(evaluate, backend, problem=problem(case.shape)), operands)

    error = lambda found: relative_error(found[: len(expected)], expected)
    compete(rows, prepare, error, TOLERANCE[case.shape.dtype], samples=samples)
    _compare(rows)
    return rows


def _compare(rows: Sequence[dict[str, Any]]):
    """`vs_default` in place of the columns that compare libraries."""
    for row in rows:
        row.pop("vs_best", None)
        row.pop("vs_jnp", None)
        if "ms" in row and "ms" in rows[0]:
            row["vs_default"] = row["ms"] / rows[0]["ms"]


def draw(shape: Shape, mode: Mode) -> Operands:
    """Operands of the kernel: those of a forward pass, its results, directions."""
    q, k, v = (jnp.asarray(a).reshape(shape.batch, shape.n, shape.d) for a in shape.operands())
    b, scale = jnp.zeros(k.shape[:2]), jnp.full(shape.batch, shape.scale, jnp.float32)
    primal = Forward(q, k, v, b, scale)
    if mode == "forward":
        return primal
    mean, lse = _exact(shape, primal)
    rng = np.random.default_rng(0)
    normal = lambda like: jnp.asarray(rng.standard_normal(like.shape, np.float32), like.dtype)
    results = mean.astype(v.dtype), lse
    if mode == "cotangent":
        return Cotangent(*primal, *results, normal(v), normal(lse))
    return Tangent(*primal, *results, normal(q).astype(b.dtype), normal(k), normal(v), b)


def truth(case: Case, operands: Operands) -> list[np.ndarray]:
    """The portable backend in float32; without weights their cotangent, the fourth, is nothing."""
    return [np.asarray(a, np.float64) for a in _exact(case.shape, operands)[:3]]


def _exact(shape: Shape, operands: Operands) -> Results:
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), operands)
    return jax.jit(partial(evaluate, Blocked(), problem=problem(shape)))(wide)


# ------------------------------------------------------------------ the table in configs.py


def text(config: Any) -> str:
    """The configuration as source code of configs.py."""
    if config is None:
        return "None"
    if isinstance(config, tuple):
        return f"({', '.join(text(c) for c in config)})"
    values = ", ".join(map(repr, dataclasses.astuple(config)))
    return f"{type(config).__module__.rpartition('.')[2]}.{type(config).__name__}({values})"


def best(rows: Sequence[Mapping[str, Any]]) -> dict[Key, str | None]:
    """The source of the best configuration of each key; None where the default is."""
    timed: dict[Key, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if "vs_default" in row:
            source = "default" if row["rival"] == "jaxflow" else row["config"]
            timed[tuple(row["key"])][source][row["shape"]] = row["vs_default"]
    found: dict[Key, str | None] = {}
    for key, ratios in timed.items():
        everywhere = {s: r for s, r in ratios.items() if r.keys() == ratios["default"].keys()}
        means = {s: statistics.geometric_mean(r.values()) for s, r in everywhere.items()}
        winner = min(means, key=lambda source: (means[source], source))
        found[key] = winner if means[winner] < 1 - GAIN else None
    return found


def conclude(rows: Sequence[Mapping[str, Any]], kind: str, *, write: bool) -> Iterator[str]:
    """The lines for `TUNED`, and what became of them."""
    found = best(rows)
    yield f"TUNED, for a kind of device ({len(found)} keys, gains of {GAIN:.0%} and more):"
    yield _rendered({kind: {key: c for key, c in found.items() if c is not None}})
    if write:
        CONFIGS.write_text(updated(CONFIGS.read_text(), kind, found))
        yield f"Written to {CONFIGS}."


def updated(source: str, kind: str, found: Mapping[Key, str | None]) -> str:
    """The text of configs.py with what was found for a kind of device in its `TUNED`."""
    (node,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TUNED"
    )
    table = {
        name: {key: ast.unparse(config) for key, config in _items(entries)}
        for name, entries in _items(node.value)
    }
    entries = table.get(kind, {}) | dict(found)
    table[kind] = {key: config for key, config in entries.items() if config is not None}
    lines = source.splitlines()
    declared = f"TUNED: {ast.unparse(node.annotation)} = "
    lines[node.lineno - 1 : node.end_lineno] = (declared + _rendered(table)).splitlines()
    return "\n".join(lines) + "\n"


def _items(node: ast.expr | None) -> Iterator[tuple[Any, ast.expr]]:
    """Keys and what they stand for, of a dict as source code."""
    assert isinstance(node, ast.Dict)
    for key, value in zip(node.keys, node.values, strict=True):
        assert key is not None
        yield ast.literal_eval(key), value


def _rendered(table: Mapping[str, Mapping[Key, str]]) -> str:
    """As `ruff format` writes it."""
    blocks = []
    for kind, entries in sorted(table.items()):
        inner = [f"        {key!r}: {config},\n" for key, config in sorted(entries.items())]
        if inner:
            blocks.append(f"    {kind!r}: {{\n{''.join(inner)}    }},\n")
    return f"{{\n{''.join(blocks)}}}".replace("'", '"') if blocks else "{}"
