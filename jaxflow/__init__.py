"""jaxflow: transformers as flows of measures.

    dx_i/dt = X_t[mu_t](x_i),    mu_t = sum_j w_j delta_{x_j(t)}

The map, in reading order:

    measure      mu                    Measure, and samplers in `jaxflow.measure`
    geometry     where tokens live     Sphere, Euclidean
    field        mu -> X_t[mu]         SelfAttention, MultiHeadAttention, FeedForward, a + b
    flow         X -> mu(T)            flow(field, mu0, t1=...)
    observables  functions of (t, mu)  `jaxflow.observables`
    pictures     `jaxflow.viz`

All attention runs through one operation, `softmax_expectation`.
"""

from . import measure, observables, solvers, viz
from .fields import (
    AbstractField,
    FeedForward,
    Hardmax,
    Linear,
    LinearDrift,
    MultiHeadAttention,
    Scaled,
    SelfAttention,
    Sinkhorn,
    Softmax,
    Sum,
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
    "Euclidean",
    "FeedForward",
    "FlowError",
    "FlowSolution",
    "Hardmax",
    "Linear",
    "LinearDrift",
    "Measure",
    "MultiHeadAttention",
    "Scaled",
    "SelfAttention",
    "Sinkhorn",
    "Softmax",
    "Sphere",
    "Sum",
    "Unnormalised",
    "divergence",
    "flow",
    "measure",
    "memory_estimate",
    "observables",
    "select_backend",
    "softmax_expectation",
    "solvers",
    "viz",
]
