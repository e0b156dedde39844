"""The TPU kernels: numbers by interpretation, compilation as far as Mosaic's input.

Truth is the reference and JAX's own derivatives of it, in float64 on the same rounded operands.
"""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflow.kernels import pallas_tpu
from jaxflow.kernels.base import (
    MODES,
    Band,
    Cotangent,
    Forward,
    Problem,
    Shapes,
    Tangent,
    evaluate,
)
from jaxflow.kernels.pallas_tpu import PallasTPU
from jaxflow.kernels.reference import definition

INTERPRETED = PallasTPU(interpret=True)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    m: int = 150
    n: int = 300
    p: int = 3
    r: int = 2
    band: Band = (None, None)
    batch: tuple[int, ...] = ()
    masked: tuple[int, ...] = ()
    weighted: bool = True

    def __str__(self):
        return self.name


CASES = [
    # Keys in whole blocks without weights: nothing is added to the scores.
    Case("plain", n=256, weighted=False),
    Case("one", m=1, n=1, p=1, r=1),
    Case("padded", weighted=False),
    # More channels than the vector unit takes, and than fit six times into a pass.
    Case("wide", p=24, r=7, masked=(0, 7, 299)),
    Case("lookahead", m=300, band=(3, None)),
    Case("window", m=270, n=520, band=(30, 40), masked=(5, 6)),
    # The rows from 134 on see no key at all.
    Case("empty-rows", m=400, n=130, band=(4, 2)),
    Case("nothing", masked=tuple(range(300))),
    Case("batched", m=140, n=140, p=9, r=5, band=(None, 0), batch=(2, 2), masked=(3,)),
]
# Rounding does not depend on the masks: without weights, with them and in a batch.
IN_BFLOAT16 = ("plain", "wide", "batched")
LONG = ("padded", "wide", "lookahead", "empty-rows", "batched", "nothing")
LONG_IN_BFLOAT16 = ("batched",)


def drawn(case, dtype):
    """Operands, directions of the tangent and cotangents, as the kernels take them."""
    keys = iter(jax.random.split(jax.random.key(5), 11))

    def normal(*shape, dtype=dtype):
        draw = jax.random.normal(next(keys), (*case.batch, *shape), jnp.float32)
        return draw.astype(dtype)

    m, n, p, r = case.m, case.n, case.p, case.r
    vector = partial(normal, dtype=jnp.float32)
    q, k, v = normal(m, p), normal(n, p), normal(n, r)
    b = vector(n) if case.weighted else jnp.zeros((*case.batch, n), jnp.float32)
    b = b.at[..., jnp.array(case.masked, int)].set(-jnp.inf)
    scale = vector() + jnp.float32(0.5)
    directions = vector(m, p), normal(n, p), normal(n, r), vector(n)
    return Forward(q, k, v, b, scale), directions, (normal(m, r), vector(m))


def truth(case, operands, directions, cotangents):
    wide = partial(jax.tree.map, lambda a: a.astype(jnp.float64))

    def one(q, k, v, b, scale, directions, cotangents):
        fn = lambda u, k, v, b: definition(u, k, v, b, jnp.ones(()), band=case.band)
        at = scale * q, k, v, b
        outputs, pullback = jax.vjp(fn, *at)
        return outputs, jax.jvp(fn, at, directions)[1], pullback(cotangents)

    for _ in case.batch:
        one = jax.vmap(one)
    return jax.jit(one)(*wide(operands), wide(directions), wide(cotangents))


def kernels(case, operands: Forward, directions, cotangents, residuals):
    problem = Problem(case.band, case.weighted)
    (mean, lse), (g, h), (du, dk, dv, db) = residuals, cotangents, directions
    tangent = Tangent(*operands, mean, lse, du, dk, dv, db)
    cotangent = Cotangent(*operands, mean, lse, g, h)
    return tuple(evaluate(INTERPRETED, o, problem) for o in (operands, tangent, cotangent))


def assert_close(actual, expected, tolerance, terms=0.0):
    """Relative to the largest entry, or to the larger `terms` whose difference it is."""
    a, e = np.asarray(actual, np.float64), np.asarray(expected)
    finite = np.isfinite(e)
    np.testing.assert_array_equal(a[~finite], e[~finite])
    scale = 1 + np.abs(e[finite]).max(initial=terms)
    assert np.abs(a[finite] - e[finite]).max(initial=0) <= tolerance * scale


# Scores of size 20 are rounded at 20 * 2^-24 = 1.2e-6, and so are the weights: a few of these.
# Bfloat16 rounds weights, tangents and results at 2^-9 each; the log-partition only sums.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case, dtype, tolerance",
    [
        *(
            pytest.param(c, "float32", 4e-6, marks=[pytest.mark.slow] * (c.name in LONG))
            for c in CASES
        ),
        *(
            pytest.param(
                c, "bfloat16", 4 * 2**-9, marks=[pytest.mark.slow] * (c.name in LONG_IN_BFLOAT16)
            )
            for c in CASES
            if c.name in IN_BFLOAT16
        ),
    ],
    ids=str,
)
def test_against_the_reference(case, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "ROWS", 128)
    monkeypatch.setattr(pallas_tpu, "KEYS", 128)
    operands, directions, cotangents = drawn(case, jnp.dtype(dtype))
    expected = truth(case, operands, directions, cotangents)
    mean, lse = expected[0]
    residuals = mean.astype(dtype), lse.astype(jnp.float32)
    run = jax.jit(partial(kernels, case))
    actual = run(operands, directions, cotangents, residuals)
    # dmean = sum_j p_j (dv_j + ds_j v_j) - dlse mean, and the mean is given in low precision.
    terms = [0.0] * 8
    terms[2] = np.abs(expected[1][1][..., None] * mean).max()
    leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, e, t in zip(*leaves, terms, strict=True):
        assert_close(a, e, tolerance, t)
    assert_close(actual[0][1], lse, 4e-6)
    narrow, sums = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    dtypes = ((narrow, sums), (narrow, sums), (sums, narrow, narrow, sums))
    assert jax.tree.map(lambda a: a.dtype, actual) == dtypes


@pytest.mark.parametrize("mode", MODES)
def test_a_query_that_is_not_finite_spoils_its_own_row(mode):
    case = Case("nan", m=20, n=20)
    operands, directions, cotangents = drawn(case, jnp.dtype("float32"))
    run = jax.jit(partial(evaluate, INTERPRETED, problem=Problem()))
    mean, lse = run(operands)
    (g, h), (du, dk, dv, db) = cotangents, directions
    spoiled = operands._replace(q=operands.q.at[3, 0].set(jnp.nan))
    spoiled = {
        "forward": spoiled,
        "tangent": Tangent(*spoiled, mean, lse, du, dk, dv, db),
        "cotangent": Cotangent(*spoiled, mean, lse, g, h),
    }[mode]
    rows = np.asarray(run(spoiled)[0])
    assert np.isnan(rows[3]).all()
    assert np.isfinite(np.delete(rows, 3, axis=0)).all()


def abstract(mode, m, n, p, r, dtype, batch=()):
    def of(*shape, dtype=dtype) -> Any:
        return jax.ShapeDtypeStruct((*batch, *shape), jnp.dtype(dtype))

    vector = partial(of, dtype=jnp.float32)
    operands = of(m, p), of(n, p), of(n, r), vector(n), vector()
    residuals = of(m, r), vector(m)
    return {
        "forward": Forward(*operands),
        "tangent": Tangent(*operands, *residuals, vector(m, p), of(n, p), of(n, r), vector(n)),
        "cotangent": Cotangent(*operands, *residuals, of(m, r), vector(m)),
    }[mode]


SHAPES = {
    "language": ((4096, 4096, 64, 64, "bfloat16", (2,)), Problem((None, 0), weighted=False)),
    "particles": ((16384, 16384, 3, 3, "float32"), Problem()),
    "heads": ((1000, 700, 64, 128, "float32", (2, 3)), Problem((100, 20))),
    "one": ((1, 1, 1, 1, "bfloat16"), Problem((0, 0))),
}


@pytest.mark.parametrize(
    "shape, x64", [*((shape, False) for shape in SHAPES), ("particles", True)], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_lowers_for_tpu(mode, shape, x64):
    sizes, problem = SHAPES[shape]
    operands = abstract(mode, *sizes)
    assert PallasTPU().refusal(mode, Shapes(*operands[:3]), problem) is None
    with jax.enable_x64(x64):
        fn = jax.jit(partial(evaluate, PallasTPU(), problem=problem))
        text = fn.trace(operands).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == (2 if mode == "cotangent" else 1)


def test_a_window_visits_no_more_blocks_than_it_sees():
    """A fixed window costs O(n): the grid has as many key steps as a row block can see."""
    operands = abstract("forward", 2**15, 2**15, 64, 64, "bfloat16")
    forward = lambda band: partial(PallasTPU().forward, problem=Problem(band))
    run = lambda band: jax.make_jaxpr(forward(band))(operands)
    grid = lambda jaxpr: next(
        e.params["grid_mapping"].grid for e in jaxpr.eqns if e.primitive.name == "pallas_call"
    )
    blocks = 2**15 // pallas_tpu.KEYS
    assert grid(run((None, 0))) == (1, 2**15 // pallas_tpu.ROWS, blocks)
    # 512 rows and 256 keys on either side lie in at most 3 blocks of 1024, whatever their place.
    assert grid(run((256, 256)))[2] <= 3


@pytest.mark.parametrize(
    "dtype, width, message",
    [
        ("float64", 3, "no float64.*float32 or bfloat16"),
        ("float16", 64, "no float16"),
        ("float32", 2000, "at most 1024 channels.*got 2000"),
        ("float32", 1024, None),
        ("bfloat16", 64, None),
    ],
)
def test_refusal(dtype, width, message):
    x = jax.ShapeDtypeStruct((2, 100, width), jnp.dtype(dtype))
    reason = PallasTPU().refusal("tangent", Shapes(x, x, x), Problem((None, 0)))
    if message is None:
        assert reason is None
    else:
        assert reason is not None and re.search(message, reason)
