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
from .normalisation import (
    NGPT,
    AbstractNorm,
    LayerNorm,
    PeriNorm,
    PostNorm,
    PreNorm,
    RMSNorm,
    SqrtScaling,
    UnitNorm,
)
from .time import (
    AbstractCurve,
    Constant,
    Fourier,
    HyperNetwork,
    Legendre,
    PiecewiseConstant,
    PiecewiseLinear,
    TimeDependent,
)

__all__ = [
    "AbstractCurve",
    "AbstractDivergenceField",
    "AbstractField",
    "AbstractInteraction",
    "AbstractNorm",
    "Constant",
    "FeedForward",
    "Fourier",
    "Hardmax",
    "HyperNetwork",
    "LayerNorm",
    "Legendre",
    "Linear",
    "LinearDrift",
    "MultiHeadAttention",
    "NGPT",
    "PeriNorm",
    "PiecewiseConstant",
    "PiecewiseLinear",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "Scaled",
    "SelfAttention",
    "Sinkhorn",
    "Softmax",
    "SqrtScaling",
    "Sum",
    "TimeDependent",
    "UnitNorm",
    "Unnormalised",
    "divergence",
]
