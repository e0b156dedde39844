"""Conformance of every backend with the definition (kernels/reference.py).

A backend joins by a line in BACKENDS. Truth is the reference under JAX's own derivatives, in
float64; tolerances are relative to the largest entry of the truth.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflow.kernels import blocked, reference, select_backend, softmax_expectation
from jaxflow.kernels.expectation import band


@dataclasses.dataclass(frozen=True)
class Backend:
    name: str
    tiles: tuple[int, int] | None = None  # rows and keys of a tile; small ones reach every loop

    def __str__(self):
        return self.name if self.tiles is None else f"{self.name}-{self.tiles}"


BACKENDS = [
    Backend("blocked"),
    Backend("blocked", (8, 5)),
    Backend("reference"),
    Backend("pallas_gpu:interpret"),
    Backend("pallas_tpu:interpret"),
]
# TPUs have no float64: operands are rounded to float32 and tolerances count its roundings.
IN_FLOAT32 = ("pallas_tpu:interpret",)


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
        keys = jax.random.split(jax.random.key(3), 4)
        shapes = [(self.m, self.p), (self.n, self.p), (self.n, self.r), (self.n,)]
        q, k, v, b = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
        b = b.at[jnp.array(self.masked, int)].set(-jnp.inf)
        return q, k, v, b, jnp.asarray(0.7, dtype)


CASES = [
    Case("plain"),
    Case("one", m=1, n=1, p=1, r=1),
    Case("long", m=5, n=64, p=2, r=4),
    Case("tall", m=64, n=5, p=4, r=1),
    Case("masked-keys", masked=(0, 7, 22)),
    Case("causal", m=23, options=(("causal", True),)),
    Case("causal-tall", m=31, n=20, options=(("causal", True),)),
    Case("window", m=20, n=31, options=(("window", (3, 4)),)),
    Case("causal-window", m=29, n=29, options=(("causal", True), ("window", 2))),
    # The rows past 12 see no key at all.
    Case("empty-rows", m=20, n=11, options=(("window", 1),)),
    Case("nothing", masked=tuple(range(23))),
    # All at once: masked keys, a lopsided window, rows without a key.
    Case("hard", m=29, n=17, masked=(0, 7), options=(("window", (4, 2)),)),
]
HARD, PLAIN = CASES[-1], CASES[0]


# Of module scope, so that tests are grouped by backend and compiled code is dropped seldom.
@pytest.fixture(scope="module", params=BACKENDS, ids=str)
def backend(request):
    if not request.param.tiles:
        yield request.param.name
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "ROWS", request.param.tiles[0])
        patch.setattr(blocked, "KEYS", request.param.tiles[1])
        jax.clear_caches()
        yield request.param.name
    jax.clear_caches()


def operation(case, backend):
    def fn(q, k, v, b, scale):
        options = dict(case.options)
        return softmax_expectation(q, k, v, b, scale=scale, backend=backend, **options)

    def rounded(q, *rest):
        if q.dtype != jnp.float64:
            return fn(q, *rest)
        outputs = fn(*(a.astype(jnp.float32) for a in (q, *rest)))
        return tuple(y.astype(jnp.float64) for y in outputs)

    return rounded if backend in IN_FLOAT32 else fn


def truth(case):
    options = dict(case.options)
    limits = band(options.get("causal", False), options.get("window"))
    return jax.jit(partial(reference.forward, band=limits))


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


def derivatives(fn, operands, directions):
    """Every kind of derivative that a user takes, by name."""
    every = tuple(range(len(operands)))
    gradient = jax.grad(loss(fn), every)
    along = lambda g: lambda *a: sum(jnp.vdot(x, y) for x, y in zip(g(*a), directions, strict=True))
    outputs = fn(*operands)
    cotangents = jax.tree.map(lambda y: jnp.where(jnp.isfinite(y), jnp.cos(y), 0), outputs)
    linear = jax.linearize(fn, *operands)[1]
    return {
        "jvp": jax.jvp(fn, operands, directions),
        "grad": gradient(*operands),
        "grad under checkpoint": jax.grad(loss(jax.checkpoint(fn)), every)(*operands),
        "transpose": jax.linear_transpose(linear, *operands)(cotangents),
        "jvp of grad": jax.jvp(gradient, operands, directions)[1],
        "grad of grad": jax.grad(along(gradient), every)(*operands),
        "grad of jvp": jax.grad(loss(lambda *a: jax.jvp(fn, a, directions)[1]), every)(*operands),
        "jacfwd": jax.jacfwd(fn, every)(*operands),
        "jacrev": jax.jacrev(fn, every)(*operands),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(case, backend):
    operands = case.operands()
    actual = jax.jit(operation(case, backend))(*operands)
    # A few dozen roundings of float64.
    assert_close(actual, truth(case)(*operands), roundings(1e-14, backend))


@pytest.mark.parametrize("every", [True, False])
def test_the_least_number_masks_a_key(every, backend):
    """As -inf does: a mask may be written with either."""
    q, k, v, b, scale = PLAIN.operands(jnp.float32)
    masks = [b.at[: None if every else 7].set(low) for low in (-jnp.inf, np.finfo(b.dtype).min)]
    fn = jax.jit(operation(PLAIN, backend))
    expected, found = (fn(q, k, v, mask, scale) for mask in masks)
    for e, f in zip(expected, found, strict=True):
        np.testing.assert_array_equal(e, f)


# float32 rounds at 6e-8, a sum of 64 terms loses a few units; the means and log-partitions of
# bfloat16 operands are accumulated in float32, so only the mean's own rounding (2^-9) is left.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "dtype, tolerance", [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 4e-3)]
)
def test_low_precision_is_accumulated_in_float32(dtype, tolerance, backend):
    case = CASES[2]
    operands = case.operands(jnp.dtype(dtype))
    mean, lse = operation(case, backend)(*operands)
    assert mean.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    mean64, lse64 = truth(case)(*(a.astype(jnp.float64) for a in operands))
    assert_close(mean, mean64, tolerance)
    assert_close(lse, lse64, 1e-6)


@pytest.fixture(scope="module")
def fast_backend(backend):
    if backend == "reference":
        pytest.skip("the reference is the truth here")
    return backend


@pytest.mark.usefixtures("x64")
def test_derivatives(fast_backend):
    case = HARD
    operands = case.operands()
    key = jax.random.key(11)
    directions = tuple(jax.random.normal(key, a.shape, a.dtype) for a in operands)
    actual = jax.jit(lambda *a: derivatives(operation(case, fast_backend), a, directions))(
        *operands
    )
    expected = jax.jit(lambda *a: derivatives(truth(case), a, directions))(*operands)
    for name in expected:
        # Second derivatives add up some hundred terms of size 1.
        assert_close(actual[name], expected[name], roundings(1e-13, fast_backend))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual[name][-1])), name


@pytest.mark.usefixtures("x64")
def test_third_derivative(fast_backend):
    case = PLAIN
    fn, exact = operation(case, fast_backend), truth(case)
    operands = case.operands()

    def third(f):
        g = lambda s: f(*operands[:4], s)[0].sum()
        return jax.jit(jax.grad(jax.grad(jax.grad(g))))(operands[4])

    rtol = roundings(1e-12, fast_backend)
    np.testing.assert_allclose(third(fn), third(exact), rtol=rtol)


@pytest.mark.usefixtures("x64")
def test_reference_against_finite_differences():
    case = HARD
    operands = case.operands()
    directions = tuple(
        jnp.where(jnp.isfinite(a), jnp.cos(jnp.arange(a.size).reshape(a.shape)), 0)
        for a in operands
    )
    fn = jax.jit(loss(truth(case)))
    shifted = lambda h: fn(*(a + h * d for a, d in zip(operands, directions, strict=True)))
    h = 1e-5
    numeric = (shifted(h) - shifted(-h)) / (2 * h)
    # Central differences err by h^2 and by rounding / h, both near 1e-10.
    np.testing.assert_allclose(jax.jvp(fn, operands, directions)[1], numeric, rtol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", [PLAIN, HARD], ids=str)
def test_vmap_over_any_subset_is_the_loop(case, fast_backend):
    operands, count = case.operands(), 3
    stacked = tuple(jnp.stack([a * (1 + 0.1 * i) for i in range(count)]) for a in operands)
    fn = operation(case, fast_backend)
    both = lambda *a: (fn(*a), jax.jvp(fn, a, tuple(jnp.ones_like(x) for x in a))[1])
    single = jax.jit(both)
    # Queries alone are folded into the query axis, all others broadcast: these are the kinds.
    for axes in [(0,), (1, 3), (0, 1, 2, 3, 4)]:
        subset = tuple(0 if i in axes else None for i in range(5))
        args = [s if axis == 0 else a for s, a, axis in zip(stacked, operands, subset, strict=True)]
        rows = [a if axis == 0 else [a] * count for a, axis in zip(args, subset, strict=True)]
        loop = [single(*row) for row in zip(*rows, strict=True)]
        expected = jax.tree.map(lambda *xs: jnp.stack(xs), *loop)
        actual = jax.jit(jax.vmap(both, subset))(*args)
        assert_close(actual, expected, roundings(1e-14, fast_backend))


@pytest.mark.usefixtures("x64")
def test_nested_vmap_of_a_gradient(fast_backend):
    """Queries and temperatures on two axes, with the gradient inside."""
    q, k, v, b, _ = PLAIN.operands()
    scales, queries = jnp.array([0.0, 0.5, 2.0]), jnp.stack([q, 2 * q])

    def grads(fn):
        one = jax.grad(lambda q, s: loss(fn)(q, k, v, b, s), (0, 1))
        return jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(queries, scales)

    actual, expected = grads(operation(PLAIN, fast_backend)), grads(truth(PLAIN))
    assert_close(actual, expected, roundings(1e-13, fast_backend))


@pytest.mark.usefixtures("x64")
def test_the_known_bound_and_the_running_maximum_agree(backend):
    """scale 1 is within the bound of float64, scale 1e4 underflows it and runs online."""
    x = jax.random.normal(jax.random.key(0), (40, 3))
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    for scale in (1.0, 1e4):
        y = x.astype(jnp.float32) if backend in IN_FLOAT32 else x
        actual = softmax_expectation(y, y, y, scale=scale, backend=backend)
        expected = softmax_expectation(x, x, x, scale=scale, backend="reference")
        # Scores of size `scale` are rounded at scale * 1e-16 (in float64), and so are their
        # exponentials.
        assert_close(actual, expected, roundings(1e-15 * max(20.0, scale), backend))


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


@pytest.mark.parametrize("fn", ["forward", "tangent", "cotangent"])
@pytest.mark.parametrize("unrolled", [False, True], ids=["loop", "unrolled"])
def test_no_intermediate_is_larger_than_a_tile(fn, unrolled):
    n, d = 2**17, 3
    rows, key, log = jnp.zeros((n, d)), jnp.zeros((n, d)), jnp.zeros(n)
    shaped = (rows, key, key, log, jnp.zeros(()))
    extra = {
        "forward": (),
        "tangent": (rows, log, rows, key, key, log),
        "cotangent": (rows, log, rows, log),
    }
    call = partial(getattr(blocked, fn), band=(None, None), unrolled=unrolled)
    jaxpr = jax.make_jaxpr(call)(*shaped, *extra[fn])
    assert largest_intermediate(jaxpr.jaxpr) <= 2 * max(blocked.ROWS * blocked.KEYS, 2 * n * d)


@pytest.mark.parametrize(
    "platform, call", [("cpu", "dot_general"), ("cuda", "mosaic_gpu"), ("tpu", "tpu_custom_call")]
)
def test_lowers_for_every_platform(platform, call):
    x = jnp.zeros((16, 4))
    fn = jax.jit(jax.value_and_grad(lambda x: softmax_expectation(x, x, x)[0].sum()))
    assert call in fn.trace(x).lower(lowering_platforms=(platform,)).as_text()


def test_select_backend():
    x = jnp.zeros((4, 2))
    assert select_backend(x, x, x) == "blocked"
    assert select_backend(x, x, x, backend="reference") == "reference"
    with pytest.raises(
        ValueError, match="backend must be one of reference, blocked, .* or None.*'cud'"
    ):
        softmax_expectation(x, x, x, backend="cud")


X, LOGS = np.zeros((5, 3), np.float32), np.zeros(5, np.float32)


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        ((X[0], X, X), {}, ValueError, r"q must have two axes.*\(3,\).*vmap"),
        ((X, X[:, :2], X), {}, ValueError, "same dimension"),
        ((X, X, X[:4]), {}, ValueError, "pair up"),
        ((X, X[:0], X[:0]), {}, ValueError, r"k must not be empty, got shape \(0, 3\)"),
        ((X.astype(int), X, X), {}, TypeError, "q must be floating point, got int"),
        ((X, X.astype(np.float16), X), {}, TypeError, "share one dtype.*float16"),
        ((X, X, X, LOGS[:4]), {}, ValueError, r"one entry a key, shape \(5,\); got \(4,\)"),
        ((X, X, X, LOGS > 0), {}, TypeError, "log_weights must be floating point.*jnp.where"),
        ((X, X, X), {"scale": np.nan}, ValueError, "must be finite, got nan"),
        ((X, X, X), {"scale": LOGS}, ValueError, r"scale must be a scalar, got shape \(5,\)"),
        ((X, X, X), {"window": -1}, ValueError, "window must be a non-negative integer.*-1"),
    ],
)
def test_bad_operands(args, options, error, message):
    with pytest.raises(error, match=message):
        softmax_expectation(*args, **options)
