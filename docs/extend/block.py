"""A block of a language model: attention, then a layer with squared rectifiers.

    X[mu](x) = attention[N_# mu](N x) + W_2 relu(W_1 N x)^2

Fact: a token of a text sees none after it, so that the logits of the first tokens are the same
whatever comes next.
"""

import jax
import jax.numpy as jnp

import jaxflow as jf
from jaxflow import models

dim = 16


def block(key):
    first, second = jax.random.split(key)
    attention = jf.MultiHeadAttention(dim, 2, causal=True, key=first)
    forward = jf.FeedForward(dim, 32, lambda z: jax.nn.relu(z) ** 2, key=second)
    return jf.PreNorm(attention, jf.RMSNorm(dim)) + jf.PreNorm(forward, jf.RMSNorm(dim))


model = models.LanguageModel(65, dim, layers=2, context=8, block=block, key=jax.random.key(0))
logits = model(jnp.array([[3, 1, 4, 1, 5], [3, 1, 4, 6, 2]]))
assert jnp.allclose(logits[0, :3], logits[1, :3], atol=1e-5)
assert not jnp.allclose(logits[0, 3:], logits[1, 3:], atol=1e-5)
