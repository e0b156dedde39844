"""Masks: which keys a query sees, chosen by the user, beside `causal` and `window`.

A pattern depends on the indices of query and key alone:

    Window         i - left <= j <= i + right
    Blocks         floor(i / s) = floor(j / s)
    Strided        |I - J| <= local or I = J mod stride         I = floor(i / s), J = floor(j / s)
    Global         i < g or j < g
    Random         J is one of r random blocks of I
    BlockSparse    table[I, J]
    a | b, a & b   pairs of one of two patterns, of both
    big_bird       Window | Global | Random

and the two others on more:

    TopK           the k largest scores of a query
    Hierarchical   near keys one by one, far ones as means of groups that double with the distance

A pattern says of two lists of indices which pairs are visible, and of the tiles of a score matrix
which hold a visible pair, from its structure: what a kernel leaves out costs nothing. All masks are
part of a program's structure: they compare and hash by value, and a new one compiles anew.
"""

import abc
import dataclasses
import functools
from operator import and_, or_
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ._rules import constant, count, instance, not_negative

__all__ = [
    "AbstractMask",
    "AbstractPattern",
    "BlockSparse",
    "Blocks",
    "Global",
    "Hierarchical",
    "Random",
    "Strided",
    "TopK",
    "Window",
    "big_bird",
]


def __dir__() -> list[str]:
    return __all__


Shape = tuple[int, int]  # m queries, n keys
Indices = Array | np.ndarray  # a list of whole numbers


class AbstractMask(abc.ABC):
    """Which keys a query sees: what `mask=` of `jaxflow.softmax_expectation` takes."""

    @abc.abstractmethod
    def objection(self, shape: Shape) -> str | None:
        """Why it is no mask of so many queries and keys, and the remedy; None if it is one."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The first and last rows (R, 1), and the first and last columns (1, C), of R x C tiles."""

    top: np.ndarray
    bottom: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @staticmethod
    def of(shape: Shape, height: int, width: int) -> "Tiles":
        """Those of a matrix that is cut into tiles of this height and width."""
        top, left = np.arange(0, shape[0], height)[:, None], np.arange(0, shape[1], width)[None]
        bottom, right = (np.minimum(top + height, shape[0]), np.minimum(left + width, shape[1]))
        return Tiles(top, bottom - 1, left, right - 1)

    def blocks(self, size: int) -> "Tiles":
        """The same in blocks of so many tokens."""
        return Tiles(*(a // size for a in (self.top, self.bottom, self.left, self.right)))


class AbstractPattern(AbstractMask):
    """A mask that depends on the indices of query and key alone.

    `a | b` is the mask of the pairs that one of two patterns shows, `a & b` of those that both do.
    """

    @abc.abstractmethod
    def visible(
        self, rows: Indices, columns: Indices, shape: Shape
    ) -> Bool[Array, "m n"] | Bool[np.ndarray, "m n"]:
        """Of each query with an index in `rows` whether it sees each key in `columns`, by NumPy for
        NumPy's indices, by JAX for JAX's."""

    @abc.abstractmethod
    def meets(self, tiles: Tiles, shape: Shape) -> np.ndarray:
        """Of each tile whether it may hold a visible pair: no visible pair lies in another."""

    def matrix(self, m: int, n: int) -> np.ndarray:
        """All pairs of m queries and n keys, (m, n): to look at, it is never made to compute.

        **Raises:** `ValueError` or `TypeError` for numbers that are no sizes of the mask.
        """
        shape = count("m", m), count("n", n)
        check(self, shape)
        return np.asarray(self.visible(np.arange(m), np.arange(n), shape))

    def __or__(self, other: "AbstractPattern") -> "AbstractPattern":
        return AnyOf((self, _pattern(other)))

    def __and__(self, other: "AbstractPattern") -> "AbstractPattern":
        return AllOf((self, _pattern(other)))


def check(mask: AbstractMask, shape: Shape):
    """**Raises:** `ValueError` where a mask does not go with so many queries and keys."""
    if (reason := mask.objection(shape)) is not None:
        raise ValueError(reason)


def is_mask(value: Any) -> AbstractMask | None:
    """The value, which is a mask or None.

    **Raises:** `TypeError` if it is not.
    """
    if value is None:
        return None
    if isinstance(value, type) or not isinstance(value, AbstractMask):
        raise TypeError(
            f"mask must be an instance such as jaxflow.masks.Blocks(64), or None; got {value!r}. A "
            "table of blocks becomes jaxflow.masks.BlockSparse(table, size), a mask of keys alone "
            "log_weights of -inf."
        )
    return value


def _pattern(value: Any) -> AbstractPattern:
    if not isinstance(value, AbstractPattern):
        raise TypeError(
            f"| and & join masks of indices, such as Blocks or Window, got {value!r}. TopK takes "
            "another mask as `among`."
        )
    return value


# ------------------------------------------------------------------ patterns


@dataclasses.dataclass(frozen=True)
class Window(AbstractPattern):
    """Query i sees the keys i - left <= j <= i + right; `None` is no limit.

    It is what `window=` means, as a mask that goes with others: `Window(64) | Global(4)`.

    **Arguments:** `left`, `right`: numbers of keys; `right` is `left` where it is not given.

    **Raises:** `ValueError` or `TypeError` for what is no number of keys.

    ```python
    >>> jaxflow.masks.Window(0, 1).matrix(3, 3).astype(int)
    array([[1, 1, 0],
           [0, 1, 1],
           [0, 0, 1]])

    ```
    """

    left: int | None
    right: int | None

    def __init__(self, left: int | None, right: int | None | str = "left"):
        right = left if isinstance(right, str) and right == "left" else right
        for name, value in (("left", left), ("right", right)):
            object.__setattr__(self, name, None if value is None else count(name, value, 0))

    def objection(self, shape):
        return None

    def visible(self, rows, columns, shape):
        offset = columns[None, :] - rows[:, None]
        seen = offset == offset
        if self.left is not None:
            seen = seen & (offset >= -self.left)
        if self.right is not None:
            seen = seen & (offset <= self.right)
        return seen

    def meets(self, tiles, shape):
        seen = np.ones((tiles.top.size, tiles.left.size), bool)
        if self.left is not None:
            seen &= tiles.right >= tiles.top - self.left
        if self.right is not None:
            seen &= tiles.left <= tiles.bottom + self.right
        return seen


@dataclasses.dataclass(frozen=True)
class Blocks(AbstractPattern):
    """Query i sees the keys of its own block of `size` tokens: floor(i / size) = floor(j / size).

    The attention matrix is block-diagonal: the blocks are measures that do not know each other.

    **Raises:** `ValueError` or `TypeError` for a size that is no whole number from 1 on.

    ```python
    >>> jaxflow.masks.Blocks(2).matrix(4, 4).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 1],
           [0, 0, 1, 1]])

    ```
    """

    size: int

    def __post_init__(self):
        count("size", self.size)

    def objection(self, shape):
        return None

    def visible(self, rows, columns, shape):
        return (rows // self.size)[:, None] == (columns // self.size)[None, :]

    def meets(self, tiles, shape):
        own = tiles.blocks(self.size)
        return (own.top <= own.right) & (own.left <= own.bottom)


@dataclasses.dataclass(frozen=True)
class Strided(AbstractPattern):
    """Local attention, and every `stride`-th key (Child et al., arXiv 1904.10509, section 4.2).

        i sees j where |I - J| <= local or I = J mod stride,    I = floor(i / size), J likewise

    With `causal=True` and `local=stride` it is the strided pattern of the paper, both its heads in
    one. A kernel can leave out what lies between only in whole tiles: a `size` of some hundred
    tokens makes it cheap, a size of 1 does not.

    **Arguments:** `stride`, `local`: in blocks; `size`: tokens of a block.

    **Raises:** `ValueError` or `TypeError` for what is no whole number in its range.

    ```python
    >>> jaxflow.masks.Strided(3, 0).matrix(4, 4).astype(int)
    array([[1, 0, 0, 1],
           [0, 1, 0, 0],
           [0, 0, 1, 0],
           [1, 0, 0, 1]])

    ```
    """

    stride: int
    local: int
    size: int = 1

    def __post_init__(self):
        count("stride", self.stride)
        count("local", self.local, 0)
        count("size", self.size)

    def objection(self, shape):
        return None

    def visible(self, rows, columns, shape):
        rows, columns = (rows // self.size)[:, None], (columns // self.size)[None, :]
        strided = rows % self.stride == columns % self.stride
        return strided | (abs(rows - columns) <= self.local)

    def meets(self, tiles, shape):
        own = tiles.blocks(self.size)
        least, most = own.top - own.right, own.bottom - own.left  # all I - J between occur
        strided = most // self.stride > (least - 1) // self.stride
        return strided | ((least <= self.local) & (most >= -self.local))


@dataclasses.dataclass(frozen=True)
class Global(AbstractPattern):
    """The first `tokens` tokens see all keys and are seen by all queries (arXiv 2007.14062).

    **Raises:** `ValueError` or `TypeError` for what is no whole number from 1 on.

    ```python
    >>> jaxflow.masks.Global(1).matrix(3, 3).astype(int)
    array([[1, 1, 1],
           [1, 0, 0],
           [1, 0, 0]])

    ```
    """

    tokens: int

    def __post_init__(self):
        count("tokens", self.tokens)

    def objection(self, shape):
        return None

    def visible(self, rows, columns, shape):
        return (rows < self.tokens)[:, None] | (columns < self.tokens)[None, :]

    def meets(self, tiles, shape):
        return (tiles.top < self.tokens) | (tiles.left < self.tokens)


@dataclasses.dataclass(frozen=True)
class Random(AbstractPattern):
    """The queries of a block see `blocks` random blocks of keys (arXiv 2007.14062).

    Tokens come in blocks of `size`. Each block of queries draws so many different ones of the
    blocks of keys, uniformly, or has all where there are no more.

    **Arguments:** `seed`: of the draws, which also depend on the number of keys.

    **Raises:** `ValueError` or `TypeError` for what is no whole number in its range.

    ```python
    >>> jaxflow.masks.Random(2, 1).matrix(3, 5).sum(axis=1)
    array([2, 2, 2])

    ```
    """

    blocks: int
    size: int
    seed: int = 0

    def __post_init__(self):
        count("blocks", self.blocks)
        count("size", self.size)
        count("seed", self.seed, 0)

    def objection(self, shape):
        return None

    def visible(self, rows, columns, shape):
        return _look_up(self._table(shape), rows // self.size, columns // self.size)

    def meets(self, tiles, shape):
        return _any_block(self._table(shape), tiles.blocks(self.size))

    def _table(self, shape):
        return _random_table(-(-shape[0] // self.size), -(-shape[1] // self.size), self)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class BlockSparse(AbstractPattern):
    """Query i sees key j where `table[floor(i / size), floor(j / size)]` is true.

    **Arguments:**

    - `table`: Boolean, shape `(rows, columns)`: blocks of queries by blocks of keys. It must
      cover all of them.
    - `size`: tokens of a block.

    **Raises:** `ValueError` or `TypeError` for a table that is no Boolean matrix, and a size that
    is no whole number from 1 on.

    ```python
    >>> jaxflow.masks.BlockSparse([[True, False], [True, True]], 2).matrix(3, 4).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 1]])

    ```
    """

    packed: bytes
    blocks: Shape
    size: int

    def __init__(self, table: Any, size: int):
        table = _boolean_matrix(table)
        for name, value in (
            ("packed", np.packbits(table).tobytes()),
            ("blocks", table.shape),
            ("size", count("size", size)),
        ):
            object.__setattr__(self, name, value)

    def __repr__(self):
        rows, columns = self.blocks
        return f"BlockSparse(<table of {rows} x {columns}>, {self.size})"

    @property
    def table(self) -> np.ndarray:
        """The table, (rows, columns)."""
        return _unpacked(self.packed, self.blocks)

    def objection(self, shape):
        covered = tuple(blocks * self.size for blocks in self.blocks)
        if covered[0] >= shape[0] and covered[1] >= shape[1]:
            return None
        return (
            f"the table of a mask must cover all queries and keys: {self.blocks[0]} x "
            f"{self.blocks[1]} blocks of {self.size} tokens cover {covered[0]} x {covered[1]}, got "
            f"{shape[0]} queries and {shape[1]} keys. Pass a larger table or size."
        )

    def visible(self, rows, columns, shape):
        return _look_up(self.table, rows // self.size, columns // self.size)

    def meets(self, tiles, shape):
        return _any_block(self.table, tiles.blocks(self.size))


@dataclasses.dataclass(frozen=True)
class AnyOf(AbstractPattern):
    """The pairs that one of the patterns shows."""

    masks: tuple[AbstractPattern, ...]

    def objection(self, shape):
        return _first_objection(self.masks, shape)

    def visible(self, rows, columns, shape):
        return functools.reduce(or_, (mask.visible(rows, columns, shape) for mask in self.masks))

    def meets(self, tiles, shape):
        return functools.reduce(or_, (mask.meets(tiles, shape) for mask in self.masks))


@dataclasses.dataclass(frozen=True)
class AllOf(AbstractPattern):
    """The pairs that each of the patterns shows."""

    masks: tuple[AbstractPattern, ...]

    def objection(self, shape):
        return _first_objection(self.masks, shape)

    def visible(self, rows, columns, shape):
        return functools.reduce(and_, (mask.visible(rows, columns, shape) for mask in self.masks))

    def meets(self, tiles, shape):
        return functools.reduce(and_, (mask.meets(tiles, shape) for mask in self.masks))


def big_bird(
    *, window: int, tokens: int, blocks: int, size: int = 64, seed: int = 0
) -> AbstractPattern:
    """Window, global and random attention together (BigBird, Zaheer et al., arXiv 2007.14062).

    **Arguments:** `window` keys to the left and to the right, the first `tokens` tokens global,
    and `blocks` random blocks of `size` keys for each block of queries, drawn by `seed`.

    **Returns:** `Window(window) | Global(tokens) | Random(blocks, size, seed)`.

    **Raises:** `ValueError` or `TypeError` for what is no whole number in its range.

    ```python
    >>> mask = jaxflow.masks.big_bird(window=64, tokens=2, blocks=1)
    >>> bool(mask.matrix(1024, 1024).mean() < 0.2)
    True

    ```
    """
    return Window(window) | Global(tokens) | Random(blocks, size, seed)


# ------------------------------------------------------------------ more than pairs of indices


@dataclasses.dataclass(frozen=True)
class TopK(AbstractMask):
    """Each query sees the k keys with its largest scores (Gupta et al., arXiv 2106.06899).

    The scores are s_ij = beta <q_i, k_j>, of the keys with mass; log-weights do not order them but
    weigh what is kept. Ties are averaged: if c keys score above the k-th largest and T tie with it,
    each of the T enters with the fraction (k - c) / T of its weight, so that k places are given
    away and no order of the keys matters. For equal weights that is the mean over all ways to break
    the ties. Scores within `tolerance` times the largest |score| of the query tie (default 32
    machine epsilons). The choice of keys is held fixed in derivatives: they are those of the
    function wherever it has any.

    All pairs are scored, in blocks of rows, so it costs no less than full attention.

    **Arguments:** `k`: a number of keys; a query that sees no more keeps all. `tolerance`: see
    above. `among`: a pattern that says of which keys; `None` is all.

    **Raises:** `ValueError` or `TypeError` for what is no whole number from 1 on, a tolerance that
    is negative, and what is no pattern.

    ```python
    >>> k = v = jnp.array([[0.0], [1.0], [2.0], [2.0]])  # 2 and 2 tie for the one place
    >>> mean, _ = jaxflow.softmax_expectation(jnp.ones((1, 1)), k, v, mask=jaxflow.masks.TopK(1))
    >>> float(mean[0, 0])
    2.0

    ```
    """

    k: int
    tolerance: float | None = None
    among: AbstractPattern | None = None

    def __post_init__(self):
        count("k", self.k)
        if self.tolerance is not None:
            constant("tolerance", self.tolerance, "finite and not negative", not_negative)
        if self.among is not None:
            instance("among", self.among, AbstractPattern, "jaxflow.masks.Blocks(64)")

    def objection(self, shape):
        return None if self.among is None else self.among.objection(shape)


@dataclasses.dataclass(frozen=True)
class Hierarchical(AbstractMask):
    """Near keys one by one, far ones as means of groups that double with the distance.

    The level of a pair, with cells of s 2^l tokens, is

        l(i, j) = the least l with |floor(i / (s 2^l)) - floor(j / (s 2^l))| <= 1

    and query i sees key j in its group of 2^l(i, j) tokens that follow each other, as one key with
    the mass of the group and its mean key and value (by the weights of mu):

        s_iG = beta <q_i, mean_G k> + log mu(G),   mean_i = sum_G e^{s_iG} mean_G v / sum_G e^{s_iG}

    These are the levels of H-Transformer-1D (Zhu and Soricut, arXiv 2107.11906), which also groups
    queries; here each query keeps its own. A query sees O(s log(n / s)) groups of all n tokens. It
    is exact where the tokens of a group agree, and off by the second order of their spread in
    score elsewhere. Tokens must be ordered such that neighbours are alike, as in a text.

    **Arguments:** `size`: s, a power of two from 2 on.

    **Raises:** `ValueError` or `TypeError` for a size that is none.

    ```python
    >>> x = jaxflow.measure.circle(256).points  # neighbours are alike
    >>> full, _ = jaxflow.softmax_expectation(x, x, x)
    >>> near, _ = jaxflow.softmax_expectation(x, x, x, mask=jaxflow.masks.Hierarchical(16))
    >>> bool(jnp.abs(near - full).max() < 0.01)
    True

    ```
    """

    size: int

    def __post_init__(self):
        if count("size", self.size, 2) & (self.size - 1):
            raise ValueError(
                f"size must be a power of two, so that groups fill cells; got {self.size}. Take "
                f"{2 ** (self.size.bit_length() - 1)} or {2 ** self.size.bit_length()}."
            )

    def objection(self, shape):
        return None

    def lengths(self, shape: Shape) -> tuple[int, ...]:
        """The numbers of groups of 1, 2, 4, ... keys, up to the level at which all are near."""
        top = 0
        while -(-max(shape) // (self.size << top)) > 2:
            top += 1
        return tuple(-(-shape[1] // (1 << level)) for level in range(top + 1))


# ------------------------------------------------------------------ tables


def _boolean_matrix(table: Any) -> np.ndarray:
    try:
        found = np.asarray(table)
    except ValueError:
        found = np.asarray(None)
    if found.dtype != bool:
        raise TypeError(
            f"the table of a mask must be Boolean, got {found.dtype}. Pass table.astype(bool)."
        )
    if found.ndim != 2 or not found.size:
        raise ValueError(
            "the table of a mask must have two axes, (blocks of queries, blocks of keys); got "
            f"shape {found.shape}."
        )
    return found


@functools.lru_cache(maxsize=16)
def _unpacked(packed: bytes, shape: Shape) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=shape[0] * shape[1])
    return bits.reshape(shape).astype(bool)


@functools.lru_cache(maxsize=16)
def _random_table(rows: int, columns: int, mask: Random) -> np.ndarray:
    table = np.zeros((rows, columns), bool)
    for i in range(rows):
        draws = np.random.default_rng([mask.seed, i])
        table[i, draws.choice(columns, min(mask.blocks, columns), replace=False)] = True
    return table


def _look_up(table: np.ndarray, rows: Indices, columns: Indices):
    return take(table, rows)[:, columns]


def take(constant: np.ndarray, indices: Indices):
    """Of a constant of the program, by NumPy for NumPy's indices."""
    return (constant if isinstance(indices, np.ndarray) else jnp.asarray(constant))[indices]


def _any_block(table: np.ndarray, blocks: Tiles) -> np.ndarray:
    """Whether a tile of blocks has a true one, by sums over the rectangles from the corner."""
    sums = np.zeros((table.shape[0] + 1, table.shape[1] + 1), np.int64)
    sums[1:, 1:] = table.cumsum(axis=0).cumsum(axis=1)
    bottom, right = blocks.bottom + 1, blocks.right + 1
    inside = sums[bottom, right] - sums[blocks.top, right]
    return inside - sums[bottom, blocks.left] + sums[blocks.top, blocks.left] > 0


def _first_objection(masks: tuple[AbstractPattern, ...], shape: Shape) -> str | None:
    return next((reason for mask in masks if (reason := mask.objection(shape))), None)
