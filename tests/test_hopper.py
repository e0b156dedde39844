"""The Hopper kernels: numbers by Mosaic GPU's interpreter, lowering for CUDA, a real device."""

import dataclasses
import os
import pathlib
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxflow.kernels.base import (
    MODES,
    Cotangent,
    Forward,
    Problem,
    Shapes,
    Tangent,
    evaluate,
    on_one_batch_axis,
)
from jaxflow.kernels.blocked import Blocked
from jaxflow.kernels.pallas_gpu import hopper
from jaxflow.kernels.pallas_gpu.hopper import Config, Hopper

PUBLIC = getattr(plgpu, "InterpretGPUParams", None)
# Each warpgroup of the interpreter holds a thread of XLA's pool while it waits at a barrier; with
# few threads nobody is left to compute. NPROC sets their number before JAX starts.
THREADS = int(os.environ.get("NPROC", os.cpu_count() or 1))
enough_threads = pytest.mark.skipif(THREADS < 8, reason="the interpreter needs NPROC=8")


def interpreter():
    if PUBLIC:
        return PUBLIC(detect_races=True)
    # jax 0.10 has the interpreter, but no public name for it; its race detector does not end.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    m: int
    n: int
    p: int = 16
    r: int = 16
    band: tuple = (None, None)
    weighted: bool = False
    masked: tuple = ()
    batch: tuple = ()
    sign: float = 1.0
    config: Config = Config(64, groups=1)

    def __str__(self):
        return self.name

    def operands(self, mode, dtype=jnp.bfloat16):
        m, n, p, r, f = self.m, self.n, self.p, self.r, jnp.float32
        keys = iter(jax.random.split(jax.random.key(5), 11))
        normal = lambda *shape: jax.random.normal(next(keys), (*self.batch, *shape))
        low = lambda *shape: normal(*shape).astype(dtype)
        b = jnp.where(self.weighted, normal(n), 0).astype(f)
        b = b.at[..., jnp.array(self.masked, int)].set(-jnp.inf)
        scale = jnp.full(self.batch, self.sign * 0.2, f)
        primal = Forward(low(m, p), low(n, p), low(n, r), b, scale)
        if mode == "forward":
            return primal
        mean, lse = Blocked().forward(primal, self.problem)
        if mode == "cotangent":
            return Cotangent(*primal, mean, lse, low(m, r), normal(m))
        db = jnp.where(self.weighted, normal(n), 0).astype(f)
        return Tangent(*primal, mean, lse, normal(m, p), low(n, p), low(n, r), db)

    @property
    def problem(self):
        return Problem(self.band, self.weighted)


CASES = [
    Case("plain", 64, 150, r=32),
    Case("negative-scale", 64, 64, sign=-1.0),
    Case("causal", 150, 100, band=(None, 0), weighted=True, masked=(0, 1, 99)),
    Case("window", 100, 150, band=(20, 10), batch=(2,)),
    # The rows past 66 see no key.
    Case("empty-rows", 130, 64, band=(2, 2), config=Config(64)),
]


def kernels(operands, problem, **settings):
    run = partial(evaluate, Hopper(**settings))
    return on_one_batch_axis(run, operands, problem)


def check(case, mode, dtype, **settings):
    operands = case.operands(mode, dtype)
    actual = jax.jit(partial(kernels, problem=case.problem, **settings))(operands)
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), operands)
    if mode != "forward":
        mean, lse = Blocked().forward(Forward(*exact[:5]), case.problem)
        exact = exact._replace(mean=mean, lse=lse)
    expected = evaluate(Blocked(), exact, case.problem)
    if mode == "cotangent" and not case.weighted:
        actual, expected = actual[:3], expected[:3]
    # Products of factors rounded to 8 bits, relative to the largest entry: a few 2^-8.
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        finite = np.isfinite(e)
        np.testing.assert_array_equal(a[~finite], e[~finite])
        assert np.abs(a[finite] - e[finite]).max() <= 2e-2 * np.abs(e[finite]).max()


@enough_threads
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreter(case, mode):
    config = (case.config, case.config) if mode == "cotangent" else case.config
    check(case, mode, jnp.bfloat16, interpret=interpreter(), config=config)


@enough_threads
def test_interpreter_of_one_case():
    check(CASES[0], "forward", jnp.bfloat16, interpret=interpreter(), config=CASES[0].config)


@pytest.mark.slow
@pytest.mark.skipif(THREADS >= 8, reason="the tests above run here")
def test_interpreter_in_a_process_with_threads():
    """Each mode on one tile, and a causal band over several."""
    chosen = "test_interpreter and (negative-scale or causal-forward)"
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", chosen],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | {"NPROC": "8"},
        capture_output=True,
        text=True,
    )
    assert "4 passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_device(case, width, mode, dtype):
    case = dataclasses.replace(case, m=3 * case.m, n=3 * case.n, p=width, r=width)
    check(case, mode, jnp.dtype(dtype))


def abstract(mode, width, dtype, n=4096, batch=8):
    matrix: Any = jax.ShapeDtypeStruct((batch, n, width), dtype)
    vector: Any = jax.ShapeDtypeStruct((batch, n), jnp.float32)
    scale: Any = jax.ShapeDtypeStruct((batch,), jnp.float32)
    primal = Forward(matrix, matrix, matrix, vector, scale)
    if mode == "forward":
        return primal
    if mode == "cotangent":
        return Cotangent(*primal, matrix, vector, matrix, vector)
    du = matrix.update(dtype=jnp.float32)
    return Tangent(*primal, matrix, vector, du, matrix, matrix, vector)


# Every width and dtype with one mode at least, every mode with one of each.
@pytest.mark.parametrize(
    "mode, width, dtype",
    [("forward", 64, "bfloat16"), ("tangent", 128, "float16"), ("cotangent", 128, "bfloat16")],
)
def test_lowers_for_cuda(mode, width, dtype):
    run = jax.jit(partial(evaluate, Hopper(), problem=Problem((None, 0))))
    traced = run.trace(abstract(mode, width, jnp.dtype(dtype)))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_refusal():
    good, bad, odd = (
        jax.ShapeDtypeStruct((64, width), dtype)
        for width, dtype in ((128, jnp.bfloat16), (128, jnp.float32), (24, jnp.bfloat16))
    )
    refusal = lambda *shapes: hopper.refusal(Shapes(*shapes), Problem()) or ""
    assert refusal(good, good, good) == ""
    assert "float32" in refusal(bad, bad, bad)
    assert "24" in refusal(odd, odd, good)


@pytest.mark.parametrize("version, refused", [(12060, 0), (12080, 1), (12090, 1), (12091, 0)])
def test_masks_need_a_compiler_that_is_right(version, refused, monkeypatch):
    monkeypatch.setattr(hopper, "_cuda_version", lambda: version)
    shapes = Shapes(*[jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)] * 3)
    assert hopper.refusal(shapes, Problem()) is None
    assert ("12.9.1" in (hopper.refusal(shapes, Problem((None, 0))) or "")) == refused


@pytest.mark.parametrize("mode", MODES)
def test_candidates_begin_with_the_default(mode):
    q = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)
    options = Hopper().candidates(mode, Shapes(q, q, q))
    kernels = {"cotangent": ("gu", "gk")}.get(mode, (mode,))
    first = tuple(hopper.default(kernel, q, q) for kernel in kernels)
    assert options[0] == (first if mode == "cotangent" else first[0])
    assert len(set(options)) == len(options) > 1
