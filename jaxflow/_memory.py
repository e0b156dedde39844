"""Whether something fits, asked before it is made: a process that runs out of memory is killed."""

import os
from pathlib import Path

import jax

# Numbers that an array of pairs may hold: of n tokens as many rows (or systems, or times) are taken
# at a time as stay below it. 16 MiB in float64.
PAIRS_AT_ONCE = 2**21


def check_fits(needed: int, what: str, remedy: str, *, host: bool = False):
    """Refuses what needs more bytes than are free, on the default device or on the host.

    **Raises:** MemoryError, with both numbers and the remedy.
    """
    available = host_memory() if host else available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} needs about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free. "
            f"{remedy}"
        )


def available_memory() -> int | None:
    """The bytes that are free on the default device; None where that is not known."""
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_memory()


def host_memory() -> int | None:
    """The bytes that this process may still take on the host; None where that is not known."""
    known = [limit for limit in (_machine(), _container(), _process()) if limit is not None]
    return max(min(known), 0) if known else None


def _machine() -> int | None:
    """What the machine could give: files that it keeps in memory make way."""
    try:
        return 1024 * _table("/proc/meminfo")["MemAvailable:"]
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _container() -> int | None:
    """What is left under the limit of a container (control groups, version 2)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - _table(group / "memory.stat")["anon"]
    except (OSError, KeyError, ValueError):
        return None


def _process() -> int | None:
    """What is left under `ulimit -v`."""
    try:
        import resource  # not on Windows

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        return None if limit == resource.RLIM_INFINITY else limit - _address_space()
    except (ImportError, OSError):
        return None


def _address_space() -> int:
    """The bytes of address space that this process has taken."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _table(path: str | Path) -> dict[str, int]:
    """Lines "name number ..."."""
    rows = (line.split() for line in Path(path).read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}
