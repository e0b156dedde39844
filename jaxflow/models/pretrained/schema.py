"""The entries of a config.json: each is asked for by its name, its kind and its default."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax

from ..._rules import constant, count, positive

Config = Mapping[str, Any]

ACTIVATIONS: dict[str, Callable] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}


def size(config: Config, name: str, default: int | None = None) -> int:
    """A whole number, at least 1; `null` in the file is the default as well."""
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"config.json has no {name}.")
    return _read(name, partial(count, name, value))


def number(config: Config, name: str, default: float) -> float:
    """A positive number."""
    value = config.get(name, default)
    return _read(name, partial(constant, name, value, "positive and finite", positive))


def choice(config: Config, name: str, of: Iterable[str], default: str | None = None) -> str:
    value = config.get(name, default)
    if not isinstance(value, str) or value not in of:
        raise ValueError(f"{name} in config.json must be one of {', '.join(of)}; got {value!r}.")
    return value


def switch(config: Config, name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name} in config.json must be true or false, got {value!r}.")
    return value


def only(config: Config, **values: Any):
    """Options that have to be as they are nearly always."""
    for name, value in values.items():
        if (found := config.get(name, value)) != value:
            raise ValueError(f"{name}={found!r} in config.json is not supported, but {value!r}.")


def activation(config: Config, name: str, default: str) -> Callable:
    return ACTIVATIONS[choice(config, name, ACTIVATIONS, default)]


def _read(name: str, rule: Callable[[], Any]) -> Any:
    try:
        return rule()
    except TypeError as error:
        raise ValueError(f"config.json: {error}") from None
