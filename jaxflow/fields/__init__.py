"""Vector fields (t, x, mu) -> X_t[mu](x), and how they combine."""

from .attention import MultiHeadAttention, SelfAttention
from .base import AbstractDivergenceField, AbstractField, Scaled, Sum, divergence
from .feedforward import FeedForward, LinearDrift
from .interactions import (
    AbstractInteraction,
    Hardmax,
    Linear,
    Sinkhorn,
    Softmax,
    Unnormalised,
)

__all__ = [
    "AbstractDivergenceField",
    "AbstractField",
    "AbstractInteraction",
    "FeedForward",
    "Hardmax",
    "Linear",
    "LinearDrift",
    "MultiHeadAttention",
    "Scaled",
    "SelfAttention",
    "Sinkhorn",
    "Softmax",
    "Sum",
    "Unnormalised",
    "divergence",
]
