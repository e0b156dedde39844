"""Masks against their definitions, written down densely and differentiated by JAX, in float64."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow import masks
from jaxflow.fields.base import divergence_by_derivatives
from jaxflow.kernels import blocked, describe_backend, explain_backend, select_backend
from jaxflow.kernels.hierarchy import Levels
from jaxflow.kernels.registry import BACKENDS
from jaxflow.masks import Tiles

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
    return next(l for l in itertools.count() if abs(i // (size << l) - j // (size << l)) <= 1)


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
            here = levels == l
            if causal:
                here &= np.arange(n)[None] <= np.arange(m)[:, None]
            s = jnp.where(
                here, scale * (q @ (same @ (w[:, None] * k) / mass[:, None]).T) + b[None], s
            )
            values = jnp.where(
                here[:, :, None], (same @ (w[:, None] * v) / mass[:, None])[None], values
            )
        top = jax.lax.stop_gradient(s.max(axis=1, keepdims=True))
        e = jnp.exp(s - top)
        z = e.sum(axis=1)
        return jnp.einsum("ij,ijr->ir", e, values) / z[:, None], jnp.log(z) + top[:, 0]

    return fn


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any]
    truth: Callable
    order: int = 0  # of derivatives: their rules do not depend on the pattern
    m: int = 29
    n: int = 23

    def __str__(self):
        return self.name


def cases():
    m, n = 29, 23
    for name in ("strided", "table", "and"):
        mask, seen = PATTERNS[name]
        yield Case(name, {"mask": mask}, plain(seen(m, n)), order=2 if name == "table" else 0)
    causal = index(lambda i, j: i - 9 <= j <= i)(m, n)
    seen = causal & PATTERNS["blocks"][1](m, n)
    options = {"mask": masks.Blocks(7), "causal": True, "window": 9}
    yield Case("blocks, causal window", options, plain(seen), order=1)
    mask = masks.big_bird(window=1, tokens=2, blocks=1, size=4, seed=1)
    yield Case("big bird", {"mask": mask}, plain(mask.matrix(m, n)))
    tril = index(lambda i, j: j <= i)(m, n)
    yield Case("top k, causal", {"mask": masks.TopK(3), "causal": True}, of_largest(3, tril))
    among = PATTERNS["table"]
    mask = masks.TopK(2, among=among[0])
    yield Case("top k of some", {"mask": mask}, of_largest(2, among[1](m, n)), order=1)
    mask = masks.Hierarchical(2)
    yield Case("hierarchical", {"mask": mask}, of_groups(2, False, 20, 37), m=20, n=37)
    options = {"mask": mask, "causal": True}
    yield Case("hierarchical, causal", options, of_groups(2, True, 13, 14), order=1, m=13, n=14)


CASES = list(cases())


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Tiles that are small beside the cases, so that every loop runs."""
    small = {"ROWS": 8, "KEYS": 6, "SMALLEST": 3, "TILE": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(blocked, name, value)
        blocked._tiling.cache_clear()
        jax.clear_caches()
        yield
    blocked._tiling.cache_clear()
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


def derivatives(fn, order):
    """Value; from order 1 on jvp and gradient; of order 2 the derivatives of the gradient."""
    if order == 0:
        return jax.jit(lambda primals, tangents: fn(*primals))

    def scalar(*operands):
        mean, lse = fn(*operands)
        return jnp.sin(mean).sum() + jnp.cos(jnp.where(jnp.isneginf(lse), 0, lse)).sum()

    gradient = jax.grad(scalar, argnums=(0, 1, 2, 3, 4))
    square = lambda *operands: sum((a**2).sum() for a in gradient(*operands))

    def compute(primals, tangents):
        value, first = jax.jvp(fn, primals, tangents)
        first = jax.tree.map(lambda a, y: jnp.where(jnp.isfinite(y), a, 0), first, value)
        if order == 1:
            return value, first, gradient(*primals)
        return value, first, jax.jvp(gradient, primals, tangents), jax.grad(square)(*primals)

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
    expected = derivatives(case.truth, case.order)(primals, tangents)
    assert_close(derivatives(fn, case.order)(primals, tangents), expected)


def test_a_query_that_sees_nothing_and_what_is_vmapped(x64):
    """Queries alone in a batch keep their indices; rows 10 to 14 see no key."""
    case = CASES[1]
    q, k, v, b, scale = operands(case)
    queries = jnp.stack([q, -q, 2 * q])
    one = lambda q: jf.softmax_expectation(q, k, v, b, scale=scale, **case.options)
    mean, lse = jax.jit(jax.vmap(one))(queries)
    assert (mean[:, 10:15] == 0).all() and jnp.isneginf(lse[:, 10:15]).all()
    assert_close((mean, lse), jax.jit(jax.vmap(lambda q: case.truth(q, k, v, b, scale)))(queries))


def test_the_reference_takes_the_same_masks(x64):
    for case in (CASES[6], CASES[8]):
        options = case.options | {"scale": 0.7, "backend": "reference"}
        *arrays, scale = operands(case)
        found = jax.jit(partial(jf.softmax_expectation, **options))(*arrays)
        assert_close(found, jax.jit(case.truth)(*arrays, scale))


# ------------------------------------------------------------------ which tiles

SHAPES = (29, 23), (60, 60), (1, 5), (30, 1)
SIZES = (1, 1), (4, 5), (7, 3), (100, 100)


def holds(full, height, width):
    m, n = full.shape
    rows, columns = range(0, m, height), range(0, n, width)
    return np.array([[full[i : i + height, j : j + width].any() for j in columns] for i in rows])


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_and_their_tiles(name):
    mask, pairs = PATTERNS[name]
    for m, n in SHAPES:
        if mask.objection((m, n)):
            continue
        full = mask.matrix(m, n)
        np.testing.assert_array_equal(full, pairs(m, n))
        for size in SIZES:
            met, held = mask.meets(Tiles.of((m, n), *size), (m, n)), holds(full, *size)
            # What two patterns show may lie in one tile and not meet.
            assert (met >= held).all() and (name == "and" or (met == held).all())


def test_random_blocks():
    mask = masks.Random(2, 4, seed=7)
    full = mask.matrix(30, 41)
    table = full[::4, ::4]
    assert table.shape == (8, 11) and (table.sum(axis=1) == 2).all()
    np.testing.assert_array_equal(full, table.repeat(4, axis=0).repeat(4, axis=1)[:30, :41])
    np.testing.assert_array_equal(holds(full, 7, 3), mask.meets(Tiles.of((30, 41), 7, 3), (30, 41)))
    assert (masks.Random(2, 4, seed=8).matrix(30, 41) != full).any()
    assert masks.Random(99, 4).matrix(30, 41).all()


@pytest.mark.parametrize("causal", [False, True])
def test_groups_cover_each_token_once(causal):
    for m, n in SHAPES:
        lengths = masks.Hierarchical(2).lengths((m, n))
        pattern = Levels(2, lengths, causal)
        shape = m, sum(lengths)
        full = pattern.matrix(*shape)
        tokens = np.arange(n)
        inside = (tokens >= pattern.firsts[:, None]) & (
            tokens < (pattern.firsts + (1 << pattern.levels))[:, None]
        )
        expected = tokens <= np.arange(m)[:, None] if causal else np.ones((m, n))
        np.testing.assert_array_equal(full.astype(int) @ inside.astype(int), expected)
        for size in SIZES:
            assert (pattern.meets(Tiles.of(shape, *size), shape) >= holds(full, *size)).all()


def test_skipped_tiles_are_not_visited():
    """Of n = 4096 in blocks of 128 one tile in 32 holds pairs, and no other is listed; a query of a
    hierarchy sees O(log n) groups."""
    tiling = blocked._tiling(masks.Blocks(128), (4096, 4096), (128, 128))
    order, counts = tiling.listed
    assert (counts == 1).all() and (order[:, 0] == np.arange(32)).all()
    for n in (1 << 8, 1 << 11):
        lengths = masks.Hierarchical(4).lengths((n, n))
        seen = Levels(4, lengths).matrix(n, sum(lengths))
        assert seen.sum(axis=1).max() <= 12 + 8 * (len(lengths) - 1)


# ------------------------------------------------------------------ the largest scores


def test_ties_are_averaged(x64):
    """The mean over all ways to break the ties, whatever the order of the keys."""
    scores = np.array([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    v = np.random.default_rng(0).standard_normal((6, 2))
    mask = masks.TopK(3)
    one = jnp.ones((1, 1))
    for order in (np.arange(6), np.array([4, 0, 5, 3, 1, 2])):
        k = jnp.asarray(scores[order, None])
        mean, lse = jf.softmax_expectation(one, k, jnp.asarray(v[order]), mask=mask)
        ways = [[0, *pair] for pair in itertools.combinations([2, 3, 4], 2)]
        truth = [np.exp(scores[way]) @ v[way] / np.exp(scores[way]).sum() for way in ways]
        assert_close((mean[0], lse[0]), (np.mean(truth, axis=0), np.log(np.exp([3, 2, 2]).sum())))


def test_weights_do_not_order_keys_but_weigh_them(x64):
    q, keys, v = jnp.ones((1, 1)), jnp.array([[1.0], [2.0], [3.0]]), jnp.eye(3)
    b = jnp.array([5.0, jnp.log(2.0), -jnp.inf])  # the last has no mass
    fn = lambda k: jf.softmax_expectation(q, keys, v, b, mask=masks.TopK(k))
    assert_close(fn(1)[0], np.array([[0.0, 1.0, 0.0]]))
    w = np.exp([6.0, 2.0]) * [1, 2]
    assert_close(fn(9)[0], np.array([[*w / w.sum(), 0.0]]))


# ------------------------------------------------------------------ fields


# What a field makes of the operation does not depend on how that is computed.
PLAIN: dict[str, Any] = {"backend": "reference"}


@eqx.filter_jit
def velocity(field, mu):
    return field(0.0, mu.points, mu)


def sphere(n, d=3):
    return jf.measure.uniform_sphere(n, d, key=jax.random.key(1))


def test_blocks_are_measures_that_do_not_know_each_other(x64):
    mu = sphere(12)
    for interaction in (jf.Softmax(), jf.Hardmax()):
        field = jf.SelfAttention(beta=3.0, interaction=interaction, **PLAIN, mask=masks.Blocks(6))
        alone = jf.SelfAttention(beta=3.0, interaction=interaction, **PLAIN)
        parts = [velocity(alone, jf.Measure(y)) for y in (mu.points[:6], mu.points[6:])]
        assert_close(velocity(field, mu), np.concatenate(parts))
    field = jf.MultiHeadAttention(4, 2, **PLAIN, mask=masks.Blocks(6), key=jax.random.key(0))
    alone = jf.MultiHeadAttention(4, 2, **PLAIN, key=jax.random.key(0))
    mu = sphere(12, 4)
    parts = [velocity(alone, jf.Measure(y)) for y in (mu.points[:6], mu.points[6:])]
    assert_close(velocity(field, mu), np.concatenate(parts))


def test_unnormalised_attention_sums_what_is_seen(x64):
    mu, (mask, pairs) = sphere(20), PATTERNS["strided"]
    options = PLAIN | {"interaction": jf.Unnormalised(), "geometry": jf.Euclidean(), "mask": mask}
    x = np.asarray(mu.points)
    weights = pairs(20, 20) * np.exp(2.0 * x @ x.T) / 20
    assert_close(velocity(jf.SelfAttention(beta=2.0, **options), mu), weights @ x)


@pytest.mark.parametrize("mask", [masks.Blocks(5), masks.TopK(4), masks.Hierarchical(2)], ids=str)
def test_divergence(mask, x64):
    mu = sphere(12)
    field = jf.SelfAttention(jnp.diag(jnp.array([1.0, 2.0, 0.5])), beta=2.0, **PLAIN, mask=mask)
    compute = eqx.filter_jit(lambda divergence, field: divergence(field, 0.0, mu.points, mu))
    expected = compute(divergence_by_derivatives, field)
    assert_close(compute(jf.divergence, field), expected)


def test_hierarchical_is_exact_where_the_tokens_of_a_group_agree(x64):
    """Means of 1, 2, 4 keys that are equal in fours."""
    mu = jf.Measure(jnp.repeat(sphere(8).points, 4, axis=0))
    mask = masks.Hierarchical(2)
    assert len(mask.lengths((32, 32))) == 4
    mask = masks.Hierarchical(4)  # levels 0 to 2
    full, coarse = (
        jf.SelfAttention(beta=3.0, **PLAIN),
        jf.SelfAttention(beta=3.0, **PLAIN, mask=mask),
    )
    assert_close(velocity(coarse, mu), velocity(full, mu))


def test_observables_see_the_mask(x64):
    mu = sphere(12)
    field = jf.SelfAttention(beta=2.0, **PLAIN, mask=masks.Blocks(4))
    matrix = np.asarray(jf.observables.attention_matrix(field, mu))
    np.testing.assert_array_equal(matrix > 0, masks.Blocks(4).matrix(12, 12))
    entropy = jf.observables.attention_entropy(field, mu)
    assert_close(entropy, -(matrix * np.log(np.where(matrix > 0, matrix, 1))).sum() / 12)
    field = jf.SelfAttention(beta=2.0, **PLAIN, mask=masks.Hierarchical(2))
    matrix = jf.observables.attention_matrix(field, mu)
    assert_close(
        (matrix.sum(axis=1), matrix @ mu.points), (np.ones(12), field._force(mu.points, mu))
    )
    for mask in (masks.TopK(3), masks.Hierarchical(2)):
        with pytest.raises(NotImplementedError, match="attention_matrix"):
            jf.observables.attention_entropy(jf.SelfAttention(mask=mask), mu)


# ------------------------------------------------------------------ the choice


@pytest.mark.parametrize("mask", [masks.Blocks(8), masks.TopK(2), masks.Hierarchical(4)], ids=str)
def test_the_choice_falls_on_blocked(mask, monkeypatch):
    x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    assert select_backend(x, x, x, mask=mask, platform="cuda") == "blocked"
    assert describe_backend(x, x, x, mask=mask, platform="tpu").startswith("blocked (")
    tried = explain_backend(x, x, x, mask=mask, platform="cuda")
    assert all("masks are for reference and blocked" in c.verdict for c in tried[:-1])
    for name in set(BACKENDS) - {"reference", "blocked"}:
        with pytest.raises(NotImplementedError, match="masks are for reference and blocked"):
            select_backend(x, x, x, mask=mask, backend=name)


def test_masks_compare_by_value():
    pairs = [(masks.BlockSparse(TABLE, 5), masks.BlockSparse(TABLE.tolist(), 5))]
    pairs += [
        (masks.big_bird(window=1, tokens=1, blocks=1), masks.big_bird(window=1, tokens=1, blocks=1))
    ]
    for a, b in pairs:
        assert a == b and hash(a) == hash(b)
    assert masks.BlockSparse(TABLE, 5) != masks.BlockSparse(~TABLE, 5)
    assert "6 x 5" in repr(masks.BlockSparse(TABLE, 5))
