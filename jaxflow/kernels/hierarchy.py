"""The groups of keys of a hierarchical mask, and which of them a query sees.

A group of 2^(l + 1) keys is made of two of 2^l, with the log-masses b and b':

    log-mass  logaddexp(b, b'),    mean key  p k + (1 - p) k',    p = e^b / (e^b + e^b')

and the mean value likewise. A group without mass has the log-mass -inf.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..masks import AbstractPattern, Tiles, take
from .base import finite, pad

Groups = tuple[Float[Array, "groups p"], Float[Array, "groups r"], Float[Array, " groups"]]


def groups(
    k: Float[Array, "n p"], v: Float[Array, "n r"], b: Float[Array, " n"], levels: int
) -> Groups:
    """Keys, values and log-masses of the groups of 1, 2, ..., 2^(levels - 1), one list."""
    of_level = [(k.astype(b.dtype), v.astype(b.dtype), b)]
    for _ in range(levels - 1):
        of_level.append(_paired(*of_level[-1]))
    keys, values, masses = (jnp.concatenate(parts) for parts in zip(*of_level, strict=True))
    return keys.astype(k.dtype), values.astype(v.dtype), masses


def _paired(k, v, b) -> Groups:
    even = len(b) + len(b) % 2
    b = pad(b, even, -jnp.inf, axis=0).reshape(-1, 2)
    top = jax.lax.stop_gradient(finite(b.max(axis=1)))
    w = jnp.exp(b - top[:, None])
    total = w.sum(axis=1)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    w = w / total[:, None]
    mean = lambda a: (w[:, :, None] * pad(a, even, axis=0).reshape(-1, 2, a.shape[1])).sum(axis=1)
    return mean(k), mean(v), jnp.where(empty, -jnp.inf, jnp.log(total) + top)


@dataclasses.dataclass(frozen=True)
class Levels(AbstractPattern):
    """The groups that a query of a `Hierarchical` mask sees, in the list of all groups.

    The list has those of level 0, then those of level 1, and so on; `lengths` are their numbers.
    With `causal`, groups whose last token comes after the query are hidden.
    """

    size: int
    lengths: tuple[int, ...]
    causal: bool = False

    def objection(self, shape):
        return None

    @property
    def levels(self) -> np.ndarray:
        """The level of each group."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def firsts(self) -> np.ndarray:
        """The first token of each group."""
        groups = [np.arange(n) << level for level, n in enumerate(self.lengths)]
        return np.concatenate(groups)

    def visible(self, rows, columns, shape):
        level, first = (take(a, columns)[None, :] for a in (self.levels, self.firsts))
        i, shift = rows[:, None], level + (self.size.bit_length() - 1)
        near = lambda shift: abs((i >> shift) - (first >> shift)) <= 1
        seen = near(shift) & ((level == 0) | ~near(shift - 1))
        return seen & (first + (1 << level) - 1 <= i) if self.causal else seen

    def meets(self, tiles, shape):
        seen = np.zeros((tiles.top.size, tiles.left.size), bool)
        start = 0
        for level, length in enumerate(self.lengths):
            left = np.maximum(tiles.left - start, 0)
            right = np.minimum(tiles.right - start, length - 1)
            seen |= (left <= right) & self._meets(level, tiles, left << level, right << level)
            start += length
        return seen

    def _meets(self, level: int, tiles: Tiles, left, right):
        """Of groups of one level, those that start from `left` to `right`."""
        ends = tiles.top, tiles.bottom, left, right
        shift = level + self.size.bit_length() - 1
        top, bottom, first, last = (a >> shift for a in ends)
        seen = (first <= bottom + 1) & (top <= last + 1)
        if level:
            top, bottom, first, last = (a >> (shift - 1) for a in ends)
            seen &= np.maximum(bottom - first, last - top) >= 2
        return seen & (left + (1 << level) - 1 <= tiles.bottom) if self.causal else seen
