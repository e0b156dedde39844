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
from .compressed import Compressed
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
from .rescaled import Rescaled
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
    "AbstractCausalField",
    "AbstractCompositeField",
    "AbstractCurve",
    "AbstractDivergenceField",
    "AbstractField",
    "AbstractInteraction",
    "AbstractNorm",
    "AbstractWrapper",
    "Compressed",
    "Constant",
    "FeedForward",
    "Fourier",
    "Hardmax",
    "HyperNetwork",
    "Kink",
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
    "Rescaled",
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
    "token_velocities",
]
