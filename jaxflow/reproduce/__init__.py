"""Published results, each recomputed beside what theory expects of it.

    jaxflow reproduce --list
    jaxflow reproduce staircase
    jaxflow reproduce all --quick --out runs/reproduce

A result is one file here, whose `RESULT` the contract of `base` describes, and a line below.
"""

from . import (
    causal,
    gaussian,
    hardmax,
    hysteresis,
    long_context,
    mean_shift,
    moderate,
    modes,
    noise,
    normalisation,
    phase_boundary,
    polytope,
    sinkhorn,
    staircase,
    weighted,
)
from .base import Outcome, Result, Row, Scheme, Seconds

RESULTS: dict[str, Result] = {
    module.RESULT.name: module.RESULT
    for module in (
        phase_boundary,
        staircase,
        modes,
        noise,
        hysteresis,
        gaussian,
        hardmax,
        causal,
        polytope,
        normalisation,
        sinkhorn,
        weighted,
        moderate,
        long_context,
        mean_shift,
    )
}

__all__ = ["RESULTS", "Outcome", "Result", "Row", "Scheme", "Seconds"]


def __dir__() -> list[str]:
    return __all__
