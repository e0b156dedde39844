"""The one operation and its backends. Arrays only: nothing here knows a measure or a time."""

from .expectation import BACKENDS, select_backend, softmax_expectation

__all__ = ["BACKENDS", "select_backend", "softmax_expectation"]
