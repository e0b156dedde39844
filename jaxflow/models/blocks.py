"""The blocks of a model, and the curves that they make."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._memory import check_fits
from .._rules import array, count, flag, floating, function, instance
from .._types import ArrayLike
from ..fields import (
    AbstractCurve,
    AbstractField,
    AbstractNorm,
    Constant,
    FeedForward,
    Fourier,
    HyperNetwork,
    Legendre,
    MultiHeadAttention,
    PeriNorm,
    PiecewiseConstant,
    PiecewiseLinear,
    PreNorm,
    TimeDependent,
)
from ..geometry import Euclidean, Sphere
from .base import Depth

STD = 0.02  # of the initial weights, as in GPT-2

CurveOf = Callable[[list[AbstractField], float], AbstractCurve]


# ------------------------------------------------------------------ curves of L blocks


def layered(blocks: list[AbstractField], t1: float) -> PiecewiseConstant:
    """L blocks one after the other: a transformer."""
    return PiecewiseConstant(blocks, np.linspace(0, t1, len(blocks) + 1))


def shared(blocks: list[AbstractField], t1: float) -> Constant:
    """The first block at every depth."""
    return Constant(blocks[0])


def interpolated(blocks: list[AbstractField], t1: float) -> PiecewiseLinear:
    """The blocks at equal distances, and what is linear between them.

    **Raises:** `ValueError` for fewer than two blocks.
    """
    if len(blocks) < 2:
        raise ValueError("interpolation needs at least two blocks.")
    return PiecewiseLinear(blocks, np.linspace(0, t1, len(blocks)))


def smooth(blocks: list[AbstractField], t1: float) -> Legendre:
    """L Legendre polynomials, at the start of training constant in time: the first block."""
    return Legendre(_first_alone(blocks), 0.0, t1)


def fourier(blocks: list[AbstractField], t1: float) -> Fourier:
    """An odd number L of Fourier coefficients, of period 2 T so that the ends differ; at the start
    of training constant in time: the first block."""
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
    """
    key = jax.random.key(0) if key is None else key
    return HyperNetwork(blocks[0], width=width, rank=rank, t1=t1, key=key)


# ------------------------------------------------------------------ one block


class Block(eqx.Module):
    """Makes the field of one block, attention + feed-forward, from a PRNG key.

    **Arguments:** as in [`jaxflow.models.LanguageModel`][]; `layers`: the number L of blocks of the
    model, by which the weights that end a block are scaled; `width`: 0 for no feed-forward.

    **Raises:** `ValueError` or `TypeError` for what makes no block.
    """

    dim: int
    heads: int
    layers: int
    width: int
    activation: Callable
    placement: str
    norm: Callable[[int], AbstractNorm]
    dtype: Any
    causal: bool = False
    rotary: bool = False
    backend: str | None = None

    def __check_init__(self):
        if self.placement not in ("pre", "peri", "post"):
            raise ValueError(f'placement must be "pre", "peri" or "post", got {self.placement!r}.')
        if self.placement == "post" and self.dtype is not None:
            raise ValueError('dtype is of the fields between norms: use placement "pre" or "peri".')
        for name in ("dim", "heads", "layers"):
            count(name, getattr(self, name))
        count("width", self.width, 0)
        function("activation", self.activation)
        function("norm", self.norm)
        floating("dtype", self.dtype)
        flag("rotary", self.rotary)

    def __call__(self, key: PRNGKeyArray) -> AbstractField:
        first, second = jax.random.split(key)
        sphere = self.placement == "post"
        geometry = Sphere(math.sqrt(self.dim)) if sphere else Euclidean()
        attention = MultiHeadAttention(
            self.dim,
            self.heads,
            causal=self.causal,
            rotary=10000.0 if self.rotary else None,
            geometry=geometry,
            backend=self.backend,
            key=first,
        )
        attention = small(attention, lambda field: field.output, self.layers)
        if not self.width:
            return self._normalised(attention)
        forward = FeedForward(self.dim, self.width, self.activation, geometry=geometry, key=second)
        forward = small(forward, lambda field: field.weight_out, self.layers)
        return self._normalised(attention) + self._normalised(forward)

    def _normalised(self, field: AbstractField) -> AbstractField:
        if self.placement == "post":
            return field
        field = PreNorm(field, self.norm(self.dim), dtype=self.dtype)
        return (
            PeriNorm(field=field, norm=self.norm(self.dim)) if self.placement == "peri" else field
        )


def blocks(
    make: Callable[[PRNGKeyArray], AbstractField],
    layers: int,
    curve: CurveOf,
    depth: Depth,
    key: PRNGKeyArray,
) -> TimeDependent:
    """The field of a model, from the maker of a block."""
    count("layers", layers)
    function("curve", curve)
    made = [make(k) for k in jax.random.split(key, layers)]
    example = "one of jaxflow.models.layered"
    return TimeDependent(instance("curve's result", curve(made, depth.t1), AbstractCurve, example))


def check_size(dim: int, layers: int, width: int, others: int):
    """The parameters of L blocks and so many others, and two arrays of their size, must fit."""
    numbers = layers * (4 * dim**2 + 2 * dim * width) + others
    check_fits(
        3 * 4 * numbers,
        f"a model of {numbers:.2e} parameters",
        "Take a smaller vocabulary or image, fewer layers, or a smaller dim or width.",
    )


def small(field: Any, last: Callable[[Any], Array], layers: int) -> Any:
    """The field with GPT-2's initial scale: its matrices have entries of size 0.02, the `last` one,
    which ends a block, over sqrt(2 L)."""
    is_matrix = lambda a: eqx.is_inexact_array(a) and a.ndim > 1
    scaled = lambda a: a * (STD / jnp.sqrt(jnp.mean(a**2))) if is_matrix(a) else a
    field = jax.tree.map(scaled, field)
    return eqx.tree_at(last, field, last(field) / math.sqrt(2 * layers))


# ------------------------------------------------------------------ pieces


def features(name: str, values: ArrayLike, like: Array) -> Array:
    """Floating-point numbers in the dtype of parameters."""
    values = array(name, values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {values.dtype}. Scale them as for training: "
            "pixels of 8 bits are x / 255."
        )
    return values.astype(like.dtype)


def linear(layer: eqx.nn.Linear, x: Float[Array, "*batch features"]):
    y = project(x, layer.weight, None)
    return y if layer.bias is None else y + jnp.broadcast_to(layer.bias, y.shape)


def project(x, matrix, dtype):
    """x R^T, computed in `dtype`, in the dtype of x."""
    operands = x.astype(dtype or x.dtype), matrix.T.astype(dtype or x.dtype)
    return jnp.matmul(*operands, precision="highest", preferred_element_type=x.dtype)
