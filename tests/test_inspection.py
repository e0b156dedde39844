"""What a model does to a text: against the theory's own block, where all is known."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from typer.testing import CliRunner

from jaxflow import models, viz
from jaxflow.cli import app
from jaxflow.models.inspection import BETAS

KEY = jax.random.key(0)
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2], np.int32)


def theory() -> Any:
    """Two layers of the model of the theory, A = I, at the inverse temperatures 3 and 5."""
    block = models.theory(4, 1, 2)
    make = lambda: models.LanguageModel(10, 4, 1, 2, 8, block=block, key=KEY)
    rng = np.random.default_rng(0)
    is_shape = lambda a: isinstance(a, jax.ShapeDtypeStruct)
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype) if is_shape(a) else a
    model = jax.tree.map(draw, eqx.filter_eval_shape(make), is_leaf=is_shape)
    where = lambda m: (m.field.curve.coefficients.matrix, m.field.curve.coefficients.beta)
    identity = jnp.broadcast_to(jnp.eye(4), (2, 1, 4, 4))
    return eqx.tree_at(where, model, (identity, jnp.array([[3.0], [5.0]])))


@pytest.fixture(scope="module")
def found():
    return models.inspect(theory(), TOKENS)


def test_heads_of_the_theory_are_on_its_curve(found):
    """Scores are beta times cosines, so the slope is beta; Q^T K and O V are multiples of I."""
    np.testing.assert_allclose(found.ts, [0, 1, 2])
    np.testing.assert_allclose(found.beta[:, 0], [3, 5], rtol=1e-4)
    for k, beta in enumerate((3.0, 5.0)):
        curve = np.interp(np.log(beta), np.log(BETAS), found.curve[k])
        np.testing.assert_allclose(found.entropy[k, 0], curve, rtol=2e-3)
        np.testing.assert_allclose(found.query_key[k, 0], beta, rtol=1e-5)
    np.testing.assert_allclose(found.output_value, 1, rtol=1e-5)
    np.testing.assert_allclose(found.most, np.log(np.arange(1, 8)).mean(), rtol=1e-6)


def test_tokens_and_their_sensitivity(found):
    """On the sphere; equal tokens are not one, as their positions differ; the last one of a causal
    text changes no loss."""
    np.testing.assert_allclose(np.linalg.norm(found.points, axis=-1), 1, rtol=1e-5)
    assert found.points.shape == (3, 7, 4) and found.clusters.shape == (3, 3)
    assert (np.diff(found.clusters, axis=1) >= 0).all() and found.clusters[0, 2] == 7
    assert found.sensitivity[-1] == 0 and (found.sensitivity[:-1] > 1e-6).all()
    assert 0.5 < found.loss < 30


def test_the_page_stands_alone(found):
    """Its pictures are in it, it asks for no other file, and words are text."""
    pytest.importorskip("matplotlib")
    page = viz.inspection_page(found, ["<b>", "a", "\n", "d", "e", "f", "g"], {"model": "<i>"})
    assert page.count("data:image/png;base64,") == 4 and not re.search("https?:", page)
    assert "&lt;b&gt;" in page and "<b>" not in page and "<i>" not in page
    without = viz.inspection_page(found._replace(query_key=None), ["w"] * 7)
    assert without.count("data:image/png;base64,") == 3
    with pytest.raises(ValueError, match="one string a token: 7, got 1"):
        viz.inspection_page(found, ["w"])


def test_what_cannot_be_inspected():
    model = theory()
    with pytest.raises(ValueError, match="one text of at least two tokens"):
        models.inspect(model, TOKENS[:1])
    with pytest.raises(ValueError, match="tokens must be in 0, ..., 9"):
        models.inspect(model, TOKENS + 5)


def test_inspect_a_folder(tmp_path, found, monkeypatch):
    """A pretrained model and its tokenizer, cut at its context; without one the line says so."""
    hf = pytest.importorskip("tokenizers")
    config, tensors, _ = published.MODELS["bert"]
    folder = published.write(tmp_path / "bert", config, tensors)
    (tmp_path / "text.txt").write_text("a b " * 50)
    command = ["inspect", str(folder), "--text", str(tmp_path / "text.txt")]
    command += ["--out", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "has no tokenizer.json" in result.output
    words = hf.Tokenizer(hf.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(words.to_str())
    seen: list[Any] = []

    def inspected(model, tokens):
        seen.append((model, tokens))
        n = len(tokens)
        return found._replace(points=np.ones((3, n, 2)), sensitivity=np.ones(n))

    monkeypatch.setattr(models, "inspect", inspected)
    page = lambda found, words, about: "".join(words) + about["text"]
    monkeypatch.setattr(viz, "inspection_page", page)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    [(model, tokens)] = seen
    assert isinstance(model, models.Encoder) and tokens.tolist() == [0, 1] * 6
    text = (tmp_path / "page.html").read_text()
    assert text.startswith("ababab") and text.endswith("its first 12 tokens")
