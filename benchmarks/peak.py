"""Peak memory of one case: `python -m benchmarks.peak SUITE CASE` measures it in a fresh process.

SUITE has a function `runner(**CASE)` that returns a `timing.Runner`.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from .timing import Runner, failure

ROOT = Path(__file__).parent.parent
CHILD_S = 45.0


def peak(suite: str, case: dict, run: Runner | None = None) -> dict:
    """{"peak_mib": ...}, or {"note": ...}; from `run` where this process can tell.

    On an accelerator a compiled program states its memory, and torch's allocator restarts its
    high-water mark; elsewhere a process that has freed memory before hides growth.
    """
    if run is not None and run.memory is not None:
        return {"peak_mib": run.memory()}
    return in_child(suite, case, timeout_s=CHILD_S)


def peak_mib(run: Runner) -> float:
    """MiB by which one call grows the memory in use, at its worst, in a fresh process.

    On an accelerator by JAX's allocator; on the CPU by the resident set, for `memory_analysis`
    does not see the temporaries of a CPU program.
    """
    if run.memory is not None:
        return run.memory()
    stats = jax.local_devices()[0].memory_stats
    if stats() is not None:
        used, high = (lambda: stats()["bytes_in_use"]), lambda: stats()["peak_bytes_in_use"]
    else:
        used, high = (lambda: _resident("VmRSS:")), lambda: _resident("VmHWM:")
        Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
    before = used()
    run()
    return (high() - before) / 2**20


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(s.split()[1]) for s in lines if s.startswith(field))


def in_child(suite: str, case: dict, *, timeout_s: float) -> dict:
    """What `python -m benchmarks.peak` prints, in a fresh process; a "note" if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.peak", suite, json.dumps(case)]
    options = {"env": os.environ | {"PYTHONPATH": path}, "timeout": timeout_s}
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except subprocess.TimeoutExpired:
        return {"note": f"memory: over {timeout_s:.0f} s"}
    if done.returncode != 0:
        return {"note": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _child(suite: str, case: dict) -> dict:
    try:
        return {"peak_mib": peak_mib(importlib.import_module(f"benchmarks.{suite}").runner(**case))}
    except Exception as e:
        return {"note": f"memory: {failure(e)}"}


if __name__ == "__main__":
    print(json.dumps(_child(sys.argv[1], json.loads(sys.argv[2]))))
