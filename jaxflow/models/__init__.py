"""Models: embed -> flow -> read out.

    x_i(0) = E[token_i] + position_i,   dx_i/dt = X_t[mu_t](x_i),   logits_i = R N(x_i(T))

    LanguageModel     causal attention + feed-forward on the tokens of a text
    ImageClassifier   attention + feed-forward on the patches of an image
    ResidualNetwork   feed-forward on one vector: a ResNet, and the neural ODE of the same block

Depth is a policy, not a class. With layers (PiecewiseConstant), Lie-Trotter splitting, Euler's
method and one step a layer a model is the plain transformer or ResNet; with another curve, solver,
step count or tolerance it is a continuous one, and the same parameters run under either.
"""

from ..flow import FlowSolution as Solved  # the name that solutions of models had
from .base import AbstractModel, Depth
from .blocks import Block, fourier, hypernetwork, interpolated, layered, shared, smooth
from .config import CURVES, SOLVERS, build, depth
from .image import ImageClassifier
from .language import LanguageModel
from .residual import ResidualNetwork

__all__ = [
    "CURVES",
    "SOLVERS",
    "AbstractModel",
    "Block",
    "Depth",
    "ImageClassifier",
    "LanguageModel",
    "ResidualNetwork",
    "Solved",
    "build",
    "depth",
    "fourier",
    "hypernetwork",
    "interpolated",
    "layered",
    "shared",
    "smooth",
]
