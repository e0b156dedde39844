"""A causal language model in plain jnp and in torch, with the parameters of `LanguageModel`.

    x_i = E[token_i] + position_i
    x <- x + attention(N(x)),  x <- x + W2 gelu(W1 N(x) + b1) + b2                      layers
    dx/dt = attention(N(x)) + W2 gelu(W1 N(x) + b1) + b2,  theta(t) = sum_k theta_k P_k(s)  smooth
    loss = cross entropy of the logits E N(x)

Parameters are a dict of arrays; those of the blocks are stacked, or the coefficients theta_k.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import optax

import jaxflow as jf

from . import rivals

EPSILON = 1e-5  # of layer normalisation

product = partial(jnp.matmul, precision="highest")


def parameters(model: jf.models.LanguageModel) -> dict:
    """Those of the model, or a gradient in them, as the others take them: Q, K, V in one matrix."""
    assert isinstance(model.field, jf.TimeDependent)
    attention, forward = model.field.curve.coefficients.fields  # pyright: ignore
    heads = attention.field
    layers, count, p, d = heads.query.shape
    rows = [a.reshape(layers, count * p, d) for a in (heads.query, heads.key, heads.value)]
    output = heads.output.swapaxes(1, 2).reshape(layers, d, count * p)
    blocks = {
        "gain1": attention.norm.gain,
        "bias1": attention.norm.bias,
        "qkv": jnp.concatenate(rows, axis=1),
        "output": output,
        "gain2": forward.norm.gain,
        "bias2": forward.norm.bias,
        "w1": forward.field.weight_in,
        "b1": forward.field.bias_in,
        "w2": forward.field.weight_out,
        "b2": forward.field.bias_out,
    }
    ends = {"gain": model.norm.gain, "bias": model.norm.bias}  # pyright: ignore
    return {"embedding": model.embedding, "positions": model.positions, "blocks": blocks} | ends


def legendre(s, count: int) -> list:
    """P_0(s), ..., P_{count-1}(s), of a number or an array."""
    values = [1 + 0 * s, s]
    for k in range(1, count - 1):
        values.append(((2 * k + 1) * s * values[k] - k * values[k - 1]) / (k + 1))
    return values[:count]


# ------------------------------------------------------------------ plain jnp

# An attention takes q, k, v of shape (batch, n, heads, p).


def ours(q, k, v):
    attend = lambda q, k, v: jf.softmax_expectation(q, k, v, scale=q.shape[1] ** -0.5, causal=True)[
        0
    ]
    return jax.vmap(jax.vmap(attend, in_axes=1, out_axes=1))(q, k, v)


def jax_nn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def naive(q, k, v):
    n, p = q.shape[1], q.shape[3]
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    s = product(q, k.swapaxes(2, 3)) * p**-0.5
    seen = jnp.broadcast_to(jnp.tri(n, dtype=bool), s.shape)
    return product(jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1), v).swapaxes(1, 2)


def _normalised(x, gain, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
    return _rows(gain, x) * (scale * centred) + _rows(bias, x)


def _rows(vector, x):
    return jnp.broadcast_to(vector, x.shape)


def _attention(x, block, heads: int, attend: Callable):
    qkv = product(_normalised(x, block["gain1"], block["bias1"]), block["qkv"].T)
    q, k, v = (a.reshape(*x.shape[:2], heads, -1) for a in jnp.split(qkv, 3, axis=-1))
    return product(attend(q, k, v).reshape(x.shape), block["output"].T)


def _forward(x, block):
    hidden = product(_normalised(x, block["gain2"], block["bias2"]), block["w1"].T)
    out = product(jax.nn.gelu(hidden + _rows(block["b1"], hidden)), block["w2"].T)
    return out + _rows(block["b2"], x)


def scanned(x, blocks, heads: int, attend: Callable):
    """The layers by `lax.scan`, each computed again in the backward pass."""

    @jax.checkpoint
    def body(x, block):
        x = x + _attention(x, block, heads, attend)
        return x + _forward(x, block), None

    return jax.lax.scan(body, x, blocks)[0]


def solved(x, blocks, heads: int, attend: Callable, *, t1: float, tolerance: float):
    """The smooth curve, by diffrax."""

    def velocity(t, x, blocks):
        weights = jnp.stack(legendre(2 * t / t1 - 1, len(blocks["b2"]))).astype(x.dtype)
        block = jax.tree.map(lambda a: jnp.tensordot(weights, a, 1), blocks)
        return _attention(x, block, heads, attend) + _forward(x, block)

    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Dopri5(),
        0.0,
        t1,
        None,
        x,
        blocks,
        stepsize_controller=diffrax.PIDController(tolerance, tolerance),
        max_steps=256,
        throw=False,
    )
    assert sol.ys is not None
    return sol.ys[-1]


def loss(parameters: dict, tokens, targets, advance: Callable):
    """The loss of the model whose blocks `advance` (x, blocks) -> x."""
    x = parameters["embedding"][tokens]
    x = advance(x + _rows(parameters["positions"], x), parameters["blocks"])
    x = _normalised(x, parameters["gain"], parameters["bias"])
    logits = product(x, parameters["embedding"].T)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


# ------------------------------------------------------------------ torch


def to_torch(tree: Any) -> Any:
    """The tree with tensors that ask for gradients."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [a.requires_grad_() for a in rivals.to_torch(leaves)])


def layers(parameters: dict) -> dict:
    """With the blocks apart, a dict each."""
    count = len(parameters["blocks"]["b2"])
    return parameters | {
        "blocks": [jax.tree.map(lambda a, i=i: a[i], parameters["blocks"]) for i in range(count)]
    }


def torch_attention(x, block: dict, heads: int):
    functional = rivals.module("torch").nn.functional
    seen = functional.layer_norm(x, x.shape[-1:], block["gain1"], block["bias1"], EPSILON)
    qkv = functional.linear(seen, block["qkv"]).unflatten(2, (3, heads, -1))
    mean = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
    return functional.linear(mean.transpose(1, 2).flatten(2), block["output"])


def torch_forward(x, block: dict):
    functional = rivals.module("torch").nn.functional
    seen = functional.layer_norm(x, x.shape[-1:], block["gain2"], block["bias2"], EPSILON)
    hidden = functional.gelu(functional.linear(seen, block["w1"], block["b1"]), approximate="tanh")
    return functional.linear(hidden, block["w2"], block["b2"])


def torch_block(x, block: dict, heads: int):
    x = x + torch_attention(x, block, heads)
    return x + torch_forward(x, block)


def torch_loop(x, blocks: list[dict], heads: int):
    for block in blocks:
        x = torch_block(x, block, heads)
    return x


def torch_euler(x, blocks: list[dict], heads: int):
    """The layers by torchdiffeq: Euler's method, one step a block."""
    torch, odeint = rivals.module("torch"), rivals.module("torchdiffeq").odeint
    velocity = lambda t, x: torch_block(x, blocks[int(t)], heads) - x
    times = torch.tensor([0.0, len(blocks)], device=x.device)
    return odeint(velocity, x, times, method="euler", options={"step_size": 1.0})[-1]


def torch_solved(x, blocks: dict, heads: int, *, t1: float, tolerance: float, count: Callable):
    """The smooth curve, by torchdiffeq; `count` is called at each evaluation."""
    torch, odeint = rivals.module("torch"), rivals.module("torchdiffeq").odeint

    def velocity(t, x):
        count()
        weights = torch.tensor(
            legendre(2 * float(t.detach()) / t1 - 1, len(blocks["b2"])), device=x.device
        )
        block = {name: torch.tensordot(weights, a, 1) for name, a in blocks.items()}
        return torch_attention(x, block, heads) + torch_forward(x, block)

    times = torch.tensor([0.0, t1], device=x.device)
    return odeint(velocity, x, times, method="dopri5", rtol=tolerance, atol=tolerance)[-1]


def torch_loss(parameters: dict, tokens, targets, advance: Callable):
    functional = rivals.module("torch").nn.functional
    x = parameters["embedding"][tokens] + parameters["positions"]
    x = advance(x, parameters["blocks"])
    x = functional.layer_norm(x, x.shape[-1:], parameters["gain"], parameters["bias"], EPSILON)
    logits = functional.linear(x, parameters["embedding"])
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
