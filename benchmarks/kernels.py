"""The suite `kernels`: is the attention operation right, how fast is it, how near to the device?

    mean_i = sum_j exp(s_ij - log_partition_i) v_j,    s_ij = scale <q_i, k_j>

on the default device: forward, gradient (in q, k, v, reverse mode) and tangent (value and jvp),
against softmax attention in other libraries. Only an answer that agrees with float64 is timed.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import rivals, shapes
from .device import better, ceilings
from .peak import peak
from .shapes import MODES, Shape
from .timing import (
    TOLERANCE,
    Options,
    Runner,
    UnavailableError,
    Watch,
    compete,
    compiled,
    refuse_scores,
    relative_error,
)

BUDGET_S = {"quick": 75, "full": 150}
CHECKED_ROWS = 1024  # of a forward or a tangent; a gradient is checked whole
CHECK_BLOCK = 2**26  # scores at a time in the check
MEASURE_PEAK_FROM = 16384  # tokens

RIVALS = {"jaxflow": MODES, "jnp": MODES, "torch": ("forward", "gradient"), "keops": ("forward",)}
CPU_RIVALS = {"torch 1 thread": ("forward", "gradient")}
GPU_RIVALS = {
    "jax.nn cudnn": ("forward", "gradient"),
    "jax.nn xla": MODES,
    "pallas triton": ("forward", "gradient"),
    "pallas mosaic": ("forward", "gradient"),
    "tokamax": ("forward", "gradient"),
}

# A pair costs 2 d a + 2 b flops, where a counts products and b the other multiplies and adds, and
# c exponentials: the least for a method that stores no array of scores. README.md counts them.
WORK = {"forward": (2, 1, 1), "gradient": (7, 2, 2), "tangent": (6, 3, 1)}


class Operands(NamedTuple):
    """q, k, v; the cotangent g of the mean; tangents dq, dk, dv."""

    q: Any
    k: Any
    v: Any
    g: Any
    dq: Any
    dk: Any
    dv: Any


def draw(shape: Shape) -> Operands:
    q, k, v = shape.operands()
    rest = np.random.default_rng(0).standard_normal((4, *q.shape), np.float32)
    return Operands(q, k, v, *rest.astype(q.dtype))


# ------------------------------------------------------------------ one rival on one case

ATTENTIONS = {
    "jnp": rivals.naive,
    "jax.nn cudnn": partial(rivals.jax_nn, implementation="cudnn"),
    "jax.nn xla": partial(rivals.jax_nn, implementation="xla"),
    "pallas triton": rivals.pallas_triton,
    "pallas mosaic": rivals.pallas_mosaic,
    "tokamax": rivals.tokamax,
}
TRANSFORMS = {
    "forward": lambda attend, o: (attend(o.q, o.k, o.v),),
    "gradient": lambda attend, o: jax.vjp(attend, o.q, o.k, o.v)[1](o.g),
    "tangent": lambda attend, o: jax.jvp(attend, (o.q, o.k, o.v), (o.dq, o.dk, o.dv)),
}


def prepare(name: str, shape: Shape, mode: str, operands: Operands) -> Runner:
    """Compiles one of the rivals, or "jaxflow NAME" for the backend NAME."""
    if name == "keops":
        return _in_torch(rivals.keops_attention, shape, mode, operands)
    if name.startswith("torch"):
        threads = rivals.torch_threads(name)
        return _in_torch(rivals.torch_attention, shape, mode, operands, threads)
    if name in ("jnp", "jax.nn xla"):
        refuse_scores(shape.batch * shape.n**2)
    if name.endswith("cudnn") and (shape.dtype == "float32" or shape.d % 8):
        raise UnavailableError("16-bit and head dimensions a multiple of 8 only")
    library, _, backend = name.partition(" ")
    attend = partial(rivals.ours, backend=backend or None)
    attend = attend if library == "jaxflow" else ATTENTIONS[name]
    return compiled(partial(TRANSFORMS[mode], partial(attend, shape=shape)), operands)


def _in_torch(
    attention, shape: Shape, mode: str, operands: Operands, threads: int | None = None
) -> Runner:
    attend = attention(shape)
    torch, o = rivals.module("torch"), Operands(*rivals.to_torch(operands))

    def launch():
        if mode == "forward":
            with torch.inference_mode():
                return (attend(o.q, o.k, o.v),)
        leaves = [a.detach().requires_grad_() for a in (o.q, o.k, o.v)]
        return torch.autograd.grad(attend(*leaves), leaves, o.g)

    return rivals.torch_runner(launch, threads=threads)


# ------------------------------------------------------------------ the check


def checked_rows(shape: Shape, mode: str) -> np.ndarray:
    """All rows of a gradient, else some from the first to the last."""
    count = shape.n if mode == "gradient" else min(shape.n, CHECKED_ROWS)
    return np.linspace(0, shape.n - 1, count).round().astype(int)


def exact(shape: Shape, mode: str, operands: Operands) -> list[np.ndarray]:
    """The definition in float64, by blocks of rows; of the checked rows."""
    rows, by_rows, over_keys = checked_rows(shape, mode), [], []
    size = max(1, min(512, CHECK_BLOCK // (shape.batch * shape.n)))
    transform = TRANSFORMS[mode]
    with jax.enable_x64(True):
        o = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), operands)
        attend = partial(rivals.naive, shape=shape)
        step = jax.jit(lambda part, rows: transform(partial(attend, rows=rows), part))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            part = {name: getattr(o, name)[..., some, :] for name in ("q", "g", "dq")}
            outs = step(o._replace(**part), some)
            if mode == "gradient":
                outs, sums = outs[:1], outs[1:]
                over_keys = [a + b for a, b in zip(over_keys, sums, strict=False)] or sums
            by_rows.append([np.asarray(a) for a in outs])
    joined = [np.concatenate(parts, axis=-2) for parts in zip(*by_rows, strict=True)]
    return [*joined, *map(np.asarray, over_keys)]


def error(shape: Shape, mode: str, expected: Sequence[np.ndarray], found: Sequence[Any]) -> float:
    rows = checked_rows(shape, mode)
    found = [np.asarray(a, np.float32)[..., rows, :] for a in rivals.from_torch(found)]
    return relative_error(found, expected)


# ------------------------------------------------------------------ the suite


def run(options: Options, watch: Watch) -> dict:
    """Ceilings, and one row for each shape, mode and rival."""
    platform = jax.default_backend()
    named = shapes.chosen(platform, quick=options.quick, only=options.only)
    competitors = RIVALS | (CPU_RIVALS if platform == "cpu" else GPU_RIVALS)
    competitors = {f"jaxflow {name}": MODES for name in options.backends} | competitors
    return contest(named, competitors, options, watch)


def contest(
    named: Sequence[Shape],
    competitors: Mapping[str, Sequence[str]],
    options: Options,
    watch: Watch,
) -> dict:
    rivals.preload()
    before, rows, timed = ceilings(), [], {}
    cases = [(shape, mode) for shape in named for mode in shape.modes]
    for shape, mode in watch.each(cases, lambda case: f"{case[0].name} {case[1]}"):
        names = [n for n, modes in competitors.items() if mode in (*modes, "memory")]
        new = [{"shape": shape.name, "mode": mode, "rival": name} for name in names]
        if mode == "memory":
            new = [row | _peak(shape, "forward", row["rival"]) for row in new]
        else:
            measure(shape, mode, new, options)
            timed[shape, mode] = new
        rows += new
        watch.save({"rows": rows})
    rates = better(before, ceilings())
    for (shape, mode), some in timed.items():
        compare(shape, mode, some, rates, timed.get((shape, "forward"), []))
    return {"ceilings": rates, "rows": rows}


def measure(shape: Shape, mode: str, rows: list[dict], options: Options):
    load = {"load": os.getloadavg()[0], "n": shape.n, "d": shape.d, "pairs": shape.pairs}
    for row in rows:
        row |= load | {"dtype": shape.dtype}
    operands = draw(shape)
    expected = exact(shape, mode, operands)
    runners = compete(
        rows,
        lambda row: prepare(row["rival"], shape, mode, operands),
        partial(error, shape, mode, expected),
        TOLERANCE[shape.dtype],
        repeats=options.repeats,
    )
    for row in rows:
        if row["rival"] in runners and shape.n >= MEASURE_PEAK_FROM:
            row |= _peak(shape, mode, row["rival"], runners[row["rival"]])


def compare(shape: Shape, mode: str, rows: list[dict], rates: dict, forward: list[dict]):
    """Each time against the floor, and against the forward pass of the same rival."""
    name, floor = floor_s(shape, mode, rates)
    base = {row["rival"]: row["ms"] for row in forward if "ms" in row}
    for row in rows:
        if "ms" in row:
            row |= {"of_floor": 1e3 * floor / row["ms"], "floor": name}
            row["vs_forward"] = row["ms"] / base[row["rival"]] if row["rival"] in base else None


def floor_s(shape: Shape, mode: str, rates: dict[str, float]) -> tuple[str, float]:
    """What binds, and the seconds it takes."""
    products, others, exps = WORK[mode]
    on_tensor_cores = shape.dtype != "float32" and "tensor_flops" in rates
    arithmetic = "tensor_flops" if on_tensor_cores else "flops"
    work = {
        "exps": exps * shape.pairs,
        # A tensor core sums a column of ones with the values; the rest hides in other pipes.
        arithmetic: shape.pairs * 2 * (products * shape.d + others * (not on_tensor_cores)),
        "bytes": 4 * shape.batch * shape.n * shape.d * jnp.dtype(shape.dtype).itemsize,
    }
    times = {name: amount / rates[name] for name, amount in work.items()}
    name = max(times, key=times.__getitem__)
    return name, times[name]


def _peak(shape: Shape, mode: str, name: str, run: Runner | None = None) -> dict:
    return peak("kernels", {"shape": shape.name, "mode": mode, "name": name}, run)


def runner(shape: str, mode: str, name: str) -> Runner:
    named = {s.name: s for s in (*shapes.CPU, *shapes.CPU_QUICK, *shapes.GPU, *shapes.GPU_QUICK)}
    return prepare(name, named[shape], mode, draw(named[shape]))
