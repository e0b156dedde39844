"""How busy the machine is, and how many threads a run may use. Nothing here imports JAX."""

import os

# What the thread pools of numpy, torch and XLA read when they start.
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")


def load() -> float | None:
    """The load average of the last minute; None where the system keeps none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def cores() -> int:
    """Those of the machine, which its load average counts."""
    return os.cpu_count() or 1


def threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores()


def warning(load: float | None) -> str | None:
    """What a load average above the number of cores means; None below it."""
    if load is None or load <= cores():
        return None
    return (
        f"The load average is {load:.3g} on {cores()} cores: others are at work, or more threads "
        "run than there are cores. Times are longer than they should be: read ratios, or wait."
    )


def limit_threads(number: int):
    """Leaves so many threads to jaxflow and rivals alike, here and in child processes.

    It must be called before a thread pool starts. Where the system can, the process keeps so many
    of its cores, so that no library exceeds them.

    **Raises:** `ValueError` for a number that is not between 1 and the cores at hand.
    """
    if not 1 <= number <= threads():
        raise ValueError(
            f"threads must be between 1 and {threads()}, the cores that this process may use; got "
            f"{number}."
        )
    os.environ.update(dict.fromkeys(POOLS, str(number)))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])
