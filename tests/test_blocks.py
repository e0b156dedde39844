"""The blocks of language models: what they compute, that each trains, generates and is built by
name, and one's own."""

import json
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow import models, training
from jaxflow.fields import GatedFeedForward, TiedAttention, Whole
from jaxflow.models import LanguageModel, generation

KEY = jax.random.key(0)
SIZES: Any = {"vocab_size": 256, "dim": 8, "heads": 4, "layers": 2, "context": 8}
NAMES = list(models.BLOCKS)


def block(name: str, **options: Any):
    return models.BLOCKS[name](8, 4, 2, **options)


def shapes(name: str, **options: Any) -> Any:
    """A model of shapes: nothing is drawn or compiled."""
    return eqx.filter_eval_shape(
        lambda: LanguageModel(**SIZES, block=block(name), key=KEY, **options)
    )


def filled(shape: Any) -> Any:
    rng = np.random.default_rng(3)
    is_shape = lambda a: isinstance(a, jax.ShapeDtypeStruct)
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape) / 2, a.dtype) if is_shape(a) else a
    return jax.tree.map(draw, shape, is_leaf=is_shape)


# ------------------------------------------------------------------ attention


@pytest.mark.usefixtures("x64")
def test_grouped_queries_with_biases():
    """By hand in NumPy, and the divergence by the trace of the derivative."""
    make = lambda: jf.MultiHeadAttention(6, 4, kv_heads=2, head_dim=3, bias=True, key=KEY)
    field = filled(eqx.filter_eval_shape(make))
    x = np.random.default_rng(8).normal(size=(5, 6))

    @eqx.filter_jit
    def all_of(field, x):
        mu = jf.Measure(x)
        jacobian = jax.jacfwd(lambda y: field(0.0, y, mu))(x)
        return field(0.0, x, mu), jf.divergence(field, 0.0, x, mu), jnp.einsum("idid->i", jacobian)

    velocity, divergence, trace = all_of(field, jnp.asarray(x))
    by_hand = np.asarray(field.output_bias)[None]
    for head in range(4):
        group = head // 2
        of = lambda a, b, k: x @ np.asarray(a)[k].T + np.asarray(b).reshape(-1, 3)[k]
        q = of(field.query, field.query_bias, head)
        k, v = of(field.key, field.key_bias, group), of(field.value, field.value_bias, group)
        weights = np.exp(q @ k.T / np.sqrt(3))
        weights /= weights.sum(axis=1, keepdims=True)
        by_hand = by_hand + weights @ v @ np.asarray(field.output)[head].T
    np.testing.assert_allclose(velocity, by_hand, rtol=1e-12)
    np.testing.assert_allclose(divergence, trace, rtol=1e-11)


def test_new_attention_is_without_biases():
    """Where it has some, each group of heads has one of its own."""
    options: Any = {"kv_heads": 1, "key": KEY}
    make = lambda bias: jf.MultiHeadAttention(4, 2, bias=bias, **options)
    plain, biased = (eqx.filter_eval_shape(make, bias) for bias in (False, True))
    sizes = {"query_bias": 4, "key_bias": 2, "value_bias": 2, "output_bias": 4}
    for name, size in sizes.items():
        assert getattr(plain, name) is None and getattr(biased, name).shape == (size,)


@pytest.mark.parametrize("interaction", [jf.fields.Softmax(), jf.fields.Sinkhorn(3)])
def test_the_tokens_of_a_measure_are_projected_at_once(interaction):
    """One product for Q, K and V, also inside a norm, with the velocities of other points there."""
    options: Any = {"kv_heads": 2, "bias": True, "rotary": 100.0, "interaction": interaction}
    field = filled(eqx.filter_eval_shape(lambda: jf.MultiHeadAttention(8, 4, **options, key=KEY)))
    around = jf.PreNorm(field, jf.fields.LayerNorm(8))
    mu = jf.Measure(jax.random.normal(KEY, (5, 8)))
    same = lambda mu: around(0.0, mu.points, mu)
    other = lambda mu: around(0.0, mu.points + 0, mu)
    np.testing.assert_allclose(same(mu), other(mu), rtol=1e-5, atol=1e-6)
    counts = [str(jax.make_jaxpr(fn)(mu)).count("dot_general") for fn in (same, other)]
    assert counts[0] <= counts[1] - 2


@pytest.mark.parametrize("name", ["gpt2", "llama", "parallel", "attention"])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_of_a_block_has_biases_on_request(name, bias):
    made = eqx.filter_eval_shape(block(name, bias=bias), KEY)
    is_attention = lambda node: isinstance(node, jf.MultiHeadAttention)
    [attention] = filter(is_attention, jax.tree.leaves(made, is_leaf=is_attention))
    assert (attention.query_bias is not None) is (attention.output_bias is not None) is bias


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_heads": 3}, "kv_heads must divide heads, got 3 and 4"),
        ({"kv_heads": 0}, "kv_heads must be at least 1"),
        ({"rotary": (1.0,) * 3}, "have 1 rates, got 3"),
        ({"rotary": 100.0, "head_dim": 3}, "even head dimension, got 3"),
    ],
)
def test_heads_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        jf.MultiHeadAttention(8, 4, key=KEY, **options)


# ------------------------------------------------------------------ what blocks are made of


@pytest.mark.parametrize("name", NAMES)
def test_parts_and_positions(name):
    """What a splitting method steps with; and that a block without rotary positions learns some."""
    model = shapes(name)
    kinds = {
        "gpt2": (jf.MultiHeadAttention, jf.FeedForward),
        "llama": (jf.MultiHeadAttention, GatedFeedForward),
        "parallel": (Whole,),
        "attention": (jf.MultiHeadAttention,),
        "theory": (TiedAttention,),
    }
    parts = eqx.filter_eval_shape(lambda model: model.field.at(0.0).parts, model)
    inner = [part.field if isinstance(part, jf.PreNorm) else part for part in parts]
    assert tuple(map(type, inner)) == kinds[name]
    assert (model.positions is None) == (name == "llama")
    spheres = isinstance(model.field.geometry, jf.Sphere)
    assert spheres == (name == "theory")


@pytest.mark.parametrize("curve", models.CURVES)
def test_every_block_moves_along_every_curve(curve):
    """Blocks of one structure, whose parameters a curve can combine."""
    options = {"curve": models.CURVES[curve]}
    sizes = SIZES | {"layers": 3}
    for name in NAMES:
        model = eqx.filter_eval_shape(
            lambda name=name: LanguageModel(**sizes, block=block(name), key=KEY, **options)
        )
        x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
        run = lambda field, x: field(1.3, x, jf.Measure(x))
        assert eqx.filter_eval_shape(run, model.field, x).shape == (4, 8)
        assert eqx.filter_eval_shape(generation.can_be_cached, model)


def test_every_parameter_has_a_gradient():
    """Of one step along each block, of all blocks as one program."""
    fields = {name: filled(eqx.filter_eval_shape(block(name), KEY)) for name in NAMES}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8)), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(params):
        moved = 0.0
        for name, part in params.items():
            field = eqx.combine(part, static[name])
            y = field.geometry.retract(x)
            moved += ((y + field(0.0, y, jf.Measure(y))) ** 3).sum()
        return moved

    pairs = {name: eqx.partition(field, eqx.is_inexact_array) for name, field in fields.items()}
    static = {name: rest for name, (_, rest) in pairs.items()}
    found = gradient({name: params for name, (params, _) in pairs.items()})
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path)
        # Softmax does not see what is the same for all keys.
        floor = 0 if "key_bias" in name else 1e-4
        assert np.isfinite(leaf).all() and np.abs(leaf).max() >= floor, name


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_every_block_generates_with_a_cache_what_it_does_without(name):
    model = filled(shapes(name))
    prompt = np.array([255, 3, 7], np.uint8)
    draw = lambda cache: model.generate(prompt, 4, temperature=4.0, cache=cache, key=KEY)
    texts = draw(True), draw(False)
    np.testing.assert_array_equal(*texts)
    assert len(set(np.asarray(texts[0][3:]).tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "theory"])
def test_a_block_learns_a_text(name, tmp_path):
    """A text of one letter pattern, in 40 steps; and the run gives back what was trained."""
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 200)
    data = training.text_data(path, context=8, batch_size=8)
    config = SIZES | {"model": "LanguageModel", "block": name, "seed": 1}
    model = models.build(config)
    fitted = training.fit(
        model, data, steps=40, optimiser=training.adamw(40, learning_rate=3e-2), key=KEY,
        run=tmp_path / "run", config={"model": config},
    )  # fmt: skip
    assert fitted.validation_loss < 0.6 * np.log(256)
    loaded = training.load(tmp_path / "run", which="latest")
    assert eqx.tree_equal(loaded, fitted.model)


# ------------------------------------------------------------------ by name


def test_blocks_by_name():
    """A configuration in JSON, with and without arguments of the block, is the call in Python."""
    config = SIZES | {"model": "LanguageModel", "norm": "rms"}
    config["block"] = {"name": "llama", "kv_heads": 1, "width": 5, "dtype": "bfloat16"}
    built = eqx.filter_eval_shape(lambda: models.build(json.loads(json.dumps(config))))
    made = models.llama(8, 4, 2, kv_heads=1, width=5, dtype=jnp.bfloat16)
    expected = eqx.filter_eval_shape(
        lambda: LanguageModel(**SIZES, block=made, norm=jf.RMSNorm, key=KEY)
    )
    assert eqx.tree_equal(built, expected)
    config["block"] = {"name": "gpt2", "activation": "relu", "norm": "rms", "bias": False}
    built = eqx.filter_eval_shape(lambda: models.build(config))
    expected = eqx.filter_eval_shape(
        lambda: LanguageModel(**SIZES, activation=jax.nn.relu, norm=jf.RMSNorm, key=KEY)
    )
    assert eqx.tree_equal(built, expected)
    config["block"] = {"name": "attention", "norm": None}
    plain = eqx.filter_eval_shape(lambda: models.build(config)).field.curve.coefficients
    assert isinstance(plain, jf.MultiHeadAttention)


@pytest.mark.parametrize(
    "given, message",
    [
        ("gpt3", "block must be one of gpt2, llama"),
        ({}, "block must be one of gpt2, llama"),
        ({"name": "llama", "heads": 2}, "are those of the model"),
        ({"name": "theory", "width": 3}, "theory takes no argument width"),
        ({"name": "llama", "kv_heads": 3}, "kv_heads must divide heads"),
        ({"name": "gpt2", "placement": "post", "dtype": "bfloat16"}, "dtype is of the fields"),
    ],
)
def test_names_that_make_no_block(given, message):
    with pytest.raises(ValueError, match=message):
        models.build(SIZES | {"model": "LanguageModel", "block": given})


# ------------------------------------------------------------------ own blocks


def test_an_own_block():
    """Any function of a key; what it makes anew each time, such as a lambda, is one structure."""
    own = lambda key: (
        jf.PreNorm(jf.MultiHeadAttention(8, 2, causal=True, key=key), jf.RMSNorm(8))
        + jf.FeedForward(8, 3, lambda x: x * x, key=key)
    )
    make = lambda **options: eqx.filter_eval_shape(
        lambda: LanguageModel(256, 8, layers=2, context=8, block=own, key=KEY, **options)
    )
    model = make(curve=models.smooth)
    assert len(model.field.parts) == 2 and model.positions is not None
    run = lambda model, tokens: model(tokens)
    logits = eqx.filter_eval_shape(run, model, jax.ShapeDtypeStruct((3, 5), jnp.uint8))
    assert logits.shape == (3, 5, 256)
    assert make(rotary=True).positions is None


def wide(key):
    return jf.FeedForward(6, 2, key=key)


def seeing(key):
    return jf.FeedForward(8, 2, key=key) + jf.MultiHeadAttention(8, 2, key=key)


class Mean(jf.fields.AbstractField):
    """Moves each token by the mean of all, the later ones included, and does not say so."""

    geometry: jf.Euclidean = jf.Euclidean()

    def __call__(self, t, x, mu):
        return jnp.broadcast_to(mu.points.mean(axis=0), x.shape)


@pytest.mark.parametrize(
    "own, options, error, message",
    [
        (lambda key: 3, {}, TypeError, "only fields can be added"),
        (lambda: 3, {}, TypeError, "block must be a function of a PRNG key .* 0 positional"),
        (Mean(), {}, TypeError, "and not the field itself, a Mean"),
        (lambda key: Mean(), {}, ValueError, "the first of two tokens changes with the second"),
        (wide, {}, ValueError, "acts on tokens of dimension 6; got tokens of dimension 8"),
        (seeing, {}, ValueError, "the MultiHeadAttention is not causal: pass causal=True"),
        (block("theory"), {"width": 3}, ValueError, "width is an argument of the default block"),
        (block("theory"), {"bias": True}, ValueError, "bias is an argument of the default block"),
    ],
    ids=["no field", "no key", "a field", "mean", "dim", "causal", "width", "bias"],
)
def test_blocks_that_cannot_be(own, options, error, message):
    with pytest.raises(error, match=message):
        LanguageModel(**SIZES, block=own, key=KEY, **options)


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
)
def test_prompts_of_any_integers(dtype):
    """As they come, however few bits they have, at a vocabulary that those cannot count."""
    for make in (np.asarray, jnp.asarray):
        if make is jnp.asarray and np.dtype(dtype).itemsize == 8:
            continue
        found = generation.tokens(make(np.array([0, 100], dtype)), 256)
        assert found.dtype == jnp.int32 and found.tolist() == [0, 100]


def test_every_tokenizer_feeds_a_model():
    """Vocabularies of 256 and prompts of four tokens, so that one program serves all."""
    pytest.importorskip("tokenizers")
    alphabet = "".join(map(chr, range(32, 288)))
    pairs = training.BPE(256).fit(["abcd"])
    tokenizers = [training.Bytes(), training.Chars(alphabet), pairs]
    tokenizers.append(training.TokenizerFile(pairs.model))
    model = filled(shapes("attention"))
    for tokenizer in tokenizers:
        assert tokenizer.vocab_size == 256
        text = model.generate(tokenizer.encode("abcd"), 2, temperature=0)
        assert tokenizer.decode(text).startswith("abcd"[:3]) and text.shape == (6,)
