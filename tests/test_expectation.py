"""Conformance of every backend with the definition (kernels/reference.py).

A backend joins by a line in BACKENDS. Truth is the definition under JAX's own derivatives, in
float64, found once for all backends; tolerances are relative to its largest entry.
"""

import dataclasses
import functools
import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflow.kernels import (
    BACKENDS as BACKEND_NAMES,
)
from jaxflow.kernels import (
    blocked,
    describe_backend,
    explain_backend,
    pruned,
    registry,
    select_backend,
    softmax_expectation,
)
from jaxflow.kernels.base import Cotangent, Forward, Problem, Tangent, band, evaluate, known_shift
from jaxflow.kernels.blocked import Blocked
from jaxflow.kernels.reference import definition


@dataclasses.dataclass(frozen=True)
class Backend:
    name: str
    tiles: tuple[int, ...] | None = None  # rows and keys of a tile; small ones reach every loop
    patch: tuple = ()  # module, and its constants

    def __str__(self):
        return self.name if self.tiles is None else f"{self.name}-{self.tiles}"


# So small, and pruned whatever the law, that small operands reach every loop; as exact as can be.
BALLS = {"BALL": 4, "ROWS": 4, "CELL": 8, "CELLS": 8, "LEAST_CELL": 4, "LOOK": 4}
ALWAYS = {"FEW": 0, "MOST": 1e9, "DEFAULT": pruned.LEAST}
SMALL = tuple((pruned, *item) for item in (BALLS | ALWAYS).items())
# Pallas's interpreter is slow. What of the TPU's kernels does not depend on the rules of the
# operation is compared with the definition in test_pallas_tpu.py.
BACKENDS = [
    Backend("blocked"),
    Backend("blocked", (8, 5), ((blocked, "ROWS", 8), (blocked, "KEYS", 5))),
    pytest.param(Backend("pruned", (4, 4), SMALL), marks=pytest.mark.slow),
    Backend("pallas_gpu:interpret"),
    Backend("pallas_tpu:interpret"),
]
# TPUs have no float64: operands are rounded to float32 and tolerances count its roundings.
IN_FLOAT32 = ("pallas_tpu:interpret",)


def hardest(backend):
    """The hardest case that the backend takes: balls of keys have no order."""
    return HARD_WITHOUT_BAND if backend == "pruned" else HARD


def roundings(tolerance, backend):
    """The tolerance in roundings of the dtype that the backend computes in."""
    wide, narrow = np.finfo(np.float64).eps, np.finfo(np.float32).eps
    return tolerance * float(narrow / wide if backend in IN_FLOAT32 else 1)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    m: int = 17
    n: int = 23
    p: int = 3
    r: int = 2
    masked: tuple[int, ...] = ()
    options: tuple = ()

    def __str__(self):
        return self.name

    def operands(self, dtype=jnp.float64):
        rng = np.random.default_rng(3)
        *draws, _ = (rng.standard_normal(shape) for shape in self.shapes())
        draws[3][list(self.masked)] = -np.inf
        return *(jnp.asarray(a, dtype) for a in draws), jnp.asarray(0.7, dtype)

    def shapes(self):
        return (self.m, self.p), (self.n, self.p), (self.n, self.r), (self.n,), ()


CASES = [
    Case("plain"),
    Case("one", m=1, n=1, p=1, r=1),
    Case("tall", m=64, n=5, p=4, r=1),
    Case("causal", m=31, n=20, options=(("causal", True),)),
    Case("causal-window", m=29, n=29, options=(("causal", True), ("window", 2))),
    Case("nothing", masked=tuple(range(23))),
    # All at once: masked keys, a lopsided window, rows from 21 on without a key.
    Case("hard", m=29, n=17, masked=(0, 7), options=(("window", (4, 2)),)),
]
HARD, PLAIN = CASES[-1], CASES[0]
HARD_WITHOUT_BAND = dataclasses.replace(HARD, name="masked keys", options=())
LONG = Case("long", m=5, n=64, p=2, r=4)


# Of module scope, so that tests are grouped by backend and compiled code is dropped seldom.
@pytest.fixture(scope="module", params=BACKENDS, ids=str)
def backend(request):
    operation.cache_clear()
    if not request.param.patch:
        yield request.param.name
        return
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in request.param.patch:
            patch.setattr(module, name, value)
        jax.clear_caches()
        yield request.param.name
    jax.clear_caches()


@functools.cache
def operation(case, backend):
    def fn(q, k, v, b, scale):
        options = dict(case.options)
        return softmax_expectation(q, k, v, b, scale=scale, backend=backend, **options)

    def rounded(q, *rest):
        if q.dtype != jnp.float64:
            return fn(q, *rest)
        outputs = fn(*(a.astype(jnp.float32) for a in (q, *rest)))
        return tuple(y.astype(jnp.float64) for y in outputs)

    return jax.jit(rounded if backend in IN_FLOAT32 else fn)


@functools.cache
def values(case):
    return jax.device_get(truth(case)(*case.operands()))


@functools.cache
def truth(case):
    options = dict(case.options)
    limits = band(options.get("causal", False), options.get("window"))
    return jax.jit(partial(definition, band=limits))


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        finite = np.isfinite(e)
        np.testing.assert_array_equal(a[~finite], e[~finite])
        scale = 1 + np.abs(e[finite]).max(initial=0)
        assert np.abs(a[finite] - e[finite]).max(initial=0) <= tolerance * scale


def loss(fn):
    """A smooth scalar of both outputs; a log-partition of -inf contributes nothing."""

    def scalar(*operands):
        mean, lse = fn(*operands)
        lse = jnp.where(jnp.isneginf(lse), 0, lse)
        return jnp.sin(mean).sum() + jnp.cos(lse).sum()

    return scalar


EVERY_KIND = (
    "jvp", "grad", "grad under checkpoint", "transpose", "jvp of grad", "grad of grad",
    "grad of jvp", "jacfwd", "jacrev",
)  # fmt: skip
# The rules are the same for all backends: each must only meet all kinds of kernels under them.
KINDS = {
    "blocked": EVERY_KIND,
    "blocked-(8, 5)": ("jvp", "grad", "jvp of grad", "grad of grad"),
    "pruned-(4, 4)": ("jvp", "grad", "transpose", "jvp of grad"),
    "pallas_gpu:interpret": ("jvp", "transpose", "jvp of grad"),
    "pallas_tpu:interpret": ("jvp", "transpose"),
}


def derivatives(fn, operands, directions, kinds=EVERY_KIND):
    """The kinds of derivative that a user takes, by name."""
    every = tuple(range(len(operands)))
    gradient = jax.grad(loss(fn), every)
    along = lambda g: lambda *a: sum(jnp.vdot(x, y) for x, y in zip(g(*a), directions, strict=True))
    outputs = fn(*operands)
    cotangents = jax.tree.map(lambda y: jnp.where(jnp.isfinite(y), jnp.cos(y), 0), outputs)
    linear = jax.linearize(fn, *operands)[1]
    moved = lambda *a: jax.jvp(fn, a, directions)[1]
    found = {
        "jvp": lambda *a: jax.jvp(fn, a, directions),
        "grad": gradient,
        "grad under checkpoint": jax.grad(loss(jax.checkpoint(fn)), every),
        "transpose": lambda *a: jax.linear_transpose(linear, *a)(cotangents),
        "jvp of grad": lambda *a: jax.jvp(gradient, a, directions)[1],
        "grad of grad": jax.grad(along(gradient), every),
        "grad of jvp": jax.grad(loss(moved), every),
        "jacfwd": jax.jacfwd(fn, every),
        "jacrev": jax.jacrev(fn, every),
    }
    return {kind: found[kind](*operands) for kind in kinds}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case, backend):
    if backend in IN_FLOAT32 and case not in (PLAIN, HARD):
        pytest.skip("test_pallas_tpu.py has more of its cases")
    if backend == "pruned" and case.options:
        with pytest.raises(NotImplementedError, match="where they lie"):
            operation(case, backend)(*case.operands())
        return
    # A few dozen roundings of float64.
    assert_close(
        operation(case, backend)(*case.operands()), values(case), roundings(1e-14, backend)
    )


@pytest.mark.parametrize("every", [True, False])
def test_the_least_number_masks_a_key(every, backend):
    """As -inf does: a mask may be written with either."""
    q, k, v, b, scale = PLAIN.operands(jnp.float32)
    masks = [b.at[: None if every else 7].set(low) for low in (-jnp.inf, np.finfo(b.dtype).min)]
    fn = operation(PLAIN, backend)
    expected, found = (fn(q, k, v, mask, scale) for mask in masks)
    for e, f in zip(expected, found, strict=True):
        np.testing.assert_array_equal(e, f)


# float32 rounds at 6e-8, a sum of 64 terms loses a few units; the means and log-partitions of
# bfloat16 operands are accumulated in float32, so only the mean's own rounding (2^-9) is left.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "backend, dtype, tolerance",
    [
        ("blocked", "float32", 1e-6),
        ("blocked", "float16", 1e-3),
        ("blocked", "bfloat16", 4e-3),
        ("pallas_gpu:interpret", "float32", 1e-6),
        ("pallas_gpu:interpret", "bfloat16", 4e-3),
    ],
)
def test_low_precision_is_accumulated_in_float32(backend, dtype, tolerance, compiles):
    compiles(dtype)
    case = LONG
    operands = case.operands(jnp.dtype(dtype))
    mean, lse = operation(case, backend)(*operands)
    assert mean.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    mean64, lse64 = truth(case)(*(a.astype(jnp.float64) for a in operands))
    assert_close(mean, mean64, tolerance)
    assert_close(lse, lse64, 1e-6)


DIRECTIONS = tuple(np.random.default_rng(11).standard_normal(shape) for shape in HARD.shapes())


@functools.cache
def true_derivatives(case):
    kinds = EVERY_KIND if case is HARD else KINDS["pruned-(4, 4)"]
    fn = jax.jit(lambda *a: derivatives(truth(case), a, DIRECTIONS, kinds))
    return jax.device_get(fn(*case.operands()))


@pytest.mark.usefixtures("x64")
def test_derivatives(backend, request):
    case, kinds = hardest(backend), KINDS[request.node.callspec.id]
    fn = operation(case, backend)
    actual = jax.jit(lambda *a: derivatives(fn, a, DIRECTIONS, kinds))(*case.operands())
    assert actual.keys() == set(kinds)
    for kind, found in actual.items():
        # Second derivatives add up some hundred terms of size 1.
        assert_close(found, true_derivatives(case)[kind], roundings(1e-13, backend))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found[-1])), kind


@pytest.mark.usefixtures("x64")
def test_reference_against_finite_differences():
    case = HARD
    operands = case.operands()
    directions = tuple(
        jnp.where(jnp.isfinite(a), jnp.cos(jnp.arange(a.size).reshape(a.shape)), 0)
        for a in operands
    )
    fn, h = loss(truth(case)), 1e-5

    @jax.jit
    def both(*operands):
        shifted = lambda h: fn(*(a + h * d for a, d in zip(operands, directions, strict=True)))
        numeric = (shifted(h) - shifted(-h)) / (2 * h)
        return jax.jvp(fn, operands, directions)[1], numeric

    exact, numeric = both(*operands)
    # Central differences err by h^2 and by rounding / h, both near 1e-10.
    np.testing.assert_allclose(exact, numeric, rtol=1e-8)


def batched(fn, case, axes):
    """The function and its jvp, mapped over the operands with these numbers."""
    operands = case.operands()
    stack = lambda a: jnp.stack([a * (1 + 0.1 * i) for i in range(3)])
    args = [stack(a) if i in axes else a for i, a in enumerate(operands)]
    both = lambda *a: (fn(*a), jax.jvp(fn, a, tuple(jnp.ones_like(x) for x in a))[1])
    subset = tuple(0 if i in axes else None for i in range(5))
    return jax.device_get(jax.jit(jax.vmap(both, subset))(*args))


@functools.cache
def true_batch(case, axes):
    return batched(truth(case), case, axes)


ALL = (0, 1, 2, 3, 4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case, axes", [(PLAIN, (0,)), (PLAIN, (1, 3)), (HARD, (0,))], ids=str)
def test_vmap_over_a_subset(case, axes):
    """Queries alone are folded into the query axis where there is no band, others broadcast."""
    actual = batched(operation(case, "blocked"), case, axes)
    assert_close(actual, true_batch(case, axes), 1e-13)


@pytest.mark.usefixtures("x64")
def test_a_batch_of_systems(backend):
    case = hardest(backend)
    actual = batched(operation(case, backend), case, ALL)
    assert_close(actual, true_batch(case, ALL), roundings(1e-13, backend))


def mapped_gradients(fn):
    """Queries and temperatures on two axes, with the gradient inside."""
    q, k, v, b, _ = PLAIN.operands()
    scales, queries = jnp.array([0.0, 0.5, 2.0]), jnp.stack([q, 2 * q])
    one = jax.grad(lambda q, s: loss(fn)(q, k, v, b, s), (0, 1))
    mapped = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))
    return jax.device_get(mapped(queries, scales))


@functools.cache
def true_mapped_gradients():
    return mapped_gradients(truth(PLAIN))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("backend", ["blocked", "pallas_gpu:interpret"])
def test_nested_vmap_of_a_gradient(backend):
    actual = mapped_gradients(operation(PLAIN, backend))
    assert_close(actual, true_mapped_gradients(), roundings(1e-13, backend))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["blocked", "reference"])
def test_third_derivative(name):
    """Beyond the first, derivatives are those of portable code: of the definition or of blocks."""
    operands = PLAIN.operands()

    def third(f):
        g = lambda s: f(*operands[:4], s)[0].sum()
        return jax.jit(jax.grad(jax.grad(jax.grad(g))))(operands[4])

    fn, exact = operation(PLAIN, name), truth(PLAIN)
    np.testing.assert_allclose(third(fn), third(exact), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_definition_as_a_backend():
    """Its tangent and cotangent are those of JAX, in a batch too."""
    fn = operation(HARD, "reference")
    assert_close(batched(fn, HARD, ALL), true_batch(HARD, ALL), 1e-14)
    actual = jax.jit(jax.grad(loss(fn), ALL))(*HARD.operands())
    assert_close(actual, true_derivatives(HARD)["grad"], 1e-13)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_known_bound_and_the_running_maximum_agree(scale, backend):
    """scale 1 is within the bound of float64, scale 1e4 underflows it and runs online."""
    operands = PLAIN.operands()[:4]
    actual = operation(PLAIN, backend)(*operands, jnp.asarray(scale))
    # Scores of size 10 `scale` are rounded at 10 `scale` * 1e-16 (in float64), and so are their
    # exponentials.
    expected = truth(PLAIN)(*operands, jnp.asarray(scale))
    assert_close(actual, expected, roundings(1e-14 * max(2.0, scale), backend))


@pytest.mark.parametrize(
    "beta, size, safe", [(65, 1.0, True), (90, 1.0, False), (65, 1e-9, False), (20, 1e-9, True)]
)
def test_one_shift_serves_scores_of_moderate_span(beta, size, safe):
    """On the unit sphere up to beta = 65 in float32, with room for values of any size."""
    x = jnp.eye(3, dtype=jnp.float32)
    plain, b = Problem(weighted=False), jnp.zeros(3, jnp.float32)
    shift, known = known_shift(beta * x, x, size * x, b, plain, math.log)
    assert shift == 0 and bool(known) is safe
    b = jnp.array([-jnp.inf, 2.0, 4.0], jnp.float32)
    assert known_shift(x, x, x, b, Problem(), math.log)[0] == 3.0


@pytest.mark.usefixtures("x64")
def test_non_finite_operands_are_not_hidden(backend):
    q, k, v, b, scale = PLAIN.operands()
    mean, lse = operation(PLAIN, backend)(q.at[3, 0].set(jnp.nan), k, v, b, scale)
    assert np.isnan(mean[3]).all() and np.isnan(lse[3])
    assert np.isfinite(np.delete(np.asarray(mean), 3, axis=0)).all()


def test_a_new_scale_is_no_new_program():
    """But for 16 bits, where cuDNN takes it as a constant."""

    def problem(scale, dtype):
        x = jnp.zeros((5, 3), dtype)
        equations = jax.make_jaxpr(lambda x: softmax_expectation(x, x, x, scale=scale))(x).eqns
        return next(e.params["problem"] for e in equations if "problem" in e.params)

    assert problem(1.0, jnp.float32) == problem(2, jnp.float32)
    assert problem(2, jnp.bfloat16).constant_scale == 2.0


@pytest.mark.slow
def test_without_jit():
    operands = PLAIN.operands(jnp.float32)
    expected = operation(PLAIN, "blocked")(*operands)
    with jax.disable_jit():
        actual = operation(PLAIN, "blocked")(*operands)
        jax.grad(loss(operation(PLAIN, "blocked")))(*operands)
    assert_close(actual, expected, 1e-6)


def largest_intermediate(jaxpr) -> int:
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [np.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape")]
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    sizes.append(largest_intermediate(inner))
    return int(max(sizes))


@pytest.mark.parametrize("kind", [Forward, Tangent, Cotangent])
@pytest.mark.parametrize("unrolled", [False, True], ids=["loop", "unrolled"])
def test_no_intermediate_is_larger_than_a_tile(kind, unrolled):
    n, d = 2**17, 3
    matrices = {"q", "k", "v", "mean", "du", "dk", "dv", "g"}
    shape = {"scale": ()} | {name: (n, d) for name in matrices}
    operands = kind(*(jnp.zeros(shape.get(name, (n,))) for name in kind._fields))
    jaxpr = jax.make_jaxpr(partial(evaluate, Blocked(unrolled), problem=Problem()))(operands)
    assert largest_intermediate(jaxpr.jaxpr) <= 2 * max(blocked.ROWS * blocked.KEYS, 2 * n * d)


@pytest.mark.parametrize(
    "platform, call", [("cpu", "dot_general"), ("cuda", "mosaic_gpu"), ("tpu", "tpu_custom_call")]
)
def test_lowers_for_every_platform(platform, call):
    x = jnp.zeros((16, 4))
    fn = jax.jit(jax.value_and_grad(lambda x: softmax_expectation(x, x, x)[0].sum()))
    assert call in fn.trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_select_backend():
    few, many = (jax.ShapeDtypeStruct((3, n, 2), jnp.float32) for n in (96, 97))
    assert select_backend(few, few, few, platform="cpu") == "reference"
    assert select_backend(many, many, many, platform="cpu") == "blocked"
    tried = explain_backend(many, many, many, platform="cpu")
    assert [c.verdict for c in tried] == [
        "no: tiles are faster beyond 9,216 pairs a system, or 1,048,576 in a batch",
        "runs: portable",
    ]
    x = jnp.zeros((4, 2))
    assert select_backend(x, x, x, platform="cpu") == "blocked"
    batch = jax.ShapeDtypeStruct((2**16 + 1, 4, 2), jnp.float32)
    assert select_backend(batch, batch, batch, platform="cpu") == "blocked"
    assert select_backend(x, x, x, backend="reference") == "reference"
    with pytest.raises(
        ValueError, match="backend must be one of reference, blocked, .* or None.*'cud'"
    ):
        softmax_expectation(x, x, x, backend="cud")


def as_users_call(fn):
    """Without the check of annotated types that only tests have."""
    return inspect.unwrap(fn)


X, LOGS = np.zeros((5, 3), np.float32), np.zeros(5, np.float32)
HALF = X.astype(np.float16)


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        ((X[0], X, X), {}, ValueError, r"q must have two axes.*\(3,\).*vmap"),
        ((X[None], X, X), {}, ValueError, r"q must have two axes.*\(1, 5, 3\).*vmap"),
        ((X, X[:, :2], X), {}, ValueError, "same dimension"),
        ((X, X, X[:4]), {}, ValueError, "pair up"),
        ((X, X[:0], X[:0]), {}, ValueError, r"k must not be empty, got shape \(0, 3\)"),
        ((X, X, X[:, :0]), {}, ValueError, r"v must not be empty, got shape \(5, 0\)"),
        ((X.astype(int), X, X), {}, TypeError, "q must be floating point, got int"),
        (([[1, 2]], X, X), {}, TypeError, "q must be floating point, got int"),
        (([[1.0], [2.0, 3.0]], X, X), {}, TypeError, "q must be an array.*this list is not"),
        ((None, X, X), {}, TypeError, "q must be an array.*this NoneType is not"),
        (("text", X, X), {}, TypeError, "q must be an array.*this str is not"),
        ((X, HALF, X), {}, TypeError, "share one dtype.*float16"),
        ((X, X, X, LOGS[:4]), {}, ValueError, r"one entry a key, shape \(5,\); got \(4,\)"),
        ((X, X, X, X), {}, ValueError, r"one entry a key, shape \(5,\); got \(5, 3\)"),
        ((X, X, X, LOGS > 0), {}, TypeError, "log_weights must be floating point.*jnp.where"),
        ((X, X, X, LOGS + np.nan), {}, ValueError, "below infinity, got nan for key 0.*-inf"),
        ((X, X, X, [0, 0, np.inf, 0, 0]), {}, ValueError, "below infinity, got inf for key 2"),
        ((X, X, X), {"scale": np.nan}, ValueError, "must be finite, got nan"),
        ((X, X, X), {"scale": 1e300}, ValueError, r"must be finite, got 1e\+300 .*float32"),
        ((HALF, HALF, HALF), {"scale": 10**400}, ValueError, "must be finite, got 1000"),
        ((X, X, X), {"scale": LOGS}, ValueError, r"scale must be a scalar, got shape \(5,\)"),
        ((X, X, X), {"scale": LOGS[0] > 0}, TypeError, "scale must be a real number"),
        ((X, X, X), {"scale": "1"}, TypeError, "scale must be a real number.*got '1'"),
        ((X, X, X), {"scale": 1j}, TypeError, "scale must be a real number.*got 1j"),
        ((X, X, X), {"scale": jnp.array(1j)}, TypeError, "real number.*complex"),
        ((X, X, X), {"causal": "yes"}, TypeError, "causal must be True or False, got 'yes'"),
        ((X, X, X), {"window": -1}, ValueError, "window must be a non-negative integer.*-1"),
        ((X, X, X), {"window": True}, ValueError, "window must be a non-negative.*got True"),
        ((X, X, X), {"window": (1, 2.0)}, ValueError, r"window must.*got \(1, 2.0\)"),
        ((X, X, X), {"window": (1, 2, 3)}, ValueError, r"a pair of them.*got \(1, 2, 3\)"),
        ((X, X, X), {"backend": 3}, TypeError, "backend must be the name of.*got 3.*None"),
        ((X, X, X), {"backend": ["blocked"]}, TypeError, "backend must be the name"),
        ((X, X, X), {"backend": "blocked:interpret"}, ValueError, "one of reference, blocked,"),
    ],
)
@pytest.mark.parametrize("fn", [softmax_expectation, select_backend])
def test_bad_operands(fn, args, options, error, message):
    # For `select_backend` leading axes are a batch, and what is in an array does not matter.
    batch = isinstance(args[0], np.ndarray) and args[0].ndim == 3
    if fn is select_backend and (batch or "below infinity" in message):
        return
    with pytest.raises(error, match=message):
        as_users_call(fn)(*args, **options)


def test_a_scale_of_less_precision_than_the_operands():
    q = jax.ShapeDtypeStruct((5, 3), jnp.float64)
    assert select_backend(q, q, q, scale=jnp.float32(4.0)) == select_backend(q, q, q)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"platform": "nvidia"}, "platform must be one of cpu, cuda, .*got 'nvidia'"),
        ({"platform": ["cpu"]}, "platform must be one of"),
        ({"mode": "backward"}, "mode must be one of forward, tangent, cotangent, got 'backward'"),
    ],
)
def test_bad_choices(options, message):
    for fn in (select_backend, describe_backend):
        with pytest.raises(ValueError, match=message):
            as_users_call(fn)(X, X, X, **options)


@pytest.mark.parametrize(
    "options, same",
    [
        ({"window": np.int64(2)}, {"window": 2}),
        ({"window": [1, 2]}, {"window": (1, 2)}),
        ({"window": 10**12}, {}),
        ({"causal": np.bool_(True)}, {"causal": True}),
        ({"scale": np.int32(3)}, {"scale": 3.0}),
    ],
)
def test_other_spellings_of_numbers(options, same):
    q, k, v, *_ = PLAIN.operands(jnp.float32)
    fn = as_users_call(softmax_expectation)
    found, expected = (fn(q, k, v, **o) for o in (options, same))
    for f, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(f, e, rtol=1e-6)


def test_a_backend_is_described():
    assert describe_backend(X[None], X[None], X[None], platform="cpu") == (
        "reference (the definition in jnp)"
    )
    chosen = describe_backend(X, X, X, backend="blocked")
    assert chosen == "blocked (blocks of rows in XLA)"
    chosen = describe_backend(X, X, X, backend="reference", mode="tangent")
    assert chosen == "reference (the definition in jnp)"


def test_every_backend_is_registered():
    assert set(BACKEND_NAMES) <= registry.REGISTRY.keys()
    for name in registry.REGISTRY:
        backend = registry.load(name)
        assert backend == registry.load(name) and hash(backend) == hash(registry.load(name))
    for names in (*registry.PREFERENCE.values(), registry.OTHERWISE):
        assert set(names) <= registry.REGISTRY.keys() and names[-1] == "blocked"
