"""Masks against their definitions, written down densely and differentiated by JAX, in float64."""

import dataclasses
import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow import masks
from jaxflow.kernels import blocked, describe_backend, explain_backend, select_backend
from jaxflow.kernels.base import Problem
from jaxflow.kernels.registry import BACKENDS, check_named
from jaxflow.kernels.base import Shapes

TABLE = np.random.default_rng(4).random((6, 5)) < 0.4
TABLE[2] = False  # queries 10 to 14 see nothing


# ------------------------------------------------------------------ the definitions


def index(function):
    """A matrix (m, n) of what holds of a query i and a key j."""
    return lambda m, n: np.array([[function(i, j) for j in range(n)] for i in range(m)])


def strided(i, j):
    a, b = i // 2, j // 2
    return abs(a - b) <= 1 or (a - b) % 3 == 0


def level(i, j, size):
    return next(
        l for l in itertools.count() if abs(i // (size << l) - j // (size << l)) <= 1
    )


PATTERNS = {
    "window": (masks.Window(4, 2), index(lambda i, j: i - 4 <= j <= i + 2)),
    "blocks": (masks.Blocks(7), index(lambda i, j: i // 7 == j // 7)),
    "strided": (masks.Strided(3, 1, size=2), index(strided)),
    "global": (masks.Global(3), index(lambda i, j: i < 3 or j < 3)),
    "table": (masks.BlockSparse(TABLE, 5), index(lambda i, j: TABLE[i // 5, j // 5])),
    "and": (
        masks.Blocks(7) & masks.Strided(3, 1, size=2),
        index(lambda i, j: i // 7 == j // 7 and strided(i, j)),
    ),
}


def plain(seen):
    """Softmax attention over the pairs of a Boolean matrix."""

    def fn(q, k, v, b, scale):
        s = jnp.where(seen, scale * (q @ k.T) + b[None], -jnp.inf)
        return gibbs(s, v)

    return fn


def gibbs(s, v):
    top = jax.lax.stop_gradient(jnp.maximum(s.max(axis=1, keepdims=True), -1e9))
    w = jnp.exp(s - top)
    z = w.sum(axis=1, keepdims=True)
    safe = jnp.where(z == 0, 1, z)
    return w @ v / safe, jnp.where(z == 0, -jnp.inf, jnp.log(safe) + top)[:, 0]


def of_largest(k, seen):
    """Softmax attention over the k largest scores, without ties."""

    def fn(q, keys, v, b, scale):
        s = scale * (q @ keys.T)
        known = jnp.where(seen & ~jnp.isneginf(b)[None], jax.lax.stop_gradient(s), -jnp.inf)
        kth = jnp.sort(known, axis=1)[:, -k, None]
        return gibbs(jnp.where((known >= kth) & ~jnp.isneginf(known), s, -jnp.inf) + b[None], v)

    return fn


def of_groups(size, causal, m, n):
    """Each pair with the means of its group: of the keys of one level that share 2^level."""
    levels = index(lambda i, j: level(i, j, size))(m, n)

    def fn(q, k, v, b, scale):
        w = jnp.exp(b)
        s, values = jnp.full((m, n), -jnp.inf), jnp.zeros((m, n, v.shape[1]))
        for l in range(levels.max() + 1):
            same = jnp.asarray(np.equal.outer(np.arange(n) >> l, np.arange(n) >> l), float)
            mass = same @ w
            mass = jnp.where(mass == 0, 1, mass)
            mean = lambda a: (same @ (w[:, None] * a)) / mass[:, None]
            here = levels == l
            if causal:
                here &= np.arange(n)[None] <= np.arange(m)[:, None]
            s = jnp.where(here, scale * (q @ mean(k).T) + b[None], s)
            values = jnp.where(here[:, :, None], mean(v)[None], values)
        top = jax.lax.stop_gradient(s.max(axis=1, keepdims=True))
        e = jnp.exp(s - top)
        z = e.sum(axis=1)
        return jnp.einsum("ij,ijr->ir", e, values) / z[:, None], jnp.log(z) + top[:, 0]

    return fn


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    options: dict
    truth: object
    m: int = 29
    n: int = 23

    def __str__(self):
        return self.name


def cases():
    m, n = 29, 23
    for name in ("strided", "table", "and"):
        mask, seen = PATTERNS[name]
        yield Case(name, {"mask": mask}, plain(seen(m, n)))
    causal = index(lambda i, j: i - 9 <= j <= i)(m, n)
    seen = causal & PATTERNS["blocks"][1](m, n)
    options = {"mask": masks.Blocks(7), "causal": True, "window": 9}
    yield Case("blocks, causal window", options, plain(seen))
    mask = masks.big_bird(window=1, tokens=2, blocks=1, size=4, seed=1)
    yield Case("big bird", {"mask": mask}, plain(mask.matrix(m, n)))
    tril = index(lambda i, j: j <= i)(m, n)
    yield Case("top k, causal", {"mask": masks.TopK(3), "causal": True}, of_largest(3, tril))
    among = PATTERNS["table"]
    mask = masks.TopK(2, among=among[0])
    yield Case("top k of some", {"mask": mask}, of_largest(2, among[1](m, n)))
    mask = masks.Hierarchical(2)
    yield Case("hierarchical", {"mask": mask}, of_groups(2, False, 20, 37), m=20, n=37)
    options = {"mask": mask, "causal": True}
    yield Case("hierarchical, causal", options, of_groups(2, True, m, n))


CASES = list(cases())


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Tiles that are small beside the cases, so that every loop runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "ROWS", 8)
        patch.setattr(blocked, "KEYS", 6)
        patch.setattr(blocked, "SMALLEST", 3)
        patch.setattr(blocked, "TILE", 1)
        jax.clear_caches()
        yield
    jax.clear_caches()


def operands(case):
    rng = np.random.default_rng(3)
    m, n = case.m, case.n
    draws = [rng.standard_normal(shape) for shape in ((m, 3), (n, 3), (n, 2), (n,))]
    draws[3][[1, 2, 3, 9]] = -np.inf
    return *map(jnp.asarray, draws), jnp.asarray(0.7)


def directions(case):
    rng = np.random.default_rng(5)
    shapes = (case.m, 3), (case.n, 3), (case.n, 2), (case.n,), ()
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


# The rules of the second order are the same for all patterns.
TWICE = ("table", "top k of some", "hierarchical, causal")


def derivatives(fn, twice):
    """Value, jvp and gradient; with `twice` also the jvp of the gradient and its reverse."""

    def scalar(*operands):
        mean, lse = fn(*operands)
        return jnp.sin(mean).sum() + jnp.cos(jnp.where(jnp.isneginf(lse), 0, lse)).sum()

    gradient = jax.grad(scalar, argnums=(0, 1, 2, 3, 4))
    square = lambda *operands: sum((a**2).sum() for a in gradient(*operands))

    def compute(primals, tangents):
        value, first = jax.jvp(fn, primals, tangents)
        first = jax.tree.map(lambda a, y: jnp.where(jnp.isfinite(y), a, 0), first, value)
        if not twice:
            return value, first, gradient(*primals)
        slope, second = jax.jvp(gradient, primals, tangents)
        return value, first, slope, second, jax.grad(square, argnums=(0, 1, 2))(*primals)

    return jax.jit(compute)


def assert_close(actual, expected, tolerance=1e-11):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        finite = np.isfinite(e)
        np.testing.assert_array_equal(a[~finite], e[~finite])
        scale = 1 + np.abs(e[finite]).max(initial=0)
        assert np.abs(a[finite] - e[finite]).max(initial=0) <= tolerance * scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_derivatives(case, x64):
    """Sums of at most 40 numbers of size 1 to 100, differentiated twice: some 1,000 roundings."""
    fn = lambda q, k, v, b, scale: jf.softmax_expectation(q, k, v, b, scale=scale, **case.options)
    primals, tangents = operands(case), directions(case)
    twice = case.name in TWICE
    expected = derivatives(case.truth, twice)(primals, tangents)
    assert_close(derivatives(fn, twice)(primals, tangents), expected)
