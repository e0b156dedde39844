"""The phase diagram of clustering: how likely two tokens have met, by temperature and time."""

from .diagram import MetPairs, PhaseDiagram, PhaseRow, crossing, phase_diagram
from .equiangular import equiangular_time

__all__ = [
    "MetPairs",
    "PhaseDiagram",
    "PhaseRow",
    "crossing",
    "equiangular_time",
    "phase_diagram",
]
