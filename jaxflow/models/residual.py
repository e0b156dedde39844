"""The residual network."""

import math
from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import array, count, is_real, prng_key
from .._types import ArrayLike
from ..fields import AbstractField, FeedForward
from ..measure import Measure
from .base import AbstractModel, Depth, depth_or_steps
from .blocks import small
from .curves import CurveOf, field_of, layered
from .ends import check_size, linear


class ResidualNetwork(AbstractModel):
    """A residual network, and the neural ODE of the same block (arXiv 1806.07366).

        x <- x + dt (W2 sigma(W1 x + b1) + b2)    or    dx/dt = W2 sigma(W1 x + b1) + b2

    **Arguments:** `inputs`, `outputs`: the numbers of features; `dim`: of the state; `layers`;
    `width`: of the hidden layer; `activation`, `curve`, `depth`, `key` as in
    `jaxflow.models.LanguageModel`.

    Called with features `(*batch, inputs)`, or with images of that many numbers `(*batch, height,
    width, channels)`, it returns `(*batch, outputs)`.

    **Raises:** `ValueError` or `TypeError` for bad arguments and features; `MemoryError` where the
    parameters do not fit.
    """

    embedding: eqx.nn.Linear
    field: AbstractField
    output: eqx.nn.Linear
    depth: Depth

    def __init__(
        self,
        inputs: int,
        outputs: int,
        dim: int,
        layers: int,
        *,
        width: int,
        activation: Callable = jax.nn.relu,
        curve: CurveOf = layered,
        depth: Depth | None = None,
        key: PRNGKeyArray,
    ):
        sizes = {"inputs": inputs, "outputs": outputs, "dim": dim, "layers": layers, "width": width}
        for name, size in sizes.items():
            count(name, size)
        check_size(dim, layers, width, (inputs + outputs) * dim)
        keys = jax.random.split(prng_key(key), 3)
        self.depth = depth_or_steps(depth, 1.0, layers)
        self.embedding = eqx.nn.Linear(inputs, dim, key=keys[0])
        self.output = eqx.nn.Linear(dim, outputs, key=keys[1])

        def make(key):
            field = FeedForward(dim, width, activation, key=key)
            return small(field, lambda field: field.weight_out, layers)

        self.field = field_of(make, layers, curve, self.depth, keys[2])

    def embed(self, inputs: ArrayLike) -> Measure:
        """Every sample is a system of one token."""
        inputs = array("features", inputs)
        if not is_real(inputs):
            raise TypeError(f"features must be real numbers, got {inputs.dtype}.")
        inputs = inputs.astype(self.embedding.weight.dtype)
        features, shape = self.embedding.in_features, inputs.shape
        if len(shape) > 2 and shape[-1] != features and math.prod(shape[-3:]) == features:
            inputs = inputs.reshape(*shape[:-3], features)
        if inputs.shape[-1:] != (features,):
            raise ValueError(
                f"the network takes {features} features, or images of as many numbers; got {shape}."
            )
        return Measure(linear(self.embedding, inputs)[..., None, :])

    def read_out(self, mu: Measure) -> Float[Array, "*batch outputs"]:
        return linear(self.output, mu.points[..., 0, :])
