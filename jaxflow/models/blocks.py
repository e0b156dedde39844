"""The blocks of a model: functions of a PRNG key, each of which makes the field of one block.

    gpt2         attention(N x), then W2 sigma(W1 N x)             arXiv 1706.03762, GPT-2
    llama        the same with RMSNorm, SwiGLU, rotary positions   arXiv 2302.13971
                 and grouped queries
    parallel     attention(N x) + W2 sigma(W1 N x) at once         arXiv 2204.02311, section 2
    attention    attention(N x) alone, or of x itself
    theory       P_x sum_h A_h^T E[A_h y] on the unit sphere       arXiv 2312.10794

Each takes the dimension d of a token, the number of heads and the number L of blocks of the model,
by which the weights that end a block are scaled. Any other function of a key that makes a causal
field is a block as well:

    block = lambda key: jaxflow.PreNorm(jaxflow.MultiHeadAttention(8, 2, causal=True, key=key), ...)
    LanguageModel(vocab_size=65, dim=8, layers=2, context=32, block=block, key=key)
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .._rules import check_real, count, flag, floating, function
from .._types import ScalarLike
from ..fields import (
    AbstractField,
    AbstractNorm,
    FeedForward,
    GatedFeedForward,
    LayerNorm,
    MultiHeadAttention,
    PeriNorm,
    PreNorm,
    RMSNorm,
    TiedAttention,
    Whole,
)
from ..geometry import Euclidean, Sphere

STD = 0.02  # of the initial weights, as in GPT-2

BlockOf = Callable[[PRNGKeyArray], AbstractField]
NormOf = Callable[[int], AbstractNorm]


def gpt2(
    dim: int,
    heads: int,
    layers: int,
    *,
    width: int | None = None,
    activation: Callable = jax.nn.gelu,
    placement: str = "pre",
    norm: NormOf = LayerNorm,
    rotary: bool = False,
    bias: bool = True,
    causal: bool = True,
    dtype: Any = None,
    backend: str | None = None,
) -> BlockOf:
    """The block of GPT-2: attention, then a feed-forward layer, each of normalised tokens.

    **Arguments:** `dim`, `heads`, `layers`; the others as in `jaxflow.models.LanguageModel`, a
    `width` of 0 for no feed-forward layer; `causal`, whether a token sees those before it alone.

    **Returns:** a function of a PRNG key.

    **Raises:** `ValueError` or `TypeError` for what makes no block.

    ```python
    >>> block = jaxflow.models.gpt2(8, heads=2, layers=1)
    >>> field = block(jax.random.key(0))  # of one layer, in R^8

    ```
    """
    if placement not in ("pre", "peri", "post"):
        raise ValueError(f'placement must be "pre", "peri" or "post", got {placement!r}.')
    if placement == "post" and dtype is not None:
        raise ValueError('dtype is of the fields between norms: use placement "pre" or "peri".')
    width = _sizes(dim, heads, layers, 4 * count("dim", dim) if width is None else width, least=0)
    function("activation", activation)
    function("norm", norm)
    base, dtype = 10000.0 if flag("rotary", rotary) else None, floating("dtype", dtype)
    geometry = Sphere(math.sqrt(dim)) if placement == "post" else Euclidean()
    inside: dict[str, Any] = {"causal": causal, "rotary": base, "bias": bias, "backend": backend}

    def normalised(field):
        if placement == "post":
            return field
        field = PreNorm(field, norm(dim), dtype=dtype)
        return PeriNorm(field, norm(dim)) if placement == "peri" else field

    def block(key):
        first, second = jax.random.split(key)
        attention = MultiHeadAttention(dim, heads, **inside, geometry=geometry, key=first)
        attention = normalised(small(attention, lambda field: field.output, layers))
        if not width:
            return attention
        forward = FeedForward(dim, width, activation, geometry=geometry, key=second)
        return attention + normalised(small(forward, lambda field: field.weight_out, layers))

    return block


def llama(
    dim: int,
    heads: int,
    layers: int,
    *,
    kv_heads: int | None = None,
    width: int | None = None,
    base: float = 10000.0,
    bias: bool = False,
    dtype: Any = None,
    backend: str | None = None,
) -> BlockOf:
    """The block of Llama (arXiv 2302.13971): RMSNorm, rotary positions, grouped queries, SwiGLU.

    **Arguments:** `dim`, `heads`, `layers`; `kv_heads`, the number of keys and values, by default
    the largest divisor of the heads that is at most their half; `width` of the gated layer, by
    default 8 d / 3 rounded up to a multiple of 8, which has the parameters of an ungated one of
    width 4 d; `base` of the rotary positions; `bias`, `dtype`, `backend` as in
    `jaxflow.models.LanguageModel`.

    **Returns:** a function of a PRNG key.

    **Raises:** `ValueError` or `TypeError` for what makes no block.

    ```python
    >>> block = jaxflow.models.llama(8, heads=2, layers=1)
    >>> field = block(jax.random.key(0))  # of one layer, in R^8

    ```
    """
    width = _sizes(dim, heads, layers, 8 * -(-count("dim", dim) // 3) if width is None else width)
    kv_heads = _half(heads) if kv_heads is None else kv_heads
    dtype = floating("dtype", dtype)
    inside: dict[str, Any] = {"kv_heads": kv_heads, "rotary": base, "bias": flag("bias", bias)}

    def block(key):
        first, second = jax.random.split(key)
        attention = MultiHeadAttention(
            dim, heads, **inside, causal=True, backend=backend, key=first
        )
        attention = small(attention, lambda field: field.output, layers)
        forward = small(
            GatedFeedForward(dim, width, key=second), lambda field: field.weight_out, layers
        )
        return PreNorm(attention, RMSNorm(dim), dtype=dtype) + PreNorm(
            forward, RMSNorm(dim), dtype=dtype
        )

    return block


def parallel(
    dim: int,
    heads: int,
    layers: int,
    *,
    width: int | None = None,
    activation: Callable = jax.nn.gelu,
    norm: NormOf = LayerNorm,
    bias: bool = False,
    dtype: Any = None,
    backend: str | None = None,
) -> BlockOf:
    """Attention and a feed-forward layer at once, of the same normalised tokens (arXiv 2204.02311).

        X[mu](x) = attention[N_# mu](N x) + W2 sigma(W1 N x + b1) + b2

    A splitting method steps with it as a whole.

    **Arguments:** `dim`, `heads`, `layers`; the others as in `jaxflow.models.LanguageModel`.

    **Returns:** a function of a PRNG key.

    **Raises:** `ValueError` or `TypeError` for what makes no block.

    ```python
    >>> block = jaxflow.models.parallel(8, heads=2, layers=1)
    >>> field = block(jax.random.key(0))  # of one layer, in R^8

    ```
    """
    width = _sizes(dim, heads, layers, 4 * count("dim", dim) if width is None else width)
    function("activation", activation)
    function("norm", norm)
    dtype = floating("dtype", dtype)

    def block(key):
        first, second = jax.random.split(key)
        attention = MultiHeadAttention(
            dim, heads, causal=True, bias=bias, backend=backend, key=first
        )
        forward = FeedForward(dim, width, activation, key=second)
        both = small(attention, lambda field: field.output, layers) + small(
            forward, lambda field: field.weight_out, layers
        )
        return Whole(PreNorm(both, norm(dim), dtype=dtype))

    return block


def attention(
    dim: int,
    heads: int,
    layers: int,
    *,
    norm: NormOf | None = LayerNorm,
    bias: bool = True,
    causal: bool = True,
    backend: str | None = None,
) -> BlockOf:
    """Attention alone, for models whose training has a transport cost.

    Such models (arXiv 2505.13499) take a transformer as the velocity, Euler's steps, and add
    int |x'|^2 dt to the loss: `curve=jaxflow.models.shared` of one block, and in training
    `FlowLoss(cross_entropy, {"kinetic": (weight, jaxflow.observables.KineticEnergy)})`.

    **Arguments:** `dim`, `heads`, `layers`; `norm`, of the tokens that attention sees, or `None`
    for none; `bias`, `backend` as in `jaxflow.models.LanguageModel`; `causal`, whether a token
    sees those before it alone.

    **Returns:** a function of a PRNG key.

    **Raises:** `ValueError` or `TypeError` for what makes no block.

    ```python
    >>> block = jaxflow.models.attention(8, heads=2, layers=1)
    >>> field = block(jax.random.key(0))  # of one layer, in R^8

    ```
    """
    _sizes(dim, heads, layers, 1)

    def block(key):
        field = MultiHeadAttention(dim, heads, causal=causal, bias=bias, backend=backend, key=key)
        field = small(field, lambda field: field.output, layers)
        return field if norm is None else PreNorm(field, norm(dim))

    return block


def theory(
    dim: int,
    heads: int,
    layers: int,
    *,
    beta: ScalarLike = 4.0,
    backend: str | None = None,
) -> BlockOf:
    """The block of the theory: tokens on the unit sphere, one matrix A_h a head for query, key and
    value, an inverse temperature a head, and nothing else.

        X[mu](x) = P_x ( sum_h A_h^T E_{mu_x^h}[A_h y] )

    It is `jaxflow.fields.TiedAttention`. Matrices have the scale N(0, 1/d) that moves tokens by
    about 1 in a unit of time, whatever the number of blocks.

    **Arguments:** `dim`, `heads`, `layers`; `beta`, where the inverse temperatures start, in units
    of d/p: the scores of two equal tokens are about `beta`; `backend` as in
    `jaxflow.models.LanguageModel`.

    **Returns:** a function of a PRNG key.

    **Raises:** `ValueError` or `TypeError` for what makes no block.

    ```python
    >>> block = jaxflow.models.theory(8, heads=2, layers=1)
    >>> field = block(jax.random.key(0))  # of one layer, in R^8

    ```
    """
    _sizes(dim, heads, layers, 1)
    check_real("beta", beta)

    def block(key):
        return TiedAttention(dim, heads, beta=heads * beta, causal=True, backend=backend, key=key)

    return block


def small(field: Any, last: Callable[[Any], Array], layers: int) -> Any:
    """The field with GPT-2's initial scale: its matrices have entries of size 0.02, the `last` one,
    which ends a block, over sqrt(2 L)."""
    is_matrix = lambda a: eqx.is_inexact_array(a) and a.ndim > 1
    scaled = lambda a: a * (STD / jnp.sqrt(jnp.mean(a**2))) if is_matrix(a) else a
    field = jax.tree.map(scaled, field)
    return eqx.tree_at(last, field, last(field) / math.sqrt(2 * layers))


def _sizes(dim: int, heads: int, layers: int, width: int, *, least: int = 1) -> int:
    """The width of a block whose sizes are whole numbers."""
    for name, size in {"dim": dim, "heads": heads, "layers": layers}.items():
        count(name, size)
    if dim % heads:
        raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}.")
    return count("width", width, least)


def _half(heads: int) -> int:
    return max((g for g in range(1, heads // 2 + 1) if heads % g == 0), default=heads)
