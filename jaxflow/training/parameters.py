"""Trained parameters as safetensors, for any library: `export` writes a file, `load` reads it.

The name of an array is the path of its attribute in the model:

    embedding                                       (vocabulary, d)
    positions                                       (context, d)
    norm.gain, norm.bias                            (d,)
    field.curve.coefficients.fields.0.field.query   (L, H, p, d)      attention
    field.curve.coefficients.fields.0.norm.gain     (L, d)
    field.curve.coefficients.fields.1.field.weight_in   (L, width, d)     feed-forward

and so on, as the docstring of each class shapes them; L is the number of coefficients of the curve,
of layers by default. The metadata of the file have the configuration of the model under "model", as
`jaxflow.models.build` takes it.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .. import models
from .._files import regular
from .._folder import json_object, write_bytes
from ..models.pretrained.files import headers, opened

ENDING = ".safetensors"


def write(model: Any, file: str | Path, config: dict[str, Any] | None):
    """Writes the floating-point arrays of a model, and its configuration."""
    path = Path(file)
    if path.suffix != ENDING or not path.parent.is_dir():
        raise ValueError(f"a file that ends in {ENDING}, in a folder that exists, got {path}.")
    library = _library()
    arrays = {name: np.asarray(leaf) for name, leaf in named(model).items()}
    about = {"format": "jaxflow"} | ({} if config is None else {"model": json.dumps(config)})
    write_bytes(path, library.save({k: np.ascontiguousarray(a) for k, a in arrays.items()}, about))


def read(file: str | Path, like: Any) -> Any:
    """The model of a file; `like` as in `load`."""
    path = regular(Path(file), "a file of parameters")
    if like is None:
        with opened(path) as content:
            config = (content.metadata() or {}).get("model")
        if config is None:
            raise ValueError(f"{path} does not say how its model is built: pass like=.")
        config = json_object(config, f"the configuration in {path}")
        like = eqx.filter_eval_shape(lambda: models.build(config))
    stored, expected = dict(headers(path)), named(like)
    if stored.keys() != expected.keys():
        other = sorted(stored.keys() ^ expected.keys())[0]
        which = "the file" if other in stored else "the model"
        raise ValueError(f"{path} is of another model: {which} alone has {other}.")
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape or tensor.dtype is None:
            raise ValueError(
                f"{path} is of another model: {name} has shape {tensor.shape} and not "
                f"{expected[name].shape}."
            )
    with opened(path) as content:
        arrays = {name: jnp.asarray(content.get_tensor(name)) for name in stored}
    put = lambda p, leaf: arrays.get(_name(p), leaf)
    return jtu.tree_map_with_path(put, like, is_leaf=_is_shape)


def named(model: Any) -> dict[str, Any]:
    """The floating-point arrays of a model, or their shapes, by the names that a file has."""
    leaves = jtu.tree_leaves_with_path(model)
    return {_name(path): leaf for path, leaf in leaves if _is_number(leaf)}


def _name(path: Any) -> str:
    return jtu.keystr(path, simple=True, separator=".")


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _is_number(leaf: Any) -> bool:
    return eqx.is_inexact_array(leaf) or (
        _is_shape(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def _library() -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError as error:
        raise ImportError('export needs safetensors: pip install "jaxflow[train]".') from error
