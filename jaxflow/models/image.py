"""The image classifier."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._rules import count, flag, prng_key
from .._types import ArrayLike
from ..fields import AbstractField, AbstractNorm, LayerNorm
from ..measure import Measure
from .base import AbstractModel, Depth, depth_or_steps
from .blocks import STD, gpt2
from .curves import CurveOf, field_of, layered
from .ends import check_size, features, linear


class ImageClassifier(AbstractModel):
    """Attention and feed-forward on the patches of an image (arXiv 2010.11929).

    **Arguments:**

    - `shape`: (height, width, channels) of the images; `classes`; `patch`: the side of a patch, a
      divisor of height and width.
    - `dim`, `heads`, `layers`, `width`, `activation`, `curve`, `depth`, `placement`, `norm`,
      `dtype`, `backend`, `key`: as in `jaxflow.models.LanguageModel`.
    - `class_token`: read out from a token of its own instead of from the mean of the patches.

    Called with images `(*batch, height, width, channels)`, in floating point and scaled as for
    training, it returns logits `(*batch, classes)`.

    **Raises:** `ValueError` or `TypeError` for bad arguments and images; `MemoryError` where the
    parameters do not fit.
    """

    embedding: eqx.nn.Linear
    positions: Float[Array, "n d"]
    class_token: Float[Array, " d"] | None
    field: AbstractField
    norm: AbstractNorm
    output: eqx.nn.Linear
    depth: Depth
    shape: tuple[int, int, int] = eqx.field(static=True)
    patch: int = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        dim: int,
        heads: int,
        layers: int,
        *,
        patch: int,
        width: int | None = None,
        activation: Callable = jax.nn.gelu,
        curve: CurveOf = layered,
        depth: Depth | None = None,
        placement: str = "pre",
        norm: Callable[[int], AbstractNorm] = LayerNorm,
        class_token: bool = False,
        dtype: Any = None,
        backend: str | None = None,
        key: PRNGKeyArray,
    ):
        if not isinstance(shape, tuple | list) or len(shape) != 3:
            raise ValueError(f"shape must be (height, width, channels), got {shape!r}.")
        height, wide, channels = (count("each of shape", side) for side in shape)
        patch, classes = count("patch", patch), count("classes", classes)
        if height % patch or wide % patch:
            raise ValueError(f"patch must divide the image, got {patch} for {height} x {wide}.")
        n = height // patch * (wide // patch)
        hidden = 4 * count("dim", dim) if width is None else width
        block = gpt2(
            dim, heads, layers, width=width, activation=activation, placement=placement, norm=norm,
            bias=False, causal=False, dtype=dtype, backend=backend,
        )  # fmt: skip
        check_size(dim, layers, hidden, (patch**2 * channels + n + classes) * dim)
        keys = jax.random.split(prng_key(key), 5)
        self.depth = depth_or_steps(depth, float(layers), layers)
        self.field = field_of(block, layers, curve, self.depth, keys[0])
        self.embedding = eqx.nn.Linear(patch * patch * channels, dim, key=keys[1])
        self.positions = STD * jax.random.normal(keys[2], (n, dim))
        self.class_token = (
            STD * jax.random.normal(keys[3], (dim,)) if flag("class_token", class_token) else None
        )
        self.norm = norm(dim)
        self.output = eqx.nn.Linear(dim, classes, key=keys[4])
        self.shape = height, wide, channels
        self.patch = patch

    def embed(self, inputs: ArrayLike) -> Measure:
        inputs = features("pixels", inputs, self.positions)
        if inputs.shape[-3:] != self.shape:
            raise ValueError(f"images must have shape {self.shape}, got {inputs.shape[-3:]}.")
        batch, (height, wide, channels), p = inputs.shape[:-3], self.shape, self.patch
        x = inputs.reshape(-1, height // p, p, wide // p, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(*batch, len(self.positions), p * p * channels)
        x = linear(self.embedding, x)
        x = x + jnp.broadcast_to(self.positions, x.shape)
        if self.class_token is not None:
            first = jnp.broadcast_to(self.class_token, (*batch, 1, x.shape[-1]))
            x = jnp.concatenate([first, x], axis=-2)
        return Measure(self.field.geometry.retract(x))

    def read_out(self, mu: Measure) -> Float[Array, "*batch classes"]:
        x = self.norm(mu.points)
        pooled = x.mean(axis=-2) if self.class_token is None else x[..., 0, :]
        return linear(self.output, pooled)
