"""Models: what they compute, that they are causal, that depth is a policy, and generation."""

import functools
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow import models, solvers
from jaxflow.fields import time
from jaxflow.models import Depth, ImageClassifier, LanguageModel, ResidualNetwork, generation
from jaxflow.models.blocks import small
from jaxflow.models.generation import Chooser
from jaxflow.solvers import LieTrotter, Strang

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(1).integers(0, 11, (2, 6))
call = eqx.filter_jit(lambda model, inputs: model(inputs))


def filled(make, seed=0) -> Any:
    """What `make()` returns, with normal parameters that make every part matter: matrices of
    N(0, 1/4), gains of N(1, 1/16), biases of N(0, 1/16). Nothing has to be drawn or compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, a):
        if not is_shape(a):
            return a
        values = rng.normal(size=a.shape)
        gain = getattr(path[-1], "name", "") == "gain"
        return jnp.asarray(gain + values / (2 if a.ndim > 1 else 4), a.dtype)

    is_shape = lambda a: isinstance(a, jax.ShapeDtypeStruct)
    shapes = eqx.filter_eval_shape(make)
    return jax.tree_util.tree_map_with_path(draw, shapes, is_leaf=is_shape)


@functools.cache
def language_model(**options: Any) -> Any:
    return filled(lambda: LanguageModel(11, 8, 2, 2, 12, width=12, key=KEY, **options))


def with_depth(model, depth: Depth, field=None) -> Any:
    model = model if field is None else eqx.tree_at(lambda m: m.field, model, field)
    return model.with_depth(depth)


# ------------------------------------------------------------------ what is kept of tokens


def attention(**options: Any) -> Any:
    return filled(lambda: jf.MultiHeadAttention(4, 2, causal=True, key=KEY, **options), seed=2)


def single(**options: Any):
    rng = np.random.default_rng(4)
    q, k, v = (rng.normal(size=(4, 4)) for _ in range(3))
    return jf.SelfAttention(q, k, v, causal=True, geometry=jf.Euclidean(), **options)


def forward() -> Any:
    return filled(lambda: jf.FeedForward(4, 5, jnp.tanh, key=KEY), seed=3)


FIELDS = {
    "single": lambda: single(beta=0.7),
    "single, window": lambda: single(window=2),
    "on the sphere": lambda: jf.SelfAttention(beta=2.0, causal=True),
    "hardmax": lambda: single(interaction=jf.Hardmax()),
    "heads": lambda: attention(),
    "heads, rotary": lambda: attention(rotary=100.0),
    "heads, window": lambda: attention(window=(1, 3), rotary=100.0),
    "heads, biased, in groups": lambda: attention(bias=True, kv_heads=1, rotary=(2.0,)),
    "tied": lambda: filled(lambda: jf.fields.TiedAttention(4, 2, causal=True, key=KEY), seed=5),
    "gated": lambda: filled(lambda: jf.fields.GatedFeedForward(4, 5, key=KEY), seed=3),
    "whole": lambda: jf.fields.Whole(attention() + forward()),
    "feed-forward": forward,
    "drift": lambda: jf.LinearDrift(np.arange(16.0).reshape(4, 4)),
    "pre": lambda: jf.PreNorm(attention(rotary=10.0) + forward(), jf.LayerNorm(4)),
}


def token_by_token(field):
    """Each query from what is kept of the tokens up to it, kept one by one, with room for more; and
    the field."""
    n, t = 5, 0.4
    x = field.geometry.retract(jnp.asarray(np.random.default_rng(6).normal(size=(n, 4))))
    kept = jax.tree.map(
        lambda a: jnp.pad(a, [(0, n + 2)] + [(0, 0)] * (a.ndim - 1)),
        field.keys_values(t, x[:1], 0),
    )

    def step(kept, index):
        token = jax.lax.dynamic_slice_in_dim(x, index, 1)
        put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, index, axis=0)
        kept = jax.tree.map(put, kept, field.keys_values(t, token, index))
        return kept, field.attend(t, token, kept, index)[0]

    return jax.lax.scan(step, kept, jnp.arange(n))[1], field(t, x, jf.Measure(x))


@pytest.fixture(scope="module")
def continued():
    """Of all fields, as one program."""
    with jax.enable_x64(True):
        run = eqx.filter_jit(lambda fields: {k: token_by_token(f) for k, f in fields.items()})
        return run({name: make() for name, make in FIELDS.items()})


@pytest.mark.parametrize("name", FIELDS)
def test_token_by_token_is_the_causal_field(name, continued):
    rows, whole = continued[name]
    assert np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(rows, whole, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_rotary_scores_depend_on_differences():
    """Shifting all positions changes no row; without rotation the order of the tokens is not seen,
    with it it is. The angles are i base^(-2k/p)."""
    field, x = attention(rotary=100.0), jnp.asarray(np.random.default_rng(8).normal(size=(5, 4)))

    @eqx.filter_jit
    def rows(field, start):
        kept = field.keys_values(0.0, x, start)
        query = jf.MultiHeadAttention.keys_values(
            eqx.tree_at(lambda f: f.key, field, field.query), 0.0, x, start
        )[0]
        return jnp.einsum("mhp,nhp->hmn", query, kept[0]), query

    near, turned = rows(field, 0)
    far, _ = rows(field, 37)
    np.testing.assert_allclose(near, far, rtol=1e-11, atol=1e-11)
    plain, straight = rows(attention(), 0)
    assert np.abs(near - plain).max() > 0.1
    angle = np.arange(5)[:, None] * 100.0 ** (-2 * np.arange(1) / 2)
    a, b = np.split(np.asarray(straight), 2, axis=-1)
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    expected = np.concatenate([a * c - b * s, a * s + b * c], axis=-1)
    np.testing.assert_allclose(turned, expected, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_rotary_divergence_is_the_trace():
    field, x = attention(rotary=100.0), jnp.asarray(np.random.default_rng(8).normal(size=(5, 4)))
    mu = jf.Measure(x)

    @eqx.filter_jit
    def both(field):
        # The row of a query moves with that query alone: the trace of each diagonal block.
        jacobian = jax.jacfwd(lambda y: field(0.0, y, mu))(x)
        return jf.divergence(field, 0.0, x, mu), jnp.einsum("idid->i", jacobian)

    divergence, trace = both(field)
    np.testing.assert_allclose(divergence, trace, rtol=1e-12)


# ------------------------------------------------------------------ language models

VARIANTS: list[dict[str, Any]] = [
    {},
    {"placement": "peri", "norm": jf.RMSNorm, "tied": False},
    {"placement": "post", "rotary": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=["pre", "peri", "post"])
def test_language_models_are_causal(options):
    """A batch is its texts, and another token changes no logits before it."""
    model = language_model(**options)
    other = TOKENS.copy()
    other[1] = (TOKENS[0] + (np.arange(6) == 3)) % 11
    other[0] = TOKENS[0]
    logits = call(model, jnp.asarray(other))
    assert logits.shape == (2, 6, 11) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0, :3], logits[1, :3], atol=1e-5)
    assert (np.abs(logits[0] - logits[1]).max(axis=-1)[3:] > 1e-3).all()
    if not options:
        np.testing.assert_allclose(call(model, jnp.asarray(other[1])), logits[1], atol=1e-5)
    assert (model.output is None) == options.get("tied", True)
    assert (model.positions is None) == options.get("rotary", False)


@pytest.mark.usefixtures("x64")
def test_tokens_may_start_normalised():
    """x(0) = N_0(E[token] + position), in NumPy; and nothing of it in a model without."""
    model = language_model(normalised=True)
    found = np.asarray(model.embed(TOKENS).points)
    z = np.asarray(model.embedding)[TOKENS] + np.asarray(model.positions)[:6]
    z = (z - z.mean(axis=-1, keepdims=True)) / np.sqrt(z.var(axis=-1, keepdims=True) + 1e-5)
    expected = z * np.asarray(model.entry.gain) + np.asarray(model.entry.bias)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert language_model().entry is None


def test_the_default_is_the_transformer():
    """x += attention(LN x); x += feedforward(LN x), layer by layer; logits = E LN(x)."""
    model = filled(lambda: LanguageModel(11, 8, 2, 2, 12, key=KEY))

    @eqx.filter_jit
    def by_hand(model, tokens):
        x = model.embedding[tokens] + model.positions[:6]
        for layer in (0.5, 1.5):
            for part in model.field.at(layer).fields:
                x = x + part(layer, x, jf.Measure(x))
        return jnp.matmul(model.norm(x), model.embedding.T)

    tokens = jnp.asarray(TOKENS[0])
    np.testing.assert_allclose(call(model, tokens), by_hand(model, tokens), rtol=1e-11)


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    """Parameters, state and gradients stay float32; 8 bits of the products are left, and errors of
    2^-8 a product add up to a few of the spread of the logits in a hundred. One step of one block,
    which is where the dtype is."""
    wide, narrow = language_model(), language_model(dtype=jnp.bfloat16)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model, tokens):
        x = model.embed(tokens).points
        logits = model.read_out(jf.Measure(x + model.field(0.5, x, jf.Measure(x))))
        return (logits**2).mean(), logits

    (_, logits), gradient = loss(wide, jnp.asarray(TOKENS[0]))
    (_, rounded), other = loss(narrow, jnp.asarray(TOKENS[0]))
    assert rounded.dtype == jnp.float32
    assert {a.dtype for a in jax.tree.leaves(other)} == {jnp.dtype(jnp.float32)}
    assert 1e-5 < np.sqrt(np.mean((rounded - logits) ** 2)) / np.std(logits) < 0.05
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        assert np.linalg.norm(b - a) < 0.2 * np.linalg.norm(a)


def test_context_and_options_are_checked():
    model = language_model()
    with pytest.raises(ValueError, match="positions for 12 tokens, got 13"):
        model(jnp.zeros(13, jnp.int32))
    with pytest.raises(ValueError, match='placement must be "pre"'):
        language_model(placement="middle")
    with pytest.raises(ValueError, match="dtype is of the fields between norms"):
        language_model(placement="post", dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="at least two blocks"):
        filled(lambda: LanguageModel(11, 8, 2, 1, 12, curve=models.interpolated, key=KEY))


def test_initial_weights():
    """N(0, 0.02^2), those that end a block over sqrt(2 L); width 0 leaves attention alone."""
    first = lambda model: model.field.at(0.0)
    make = lambda width: first(LanguageModel(11, 4, 2, 1, 12, width=width, key=KEY))
    network = lambda: first(ResidualNetwork(3, 2, 4, 1, width=5, key=KEY))
    block, other = eqx.filter_jit(lambda: (make(5), network()))()
    attention, forward = (part.field for part in block.fields)
    rms = lambda a: float(np.sqrt(np.mean(np.asarray(a) ** 2)))
    for matrix in (attention.query, attention.value, forward.weight_in, other.weight_in):
        np.testing.assert_allclose(rms(matrix), 0.02, rtol=1e-5)
    for matrix in (attention.output, forward.weight_out, other.weight_out):
        np.testing.assert_allclose(rms(matrix), 0.02 / np.sqrt(2), rtol=1e-5)
    third = small(other, lambda field: field.weight_out, 3)
    np.testing.assert_allclose(rms(third.weight_out), 0.02 / np.sqrt(6), rtol=1e-5)
    alone: Any = eqx.filter_eval_shape(lambda: make(0))
    assert isinstance(alone, jf.PreNorm) and isinstance(alone.field, jf.MultiHeadAttention)


# ------------------------------------------------------------------ depth


@pytest.mark.slow
def test_curves_of_models():
    """Each curve runs with the default depth, and starts where it says."""
    depth = Depth(t1=2.0, steps=2)
    blocks: list[Any] = [filled(lambda: jf.FeedForward(4, 4, key=KEY), seed) for seed in range(3)]
    x = jf.Measure(jnp.ones((3, 4)))
    for curve in (models.shared, models.smooth, models.fourier, models.hypernetwork):
        at = eqx.filter_jit(lambda c: c.at(1.3))(curve(blocks, 2.0))
        assert eqx.tree_equal(at, blocks[0], rtol=1e-6, atol=1e-6)
    hat = jf.TimeDependent(models.interpolated(blocks[:2], 2.0))
    layers = jf.TimeDependent(models.layered(blocks[:2], 2.0))
    assert depth.flow(hat, x).stats["num_steps"] == 2
    assert eqx.tree_equal(layers.at(1.5), blocks[1])
    assert time.jumps(layers) == (1.0,)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_adaptive_depth():
    """A tolerance is met, and many fixed steps converge to the same; so does a gradient."""
    curve = models.interpolated
    model = filled(lambda: ResidualNetwork(3, 2, 4, 2, width=5, curve=curve, activation=jnp.tanh,
                                           key=KEY))  # fmt: skip
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
    loss = eqx.filter_jit(eqx.filter_value_and_grad(lambda m, x: (m(x) ** 2).sum()))
    adaptive = with_depth(model, Depth(t1=1.0, tolerance=1e-8, solver=diffrax.Tsit5()))
    fixed = with_depth(model, Depth(t1=1.0, steps=64, solver=diffrax.Bosh3()))
    (value, gradient), (truth, expected) = loss(adaptive, x), loss(fixed, x)
    np.testing.assert_allclose(value, truth, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    solved = eqx.filter_jit(lambda m: m.solve(x))(adaptive)
    assert solved.ok and 2 < solved.stats["num_steps"] < 200


@pytest.mark.slow
def test_depth_changes_without_training():
    """A smooth curve, sampled at fewer or more layers, gives logits that converge as 1/layers."""
    model = language_model(curve=models.interpolated)
    slow = jax.tree.map(lambda a: a / 4 if eqx.is_inexact_array(a) and a.ndim > 2 else a, model)
    tokens = jnp.asarray(TOKENS[0])

    def layers(count):
        curve = time.sample(slow.field.curve, np.linspace(0, 2, count + 1))
        return call(with_depth(slow, Depth(t1=2.0, steps=count), jf.TimeDependent(curve)), tokens)

    truth = layers(48)
    errors = [np.abs(layers(count) - truth).max() / np.abs(truth).max() for count in (4, 12)]
    assert errors[1] < errors[0] / 2 and errors[1] < 0.1


def test_observed_along_the_depth():
    """int |x|^2 dt by the trapezoidal rule, for x' = x with two Euler steps: 1, 2, 4."""
    depth = Depth(t1=2.0, steps=2, solver=diffrax.Euler())
    model = filled(lambda: ResidualNetwork(3, 2, 4, 1, width=5, key=KEY))
    model = with_depth(model, depth, jf.LinearDrift(1.0))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)), jnp.float32)
    observe = {"square": lambda t, mu: (mu.points**2).sum()}
    solved = eqx.filter_jit(lambda m, x: m.solve(x, observe))(model, x)
    start = (model.embed(x).points ** 2).sum(axis=(1, 2))
    np.testing.assert_allclose(solved.ts, [0.0, 1.0, 2.0])
    np.testing.assert_allclose(solved.observed["square"], np.outer([1, 4, 16], start), rtol=1e-5)
    np.testing.assert_allclose(solved.integral("square"), 12.5 * start, rtol=1e-5)
    with pytest.raises(ValueError, match="nothing was observed"):
        eqx.filter_jit(lambda m, x: m.solve(x))(model, x).integral("square")


@pytest.mark.parametrize("count", (2, 4))
def test_costs_see_both_sides_of_a_jump(count):
    """int |a(t) x|^2 dt with a = 0 up to t = 1 and 1 from then on, by the trapezoidal rule."""
    pieces = jf.PiecewiseConstant([jf.LinearDrift(0.0), jf.LinearDrift(1.0)], [0.0, 1.0, 2.0])
    model: Any = filled(lambda: ResidualNetwork(3, 2, 4, 1, width=5, key=KEY))
    depth = Depth(t1=2.0, steps=count, solver=diffrax.Euler())
    model = with_depth(model, depth, jf.TimeDependent(pieces))
    x = jnp.ones((1, 3))
    cost = {"kinetic": jf.observables.KineticEnergy(model.field)}
    found = eqx.filter_jit(lambda m, x: m.solve(x, cost))(model, x)
    start = float(found.observed["kinetic"].after[-1, 0]) / (2.0 if count == 2 else 1.5**2) ** 2
    # |x| doubles over one step of length 1, or grows by 3/2 twice.
    sizes = np.array([1.0, 4.0]) if count == 2 else np.array([1.0, 2.25, 5.0625])
    expected = np.trapezoid(sizes, dx=2.0 / count) * start
    np.testing.assert_allclose(found.integral("kinetic")[0], expected, rtol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_gradient_of_layers_calls_no_host(layers):
    """The ends of the steps are known and checked beforehand, also where layers end."""
    lm = LanguageModel(7, 8, 2, layers, 5, key=jax.random.key(0))
    params, static = eqx.partition(lm, eqx.is_inexact_array)
    loss = lambda params, tokens: eqx.combine(params, static)(tokens).sum()
    assert "callback" not in str(jax.make_jaxpr(jax.grad(loss))(params, jnp.zeros(5, jnp.int32)))


def test_a_depth_that_is_not_reached_raises():
    model: Any = filled(lambda: ResidualNetwork(3, 2, 4, 1, width=5, key=KEY))
    short = Depth(t1=1.0, tolerance=1e-6, solver=diffrax.Tsit5(), max_steps=1)
    model = with_depth(model, short, jf.LinearDrift(3.0))
    assert not eqx.filter_jit(lambda m, x: m.solve(x))(model, jnp.ones((1, 3))).ok
    with pytest.raises(Exception, match="did not reach T"):
        jax.block_until_ready(call(model, jnp.ones((1, 3))))


def test_fixed_steps_are_differentiated_by_one_scan():
    """Its derivatives in both modes are that of diffrax's own loop; a step is made again for them
    unless it is kept."""
    model = models.ResidualNetwork(2, 2, 4, 2, width=8, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    x = jax.random.normal(KEY, (3, 2))

    def loss(adjoint, params):
        whole = eqx.combine(params, static)
        return (whole.with_depth(Depth(1.0, steps=2, adjoint=adjoint))(x) ** 2).sum()

    gradient = lambda adjoint: jax.grad(functools.partial(loss, adjoint))
    expected = jax.jit(gradient(solvers.default_adjoint(2)))(params)
    for adjoint, again in [(None, True), (solvers.ScanAdjoint(keep=True), False)]:
        traced = jax.jit(gradient(adjoint)).trace(params)
        assert any(name in str(traced.jaxpr) for name in ("remat", "checkpoint")) == again
        found = traced.lower().compile()(params)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # sums in another order
    along = jax.jit(lambda params: jax.jvp(functools.partial(loss, None), (params,), (params,))[1])
    products = jax.tree.map(lambda a, g: (a * g).sum(), params, expected)
    assert along(params) == pytest.approx(float(sum(jax.tree.leaves(products))), rel=1e-5)
    with pytest.raises(ValueError, match="takes StepTo.* got PIDController and max_steps=4096"):
        jf.flow(jf.LinearDrift(1.0), jf.Measure(x), t1=1.0, adjoint=solvers.ScanAdjoint())


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_any_adjoint():
    """The gradient by the adjoint equation is that of the steps, up to their error."""
    options: Any = {"curve": models.shared, "activation": jnp.tanh, "key": KEY}
    model: Any = filled(lambda: ResidualNetwork(3, 2, 4, 1, width=5, **options))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
    gradients = []
    for adjoint in (None, diffrax.BacksolveAdjoint(), diffrax.DirectAdjoint()):
        depth = Depth(1.0, tolerance=1e-9, solver=diffrax.Tsit5(), adjoint=adjoint, max_steps=256)
        gradient = eqx.filter_jit(eqx.filter_grad(lambda m, x: (m(x) ** 2).sum()))
        gradients.append(gradient(model.with_depth(depth), x).field)
    first, *others = (jax.tree.leaves(eqx.filter(g, eqx.is_inexact_array)) for g in gradients)
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    backwards = model.with_depth(Depth(1.0, steps=4, adjoint=diffrax.BacksolveAdjoint()))
    with pytest.raises(ValueError, match="keeps no path"):
        backwards.solve(x, {"mean": lambda t, mu: mu.points.mean()})


def test_keys_are_kept_for_weights_over_the_visible_tokens_alone():
    field = single(interaction=jf.Unnormalised())
    x = jnp.ones((3, 4), jnp.float32)
    with pytest.raises(NotImplementedError, match="cache=False"):
        field.attend(0.0, x[:1], x, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"t1": 1.0}, "either `steps` or a `tolerance`"),
        ({"t1": 1.0, "steps": 1, "tolerance": 1e-3}, "either `steps` or a `tolerance`"),
        ({"t1": 1.0, "steps": 0}, "steps must be at least 1"),
        ({"t1": 1.0, "tolerance": 0.0, "solver": diffrax.Tsit5()}, "tolerance must be positive"),
        ({"t1": 0.0, "steps": 1}, "must be positive and finite"),
        ({"t1": float("inf"), "steps": 1}, "must be positive and finite"),
        ({"t1": 1.0, "tolerance": 1e-3}, "LieTrotter takes fixed steps"),
    ],
)
def test_depth_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Depth(**options)


# ------------------------------------------------------------------ generation

slow = pytest.mark.slow
SOLVERS: list[Any] = [
    pytest.param({}, LieTrotter(), id="layers"),
    pytest.param({"placement": "post"}, diffrax.Heun(), id="heun on a sphere", marks=slow),
    pytest.param({"curve": models.interpolated, "rotary": True}, Strang(), id="strang", marks=slow),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options, solver", SOLVERS)
def test_a_cache_changes_no_token(options, solver):
    """One text from one key, with and without keys and values kept; with layers, past the context
    too."""
    model = filled(lambda: LanguageModel(11, 8, 2, 2, 8, width=12, key=KEY, **options))
    model = with_depth(model, Depth(t1=2.0, steps=2, solver=solver))
    assert generation.can_be_cached(model)
    prompt = jnp.asarray(TOKENS[0][:3], jnp.int32)
    added = 5 if options else 7
    draw = functools.partial(model.generate, prompt, added, temperature=4.0, top_p=0.95, key=KEY)
    texts = [draw(cache=cache) for cache in (True, False)]
    assert texts[0].shape == (3 + added,) and (texts[0][:3] == prompt).all()
    np.testing.assert_array_equal(texts[0], texts[1])
    assert len(set(np.asarray(texts[0][3:]).tolist())) > 1
    if options:
        return
    # Each prompt of a batch goes on as it would alone, with a key of its own.
    batch = jnp.stack([prompt, prompt[::-1]])
    both = model.generate(batch, 5, temperature=0.0, top_p=0.95)
    for found, one in zip(both, batch, strict=True):
        alone = model.generate(one, added, temperature=0.0, top_p=0.95)
        np.testing.assert_array_equal(found, alone[:8])
    keys, own = generation.split(KEY, (2,), 5), jax.random.split(KEY, 2)[1]
    assert (keys[1] == generation.split(own, (), 5)).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_greedy_text_is_the_argmax_of_the_logits():
    """Past the context too, where the last 6 tokens are seen."""
    model = filled(lambda: LanguageModel(11, 8, 2, 2, 6, width=12, key=KEY))
    text = np.asarray(TOKENS[0][:4])
    for _ in range(5):
        seen = np.zeros(6, int)  # What follows a token does not move its logits.
        seen[: len(text[-6:])] = text[-6:]
        text = np.append(text, int(call(model, jnp.asarray(seen))[min(len(text), 6) - 1].argmax()))
    prompt = jnp.asarray(TOKENS[0][:4], jnp.int32)
    np.testing.assert_array_equal(model.generate(prompt, 5, temperature=0.0), text)
    assert model.generate(prompt, 0, key=KEY).shape == (4,)


LOGITS = np.array([0.3, 2.0, -1.0, 1.1, 0.0])


@pytest.mark.parametrize(
    "temperature, top_k, top_p, kept",
    [
        (1.0, None, None, [0, 1, 2, 3, 4]),
        (0.5, None, None, [0, 1, 2, 3, 4]),
        (1.0, 3, None, [0, 1, 3]),
        (2.0, 1, None, [1]),
        (1.0, 99, 1.0, [0, 1, 2, 3, 4]),
        (1.0, None, 0.7, [1, 3]),  # 0.56 + 0.23
        (1.0, None, 0.5, [1]),
        (2.0, 2, 0.9, [1, 3]),
    ],
)
def test_draws_have_the_exact_distribution(temperature, top_k, top_p, kept):
    """20000 draws, within five standard errors."""
    weights = np.where(np.isin(np.arange(5), kept), np.exp(LOGITS / temperature), 0)
    exact = weights / weights.sum()
    choose = Chooser(jnp.asarray(temperature, float), top_k, top_p)
    count = 20_000
    draw = jax.jit(jax.vmap(lambda key: choose(jnp.asarray(LOGITS, jnp.float32), key)))
    found = np.bincount(draw(jax.random.split(KEY, count)), minlength=5) / count
    assert (found[exact == 0] == 0).all()
    assert (np.abs(found - exact) <= 5 * np.sqrt(exact * (1 - exact) / count)).all()


def test_ties_at_the_border_are_kept():
    choose = Chooser(jnp.asarray(1.0), 2, None)
    kept = choose._restricted(jnp.array([1.0, 3.0, 1.0, 0.0]))
    np.testing.assert_array_equal(np.isfinite(kept), [True, True, True, False])


@pytest.mark.parametrize(
    "prompt, length, options, message",
    [
        ([], 3, {}, "at least one token"),
        ([[[1, 2]]], 3, {}, "at least one token"),
        ([1, 11], 3, {}, r"tokens must be in 0, ..., 10, got 1 to 11"),
        ([1, -1], 3, {}, "tokens must be in 0"),
        ([1], -1, {}, "must be at least 0, got -1"),
        ([1], 3, {"top_k": 0}, "top_k must be at least 1"),
        ([1], 3, {"top_p": 0.0}, "top_p must be in"),
        ([1], 3, {"top_p": 1.5}, "top_p must be in"),
        ([1], 3, {"temperature": -1.0}, "temperature must be 0 or positive"),
        ([1], 3, {"key": None}, "drawing tokens needs key"),
    ],
)
def test_generation_errors(prompt, length, options, message):
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "key": KEY} | options
    with pytest.raises(ValueError, match=message):
        generation.check(np.asarray(prompt, np.int32), 11, length, **settings)


class Mean(jf.AbstractField):
    """The mean of the tokens up to the query, minus the query: a field that keeps nothing."""

    geometry: Any = jf.Euclidean()

    def __call__(self, t, x, mu):
        return jnp.cumsum(mu.points, axis=0) / jnp.arange(1.0, mu.n + 1)[:, None] - x


def test_a_field_that_keeps_nothing_generates_without_a_cache(monkeypatch):
    """Alone and inside others; so do adaptive steps and implicit methods."""
    model = language_model()
    assert generation.can_be_cached(model)
    both = model.field.at(0.0) + jf.PreNorm(Mean(), jf.LayerNorm(8))
    others = [
        with_depth(model, model.depth, Mean()),
        with_depth(model, model.depth, jf.TimeDependent(jf.Constant(both))),
        with_depth(model, Depth(t1=2.0, steps=2, solver=diffrax.Kvaerno3())),
        with_depth(model, Depth(t1=2.0, tolerance=1e-3, solver=diffrax.Tsit5())),
    ]
    assert not any(generation.can_be_cached(other) for other in others)
    added = lambda model, tokens, length, *_: jnp.append(tokens, jnp.full(length, 7, tokens.dtype))
    monkeypatch.setattr(generation, "plainly", added)
    text = others[0].generate(jnp.asarray([1, 2], jnp.int32), 3, temperature=0)
    assert text.tolist() == [1, 2, 7, 7, 7]


def test_generation_checks_the_steps():
    """Steps over a layer's end are refused with a cache as without."""
    model = with_depth(language_model(), Depth(t1=2.0, steps=3))
    with pytest.raises(ValueError, match="none ends at 1.0"):
        model.generate(jnp.asarray([1, 2], jnp.int32), 3, temperature=0)


# ------------------------------------------------------------------ images and vectors


@pytest.mark.parametrize("class_token", [False, True], ids=["mean", "class token"])
def test_image_classifiers(class_token):
    """Patches in the order of reading; a batch is its images; permuted patches with permuted
    positions give the same logits."""
    model = filled(
        lambda: ImageClassifier(
            (4, 6, 2), 3, 8, 2, 1, patch=2, width=8, class_token=class_token, key=KEY
        )
    )
    images = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 6, 2)), jnp.float32)
    logits = call(model, images)
    assert logits.shape == (2, 3)
    if class_token:
        np.testing.assert_allclose(call(model, images[0]), logits[0], atol=1e-5)
    tokens = model.embed(images).points
    assert tokens.shape == (2, 6 + class_token, 8)
    patch = np.asarray(images[1, 2:4, 4:6]).reshape(-1)  # the last one
    last = model.embedding.weight @ patch + model.embedding.bias + model.positions[-1]
    np.testing.assert_allclose(tokens[1, -1], last, rtol=1e-5, atol=1e-5)
    swapped = eqx.tree_at(
        lambda m: m.positions, model, model.positions[np.array([3, 4, 5, 0, 1, 2])]
    )
    other = jnp.concatenate([images[:, 2:], images[:, :2]], axis=1)
    np.testing.assert_allclose(call(swapped, other), logits, atol=1e-5)
    with pytest.raises(ValueError, match="images must have shape"):
        model(images[:, :2])


def test_image_classifier_errors():
    with pytest.raises(ValueError, match="patch must divide the image, got 4 for 4 x 6"):
        ImageClassifier((4, 6, 2), 3, 8, 2, 1, patch=4, key=KEY)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_residual_network_is_its_loop():
    """x <- x + (1/L) F_l(x), with the gradients; single samples, batches and images."""
    model = filled(lambda: ResidualNetwork(12, 2, 4, 3, width=5, activation=jnp.tanh, key=KEY))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 12)))

    def by_hand(model, x):
        y = jnp.matmul(x, model.embedding.weight.T) + model.embedding.bias[None]
        for layer in range(3):
            y = y + model.field.at((layer + 0.5) / 3)(0.0, y, jf.Measure(y)) / 3
        return jnp.matmul(y, model.output.weight.T) + model.output.bias[None]

    loss = lambda fn: eqx.filter_jit(eqx.filter_value_and_grad(lambda m, x: (fn(m, x) ** 2).sum()))
    value, gradient = loss(lambda m, x: m(x))(model, x)
    truth, expected = loss(by_hand)(model, x)
    np.testing.assert_allclose(value, truth, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    outputs = eqx.filter_jit(by_hand)(model, x)
    single = call(model, x[0])
    assert single.shape == (2,)
    np.testing.assert_allclose(single, outputs[0], rtol=1e-12)
    shapes = eqx.filter_eval_shape(
        lambda m: [m(x.reshape(5, 2, 3, 2)), m(x[0].reshape(2, 3, 2))], model
    )
    assert [s.shape for s in shapes] == [(5, 2), (2,)]
    for wrong in (x[:, :6], x.reshape(10, 6), jnp.ones(11)):
        with pytest.raises(ValueError, match="takes 12 features"):
            model(wrong)
