"""Whether something fits, asked before it is made: a process that runs out of memory is killed."""

import os

import jax

# Numbers that an array of pairs may hold: of n tokens as many rows (or systems, or times) are taken
# at a time as stay below it. 16 MiB in float64.
PAIRS_AT_ONCE = 2**21


def check_fits(needed: int, what: str, remedy: str):
    """Raises MemoryError where more bytes are needed than are free."""
    available = available_memory()
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
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
