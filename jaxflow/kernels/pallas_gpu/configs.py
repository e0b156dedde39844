"""Tiles found by `python -m benchmarks tune`; the kernels' own heuristics do the rest."""

import jax.numpy as jnp

from ..base import Mode
from . import hopper, particles, tensor_cores

# Hopper's cotangent is two kernels, with a tile each.
HopperConfig = hopper.Config | tuple[hopper.Config, hopper.Config]
Config = particles.Config | tensor_cores.Config | HopperConfig | None

# By what the device's name contains, then (family, mode, bytes of an operand, channels), the
# channels rounded up to a power of two.
TUNED: dict[str, dict[tuple[str, str, int, int], Config]] = {}


def tuned(kind: str, family: str, mode: Mode, dtype, channels: int) -> Config:
    """The tuned tile for a device, or None."""
    key = family, mode, jnp.dtype(dtype).itemsize, 1 << (channels - 1).bit_length()
    return next((table.get(key) for name, table in TUNED.items() if name in kind), None)
