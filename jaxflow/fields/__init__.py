"""Vector fields (t, x, mu) -> X_t[mu](x), and how they combine."""

from .attention import MultiHeadAttention, SelfAttention
from .base import (
    AbstractCausalField,
    AbstractCompositeField,
    AbstractDivergenceField,
    AbstractField,
    AbstractWrapper,
    Scaled,
    Sum,
    divergence,
    token_velocities,
)
from .biased import L2, ALiBi, alibi_slopes
from .compressed import Compressed
from .feedforward import FeedForward, LinearDrift
from .interactions import (
    AbstractInteraction,
    Hardmax,
    Linear,
    Sinkhorn,
    Softmax,
    Tokens,
    Unnormalised,
    weighted_sums,
)
from .literature import BoundedConfidence, MeanShift, weighted_attention
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
from .rescaled import Rescaled
from .sigmoid import Sigmoid
from .time import (
    AbstractCurve,
    Constant,
    Fourier,
    HyperNetwork,
    Kink,
    Legendre,
    PiecewiseConstant,
    PiecewiseLinear,
    TimeDependent,
)

__all__ = [
    "ALiBi",
    "AbstractCausalField",
    "AbstractCompositeField",
    "AbstractCurve",
    "AbstractDivergenceField",
    "AbstractField",
    "AbstractInteraction",
    "AbstractNorm",
    "AbstractWrapper",
    "BoundedConfidence",
    "Compressed",
    "Constant",
    "FeedForward",
    "Fourier",
    "Hardmax",
    "HyperNetwork",
    "Kink",
    "L2",
    "LayerNorm",
    "Legendre",
    "Linear",
    "LinearDrift",
    "MeanShift",
    "MultiHeadAttention",
    "NGPT",
    "PeriNorm",
    "PiecewiseConstant",
    "PiecewiseLinear",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "Rescaled",
    "Scaled",
    "SelfAttention",
    "Sigmoid",
    "Sinkhorn",
    "Softmax",
    "SqrtScaling",
    "Sum",
    "TimeDependent",
    "Tokens",
    "UnitNorm",
    "Unnormalised",
    "alibi_slopes",
    "divergence",
    "token_velocities",
    "weighted_attention",
    "weighted_sums",
]
