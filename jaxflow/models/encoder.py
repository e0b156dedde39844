"""The encoder of a text."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import ArrayLike, accumulation_dtype
from ..fields import AbstractField, AbstractNorm
from ..measure import Measure
from . import generation
from .base import AbstractModel, Depth
from .ends import linear


class Encoder(AbstractModel):
    """An encoder of texts, such as BERT and ALBERT, whose depth is time.

        x_i(0) = W N(E[token_i] + position_i + type_0) + b,   hidden_i = x_i(T)

    `jaxflow.models.from_pretrained` makes one.

    **Arguments:**

    - `embedding` E, `positions` and `types`, of dimension e; `norm` N of them.
    - `projection`: x -> W x + b from R^e to R^d; `None` is the identity.
    - `field`, of tokens of dimension d; `depth`.

    Called with tokens `(*batch, n)`, integers below the size of the vocabulary, it returns hidden
    states `(*batch, n, d)`. All tokens of a text see each other, and are of its first part.

    **Raises:** `ValueError` or `TypeError` for tokens outside the vocabulary, and for more of them
    than there are positions.
    """

    embedding: Float[Array, "vocabulary e"]
    positions: Float[Array, "context e"]
    types: Float[Array, "types e"]
    norm: AbstractNorm
    projection: eqx.nn.Linear | None
    field: AbstractField
    depth: Depth

    @property
    def context(self) -> int:
        """The longest text."""
        return len(self.positions)

    def embed(self, inputs: ArrayLike) -> Measure:
        tokens = generation.tokens(inputs, len(self.embedding))
        if (n := tokens.shape[-1]) > self.context:
            raise ValueError(
                f"the encoder has positions for {self.context} tokens, got {n}: cut them."
            )
        dtype = accumulation_dtype(self.embedding.dtype)
        x = generation.rows(self.embedding, tokens)
        here = self.positions[:n].astype(dtype) + self.types[:1].astype(dtype)
        x = self.norm(x + jnp.broadcast_to(here, x.shape))
        return Measure(x if self.projection is None else linear(self.projection, x))

    def read_out(self, mu: Measure) -> Float[Array, "*batch n d"]:
        return mu.points
