"""Keys and values divided among devices: they travel in a ring, and each device folds what passes.

Device r of N has the queries and keys of one N-th of the tokens. At turn t it holds the keys B of
device r - t, by t sends to the next device (Liu, Zaharia and Abbeel, arXiv 2310.01889). What any
other backend finds for its queries and B alone are parts of the three functions:

    forward     (mean, lse) of all keys   <-  logaddexp of lse_B, means weighted by exp(lse_B - lse)
    tangent     dmean, dlse               <-  sum over B  } p_ij = exp(s_ij - lse_i) with the lse of
    cotangent   gu                        <-  sum over B  } all keys, an operand of theirs
                gk, gv, gb of B           <-  sum over r, in a sum that travels with B

A device never holds more than two blocks of keys. Per call it sends its block of keys N - 1 times,
and in the cotangent the sums of its block N times.

**Causal attention** in order of the tokens would leave device 0 idle for N - 1 turns. So the
tokens are cut into 2 N pieces, and device r takes the pieces r and 2 N - 1 - r (zigzag order). Of
its four pairs of pieces with those of another device s, two are visible as a whole, for every r:
the late queries with the early keys, and of the early pieces or of the late ones those with r > s
or with r < s. These two are one call of the backend, on a batch of two.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jaxtyping import Array, Bool

from .base import (
    AbstractBackend,
    AbstractFunctions,
    Cotangent,
    Forward,
    Mode,
    Operands,
    Problem,
    Results,
    Shapes,
    Tangent,
    evaluate,
    pad,
    vanishing,
)
from .blocked import Blocked
from .partition import OPERANDS, RESULTS, axes_of, by_length, spec

CAUSAL = (None, 0)
# What a token that is missing to equal shares has; where nothing is said, zero.
MISSING = {"b": -jnp.inf, "lse": -jnp.inf}
# What no key at all adds to the results, and the sum of what two sets of keys add.
NOTHING = {Forward: (0.0, -jnp.inf), Tangent: (0.0, 0.0), Cotangent: (0.0, 0.0, 0.0, 0.0)}


@dataclasses.dataclass(frozen=True)
class Ring(AbstractBackend):
    """The ring of the devices along an axis of the mesh, around another backend.

    The three functions are those of one device, within `jax.shard_map`: their tokens are its own,
    in zigzag order where the problem is causal. `divided` is the whole.
    """

    axis: Any = None  # by name; None is the only one of the mesh
    around: AbstractFunctions = Blocked()

    def forward(self, operands: Forward, problem: Problem) -> Results:
        mean, lse = self._fold(operands, problem, _sum_of(Forward))
        return mean.astype(operands.v.dtype), lse

    def tangent(self, operands: Tangent, problem: Problem) -> Results:
        dmean, dlse = self._fold(operands, problem, _sum_of(Tangent))
        return dmean.astype(operands.v.dtype), dlse

    def cotangent(self, operands: Cotangent, problem: Problem) -> Results:
        plus = _sum_of(Cotangent)

        def add(sums: Results, parts: Results) -> Results:
            gu, *of_keys = sums
            return plus((gu, *self._sent(of_keys)), parts)  # along with the keys

        gu, *of_keys = self._fold(operands, problem, add)
        gk, gv, gb = self._sent(of_keys)  # home
        return gu, gk.astype(operands.k.dtype), gv.astype(operands.v.dtype), gb

    def refusal(self, mode: Mode, shapes: Shapes, problem: Problem) -> str | None:
        if problem.band not in ((None, None), CAUSAL):
            return "the ring sends all keys, or those that are causal, and knows no window"
        m, n = shapes.q.shape[-2], shapes.k.shape[-2]
        if problem.band == CAUSAL and m != n:
            return f"causal takes as many queries as keys around the ring, got {m} and {n}"
        return None

    def kernel(self, mode: Mode, shapes: Shapes, problem: Problem) -> str:
        return "keys sent from device to device"

    # -------------------------------------------------------------- the whole

    def divided(self, kind: type[Operands], mesh: AbstractMesh, problem: Problem) -> Callable:
        """A function of all tokens, which are divided along the axis; those that are missing to
        equal shares are added, without weight, and left out again.

        Other axes of the mesh divide the batch where its length allows.
        """
        others = {name: size for name, size in mesh.shape.items() if name != self.axis}
        pieces = mesh.shape[self.axis] * (2 if problem.band == CAUSAL else 1)

        def call(*operands):
            named = kind(*operands)
            batch = named.scale.ndim
            inputs, outputs = axes_of(kind, batch)
            shared = by_length(inputs[0][:-2], named.scale.shape, others)
            shared |= {"m": (self.axis,), "n": (self.axis,)}
            equal = lambda length: -(-length // pieces) * pieces
            keys = named.k.shape[batch]
            weighted = problem.weighted or equal(keys) > keys
            padded = [
                pad(a, equal(a.shape[batch]), MISSING.get(name, 0.0), axis=batch)
                if OPERANDS[name]
                else a
                for name, a in named._asdict().items()
            ]
            outs = jax.shard_map(
                self.share(kind, dataclasses.replace(problem, weighted=weighted)),
                mesh=mesh,
                in_specs=tuple(spec(axes, shared) for axes in inputs),
                out_specs=tuple(spec(axes, shared) for axes in outputs),
                check_vma=False,
            )(*padded)
            lengths = {"m": named.q.shape[batch], "n": keys}
            cut = lambda a, axes: jax.lax.slice_in_dim(a, 0, lengths[axes[batch]], axis=batch)
            return [cut(a, axes) for a, axes in zip(outs, outputs, strict=True)]

        return call

    def share(self, kind: type[Operands], problem: Problem) -> Callable:
        """What one device does with its tokens, which are in their order."""
        if problem.band != CAUSAL:
            return lambda *operands: evaluate(self, kind(*operands), problem)

        def causal(*operands) -> Results:
            named = kind(*operands)
            batch = named.scale.ndim
            into, out = (partial(fn, self.axis, batch) for fn in (_to_zigzag, _from_zigzag))
            skipped = {"scale"} | _alike(problem)
            given = named._asdict().items()
            ordered = kind(*(a if name in skipped else into(a) for name, a in given))
            return tuple(map(out, evaluate(self, ordered, problem)))

        return causal

    # -------------------------------------------------------------- one device

    def _fold(self, operands: Operands, problem: Problem, add: Callable) -> Results:
        """The sum over all keys of what they add, the device's own first."""
        kind, size = type(operands), jax.lax.axis_size(self.axis)
        # What cuDNN has for means alone is the gradient of a law on the keys at hand.
        problem = dataclasses.replace(problem, mean_only=False, partial=True)
        still = _alike(problem)
        names = [name for name in kind._fields if OPERANDS[name][:1] == "n" and name not in still]
        run = lambda o, problem: tuple(
            a.astype(o.b.dtype) for a in evaluate(self.around, o, problem)
        )

        def met(turn, keys) -> Results:
            passing = operands._replace(**dict(zip(names, keys, strict=True)))
            if problem.band != CAUSAL:
                return run(passing, problem)
            return _causal_parts(run, passing, problem, turn <= jax.lax.axis_index(self.axis))

        def step(carry, turn):
            keys, sums = carry
            return (self._sent(keys), add(sums, met(turn, keys))), None

        sums = run(operands, problem)
        if size == 1:
            return sums
        carry = self._sent([getattr(operands, name) for name in names]), sums
        (keys, sums), _ = jax.lax.scan(step, carry, jnp.arange(1, size - 1))
        return add(sums, met(size - 1, keys))

    def _sent(self, arrays: Sequence[Array]) -> list[Array]:
        """To the next device."""
        size = jax.lax.axis_size(self.axis)
        ahead = [(i, (i + 1) % size) for i in range(size)]
        return [jax.lax.ppermute(a, self.axis, ahead) for a in arrays]


def around_ring(ctx, ring: Ring, kind: type[Operands], problem: Problem) -> Callable:
    """The function in a program that is being lowered: for all tokens, or, where `jax.shard_map`
    has divided them, for those of one device.

    **Raises:** `NotImplementedError` where the program is for one device, `ValueError` where the
    mesh has no such axis.
    """
    context = ctx.module_context.axis_context
    mesh = getattr(context, "abstract_mesh", None) or getattr(context, "mesh", None)
    if mesh is None or mesh.empty:
        raise NotImplementedError(
            "the backend 'ring' sends keys around the devices among which the tokens are divided, "
            "and these are on one device. Leave backend None, or place them: "
            "jax.device_put(points, jax.NamedSharding(jax.make_mesh((4,), ('tokens',), "
            "axis_types=(jax.sharding.AxisType.Auto,)), jax.P('tokens')))."
        )
    within = jax.sharding.get_abstract_mesh()  # of axes that are automatic for this operation alone
    mesh = mesh if within.empty else within
    ring = dataclasses.replace(ring, axis=_axis(ring.axis, mesh))
    manual = getattr(context, "manual_axes", frozenset())
    if ring.axis in manual:
        return ring.share(kind, problem)
    return ring.divided(kind, mesh, problem)


def _alike(problem: Problem) -> set[str]:
    """The operands that are the same for all tokens."""
    return set() if problem.weighted else {"b", "db"}


def _axis(name: str | None, mesh: AbstractMesh) -> str:
    if name is None and len(mesh.axis_names) == 1:
        return mesh.axis_names[0]
    if name is None or name not in mesh.axis_names:
        known = " or ".join(repr(f"ring:{axis}") for axis in mesh.axis_names)
        raise ValueError(
            f"the ring goes along one axis of the mesh, one of {mesh.axis_names}, got {name!r}: "
            f"name it by backend={known}."
        )
    return name


def _sum_of(kind: type[Operands]) -> Callable[[Results, Results], Results]:
    if kind is Forward:
        return _merged
    return lambda one, other: tuple(a + b for a, b in zip(one, other, strict=True))


def _merged(one: Results, other: Results) -> Results:
    """(mean, lse) of the union of two sets of keys."""
    lse = jnp.logaddexp(one[1], other[1])
    share = lambda part: jnp.exp(part - vanishing(lse))[..., None]
    return share(one[1]) * one[0] + share(other[1]) * other[0], lse


# ------------------------------------------------------------------ zigzag order


def _causal_parts(
    run: Callable, operands: Operands, problem: Problem, earlier: Bool[Array, ""]
) -> Results:
    """What the keys of another device add; it has earlier early pieces, or else earlier late ones.

    Early queries see its early keys in the first case, late queries its late keys in the second,
    and late queries its early keys in both.
    """
    kind, batch = type(operands), operands.scale.ndim

    def pairs(name: str, a: Array) -> Array:
        if not OPERANDS[name]:
            return jnp.broadcast_to(a[None], (2, *a.shape))
        early, late = jnp.split(a, 2, axis=batch)
        always = late if OPERANDS[name][0] == "m" else early
        return jnp.stack([always, jnp.where(earlier, early, late)])

    two = kind(*(pairs(name, a) for name, a in operands._asdict().items()))
    parts = run(two, dataclasses.replace(problem, band=(None, None)))

    def placed(early: Bool[Array, ""] | bool, part: Array, nothing: float) -> Array:
        blank = jnp.full_like(part, nothing)
        pieces = jnp.where(early, part, blank), jnp.where(early, blank, part)
        return jnp.concatenate(pieces, axis=batch)

    outs = list(zip(parts, RESULTS[kind], NOTHING[kind], strict=True))
    always = tuple(placed(axes[0] == "n", a[0], nothing) for a, axes, nothing in outs)
    either = tuple(placed(earlier, a[1], nothing) for a, _, nothing in outs)
    return _sum_of(kind)(always, either)


def _homes(size: int, parity: int) -> list[tuple[int, int]]:
    """(from, to) of the first or second pieces 2 r + parity of all devices."""
    piece = lambda device: 2 * device + parity
    return [(r, min(piece(r), 2 * size - 1 - piece(r))) for r in range(size)]


def _to_zigzag(axis: str, batch: int, a: Array) -> Array:
    """The pieces 2 r and 2 r + 1 of device r against its pieces r and 2 N - 1 - r.

    The pieces of even number are in one exchange and those of odd number in another, and a device
    gets one of each.
    """
    size, even = jax.lax.axis_size(axis), jax.lax.axis_index(axis) % 2 == 0
    sent = [
        jax.lax.ppermute(piece, axis, _homes(size, parity))
        for parity, piece in enumerate(jnp.split(a, 2, axis=batch))
    ]
    return _swapped_unless(even, sent, batch)


def _from_zigzag(axis: str, batch: int, a: Array) -> Array:
    """The inverse."""
    size, even = jax.lax.axis_size(axis), jax.lax.axis_index(axis) % 2 == 0
    pieces = jnp.split(_swapped_unless(even, jnp.split(a, 2, axis=batch), batch), 2, axis=batch)
    back = [
        jax.lax.ppermute(piece, axis, [(to, at) for at, to in _homes(size, parity)])
        for parity, piece in enumerate(pieces)
    ]
    return jnp.concatenate(back, axis=batch)


def _swapped_unless(kept: Bool[Array, ""], pieces: Sequence[Array], batch: int) -> Array:
    one, other = pieces
    either = jnp.where(kept, one, other), jnp.where(kept, other, one)
    return jnp.concatenate(either, axis=batch)
