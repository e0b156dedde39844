"""The one operation and its backends. Arrays only: nothing here knows a measure or a time."""

from .expectation import describe_backend, explain_backend, select_backend, softmax_expectation
from .registry import BACKENDS

__all__ = [
    "BACKENDS",
    "describe_backend",
    "explain_backend",
    "select_backend",
    "softmax_expectation",
]
