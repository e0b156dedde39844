"""Generation of text, token by token, with keys and values cached per stage of the solver.

A causal flow moves the tokens of a text without regard to those that follow. The stages of the
solver ask the field for X_t[mu](x) at the same times for every token, so the keys and values of
each stage are kept, and a new token is integrated alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._memory import check_fits
from .._rules import array, constant, count, known, not_negative, prng_key, real
from .._types import Scalar, accumulation_dtype, is_concrete
from ..explicit import explicit_step, is_explicit
from ..fields.base import can_be_continued
from ..fields.time import jumps
from ..measure import Measure
from ..solvers import along, step_times
from .exits import AbstractExit, Exited, evaluations, over_steps
from .exits import step as frozen_step


class Chooser(eqx.Module):
    """Draws a token from logits.

    **Arguments:** `temperature`, `top_k`, `top_p` as in `LanguageModel.generate`.
    """

    temperature: Scalar
    top_k: int | None = eqx.field(static=True)
    top_p: float | None = eqx.field(static=True)

    def __call__(self, logits: Float[Array, " vocabulary"], key) -> Int[Array, ""]:
        best = jnp.argmax(logits)
        logits = logits / jnp.where(self.temperature > 0, self.temperature, 1).astype(logits.dtype)
        logits = self._restricted(logits)
        return jnp.where(self.temperature > 0, jax.random.categorical(key, logits), best)

    def _restricted(self, logits):
        # Ties at the border are kept.
        ordered = jnp.sort(logits)[::-1]
        least = jnp.full((), -jnp.inf, logits.dtype)
        if self.top_k is not None:
            least = ordered[min(self.top_k, len(logits)) - 1]
            ordered = jnp.where(ordered >= least, ordered, -jnp.inf)
        if self.top_p is not None and self.top_p < 1:
            before = jnp.cumsum(jax.nn.softmax(ordered)) - jax.nn.softmax(ordered)
            kept = jnp.where(before < self.top_p, ordered, jnp.inf)
            least = jnp.maximum(least, kept.min())
        return jnp.where(logits >= least, logits, -jnp.inf)


def tokens(inputs: Any, vocabulary: int) -> Int[Array, "*batch n"]:
    """Tokens `(*batch, n)` as an array, each of the vocabulary as far as it is known."""
    found = array("tokens", inputs)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {found.dtype}. Encode the text first.")
    if found.ndim < 1 or not found.size:
        raise ValueError(f"tokens must have shape (*batch, n) with n >= 1, got {found.shape}.")
    seen = known(found)
    if seen is not None and not (0 <= seen.min() and seen.max() < vocabulary):
        raise ValueError(
            f"tokens must be in 0, ..., {vocabulary - 1}, got {seen.min()} to {seen.max()}. Take "
            "the tokenizer of the model."
        )
    # The bounds of a vocabulary need not be numbers of the few bits that tokens come in.
    return found.astype(jax.dtypes.canonicalize_dtype(int))


def rows(embedding: Float[Array, "vocabulary d"], tokens: Int[Array, "*batch n"]):
    """The rows of the tokens, in float32 at least; nan for a traced one that is not there."""
    # An index beyond the ends would be that of the nearest token, or count from the last.
    found = embedding.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return found.astype(accumulation_dtype(embedding.dtype))


def check(prompt, vocabulary: int, length: int, temperature, top_k, top_p, key):
    integers = jnp.issubdtype(prompt.dtype, jnp.integer)
    if prompt.ndim not in (1, 2) or not prompt.size or not integers:
        raise ValueError(
            "the prompt must be at least one token, integers of shape (n,), or a batch (b, n) of "
            f"prompts of one length; got {prompt.dtype} {prompt.shape}."
        )
    tokens(prompt, vocabulary)
    count("length, the number of tokens to add,", length, 0)
    check_fits(64 * length, f"a text of {length} tokens", "Add fewer at a time.")
    if top_k is not None:
        count("top_k", top_k)
    if top_p is not None:
        constant("top_p", top_p, "in (0, 1]", lambda p: (0 < p) & (p <= 1))
    real("the temperature", temperature, "0 or positive", not_negative)
    if key is not None:
        prng_key(key)
    elif not (is_concrete(temperature) and temperature == 0):
        raise ValueError("drawing tokens needs key=jax.random.key(...); temperature=0 needs none.")


def split(key, batch: tuple[int, ...], length: int):
    """Keys `(*batch, length)`: of the tokens of each prompt."""
    key = jax.random.key(0) if key is None else key
    keys = jax.random.split(key, batch) if batch else key
    over = jax.vmap(jax.random.split, (0, None)) if batch else jax.random.split
    return over(keys, length)


# ------------------------------------------------------------------ without a cache


@partial(eqx.filter_jit, donate="none")
def plainly(model, tokens: Int[Array, "*b n"], length: int, choose: Chooser, keys):
    """Each token by the whole flow of the last `context` tokens."""
    return _each(partial(_plainly, model, length=length, choose=choose), tokens, keys)


def _each(draw: Callable, tokens: Int[Array, "*b n"], keys):
    """draw(tokens, keys) of each prompt of a batch, or of the one."""
    return draw(tokens, keys) if tokens.ndim == 1 else jax.vmap(draw)(tokens, keys)


def _plainly(model, tokens: Int[Array, " n"], keys, *, length: int, choose: Chooser):
    n, window = len(tokens), min(len(tokens) + length, model.context)
    room = jnp.concatenate([tokens, jnp.zeros(length, tokens.dtype)])

    def step(i, room):
        # What lies after token i reaches it through the choice of adaptive steps alone.
        start = jnp.clip(i + 1 - window, 0, None)
        seen = jax.lax.dynamic_slice_in_dim(room, start, window)
        logits = model(seen)[i - start]
        return room.at[i + 1].set(choose(logits, keys[i + 1 - n]).astype(room.dtype))

    return jax.lax.fori_loop(n - 1, n - 1 + length, step, room)


# ------------------------------------------------------------------ with a cache


def can_be_cached(model) -> bool:
    """Whether each token takes the same steps and stages, and the field can be continued by it."""
    fixed = model.depth.steps is not None and is_explicit(model.depth.solver)
    return fixed and eqx.filter_eval_shape(can_be_continued, model.field)


@partial(eqx.filter_jit, donate="none")
def cached(model, tokens: Int[Array, "*b n"], length: int, choose: Chooser, keys):
    """Each token by its own flow, past the keys and values that the others left."""
    return _each(partial(_cached, model, length=length, choose=choose), tokens, keys)


def _cached(model, tokens: Int[Array, " n"], keys, *, length: int, choose: Chooser):
    n = len(tokens)
    x, caches = _flow_of_prompt(model, model.embed(tokens).points, n + length)
    first = choose(_logits(model, x[-1:]), keys[0]).astype(tokens.dtype)

    def step(carry, inputs):
        token, caches = carry
        index, key = inputs
        x, caches = _flow_of_token(model, model.embed_at(token[None], index), caches, index)
        token = choose(_logits(model, x), key).astype(token.dtype)
        return (token, caches), token

    inputs = n + jnp.arange(length - 1), keys[1:]
    _, rest = jax.lax.scan(step, (first, caches), inputs)
    return jnp.concatenate([tokens, first[None], rest])


def _logits(model, x):
    return model.read_out(Measure(x))[0]


def _over_steps(model, step: Callable, y, caches=None):
    """(y, caches) of step(t0, t1, y, cache) over the steps of the depth."""
    ts = jnp.asarray(step_times(model.depth.times, jumps(model.field)))

    def body(y, inputs):
        t0, t1, cache = inputs
        return step(t0, t1, y, cache)

    return jax.lax.scan(body, y, (ts[:-1], ts[1:], caches))


def _flow_of_prompt(model, x: Float[Array, "n d"], room: int) -> tuple[Array, Any]:
    """The tokens at time T, and what each stage of each step keeps of them, with room for more."""
    field, solver = model.field, along(model.depth.solver, model.field)
    pad = lambda a: jnp.pad(a, [(0, room - len(a))] + [(0, 0)] * (a.ndim - 1))

    def step(t0, t1, y, _):
        kept = []

        def evaluate(part, t, z):
            z = field.geometry.retract(z)
            kept.append(jax.tree.map(pad, part.keys_values(t, z)))
            return part(t, z, Measure(z))

        return explicit_step(solver, field, t0, t1, y, evaluate), tuple(kept)

    return _over_steps(model, step, x)


def _flow_of_token(model, x: Float[Array, "1 d"], caches, index) -> tuple[Array, Any]:
    """The token of this index at time T, and the caches with it."""
    field, solver = model.field, along(model.depth.solver, model.field)
    put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, index, axis=0)

    def step(t0, t1, y, cache):
        kept, stages = [], iter(cache)

        def evaluate(part, t, z):
            z = field.geometry.retract(z)
            kept.append(jax.tree.map(put, next(stages), part.keys_values(t, z, index)))
            return part.attend(t, z, kept[-1], index)

        return explicit_step(solver, field, t0, t1, y, evaluate), tuple(kept)

    return _over_steps(model, step, x, caches)


# ------------------------------------------------------------------ with early exits


class Early(NamedTuple):
    """Texts whose tokens exited early.

    - `tokens`: each prompt and what was added, integers `(*b, n + length)`.
    - `evaluations`: of the field for each token that was added, integers `(*b, length)`: those of
      the token before it, whose flow it is read from.
    - `made`: the evaluations that were made for each, of all prompts together, integers
      `(length,)`: those of the token of the batch that exits last, and for the first of the token
      of the prompts that does.
    """

    tokens: Int[Array, "*b n_and_length"]
    evaluations: Int[Array, "*b length"]
    made: Int[Array, " length"]


@partial(eqx.filter_jit, donate="none")
def exiting(model, tokens: Int[Array, "*b n"], length: int, choose: Chooser, keys, exit) -> Early:
    """Each token by its own flow up to its exit, past the keys and values that the others left."""
    if tokens.ndim == 1:
        found = _exiting(model, tokens[None], length, choose, keys[None], exit)
        return Early(found.tokens[0], found.evaluations[0], found.made)
    return _exiting(model, tokens, length, choose, keys, exit)


def _exiting(model, tokens: Int[Array, "b n"], length: int, choose: Chooser, keys, exit) -> Early:
    n = tokens.shape[1]
    flowed = _exits_of_prompts(model, model.embed(tokens).points, n + length, exit)

    def drawn(flowed, keys):
        last = flowed.points[:, -1:]
        chosen = jax.vmap(lambda x, key: choose(_logits(model, x), key))(last, keys)
        counted = flowed.steps[:, -1], flowed.made
        return chosen.astype(tokens.dtype), jax.tree.map(partial(evaluations, model), counted)

    first, spent = drawn(flowed, keys[:, 0])

    def step(carry, inputs):
        token, caches = carry
        index, keys = inputs
        flowed = _exits_of_tokens(model, model.embed_at(token[:, None], index), caches, index, exit)
        token, spent = drawn(flowed, keys)
        return (token, flowed.kept), (token, spent)

    inputs = n + jnp.arange(length - 1), jnp.moveaxis(keys[:, 1:], 1, 0)
    _, (rest, spent_later) = jax.lax.scan(step, (first, flowed.kept), inputs)
    stacked = lambda a, later: jnp.moveaxis(jnp.concatenate([a[None], later]), 0, -1)
    text = jnp.concatenate([tokens, stacked(first, rest)], axis=1)
    return Early(text, *jax.tree.map(stacked, spent, spent_later))


def _exits_of_prompts(model, x: Float[Array, "b n d"], room: int, exit: AbstractExit) -> Exited:
    pad = lambda a: jnp.pad(a, [(0, room - len(a))] + [(0, 0)] * (a.ndim - 1))

    def one(moves, t0, t1, y, done, _):
        kept = []

        def velocity(part, t, z):
            kept.append(jax.tree.map(pad, part.keys_values(t, z)))
            return part(t, z, Measure(z)) if moves else jnp.zeros_like(z)

        return frozen_step(model, t0, t1, y, done, velocity), tuple(kept)

    return over_steps(model, exit, x, one, None)


def _exits_of_tokens(model, x: Float[Array, "b 1 d"], caches, index, exit) -> Exited:
    put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, index, axis=0)

    def one(moves, t0, t1, y, done, cache):
        kept, stages = [], iter(cache)

        def velocity(part, t, z):
            kept.append(jax.tree.map(put, next(stages), part.keys_values(t, z, index)))
            return part.attend(t, z, kept[-1], index) if moves else jnp.zeros_like(z)

        return frozen_step(model, t0, t1, y, done, velocity), tuple(kept)

    return over_steps(model, exit, x, one, caches)
