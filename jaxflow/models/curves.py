"""The curves that L blocks make of the parameters of a model."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from .._rules import count, function, instance
from ..fields import (
    AbstractCurve,
    AbstractField,
    Constant,
    Fourier,
    HyperNetwork,
    Legendre,
    PiecewiseConstant,
    PiecewiseLinear,
    TimeDependent,
)
from ..fields.base import is_field
from .base import Depth

CurveOf = Callable[[list[AbstractField], float], AbstractCurve]


def layered(blocks: list[AbstractField], t1: float) -> PiecewiseConstant:
    """L blocks one after the other: a transformer.

    **Arguments:** `blocks`: L fields of one structure; `t1`: T, the depth.

    **Returns:** a `jaxflow.PiecewiseConstant` with the edges l T / L.

    **Raises:** `ValueError` for blocks of different structures.

    ```python
    >>> blocks = [jaxflow.SelfAttention(beta=jnp.array(b)) for b in (1.0, 2.0)]
    >>> curve = jaxflow.models.layered(blocks, 2.0)
    >>> curve.breakpoints
    (1.0,)

    ```
    """
    return PiecewiseConstant(blocks, np.linspace(0, t1, len(blocks) + 1))


def shared(blocks: list[AbstractField], t1: float) -> Constant:
    """The first block at every depth.

    **Arguments:** `blocks`: fields, of which the first is taken; `t1`: T, which changes nothing.

    **Returns:** a `jaxflow.Constant`.

    **Raises:** `TypeError` where the first is no field.

    ```python
    >>> blocks = [jaxflow.SelfAttention(beta=jnp.array(b)) for b in (1.0, 2.0)]
    >>> curve = jaxflow.models.shared(blocks, 2.0)
    >>> curve.at(0.5).beta.tolist()
    1.0

    ```
    """
    return Constant(blocks[0])


def interpolated(blocks: list[AbstractField], t1: float) -> PiecewiseLinear:
    """The blocks at equal distances, and what is linear between them.

    **Arguments:** `blocks`: L fields of one structure, at least two; `t1`: T, the depth.

    **Returns:** a `jaxflow.PiecewiseLinear` with the times l T / (L - 1).

    **Raises:** `ValueError` for fewer than two blocks.

    ```python
    >>> blocks = [jaxflow.SelfAttention(beta=jnp.array(b)) for b in (1.0, 2.0)]
    >>> curve = jaxflow.models.interpolated(blocks, 2.0)
    >>> curve.at(0.5).beta.tolist()
    1.25

    ```
    """
    if len(blocks) < 2:
        raise ValueError("interpolation needs at least two blocks.")
    return PiecewiseLinear(blocks, np.linspace(0, t1, len(blocks)))


def smooth(blocks: list[AbstractField], t1: float) -> Legendre:
    """L Legendre polynomials, at the start of training constant in time: the first block.

    **Arguments:** `blocks`: L fields of one structure; `t1`: T, the depth.

    **Returns:** a `jaxflow.Legendre` on [0, T].

    **Raises:** `ValueError` for blocks of different structures.

    ```python
    >>> blocks = [jaxflow.SelfAttention(beta=jnp.array(b)) for b in (1.0, 2.0)]
    >>> curve = jaxflow.models.smooth(blocks, 2.0)
    >>> curve.at(0.5).beta.round(3).tolist()
    1.0

    ```
    """
    return Legendre(_first_alone(blocks), 0.0, t1)


def fourier(blocks: list[AbstractField], t1: float) -> Fourier:
    """An odd number L of Fourier coefficients, of period 2 T so that the ends differ; at the start
    of training constant in time: the first block.

    **Arguments:** `blocks`: L fields of one structure; `t1`: T, the depth.

    **Returns:** a `jaxflow.Fourier`.

    **Raises:** `ValueError` for an even number of blocks, or blocks of different structures.

    ```python
    >>> blocks = [jaxflow.SelfAttention(beta=jnp.array(b)) for b in (1.0, 2.0, 3.0)]
    >>> curve = jaxflow.models.fourier(blocks, 2.0)  # the first block, before it is trained
    >>> curve.at(0.5).beta.tolist()
    1.0

    ```
    """
    return Fourier(_first_alone(blocks), 2 * t1)


def _first_alone(blocks: list[AbstractField]) -> list[Any]:
    nothing = lambda a: 0 * a if eqx.is_inexact_array(a) else a
    return [blocks[0], *(jax.tree.map(nothing, block) for block in blocks[1:])]


def hypernetwork(
    blocks: list[AbstractField],
    t1: float,
    *,
    width: int = 64,
    rank: int | None = 8,
    key: PRNGKeyArray | None = None,
) -> HyperNetwork:
    """The first block, moved in time by a network, which moves nothing before it is trained.

    Another `key` of the network's weights, width or rank go in by `functools.partial`.

    **Arguments:** `blocks`: fields, of which the first is taken; `t1`: T, the depth; `width`,
    `rank`: as in `jaxflow.HyperNetwork`; `key`: of the network's weights, `jax.random.key(0)` by
    default.

    **Returns:** a `jaxflow.HyperNetwork`.

    **Raises:** as `jaxflow.HyperNetwork`.

    ```python
    >>> block = jaxflow.models.theory(8, heads=2, layers=1)
    >>> blocks = [block(jax.random.key(i)) for i in range(2)]
    >>> curve = jaxflow.models.hypernetwork(blocks, 2.0, key=jax.random.key(2))
    >>> type(curve.at(0.5)) is type(blocks[0])
    True

    ```
    """
    key = jax.random.key(0) if key is None else key
    return HyperNetwork(blocks[0], width=width, rank=rank, t1=t1, key=key)


# ------------------------------------------------------------------ the field of a model


def field_of(
    block: Callable[[PRNGKeyArray], AbstractField],
    layers: int,
    curve: CurveOf,
    depth: Depth,
    key: PRNGKeyArray,
) -> TimeDependent:
    """The field of a model, from the function that makes a block of a key."""
    count("layers", layers)
    function("curve", curve)
    made = [block(k) for k in jax.random.split(key, layers)]
    made = [_like(is_field(made[0]), other) for other in made]
    example = "one of jaxflow.models.layered"
    return TimeDependent(instance("curve's result", curve(made, depth.t1), AbstractCurve, example))


def _like(first: AbstractField, other: Any) -> AbstractField:
    """The arrays of the other block in the structure of the first: a function that a block makes
    anew each time, such as a lambda for its activation, is one."""
    arrays, rest = eqx.partition(first, eqx.is_array)
    found, structure = jax.tree.leaves(eqx.filter(other, eqx.is_array)), jax.tree.structure(arrays)
    shapes = lambda arrays: [(a.shape, a.dtype) for a in arrays]
    if shapes(found) != shapes(jax.tree.leaves(arrays)):
        raise ValueError(
            "a block must have the same arrays from every key, so that they make a curve; got "
            f"{shapes(jax.tree.leaves(arrays))} and {shapes(found)}."
        )
    return eqx.combine(jax.tree.unflatten(structure, found), rest)
