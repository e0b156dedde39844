"""Llama (arXiv 2302.13971) and its kin, Mistral and Qwen2: RMSNorm, rotary positions, grouped
queries, SwiGLU."""

import math
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ...fields import GatedFeedForward, MultiHeadAttention, PreNorm, RMSNorm
from ..language import LanguageModel
from .linear import Heads, part
from .schema import Config, activation, choice, number, only, size, switch
from .sources import Plan, Source

# Of these queries, keys and values have a bias whatever their config.json says, the output none.
_BIASED = "qwen2"


def plan(config: Config) -> Plan:
    """The plan of a model of this kind with this config.json."""
    only(config, mlp_bias=False, partial_rotary_factor=1.0, use_sliding_window=False)
    d, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    layers, vocabulary = size(config, "num_hidden_layers"), size(config, "vocab_size")
    width, context = (
        size(config, "intermediate_size"),
        size(config, "max_position_embeddings", 2048),
    )
    kv_heads = size(config, "num_key_value_heads", heads)
    p = size(config, "head_dim", max(d // heads, 1))
    epsilon = number(config, "rms_norm_eps", 1e-6)
    sigma = activation(config, "hidden_act", "silu")
    tied = switch(config, "tie_word_embeddings", False)
    qwen = config["model_type"] == _BIASED
    bias = qwen or switch(config, "attention_bias", False)
    ends = bias and not qwen  # whether the output has a bias
    rotary, norm = _rotary(config, p), lambda dim: RMSNorm(dim, epsilon)

    def make(dtype: Any) -> LanguageModel:
        def block(key):
            attention = MultiHeadAttention(
                d, heads, kv_heads=kv_heads, head_dim=p, bias=bias, rotary=rotary, causal=True,
                window=_window(config), key=key,
            )  # fmt: skip
            if not ends:
                attention = eqx.tree_at(lambda a: a.output_bias, attention, None, is_leaf=_none)
            forward = GatedFeedForward(d, width, sigma, key=key)
            before = lambda field: PreNorm(field, norm(d), dtype=dtype)
            return before(attention) + before(forward)

        return LanguageModel(
            vocabulary, d, heads, layers, context, block=block, norm=norm, tied=tied, dtype=dtype,
            key=jax.random.key(0),
        )  # fmt: skip

    here = Heads(d, heads, kv_heads, p)
    names = ["layers.{}.self_attn." + f"{name}_proj" for name in "qkvo"]
    return Plan(
        make,
        [
            *_ends(d, vocabulary, tied),
            *here.sources(part(0), names, bias=bias, output_bias=ends),
            *_rest(d, width),
        ],
        layers,
        ("model.",),
        r".*rotary_emb\.inv_freq" + (r"|lm_head\.weight" if tied else ""),
    )


def _none(x: Any) -> bool:
    return x is None


def _ends(d: int, vocabulary: int, tied: bool) -> list[Source]:
    found = [
        Source(lambda m: m.embedding, "embed_tokens.weight", (vocabulary, d)),
        Source(lambda m: m.norm.gain, "norm.weight", (d,)),
    ]
    return (
        found if tied else [*found, Source(lambda m: m.output, "lm_head.weight", (vocabulary, d))]
    )


def _rest(d: int, width: int) -> list[Source]:
    attention, forward = part(0), part(1)
    return [
        Source(lambda m: attention(m).norm.gain, "layers.{}.input_layernorm.weight", (d,)),
        Source(lambda m: forward(m).norm.gain, "layers.{}.post_attention_layernorm.weight", (d,)),
        Source(lambda m: forward(m).field.weight_in, "layers.{}.mlp.gate_proj.weight", (width, d)),
        Source(lambda m: forward(m).field.weight_gated, "layers.{}.mlp.up_proj.weight", (width, d)),
        Source(lambda m: forward(m).field.weight_out, "layers.{}.mlp.down_proj.weight", (d, width)),
    ]


def _window(config: Config) -> int | None:
    """The number of tokens that a token sees before itself."""
    if config["model_type"] != "mistral" or config.get("sliding_window") is None:
        return None
    return size(config, "sliding_window") - 1


def _rotary(config: Config, p: int) -> float | tuple[float, ...]:
    """The base of the rotary positions, or the rates that were scaled for longer texts."""
    about = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(about, dict):
        raise ValueError(f"rope_parameters in config.json must be an object, got {about!r}.")
    about = {"rope_theta": config.get("rope_theta", 10000.0)} | about
    only(about, partial_rotary_factor=1.0)
    name = "rope_type" if "rope_type" in about else "type"
    kind = choice(about, name, ("default", "linear", "llama3"), "default")
    base = number(about, "rope_theta", 10000.0)
    if kind == "default":
        return base
    rates, factor = base ** (-2 * np.arange(p // 2) / p), number(about, "factor", 1.0)
    if kind == "linear":
        return tuple((rates / factor).tolist())
    low = number(about, "low_freq_factor", 1.0)
    high = number(about, "high_freq_factor", 4.0)
    turns = size(about, "original_max_position_embeddings") * rates / (2 * math.pi)
    # Rates of fewer than `low` turns in the original context are divided, those of more than `high`
    # are kept, with what is linear between.
    kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns > low
    return tuple((rates * (kept + (1 - kept) / factor)).tolist())
