"""jaxflow: transformers as flows of measures.

    dx_i/dt = X_t[mu_t](x_i),    mu_t = sum_j w_j delta_{x_j(t)}

The map, in reading order:

    measure      mu                    Measure, and samplers in `jaxflow.measure`
    geometry     where tokens live     Sphere, Euclidean
    field        mu -> X_t[mu]         SelfAttention, MultiHeadAttention, FeedForward, a + b
    time         t -> field            TimeDependent(PiecewiseConstant(fields, ts))
    flow         X -> mu(T)            flow(field, mu0, t1=...)
    observables  functions of (t, mu)  `jaxflow.observables`
    models       embed, flow, read out `jaxflow.models`, trained by `jaxflow.training`
    pictures     `jaxflow.viz`

All attention runs through one operation, `softmax_expectation`.
"""

from . import measure, models, observables, solvers, training, viz
from .fields import (
    AbstractField,
    Constant,
    FeedForward,
    Fourier,
    Hardmax,
    HyperNetwork,
    LayerNorm,
    Legendre,
    Linear,
    LinearDrift,
    MultiHeadAttention,
    PeriNorm,
    PiecewiseConstant,
    PiecewiseLinear,
    PreNorm,
    RMSNorm,
    Scaled,
    SelfAttention,
    Sinkhorn,
    Softmax,
    Sum,
    TimeDependent,
    Unnormalised,
    divergence,
)
from .flow import FlowError, FlowSolution, flow, memory_estimate
from .geometry import Euclidean, Sphere
from .kernels import select_backend, softmax_expectation
from .measure import Measure

__version__ = "0.1.0"

__all__ = [
    "AbstractField",
    "Constant",
    "Euclidean",
    "FeedForward",
    "FlowError",
    "FlowSolution",
    "Fourier",
    "Hardmax",
    "HyperNetwork",
    "LayerNorm",
    "Legendre",
    "Linear",
    "LinearDrift",
    "Measure",
    "MultiHeadAttention",
    "PeriNorm",
    "PiecewiseConstant",
    "PiecewiseLinear",
    "PreNorm",
    "RMSNorm",
    "Scaled",
    "SelfAttention",
    "Sinkhorn",
    "Softmax",
    "Sphere",
    "Sum",
    "TimeDependent",
    "Unnormalised",
    "divergence",
    "flow",
    "measure",
    "memory_estimate",
    "models",
    "observables",
    "select_backend",
    "softmax_expectation",
    "solvers",
    "training",
    "viz",
]
