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
SLOW_S = 2.0  # a call that takes longer is made once

Runner = Callable[[], object]  # runs one case and returns when the answer is there


def seconds(run: Runner, calls: int = 1) -> float:
    """Wall-clock time of one of `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def in_turn(
    runs: Mapping[str, Runner], *, budget_s: float = 5.0, repeats: tuple[int, int] = (5, 25)
) -> dict[str, list[float]]:
    """Times of the rivals A, B, C taken in turn, A B C A B C ..., so that a change of the
    machine's state meets all alike. Repeats until `budget_s` is spent, within `repeats`."""
    times = {name: [seconds(run)] for name, run in runs.items()}
    again = {name: run for name, run in runs.items() if times[name][0] < SLOW_S}
    calls = {name: math.ceil(SAMPLE_S / times[name][0]) for name in again}
    stop = time.perf_counter() + budget_s
    fewest, most = repeats
    for i in range(most):
        if i >= fewest and time.perf_counter() > stop:
            break
        for name, run in again.items():
            time.sleep(PAUSE_S)
            times[name].append(seconds(run, calls[name]))
    return {name: ts[1:] or ts for name, ts in times.items()}


def summary(times: list[float]) -> dict[str, float]:
    return {"ms": 1e3 * statistics.median(times), "ms_min": 1e3 * min(times)}


# ------------------------------------------------------------------ peak memory


def peak_mib(run: Runner) -> float:
    """MiB by which one call grows the memory in use, at its worst.

    On an accelerator by JAX's allocator (or torch's), on the CPU by the resident set of this
    process, for `memory_analysis` does not see the temporaries of a CPU program. A process that
    has freed memory before hides growth: call it in a fresh one (`in_child`).
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    stats = jax.local_devices()[0].memory_stats
    if (before := stats()) is not None:
        run()
        return (stats()["peak_bytes_in_use"] - before["bytes_in_use"]) / 2**20
    before = _resident_mib("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    run()
    return _resident_mib("VmHWM:") - before


def _resident_mib(field: str) -> float:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if field in s)
    return int(line.split()[1]) / 1024


def in_child(module: str, argument: object, *, timeout_s: float) -> dict:
    """The JSON that `python -m module <argument as JSON>` prints last, in a fresh process; with a
    "note" instead if it fails or takes too long."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, json.dumps(argument)],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return {"note": f"over {timeout_s:.0f} s"}
    if done.returncode != 0:
        return {"note": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------ the device


def ceilings() -> dict[str, float]:
    """The fastest of several runs: flop/s of a large float32 matrix product, exp/s in cache."""
    on_cpu = jax.default_backend() == "cpu"
    size = 2048 if on_cpu else 8192
    a = jnp.ones((size, size), jnp.float32)
    x = jnp.linspace(-1.0, 0.0, 2**20 if on_cpu else 2**26, dtype=jnp.float32)
    terms = 32
    gemm = jax.jit(lambda a: a @ a)
    exps = jax.jit(lambda x: sum(jnp.exp((1 + i / terms) * x) for i in range(terms)))
    work = ((gemm, a, 2 * size**3), (exps, x, terms * x.size))
    rates = []
    for fn, operand, amount in work:
        run = lambda fn=fn, operand=operand: fn(operand).block_until_ready()
        run()
        rates.append(amount / min(seconds(run) for _ in range(20)))
    return {"flops": rates[0], "exps": rates[1]}


def provenance() -> dict[str, object]:
    """Device, versions and commit."""
    device = jax.local_devices()[0].device_kind
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = (s.split(":")[1].strip() for s in lines if s.startswith("model name"))
        device = f"{next(model, platform.processor())}, {os.cpu_count()} cores"
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
