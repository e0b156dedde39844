"""The ends of a model: what reads the inputs in and the outputs out, and whether it all fits."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._memory import check_fits
from .._rules import array
from .._types import ArrayLike


def check_size(dim: int, layers: int, width: int, others: int):
    """The parameters of L blocks and so many others must fit."""
    check_numbers(layers * (4 * dim**2 + 2 * dim * width) + others)


def check_numbers(numbers: int):
    """So many parameters, and two arrays of their size, must fit."""
    check_fits(
        3 * 4 * numbers,
        f"a model of {numbers:.2e} parameters",
        "Take a smaller vocabulary or image, fewer layers, or a smaller dim or width.",
    )


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
    return y if layer.bias is None else y + jnp.broadcast_to(layer.bias.astype(y.dtype), y.shape)


def project(x, matrix, dtype):
    """x R^T, computed in `dtype`, in the dtype of x."""
    operands = x.astype(dtype or x.dtype), matrix.T.astype(dtype or x.dtype)
    return jnp.matmul(*operands, precision="highest", preferred_element_type=x.dtype)
