"""The device: what it can do at best, measured, and what it is."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from .peak import ROOT
from .timing import compiled, seconds

PACKAGES = ("jax", "jaxlib", "diffrax", "numpy", "torch", "torchdiffeq", "pykeops")
CHAINS, DEPTH = 8, 64  # of multiply-adds an element: parallel, so that latency does not count
EXPS = 32  # exponentials an element


def ceilings() -> dict[str, float]:
    """The best of several runs of each, a second:

    - `exps`: exponentials of float32
    - `flops`: multiplies and adds of float32 on vectors; on a CPU, where a matrix product runs on
      the same units, of the better of the two
    - `tensor_flops`: those of a bfloat16 matrix product, on an accelerator
    - `bytes`: read and written by a copy
    """
    on_cpu = jax.default_backend() == "cpu"
    size, length = (2048, 2**20) if on_cpu else (8192, 2**26)
    x = jnp.linspace(-1.0, 0.0, length, dtype=jnp.float32)
    copied = jnp.zeros(2**25 if on_cpu else 2**28, jnp.float32)
    rates = {
        "exps": EXPS * length / _fastest(_exponentials, x),
        "flops": 2 * CHAINS * DEPTH * length / _fastest(_multiply_adds, x),
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
