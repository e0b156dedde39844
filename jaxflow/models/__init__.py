"""Models: embed -> flow -> read out.

    x_i(0) = E[token_i] + position_i,   dx_i/dt = X_t[mu_t](x_i),   logits_i = R N(x_i(T))

    LanguageModel     causal attention + feed-forward on the tokens of a text
    ImageClassifier   attention + feed-forward on the patches of an image
    Encoder           attention + feed-forward on all tokens of a text at once
    ResidualNetwork   feed-forward on one vector: a ResNet, and the neural ODE of the same block

A block is any function of a PRNG key that makes a field: `gpt2`, `llama`, `parallel`, `attention`
and `theory` make such functions.

Depth is a policy, not a class. With layers (PiecewiseConstant), Lie-Trotter splitting, Euler's
method and one step a layer a model is the plain transformer or ResNet; with another curve, solver,
step count or tolerance it is a continuous one, and the same parameters run under either.
"""

from ..flow import FlowSolution as Solved  # the name that solutions of models had
from .base import AbstractModel, Depth
from .blocks import attention, gpt2, llama, parallel, theory
from .config import BLOCKS, CURVES, SOLVERS, build, depth
from .curves import fourier, hypernetwork, interpolated, layered, shared, smooth
from .encoder import Encoder
from .exits import AbstractExit, DistributionExit, VelocityExit
from .image import ImageClassifier
from .inspection import Inspection, inspect
from .language import LanguageModel
from .pretrained import from_pretrained
from .residual import ResidualNetwork

__all__ = [
    "BLOCKS",
    "CURVES",
    "SOLVERS",
    "AbstractExit",
    "AbstractModel",
    "Depth",
    "DistributionExit",
    "Encoder",
    "ImageClassifier",
    "Inspection",
    "LanguageModel",
    "ResidualNetwork",
    "Solved",
    "VelocityExit",
    "attention",
    "build",
    "depth",
    "fourier",
    "from_pretrained",
    "gpt2",
    "hypernetwork",
    "inspect",
    "interpolated",
    "layered",
    "llama",
    "parallel",
    "shared",
    "smooth",
    "theory",
]


def __dir__() -> list[str]:
    return __all__
