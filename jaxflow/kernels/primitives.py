"""The three functions of base.py as primitives of JAX, differentiable in both modes.

Why primitives: a fused kernel has no transpose rule, and `jax.custom_vjp` forbids forward mode,
which divergences, Lyapunov exponents and implicit solvers need. tangent and cotangent are linear in
their last operands and are each other's transpose, so

    jvp(forward) = tangent,  transpose(tangent) = cotangent,  transpose(cotangent) = tangent,
    jvp(tangent) = tangent of the linear part + jvp of the portable code in the residuals.

The last line makes derivatives of second and higher order fall back on differentiable, blocked
JAX code. Taking du = d(scale q) outside leaves the derivative in `scale` to JAX's own rules, also
at scale = 0.

Parameters: `problem`, and `backend`, a name in the registry or None for the best of the platform
that the program is compiled for.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .base import Cotangent, Forward, Operands, Problem, Results, Tangent, evaluate
from .blocked import Blocked
from .partition import WITHOUT_RULES, by_rule, by_size, dividing_mesh
from .reference import Reference
from .registry import Selected, default_platform, load
from .ring import Ring, around_ring

forward_p = Primitive("jaxflow_expectation")
tangent_p = Primitive("jaxflow_expectation_tangent")
cotangent_p = Primitive("jaxflow_expectation_cotangent")

RESIDUALS = Tangent._fields.index("du")  # operands before the linear ones


def _run(
    kind: type[Operands], platform: str, *args, problem: Problem, backend: str | None
) -> Results:
    """One of the three functions, by the backend that the platform selects."""
    return evaluate(Selected(platform, backend), kind(*args), problem)


def _lowering(kind: type[Operands], platform: str):
    """The rule that compiles a function for a platform, and divides it where XLA divides."""

    def rule(ctx, *args, problem: Problem, backend: str | None):
        run = partial(_run, kind, platform, problem=problem, backend=backend)
        ring = None if backend is None else load(backend, platform)
        if isinstance(ring, Ring):
            run = around_ring(ctx, ring, kind, problem)
        elif (mesh := dividing_mesh(ctx)) is not None:
            if platform in WITHOUT_RULES:
                run = by_size(run, kind, mesh, problem)
            else:
                scale = ctx.avals_in[kind._fields.index("scale")]
                run = by_rule(run, kind, scale.ndim, problem)
        return mlir.lower_fun(lambda *args: run(*args), multiple_results=True)(ctx, *args)

    return rule


# ------------------------------------------------------------------ shapes


def _forward_avals(q, k, v, b, scale, **params):
    return [
        q.update(shape=(*q.shape[:-1], v.shape[-1]), dtype=v.dtype),
        q.update(shape=q.shape[:-1], dtype=b.dtype),
    ]


def _tangent_avals(q, k, v, b, scale, *rest, **params):
    return _forward_avals(q, k, v, b, scale, **params)


def _cotangent_avals(q, k, v, b, *rest, **params):
    return [q.update(dtype=b.dtype), k, v, b]


# ------------------------------------------------------------------ derivatives


def _forward_jvp(primals, tangents, **params):
    q, _, _, b, scale = primals
    dq, dk, dv, db, dscale = tangents
    mean, lse = forward_p.bind(*primals, **params)
    du = jnp.zeros(q.shape, b.dtype)
    if not isinstance(dq, ad.Zero):
        du = du + scale[..., None, None] * dq.astype(b.dtype)
    if not isinstance(dscale, ad.Zero):
        du = du + dscale[..., None, None] * q.astype(b.dtype)
    linear = du, *map(ad.instantiate_zeros, (dk, dv, db))
    return (mean, lse), tangent_p.bind(*primals, mean, lse, *linear, **params)


def _linear_jvp(primitive: Primitive, kind: type[Operands], primals, tangents, **params):
    """The jvp of a primitive f(residuals; linear)."""
    problem, name = params["problem"], params["backend"]
    residuals, linear = primals[:RESIDUALS], primals[RESIDUALS:]
    dresiduals, dlinear = tangents[:RESIDUALS], tangents[RESIDUALS:]
    outs = primitive.bind(*primals, **params)
    parts = []
    if not all(isinstance(t, ad.Zero) for t in dlinear):
        dlinear = map(ad.instantiate_zeros, dlinear)
        parts.append(primitive.bind(*residuals, *dlinear, **params))
    if not all(isinstance(t, ad.Zero) for t in dresiduals):
        dresiduals = tuple(map(ad.instantiate_zeros, dresiduals))
        portable = Reference() if name == "reference" else Blocked(unrolled=True)
        fn = lambda *residuals: evaluate(portable, kind(*residuals, *linear), problem)
        parts.append(jax.jvp(fn, residuals, dresiduals)[1])
    if not parts:
        zero = ad.Zero.from_primal_value  # pyright: ignore[reportAttributeAccessIssue]
        return outs, [zero(o) for o in outs]
    return outs, [sum(p[1:], p[0]) for p in zip(*parts, strict=True)]


def _tangent_transpose(cotangents, *operands, problem, backend):
    # A log-partition that nothing depends on lets cuDNN in.
    mean_only = isinstance(cotangents[1], ad.Zero)
    problem = dataclasses.replace(problem, mean_only=mean_only)
    return _transpose(cotangent_p, cotangents, operands, problem=problem, backend=backend)


def _cotangent_transpose(cotangents, *operands, **params):
    return _transpose(tangent_p, cotangents, operands, **params)


def _transpose(transposed: Primitive, cotangents, operands, **params):
    """The transpose of a primitive f(residuals; linear) in its linear operands."""
    residuals, linear = operands[:RESIDUALS], operands[RESIDUALS:]
    cotangents = map(ad.instantiate_zeros, cotangents)
    outs = transposed.bind(*residuals, *cotangents, **params)
    outs = [o if ad.is_undefined_primal(x) else None for o, x in zip(outs, linear, strict=True)]
    return [None] * RESIDUALS + outs


# ------------------------------------------------------------------ batches

# The operands with one row a query, where a batch of them alone may be a longer list of queries.
QUERY_OPERANDS = {Forward: {"q"}, Tangent: {"q", "mean", "lse", "du"}, Cotangent: set()}


def _batch(primitive: Primitive, kind: type[Operands], args, dims, **params):
    """Moves the batch axis to the front of all operands, or folds it into the query axis.

    A batch of queries that share keys and see all of them is one longer list of queries: probes
    and Jacobians by forward mode then cost no copy of the keys.
    """
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    batched = {name for name, d in zip(kind._fields, dims, strict=True) if d is not None}
    rows = QUERY_OPERANDS[kind]
    if params["problem"].all_pairs and batched <= rows:
        nbatch = kind(*args).scale.ndim

        def longer(a, dim):
            a = jnp.moveaxis(_to_front(a, dim, size), 0, nbatch)
            return a.reshape((*a.shape[:nbatch], -1, *a.shape[nbatch + 2 :]))

        named = zip(kind._fields, args, dims, strict=True)
        operands = [longer(a, dim) if name in rows else a for name, a, dim in named]
        outs = primitive.bind(*operands, **params)
        outs = [o.reshape((*o.shape[:nbatch], size, -1, *o.shape[nbatch + 1 :])) for o in outs]
        return outs, [nbatch] * len(outs)
    args = [_to_front(a, d, size) for a, d in zip(args, dims, strict=True)]
    outs = primitive.bind(*args, **params)
    return outs, [0] * len(outs)


def _to_front(a, dim, size):
    if dim is None:
        return jnp.broadcast_to(a[None], (size, *a.shape))
    return jnp.moveaxis(a, dim, 0)


# ------------------------------------------------------------------ the primitives


def _define(primitive: Primitive, kind: type[Operands], avals: Callable):
    primitive.multiple_results = True
    run = partial(_run, kind)
    # Outside jit the primitive compiles itself: platforms choose their lowering there.
    bind = lambda *args, **params: primitive.bind(*args, **params)
    compiled = jax.jit(bind, static_argnames=("problem", "backend"))

    def impl(*args, **params):
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return run(default_platform(), *args, **params)
        return compiled(*args, **params)

    primitive.def_impl(impl)
    primitive.def_abstract_eval(avals)
    for platform in (None, "cuda", "tpu"):
        mlir.register_lowering(primitive, _lowering(kind, platform or "cpu"), platform)
    dispatch.prim_requires_devices_during_lowering.add(primitive)
    batching.primitive_batchers[primitive] = partial(_batch, primitive, kind)


_define(forward_p, Forward, _forward_avals)
_define(tangent_p, Tangent, _tangent_avals)
_define(cotangent_p, Cotangent, _cotangent_avals)
ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = partial(_linear_jvp, tangent_p, Tangent)
ad.primitive_jvps[cotangent_p] = partial(_linear_jvp, cotangent_p, Cotangent)
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[cotangent_p] = _cotangent_transpose
