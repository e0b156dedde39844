"""The backend that asks only for the pairs that matter keeps what it promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxflow import softmax_expectation
from jaxflow.kernels import pruned, pruning, select_backend
from jaxflow.kernels.base import Cotangent, Forward, Problem, Tangent
from jaxflow.kernels.blocked import Blocked
from jaxflow.kernels.pruned import Pruned

M, N, D, R, TOLERANCE = 150, 300, 3, 2, 1e-3


@pytest.fixture(scope="module", autouse=True)
def small():
    """Small balls, so that small laws have many."""
    sizes = {"BALL": 8, "ROWS": 8, "CELL": 16, "CELLS": 32, "LEAST_CELL": 8, "LOOK": 16}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(pruned, name, value)
        patch.setattr(pruned, "FEW", 0)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.fixture
def never_handed_over(monkeypatch):
    monkeypatch.setattr(pruned, "MOST", 1e9)


def law(seed, width, size, lopsided=1.0, masked=7, dtype: type = np.float64):
    """Clusters of this width; log-weights spread so much, each so-manieth key masked."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((8, D))
    draw = lambda n: size * (centres[rng.integers(0, 8, n)] + width * rng.standard_normal((n, D)))
    b = lopsided * rng.standard_normal(N)
    b[::masked] = -np.inf
    # Values that go with the keys, but for some far away.
    k = draw(N)
    v = k[:, :R] + 100 * (rng.random((N, 1)) < 0.02)
    return tuple(jnp.asarray(a, dtype) for a in (draw(M), k, v, b))


def clustered(width=0.01, dtype: type = np.float64):
    return law(1, width, 1.0, dtype=dtype)


def radius(v, b):
    """The largest distance of a value from the mean of all."""
    v, b = np.asarray(v), np.asarray(b)
    weights = np.exp(b - b.max())
    away = np.linalg.norm(v - (weights @ v) / weights.sum(), axis=1)
    return away[~np.isneginf(b)].max()


@jax.jit
def both(operands: Forward):
    return Pruned(TOLERANCE).forward(operands, Problem()), Blocked().forward(operands, Problem())


def keeps_its_promise(operands, scale):
    """The largest error of a mean, which is below the tolerance in units of R."""
    q, k, v, b = operands
    found, exact = both(Forward(q, k, v, b, jnp.asarray(scale)))
    size = np.abs(scale) * np.linalg.norm(q, axis=1).max() * np.linalg.norm(k, axis=1).max()
    rounding = 1e-14 * (1 + size + np.abs(b[b > -np.inf]).max())  # of scores, in float64
    off = np.linalg.norm(found[0] - exact[0], axis=1).max()
    below = np.asarray(exact[1] - found[1])  # moments take too little, never too much
    assert off <= (TOLERANCE + rounding) * radius(v, b) + rounding
    assert below.min() >= -rounding and below.max() <= TOLERANCE + rounding
    return off


# ------------------------------------------------------------------ the promise


@pytest.mark.usefixtures("never_handed_over")
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    width=st.sampled_from([0.0, 1e-3, 0.03, 0.3, 3.0]),
    size=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    scale=st.sampled_from([-30.0, -1.0, 0.0, 0.1, 1.0, 5.0, 60.0]),
    lopsided=st.sampled_from([0.0, 1.0, 30.0]),
    masked=st.sampled_from([2, 7, N]),
)
def test_the_error_is_at_most_the_tolerance(seed, width, size, scale, lopsided, masked):
    with jax.enable_x64(True):
        keeps_its_promise(law(seed, width, size, lopsided, masked), scale)


@pytest.mark.usefixtures("x64", "never_handed_over")
def test_it_asks_for_few_pairs_and_says_so():
    """Clusters that look like points: nearly all pairs are replaced or left out."""
    operands = clustered(3e-4)
    off = keeps_its_promise(operands, 20.0)
    assert off > 1e-12  # it did replace
    report = pruning(*operands, scale=20.0, tolerance=TOLERANCE)
    assert report.asked + report.replaced + report.skipped == M * N
    assert report.asked < 0.2 * M * N and min(report.replaced, report.skipped) > 0
    np.testing.assert_allclose(report.error, TOLERANCE * radius(*operands[2:]))
    assert not report.handed_over
    assert pruning(*operands, scale=20.0, tolerance=1e-10).asked > report.asked


@pytest.mark.usefixtures("x64", "never_handed_over")
def test_derivatives_leave_out_little_and_are_each_other_s_transpose():
    rng = np.random.default_rng(5)
    draw = lambda *arrays: [jnp.asarray(rng.standard_normal(a.shape)) for a in arrays]
    q, k, v, b = clustered()
    operands = Forward(q, k, v, b, jnp.asarray(20.0))
    mean, lse = both(operands)[1]
    directions, (g, h) = draw(q, k, v, b), draw(mean, lse)
    tangents = Tangent(*operands, mean, lse, *directions)
    cotangents = Cotangent(*operands, mean, lse, g, h)

    @jax.jit
    def every(tangents, cotangents):
        def of(backend):
            moved = backend.tangent(tangents, Problem())
            return moved, backend.cotangent(cotangents, Problem())

        return of(Pruned(TOLERANCE)), of(Blocked())

    found, exact = every(tangents, cotangents)
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert float(jnp.abs(a - e).max()) <= TOLERANCE * float(jnp.abs(e).max())
    assert float(jnp.abs(found[0][0] - exact[0][0]).max()) > 1e-14  # pairs were left out
    (moved, moved_lse), pulled = found
    left = (moved * g).sum() + (moved_lse * h).sum()
    du, dk, dv, _ = directions
    linear = du, dk, dv, tangents.moving_db
    right = sum((a * c).sum() for a, c in zip(linear, pulled, strict=True))
    np.testing.assert_allclose(left, right, rtol=1e-11)


@pytest.mark.usefixtures("x64", "never_handed_over")
def test_derivatives_of_the_operation_pass():
    """First ones by its kernels, second ones by the portable code."""
    q, k, v, b = clustered()

    def loss(backend):
        def fn(q, k):
            mean, lse = softmax_expectation(q, k, v, b, scale=3.0, backend=backend)
            return (jnp.sin(mean)).sum() + lse.sum()

        along = jnp.ones_like(q)
        return jax.jit(lambda q, k: jax.jvp(lambda q: jax.grad(fn, (0, 1))(q, k), (q,), (along,)))(
            q, k
        )

    for a, e in zip(
        jax.tree.leaves(loss("pruned:1e-9")), jax.tree.leaves(loss("blocked")), strict=True
    ):
        assert float(jnp.abs(a - e).max()) <= 1e-6 * float(jnp.abs(e).max())


def test_float32_vmap_and_keys_without_weight(never_handed_over):
    q, k, v, b = clustered(dtype=np.float32)
    fn = lambda b, backend: softmax_expectation(q, k, v, b, scale=3.0, backend=backend)
    weights = jnp.stack([b, jnp.full_like(b, -jnp.inf)])
    mean, lse = jax.jit(jax.vmap(lambda b: fn(b, "pruned:1e-3")))(weights)
    exact_mean, exact_lse = fn(b, "blocked")
    # Scores of size 30 in float32 add some 4e-6.
    off = np.linalg.norm(mean[0] - exact_mean, axis=1).max()
    assert off <= (1e-3 + 1e-5) * radius(v, b)
    np.testing.assert_allclose(lse[0], exact_lse, rtol=0, atol=1e-3 + 1e-5)
    assert (mean[1] == 0).all() and np.isneginf(lse[1]).all()


# ------------------------------------------------------------------ handing over, names, refusals


def test_it_hands_over_where_little_can_be_left_out():
    q, k, v, b = law(2, 3.0, 1.0, dtype=np.float32)
    found, exact = both(Forward(q, k, v, b, jnp.float32(1)))
    for a, e in zip(found, exact, strict=True):
        np.testing.assert_array_equal(a, e)
    report = pruning(q, k, v, b, tolerance=TOLERANCE)
    assert report.handed_over and report.asked == M * N and report.error == 0


def test_few_pairs_are_handed_over_at_once(monkeypatch):
    monkeypatch.setattr(pruned, "FEW", M * N + 1)
    q, k, v, b = clustered(dtype=np.float32)
    operands = Forward(q, k, v, b, jnp.float32(1))
    text = lambda backend: str(jax.make_jaxpr(lambda o: backend.forward(o, Problem()))(operands))
    assert text(Pruned()) == text(Blocked())


def test_names_and_what_it_refuses():
    x = jnp.zeros((8, 2))
    for name in ("pruned", "pruned:1e-4"):
        assert select_backend(x, x, x, backend=name) == name
    for wrong in ("0", "-1e-3", "nan", "inf", "1", "little", ""):
        with pytest.raises(ValueError, match="between 0 and 1"):
            softmax_expectation(x, x, x, backend=f"pruned:{wrong}")
    for wrong in (0.0, -1.0, float("nan"), 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            pruning(x, x, x, tolerance=wrong)
    with pytest.raises(NotImplementedError, match="at least 1e-06 where sums are float32"):
        softmax_expectation(x, x, x, backend="pruned:1e-9")
    with pytest.raises(NotImplementedError, match="orders the keys"):
        softmax_expectation(x, x, x, backend="pruned", causal=True)
    with pytest.raises(ValueError, match="backend must be one of"):
        softmax_expectation(x, x, x, backend="blocked:1e-3")
