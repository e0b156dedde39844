"""Which tokens of a flow have become one, and when: arrays of a solution, and the tree of them.

A token that is absorbed into another one stands on the same point from then on. Each points to the
token that absorbed it; followed to the end, the pointers lead to the token that stands for all.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._types import ScalarLike, is_concrete
from .measure import Measure
from .observables import MergeTree


class Mergers(eqx.Module):
    """The mergers of a flow, each by the token that was absorbed.

    - `times`: when it was absorbed, inf where it was not, shape `(*batch, n)`.
    - `into`: the token that absorbed it, which is not the same as the one that stands for it now.
    - `log_bound`: log of a bound on how far it would be from there by now, where one was asked for.
    """

    times: Float[Array, "*batch n"]
    into: Int[Array, "*batch n"]
    log_bound: Float[Array, "*batch n"] | None

    def labels(self, t: ScalarLike | Array) -> Int[Array, "*batch n"]:
        """The token that stands for each at time t, one a system."""
        t = jnp.asarray(t, self.times.dtype)
        t = t.reshape(t.shape + (1,) * (self.times.ndim - t.ndim))
        own = jnp.broadcast_to(jnp.arange(self.into.shape[-1]), self.into.shape)
        first = jnp.where(self.times <= jnp.broadcast_to(t, self.times.shape), self.into, own)
        follow = lambda label: jnp.take_along_axis(label, label, axis=-1)
        return jax.lax.while_loop(lambda l: (follow(l) != l).any(), follow, first)

    def tree(self, end: Array, log_weights: Array | None) -> Any:
        """The tree of each system up to its end, in a list of lists for batches of them."""
        weights = None if log_weights is None else np.asarray(log_weights)
        return _tree(np.asarray(self.times), np.asarray(self.into), np.asarray(end), weights)


def _tree(times, into, end, weights) -> Any:
    if times.ndim > 1:
        # One end for all systems of a flow, one for each of jax.vmap.
        ends = end if end.ndim else np.full(len(times), end)
        own = lambda k: weights if weights is None or weights.ndim == 1 else weights[k]
        return [_tree(times[k], into[k], ends[k], own(k)) for k in range(len(times))]
    # At one time the last token first: what absorbs others is absorbed after them.
    order = np.lexsort((-np.arange(len(times)), times))
    order = order[times[order] <= end]
    first, sizes = np.arange(len(times)), np.ones(len(times), int)
    massive = None if weights is None else ~np.isneginf(weights)
    pairs, counts = [], []
    for token in order.tolist():
        other = int(into[token])
        pairs.append(sorted((int(first[other]), int(first[token]))))
        first[other] = pairs[-1][0]
        sizes[other] += sizes[token]
        counts.append(int(sizes[other]))
    return MergeTree(
        len(times),
        times=np.asarray(times[order], float),
        pairs=np.asarray(pairs, int).reshape(-1, 2),
        sizes=np.asarray(counts, int),
        leaves=None if massive is None or massive.all() else np.flatnonzero(massive),
    )


def representatives(mu: Measure, labels: Int[Array, " n"], geometry: Any) -> Measure:
    """The measure of the tokens that stand for all, with the weights of those."""
    standing = np.flatnonzero(np.asarray(labels) == np.arange(mu.n))
    cluster = np.searchsorted(standing, np.asarray(labels))
    weights = np.asarray(mu.weights)
    mass = np.zeros(len(standing), weights.dtype)
    np.add.at(mass, cluster, weights)
    share = weights / np.where(mass > 0, mass, 1)[cluster]
    centres = np.zeros((len(standing), mu.d), np.asarray(mu.points).dtype)
    np.add.at(centres, cluster, share[:, None].astype(centres.dtype) * np.asarray(mu.points))
    alone = mass == 0
    centres[alone] = np.asarray(mu.points)[standing[alone]]
    with np.errstate(divide="ignore"):
        return Measure(geometry.retract(jnp.asarray(centres)), jnp.asarray(np.log(mass)))


def check_known(name: str, mergers: Mergers):
    """`name` is data of the host, which a program that is being traced has not yet.

    **Raises:** `TypeError` under `jit`, `grad` and `vmap`.
    """
    if not is_concrete(*jax.tree.leaves(mergers)):
        raise TypeError(
            f"{name} is data of the host: ask for it outside of jit, grad and vmap, of the "
            "solution that they return."
        )
