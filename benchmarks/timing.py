"""What every suite measures with: times in turn, peak memory, device ceilings, provenance."""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "numpy", "torch", "pykeops")

SAMPLE_S = 0.02  # short calls are repeated inside a sample until it takes this long
PAUSE_S = 0.005  # between rivals, so that thread pools that spin for work fall asleep
BUDGET_S = 3.0  # for the samples of one case, unless that leaves too few

Runner = Callable[[], object]  # runs one case and returns when the answer is there


def seconds(run: Runner, calls: int = 1) -> float:
    """Wall-clock time of one of `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def in_turn(runs: Mapping[str, Runner], *, repeats: tuple[int, int]) -> dict[str, list[float]]:
    """Seconds a call of the rivals A, B, C taken in turn, A B C A B C ..., so that a change in
    the machine's state meets all alike. `repeats` is the least and the most samples of each."""
    calls = {name: math.ceil(SAMPLE_S / seconds(run)) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    stop = time.perf_counter() + BUDGET_S
    for i in range(repeats[1]):
        if i >= repeats[0] and time.perf_counter() > stop:
            break
        for name, run in runs.items():
            time.sleep(PAUSE_S)
            times[name].append(seconds(run, calls[name]))
    return times


def summary(times: list[float]) -> dict[str, float]:
    return {"ms": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times)}


# ------------------------------------------------------------------ peak memory


def peak_mib(run: Runner) -> float:
    """MiB by which one call grows the memory in use, at its worst.

    On an accelerator by the allocator of torch or JAX; on the CPU by the resident set of this
    process, for `memory_analysis` does not see the temporaries of a CPU program. A process that
    has freed memory before hides growth: call it in a fresh one (`in_child`).
    """
    cuda = torch.cuda if (torch := sys.modules.get("torch")) else None
    jax_stats = jax.local_devices()[0].memory_stats
    if cuda is not None and cuda.is_initialized():
        used, peak = cuda.memory_allocated, cuda.max_memory_allocated
        cuda.reset_peak_memory_stats()
    elif jax_stats() is not None:
        used, peak = (lambda: jax_stats()["bytes_in_use"]), lambda: jax_stats()["peak_bytes_in_use"]
    else:
        used, peak = (lambda: _resident("VmRSS:")), lambda: _resident("VmHWM:")
        Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    before = used()
    run()
    return (peak() - before) / 2**20


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(s.split()[1]) for s in lines if s.startswith(field))


def in_child(module: str, argument: object, *, timeout_s: float) -> dict:
    """The JSON that `python -m module <argument as JSON>` prints last, in a fresh process; a
    "note" instead if it fails or takes too long."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", module, json.dumps(argument)]
    options = {"env": os.environ | {"PYTHONPATH": path}, "timeout": timeout_s}
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except subprocess.TimeoutExpired:
        return {"note": f"over {timeout_s:.0f} s"}
    if done.returncode != 0:
        return {"note": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------ the device


def ceilings() -> dict[str, float]:
    """The best of several runs: flop/s of a large float32 matrix product, exp/s of float32."""
    size, length, terms = (2048, 2**20, 32) if jax.default_backend() == "cpu" else (8192, 2**26, 32)
    a = jnp.ones((size, size), jnp.float32)
    x = jnp.linspace(-1.0, 0.0, length, dtype=jnp.float32)
    gemm = jax.jit(lambda a: a @ a)
    exps = jax.jit(lambda x: sum(jnp.exp((1 + i / terms) * x) for i in range(terms)))
    return {"flops": 2 * size**3 / _fastest(gemm, a), "exps": terms * length / _fastest(exps, x)}


def _fastest(fn: Callable[[jax.Array], jax.Array], x: jax.Array, runs: int = 8) -> float:
    fn(x)
    return min(seconds(lambda: fn(x).block_until_ready()) for _ in range(runs))


def provenance() -> dict[str, object]:
    """Device, versions and commit."""
    device, cpu = jax.local_devices()[0].device_kind, Path("/proc/cpuinfo")
    if device == "cpu" and cpu.exists():
        models = [s.split(": ")[1] for s in cpu.read_text().splitlines() if "model name" in s]
        device = f"{(models or ['cpu'])[0]}, {len(models)} cores"
    return {
        "device": device,
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
