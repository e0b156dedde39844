"""Models from JSON: what a run folder holds of its model besides the arrays."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffrax
import jax

from .._rules import count, instance
from ..fields import LayerNorm, RMSNorm
from ..solvers import RK4, Geodesic, LieTrotter, NormalisedEuler, Strang
from .base import AbstractModel, Depth
from .blocks import BlockOf, attention, gpt2, llama, parallel, theory
from .curves import fourier, hypernetwork, interpolated, layered, shared, smooth
from .image import ImageClassifier
from .language import LanguageModel
from .residual import ResidualNetwork

MODELS: dict[str, Callable[..., AbstractModel]] = {
    "LanguageModel": LanguageModel,
    "ImageClassifier": ImageClassifier,
    "ResidualNetwork": ResidualNetwork,
}
BLOCKS: dict[str, Callable[..., BlockOf]] = {
    "gpt2": gpt2,
    "llama": llama,
    "parallel": parallel,
    "attention": attention,
    "theory": theory,
}
CURVES = {
    "layers": layered,
    "shared": shared,
    "linear": interpolated,
    "smooth": smooth,
    "fourier": fourier,
    "hyper": hypernetwork,
    "hyper-full": partial(hypernetwork, rank=None),
}
SOLVERS: dict[str, diffrax.AbstractSolver] = {
    "lie-trotter": LieTrotter(),
    "strang": Strang(),
    "euler": diffrax.Euler(),
    "normalised-euler": NormalisedEuler(),
    "midpoint": diffrax.Midpoint(),
    "heun": diffrax.Heun(),
    "rk4": RK4(),
    "bosh3": diffrax.Bosh3(),
    "tsit5": diffrax.Tsit5(),
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
    "geodesic": Geodesic(),
    "kvaerno3": diffrax.Kvaerno3(),
    "kvaerno5": diffrax.Kvaerno5(),
}
NORMS = {"layer": LayerNorm, "rms": RMSNorm}
ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu, "tanh": jax.nn.tanh}

SIZES = "dim", "heads", "layers"  # of a model and of each of its blocks
NAMED = {"curve": CURVES, "norm": NORMS, "activation": ACTIVATIONS}


def depth(
    *,
    t1: float | int,
    steps: int | None = None,
    tolerance: float | None = None,
    solver: str = "lie-trotter",
) -> Depth:
    """A `jaxflow.models.Depth` whose solver is named.

    **Arguments:** `t1`, `steps`, `tolerance`: as in `jaxflow.models.Depth`; `solver`: a name from
    `SOLVERS`.

    **Returns:** the depth.

    **Raises:** `ValueError` for another name; otherwise as `jaxflow.models.Depth`.

    ```python
    >>> jaxflow.models.depth(t1=4.0, steps=8, solver="heun").steps
    8

    ```
    """
    return Depth(t1=t1, steps=steps, tolerance=tolerance, solver=_named("solver", solver, SOLVERS))


def build(config: Mapping[str, Any]) -> AbstractModel:
    """The model of a configuration, with its initial parameters.

    **Arguments:**

    - `config`: `{"model": "LanguageModel", "seed": 0, "depth": {...}, ...}`: the name of a class,
      the seed of its PRNG key, the arguments of `jaxflow.models.depth`, and those of the class
      with names from `CURVES`, `NORMS` and `ACTIVATIONS` where it takes a function. A `block` is a
      name from `BLOCKS`, or `{"name": "llama", "kv_heads": 2, ...}` with arguments of it; `dim`,
      `heads` and `layers` are those of the model.

    **Returns:** an instance of the class that `model` names.

    **Raises:** `ValueError` or `TypeError` for names and values that make no model; `MemoryError`
    where its parameters do not fit.

    ```python
    >>> sizes = {"inputs": 4, "outputs": 2, "dim": 3, "layers": 1, "width": 2}
    >>> config = {"model": "ResidualNetwork", "depth": {"t1": 1.0, "steps": 1}} | sizes
    >>> jaxflow.models.build(config)(jnp.zeros(4)).shape
    (2,)

    ```
    """
    config = dict(instance("a configuration", config, Mapping, '{"model": "LanguageModel"}'))
    make = _named("model", config.pop("model", None), MODELS)
    seed = count("seed", config.pop("seed", 0), -(2**31))
    _check_arguments(make, config)
    _replace_names(config)
    if config.get("block") is not None:
        config["block"] = _block(config["block"], config, inspect.signature(make).parameters)
    if config.get("depth") is not None:
        arguments = instance("depth", config["depth"], Mapping, '{"t1": 1, "steps": 4}')
        _check_arguments(depth, arguments)
        config["depth"] = depth(**arguments)
    return make(**config, key=jax.random.key(seed))


def _replace_names(config: dict[str, Any]):
    for name, table in NAMED.items():
        if config.get(name) is not None:
            config[name] = _named(name, config[name], table)


def _block(given: Any, config: Mapping[str, Any], parameters: Mapping[str, Any]) -> BlockOf:
    """The block of a model with this configuration."""
    arguments = (
        {"name": given}
        if isinstance(given, str)
        else dict(instance("block", given, Mapping, '{"name": "llama"}'))
    )
    make = _named("block", arguments.pop("name", None), BLOCKS)
    sizes = {name: config.get(name, parameters[name].default) for name in SIZES}
    if set(arguments) & set(SIZES):
        raise ValueError(f"{', '.join(SIZES)} are those of the model: leave them out of its block.")
    _check_arguments(make, sizes | arguments)
    _replace_names(arguments)
    return make(**sizes, **arguments)


def _named(what: str, name: Any, table: Mapping[str, Any]) -> Any:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}; got {name!r}.")
    return table[name]


def _check_arguments(make: Callable, arguments: Mapping[str, Any]):
    """The arguments are those of a signature; a PRNG key is not written in a configuration."""
    parameters = dict(inspect.signature(make).parameters)
    parameters.pop("key", None)
    unknown = sorted(str(name) for name in arguments if name not in parameters)
    if unknown:
        raise ValueError(
            f"{make.__name__} takes no argument {', '.join(unknown)}, but {', '.join(parameters)}."
        )
    needed = [name for name, p in parameters.items() if p.default is p.empty]
    missing = [name for name in needed if name not in arguments]
    if missing:
        raise ValueError(f"{make.__name__} needs {', '.join(missing)} in its configuration.")
