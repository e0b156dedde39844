"""Published transformers as flows: equal to NumPy's and to the transformers library's, from folders
that are not trusted."""

import json
import os
import pickle
import tracemalloc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import published
import pytest
from published import DIM, GPT2, LAYERS, MODELS

import jaxflow as jf
from jaxflow import models, training
from jaxflow.models import generation

pytest.importorskip("safetensors")

TOKENS = np.array([1, 5, 0, 7, 3, 3, 10, 2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    for name, (config, tensors, _) in MODELS.items():
        published.write(root / name, config, tensors)
    return root


@pytest.fixture(scope="module")
def computed(folders):
    """The outputs of all models, as one program."""
    found = {name: models.from_pretrained(folders / name) for name in MODELS}
    run = eqx.filter_jit(lambda found, tokens: {k: m(tokens) for k, m in found.items()})
    return run(found, jnp.asarray(TOKENS, jnp.int32))


# ------------------------------------------------------------------ what they compute


@pytest.mark.parametrize("name", MODELS)
def test_models_are_those_of_the_papers(name, computed):
    """In NumPy and float64: logits, and of encoders the hidden states."""
    _, tensors, run = MODELS[name]
    expected = run(tensors, TOKENS)
    assert computed[name].shape == expected.shape and np.std(expected) > 0.3
    np.testing.assert_allclose(computed[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_those_of_the_transformers_library(name, folders, computed):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    library = pytest.importorskip(
        "transformers", reason="compares with transformers, not installed"
    )
    encoder = name in ("bert", "albert")
    kind = library.AutoModel if encoder else library.AutoModelForCausalLM
    model = kind.from_pretrained(folders / name, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(torch.tensor(TOKENS[None]))
    expected = output.last_hidden_state if encoder else output.logits
    np.testing.assert_allclose(computed[name], expected[0].numpy(), rtol=1e-4, atol=1e-4)


def test_they_are_flows_along_curves(folders):
    """Layers in time, ALBERT's block constant; and any depth and curve serve them."""
    gpt2: Any = models.from_pretrained(folders / "gpt2")
    albert: Any = models.from_pretrained(folders / "albert")
    assert [type(gpt2), type(albert)] == [models.LanguageModel, models.Encoder]
    assert isinstance(gpt2.field.curve, jf.PiecewiseConstant)
    assert isinstance(albert.field.curve, jf.Constant)
    other = albert.with_depth(models.Depth(t1=2.0, steps=4))
    half = eqx.filter_eval_shape(lambda m, t: m(t), other, jnp.asarray(TOKENS))
    assert half.shape == (8, DIM)
    assert eqx.filter_eval_shape(generation.can_be_cached, gpt2)


def narrowed(folder):
    config, tensors, _ = MODELS["llama"]
    narrow = {name: a.astype(ml_dtypes.bfloat16) for name, a in tensors.items()}
    return published.write(folder, config, narrow)


def test_bfloat16_is_read_as_it_is(tmp_path, folders):
    """Every parameter keeps its 16 bits; one of 32 is rounded where it is asked for."""
    model = models.from_pretrained(narrowed(tmp_path / "narrow"))
    assert {a.dtype.name for a in jax.tree.leaves(eqx.filter(model, eqx.is_array))} == {"bfloat16"}
    rounded = models.from_pretrained(folders / "llama", dtype=jnp.bfloat16)
    assert eqx.tree_equal(rounded, model)


@pytest.mark.slow
def test_bfloat16_computes_nearly_the_same(tmp_path, computed):
    """The state is float32; what differs is the rounding of a few products, 2^-8 each."""
    model = models.from_pretrained(narrowed(tmp_path / "narrow"))
    logits = eqx.filter_jit(lambda m, t: m(t))(model, jnp.asarray(TOKENS, jnp.int32))
    assert logits.dtype == jnp.float32
    error = np.asarray(logits - computed["llama"])
    assert 1e-4 < np.sqrt(np.mean(error**2)) / np.std(computed["llama"]) < 0.05


def test_reading_makes_no_other_copy(tmp_path):
    """The peak of what NumPy holds is that of one copy, and one tensor."""
    width = 2**17
    config = GPT2 | {"n_inner": width, "n_head": 1}
    _, tensors, _ = MODELS["gpt2"]
    shapes = {"c_fc.weight": (DIM, width), "c_fc.bias": (width,), "c_proj.weight": (width, DIM)}
    tensors = {name: a.astype(ml_dtypes.bfloat16) for name, a in tensors.items()}
    for l in range(LAYERS):
        for name, shape in shapes.items():
            tensors[f"transformer.h.{l}.mlp.{name}"] = np.zeros(shape, ml_dtypes.bfloat16)
    folder = published.write(tmp_path / "wide", config, tensors)
    size = sum(a.nbytes for a in tensors.values())
    tracemalloc.start()
    models.from_pretrained(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * size


# ------------------------------------------------------------------ files


def sharded(folder, *, named=None):
    """The model in two files with an index, which calls the second one `named`."""
    config, tensors, _ = MODELS["gpt2"]
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        published.write(folder, config, {name: tensors[name] for name in part}, file)
    second = named or "b.safetensors"
    files = {"a.safetensors": "a.safetensors", "b.safetensors": second}
    weights = {name: files[file] for file, part in halves.items() for name in part}
    index = {"metadata": {}, "weight_map": weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_sharded_files_are_one(tmp_path, folders):
    whole = models.from_pretrained(folders / "gpt2")
    assert eqx.tree_equal(models.from_pretrained(sharded(tmp_path / "model")), whole)


def test_names_of_older_files(tmp_path, folders):
    """Without a prefix; with the buffers of masks; with gamma and beta of a norm."""
    config, tensors, _ = MODELS["gpt2"]
    plain = {name.removeprefix("transformer."): a for name, a in tensors.items()}
    plain["h.0.attn.bias"] = np.ones((1, 1, 12, 12), np.float32)
    found = models.from_pretrained(published.write(tmp_path / "gpt2", config, plain))
    assert eqx.tree_equal(found, models.from_pretrained(folders / "gpt2"))
    config, tensors, _ = MODELS["bert"]
    old = {f"bert.{name}": a for name, a in tensors.items()}
    for new, before in {"weight": "gamma", "bias": "beta"}.items():
        old = {
            name.replace(f"LayerNorm.{new}", f"LayerNorm.{before}"): a for name, a in old.items()
        }
    old["cls.predictions.bias"] = np.zeros(11, np.float32)
    found = models.from_pretrained(published.write(tmp_path / "bert", config, old))
    assert eqx.tree_equal(found, models.from_pretrained(folders / "bert"))


def outside(tmp_path, how):
    """A folder whose second file is outside of it, by a name or by a link."""
    folder = sharded(tmp_path / "model", named="../b.safetensors" if how == "name" else None)
    os.rename(folder / "b.safetensors", tmp_path / "b.safetensors")
    if how == "link":
        os.symlink(tmp_path / "b.safetensors", folder / "b.safetensors")
    return folder


@pytest.mark.parametrize("how", ["name", "link"])
def test_no_file_outside_of_the_folder_is_read(tmp_path, how):
    message = "must be right in it" if how == "name" else "a link to a file outside"
    with pytest.raises(ValueError, match=message):
        models.from_pretrained(outside(tmp_path, how))


def test_a_pickle_is_not_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": 0}))
    with pytest.raises(ValueError, match="can run code when they are read"):
        models.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model_type": "t5"}, "model_type in config.json must be one of gpt2, llama"),
        ({"n_embd": 1e9}, "n_embd must be a whole number"),
        ({"n_embd": "8"}, "n_embd must be a whole number"),
        ({"n_embd": -8}, "n_embd must be at least 1"),
        ({"n_embd": 2**28, "n_head": 2**26}, "has transformer.wte.weight of shape .11, 8."),
        ({"n_layer": 3}, "has no tensor h.2.ln_1.weight"),
        ({"n_layer": 2**31 - 1}, "has no tensor h.2.ln_1.weight"),
        ({"n_layer": 1}, "has the tensor transformer.h.1.* which the model .* has no place for"),
        ({"n_head": 3}, "heads must divide dim"),
        ({"n_inner": 4}, "has transformer.h.0.mlp.c_fc.weight of shape .8, 32."),
        ({"activation_function": "softmax"}, "activation_function in config.json must be one of"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon must be a real number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be positive and finite"),
        ({"scale_attn_by_inverse_layer_idx": True}, "is not supported, but False"),
        ({"tie_word_embeddings": "no"}, "must be true or false"),
        ({"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
    ],
)
def test_a_config_that_is_not_the_files(tmp_path, changed, message):
    _, tensors, _ = MODELS["gpt2"]
    folder = published.write(tmp_path / "model", GPT2 | changed, tensors)
    with pytest.raises(ValueError, match=message):
        models.from_pretrained(folder)


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope_type in config.json must be one of default",
        ),
        ({"rope_scaling": [2]}, "must be an object"),
        ({"mlp_bias": True}, "mlp_bias=True in config.json is not supported"),
        ({"num_key_value_heads": 3}, "kv_heads must divide heads|k_proj.weight of shape"),
        ({"head_dim": 3}, "q_proj.weight of shape"),
    ],
)
def test_a_llama_that_is_not_known(tmp_path, changed, message):
    config, tensors, _ = MODELS["llama"]
    config = {k: v for k, v in config.items() if k != "rope_parameters"}
    folder = published.write(tmp_path / "model", config | changed, tensors)
    with pytest.raises(ValueError, match=message):
        models.from_pretrained(folder)


def test_damaged_folders(tmp_path):
    _, tensors, _ = MODELS["gpt2"]
    with pytest.raises(ValueError, match="is a folder on this machine"):
        models.from_pretrained(tmp_path / "absent")
    folder = published.write(tmp_path / "model", GPT2, tensors)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-1], whole[:100], b"", b"\xff" * 8 + whole[8:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            models.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        models.from_pretrained(folder)
    counted = tensors | {"transformer.ln_f.bias": np.zeros(DIM, np.int32)}
    folder = published.write(tmp_path / "counted", GPT2, counted)
    with pytest.raises(ValueError, match="asks for floating-point numbers"):
        models.from_pretrained(folder)
    index = {"weight_map": {"wte.weight": 3}}
    folder = sharded(tmp_path / "indexed")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must have a weight_map"):
        models.from_pretrained(folder)


# ------------------------------------------------------------------ export

NAMES = """
embedding field.curve.coefficients.fields.0.field.key field.curve.coefficients.fields.0.field.output
field.curve.coefficients.fields.0.field.query field.curve.coefficients.fields.0.field.value
field.curve.coefficients.fields.0.norm.bias field.curve.coefficients.fields.0.norm.gain
field.curve.coefficients.fields.1.field.bias_in field.curve.coefficients.fields.1.field.bias_out
field.curve.coefficients.fields.1.field.weight_in field.curve.coefficients.fields.1.field.weight_out
field.curve.coefficients.fields.1.norm.bias field.curve.coefficients.fields.1.norm.gain
norm.bias norm.gain positions
"""


def small() -> Any:
    """A model of drawn numbers; nothing is compiled."""
    rng = np.random.default_rng(1)
    made = eqx.filter_eval_shape(
        lambda: models.LanguageModel(11, 8, 2, 2, 12, key=jax.random.key(0))
    )
    is_shape = lambda a: isinstance(a, jax.ShapeDtypeStruct)
    draw = lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype) if is_shape(a) else a
    return jax.tree.map(draw, made, is_leaf=is_shape)


def test_export_and_back(tmp_path):
    """The names stay as they are, since files of users have them."""
    from safetensors.numpy import load_file

    model, file = small(), tmp_path / "model.safetensors"
    training.export(model, file)
    stored = load_file(file)
    assert sorted(stored) == NAMES.split()
    np.testing.assert_array_equal(stored["norm.gain"], model.norm.gain)
    assert stored["field.curve.coefficients.fields.0.field.query"].shape == (2, 2, 4, 8)
    assert eqx.tree_equal(training.load(file, like=model), model)
    with pytest.raises(ValueError, match="does not say how its model is built"):
        training.load(file)
    other = eqx.tree_at(lambda m: m.positions, model, None)
    with pytest.raises(ValueError, match="the file alone has positions"):
        training.load(file, like=other)
    other = eqx.tree_at(lambda m: m.positions, model, jnp.zeros((3, 8)))
    with pytest.raises(ValueError, match=r"positions has shape \(12, 8\) and not \(3, 8\)"):
        training.load(file, like=other)
    with pytest.raises(ValueError, match="ends in .safetensors, in a folder that exists"):
        training.export(model, tmp_path / "model.bin")


def test_export_through_torch(tmp_path):
    """PyTorch reads the file, and what it writes is the model again."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from safetensors.torch import load_file, save_file

    model, file = small(), tmp_path / "model.safetensors"
    training.export(model, file)
    tensors = load_file(file)
    assert tensors["embedding"].shape == (11, 8)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "b.safetensors")
    again = training.load(tmp_path / "b.safetensors", like=model)
    twice = jax.tree.map(lambda a: 2 * a if eqx.is_inexact_array(a) else a, model)
    assert eqx.tree_equal(again, twice)
