"""Measures, their samplers, and measures of few points that stand for those of many."""

from .base import Measure, check_measure
from .compression import Box, compress
from .samplers import (
    circle,
    from_angles,
    from_image,
    from_text,
    gaussian,
    kuramoto,
    simplex,
    uniform_sphere,
    von_mises_fisher,
)

__all__ = [
    "Box",
    "Measure",
    "check_measure",
    "circle",
    "compress",
    "from_angles",
    "from_image",
    "from_text",
    "gaussian",
    "kuramoto",
    "simplex",
    "uniform_sphere",
    "von_mises_fisher",
]


def __dir__() -> list[str]:
    return __all__
