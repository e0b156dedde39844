"""Where tokens meet, over beta and t (arXiv 2312.10794, section 6), with its published axes.

32 uniform tokens on S^{d-1}; p(beta, t) is the probability that <x_i, x_j> >= 0.999. For large d
they are nearly at right angles and meet near the time of equiangular tokens, late or early by a
share e^{beta^2 / (2 d)} - 1 of it at most, as the scores beta <x_i, x_j> have variance beta^2 / d.

With Q and K drawn from N(0, 1/d) the scores beta <Q x, K y> have variance beta^2 / d at all times,
so that for d -> infinity attention averages, and the time is that of beta = 0 whatever beta is:
this is derived here, with the same share as tolerance. Of V drawn as well nothing is expected: the
last panel shows what happens.
"""

from functools import partial

import jax
import numpy as np

from ..events import until_above
from ..fields import GaussianMatrices, SelfAttention
from ..measure import simplex
from ..phase import PhaseDiagram, equiangular_time, phase_diagram
from ..viz import phase_diagram as draw_diagram
from .base import Outcome, Result, Row, Scheme, Seconds, first_time, panels, published, time_of

N, MET, D = 32, 0.999, 1024
CHECKED = (1.0, 3.0, 5.0)
RANDOM_D = 128


def run(quick: bool) -> Outcome:
    axes = {"systems": 8 if quick else 32, "n": N, "key": jax.random.key(0)}
    shown, times = (18, 101) if quick else (90, 200)
    betas, ts = np.linspace(0.1, 9, shown), np.linspace(0, 30, times)
    identity = [phase_diagram(betas, ts, d=d, **axes) for d in ((D,) if quick else (8, 128, D))]
    checked = phase_diagram(CHECKED, np.linspace(0, 12, 241), d=D, **axes)
    law, fine = GaussianMatrices(), np.linspace(0, 9, 181)
    random = phase_diagram(CHECKED[:2], fine, d=RANDOM_D, matrices=law, **axes)
    moved = GaussianMatrices(value=True)
    few = {**axes, "systems": 4}
    free = phase_diagram(betas[:: 3 if quick else 9], ts[::4], d=16, matrices=moved, **few)
    rows = [_equiangular(), *_boundaries(checked), *_random(random)]
    return Outcome(rows, partial(draw, [*identity, free]), [_scheme()])


def draw(diagrams: list[PhaseDiagram]):
    """The last one is of random matrices."""
    figure, axes = panels(len(diagrams))
    for axis, diagram in zip(axes, diagrams, strict=True):
        draw_diagram(diagram, ax=axis)
    axes[-1].set_title(f"random Q, K, V, $n$ = {N}, $d$ = 16")
    axes[-1].get_legend().remove()  # of the curve, which there is none of
    return figure


def _equiangular() -> Row:
    """32 tokens at right angles meet at one time, 6.95350 at beta = 4."""
    event = until_above(lambda t, mu: mu.points[0] @ mu.points[1], MET)
    found = time_of(event, SelfAttention(beta=4.0), simplex(N, N), 20.0)
    expected = float(equiangular_time([4.0], n=N, threshold=MET)[0])
    return Row(
        "t at which 32 tokens at right angles meet, beta = 4",
        found,
        expected,
        1e-6,
        "the tolerance of the solver, 1e-9 a step, over some hundred steps",
    )


def _boundaries(diagram: PhaseDiagram) -> list[Row]:
    return [
        Row(
            f"t at which p = 1/2, d = {D}, beta = {beta:g}",
            float(half),
            float(curve),
            float(diagram.ts[1] + np.expm1(beta**2 / (2 * D)) * curve),
            "the step of the times, and the variance of the scores",
        )
        for beta, half, curve in zip(diagram.betas, diagram.boundary(), diagram.curve, strict=True)
    ]


def _random(diagram: PhaseDiagram) -> list[Row]:
    free = float(equiangular_time([0.0], n=N, threshold=MET)[0])
    return [
        Row(
            f"t at which p = 1/2, random Q and K, d = {RANDOM_D}, beta = {beta:g}",
            float(half),
            free,
            float(diagram.ts[1] + np.expm1(beta**2 / (2 * RANDOM_D)) * free),
            "the step of the times, and the variance of the scores",
        )
        for beta, half in zip(diagram.betas, diagram.boundary(), strict=True)
    ]


def _scheme() -> Scheme:
    ts, points = published(SelfAttention(beta=4.0), simplex(N, N), 100)
    late = first_time(ts, (points[:, 0] * points[:, 1]).sum(axis=1), MET)
    early = float(equiangular_time([4.0], n=N, threshold=MET)[0])
    return Scheme("t at which 32 tokens at right angles meet, beta = 4", late, early)


RESULT = Result(
    "phase-boundary",
    "2312.10794",
    "when 32 tokens meet, by beta: the boundary in d = 1024, and with random Q, K, V",
    Seconds(45, 120),
    run,
    "of the paper",
)
