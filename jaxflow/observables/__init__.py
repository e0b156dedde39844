"""What is measured of a flow: functions of a measure, and of (t, mu) for `flow(observe=...)`.

    energy        E_beta[mu] = 1/(2 beta) int int exp(beta <x, y>) mu(dx) mu(dy),  int |X_t|^2 dmu
    clusters      the components of the graph of tokens that are close, in direction or in space
    merges        the tree of their mergers along a flow
    correlations  <x_i, x_j> and |x_i - x_j|: the matrix, and their densities over pairs
    attention     A_ij, its column sums, entropy, singular values and rank
    shape         diameter of the support, area of its hull in the plane
    circle        Fourier modes E e^{ik theta}, order parameter |E x/|x||
    transport     W_2 on the line and the circle, Sinkhorn divergence

Functions of a measure map over its leading axes (saved times, systems), honour its weights (a
token of log-weight -inf is not there), and run under jit for any n with memory O(n), except where
the result itself is n x n. Where a token with mass is not finite they are nan, and counts are -1.

Inside a solve, `observe` takes functions of (t, mu): the classes below where a parameter is part
of the problem and may be traced, a lambda for the rest:

    flow(..., observe={"clusters": ClusterCount(0.99), "diameter": lambda t, mu: diameter(mu)})
"""

from .attention import (
    AttentionEntropy,
    AttentionRank,
    attention_entropy,
    attention_matrix,
    attention_rank,
    attention_spectrum,
    column_defect,
    effective_rank,
)
from .base import AbstractObservable
from .circle import fourier_modes, order_parameter
from .clusters import ClusterCount, cluster_count, cluster_labels
from .correlations import inner_products, pair_correlations, pair_distances
from .energy import InteractionEnergy, KineticEnergy, interaction_energy
from .merges import MergeTree, merge_tree
from .shape import diameter, hull_area, hull_vertices
from .sinkhorn import sinkhorn_divergence
from .transport import wasserstein

__all__ = [
    "AbstractObservable",
    "AttentionEntropy",
    "AttentionRank",
    "ClusterCount",
    "InteractionEnergy",
    "KineticEnergy",
    "MergeTree",
    "attention_entropy",
    "attention_matrix",
    "attention_rank",
    "attention_spectrum",
    "cluster_count",
    "cluster_labels",
    "column_defect",
    "diameter",
    "effective_rank",
    "fourier_modes",
    "hull_area",
    "hull_vertices",
    "inner_products",
    "interaction_energy",
    "merge_tree",
    "order_parameter",
    "pair_correlations",
    "pair_distances",
    "sinkhorn_divergence",
    "wasserstein",
]


def __dir__() -> list[str]:
    return __all__
