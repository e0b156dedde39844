"""The one operation and its backends. Arrays only: nothing here knows a measure or a time."""

from .expectation import describe_backend, explain_backend, select_backend, softmax_expectation
from .pruning import Pruning, pruning
from .registry import BACKENDS

__all__ = [
    "BACKENDS",
    "Pruning",
    "describe_backend",
    "explain_backend",
    "pruning",
    "select_backend",
    "softmax_expectation",
]


def __dir__() -> list[str]:
    return __all__
