"""Only the pairs that matter, to a stated tolerance, in any dimension.

Keys are ordered once into balls of at most `BALL` keys and queries into blocks of `ROWS`. A ball B
of mass M_B = sum_{j in B} e^{b_j}, mean key c_B and mean value v_B acts on a query u as one key,

    D_B = sum_{j in B} e^{s_j}  is replaced by  D'_B = M_B e^{<u, c_B>},
    N_B = sum_{j in B} e^{s_j} (v_j - v_0)  by  N'_B = D'_B (v_B - v_0),

unless that could be wrong by too much for a query of a block: then the block asks its keys one by
one. So most balls cost one pair for each query, and of the n^2 pairs few are left.

**The bound.** Let X = <u, k_j - c_B> under the law of weights e^{b_j} / M_B in the ball: E X = 0,
X <= a = |u| r_B with r_B the radius, and E X^2 <= |u|^2 l_B with l_B the largest eigenvalue of
their covariance; likewise l'_B of the values. With psi(a) = (e^a - 1 - a) / a^2, which increases,
e^X <= 1 + X + X^2 psi(a) (as in Bennett's inequality; Boucheron, Lugosi and Massart, Concentration
Inequalities, 2013, theorem 2.9), and |e^X - 1| <= |X| (e^a - 1) / a. Hence

    0 <= D_B - D'_B <= D'_B eps,    eps = |u|^2 l_B psi(a)                        (Jensen, Bennett)
    |N_B - N'_B| <= D'_B (eta + eps) R,  eta R = min(2 R, |u| sqrt(l_B l'_B) (e^a - 1) / a)

(Cauchy and Schwarz), R the largest |v_j - v_0|, v_0 the mean of all values. Summing over the
replaced balls, with Z = sum_B D_B, Z' <= Z its approximation, N and N' likewise, |N'| <= R Z':

    |N / Z - N' / Z'| <= |N - N'| / Z + (|N'| / Z') |Z - Z'| / Z <= R sum_B (D'_B / Z) g_B,
    g = eta + 2 eps,    0 <= log Z - log Z' <= -log(1 - sum_B (D'_B / Z) g_B / 2).

A ball is replaced where g_B D'_B <= (tolerance / 2) max(D'_B, Z_low M_B / M), M the mass of all
keys and Z_low the sum of D'_B over some balls, at most Z. It is left out (nothing stands for it)
where g_B = 2 (1 + eps) obeys this, for |N_B| <= D_B R and D_B <= (1 + eps) D'_B. As the D'_B sum to
at most Z and the M_B to M, sum_B (D'_B / Z) g_B is at most the tolerance: the mean is wrong by at
most tolerance * R in norm, the log-partition by at most the tolerance, beside rounding.

**Derivatives** leave a ball out or ask its keys, by the same rule, so that the weights p_ij of all
pairs that are left out sum to less than the tolerance for each query. Tangent and cotangent leave
out the same pairs, and stay each other's transpose.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._types import accumulation_dtype
from .base import (
    LOG2E,
    MASKED,
    AbstractBackend,
    Cotangent,
    Forward,
    Mode,
    Operands,
    Problem,
    Results,
    Shapes,
    Tangent,
    evaluate,
    finite,
    inner_products,
    on_one_batch_axis,
)
from .blocked import Blocked, _exp2, _matmul, _normalise, _unmasked, _with_columns

# Keys in a ball, queries in a block, balls that a block asks at a time, and balls of which it looks
# at the moments at a time.
BALL, ROWS, TOGETHER, LOOK = 128, 128, 8, 256
# Landmarks, which make the cells of the order: one for `CELL` rows, but up to `CELLS` where a cell
# has `LEAST_CELL`; found in so many rounds among a sample of so many rows for each.
CELL, CELLS, LEAST_CELL, ROUNDS, SAMPLE = 256, 400, 64, 8, 16
# With fewer pairs than this the portable backend is as fast, whatever the law.
FEW = 2**28
# The portable backend runs where more than this share of all pairs would be asked: each costs about
# three of its own (two Zen 3 cores), and the look a tenth of all.
MOST = 0.35

# By the dtype of sums: where nothing is said, and the least. Scores of size 10 are rounded there.
DEFAULT = {"float32": 1e-6, "float64": 1e-10}
LEAST = {"float32": 1e-6, "float64": 1e-13}

PORTABLE = Blocked()


@dataclasses.dataclass(frozen=True)
class Pruned(AbstractBackend):
    """The backend with this tolerance; None is the default of the dtype."""

    tolerance: float | None = None

    def forward(self, operands: Forward, problem: Problem) -> Results:
        return self._each(_forward, operands, problem)

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        return self._each(_tangent, operands, problem)

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        return self._each(_cotangent, operands, problem)

    def _each(self, ask: Callable, operands: Operands, problem: Problem) -> Results:
        """The systems of a batch in turn: each has its own balls, and may hand over."""
        if few(operands):
            return evaluate(PORTABLE, operands, problem)
        tolerance = self.tolerance or DEFAULT[operands.b.dtype.name]

        def one(operands):
            system = System.of(operands, tolerance)
            look = system.look(replace=isinstance(operands, Forward))
            return jax.lax.cond(
                system.sparse(look.asked),
                lambda: ask(operands, system, look),
                lambda: evaluate(PORTABLE, operands, problem),
            )

        systems = lambda operands, _: jax.lax.map(one, operands)
        return on_one_batch_axis(systems, operands, problem)

    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        if problem.band != (None, None):
            return "it orders the keys by where they lie, so causal and window are not for it"
        name = accumulation_dtype(shapes.q.dtype).name
        if self.tolerance is not None and self.tolerance < LEAST[name]:
            least = f"its tolerance must be at least {LEAST[name]:g} where sums are {name}"
            return f"{least}, got {self.tolerance:g}"
        return None

    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        return "balls of keys in XLA"


def few(operands) -> bool:
    """Whether there are so few pairs that it is not worth a look."""
    return operands.q.shape[-2] * operands.k.shape[-2] < FEW


# ------------------------------------------------------------------ order


class Groups(NamedTuple):
    """Rows of a matrix in groups of equal size that lie close together."""

    index: Array  # (groups, size): a row; in places left over, another of the same cell
    valid: Array  # (groups, size): no place left over
    used: Array  # the number of groups that hold a row; they come first

    def take(self, a: Array) -> Array:
        return a[self.index]

    def back(self, grouped: Array, length: int) -> Array:
        """The rows in their own order."""
        flat = grouped.reshape((-1, *grouped.shape[2:]))
        index = jnp.where(self.valid, self.index, length).reshape(-1)
        place = jnp.zeros(length, int).at[index].set(jnp.arange(len(index), dtype=int), mode="drop")
        return flat[place]


def group(x: Array, size: int) -> Groups:
    """The rows by the nearest of some landmarks, each cell in groups of `size`."""
    n = len(x)
    landmarks = _landmarks(x, max(n // CELL, min(n // LEAST_CELL, CELLS), 1))
    count = len(landmarks)
    cell = _nearest(x, landmarks)[1]
    order = jnp.argsort(cell)
    first = jnp.searchsorted(cell[order], jnp.arange(count + 1))
    groups = -(-(first[1:] - first[:-1]) // size)
    start = jnp.cumsum(groups) - groups
    # One more than can be used: the last group is always empty.
    number = jnp.arange(n // size + count + 1, dtype=start.dtype)
    own = jnp.searchsorted(start, number, side="right") - 1
    place = first[own] + (number - start[own]) * size
    place = place[:, None] + jnp.arange(size, dtype=place.dtype)[None, :]
    last = first[own + 1][:, None]
    return Groups(order[jnp.clip(place, 0, last - 1)], place < last, groups.sum())


def _landmarks(x: Array, count: int) -> Array:
    """At least so many rows, among which each row finds one close to it.

    The first ones are evenly spaced; each later round is drawn with probability proportional to
    the squared distance to those before it (k-means||: Bahmani et al. 2012), systematically. So a
    cluster that has none yet gets most of the next.
    """
    size = -(-count // ROUNDS)
    x = x[:: max(1, len(x) // (SAMPLE * count))]
    levels = (jnp.arange(size, dtype=x.dtype) + 0.5) / size

    def draw(distance, _):
        total = jnp.cumsum(distance)
        place = jnp.searchsorted(total, levels * total[-1])
        more = x[jnp.clip(place, 0, len(x) - 1)]
        return jnp.minimum(distance, _nearest(x, more)[0]), more

    first = x[jnp.arange(size) * len(x) // size]
    _, more = jax.lax.scan(draw, _nearest(x, first)[0], length=ROUNDS - 1)
    return jnp.concatenate([first, more.reshape(-1, x.shape[1])])


def _nearest(x: Array, landmarks: Array) -> tuple[Array, Array]:
    """The squared distance to the nearest landmark, and its number."""
    squares = (landmarks**2).sum(axis=1)
    numbers = jnp.arange(len(landmarks))

    def one(x):
        half = squares[:, None] / 2 - inner_products(landmarks, x)
        least = half.min(axis=0)
        # Like argmin, in two reductions that are vectorised.
        number = jnp.where(half == least[None, :], numbers[:, None], len(landmarks) - 1).min(axis=0)
        return (x**2).sum(axis=1) + 2 * least, number

    block = 1024
    blocks = -(-len(x) // block)
    padded = jnp.pad(x, ((0, blocks * block - len(x)), (0, 0)))
    distance, number = jax.lax.map(one, padded.reshape(blocks, block, -1))
    return jnp.maximum(distance.reshape(-1)[: len(x)], 0), number.reshape(-1)[: len(x)]


# ------------------------------------------------------------------ balls


class Balls(NamedTuple):
    """What is known of each ball."""

    log_mass: Array  # (balls,)
    key: Array  # (balls, p)
    value: Array  # (balls, r)
    radius: Array  # (balls,): of the keys, about their mean
    spread: Array  # (balls,): at least the largest eigenvalue of the covariance of the keys
    value_spread: Array  # (balls,)


def moments(k: Array, v: Array, b: Array) -> Balls:
    """Of one ball of keys."""
    top = finite(b.max())
    weights = jnp.exp(b - top)
    mass = weights.sum()
    share = weights / jnp.where(mass == 0, 1, mass)
    key, value = share @ k, share @ v
    seen = jnp.where(jnp.isneginf(b), 0.0, 1.0).astype(k.dtype)[:, None]
    e = seen * (k - key[None])
    radius = jnp.sqrt((e**2).sum(axis=1).max())
    return Balls(
        jnp.log(mass) + top, key, value, radius, _spread(share, e), _spread(share, v - value[None])
    )


def _spread(share: Array, e: Array) -> Array:
    """A bound on the largest eigenvalue of the covariance C, (tr C^8)^{1/8}."""
    scaled = jnp.sqrt(share)[:, None] * e
    short = scaled.T if e.shape[1] < len(e) else scaled
    c = inner_products(short, short)
    trace = jnp.trace(c)
    c = c / jnp.where(trace > 0, trace, 1)
    for _ in range(2):
        c = inner_products(c, c)
    return trace * (c**2).sum() ** (1 / 8)


def log_excess(size: Array, balls: Balls) -> Array:
    """log eps of balls for queries of this norm, by which exp exceeds its value at the mean."""
    a = size * balls.radius
    return 2 * jnp.log(size) + jnp.log(balls.spread) + _log_psi(a)


def log_error(size: Array, balls: Balls, diameter: Array) -> Array:
    """log g of balls for queries of this norm."""
    a = jnp.maximum(size * balls.radius, jnp.finfo(size.dtype).tiny)
    slope = a + jnp.log(-jnp.expm1(-a) / a)
    both = (jnp.log(balls.spread) + jnp.log(balls.value_spread)) / 2
    eta = jnp.log(size) + both + slope - jnp.log(diameter)
    log2 = math.log(2)
    return jnp.logaddexp(jnp.minimum(eta, log2), log2 + log_excess(size, balls))


def _log_psi(a: Array) -> Array:
    """log((e^a - 1 - a) / a^2), from above where it is small."""
    large = jnp.maximum(a, 0.5)
    exact = large + jnp.log((1 - (1 + large) * jnp.exp(-large)) / large**2)
    return jnp.where(a < 0.5, a / 2 - math.log(2), exact)


# ------------------------------------------------------------------ one system


class Look(NamedTuple):
    """What each block of queries does with each ball, and what it has of the balls replaced."""

    asked: Array  # (blocks, balls)
    near: Array  # (blocks, balls): asked or replaced, for all others are left out
    shift: Array  # (blocks, ROWS)
    total: Array  # (blocks, ROWS, r + 1): sum_B e^{-shift} D'_B (v_B, 1) over the balls replaced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class System:
    """Queries in blocks and keys in balls, and the loops over them."""

    u: Array
    k: Array
    v: Array
    b: Array
    rows: Groups
    keys: Groups
    balls: Balls
    log_tolerance: Array

    @classmethod
    def of(cls, operands: Operands, tolerance: float | Array) -> "System":
        """Ordered, with the moments of the balls."""
        q, k, v, b, scale, *_ = operands
        u, k, v = scale * q.astype(b.dtype), k.astype(b.dtype), v.astype(b.dtype)
        keys = group(k, BALL)
        each = keys.take(k), keys.take(v), jnp.where(keys.valid, keys.take(b), -jnp.inf)
        balls = jax.lax.map(lambda ball: moments(*ball), each, batch_size=64)
        log_tolerance = jnp.log(jnp.asarray(tolerance, b.dtype))
        return cls(u, k, v, b, group(u, ROWS), keys, balls, log_tolerance)

    @property
    def seen(self) -> Array:
        """The balls that hold a key of positive weight."""
        return ~jnp.isneginf(self.balls.log_mass)

    @property
    def log_mass(self) -> Array:
        return jnp.where(self.seen, self.balls.log_mass, MASKED)

    @property
    def radius(self) -> Array:
        """R, the largest distance of a value from the mean of all."""
        seen = ~jnp.isneginf(self.b)
        weights = jnp.where(seen, jnp.exp(self.b - finite(self.b.max())), 0)
        mean = (weights @ self.v) / jnp.maximum(weights.sum(), 1)
        squares = ((self.v - mean[None]) ** 2).sum(axis=1)
        largest = jnp.sqrt(jnp.where(seen, squares, 0).max())
        return jnp.maximum(largest, jnp.finfo(self.v.dtype).tiny)

    # -------------------------------------------------------------- the look

    def look(self, replace: bool) -> Look:
        """What each block does with each ball: replaced are balls only where that is allowed."""
        # log(tolerance / 2 M), what a ball of mass 1 may err by.
        share = self.log_tolerance - math.log(2) - finite(jax.nn.logsumexp(self.balls.log_mass))
        radius, values = self.radius, _with_columns(self.balls.value, 1)

        def block(i):
            u = self.u[self.rows.index[i]]
            size = jnp.sqrt((u**2).sum(axis=1).max())
            left_out = math.log(2) + jnp.logaddexp(log_excess(size, self.balls), 0.0)
            near = ~(left_out + self._reach(u) <= share) & self.seen
            places, turns = _places(near, LOOK)
            shift, low = self._lower_bound(u, places, turns)

            def decide(turn, carry):
                asked, total = carry
                some = _turn(places, turn, LOOK)
                s = inner_products(u, self.balls.key[some])
                error = left_out[some]
                if replace:
                    error = log_error(size, self._at(some), radius)
                fine = error + (s - low[:, None]).max(axis=0) <= share
                if replace:
                    fine = fine | (error <= self.log_tolerance - math.log(2))
                mine = ~fine & self.seen[some]
                logits = jnp.where(mine, MASKED, self.log_mass[some])[None] + s
                total = total + _matmul(_exp(logits - shift[:, None]), values[some])
                return asked.at[some].max(mine), total

            total = jnp.zeros((len(u), values.shape[1]), u.dtype)
            asked, total = jax.lax.fori_loop(0, turns, decide, (jnp.zeros_like(near), total))
            return Look(asked, near, shift, total)

        return self.each_block(block)

    def _reach(self, u: Array) -> Array:
        """Of each ball, a bound on <u, c_B> - log Z_low(u) over these queries.

        log Z_low is convex, and its gradient is c', the Gibbs mean of the c_B. So with u_0 in the
        middle, <u, c_B> - log Z_low(u) <= <u_0, c_B> - log Z_low(u_0) + |u - u_0| |c_B - c'|.
        """
        keys, middle = self.balls.key, u.mean(axis=0)
        reach = jnp.sqrt(((u - middle[None]) ** 2).sum(axis=1).max())
        s = (keys * middle[None]).sum(axis=1)
        logits = s + self.log_mass
        weights = jnp.exp(logits - logits.max())
        mean = (weights[:, None] * keys).sum(axis=0) / weights.sum()
        away = jnp.sqrt(((keys - mean[None]) ** 2).sum(axis=1))
        return s - jax.nn.logsumexp(logits) + reach * away

    def _lower_bound(self, u: Array, places: Array, turns: Array) -> tuple[Array, Array]:
        """The largest of <u, c_B> + log M_B, and log Z_low: over the balls at these places."""

        def more(turn, carry):
            shift, total = carry
            some = _turn(places, turn, LOOK)
            logits = inner_products(u, self.balls.key[some]) + self.log_mass[some][None]
            new = jnp.maximum(shift, _unmasked(logits.max(axis=1)))
            return new, total * _exp(shift - new) + _exp(logits - new[:, None]).sum(axis=1)

        init = jnp.full(len(u), MASKED, u.dtype), jnp.zeros(len(u), u.dtype)
        shift, total = jax.lax.fori_loop(0, turns, more, init)
        return shift, shift + jnp.log(total)

    def _at(self, some: Array) -> Balls:
        return jax.tree.map(lambda a: a[some], self.balls)

    def sparse(self, asked: Array) -> Array:
        """Whether few enough of the pairs are asked."""
        pairs = asked.sum(axis=1).astype(self.u.dtype).sum() * (ROWS * BALL)
        return pairs < MOST * len(self.u) * len(self.k)

    # -------------------------------------------------------------- loops

    def each_block(self, fn: Callable):
        """fn(i) for each block of queries, stacked; blocks without a query are left zero."""
        stack = lambda x: jnp.zeros((len(self.rows.index), *x.shape), x.dtype)
        put = lambda i, stacked, x: stacked.at[i].set(x)
        body = lambda i, outs: jax.tree.map(partial(put, i), outs, fn(i))
        init = jax.tree.map(stack, jax.eval_shape(fn, 0))
        return jax.lax.fori_loop(0, self.rows.used, body, init)

    def fold(self, asked: Array, step: Callable, init, *keys: Array):
        """carry = step(carry, places, *keys) over the balls asked, some at a time.

        Each of `keys` has its rows in balls, (balls, BALL, channels).
        """
        places, turns = _places(asked, TOGETHER)

        def body(turn, carry):
            some = _turn(places, turn, TOGETHER)
            return step(carry, some, *(a[some].reshape(-1, a.shape[2]) for a in keys))

        return jax.lax.fori_loop(0, turns, body, init)

    def in_balls(self, *columns: Array | int) -> Array:
        """Columns of keys, in balls."""
        return self.keys.take(_with_columns(*columns))

    @property
    def scored(self) -> Array:
        """(k_j, b_j) in balls, what is left over masked."""
        keys = self.in_balls(self.k, jnp.where(jnp.isneginf(self.b), MASKED, self.b))
        return keys.at[..., -1].set(jnp.where(self.keys.valid, keys[..., -1], MASKED))


def _places(mask: Array, together: int) -> tuple[Array, Array]:
    """Where the mask is true, and in how many turns of so many places.

    The last turn is filled up with the last place, an empty ball.
    """
    size = -(-len(mask) // together) * together
    places = jnp.nonzero(mask, size=size, fill_value=len(mask) - 1)[0]
    return places, -(-mask.sum() // together)


def _turn(places: Array, turn: Array, together: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(places, turn * together, together)


# ------------------------------------------------------------------ the three functions


def _forward(operands: Forward, system: System, look: Look) -> Results:
    keys, values = system.scored, system.in_balls(system.v, 1)

    def block(i):
        u = _with_columns(system.u[system.rows.index[i]], 1)

        def step(carry, _, k, values):
            shift, total = carry
            s = inner_products(u, k)
            new = jnp.maximum(shift, _unmasked(s.max(axis=1)))
            return new, total * _exp(shift - new)[:, None] + _matmul(_exp(s - new[:, None]), values)

        init = look.shift[i], look.total[i]
        return _normalise(*system.fold(look.asked[i], step, init, keys, values))

    mean, lse = (system.rows.back(a, len(system.u)) for a in system.each_block(block))
    return mean.astype(operands.v.dtype), lse


def _tangent(operands: Tangent, system: System, look: Look) -> Results:
    dtype = operands.b.dtype
    mean, lse = operands.mean.astype(dtype), finite(operands.lse)
    dk, dv = operands.dk.astype(dtype), operands.dv.astype(dtype)
    # <u, dk> + <du, k> + db is one product.
    moved = system.in_balls(dk, system.k, operands.moving_db)
    values, dvalues = system.in_balls(system.v, 1), system.in_balls(dv, 0)

    def block(i):
        index = system.rows.index[i]
        u = system.u[index]
        scored, directions = _with_columns(u, 1), _with_columns(u, operands.du[index], 1)

        def step(total, _, k, moved, values, dvalues):
            p = _exp(inner_products(scored, k) - lse[index][:, None])
            ds = inner_products(directions, moved)
            return total + _matmul(p, dvalues) + _matmul(p * ds, values)

        init = jnp.zeros((len(u), values.shape[2]), dtype)
        total = system.fold(look.asked[i], step, init, system.scored, moved, values, dvalues)
        return total[:, :-1] - total[:, -1:] * mean[index], total[:, -1]

    dmean, dlse = (system.rows.back(a, len(system.u)) for a in system.each_block(block))
    return dmean.astype(operands.v.dtype), dlse


def _cotangent(operands: Cotangent, system: System, look: Look) -> Results:
    dtype = operands.b.dtype
    lse, centre = finite(operands.lse), operands.centre
    keys, values = system.scored, system.in_balls(system.v, 1)

    def block(i, sums):
        index = system.rows.index[i]
        # A query that fills up a block is another's double.
        mine = system.rows.valid[i].astype(dtype)[:, None]
        u, g = _with_columns(system.u[index], 1), mine * operands.g[index].astype(dtype)
        centred = _with_columns(g, -mine[:, 0] * centre[index])

        def step(carry, some, k, values):
            gu, (gk, gv) = carry
            p = _exp(inner_products(k, u) - lse[index][None])
            w = p * inner_products(values, centred)
            add = lambda total, part: total.at[some].add(part.reshape(-1, BALL, part.shape[1]))
            return gu + _matmul(w.T, k[:, :-1]), (add(gk, _matmul(w, u)), add(gv, _matmul(p, g)))

        init = jnp.zeros((len(u), system.k.shape[1]), dtype), sums
        return system.fold(look.asked[i], step, init, keys, values)

    def body(i, carry):
        outs, sums = carry
        gu, sums = block(i, sums)
        return outs.at[i].set(gu), sums

    # The column of ones beside u sums w to the gradient in b.
    sums = jnp.zeros(keys.shape, dtype), jnp.zeros_like(values[..., :-1])
    outs = jnp.zeros((*system.rows.index.shape, system.k.shape[1]), dtype)
    gu, (gk, gv) = jax.lax.fori_loop(0, system.rows.used, body, (outs, sums))
    gk, gv = (system.keys.back(a, len(system.k)) for a in (gk, gv))
    gu = system.rows.back(gu, len(system.u))
    return gu, gk[:, :-1].astype(operands.k.dtype), gv.astype(operands.v.dtype), gk[:, -1]


def _exp(x: Array) -> Array:
    return _exp2(LOG2E * x) if x.dtype == jnp.float32 else jnp.exp(x)
