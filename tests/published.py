"""Published transformers in NumPy, written from their papers and the layout of their files, and
folders with random weights for them.

Each model is its config.json, the tensors of its file, and what it computes of tokens.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, DIM, HEADS, WIDTH, VOCABULARY, CONTEXT = 2, 8, 4, 12, 11, 12


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=s).astype(np.float32) / 2 for name, s in shapes.items()}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Any], file="model.safetensors"):
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / file)
    return folder


# ------------------------------------------------------------------ pieces


def layer_norm(x, gain, bias, epsilon):
    centred = x - x.mean(axis=-1, keepdims=True)
    return gain * centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon) + bias


def rms_norm(x, gain, epsilon):
    return gain * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def gelu_new(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def attention(q, k, v, heads, *, causal, window=None):
    """Rows (n, heads p) and (n, groups p): each head by itself."""
    n, p = len(q), q.shape[1] // heads
    groups = k.shape[1] // p
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    seen = (j <= i) if causal else np.ones((n, n), bool)
    seen = seen & (i - j < window) if window else seen
    out = []
    for head in range(heads):
        of = lambda a, h: a[:, h * p : (h + 1) * p]
        group = head * groups // heads
        scores = of(q, head) @ of(k, group).T / math.sqrt(p)
        weights = np.exp(np.where(seen, scores - scores.max(), -np.inf))
        out.append(weights / weights.sum(axis=1, keepdims=True) @ of(v, group))
    return np.concatenate(out, axis=1)


# ------------------------------------------------------------------ GPT-2

GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": DIM, "n_head": HEADS, "n_layer": LAYERS, "n_positions": CONTEXT,
    "vocab_size": VOCABULARY, "layer_norm_epsilon": 1e-3, "activation_function": "gelu_new",
}  # fmt: skip


def gpt2_tensors():
    d = DIM
    layer = {
        "ln_1.weight": (d,), "ln_1.bias": (d,), "ln_2.weight": (d,), "ln_2.bias": (d,),
        "attn.c_attn.weight": (d, 3 * d), "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d), "attn.c_proj.bias": (d,),
        "mlp.c_fc.weight": (d, 4 * d), "mlp.c_fc.bias": (4 * d,),
        "mlp.c_proj.weight": (4 * d, d), "mlp.c_proj.bias": (d,),
    }  # fmt: skip
    ends = {"wte.weight": (VOCABULARY, d), "wpe.weight": (CONTEXT, d), "ln_f.weight": (d,),
            "ln_f.bias": (d,)}  # fmt: skip
    layers = {f"h.{l}.{name}": shape for l in range(LAYERS) for name, shape in layer.items()}
    return drawn({f"transformer.{name}": shape for name, shape in (ends | layers).items()})


def gpt2(w, tokens):
    w = {name.removeprefix("transformer."): a.astype(float) for name, a in w.items()}
    norm = lambda x, name: layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-3)
    linear = lambda x, name: x @ w[f"{name}.weight"] + w[f"{name}.bias"]
    x = w["wte.weight"][tokens] + w["wpe.weight"][: len(tokens)]
    for l in range(LAYERS):
        q, k, v = np.split(linear(norm(x, f"h.{l}.ln_1"), f"h.{l}.attn.c_attn"), 3, axis=1)
        x = x + linear(attention(q, k, v, HEADS, causal=True), f"h.{l}.attn.c_proj")
        hidden = gelu_new(linear(norm(x, f"h.{l}.ln_2"), f"h.{l}.mlp.c_fc"))
        x = x + linear(hidden, f"h.{l}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


# ------------------------------------------------------------------ Llama and its kin

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": DIM, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "intermediate_size": WIDTH,
    "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-3,
    "hidden_act": "silu", "head_dim": 4, "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 0.2,
        "high_freq_factor": 1.2, "original_max_position_embeddings": 6,
    },
}  # fmt: skip
QWEN2 = {k: v for k, v in LLAMA.items() if k not in ("rope_parameters", "head_dim")} | {
    "model_type": "qwen2", "rope_theta": 50.0, "tie_word_embeddings": True,
}  # fmt: skip
MISTRAL = {k: v for k, v in LLAMA.items() if k != "rope_parameters"} | {
    "model_type": "mistral", "sliding_window": 3,
}  # fmt: skip


def llama_tensors(config):
    d, p = DIM, config.get("head_dim", DIM // HEADS)
    q, k = HEADS * p, 2 * p
    layer = {
        "self_attn.q_proj.weight": (q, d), "self_attn.k_proj.weight": (k, d),
        "self_attn.v_proj.weight": (k, d), "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (WIDTH, d), "mlp.up_proj.weight": (WIDTH, d),
        "mlp.down_proj.weight": (d, WIDTH), "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }  # fmt: skip
    if config["model_type"] == "qwen2":
        biases = {"q": q, "k": k, "v": k}.items()
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in biases}
    found = {f"model.layers.{l}.{name}": s for l in range(LAYERS) for name, s in layer.items()}
    found |= {"model.embed_tokens.weight": (VOCABULARY, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCABULARY, d)
    return drawn(found)


def angle(config, k, p):
    """A unit of position turns the plane (k, k + p/2) by this."""
    about = config.get("rope_parameters", {"rope_theta": config.get("rope_theta", 10000.0)})
    rate = about["rope_theta"] ** (-2 * k / p)
    if about.get("rope_type") != "llama3":
        return rate
    length, wave = about["original_max_position_embeddings"], 2 * math.pi / rate
    if wave < length / about["high_freq_factor"]:
        return rate
    if wave > length / about["low_freq_factor"]:
        return rate / about["factor"]
    low, high = about["low_freq_factor"], about["high_freq_factor"]
    smooth = (length / wave - low) / (high - low)
    return (1 - smooth) * rate / about["factor"] + smooth * rate


def turned(a, config, p):
    """Rotary positions of rows (n, heads p), plane by plane."""
    a, out = a.reshape(len(a), -1, p), np.zeros((len(a), a.shape[1] // p, p))
    for i in range(len(a)):
        for k in range(p // 2):
            c, s = np.cos(i * angle(config, k, p)), np.sin(i * angle(config, k, p))
            out[i, :, k] = c * a[i, :, k] - s * a[i, :, k + p // 2]
            out[i, :, k + p // 2] = s * a[i, :, k] + c * a[i, :, k + p // 2]
    return out.reshape(len(a), -1)


def llama(config):
    def run(w, tokens):
        w = {name.removeprefix("model."): a.astype(float) for name, a in w.items()}
        linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)
        p = config.get("head_dim", DIM // HEADS)
        x = w["embed_tokens.weight"][tokens]
        for l in range(LAYERS):
            at = f"layers.{l}."
            y = rms_norm(x, w[f"{at}input_layernorm.weight"], 1e-3)
            q, k, v = (linear(y, f"{at}self_attn.{name}_proj") for name in "qkv")
            q, k = turned(q, config, p), turned(k, config, p)
            y = attention(q, k, v, HEADS, causal=True, window=config.get("sliding_window"))
            x = x + linear(y, f"{at}self_attn.o_proj")
            y = rms_norm(x, w[f"{at}post_attention_layernorm.weight"], 1e-3)
            gate = linear(y, f"{at}mlp.gate_proj")
            hidden = gate / (1 + np.exp(-gate)) * linear(y, f"{at}mlp.up_proj")
            x = x + linear(hidden, f"{at}mlp.down_proj")
        matrix = w.get("lm_head.weight", w["embed_tokens.weight"])
        return rms_norm(x, w["norm.weight"], 1e-3) @ matrix.T

    return run


# ------------------------------------------------------------------ BERT and ALBERT

BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_size": DIM, "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS, "intermediate_size": WIDTH, "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT, "layer_norm_eps": 1e-3, "hidden_act": "gelu",
}  # fmt: skip
ALBERT = BERT | {"model_type": "albert", "embedding_size": 5, "hidden_act": "gelu_new"}
_BERT = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "output": "attention.output.dense", "first": "attention.output.LayerNorm",
    "inner": "intermediate.dense", "outer": "output.dense", "second": "output.LayerNorm",
}  # fmt: skip
_ALBERT = {
    "query": "attention.query", "key": "attention.key", "value": "attention.value",
    "output": "attention.dense", "first": "attention.LayerNorm", "inner": "ffn",
    "outer": "ffn_output", "second": "full_layer_layer_norm",
}  # fmt: skip


def _names(config, l):
    if config["model_type"] == "bert":
        return {what: f"encoder.layer.{l}.{name}" for what, name in _BERT.items()}
    at = "encoder.albert_layer_groups.0.albert_layers.0."
    return {what: at + name for what, name in _ALBERT.items()}


def encoder_tensors(config):
    d, e = DIM, config.get("embedding_size", DIM)
    found = {
        "embeddings.word_embeddings.weight": (VOCABULARY, e),
        "embeddings.position_embeddings.weight": (CONTEXT, e),
        "embeddings.token_type_embeddings.weight": (2, e),
        "embeddings.LayerNorm.weight": (e,), "embeddings.LayerNorm.bias": (e,),
    }  # fmt: skip
    if e != d:
        name = "encoder.embedding_hidden_mapping_in"
        found |= {f"{name}.weight": (d, e), f"{name}.bias": (d,)}
    sizes = {"inner": (WIDTH, d), "outer": (d, WIDTH), "first": (d,), "second": (d,)}
    for l in range(LAYERS):
        for what, name in _names(config, l).items():
            shape = sizes.get(what, (d, d))
            found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return drawn(found)


def encoder(config):
    sigma = gelu if config["hidden_act"] == "gelu" else gelu_new

    def run(w, tokens):
        w = {name: a.astype(float) for name, a in w.items()}
        norm = lambda x, name: layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"], 1e-3)
        linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        x = w["embeddings.word_embeddings.weight"][tokens]
        x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
        x = norm(x + w["embeddings.token_type_embeddings.weight"][:1], "embeddings.LayerNorm")
        if config["model_type"] == "albert":
            x = linear(x, "encoder.embedding_hidden_mapping_in")
        for l in range(LAYERS):
            at = _names(config, l)
            q, k, v = (linear(x, at[what]) for what in ("query", "key", "value"))
            y = linear(attention(q, k, v, HEADS, causal=False), at["output"])
            x = norm(x + y, at["first"])
            x = norm(x + linear(sigma(linear(x, at["inner"])), at["outer"]), at["second"])
        return x

    return run


MODELS: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], Any]] = {
    "gpt2": (GPT2, gpt2_tensors(), gpt2),
    "llama": (LLAMA, llama_tensors(LLAMA), llama(LLAMA)),
    "mistral": (MISTRAL, llama_tensors(MISTRAL), llama(MISTRAL)),
    "qwen2": (QWEN2, llama_tensors(QWEN2), llama(QWEN2)),
    "bert": (BERT, encoder_tensors(BERT), encoder(BERT)),
    "albert": (ALBERT, encoder_tensors(ALBERT), encoder(ALBERT)),
}
