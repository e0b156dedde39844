"""How fast each normalisation lets tokens collapse (arXiv 2510.22026).

The same attention moves equiangular tokens under each scheme; 1 - rho then falls like

    Post-LN e^{-2t}   nGPT e^{-2 alpha t}   sqrt-scaling e^{-4 sqrt(t+1)}   Pre-LN, Peri-LN t^{-2}
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import diffrax
import numpy as np

from ..fields import (
    NGPT,
    AbstractField,
    PeriNorm,
    PostNorm,
    PreNorm,
    SelfAttention,
    SqrtScaling,
    UnitNorm,
)
from ..geometry import Euclidean
from ..measure import Measure, simplex
from .base import Outcome, Result, Row, Scheme, Seconds, exact, panels, published

N, BETA, ALPHA = 16, 1.0, 0.5


class _Scheme(NamedTuple):
    """1 - rho falls like e^{rate clock(t)}: asked between the times `late`."""

    field: AbstractField
    clock: Callable[[np.ndarray], np.ndarray]
    rate: float
    late: tuple[float, float]


def run(quick: bool) -> Outcome:
    rows, curves = [], []
    for name, scheme in schemes().items():
        start, end = scheme.late
        ts = np.concatenate([np.geomspace(0.1, 0.99 * start, 40), [start, end]])
        gap = gaps(scheme.field, ts)
        clock = scheme.clock(ts)
        found = float((np.log(gap[-1]) - np.log(gap[-2])) / (clock[-1] - clock[-2]))
        rows.append(Row(f"rate of {name}", found, scheme.rate, 0.01, "what is not late yet, 0.5 %"))
        curves.append((name, ts, gap, np.diff(np.log(gap)) / np.diff(clock) / scheme.rate))
    return Outcome(rows, partial(draw, curves), [_published()])


def draw(curves):
    figure, (left, right) = panels(2)
    for name, ts, gap, rates in curves:
        left.loglog(ts, gap, label=name)
        right.semilogx(gap[1:], rates, label=name)
    left.set(xlabel="$t$", ylabel=r"$1 - \rho$", ylim=(1e-12, 2))
    right.axhline(1, color="grey", lw=0.8)
    right.set(xlabel=r"$1 - \rho$", ylabel="rate, measured / theory", ylim=(0, 1.3))
    right.invert_xaxis()
    for axes in (left, right):
        axes.legend()
    return figure


def _published() -> Scheme:
    """A published step divides the distance of near tokens by 1 + h, not by e^h."""
    ts, x = published(SelfAttention(beta=BETA), simplex(N, N), 80)
    logs = np.log(((x[[60, 80], 0] - x[[60, 80], 1]) ** 2).sum(axis=1))
    return Scheme("rate of Post-LN", float((logs[1] - logs[0]) / (ts[80] - ts[60])), -2.0)


def schemes() -> dict[str, _Scheme]:
    flat, unit = SelfAttention(beta=BETA, geometry=Euclidean()), UnitNorm()
    post, pre = PostNorm(flat), PreNorm(flat, unit)
    root = lambda t: np.sqrt(t + 1)
    return {
        "Post-LN": _Scheme(post, np.asarray, -2.0, (6.0, 8.0)),
        "nGPT": _Scheme(NGPT(flat, ALPHA), np.asarray, -2 * ALPHA, (12.0, 16.0)),
        "sqrt-scaling": _Scheme(SqrtScaling(post), root, -4.0, (15.0, 24.0)),
        "Pre-LN": _Scheme(pre, np.log, -2.0, (1e4, 1e5)),
        "Peri-LN": _Scheme(PeriNorm(pre, unit), np.log, -2.0, (1e4, 1e5)),
    }


def gaps(field: AbstractField, ts: np.ndarray) -> np.ndarray:
    """1 - rho, from |theta_1 - theta_2|^2 / 2: without cancellation."""
    tight = diffrax.PIDController(rtol=1e-10, atol=1e-13)
    return np.asarray(gap(exact(field, simplex(N, N), ts, stepsize_controller=tight).measures))


def gap(mu: Measure):
    theta = UnitNorm()(mu.points[..., :2, :])
    return ((theta[..., 0, :] - theta[..., 1, :]) ** 2).sum(axis=-1) / 2


RESULT = Result(
    "normalisation",
    "2510.22026",
    "five normalisation schemes, and how fast tokens collapse under each",
    Seconds(29, 29),
    run,
)
