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
    Whole,
    divergence,
    token_velocities,
)
from .biased import L2, ALiBi, alibi_slopes
from .compressed import Compressed
from .feedforward import FeedForward, GatedFeedForward, LinearDrift
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
from .lowrank import LowRank, adapters
from .normalisation import (
    NGPT,
    AbstractNorm,
    AddNorm,
    LayerNorm,
    PeriNorm,
    PostNorm,
    PreNorm,
    RMSNorm,
    SqrtScaling,
    UnitNorm,
)
from .random_matrices import (
    AbstractMatrices,
    GaussianMatrices,
    GOEMatrices,
    SignedValue,
    redrawn,
)
from .rescaled import Rescaled
from .sigmoid import Sigmoid
from .tied import TiedAttention
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
    "AbstractMatrices",
    "AbstractNorm",
    "AbstractWrapper",
    "AddNorm",
    "BoundedConfidence",
    "Compressed",
    "Constant",
    "FeedForward",
    "Fourier",
    "GOEMatrices",
    "GatedFeedForward",
    "GaussianMatrices",
    "Hardmax",
    "HyperNetwork",
    "Kink",
    "L2",
    "LayerNorm",
    "Legendre",
    "Linear",
    "LinearDrift",
    "LowRank",
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
    "SignedValue",
    "Sinkhorn",
    "Softmax",
    "SqrtScaling",
    "Sum",
    "TiedAttention",
    "TimeDependent",
    "Tokens",
    "UnitNorm",
    "Unnormalised",
    "Whole",
    "adapters",
    "alibi_slopes",
    "divergence",
    "redrawn",
    "token_velocities",
    "weighted_attention",
    "weighted_sums",
]


def __dir__() -> list[str]:
    return __all__
