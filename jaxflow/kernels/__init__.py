"""The one operation and its backends. Arrays only: nothing here knows a measure or a time."""

from .base import AbstractBackend
from .conformance import check_backend
from .expectation import describe_backend, explain_backend, select_backend, softmax_expectation
from .pruning import Pruning, pruning
from .registry import BACKENDS, register_backend

__all__ = [
    "BACKENDS",
    "AbstractBackend",
    "Pruning",
    "check_backend",
    "describe_backend",
    "explain_backend",
    "pruning",
    "register_backend",
    "select_backend",
    "softmax_expectation",
]


def __dir__() -> list[str]:
    return __all__
