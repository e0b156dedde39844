"""jaxflow: transformers as flows of measures.

    dx_i/dt = X_t[mu_t](x_i),    mu_t = sum_j w_j delta_{x_j(t)}

The map, in reading order:

    measure      mu                    Measure, and samplers in `jaxflow.measure`
    geometry     where tokens live     Sphere, Euclidean, Ellipsoid
    masks        who sees whom         `jaxflow.masks`: Blocks, Strided, TopK, ...
    field        mu -> X_t[mu]         SelfAttention, MultiHeadAttention, FeedForward, a + b,
                                       Compressed
    time         t -> field            TimeDependent(PiecewiseConstant(fields, ts))
    flow         X -> mu(T)            flow(field, mu0, t1=...); `jaxflow.events`: until when
    noise        dX = X dt + dW        flow(..., noise=Noise(kappa, key=...))
    coarsen      the same              where tokens that have met are one token
    hardmax_flow the same              exact, of hardmax attention
    observables  functions of (t, mu)  `jaxflow.observables`
    density      mu(dx) = rho(x) dx    log_density(field, mu0, x0, log_rho0, t1=...); on a grid and
                                       in closed form: `jaxflow.density`
    stability    mu + epsilon h        growth_rates(field, k, d), predict_clusters(field, mu);
                                       jacobian_spectrum, lyapunov_exponents
    phase        p(beta, t)            phase_diagram(betas, ts, n=..., d=...)
    models       embed, flow, read out `jaxflow.models`, trained by `jaxflow.training`
    pictures     `jaxflow.viz`

All attention runs through one operation, `softmax_expectation`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        density,
        events,
        fields,
        kernels,
        masks,
        measure,
        models,
        observables,
        phase,
        reversible,
        solvers,
        stability,
        training,
        viz,
    )
    from ._cache import enable_compilation_cache
    from .coarsen import coarsen
    from .density import log_density
    from .fields import (
        L2,
        NGPT,
        AbstractField,
        ALiBi,
        BoundedConfidence,
        Compressed,
        Constant,
        FeedForward,
        Fourier,
        Hardmax,
        HyperNetwork,
        LayerNorm,
        Legendre,
        Linear,
        LinearDrift,
        MeanShift,
        MultiHeadAttention,
        PeriNorm,
        PiecewiseConstant,
        PiecewiseLinear,
        PostNorm,
        PreNorm,
        Rescaled,
        RMSNorm,
        Scaled,
        SelfAttention,
        Sigmoid,
        Sinkhorn,
        Softmax,
        SqrtScaling,
        Sum,
        TimeDependent,
        UnitNorm,
        Unnormalised,
        divergence,
    )
    from .flow import FlowError, FlowSolution, flow, memory_estimate
    from .geometry import Ellipsoid, Euclidean, Sphere
    from .hardmax import HardmaxFlow, hardmax_flow
    from .kernels import select_backend, softmax_expectation
    from .lyapunov import lyapunov_exponents
    from .measure import Measure
    from .noise import Noise
    from .phase import PhaseDiagram, phase_diagram
    from .stability import fastest_mode, growth_rates, jacobian_spectrum, predict_clusters

__version__ = "0.1.0"

__all__ = [
    "ALiBi",
    "AbstractField",
    "BoundedConfidence",
    "Compressed",
    "Constant",
    "Ellipsoid",
    "Euclidean",
    "FeedForward",
    "FlowError",
    "FlowSolution",
    "Fourier",
    "Hardmax",
    "HardmaxFlow",
    "HyperNetwork",
    "L2",
    "LayerNorm",
    "Legendre",
    "Linear",
    "LinearDrift",
    "MeanShift",
    "Measure",
    "MultiHeadAttention",
    "NGPT",
    "Noise",
    "PeriNorm",
    "PhaseDiagram",
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
    "Sphere",
    "SqrtScaling",
    "Sum",
    "TimeDependent",
    "UnitNorm",
    "Unnormalised",
    "coarsen",
    "density",
    "divergence",
    "enable_compilation_cache",
    "events",
    "fastest_mode",
    "fields",
    "flow",
    "growth_rates",
    "hardmax_flow",
    "jacobian_spectrum",
    "kernels",
    "log_density",
    "lyapunov_exponents",
    "masks",
    "measure",
    "memory_estimate",
    "models",
    "observables",
    "phase",
    "phase_diagram",
    "predict_clusters",
    "reversible",
    "select_backend",
    "softmax_expectation",
    "solvers",
    "stability",
    "training",
    "viz",
]

# Where the names above are found, once one is asked for: `jaxflow --help` needs none of them.
_HOMES = (
    "_cache", "density", "fields", "flow", "geometry", "hardmax", "kernels", "lyapunov", "measure",
    "noise", "phase", "stability",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """A module, or a name of a home (PEP 562)."""
    if not name.startswith("__"):
        try:
            return import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    if name in __all__:
        for home in _HOMES:
            if hasattr(module := import_module(f".{home}", __name__), name):
                return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _function(name: str) -> property:
    """The function. Python would put the module of that name in its place."""
    return property(
        lambda package: getattr(import_module(f".{name}", __name__), name),
        lambda package, module: None,
    )


class _Package(ModuleType):
    coarsen = _function("coarsen")
    flow = _function("flow")


sys.modules[__name__].__class__ = _Package
