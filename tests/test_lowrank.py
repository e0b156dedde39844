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
from test_training import KEY, Outputs, Points, arrays, fit, losses, same
from test_training import network as untyped

import jaxflow as jf
from jaxflow import models, training
from jaxflow.fields import LowRank, adapters
from jaxflow.models import generation

CURVES = {
    "layers": models.layered,
    "shared": models.shared,
    "smooth": models.smooth,
    "linear": models.interpolated,
    "hyper": models.hypernetwork,
}


def network(**options) -> Any:
    return untyped(**options)


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
def along(curves):
    return {name: [c.at(t) for t in (0.0, 0.3, 1.7)] for name, c in curves.items()}


def test_every_curve_is_unchanged_then_changed_then_merged():
    """Exactly what it was at the start; and what was trained is a curve of the same kind."""
    plain: Any = {name: network(curve=make).field.curve for name, make in CURVES.items()}
    start = {name: LowRank(curve, 2, key=KEY) for name, curve in plain.items()}
    moved: Any = {name: drawn(curve) for name, curve in start.items()}
    merged = {name: curve.merged() for name, curve in moved.items()}
    before, same_as_before, changed, again = map(along, (plain, start, moved, merged))
    for name in CURVES:
        assert moved[name].breakpoints == plain[name].breakpoints
        assert jax.tree.structure(merged[name]) == jax.tree.structure(plain[name])
        assert eqx.tree_equal(same_as_before[name], before[name])
        for fields in zip(before[name], changed[name], again[name], strict=True):
            for old, new, other in zip(*map(arrays, fields), strict=True):
                assert (jnp.abs(new - old).max() > 0.1) == (new.ndim > 1)
                np.testing.assert_allclose(new, other, rtol=1e-5, atol=1e-5)


@eqx.filter_jit
def outputs(models, x):
    return [model(x) for model in models]


def test_a_pretrained_model_is_adapted(tmp_path):
    """GPT-2's layers: the same logits at the start, and the same merged as not."""
    config, tensors, _ = published.MODELS["gpt2"]
    model: Any = models.from_pretrained(published.write(tmp_path, config, tensors))
    adapted = model.adapted(2, key=KEY)
    moved = drawn(adapted)
    assert generation.can_be_cached(moved)
    tokens = jnp.array([1, 5, 0, 7], jnp.int32)
    before, start, changed, merged = outputs((model, adapted, moved, moved.merged()), tokens)
    np.testing.assert_array_equal(before, start)
    assert jnp.abs(changed - before).max() > 0.1
    np.testing.assert_allclose(changed, merged, rtol=1e-4, atol=1e-4)


def test_16_bits_are_changed_by_32():
    """The factors are float32, so that small steps of training add up."""
    narrow = jax.tree.map(
        lambda a: a.astype(jnp.bfloat16) if eqx.is_inexact_array(a) else a, network().field.curve
    )
    moved = drawn(LowRank(narrow, 2, key=KEY))
    names = lambda arrays: {a.dtype.name for a in arrays}
    assert names(moved.left.values()) == {"float32"}
    assert names(arrays(moved.at(0.0))) == names(arrays(moved.merged())) == {"bfloat16"}


# ------------------------------------------------------------------ training


class Moving(eqx.Module):
    """x -> M(1/2) x + b: a model without a solve, which compiles at once."""

    curve: Any
    bias: jax.Array = eqx.field(default_factory=lambda: jnp.zeros(2))

    def __call__(self, x):
        return x @ self.curve.at(0.5).matrix.T + self.bias[None]


def test_the_changes_alone_are_trained(tmp_path, capsys):
    """(rows + columns) r numbers a matrix and coefficient; the rest of the model, its moments and
    its place in the checkpoints are not touched. A run that goes on, and is loaded, is the same."""
    pytest.importorskip("orbax.checkpoint")
    plain = jf.Legendre([jf.LinearDrift(m * jnp.eye(2)) for m in (1.0, 0.3, 0.2)], 0.0, 1.0)
    model = Moving(LowRank(plain, 1, key=KEY))
    spec, optimiser = adapters(model), optax.adam(0.1)
    run = tmp_path / "run"
    options: dict[str, Any] = {"trainable": spec, "optimiser": optimiser, "loss": Outputs()}
    whole = fit(model, Points(), **options)
    fit(model, Points(), steps=3, run=run, **options | {"progress": True})
    rest = fit(model, Points(), run=run, resume=True, **options)
    assert numbers(eqx.filter(model, spec)) == 3 * (2 + 2) * 1
    told = " ".join(capsys.readouterr().err.split())
    assert "12 parameters: 0.000192 MB with gradients and Adam's moments; 14 others stay" in told
    same(eqx.filter(whole.model, spec, inverse=True), eqx.filter(model, spec, inverse=True))
    assert all((jnp.abs(a) > 0.01).any() for a in whole.model.curve.left.values())
    assert losses(whole)[-1] != losses(whole)[0] and losses(rest) == losses(whole)
    same(rest.model, whole.model)
    found = training.load(run, model, which="latest", trainable=spec)
    assert eqx.tree_equal(found, whole.model)
    last: Any = training.latest(run / "checkpoints")
    assert set(training.metadata(last)["config"]) == {"config", "data", "accumulate", "frozen"}
    # Another rest is another model, for those who go on and for those who load.
    other = eqx.tree_at(lambda m: m.bias, model, jnp.ones(2))
    with pytest.raises(ValueError, match="trained a part of another model"):
        fit(other, Points(), run=run, resume=True, **options)
    for like, trainable in ((other, spec), (model, eqx.is_inexact_array)):
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
    with pytest.raises(TypeError, match="key"):
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
