"""Linear response: how fast a law departs from where it is at rest, or nearly.

    growth_rates       modes off the uniform law of the sphere, for any field without a direction
    fastest_mode       the one of them that leads, and its rate
    wave_rates         plane waves off the uniform density of R^d
    predict_clusters   how many clusters nearly uniform tokens on the circle form, where and when
    jacobian_spectrum  rates of n tokens together, at any configuration

Along a flow the rates are Lyapunov exponents: `jaxflow.lyapunov_exponents`.
"""

from .jacobian import jacobian_spectrum
from .prediction import ClusterPrediction, predict_clusters
from .uniform import Mode, fastest_mode, growth_rates, wave_rates

__all__ = [
    "ClusterPrediction",
    "Mode",
    "fastest_mode",
    "growth_rates",
    "jacobian_spectrum",
    "predict_clusters",
    "wave_rates",
]


def __dir__() -> list[str]:
    return __all__
