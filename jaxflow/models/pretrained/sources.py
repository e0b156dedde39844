"""Which tensor of a file is which parameter, and how the parameters are read."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..._memory import check_fits
from ..base import AbstractModel
from .files import Folder, Tensor, opened

LAYER = "{}"  # in the name of a tensor: the number of a layer


class Source(NamedTuple):
    """A parameter: how it is found in a model, which tensor it is, of what shape in the file, and
    how that is turned. A name with `{}` is that of each layer."""

    where: Callable[[Any], Any]
    name: str
    shape: tuple[int, ...]
    turned: Callable[[np.ndarray], np.ndarray] = lambda a: a


class Plan(NamedTuple):
    """How a model is made of a file.

    - `make(dtype)`: makes the model, of which only the structure is used; `dtype` of 16 bits is
      that in which its fields compute, `None` that of the state.
    - `sources`: all of its parameters. `layers`: how many of each a file has.
    - `prefixes`: with which the names of a file may begin.
    - `unused`: a pattern of names, without the prefix, that are of no use here.
    """

    make: Callable[[Any], AbstractModel]
    sources: list[Source]
    layers: int
    prefixes: tuple[str, ...]
    unused: str


def fill(plan: Plan, folder: Folder, dtype: np.dtype | None) -> AbstractModel:
    """The model of a plan with the parameters of a folder."""
    tensors = folder.tensors()
    found = {_plain(name, plan.prefixes): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise ValueError(f"{folder.path} has tensors twice, under an older and a newer name.")
    needed = [_rows(source, plan.layers, found, folder) for source in plan.sources]
    _check_extra(found, needed, plan.unused, folder)
    stored = dtype or needed[0][0].dtype
    assert stored is not None
    numbers = sum(len(rows) * int(np.prod(rows[0].shape)) for rows in needed)
    check_fits(
        2 * stored.itemsize * numbers,
        f"a model of {numbers:,} parameters in {stored.name}",
        "Take dtype=jnp.bfloat16, or a smaller model.",
    )
    narrow = stored if stored.itemsize < 4 else None
    model = eqx.filter_eval_shape(plan.make, narrow)
    arrays = [
        _read(rows, source, stored) for rows, source in zip(needed, plan.sources, strict=True)
    ]
    filled = eqx.tree_at(lambda model: [s.where(model) for s in plan.sources], model, arrays)
    left = [x for x in jax.tree.leaves(filled) if isinstance(x, jax.ShapeDtypeStruct)]
    assert not left, left
    return filled


def _plain(name: str, prefixes: tuple[str, ...]) -> str:
    """The name without its prefix; norms of older files have a gamma and a beta."""
    prefix = max((p for p in prefixes if name.startswith(p)), key=len, default="")
    name = re.sub(r"\.gamma$", ".weight", name.removeprefix(prefix))
    return re.sub(r"\.beta$", ".bias", name)


def _rows(source: Source, layers: int, found: dict[str, Tensor], folder: Folder) -> list[Tensor]:
    """The tensors of a parameter, one a layer, as they must be."""
    rows = []
    for layer in range(layers if LAYER in source.name else 1):  # the file ends those of a false one
        name = source.name.replace(LAYER, str(layer))
        if name not in found:
            raise ValueError(f"{folder.path} has no tensor {name}, as its config.json says.")
        tensor = found[name]
        if tensor.shape != source.shape or tensor.dtype is None:
            kind = tensor.dtype or "no floating-point numbers"
            raise ValueError(
                f"{tensor.file} has {tensor.name} of shape {tensor.shape}, {kind}; its config.json "
                f"asks for floating-point numbers of shape {source.shape}."
            )
        rows.append(tensor)
    return rows


def _check_extra(found: dict[str, Tensor], needed: list[list[Tensor]], unused: str, folder: Folder):
    used = {tensor.name for rows in needed for tensor in rows}
    for name, tensor in sorted(found.items()):
        if tensor.name not in used and not re.fullmatch(unused, name):
            raise ValueError(
                f"{folder.path} has the tensor {tensor.name}, which the model of its config.json "
                "has no place for: it is another model."
            )


def _read(rows: list[Tensor], source: Source, dtype: np.dtype) -> jax.Array:
    """The parameter in its dtype, stacked where it is one of each layer."""
    first = _one(rows[0], source, dtype)
    if LAYER not in source.name:
        return jnp.asarray(first)
    stacked = np.empty((len(rows), *first.shape), dtype)
    for layer, tensor in zip(stacked, rows, strict=True):
        layer[...] = _one(tensor, source, dtype)
    return jnp.asarray(stacked)


def _one(tensor: Tensor, source: Source, dtype: np.dtype) -> np.ndarray:
    with opened(tensor.file) as file:
        return source.turned(file.get_tensor(tensor.name)).astype(dtype, copy=False)
