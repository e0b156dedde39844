"""BERT (arXiv 1810.04805) and ALBERT (arXiv 1909.11942): encoders of the first transformer's kind,

    x <- N(x + attention(x)),    x <- N(x + W2 sigma(W1 x + b1) + b2)

with embeddings that are normalised, and in ALBERT lie in a smaller space and meet one block at
every depth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from ...fields import AbstractField, AddNorm, FeedForward, LayerNorm, MultiHeadAttention
from ..base import Depth
from ..curves import field_of, layered, shared
from ..encoder import Encoder
from .linear import Heads, part
from .schema import Config, activation, number, only, size
from .sources import LAYER, Plan, Source

_EMBEDDED = "embeddings."


class _Sizes(NamedTuple):
    dim: int
    embedded: int
    heads: int
    layers: int
    width: int
    vocabulary: int
    context: int
    types: int
    epsilon: float
    activation: Callable


def bert(config: Config) -> Plan:
    """The plan of a BERT with this config.json."""
    only(config, is_decoder=False, add_cross_attention=False)
    s = _sizes(config, size(config, "hidden_size", 768), "gelu")
    at = f"encoder.layer.{LAYER}."
    names = [f"{at}attention.{name}" for name in ("self.query", "self.key", "self.value")]
    names, first = [*names, f"{at}attention.output.dense"], f"{at}attention.output.LayerNorm"
    dense = f"{at}intermediate.dense", f"{at}output.dense"
    block = _block(s, part(0), part(1), names, first, dense, f"{at}output.LayerNorm")
    make = lambda dtype: _encoder(s, layered, dtype)
    return Plan(make, [*_embeddings(s), *block], s.layers, ("bert.",), _UNUSED)


def albert(config: Config) -> Plan:
    """The plan of an ALBERT with this config.json."""
    only(config, num_hidden_groups=1, inner_group_num=1)
    s = _sizes(config, size(config, "embedding_size", 128), "gelu_new")
    at = "encoder.albert_layer_groups.0.albert_layers.0."
    names = [f"{at}attention.{name}" for name in ("query", "key", "value", "dense")]
    of = lambda k: lambda m: m.field.curve.field.fields[k]
    block = _block(
        s, of(0), of(1), names, f"{at}attention.LayerNorm", (f"{at}ffn", f"{at}ffn_output"),
        f"{at}full_layer_layer_norm",
    )  # fmt: skip
    mapped = [
        Source(
            lambda m: m.projection.weight,
            "encoder.embedding_hidden_mapping_in.weight",
            (s.dim, s.embedded),
        ),
        Source(lambda m: m.projection.bias, "encoder.embedding_hidden_mapping_in.bias", (s.dim,)),
    ]
    make = lambda dtype: _encoder(s, shared, dtype)
    return Plan(make, [*_embeddings(s), *mapped, *block], s.layers, ("albert.",), _UNUSED)


# Poolers, heads of tasks and buffers, which hidden states do not need.
_UNUSED = r"pooler\..*|cls\..*|predictions\..*|sop_classifier\..*|classifier\..*|qa_outputs\..*"
_UNUSED += r"|embeddings\.(position_ids|token_type_ids)"


def _sizes(config: Config, embedded: int, sigma: str) -> _Sizes:
    only(config, position_embedding_type="absolute")
    dim = size(config, "hidden_size", 768)
    return _Sizes(
        dim,
        embedded,
        size(config, "num_attention_heads", 12),
        size(config, "num_hidden_layers", 12),
        size(config, "intermediate_size", 4 * dim),
        size(config, "vocab_size", 30522),
        size(config, "max_position_embeddings", 512),
        size(config, "type_vocab_size", 2),
        number(config, "layer_norm_eps", 1e-12),
        activation(config, "hidden_act", sigma),
    )


def _encoder(s: _Sizes, curve: Callable, dtype: Any) -> Encoder:
    """An encoder of these sizes; its arrays are of no use."""
    depth = Depth(t1=float(s.layers), steps=s.layers)

    def block(key: Any) -> AbstractField:
        norm = lambda: LayerNorm(s.dim, s.epsilon)
        attention = MultiHeadAttention(s.dim, s.heads, bias=True, key=key)
        forward = FeedForward(s.dim, s.width, s.activation, key=key)
        return AddNorm(attention, norm(), dtype=dtype) + AddNorm(forward, norm(), dtype=dtype)

    key = jax.random.key(0)
    return Encoder(
        embedding=jnp.zeros((s.vocabulary, s.embedded)),
        positions=jnp.zeros((s.context, s.embedded)),
        types=jnp.zeros((s.types, s.embedded)),
        norm=LayerNorm(s.embedded, s.epsilon),
        projection=None if curve is layered else eqx.nn.Linear(s.embedded, s.dim, key=key),
        field=field_of(block, s.layers, curve, depth, key),
        depth=depth,
    )


def _embeddings(s: _Sizes) -> list[Source]:
    e = s.embedded
    name = lambda what: f"{_EMBEDDED}{what}.weight"
    return [
        Source(lambda m: m.embedding, name("word_embeddings"), (s.vocabulary, e)),
        Source(lambda m: m.positions, name("position_embeddings"), (s.context, e)),
        Source(lambda m: m.types, name("token_type_embeddings"), (s.types, e)),
        *_norm(lambda m: m.norm, f"{_EMBEDDED}LayerNorm", e),
    ]


def _block(
    s: _Sizes,
    attention: Callable,
    forward: Callable,
    names: list[str],
    first: str,
    dense: tuple[str, str],
    second: str,
) -> list[Source]:
    """The block whose attention, norms and dense layers have these names."""
    inner, outer = dense
    heads = Heads(s.dim, s.heads, s.heads, s.dim // s.heads)
    return [
        *heads.sources(attention, names, bias=True),
        *_norm(lambda m: attention(m).norm, first, s.dim),
        Source(lambda m: forward(m).field.weight_in, f"{inner}.weight", (s.width, s.dim)),
        Source(lambda m: forward(m).field.bias_in, f"{inner}.bias", (s.width,)),
        Source(lambda m: forward(m).field.weight_out, f"{outer}.weight", (s.dim, s.width)),
        Source(lambda m: forward(m).field.bias_out, f"{outer}.bias", (s.dim,)),
        *_norm(lambda m: forward(m).norm, second, s.dim),
    ]


def _norm(norm: Callable, name: str, dim: int) -> list[Source]:
    return [
        Source(lambda m: norm(m).gain, f"{name}.weight", (dim,)),
        Source(lambda m: norm(m).bias, f"{name}.bias", (dim,)),
    ]
