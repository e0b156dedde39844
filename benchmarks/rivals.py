"""Attention in other libraries, behind one signature.

    mean_i = sum_j exp(s_ij - log_partition_i) v_j,    s_ij = scale <q_i, k_j>

An attention of JAX is a function (q, k, v, *, shape) -> mean on (n, d) or (batch, n, d); one of
torch or KeOps the same on tensors. What a library cannot do raises UnavailableError.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxflow import softmax_expectation

from . import machine
from .shapes import Shape
from .timing import Runner, UnavailableError, refuse_scores

KEOPS_LIMIT = 1.5e9  # pairs * channels on a CPU, where it then takes many seconds

# ------------------------------------------------------------------ JAX


def ours(q, k, v, *, shape: Shape, backend: str | None = None):
    options = {"causal": shape.causal, "window": shape.window, "backend": backend}
    attend = lambda q, k, v: softmax_expectation(q, k, v, scale=shape.scale, **options)[0]
    return attend(q, k, v) if shape.batch == 1 else jax.vmap(attend)(q, k, v)


def naive(q, k, v, *, shape: Shape, rows=None):
    """The definition, with its n^2 scores. `rows` are the numbers of the queries, if not all."""
    dtype = q.dtype if q.dtype == jnp.float64 else jnp.dtype(jnp.float32)
    product = partial(jnp.matmul, precision="highest", preferred_element_type=dtype)
    s = jnp.asarray(shape.scale, dtype) * product(q, k.swapaxes(-1, -2))
    mask = visible(jnp.arange(shape.n) if rows is None else rows, jnp.arange(shape.n), shape)
    if mask is not None:
        s = jnp.where(jnp.broadcast_to(mask, s.shape), s, -jnp.inf)
    return product(jax.nn.softmax(s, axis=-1).astype(v.dtype), v).astype(v.dtype)


def visible(rows, columns, shape: Shape):
    """Which keys which query sees, or None if all; for numpy and JAX alike."""
    offset = columns[None, :] - rows[:, None]
    if shape.window is not None:
        right = 0 if shape.causal else shape.window
        return (offset >= -shape.window) & (offset <= right)
    return offset <= 0 if shape.causal else None


def jax_nn(q, k, v, *, shape: Shape, implementation: Literal["xla", "cudnn"]):
    """`jax.nn.dot_product_attention`, on axes (batch, n, heads, d)."""
    if implementation == "cudnn" and (shape.dtype == "float32" or shape.d % 8):
        raise UnavailableError("16-bit and head dimensions a multiple of 8 only")
    window = shape.window
    if window is not None and shape.causal:
        window = (window, 0)
    mean = jax.nn.dot_product_attention(
        *(_four(a) for a in (q, k, v)),
        scale=shape.scale,
        is_causal=shape.causal,
        local_window_size=window,
        implementation=implementation,
    )
    return mean.reshape(q.shape)


def pallas_triton(q, k, v, *, shape: Shape):
    """The example kernel that comes with JAX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        mha = module("jax.experimental.pallas.ops.gpu.attention").mha
    if shape.window is not None:
        raise UnavailableError("no window")
    if shape.d < 16:
        raise UnavailableError("no head dimension below 16")
    one_head = [_four(a) for a in (q, k, v)]
    return mha(*one_head, None, sm_scale=shape.scale, causal=shape.causal).reshape(q.shape)


def pallas_mosaic(q, k, v, *, shape: Shape):
    """The example kernel for Hopper that comes with JAX, with the blocks of its own benchmark."""
    mosaic = module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    if shape.window is not None:
        raise UnavailableError("no window")
    if shape.dtype == "float32" or shape.d % 64:
        raise UnavailableError("16-bit and head dimensions a multiple of 64 only")
    blocks = {name: 64 for name in ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")}
    config = mosaic.TuningConfig(
        block_q=64,
        block_kv=128 if shape.d <= 128 else 64,
        max_concurrent_steps=2,
        causal=shape.causal,
        **blocks,
    )
    scaled = (shape.scale * q.astype(jnp.float32)).astype(q.dtype)  # the kernel has no scale
    one_head = [_four(a) for a in (scaled, k, v)]
    return mosaic.attention(*one_head, config).reshape(q.shape)


def tokamax(q, k, v, *, shape: Shape):
    """The kernels of tokamax, the first of its own list that takes the operands."""
    attend = module("tokamax").dot_product_attention
    window = (shape.window, 0) if shape.window is not None and shape.causal else shape.window
    one_head = [_four(a) for a in (q, k, v)]
    options = {"scale": shape.scale, "is_causal": shape.causal, "local_window_size": window}
    return attend(*one_head, **options).reshape(q.shape)


def _four(a):
    return a.reshape(-1, a.shape[-2], 1, a.shape[-1])


def module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UnavailableError("not installed") from None
    except OSError as e:  # libraries of CUDA that do not fit those that JAX has loaded
        raise UnavailableError(f"does not load: {e}") from None


# ------------------------------------------------------------------ torch and KeOps


def torch_attention(shape: Shape) -> Callable:
    """`scaled_dot_product_attention`, with the kernel that torch picks; a window is a mask."""
    torch = module("torch")
    attend = torch.nn.functional.scaled_dot_product_attention
    axes = (1, shape.batch, shape.n, shape.d)  # the fused code wants (batch, heads, n, d)
    options: dict[str, Any] = {"scale": shape.scale, "is_causal": shape.causal}
    if shape.window is not None:
        refuse_scores(shape.n**2 // 4)  # a byte each
        mask = visible(np.arange(shape.n), np.arange(shape.n), shape)
        options = {"scale": shape.scale, "attn_mask": torch.from_numpy(mask).to(torch_device())}
    return lambda q, k, v: attend(*(a.reshape(axes) for a in (q, k, v)), **options).reshape(q.shape)


def keops_attention(shape: Shape) -> Callable:
    lazy = module("pykeops.torch").LazyTensor
    if shape.causal or shape.window is not None:
        raise UnavailableError("no causal mask")
    if shape.dtype != "float32":
        raise UnavailableError("no 16-bit numbers")
    if jax.default_backend() == "cpu" and shape.pairs * shape.d > KEOPS_LIMIT:
        raise UnavailableError("too slow")

    def attend(q, k, v):
        s = shape.scale * (lazy(q[..., :, None, :]) | lazy(k[..., None, :, :]))
        return s.sumsoftmaxweight(lazy(v[..., None, :, :]), axis=q.ndim - 1)

    return attend


def preload():
    """Imports what is installed, so that no import counts as compile time."""
    for name in ("torch", "pykeops.torch"):
        with contextlib.suppress(UnavailableError):
            module(name)


def torch_device() -> str:
    if jax.default_backend() == "cpu":
        return "cpu"
    if not module("torch").cuda.is_available():
        raise UnavailableError("this torch has no CUDA")
    return "cuda"


def to_torch(arrays: Iterable[np.ndarray]) -> list:
    torch, device = module("torch"), torch_device()
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    place = lambda a: torch.from_numpy(np.asarray(a, np.float32)).to(device)
    return [place(a).to(dtypes.get(a.dtype.name, torch.float32)) for a in arrays]


def torch_runner(launch: Callable, *, threads: int | None = None) -> Runner:
    torch = module("torch")
    if torch_device() == "cpu":
        return Runner(partial(with_threads, threads, launch))

    def finish(outs):
        torch.cuda.synchronize()
        return outs

    def memory() -> float:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        finish(launch())
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    return Runner(launch, finish, memory)


def with_threads(threads: int | None, call: Callable):
    """call() with so many threads of torch, or as many as torch likes.

    They spin while they wait: where other programs share the cores, one can be many times faster
    than all.
    """
    torch = module("torch")
    usual = torch.get_num_threads()
    torch.set_num_threads(threads or usual)
    try:
        return call()
    finally:
        torch.set_num_threads(usual)


ONE_THREAD = " 1 thread"  # ends the name of a rival that gets no more


def torch_threads(name: str) -> int | None:
    """1 for a rival whose name ends in "1 thread"; None leaves the choice to torch."""
    return 1 if name.endswith(ONE_THREAD) else None


def beside_one_thread(names: Iterable[str]) -> list[str]:
    """The rivals, and on a CPU those of torch once more with one thread."""
    names = list(names)
    if jax.default_backend() != "cpu":
        return names
    return distinct([*names, *(n + ONE_THREAD for n in names if n.startswith("torch"))])


def distinct(names: Iterable[str]) -> list[str]:
    """Without those of one thread where there is no other."""
    return [name for name in names if torch_threads(name) is None or machine.threads() > 1]


def from_torch(outs: Iterable[Any]) -> list[np.ndarray]:
    return [np.asarray(a.detach().cpu().float()) if hasattr(a, "cpu") else a for a in outs]
