"""The causal language model."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._rules import array, count, flag, function, prng_key
from .._types import ArrayLike, ScalarLike, is_concrete
from ..fields import AbstractField, AbstractNorm, LayerNorm
from ..fields.base import all_fields, can_be_continued, is_field
from ..measure import Measure
from . import generation
from .base import AbstractModel, Depth, depth_or_steps
from .blocks import STD, BlockOf, gpt2
from .curves import CurveOf, field_of, layered
from .ends import check_numbers, check_size, project
from .exits import AbstractExit, check_exit


class LanguageModel(AbstractModel):
    """A causal language model whose depth is time.

        x_i(0) = E[token_i] + position_i,   logits_i = R N(x_i(T))

    With the default depth it is GPT-2's pre-LN transformer (without biases in attention, unless
    `bias=True`).

    **Arguments:**

    - `vocab_size`; `dim`: d; `heads`: H; `layers`: L, the number of blocks; `context`: the
      longest input.
    - `block`: a function of a PRNG key that makes one block, any causal field of tokens of
      dimension d, such as `jaxflow.models.llama`(d, H, L). The default is
      `jaxflow.models.gpt2` with `heads`, `width`, `activation`, `placement`, `norm`, `rotary`,
      `bias`, `dtype` and `backend`.
    - `width`: of the feed-forward layers, default 4 d, 0 for none; `activation`: theirs.
    - `curve`: makes the parameters' curve from L blocks and t1; see `jaxflow.models.layered`.
    - `depth`: default L steps of length 1.
    - `placement`: "pre", "peri" or "post", where tokens are normalised
      (jaxflow/fields/normalisation.py); `norm`: `LayerNorm` or `RMSNorm`.
    - `rotary`: rotary embeddings of positions instead of learned ones. Of another `block`: whether
      no positions are learned; `None` is yes where it has rotary attention.
    - `bias`: whether attention has biases.
    - `normalised`: start at x_i(0) = N_0(E[token_i] + position_i), as BERT does, with another norm
      of `norm`. Without, tokens start at a size of 0.02, where the norms in the blocks turn fast:
      the first layers of a transformer step over that, and adaptive steps resolve it. With
      `placement="peri"` no token is fast at any time, and a model trained so by drawn steps of an
      unsplit method keeps its loss under finer steps and adaptive ones.
    - `tied`: R = E; else R has weights of its own.
    - `dtype`: of attention and feed-forward, such as bfloat16; parameters and state are float32.
    - `backend`: of attention, as in `jaxflow.softmax_expectation`.
    - `key`: PRNG key. Weights are N(0, 0.02^2), those that end a block over sqrt(2 L) (GPT-2).

    Called with tokens `(*batch, n)`, integers below `vocab_size`, it returns logits
    `(*batch, n, vocab_size)`.

    **Raises:** `ValueError` or `TypeError` for bad arguments, and for tokens outside the vocabulary
    (traced ones get logits of nan); `MemoryError` where the parameters do not fit.

    ```python
    >>> model = jaxflow.models.LanguageModel(
    ...     vocab_size=11, dim=8, heads=2, layers=1, context=8, key=jax.random.key(0)
    ... )
    >>> model(jnp.array([3, 1, 4])).shape
    (3, 11)
    >>> model.generate([3, 1, 4], 2, temperature=0).shape
    (5,)

    ```
    """

    embedding: Float[Array, "vocabulary d"]
    positions: Float[Array, "context d"] | None
    field: AbstractField
    entry: AbstractNorm | None
    norm: AbstractNorm
    output: Float[Array, "vocabulary d"] | None
    depth: Depth
    context: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        heads: int = 4,
        layers: int = 4,
        context: int = 128,
        *,
        block: BlockOf | None = None,
        width: int | None = None,
        activation: Callable = jax.nn.gelu,
        curve: CurveOf = layered,
        depth: Depth | None = None,
        placement: str = "pre",
        norm: Callable[[int], AbstractNorm] = LayerNorm,
        rotary: bool | None = None,
        bias: bool = False,
        normalised: bool = False,
        tied: bool = True,
        dtype: Any = None,
        backend: str | None = None,
        key: PRNGKeyArray,
    ):
        vocab_size, context = count("vocab_size", vocab_size), count("context", context)
        tables = (vocab_size * (1 if flag("tied", tied) else 2) + context) * count("dim", dim)
        if block is None:
            block = gpt2(
                dim, heads, layers, width=width, activation=activation, placement=placement,
                norm=norm, rotary=bool(rotary), bias=bias, dtype=dtype, backend=backend,
            )  # fmt: skip
            if is_concrete(key):  # of a traced one no array is made
                check_size(dim, layers, 4 * dim if width is None else width, tables)
        else:
            _of_the_default_block(width=width, activation=activation, placement=placement,
                                  bias=bias, backend=backend)  # fmt: skip
        numbers, positioned, continued = _about_block(block, dim)
        if is_concrete(key):
            check_numbers(count("layers", layers) * numbers + tables)
            if not continued:  # of the fields that can be, each is known to be causal
                _check_causal(block, dim)
        rotary = positioned if rotary is None else flag("rotary", rotary)
        keys = jax.random.split(prng_key(key), 4)
        self.depth = depth_or_steps(depth, float(layers), layers)
        self.field = field_of(block, layers, curve, self.depth, keys[0])
        self.embedding = STD * jax.random.normal(keys[1], (vocab_size, dim))
        self.positions = None if rotary else STD * jax.random.normal(keys[2], (context, dim))
        self.norm = function("norm", norm)(dim)
        self.entry = norm(dim) if flag("normalised", normalised) else None
        self.output = None if tied else STD * jax.random.normal(keys[3], (vocab_size, dim))
        self.context = context
        self.dtype = dtype

    def embed(self, inputs: ArrayLike) -> Measure:
        return Measure(self.embed_at(generation.tokens(inputs, len(self.embedding)), 0))

    def embed_at(self, tokens: Int[Array, "*batch n"], start: ScalarLike):
        """x(0) of tokens, of which `start` is the index of the first; nan for a traced one that is
        not in the vocabulary.

        **Raises:** `ValueError` for more tokens than there are positions.
        """
        n = tokens.shape[-1]
        if self.positions is not None and n > self.context:
            raise ValueError(
                f"the model has positions for {self.context} tokens, got {n}. Pass the last "
                f"{self.context}, or build it with rotary=True."
            )
        x = generation.rows(self.embedding, tokens)
        if self.positions is not None:
            here = jax.lax.dynamic_slice_in_dim(self.positions, start, n)
            x = x + jnp.broadcast_to(here.astype(x.dtype), x.shape)
        return self.field.geometry.retract(x if self.entry is None else self.entry(x))

    def read_out(self, mu: Measure) -> Float[Array, "*batch n vocabulary"]:
        return project(self.hidden(mu), self.unembedding, self.dtype)

    def hidden(self, mu: Measure) -> Float[Array, "*batch n d"]:
        """N(x_i), of which the logits are the products with the rows of `unembedding`."""
        return self.norm(mu.points)

    @property
    def unembedding(self) -> Float[Array, "vocabulary d"]:
        """R."""
        return self.embedding if self.output is None else self.output

    def generate(
        self,
        prompt: ArrayLike,
        length: int,
        *,
        temperature: ScalarLike = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        cache: bool = True,
        exit: AbstractExit | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Int[Array, "*b n_and_length"]:
        """The prompt, or each of a batch of them, continued by `length` tokens.

        **Arguments:**

        - `prompt`: at least one token, integers `(n,)`; or `(b, n)`, a batch, whose prompt number i
          goes on as it would alone with the key `jax.random.split(key, b)[i]`. `length`: the number
          of tokens to add.
        - `temperature`: divides the logits; 0 takes the most likely token and needs no key.
        - `top_k`: draw among the k most likely tokens; `top_p`: among the fewest whose
          probabilities add up to p (Holtzman et al., arXiv 1904.09751).
        - `cache`: keep keys and values of each stage of the solver, so that a token costs one
          column of attention instead of the whole flow; for explicit methods with fixed steps, and
          fields that are `jaxflow.fields.AbstractCausalField` throughout.
          While the text fits in the context the result is the same without. Beyond, the model
          sees the last `context` tokens, and each is computed anew.
        - `exit`: let each token exit where its flow hardly changes any more, such as
          `jaxflow.models.DistributionExit`(0.01); `generate_early` says what it cost.
        - `key`: PRNG key, unless the temperature is 0.

        **Raises:** `ValueError` or `TypeError` for bad arguments, tokens outside the vocabulary
        among them; `MemoryError` where the tokens do not fit.
        """
        if exit is not None:
            if not flag("cache", cache):
                raise ValueError("a token that exits leaves its keys and values: take cache=True.")
            return self.generate_early(
                prompt, length, exit, temperature=temperature, top_k=top_k, top_p=top_p, key=key
            ).tokens
        prompt = array("the prompt", prompt)
        generation.check(prompt, len(self.embedding), length, temperature, top_k, top_p, key)
        choose = generation.Chooser(jnp.asarray(temperature, float), top_k, top_p)
        keys = generation.split(key, prompt.shape[:-1], max(length, 1))
        of = lambda start, stop: keys[(slice(None),) * (prompt.ndim - 1) + (slice(start, stop),)]
        tokens, keep = prompt.astype(jnp.int32), 0
        if cache and generation.can_be_cached(self):
            keep = max(0, min(length, self.context - tokens.shape[-1]))
        if keep:
            tokens = generation.cached(self, tokens, keep, choose, of(0, keep))
        if length > keep:
            tokens = generation.plainly(self, tokens, length - keep, choose, of(keep, length))
        return tokens

    def generate_early(
        self,
        prompt: ArrayLike,
        length: int,
        exit: AbstractExit,
        *,
        temperature: ScalarLike = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        key: PRNGKeyArray | None = None,
    ) -> generation.Early:
        """The prompt continued as by `generate`, by tokens of which each exits early.

        The flow of a token ends with the first step that changes less than the tolerance, and it is
        read out there. Those of the prompt exit as well, so that a text goes on from any part of it
        as from its beginning. Of a batch the steps go on until all tokens have exited; those that
        follow are not made, but for the keys and values that later tokens need.

        **Arguments:** `exit`: when, such as `jaxflow.models.DistributionExit`(0.01), or
        `jaxflow.models.VelocityExit`; the others as of `generate`.

        **Returns:** `tokens` `(*b, n + length)`, the `evaluations` `(*b, length)` of the field that
        each added token took, and `made` `(length,)`, those of the whole batch.

        **Raises:** as `generate`; `ValueError` for a text longer than the context, a length of 0,
        and a model that keeps no keys and values.
        """
        prompt = array("the prompt", prompt)
        generation.check(prompt, len(self.embedding), length, temperature, top_k, top_p, key)
        check_exit(exit, generation.can_be_cached(self))
        if count("length, the number of tokens to add,", length) > self.context - prompt.shape[-1]:
            raise ValueError(
                f"tokens that exit early are of texts within the context of {self.context}; got "
                f"{prompt.shape[-1]} and {length} to add. Take exit=None, or a shorter prompt."
            )
        choose = generation.Chooser(jnp.asarray(temperature, float), top_k, top_p)
        keys = generation.split(key, prompt.shape[:-1], length)
        return generation.exiting(self, prompt.astype(jnp.int32), length, choose, keys, exit)


# ------------------------------------------------------------------ own blocks


def _about_block(block: BlockOf, dim: int) -> tuple[int, bool, bool]:
    """The number of parameters of a block, whether its attention knows positions, and whether its
    flow can be continued token by token."""
    made = _made(block)
    inside = all_fields(is_field(made))
    for field in inside:
        if getattr(field, "causal", True) is False:
            raise ValueError(
                "a token of a text sees none after it, and of the block the "
                f"{type(field).__name__} is not causal: pass causal=True to it."
            )
    tokens = jax.ShapeDtypeStruct((2, dim), jnp.result_type(float))
    try:
        velocity = eqx.filter_eval_shape(lambda field, x: field(0.0, x, Measure(x)), made, tokens)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the block does not take tokens of dimension dim={dim}: {error}"
        ) from error
    if velocity.shape != (2, dim):
        raise ValueError(
            f"the block must move tokens of dimension dim={dim}, got velocities {velocity.shape} "
            "of 2 tokens."
        )
    numbers = sum(a.size for a in jax.tree.leaves(made) if isinstance(a, jax.ShapeDtypeStruct))
    positioned = any(getattr(field, "rotary", None) is not None for field in inside)
    return numbers, positioned, eqx.filter_eval_shape(can_be_continued, made)


def _made(block: Any) -> Any:
    """The shapes of the field that a block's function makes.

    **Raises:** `TypeError` for what is no such function.
    """
    wanted = "block must be a function of a PRNG key that makes a field, such as "
    wanted += "jaxflow.models.llama(dim, heads, layers)"
    if isinstance(block, AbstractField):
        raise TypeError(f"{wanted}, and not the field itself, a {type(block).__name__}.")
    if not callable(block):
        raise TypeError(f"{wanted}, got {block!r}.")
    try:
        return eqx.filter_eval_shape(block, jax.random.key(0))
    except TypeError as error:
        raise TypeError(f"{wanted}; this one says: {error}") from error


def _check_causal(block: BlockOf, dim: int):
    """**Raises:** `ValueError` where the first of two tokens sees the second."""
    field, first = block(jax.random.key(0)), jnp.linspace(-1.0, 1.0, dim)
    pairs = (jnp.stack([first, second]) for second in (first[::-1], 2 * first + 1))
    one, other = (field(0.0, x, Measure(x))[0] for x in pairs)
    if is_concrete(one, other) and not jnp.allclose(one, other, rtol=1e-4, atol=1e-6):
        raise ValueError(
            "a token of a text sees none after it, and in the block's field the velocity of the "
            "first of two tokens changes with the second: make it causal."
        )


def _of_the_default_block(**given: Any):
    """**Raises:** `ValueError` for arguments of the default block beside another one."""
    parameters = inspect.signature(LanguageModel.__init__).parameters
    for name, value in given.items():
        if value != parameters[name].default:
            raise ValueError(
                f"{name} is an argument of the default block, and block= is another one: give it "
                "to the function that makes that."
            )
