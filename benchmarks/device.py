"""The device: what it can do at best, measured, and what it is."""

import functools
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxflow.kernels.pallas_gpu.particles import ASSEMBLY

from .peak import ROOT
from .timing import compiled, seconds

PACKAGES = ("jax", "jaxlib", "diffrax", "numpy", "torch", "torchdiffeq", "pykeops")
CHAINS, DEPTH = 8, 64  # of multiply-adds an element: parallel, so that latency does not count
EXPS = 32  # exponentials an element
ROUNDS = 8  # of both on a GPU, so that reading and writing the elements does not count
BLOCK = 512  # elements of a GPU's block
UNROLL = 8  # multiply-adds: a loop that leaves the instruction cache waits for it


def ceilings() -> dict[str, float]:
    """The best of several runs of each, a second:

    - `exps`: exponentials of float32; on a GPU of base 2, as its kernels take them
    - `flops`: multiplies and adds of float32 on vectors; on a CPU, where a matrix product runs on
      the same units, of the better of the two
    - `tensor_flops`: those of a bfloat16 matrix product, on an accelerator
    - `bytes`: read and written by a copy
    """
    on_cpu = jax.default_backend() == "cpu"
    size, length = (2048, 2**20) if on_cpu else (8192, 2**26)
    x = jnp.linspace(-1.0, 0.0, length, dtype=jnp.float32)
    exponentials, multiply_adds, rounds = _exponentials, _multiply_adds, 1
    if jax.default_backend() == "gpu":
        exponentials, multiply_adds, rounds = gpu_exponentials, gpu_multiply_adds, ROUNDS
    copied = jnp.zeros(2**25 if on_cpu else 2**28, jnp.float32)
    rates = {
        "exps": rounds * EXPS * length / _fastest(exponentials, x),
        "flops": 2 * rounds * CHAINS * DEPTH * length / _fastest(multiply_adds, x),
        "bytes": 2 * copied.nbytes / _fastest(lambda a: a + 1, copied),
    }
    # Random entries, as attention has: a GPU multiplies constants at a higher clock.
    matrix = jax.random.normal(jax.random.key(0), (size, size))
    matrix = matrix.astype(jnp.float32 if on_cpu else jnp.bfloat16)
    product = 2 * size**3 / _fastest(lambda a: a @ a, matrix)
    if on_cpu:
        return rates | {"flops": max(product, rates["flops"])}
    return rates | {"tensor_flops": product}


def better(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {name: max(rate, second[name]) for name, rate in first.items()}


def _exponentials(x: jax.Array) -> jax.Array:
    terms = [jnp.exp((1 + i / EXPS) * x) for i in range(EXPS)]
    return sum(terms[1:], terms[0])


def _multiply_adds(x: jax.Array) -> jax.Array:
    chains = [x + i for i in range(CHAINS)]
    for _ in range(DEPTH):
        chains = [0.5 * y + x for y in chains]  # bounded, and no two chains are equal
    return sum(chains[1:], chains[0])


# XLA compiles an exponential to ten instructions for a GPU and a multiply-add to two, so that both
# rates would be those of something else.


def gpu_exponentials(x: jax.Array) -> jax.Array:
    """ROUNDS * EXPS instructions ex2 an element."""

    def body(_, y):
        for _ in range(EXPS):
            y = ASSEMBLY.exp2(-y)
        return y

    return _on_gpu(lambda x: jax.lax.fori_loop(0, ROUNDS, body, x), x)


def gpu_multiply_adds(x: jax.Array) -> jax.Array:
    """ROUNDS * CHAINS * DEPTH instructions fma an element."""

    def sums(x):
        half = jnp.full_like(x, 0.5)

        def body(_, chains):
            for _ in range(UNROLL):
                chains = [ASSEMBLY.fma(half, y, x) for y in chains]
            return tuple(chains)

        chains = tuple(x + i for i in range(CHAINS))
        chains = jax.lax.fori_loop(0, ROUNDS * DEPTH // UNROLL, body, chains)
        return functools.reduce(jnp.add, chains)

    return _on_gpu(sums, x)


def _on_gpu(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    from jax.experimental.pallas import triton

    def kernel(x_ref, out_ref):
        out_ref[...] = fn(x_ref[...])

    block = pl.BlockSpec((BLOCK,), lambda i: (i,))
    return pl.pallas_call(
        kernel,
        grid=(x.size // BLOCK,),
        in_specs=[block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=4),
    )(x)


def _fastest(fn: Callable[[jax.Array], jax.Array], x: jax.Array, runs: int = 8) -> float:
    run = compiled(fn, x)
    run()
    return min(seconds(run) for _ in range(runs))


def provenance() -> dict[str, object]:
    """Device, versions and commit."""
    device, cpu = jax.local_devices()[0].device_kind, Path("/proc/cpuinfo")
    if device == "cpu" and cpu.exists():
        models = [s.split(": ")[1] for s in cpu.read_text().splitlines() if "model name" in s]
        device = f"{(models or ['cpu'])[0]}, {len(models)} cores"
    return {
        "device": device,
        "platform": jax.default_backend(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "commit": _git("rev-parse", "--short", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--", "jaxflow")),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
