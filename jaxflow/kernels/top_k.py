"""The k largest scores of each query, ties averaged.

With t_i the k-th largest score of query i among the keys that it sees, c_i the number of scores
above it and T_i the number of those that tie with it, the weights are those of the scores

    s_ij                        where s_ij > t_i
    s_ij + log((k - c_i)/T_i)   where s_ij = t_i
    -inf                        elsewhere

with the log-weights added after. t, c and T are piecewise constant, and constants in derivatives.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..masks import TopK


def largest(s: Float[Array, "m n"], mask: TopK) -> Float[Array, "m n"]:
    """The scores so changed; those of keys that are not seen are -inf."""
    known = jax.lax.stop_gradient(s)
    seen = ~jnp.isneginf(known)
    k = min(mask.k, s.shape[1])
    # Of the last of them XLA would make a sort of all scores, on CPUs 30 times as slow.
    kth = jax.lax.top_k(known, k)[0].min(axis=1, keepdims=True)
    tolerance = 32 * float(jnp.finfo(s.dtype).eps) if mask.tolerance is None else mask.tolerance
    slack = tolerance * jnp.max(jnp.abs(known), axis=1, where=seen, initial=0, keepdims=True)
    above = known > kth + slack
    # With fewer than k keys in sight the k-th score is -inf, and all are above it.
    tied = seen & ~above & (known >= kth - slack) & ~jnp.isneginf(kth)
    count = lambda pairs: pairs.sum(axis=1, keepdims=True).astype(s.dtype)
    share = (k - count(above)) / jnp.maximum(count(tied), 1)
    return s + jnp.where(above, 0, jnp.where(tied, jnp.log(share), -jnp.inf))
