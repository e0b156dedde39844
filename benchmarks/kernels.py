"""The suite `kernels`: is the attention operation right, how fast is it, how near to the device?

    mean_i = sum_j exp(s_ij - log_partition_i) v_j,    s_ij = scale <q_i, k_j>

on the default device: forward, gradient (in q, k, v, reverse mode) and tangent (value and jvp),
against softmax attention in other libraries. Only an answer that agrees with float64 is timed.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import rivals, shapes
from .device import better, ceilings
from .pace import Watch
from .peak import peak
from .shapes import MODES, Shape
from .timing import (
    TOLERANCE,
    Options,
    Runner,
    compete,
    compiled,
    refuse_scores,
    relative_error,
)

BUDGET_S = {"quick": 75, "full": 150}
CHECKED_ROWS = 1024  # of a forward or a tangent; a gradient is checked whole
CHECK_BLOCK = 2**26  # scores at a time in the check
MEASURE_PEAK_FROM = 16384  # tokens

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

TRANSFORMS = {
    "forward": lambda attend, o: (attend(o.q, o.k, o.v),),
    "gradient": lambda attend, o: jax.vjp(attend, o.q, o.k, o.v)[1](o.g),
    "tangent": lambda attend, o: jax.jvp(attend, (o.q, o.k, o.v), (o.dq, o.dk, o.dv)),
}
Prepare = Callable[[Shape, str, Operands], Runner]


def in_jax(attention: Callable, *, scores: bool = False) -> Prepare:
    """Compiles `attention(q, k, v, shape=shape)`, which may store all scores."""

    def prepare(shape: Shape, mode: str, operands: Operands) -> Runner:
        if scores:
            refuse_scores(shape.batch * shape.n**2)
        return compiled(partial(TRANSFORMS[mode], partial(attention, shape=shape)), operands)

    return prepare


def in_torch(attention: Callable[[Shape], Callable], threads: int | None = None) -> Prepare:
    """Readies `attention(shape)`, a function (q, k, v) of tensors."""

    def prepare(shape: Shape, mode: str, operands: Operands) -> Runner:
        attend = attention(shape)
        torch, o = rivals.module("torch"), Operands(*rivals.to_torch(operands))

        def launch():
            if mode == "forward":
                with torch.inference_mode():
                    return (attend(o.q, o.k, o.v),)
            leaves = [a.detach().requires_grad_() for a in (o.q, o.k, o.v)]
            return torch.autograd.grad(attend(*leaves), leaves, o.g)

        return rivals.torch_runner(launch, threads=threads)

    return prepare


class Rival(NamedTuple):
    """`prepare(shape, mode, operands)` readies it, or raises UnavailableError with the reason."""

    prepare: Prepare
    modes: tuple[str, ...] = MODES
    platforms: tuple[str, ...] = ("cpu", "gpu")


FUSED, GPU = ("forward", "gradient"), ("gpu",)
CUDNN, XLA = (partial(rivals.jax_nn, implementation=name) for name in ("cudnn", "xla"))
RIVALS = {
    "jnp": Rival(in_jax(rivals.naive, scores=True)),
    "torch": Rival(in_torch(rivals.torch_attention), FUSED),
    "torch 1 thread": Rival(in_torch(rivals.torch_attention, 1), FUSED, ("cpu",)),
    "keops": Rival(in_torch(rivals.keops_attention), ("forward",)),
    "jax.nn cudnn": Rival(in_jax(CUDNN), FUSED, GPU),
    "jax.nn xla": Rival(in_jax(XLA, scores=True), MODES, GPU),
    "pallas triton": Rival(in_jax(rivals.pallas_triton), FUSED, GPU),
    "pallas mosaic": Rival(in_jax(rivals.pallas_mosaic), FUSED, GPU),
    "tokamax": Rival(in_jax(rivals.tokamax), FUSED, GPU),
}


def rival(name: str) -> Rival:
    """One of the rivals; "jaxflow", or "jaxflow NAME" for the backend NAME."""
    library, _, backend = name.partition(" ")
    if library == "jaxflow":
        return Rival(in_jax(partial(rivals.ours, backend=backend or None)))
    return RIVALS[name]


def competitors(platform: str, backends: Sequence[str]) -> list[str]:
    """The names of jaxflow and of the rivals on a platform."""
    here = [name for name, rival in RIVALS.items() if platform in rival.platforms]
    return [*(f"jaxflow {name}" for name in backends), "jaxflow", *rivals.distinct(here)]


def prepare(name: str, shape: Shape, mode: str, operands: Operands) -> Runner:
    return rival(name).prepare(shape, mode, operands)


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
    return contest(named, competitors(platform, options.backends), options, watch)


def contest(
    named: Sequence[Shape], competitors: Sequence[str], options: Options, watch: Watch
) -> dict:
    rivals.preload()
    found, timed = [], {}
    for _ in watch.each(["ceilings"]):
        found.append(ceilings())
    cases = [(shape, mode) for shape in named for mode in shape.modes]
    for shape, mode in watch.each(cases, lambda case: f"{case[0].name} {case[1]}"):
        names = [name for name in competitors if mode in (*rival(name).modes, "memory")]
        new = [{"shape": shape.name, "mode": mode, "rival": name} for name in names]
        if mode == "memory":
            new = [row | _peak(shape, "forward", row["rival"]) for row in new]
        else:
            measure(shape, mode, new, options)
            timed[shape, mode] = new
        watch.rows += new
    for _ in watch.each(["ceilings again"] if timed else []):
        found.append(ceilings())
    rates = functools.reduce(better, found) if found else {}
    for (shape, mode), some in timed.items():
        compare(shape, mode, some, rates, timed.get((shape, "forward"), []))
    return {"ceilings": rates, "rows": watch.rows}


def measure(shape: Shape, mode: str, rows: list[dict], options: Options):
    about = {"n": shape.n, "d": shape.d, "pairs": shape.pairs, "dtype": shape.dtype}
    for row in rows:
        row |= about
    operands = draw(shape)
    expected = exact(shape, mode, operands)
    runners = compete(
        rows,
        lambda row: prepare(row["rival"], shape, mode, operands),
        partial(error, shape, mode, expected),
        TOLERANCE[shape.dtype],
        samples=options.samples,
    )
    for row in rows:
        if row["rival"] in runners and shape.n >= MEASURE_PEAK_FROM:
            row |= _peak(shape, mode, row["rival"], runners[row["rival"]])


def compare(shape: Shape, mode: str, rows: list[dict], rates: dict, forward: list[dict]):
    """Each time against the floor, if it is known, and against the forward pass of the rival."""
    name, floor = floor_s(shape, mode, rates) if rates else (None, None)
    base = {row["rival"]: row["ms"] for row in forward if "ms" in row}
    for row in rows:
        if "ms" in row:
            row |= {"of_floor": 1e3 * floor / row["ms"], "floor": name} if floor else {}
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
