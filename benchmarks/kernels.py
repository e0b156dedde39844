"""The suite `kernels`: is the attention operation right, how fast is it, how near to the device?

    mean_i = sum_j exp(s_ij - log_partition_i) v_j,    s_ij = scale <q_i, k_j>

in float32 on the default device: forward, gradient (in q, k, v, reverse mode) and tangent (value
and jvp), against softmax attention in torch, KeOps and plain jnp. Only an answer that agrees with
float64 is timed. `python -m benchmarks.kernels CASE` measures the peak memory of one rival.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxflow import softmax_expectation

from .shapes import MODES, Shape
from .timing import Runner, ceilings, in_child, in_turn, peak_mib, provenance, summary

RIVALS = {"jaxflow": MODES, "jnp": MODES, "torch": ("forward", "gradient"), "keops": ("forward",)}
TOLERANCE = 1e-3  # relative; a larger error in float32 is a wrong answer
CHECKED_ROWS = 1024  # of a forward or a tangent; a gradient is checked whole
SLOW_S = 3.0  # a call that takes longer is made once
MEASURE_PEAK_FROM = 16384  # tokens
KEOPS_LIMIT = 1.5e9  # pairs * channels on a CPU, where it then takes many seconds
NAIVE_LIMIT = 4 * 2**30  # bytes of one array of scores

# Flops a pair and channel (a multiply and an add are two), exponentials a pair: the least for a
# method that stores no array of scores. README.md counts them.
WORK = {"forward": (4, 1), "gradient": (14, 2), "tangent": (12, 1)}


class UnavailableError(Exception):
    """A rival cannot run a case; the message says why."""


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
    return Operands(q, k, v, *rest)


def prepare(name: str, shape: Shape, mode: str, operands: Operands) -> Runner:
    """Compiles one of RIVALS, or "jaxflow NAME" for the backend NAME."""
    library, _, backend = name.partition(" ")
    if library == "jaxflow":
        return _prepare_jax(partial(ours, backend=backend or None), shape, mode, operands)
    if library == "jnp":
        if (size := 4 * shape.batch * shape.n**2) > NAIVE_LIMIT:
            raise UnavailableError(f"scores of {size / 2**30:.0f} GiB")
        return _prepare_jax(naive, shape, mode, operands)
    return (_prepare_torch if library == "torch" else _prepare_keops)(shape, mode, operands)


# ------------------------------------------------------------------ JAX

TRANSFORMS = {
    "forward": lambda attend, o: (attend(o.q, o.k, o.v),),
    "gradient": lambda attend, o: jax.vjp(attend, o.q, o.k, o.v)[1](o.g),
    "tangent": lambda attend, o: jax.jvp(attend, (o.q, o.k, o.v), (o.dq, o.dk, o.dv)),
}


def naive(q, k, v, *, shape: Shape, first_row=0):
    """The definition, with its n^2 scores; the rows of q start at `first_row`."""
    s = shape.scale * jnp.matmul(q, k.T, precision="highest")
    if shape.causal:
        rows = first_row + jnp.arange(q.shape[0])
        s = jnp.where(jnp.arange(k.shape[0])[None, :] <= rows[:, None], s, -jnp.inf)
    return jnp.matmul(jax.nn.softmax(s, axis=1), v, precision="highest")


def ours(q, k, v, *, shape: Shape, backend: str | None):
    options = {"scale": shape.scale, "causal": shape.causal, "backend": backend}
    return softmax_expectation(q, k, v, **options)[0]


def _transform(attend, shape: Shape, mode: str, operands: Operands, **options):
    attend = partial(attend, shape=shape, **options)
    return TRANSFORMS[mode](attend if shape.batch == 1 else jax.vmap(attend), operands)


def _prepare_jax(attend, shape: Shape, mode: str, operands: Operands) -> Runner:
    operands = jax.device_put(operands)
    try:
        fn = jax.jit(partial(_transform, attend, shape, mode)).lower(operands).compile()
    except NotImplementedError as e:  # a backend asked for by name that cannot
        raise UnavailableError(str(e)) from e
    return lambda: jax.block_until_ready(fn(operands))


# ------------------------------------------------------------------ other libraries


def _optional(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UnavailableError("not installed") from None


def _prepare_torch(shape: Shape, mode: str, operands: Operands) -> Runner:
    torch = _optional("torch")
    axes = (1, shape.batch, shape.n, shape.d)  # the fused code wants (batch, heads, n, d)
    options = {"scale": shape.scale, "is_causal": shape.causal}
    attend = partial(torch.nn.functional.scaled_dot_product_attention, **options)
    return _in_torch(attend, mode, (a.reshape(axes) for a in operands))


def _prepare_keops(shape: Shape, mode: str, operands: Operands) -> Runner:
    lazy = _optional("pykeops.torch").LazyTensor
    if shape.causal:
        raise UnavailableError("no causal mask")
    if jax.default_backend() == "cpu" and shape.pairs * shape.d > KEOPS_LIMIT:
        raise UnavailableError("too slow")

    def attend(q, k, v):
        s = shape.scale * (lazy(q[..., :, None, :]) | lazy(k[..., None, :, :]))
        return s.sumsoftmaxweight(lazy(v[..., None, :, :]), axis=q.ndim - 1)

    _in_torch(attend, mode, (a[..., :8, :] for a in operands))()  # compiles for this dimension
    return _in_torch(attend, mode, operands)


def _in_torch(attend, mode: str, operands: Iterable[np.ndarray]) -> Runner:
    torch = _optional("torch")
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise UnavailableError("this torch has no CUDA")
    o = Operands(*(torch.from_numpy(a).to("cuda" if on_gpu else "cpu") for a in operands))
    wait = torch.cuda.synchronize if on_gpu else lambda: None

    def run():
        if mode == "forward":
            with torch.inference_mode():
                outs = (attend(o.q, o.k, o.v),)
        else:
            leaves = [a.detach().requires_grad_() for a in (o.q, o.k, o.v)]
            outs = torch.autograd.grad(attend(*leaves), leaves, o.g)
        wait()
        return outs

    return run


# ------------------------------------------------------------------ the check


def exact(shape: Shape, mode: str, operands: Operands) -> list[np.ndarray]:
    """The definition in float64, by blocks of rows; the first rows only, but for a gradient."""
    rows = shape.n if mode == "gradient" else min(shape.n, CHECKED_ROWS)
    parts = []
    with jax.enable_x64(True):
        o = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), operands)
        step = jax.jit(lambda part, row: _transform(naive, shape, mode, part, first_row=row))
        for start in range(0, rows, 512):
            cut = slice(start, min(start + 512, rows))
            part = {name: getattr(o, name)[..., cut, :] for name in ("q", "g", "dq")}
            parts.append([np.asarray(a) for a in step(o._replace(**part), start)])
    by_rows = partial(np.concatenate, axis=-2)
    over_keys = partial(np.sum, axis=0) if mode == "gradient" else by_rows
    first, *others = zip(*parts, strict=True)
    return [by_rows(first), *(over_keys(a) for a in others)]


def relative_error(found: Iterable[Any], expected: Iterable[np.ndarray]) -> float:
    """The largest difference over the largest entry, worst over the outputs."""
    errors = []
    for f, e in zip(found, expected, strict=True):
        f = np.asarray(f.cpu() if hasattr(f, "cpu") else f, np.float64)
        f = f.reshape(*e.shape[:-2], -1, e.shape[-1])[..., : e.shape[-2], :]
        errors.append(np.abs(f - e).max() / np.abs(e).max())
    return float(max(errors))


# ------------------------------------------------------------------ the suite


def run(
    shapes: Sequence[Shape],
    names: Sequence[str] = tuple(RIVALS),
    *,
    repeats: tuple[int, int] = (3, 25),
    log=lambda text: None,
) -> dict:
    """The report: provenance, ceilings, and one row for each shape, mode and rival."""
    for module in ("torch", "pykeops.torch"):  # so that no import counts as compile time
        with contextlib.suppress(UnavailableError):
            _optional(module)
    before, rows = ceilings(), []
    for shape in shapes:
        for mode in shape.modes:
            log(f"{shape.name} {mode}")
            load = os.getloadavg()[0]
            cases = [
                {"shape": shape.name, "mode": mode, "rival": name, "load": load}
                for name in names
                if mode == "memory" or mode in RIVALS[name.split()[0]]
            ]
            if mode == "memory":
                rows += [case | _peak(shape, "forward", case["rival"]) for case in cases]
            else:
                rows += _compete(shape, mode, cases, repeats)
    rates = {name: max(rate, before[name]) for name, rate in ceilings().items()}
    floors = {(s.name, mode): floor_s(s, mode, rates) for s in shapes for mode in WORK}
    for row in rows:
        if "ms" in row:
            row["of_floor"] = 1e3 * floors[row["shape"], row["mode"]] / row["ms"]
    return {"suite": "kernels", **provenance(), "ceilings": rates, "rows": rows}


def floor_s(shape: Shape, mode: str, rates: dict[str, float]) -> float:
    flops, exps = WORK[mode]
    return shape.pairs * max(flops * shape.d / rates["flops"], exps / rates["exps"])


def _compete(shape: Shape, mode: str, rows: list[dict], repeats: tuple[int, int]) -> list[dict]:
    operands = draw(shape)
    expected = exact(shape, mode, operands)
    runners: dict[str, Runner] = {}
    slow: dict[str, list[float]] = {}
    for row in rows:
        start = time.perf_counter()
        try:
            runner: Any = prepare(row["rival"], shape, mode, operands)
        except UnavailableError as e:
            row["note"] = str(e)
            continue
        row["compile_s"] = time.perf_counter() - start
        start = time.perf_counter()
        found = runner()
        took = time.perf_counter() - start
        row["error"] = relative_error(found, expected)
        if row["error"] > TOLERANCE:
            row["note"] = "wrong, not timed"
        elif took > SLOW_S:
            slow[row["rival"]] = [took]
        else:
            runners[row["rival"]] = runner
    times = slow | in_turn(runners, repeats=repeats)
    times = {name: summary(ts) for name, ts in times.items()}
    for row in rows:
        if (name := row["rival"]) in times:
            row |= times[name]
            others = [t["ms"] for other, t in times.items() if other.split()[0] != name.split()[0]]
            row["vs_best"] = row["ms"] / min(others) if others else None
            row["vs_jnp"] = row["ms"] / times["jnp"]["ms"] if "jnp" in times else None
            if shape.n >= MEASURE_PEAK_FROM and name not in slow:
                row |= _peak(shape, mode, name)
    return rows


def _peak(shape: Shape, mode: str, name: str) -> dict:
    case = [dataclasses.asdict(shape), mode, name]
    return in_child("benchmarks.kernels", case, timeout_s=45)


def _child(shape: dict, mode: str, name: str) -> dict:
    case = Shape(**shape)
    try:
        return {"peak_mib": peak_mib(prepare(name, case, mode, draw(case)))}
    except UnavailableError as e:
        return {"note": str(e)}


if __name__ == "__main__":
    print(json.dumps(_child(*json.loads(sys.argv[1]))))
