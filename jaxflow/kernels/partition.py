"""How the functions are divided among devices, when XLA partitions a program.

Without a rule XLA gathers all operands of a kernel onto each device. Two kinds of axes divide:
batch axes always, and the queries where each sees all keys. Keys, values and channels stay whole
on a device (keys that are divided are the ring's work). Each device then runs its share as one
device would. Sums over queries, the cotangents of keys, values and log-weights, are added up.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .base import Cotangent, Forward, Operands, Problem, Results, Tangent

# The axes of operands and results after those of the batch: m queries, n keys, p and r channels.
OPERANDS = {
    **{"q": "mp", "k": "np", "v": "nr", "b": "n", "scale": "", "mean": "mr", "lse": "m"},
    **{"du": "mp", "dk": "np", "dv": "nr", "db": "n", "g": "mr", "h": "m"},
}
RESULTS = {Forward: ("mr", "m"), Tangent: ("mr", "m"), Cotangent: ("mp", "np", "nr", "n")}
# Where JAX does not hand a rule of ours to the compiler: github.com/jax-ml/jax/issues/38196.
WITHOUT_RULES = ("tpu",)

# The axes of the mesh that divide an axis of the operands.
Shared = dict[str, tuple[str, ...]]


def dividing_mesh(ctx):
    """The mesh over which XLA divides the program that is being lowered, or None.

    None is also where `jax.shard_map` has divided a part of the axes: over the others XLA does what
    it does with an operation without a rule.
    """
    context = ctx.module_context.axis_context
    if getattr(context, "num_devices", None) in (None, 1):
        return None
    return context.abstract_mesh


def with_automatic_axes(run: Callable, operands: Forward) -> Results:
    """`run` of the operands; where the axes of their mesh are explicit, which is how
    `jax.make_mesh` makes them, they are automatic within, and rows of the results are divided as
    the queries are.
    """
    placed = [getattr(jax.typeof(a), "sharding", None) for a in operands]
    meshes = [s.mesh.abstract_mesh for s in placed if isinstance(s, NamedSharding)]
    explicit = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
    if not explicit:
        return run(*operands)
    (mesh, *_), rows = explicit, jax.typeof(operands.q).sharding.spec[:-1]
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    within = jax.sharding.auto_axes(
        run,
        axes=tuple(name for name, kind in kinds if kind == AxisType.Explicit),
        out_sharding=(PartitionSpec(*rows, None), PartitionSpec(*rows)),
    )

    def call(*operands):
        with jax.sharding.use_abstract_mesh(mesh):
            return within(*operands)

    return jax.jit(call)(*operands)


def by_rule(run: Callable, kind: type[Operands], batch: int, problem: Problem) -> Callable:
    """`run` on each device's share, as XLA finds the operands divided.

    `batch` is the number of batch axes.
    """
    inputs, outputs = axes_of(kind, batch)
    whole = "pnr" if problem.all_pairs else "mpnr"  # in the order in which they occur

    def partition(mesh, operands, results):
        placed = zip((*inputs, *outputs), (*operands, *results), strict=True)
        shared = _as_placed(placed, whole)
        place = lambda axes: NamedSharding(mesh, spec(axes, shared))
        share = _share(run, outputs, shared)
        return mesh, share, [place(axes) for axes in outputs], tuple(map(place, inputs))

    notation = lambda sides: ", ".join(" ".join(axes) for axes in sides)
    call = custom_partitioning(lambda *operands: list(run(*operands)))
    call.def_partition(
        partition=partition,
        sharding_rule=f"{notation(inputs)} -> {notation(outputs)}",
        need_replication_factors=tuple(whole),
    )
    return call


def by_size(run: Callable, kind: type[Operands], mesh, problem: Problem) -> Callable:
    """`run` on each device's share, where XLA takes no rule: as many axes of the mesh as divide
    the batch, and then the queries, go to them. What is placed otherwise is moved before."""

    def call(*operands):
        named = kind(*operands)
        inputs, outputs = axes_of(kind, named.scale.ndim)
        divisible = [*inputs[0][:-2], *("m" if problem.all_pairs else "")]
        shared = by_length(divisible, named.q.shape, mesh.shape)
        return jax.shard_map(
            _share(run, outputs, shared),
            mesh=mesh,
            in_specs=tuple(spec(axes, shared) for axes in inputs),
            out_specs=[spec(axes, shared) for axes in outputs],
            check_vma=False,
        )(*operands)

    return call


def by_length(axes: Sequence[str], lengths: Sequence[int], mesh: Mapping[str, int]) -> Shared:
    """As many axes of the mesh (name -> size) as divide the length of an axis go to it, and those
    that are left to the next."""
    shared, left = {}, dict(mesh)
    for axis, length in zip(axes, lengths, strict=False):
        taken: list[str] = []
        for name, size in left.items():
            if length % (math.prod(left[n] for n in taken) * size) == 0:
                taken.append(name)
        left = {name: size for name, size in left.items() if name not in taken}
        shared[axis] = tuple(taken)
    return shared


def axes_of(
    kind: type[Operands], batch: int
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The names of the axes of each operand and of each result."""
    leading = tuple(f"b{i}" for i in range(batch))
    inputs = [(*leading, *OPERANDS[name]) for name in kind._fields]
    return inputs, [(*leading, *axes) for axes in RESULTS[kind]]


def spec(axes: Sequence[str], shared: Shared) -> PartitionSpec:
    return PartitionSpec(*(shared.get(axis) or None for axis in axes))


def _share(run: Callable, outputs: Sequence[Sequence[str]], shared: Shared) -> Callable:
    """What one device does."""
    queries = shared.get("m")

    def share(*operands) -> list:
        outs: Results = run(*operands)
        add_up = lambda out, axes: out if "m" in axes else jax.lax.psum(out, queries)
        return [add_up(*one) if queries else one[0] for one in zip(outs, outputs, strict=True)]

    return share


def _as_placed(placed, whole: str) -> Shared:
    """By the first operand or result that says so."""
    shared, taken = {}, set()
    for axes, array in placed:
        for axis, names in zip(axes, array.sharding.spec, strict=False):
            names = (names,) if isinstance(names, str) else tuple(names or ())
            if names and axis not in whole and axis not in shared and not taken & {*names}:
                shared[axis] = names
                taken |= {*names}
    return shared
