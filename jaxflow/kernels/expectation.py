"""The one operation, differentiable in both modes.

    s_ij = scale <q_i, k_j> + log w_j
    log_partition_i = logsumexp_j s_ij,    mean_i = sum_j exp(s_ij - log_partition_i) v_j

Why three primitives: a fused kernel has no transpose rule, and `jax.custom_vjp` forbids forward
mode, which divergences, Lyapunov exponents and implicit solvers need. With u = scale q,

    forward    (q, k, v, b, scale)                               -> (mean, log_partition)
    tangent    (q, k, v, b, scale, mean, lse; du, dk, dv, db)    -> (dmean, dlog_partition)
    cotangent  (q, k, v, b, scale, mean, lse; g, h)              -> (gu, gk, gv, gb)

tangent and cotangent are linear in what follows the semicolon and are each other's transpose, so

    jvp(forward) = tangent,  transpose(tangent) = cotangent,  transpose(cotangent) = tangent,
    jvp(tangent) = tangent of the linear part + jvp of the portable code in the residuals.

The last line makes derivatives of second and higher order fall back on differentiable, blocked
JAX code. Taking du = d(scale q) outside leaves the derivative in `scale` to JAX's own rules, also
at scale = 0.
"""

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from .._types import ArrayLike, ScalarLike, accumulation_dtype, is_concrete
from . import blocked, reference
from .reference import Band, Problem

BACKENDS = ("reference", "blocked", "pallas_gpu", "pallas_tpu", "cudnn")
# The platform of the backends that have one, and the order in which a platform tries them.
PLATFORMS = {"pallas_gpu": "cuda", "cudnn": "cuda", "pallas_tpu": "tpu"}
PREFERENCE = {"cuda": ("cudnn", "pallas_gpu", "blocked"), "tpu": ("pallas_tpu", "blocked")}
INTERPRET = ":interpret"
MASKED = -1e25  # below it a log weight is -inf: no score would be left of the sum
Window = int | tuple[int, int] | None


def softmax_expectation(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    log_weights: ArrayLike | None = None,
    *,
    scale: ScalarLike = 1.0,
    causal: bool = False,
    window: Window = None,
    backend: str | None = None,
) -> tuple[Float[Array, "m r"], Float[Array, " m"]]:
    """Expectation of the values under the Gibbs law of each query.

        s_ij = scale <q_i, k_j> + log w_j
        log_partition_i = logsumexp_j s_ij,    mean_i = sum_j exp(s_ij - log_partition_i) v_j

    This is softmax attention (Vaswani et al. 2017) with the log-partition kept. It is unbatched:
    `jax.vmap` gives batch and heads. It may be differentiated in both modes and to any order, in
    O((m + n) * block) memory (all backends but "reference").

    **Arguments:**

    - `q`: queries, shape `(m, p)`.
    - `k`: keys, shape `(n, p)`.
    - `v`: values, shape `(n, r)`. Queries, keys and values share one floating-point dtype; float16
      and bfloat16 are accumulated in float32.
    - `log_weights`: shape `(n,)`, added to the scores. `-inf` masks a key, and so does all below
      -1e25, such as the least number of a dtype. `None` is zero.
    - `scale`: a scalar, the inverse temperature beta. It may be traced.
    - `causal`: query i sees the keys j <= i. Both are counted from the first (so m != n aligns
      at the top left, as in `jax.nn.dot_product_attention`).
    - `window`: `(left, right)`: query i sees the keys i - left <= j <= i + right. An integer w is
      `(w, w)`, as `local_window_size` in `jax.nn.dot_product_attention`.
    - `backend`: a name in `jaxflow.kernels.BACKENDS`, or `None` for the best on the platform that
      the program is compiled for (see [`jaxflow.kernels.select_backend`][]). A Pallas backend
      with ":interpret" behind its name runs anywhere, slowly, in Pallas's interpreter.

    **Returns:**

    `(mean, log_partition)`, shapes `(m, r)` and `(m,)`. The mean has the dtype of `v`, the
    log-partition is float64 for float64 operands and float32 for all others. A query without a
    visible key has mean 0 and log-partition -inf.

    **Raises:**

    `ValueError` for wrong shapes, windows or an unknown backend, `TypeError` for wrong dtypes,
    `NotImplementedError` with the reason where a backend asked for by name cannot do it.
    """
    q, k, v, b = _operands(q, k, v, log_weights)
    problem = _problem(q, log_weights, scale, causal, window)
    scale = _scale(scale, b.dtype)
    if backend is not None:
        _check_backend(backend, q, k, v, problem)
    if backend == "reference":
        return reference.forward(q, k, v, b, scale, band=problem.band)
    operands = q, k, v, b, scale
    mean, log_partition = forward_p.bind(*operands, problem=problem, backend=backend)
    return mean, log_partition


def select_backend(
    q: ArrayLike | jax.ShapeDtypeStruct,
    k: ArrayLike | jax.ShapeDtypeStruct,
    v: ArrayLike | jax.ShapeDtypeStruct,
    log_weights: ArrayLike | jax.ShapeDtypeStruct | None = None,
    *,
    scale: ScalarLike = 1.0,
    causal: bool = False,
    window: Window = None,
    backend: str | None = None,
    platform: str | None = None,
    mode: str = "forward",
) -> str:
    """The name of the backend that `softmax_expectation` runs for these operands.

    **Arguments:** as [`jaxflow.softmax_expectation`][] (only shapes and dtypes matter; leading
    axes are a batch), and

    - `platform`: "cpu", "cuda" or "tpu"; JAX's default platform if `None`.
    - `mode`: "forward", or a derivative's kernel: "tangent" or "cotangent".

    **Raises:** `ValueError` for an unknown backend, `NotImplementedError` with the reason where
    the backend asked for by name cannot run on the platform or on these operands.
    """
    if platform is None:
        platform = _default_platform()
    q, k, v = (jnp.asarray(a) if isinstance(a, list | tuple) else a for a in (q, k, v))
    problem = _problem(q, log_weights, scale, causal, window)
    if backend is not None:
        _check_backend(backend, q, k, v, problem)
    return _select(mode, platform, q, k, v, problem, backend)


def _problem(q, log_weights, scale, causal, window) -> Problem:
    # Each constant is a program of its own, so it is one only where cuDNN can take it.
    constant = isinstance(scale, int | float | np.number) and jnp.dtype(q.dtype).itemsize == 2
    scale = float(scale) if constant else None
    return Problem(band(causal, window), log_weights is not None, scale)


def _select(mode: str, platform: str, q, k, v, problem: Problem, backend: str | None) -> str:
    if backend is None:
        names = PREFERENCE.get(platform, ("blocked",))
        return next(name for name in names if _refusal(name, mode, q, k, v, problem) is None)
    home = PLATFORMS.get(backend, platform)
    if home != platform:
        interpreted = f", or {backend + INTERPRET!r} for a slow run" * backend.startswith("pallas")
        raise NotImplementedError(
            f"the backend {backend!r} runs on {home}, and this program is compiled for {platform}. "
            f"Leave backend None to take the best for the platform{interpreted}."
        )
    return backend


def _check_backend(backend: str, q, k, v, problem: Problem):
    """Whether a backend asked for by name can run these operands on its platform."""
    name = backend.removesuffix(INTERPRET)
    interpret = name != backend
    if name not in BACKENDS or (interpret and not name.startswith("pallas")):
        raise ValueError(
            f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}. "
            "Leave it None to take the best for the platform."
        )
    for mode in () if interpret else ("forward", "tangent", "cotangent"):
        reason = _refusal(name, mode, q, k, v, problem)
        if reason is not None:
            raise NotImplementedError(
                f"the backend {name!r} cannot do this ({mode}): {reason}. "
                "Leave backend None to take one that can."
            )


def _refusal(name: str, mode: str, q, k, v, problem: Problem) -> str | None:
    """Why a backend cannot run these operands; None if it can."""
    if name in ("reference", "blocked"):
        return None
    return _module(name).refusal(mode, q, k, v, problem)


def _module(name: str) -> ModuleType:
    """The backend's module; Pallas takes long to import, so only those in use are."""
    return importlib.import_module(f".{name}", __package__)


def _default_platform() -> str:
    platform = jax.default_backend()
    return "cuda" if platform == "gpu" else platform


# ------------------------------------------------------------------ checks


def _operands(q, k, v, log_weights):
    arrays = {"q": jnp.asarray(q), "k": jnp.asarray(k), "v": jnp.asarray(v)}
    for name, a in arrays.items():
        if a.ndim != 2:
            raise ValueError(
                f"{name} must have two axes, (tokens, channels); got shape {a.shape}. "
                "Batch and head axes go through jax.vmap."
            )
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {a.dtype}. Cast it first.")
        if 0 in a.shape:
            raise ValueError(f"{name} must not be empty, got shape {a.shape}.")
    q, k, v = arrays.values()
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}. "
            "Cast them to one dtype first."
        )
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"queries and keys must have the same dimension, got q {q.shape} and k {k.shape}."
        )
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"keys and values must pair up, got k {k.shape} and v {v.shape}.")
    dtype = accumulation_dtype(q.dtype)
    if log_weights is None:
        return q, k, v, jnp.zeros(k.shape[0], dtype)
    b = jnp.asarray(log_weights)
    if b.shape != k.shape[:1]:
        raise ValueError(
            f"log_weights must have one entry a key, shape {k.shape[:1]}; got {b.shape}."
        )
    if not jnp.issubdtype(b.dtype, jnp.floating):
        raise TypeError(
            f"log_weights must be floating point, got {b.dtype}. "
            "A Boolean mask becomes jnp.where(mask, 0.0, -jnp.inf)."
        )
    b = b.astype(dtype)
    return q, k, v, jnp.where(b < MASKED, -jnp.inf, b)


def _scale(scale, dtype):
    scale = jnp.asarray(scale)
    if scale.shape != ():
        raise ValueError(
            f"scale must be a scalar, got shape {scale.shape}. One scale a head goes through "
            "jax.vmap."
        )
    if is_concrete(scale) and not np.isfinite(scale):
        raise ValueError(f"scale (the inverse temperature) must be finite, got {scale}.")
    return scale.astype(dtype)


def band(causal, window) -> Band:
    left = right = None
    if window is not None:
        pair = window if isinstance(window, tuple) else (window, window)
        if len(pair) != 2 or not all(isinstance(w, int) and w >= 0 for w in pair):
            raise ValueError(
                "window must be a non-negative integer or a pair of them, the keys seen to the "
                f"left and to the right of the query; got {window!r}."
            )
        left, right = pair
    return left, 0 if causal else right


# ------------------------------------------------------------------ the primitives

forward_p = Primitive("jaxflow_expectation")
tangent_p = Primitive("jaxflow_expectation_tangent")
cotangent_p = Primitive("jaxflow_expectation_cotangent")

RESIDUALS = 7  # q, k, v, b, scale, mean, lse
# The operands with one row a query, per primitive; the others have one row a key, or none.
ROW_OPERANDS = {forward_p: {0}, tangent_p: {0, 5, 6, 7}}


def _forward_avals(q, k, v, b, scale, **params):
    return [
        q.update(shape=(*q.shape[:-1], v.shape[-1]), dtype=v.dtype),
        q.update(shape=q.shape[:-1], dtype=b.dtype),
    ]


def _tangent_avals(q, k, v, b, scale, *rest, **params):
    return _forward_avals(q, k, v, b, scale, **params)


def _cotangent_avals(q, k, v, b, *rest, **params):
    return [q.update(dtype=b.dtype), k, v, b]


def _forward_jvp(primals, tangents, **params):
    q, k, v, b, scale = primals
    dq, dk, dv, db, dscale = tangents
    mean, lse = forward_p.bind(*primals, **params)
    du = jnp.zeros(q.shape, b.dtype)
    if not isinstance(dq, ad.Zero):
        du = du + scale[..., None, None] * dq.astype(b.dtype)
    if not isinstance(dscale, ad.Zero):
        du = du + dscale[..., None, None] * q.astype(b.dtype)
    linear = du, *map(ad.instantiate_zeros, (dk, dv, db))
    return (mean, lse), tangent_p.bind(*primals, mean, lse, *linear, **params)


def _linear_jvp(primitive: Primitive, portable: Callable):
    """The jvp of a primitive f(residuals; linear)."""

    def rule(primals, tangents, **params):
        band = params["problem"].band
        residuals, linear = primals[:RESIDUALS], primals[RESIDUALS:]
        dresiduals, dlinear = tangents[:RESIDUALS], tangents[RESIDUALS:]
        outs = primitive.bind(*primals, **params)
        parts = []
        if not all(isinstance(t, ad.Zero) for t in dlinear):
            dlinear = map(ad.instantiate_zeros, dlinear)
            parts.append(primitive.bind(*residuals, *dlinear, **params))
        if not all(isinstance(t, ad.Zero) for t in dresiduals):
            dresiduals = tuple(map(ad.instantiate_zeros, dresiduals))
            fn = lambda *residuals: tuple(portable(*residuals, *linear, band=band, unrolled=True))
            parts.append(jax.jvp(fn, residuals, dresiduals)[1])
        if not parts:
            zero = ad.Zero.from_primal_value  # pyright: ignore[reportAttributeAccessIssue]
            return outs, [zero(o) for o in outs]
        return outs, [sum(p[1:], p[0]) for p in zip(*parts, strict=True)]

    return rule


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


def _batch(primitive: Primitive, args, dims, **params):
    """Moves the batch axis to the front of all operands, or folds it into the query axis.

    A batch of queries that share keys and see all of them is one longer list of queries: probes
    and Jacobians by forward mode then cost no copy of the keys.
    """
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    batched = {i for i, d in enumerate(dims) if d is not None}
    rows = ROW_OPERANDS.get(primitive, set())
    if params["problem"].band == (None, None) and batched <= rows:
        nbatch = args[4].ndim
        args = list(args)
        for i in rows:
            a = _to_front(args[i], dims[i], size)
            a = jnp.moveaxis(a, 0, nbatch)
            args[i] = a.reshape((*a.shape[:nbatch], -1, *a.shape[nbatch + 2 :]))
        outs = primitive.bind(*args, **params)
        outs = [o.reshape((*o.shape[:nbatch], size, -1, *o.shape[nbatch + 1 :])) for o in outs]
        return outs, [nbatch] * len(outs)
    args = [_to_front(a, d, size) for a, d in zip(args, dims, strict=True)]
    outs = primitive.bind(*args, **params)
    return outs, [0] * len(outs)


def _to_front(a, dim, size):
    if dim is None:
        return jnp.broadcast_to(a[None], (size, *a.shape))
    return jnp.moveaxis(a, dim, 0)


def _run(mode: str, platform: str, *operands, problem: Problem, backend: str | None):
    """One of the three functions, by the backend that the platform selects."""
    if backend is not None and backend.endswith(INTERPRET):
        module = _module(backend.removesuffix(INTERPRET))
        return getattr(module, mode)(*operands, problem=problem, interpret=True)
    q, k, v, *_ = operands
    name = _select(mode, platform, q, k, v, problem, backend)
    if name == "blocked":
        return getattr(blocked, mode)(*operands, band=problem.band)
    return getattr(_module(name), mode)(*operands, problem=problem)


def _define(mode: str, primitive: Primitive, avals: Callable):
    primitive.multiple_results = True
    # Outside jit the primitive compiles itself: platforms choose their lowering there.
    bind = lambda *args, **params: primitive.bind(*args, **params)
    compiled = jax.jit(bind, static_argnames=("problem", "backend"))

    def evaluate(*args, **params):
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return _run(mode, _default_platform(), *args, **params)
        return compiled(*args, **params)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(avals)
    for platform in (None, "cuda", "tpu"):
        run = partial(_run, mode, platform or "cpu")
        mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True), platform)
    batching.primitive_batchers[primitive] = partial(_batch, primitive)


_define("forward", forward_p, _forward_avals)
_define("tangent", tangent_p, _tangent_avals)
_define("cotangent", cotangent_p, _cotangent_avals)
ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _linear_jvp(tangent_p, blocked.tangent)
ad.primitive_jvps[cotangent_p] = _linear_jvp(cotangent_p, blocked.cotangent)
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[cotangent_p] = _cotangent_transpose
