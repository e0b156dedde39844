"""Trainings of a part of a model: what is trained, and what stays as it is.

A run keeps the part that it trains. The rest is the model's own, and its sha256 says which model.
"""

import hashlib
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from .leaves import digest, layout, named, to_host


def parted(model: Any, trainable: Any) -> tuple[Any, Any]:
    """(what is trained, the rest): of the arrays that a filter of Equinox's has, the floating-point
    ones are trained.

    **Raises:** TypeError for what is no such filter.
    """
    try:
        chosen = eqx.filter(model, trainable)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "trainable must be a tree of booleans like the model, such as "
            f"jaxflow.fields.adapters(model), or a function of an array; got {trainable!r}."
        ) from error
    spec = jax.tree.map(eqx.is_inexact_array, chosen, is_leaf=lambda x: x is None)
    return eqx.partition(model, spec)


def frozen(static: Any) -> dict[str, str]:
    """What a run says of the floating-point arrays that it does not train; nothing where there are
    none."""
    arrays = named(eqx.filter(static, eqx.is_inexact_array))
    if not arrays:
        return {}
    each = (f"{name} {layout(a)} {digest(to_host(a))}\n" for name, a in arrays.items())
    return {"frozen": hashlib.sha256("".join(each).encode()).hexdigest()}


def check_frozen(static: Any, about: dict[str, Any], run: str | Path):
    """**Raises:** ValueError where a run was trained on another part, or beside another rest."""
    found, expected = frozen(static).get("frozen"), about.get("frozen")
    if found == expected:
        return
    if expected is None:
        raise ValueError(f"{run} trained the whole model: load it without trainable=.")
    raise ValueError(
        f"{run} trained a part of a model, and the rest of `like` is not that model's: pass the "
        "model and the trainable= that `fit` was given, as adapted anew from the same parameters."
    )
