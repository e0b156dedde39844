"""GPT-2 (Radford et al. 2019): learned positions, pre-LN, biases everywhere, R = E.

Its matrices act from the right, y = x W: W has shape (in, out), and Q, K, V are one.
"""

from typing import Any

import jax
import numpy as np

from ...fields import LayerNorm
from ..blocks import gpt2
from ..language import LanguageModel
from .linear import part
from .schema import Config, activation, number, only, size, switch
from .sources import Plan, Source


def plan(config: Config) -> Plan:
    """The plan of a GPT-2 with this config.json."""
    only(
        config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )  # fmt: skip
    d, heads = size(config, "n_embd", 768), size(config, "n_head", 12)
    layers, context = size(config, "n_layer", 12), size(config, "n_positions", 1024)
    vocabulary, width = size(config, "vocab_size", 50257), size(config, "n_inner", 4 * d)
    epsilon = number(config, "layer_norm_epsilon", 1e-5)
    sigma = activation(config, "activation_function", "gelu_new")
    tied = switch(config, "tie_word_embeddings", True)
    norm = lambda dim: LayerNorm(dim, epsilon)

    def make(dtype: Any) -> LanguageModel:
        block = gpt2(d, heads, layers, width=width, activation=sigma, norm=norm, dtype=dtype)
        return LanguageModel(
            vocabulary, d, heads, layers, context, block=block, norm=norm, tied=tied, dtype=dtype,
            key=jax.random.key(0),
        )  # fmt: skip

    return Plan(
        make,
        [*_ends(d, vocabulary, context, tied), *_layer(d, heads, width)],
        layers,
        ("transformer.",),
        r"h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight",
    )


def _ends(d: int, vocabulary: int, context: int, tied: bool) -> list[Source]:
    found = [
        Source(lambda m: m.embedding, "wte.weight", (vocabulary, d)),
        Source(lambda m: m.positions, "wpe.weight", (context, d)),
        Source(lambda m: m.norm.gain, "ln_f.weight", (d,)),
        Source(lambda m: m.norm.bias, "ln_f.bias", (d,)),
    ]
    return (
        found if tied else [*found, Source(lambda m: m.output, "lm_head.weight", (vocabulary, d))]
    )


def _layer(d: int, heads: int, width: int) -> list[Source]:
    p = d // heads
    joined, bias = "h.{}.attn.c_attn.weight", "h.{}.attn.c_attn.bias"

    def third(k: int):
        return lambda w: w[:, k * d : (k + 1) * d].T.reshape(heads, p, d)

    def third_of_bias(k: int):
        return lambda b: b[k * d : (k + 1) * d]

    def output(w: np.ndarray):
        return w.reshape(heads, p, d).transpose(0, 2, 1)

    attention, forward = part(0), part(1)
    inner, outer = "h.{}.mlp.c_fc", "h.{}.mlp.c_proj"
    return [
        Source(lambda m: attention(m).norm.gain, "h.{}.ln_1.weight", (d,)),
        Source(lambda m: attention(m).norm.bias, "h.{}.ln_1.bias", (d,)),
        Source(lambda m: attention(m).field.query, joined, (d, 3 * d), third(0)),
        Source(lambda m: attention(m).field.key, joined, (d, 3 * d), third(1)),
        Source(lambda m: attention(m).field.value, joined, (d, 3 * d), third(2)),
        Source(lambda m: attention(m).field.query_bias, bias, (3 * d,), third_of_bias(0)),
        Source(lambda m: attention(m).field.key_bias, bias, (3 * d,), third_of_bias(1)),
        Source(lambda m: attention(m).field.value_bias, bias, (3 * d,), third_of_bias(2)),
        Source(lambda m: attention(m).field.output, "h.{}.attn.c_proj.weight", (d, d), output),
        Source(lambda m: attention(m).field.output_bias, "h.{}.attn.c_proj.bias", (d,)),
        Source(lambda m: forward(m).norm.gain, "h.{}.ln_2.weight", (d,)),
        Source(lambda m: forward(m).norm.bias, "h.{}.ln_2.bias", (d,)),
        Source(lambda m: forward(m).field.weight_in, f"{inner}.weight", (d, width), np.transpose),
        Source(lambda m: forward(m).field.bias_in, f"{inner}.bias", (width,)),
        Source(lambda m: forward(m).field.weight_out, f"{outer}.weight", (width, d), np.transpose),
        Source(lambda m: forward(m).field.bias_out, f"{outer}.bias", (d,)),
    ]
