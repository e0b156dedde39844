"""How the functions are divided among devices, when XLA partitions a program.

Without a rule XLA gathers all operands of a kernel onto each device. Two kinds of axes divide:
batch axes always, and the queries where each sees all keys. Keys, values and channels stay whole
on a device (keys that are divided are the ring's work). Each device then runs its share as one
device would. Sums over queries, the cotangents of keys, values and log-weights, are added up.
"""

from collections.abc import Callable, Sequence

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.sharding import NamedSharding, PartitionSpec

from .base import Cotangent, Forward, Operands, Tangent

# The axes of operands and results after those of the batch: m queries, n keys, p and r channels.
OPERANDS = {
    **{"q": "mp", "k": "np", "v": "nr", "b": "n", "scale": "", "mean": "mr", "lse": "m"},
    **{"du": "mp", "dk": "np", "dv": "nr", "db": "n", "g": "mr", "h": "m"},
}
RESULTS = {Forward: ("mr", "m"), Tangent: ("mr", "m"), Cotangent: ("mp", "np", "nr", "n")}


def divided(primitive: Primitive, kind: type[Operands], run: Callable, batch: int, params: dict):
    """`run(*operands)`, which on several devices binds the primitive to each one's share.

    `batch` is the number of batch axes.
    """
    leading = tuple(f"b{i}" for i in range(batch))
    inputs = [(*leading, *OPERANDS[name]) for name in kind._fields]
    outputs = [(*leading, *axes) for axes in RESULTS[kind]]
    banded = params["problem"].band != (None, None)
    whole = "mpnr" if banded else "pnr"  # in the order in which they occur

    def partition(mesh, operands, results):
        shared = _mesh_axes(
            [*zip(inputs, operands, strict=True), *zip(outputs, results, strict=True)], whole
        )
        place = lambda axes: NamedSharding(mesh, PartitionSpec(*(shared.get(a) for a in axes)))

        def share(*operands):
            outs = primitive.bind(*operands, **params)
            if (queries := shared.get("m")) is None:
                return outs
            return [
                out if "m" in axes else jax.lax.psum(out, queries)
                for out, axes in zip(outs, outputs, strict=True)
            ]

        return mesh, share, [place(axes) for axes in outputs], tuple(map(place, inputs))

    notation = lambda sides: ", ".join(" ".join(axes) for axes in sides)
    call = custom_partitioning(lambda *operands: list(run(*operands)))
    call.def_partition(
        partition=partition,
        sharding_rule=f"{notation(inputs)} -> {notation(outputs)}",
        need_replication_factors=tuple(whole),
    )
    return call


def _mesh_axes(placed: Sequence, whole: str) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh that divide each axis of the operands, by the first that says so."""
    found, taken = {}, set()
    for axes, array in placed:
        for axis, names in zip(axes, array.sharding.spec, strict=False):
            names = (names,) if isinstance(names, str) else tuple(names or ())
            if names and axis not in whole and axis not in found and not taken & {*names}:
                found[axis] = names
                taken |= {*names}
    return found
