"""The one operation, and the checks of its arguments.

    s_ij = scale <q_i, k_j> + log w_j
    log_partition_i = logsumexp_j s_ij,    mean_i = sum_j exp(s_ij - log_partition_i) v_j

base.py says what a backend computes, registry.py which backend runs, primitives.py how the
operation is differentiated, batched and compiled.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._types import (
    ArrayLike,
    ScalarLike,
    accumulation_dtype,
    is_concrete,
    on_automatic_mesh,
)
from ..masks import AbstractMask, AbstractPattern, Hierarchical, TopK, is_mask
from ..masks import check as check_mask
from .base import MASKED, MODES, Forward, Mode, Problem, Shapes, Window, band
from .hierarchy import Levels, groups
from .partition import with_automatic_axes
from .primitives import forward_p
from .registry import (
    Candidate,
    candidates,
    check_named,
    choose,
    default_platform,
    kernel_of,
)

# By the names that programs are compiled for; "gpu" is JAX's own word for CUDA's.
PLATFORMS = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "rocm": "rocm", "tpu": "tpu"}
Described = ArrayLike | jax.ShapeDtypeStruct


def softmax_expectation(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    log_weights: ArrayLike | None = None,
    *,
    scale: ScalarLike = 1.0,
    causal: bool = False,
    window: Window = None,
    mask: AbstractMask | None = None,
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
    - `mask`: which of these keys a query sees, an object of `jaxflow.masks` such as
      `jaxflow.masks.Blocks(64)`. Indices of queries and keys are counted from the first.
    - `backend`: a name in `jaxflow.kernels.BACKENDS`, or `None` for the best on the platform that
      the program is compiled for, of those that are proved on its device (see
      `jaxflow.kernels.select_backend`). "pruned:1e-4" asks only for the pairs that matter, to
      that tolerance of means (relative to the largest value) and log-partitions, and pays where
      tokens have clustered (`jaxflow.kernels.pruning` counts the pairs); it is never chosen
      unasked. "ring:tokens" is for tokens that are divided among devices along the axis "tokens" of
      a mesh: keys and values travel from device to device, and none holds all of them ("ring" where
      the mesh has one axis; "ring:tokens:pallas_gpu" names what runs on each device). Second and
      higher derivatives gather the keys. A Pallas backend with ":interpret" behind its name runs
      anywhere, slowly, in Pallas's interpreter.

    **Returns:**

    `(mean, log_partition)`, shapes `(m, r)` and `(m,)`. The mean has the dtype of `v`, the
    log-partition is float64 for float64 operands and float32 for all others. A query without a
    visible key has mean 0 and log-partition -inf.

    **Raises:**

    - `ValueError` for wrong shapes, an empty array, a window that is no distance, a mask that is
      not for so many tokens and an unknown backend; also for a scale that is not finite and for
      log-weights that are NaN or +inf, unless they are traced: then NaN comes out.
    - `TypeError` for wrong dtypes, and for what is no array, number, Boolean or name.
    - `NotImplementedError` with the reason where a backend asked for by name cannot do it.

    **Example:**

    ```python
    import jax.numpy as jnp
    import jaxflow as jf

    q, k, v = jnp.array([[0.0]]), jnp.array([[1.0], [2.0]]), jnp.array([[0.0], [4.0]])
    mean, log_partition = jf.softmax_expectation(q, k, v)
    # The query 0 weighs both keys alike: their mean value, and log 2.
    assert mean == 2.0 and jnp.allclose(log_partition, jnp.log(2.0))
    ```
    """
    shapes = Shapes(_array("q", q), _array("k", k), _array("v", v))
    b = None if log_weights is None else _array("log_weights", log_weights)
    _check(shapes, b, batched=False)
    dtype = accumulation_dtype(shapes.q.dtype)
    scale = _scale(scale, dtype)
    problem = _problem(shapes, b, scale, causal, window, mask)
    if backend is not None:
        check_named(backend, shapes, problem)
    b = jnp.zeros(len(shapes.k), dtype) if b is None else _log_weights(b, dtype)
    if isinstance(problem.mask, Levels):
        k, v, b = groups(shapes.k, shapes.v, b, len(problem.mask.lengths))
        shapes = Shapes(shapes.q, k, v)
    operands = Forward(*shapes, b, jnp.asarray(scale, dtype))
    mean, log_partition = with_automatic_axes(
        lambda *o: tuple(forward_p.bind(*o, problem=problem, backend=backend)), operands
    )
    return mean, log_partition


def select_backend(
    q: Described,
    k: Described,
    v: Described,
    log_weights: Described | None = None,
    *,
    scale: ScalarLike = 1.0,
    causal: bool = False,
    window: Window = None,
    mask: AbstractMask | None = None,
    backend: str | None = None,
    platform: str | None = None,
    mode: str = "forward",
) -> str:
    """The name of the backend that `softmax_expectation` runs for these operands.

    Without a name, it is the first of the platform that can, and whose kernel is proved on the
    device: it passed `jaxflow info --check` there with these versions, or in a record that came
    with the package, on this kind of device. Until then cuDNN's attention runs for 16 bits where it
    can, "blocked" for all else, and a warning says so once. A kernel that failed the check never
    runs, also by name; one that was not checked runs by name. The environment variable
    JAXFLOW_KERNELS=all (default: proved) takes all kernels, proved or not: also for programs that
    are lowered for a device that is not at hand. Elsewhere, as on a CPU, "reference" runs on a
    batch of few pairs of queries and keys, 96 x 96 of a system and 2^20 of all, and "blocked" else:
    `jaxflow.kernels.explain_backend` says which, and why.

    **Arguments:** as `jaxflow.softmax_expectation` (only shapes and dtypes matter; leading
    axes are a batch), and

    - `platform`: "cpu", "cuda" (or "gpu"), "rocm" or "tpu"; JAX's default platform if `None`.
    - `mode`: "forward", or a derivative's kernel: "tangent" or "cotangent".

    **Returns:** a name in `jaxflow.kernels.BACKENDS`, or the one asked for.

    **Raises:** `ValueError` for an unknown backend, platform or mode and for wrong shapes,
    `TypeError` for wrong dtypes, `NotImplementedError` with the reason where the backend asked for
    by name cannot run on the platform or on these operands.

    **Example:**

    ```python
    import jax.numpy as jnp
    import jaxflow as jf

    x = jnp.zeros((512, 3))
    assert jf.select_backend(x, x, x, platform="cpu") == "blocked"
    batch = jnp.zeros((8, 64, 3))
    assert jf.select_backend(batch, batch, batch, platform="cpu") == "reference"
    ```
    """
    shapes, problem = _described(q, k, v, log_weights, scale, causal, window, mask)
    return _select(shapes, problem, backend, platform, mode)


def describe_backend(
    q: Described,
    k: Described,
    v: Described,
    log_weights: Described | None = None,
    *,
    scale: ScalarLike = 1.0,
    causal: bool = False,
    window: Window = None,
    mask: AbstractMask | None = None,
    backend: str | None = None,
    platform: str | None = None,
    mode: str = "forward",
) -> str:
    """The backend that runs, and in brackets its kernels: "pallas_gpu (particles)".

    **Arguments:** as in `jaxflow.kernels.select_backend`.

    **Returns:** a text, the name of the backend first.

    **Raises:** as `jaxflow.kernels.select_backend`.

    ```python
    >>> x = jnp.zeros((64, 3))
    >>> jaxflow.kernels.describe_backend(x, x, x, platform="cpu")
    'blocked (blocks of rows in XLA)'

    ```
    """
    shapes, problem = _described(q, k, v, log_weights, scale, causal, window, mask)
    name = _select(shapes, problem, backend, platform, mode)
    return kernel_of(name, _mode(mode), shapes, problem).name


def explain_backend(
    q: Described,
    k: Described,
    v: Described,
    log_weights: Described | None = None,
    *,
    scale: ScalarLike = 1.0,
    causal: bool = False,
    window: Window = None,
    mask: AbstractMask | None = None,
    platform: str | None = None,
    mode: str = "forward",
) -> list[Candidate]:
    """The backends that are tried in turn where none is asked for, up to the one that runs, each
    with its kernel and a `verdict`: why it runs, or why not.

    **Arguments:** as in `jaxflow.kernels.select_backend`, but for `backend`.

    **Returns:** a list of `Candidate`, of which the last one runs.

    **Raises:** as `jaxflow.kernels.select_backend`.

    ```python
    >>> x = jnp.zeros((64, 3))
    >>> [c.name for c in jaxflow.kernels.explain_backend(x, x, x, platform="cpu")]
    ['blocked']

    ```
    """
    shapes, problem = _described(q, k, v, log_weights, scale, causal, window, mask)
    return list(candidates(_mode(mode), _platform(platform), shapes, problem))


def _described(q, k, v, log_weights, scale, causal, window, mask) -> tuple[Shapes, Problem]:
    known = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    describe = lambda name, a: a if isinstance(a, known) else _array(name, a)
    shapes = Shapes(describe("q", q), describe("k", k), describe("v", v))
    b = None if log_weights is None else describe("log_weights", log_weights)
    _check(shapes, b, batched=True)
    scale = _scale(scale, accumulation_dtype(shapes.q.dtype))
    return shapes, _problem(shapes, b, scale, causal, window, mask)


def _select(shapes: Shapes, problem: Problem, backend, platform, mode) -> str:
    platform = _platform(platform)
    if backend is not None:
        check_named(backend, shapes, problem)
    return choose(_mode(mode), platform, shapes, problem, backend)


def _platform(name) -> str:
    if name is None:
        return default_platform()
    if name not in tuple(PLATFORMS):
        raise ValueError(f"platform must be one of {', '.join(PLATFORMS)} or None, got {name!r}.")
    return PLATFORMS[name]


def _mode(name: str) -> Mode:
    for mode in MODES:
        if name == mode:
            return mode
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {name!r}.")


def _problem(
    shapes: Shapes, log_weights, scale: float | jax.Array, causal, window, mask
) -> Problem:
    # Each constant is a program of its own, so it is one only where cuDNN can take it.
    narrow = jnp.dtype(shapes.q.dtype).itemsize == 2
    constant = scale if isinstance(scale, float) and narrow else None
    limits, mask = band(causal, window), is_mask(mask)
    weighted = log_weights is not None
    if mask is None:
        return Problem(limits, weighted, constant)
    shape = shapes.q.shape[-2], shapes.k.shape[-2]
    check_mask(mask, shape)
    if isinstance(mask, Hierarchical):
        if window is not None:
            raise ValueError(
                "a hierarchical mask takes no window, which cuts its groups of keys; got window="
                f"{window}. Leave the window None: far keys cost a hierarchical mask little."
            )
        levels = Levels(mask.size, mask.lengths(shape), bool(causal))
        return Problem((None, None), True, constant, mask=levels)  # groups have masses
    if not isinstance(mask, AbstractPattern | TopK):
        raise NotImplementedError(
            f"the operation takes patterns, TopK and Hierarchical as masks, not {mask!r}. Subclass "
            "jaxflow.masks.AbstractPattern."
        )
    return Problem(limits, weighted, constant, mask=mask)


# ------------------------------------------------------------------ checks


def _array(name: str, value) -> jax.Array:
    try:
        return on_automatic_mesh(jnp.asarray(value))
    except (TypeError, ValueError, OverflowError) as e:
        raise TypeError(
            f"{name} must be an array of floating-point numbers, which this {type(value).__name__} "
            "is not. Pass it through jnp.asarray to see why."
        ) from e


def _check(shapes: Shapes, log_weights, *, batched: bool):
    for name, a in shapes._asdict().items():
        if len(a.shape) < 2 or (len(a.shape) > 2 and not batched):
            raise ValueError(
                f"{name} must have two axes, (tokens, channels); got shape {a.shape}. "
                "Batch and head axes go through jax.vmap."
            )
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got {a.dtype}. Cast it first.")
        if 0 in a.shape:
            raise ValueError(f"{name} must not be empty, got shape {a.shape}.")
    q, k, v = shapes
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must share one dtype, got {q.dtype}, {k.dtype}, {v.dtype}. "
            "Cast them to one dtype first."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"queries and keys must have the same dimension, got q {q.shape} and k {k.shape}."
        )
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"keys and values must pair up, got k {k.shape} and v {v.shape}.")
    if log_weights is None:
        return
    wanted = k.shape[:-1]
    if log_weights.shape != wanted and not (batched and log_weights.shape[-1:] == wanted[-1:]):
        raise ValueError(
            f"log_weights must have one entry a key, shape {wanted}; got {log_weights.shape}."
        )
    if not jnp.issubdtype(log_weights.dtype, jnp.floating):
        raise TypeError(
            f"log_weights must be floating point, got {log_weights.dtype}. "
            "A Boolean mask becomes jnp.where(mask, 0.0, -jnp.inf)."
        )


def _log_weights(b: jax.Array, dtype) -> Float[Array, " n"]:
    if is_concrete(b) and b.is_fully_addressable:
        known = np.asarray(b, np.float64)
        if (wrong := np.flatnonzero(np.isnan(known) | np.isposinf(known))).size:
            raise ValueError(
                f"log_weights must be numbers below infinity, got {known[wrong[0]]} for key "
                f"{wrong[0]}. A key without weight has the log-weight -inf."
            )
    b = b.astype(dtype)
    return jnp.where(b < 1e-5 * MASKED, -jnp.inf, b)


def _scale(scale, dtype) -> float | jax.Array:
    """A number as a float, anything else as an array."""
    if isinstance(scale, int | float | np.integer | np.floating) and not isinstance(scale, bool):
        _check_finite(scale, dtype)
        return float(scale)
    if not isinstance(scale, jax.Array | np.ndarray):
        raise TypeError(f"scale must be a real number or a scalar array, got {scale!r}.")
    array = _array("scale", scale)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"scale must be a real number, got an array of {array.dtype}.")
    if array.shape != ():
        raise ValueError(
            f"scale must be a scalar, got shape {array.shape}. One scale a head goes through "
            "jax.vmap."
        )
    if is_concrete(scale):
        _check_finite(scale, dtype)
    return array


def _check_finite(scale, dtype):
    # On the host, also while a program is traced, and as a number of Python's: the bound is beyond
    # the scale's own dtype, and an integer may be too large for a float.
    if not abs(np.asarray(scale).item()) <= float(jnp.finfo(dtype).max):
        raise ValueError(
            f"scale (the inverse temperature) must be finite, got {scale!s:.24} in {dtype}. "
            "The limit of infinite scale is the interaction jaxflow.Hardmax()."
        )
