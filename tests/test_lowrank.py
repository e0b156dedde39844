"""Low-rank changes of curves: nothing at the start, trained alone, merged into a plain curve."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import published
import pytest
from test_models import language_model
from test_training import KEY, Points, arrays, fit, losses, network, same

import jaxflow as jf
from jaxflow import models, training
from jaxflow.fields import LowRank, adapters

X = jnp.asarray(Points().batch(0)[0])
CURVES = {
    "layers": models.layered,
    "shared": models.shared,
    "smooth": models.smooth,
    "linear": models.interpolated,
    "hyper": models.hypernetwork,
}


def drawn(tree, seed=0) -> Any:
    """The tree with other numbers in its low-rank changes, so that they matter."""
    rng = np.random.default_rng(seed)
    changes, rest = eqx.partition(tree, adapters(tree))
    new = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 2, a.dtype), changes)
    return eqx.combine(new, rest)


def numbers(tree) -> int:
    return sum(a.size for a in arrays(tree))


# ------------------------------------------------------------------ what it is


def test_a_change_is_its_formula():
    """M(t) + sum_k w_k(t) A_k B_k by NumPy, of the stacked matrices alone; 0 at the start."""
    curve: Any = network(curve=models.smooth).field.curve
    start = LowRank(curve, 3, key=KEY)
    assert eqx.tree_equal(start.at(0.3), curve.at(0.3))
    assert eqx.tree_equal(start.merged(), curve)
    moved = drawn(start)
    field, now = curve.at(0.3), moved.at(0.3)
    weights = np.asarray(curve.weights(0.3))
    assert sorted(moved.left) == ["weight_in", "weight_out"]
    for name, left in moved.left.items():
        factors = zip(weights, np.asarray(left), np.asarray(moved.right[name]), strict=True)
        change = sum(w * a @ b for w, a, b in factors)
        assert np.linalg.matrix_rank(left[0] @ moved.right[name][0]) == 3
        found = getattr(now, name) - getattr(field, name)
        np.testing.assert_allclose(found, change, atol=1e-5)
    np.testing.assert_array_equal(now.bias_in, field.bias_in)


def test_heads_are_rows():
    """The queries (H, p, d) have a change of rank 1 as a matrix (H p, d)."""
    block = language_model().field.curve
    left, right = (getattr(LowRank(block, 1, key=KEY), side) for side in ("left", "right"))
    name = "fields.0.field.query"
    assert left[name].shape == (2, 8, 1) and right[name].shape == (2, 1, 8)
    gain = "fields.0.norm.gain"
    assert gain not in left and all("bias" not in name for name in left)


@eqx.filter_jit
def outputs(model, adapted, merged, x):
    return model(x), adapted(x), merged(x)


@pytest.mark.parametrize("name", CURVES)
def test_models_are_unchanged_then_changed_then_merged(name):
    """Exactly what they were at the start; and what was trained is a curve of the same kind."""
    model = network(curve=CURVES[name])
    adapted: Any = model.adapted(2, key=KEY)
    before, same_as_before, again = outputs(model, adapted, adapted.merged(), X)
    np.testing.assert_array_equal(before, same_as_before)
    np.testing.assert_array_equal(before, again)
    moved = drawn(adapted)
    _, changed, merged = outputs(model, moved, moved.merged(), X)
    assert jnp.abs(changed - before).max() > 0.1
    np.testing.assert_allclose(changed, merged, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(moved.merged()) == jax.tree.structure(model)


def test_a_pretrained_model_is_adapted(tmp_path):
    """GPT-2's layers and ALBERT's one block, with its tokens one by one; in 16 bits as well."""
    for name in ("gpt2", "albert"):
        config, tensors, _ = published.MODELS[name]
        model: Any = models.from_pretrained(published.write(tmp_path / name, config, tensors))
        tokens = jnp.array([1, 5, 0, 7], jnp.int32)
        adapted = model.adapted(2, key=KEY)
        before, start, _ = outputs(model, adapted, adapted.merged(), tokens)
        np.testing.assert_array_equal(before, start)
        moved = drawn(adapted)
        _, changed, merged = outputs(model, moved, moved.merged(), tokens)
        assert jnp.abs(changed - before).max() > 0.1
        np.testing.assert_allclose(changed, merged, rtol=1e-4, atol=1e-4)
        if name == "gpt2":
            assert models.generation.can_be_cached(moved)
    narrow = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a, model.field.curve
    )
    moved = drawn(LowRank(narrow, 2, key=KEY))
    assert {a.dtype.name for a in [*moved.left.values(), *arrays(moved.at(0.0))]} == {
        "float32", "bfloat16",
    }  # fmt: skip
    assert eqx.tree_equal(moved.at(0.0), moved.merged().at(0.0))


# ------------------------------------------------------------------ training


def test_the_changes_alone_are_trained(tmp_path, capsys):
    """(rows + columns) r numbers a matrix and layer; the rest of the model, its moments and its
    place in the checkpoints are not touched. A run that goes on, and is loaded, is the same."""
    pytest.importorskip("orbax.checkpoint")
    model: Any = network()
    adapted: Any = model.adapted(2, key=KEY)
    spec, optimiser = adapters(adapted), optax.adam(0.1)
    run = tmp_path / "run"
    options: dict[str, Any] = {"trainable": spec, "optimiser": optimiser}
    whole = fit(adapted, Points(), **options)
    fit(adapted, Points(), steps=3, run=run, progress=True, **options)
    rest = fit(adapted, Points(), run=run, resume=True, **options)
    assert numbers(eqx.filter(adapted, spec)) == 2 * (8 * 2 + 2 * 4 + 4 * 2 + 2 * 8)
    others = numbers(model)
    assert f"96 parameters: 0.00154 MB with gradients and Adam's moments; {others} others stay" in (
        " ".join(capsys.readouterr().out.split())
    )
    same(eqx.filter(whole.model, spec, inverse=True), eqx.filter(adapted, spec, inverse=True))
    assert all(jnp.abs(a).max() > 0.01 for a in whole.model.field.curve.left.values())
    assert losses(whole)[-1] < losses(whole)[0] and losses(rest) == losses(whole)
    same(rest.model, whole.model)
    found = training.load(run, adapted, which="latest", trainable=spec)
    assert eqx.tree_equal(found, whole.model)
    stored = training.metadata(training.latest(run / "checkpoints"))
    assert set(stored["config"]) == {"config", "data", "accumulate", "frozen"}
    # Another rest is another model, for those who go on and for those who load.
    other = eqx.tree_at(lambda m: m.output.bias, adapted, jnp.ones(2))
    with pytest.raises(ValueError, match="trained a part of another model"):
        fit(other, Points(), run=run, resume=True, **options)
    for like, trainable in ((other, spec), (adapted, eqx.is_inexact_array)):
        with pytest.raises(ValueError, match="the rest of `like` is not that model's"):
            training.load(run, like, trainable=trainable)


def test_changes_are_exported(tmp_path):
    pytest.importorskip("safetensors")
    moved = drawn(network().adapted(2, key=KEY))
    training.export(moved, tmp_path / "adapted.safetensors")
    again = training.load(tmp_path / "adapted.safetensors", network().adapted(2, key=KEY))
    assert eqx.tree_equal(again, moved)
    training.export(moved.merged(), tmp_path / "merged.safetensors")
    plain = training.load(tmp_path / "merged.safetensors", network())
    assert eqx.tree_equal(plain, moved.merged())


# ------------------------------------------------------------------ what is refused


def test_what_cannot_be_adapted_or_trained_is_refused(tmp_path):
    model = network()
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        model.adapted(0, key=KEY)
    with pytest.raises(TypeError, match="of an adapted curve take `merged"):
        model.adapted(2, key=KEY).adapted(2, key=KEY)
    with pytest.raises(TypeError, match="the curve to merge must be an instance"):
        model.merged()
    with pytest.raises(ValueError, match="holds no matrix to change"):
        LowRank(jf.Constant(jf.SelfAttention(beta=2.0)), 1, key=KEY)
    with pytest.raises(TypeError, match="key must be one PRNG key"):
        LowRank(jf.Constant(jf.LinearDrift(jnp.eye(2))), 1, key="a")  # pyright: ignore
    with pytest.raises(ValueError, match="only what was adapted has low-rank changes"):
        adapters(model)
    for trainable, error, told in (
        ("all", TypeError, "trainable must be a tree of booleans"),
        (adapters(network(curve=models.shared).adapted(2, key=KEY)), TypeError, "trainable must"),
        (lambda a: False, ValueError, "nothing to train"),
    ):
        with pytest.raises(error, match=told):
            fit(model, Points(), trainable=trainable, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
