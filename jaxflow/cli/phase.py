"""`jaxflow phase-diagram`: where tokens cluster, by inverse temperature and time.

The run folder holds config.json, metrics.jsonl (a line a beta), phase.npz, phase.png, and in betas/
what each finished beta gave, so that an interrupted run goes on where it was.
"""

import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import __version__, fields, viz
from .._folder import CONFIG, claim, write_bytes, write_settings, write_text
from .._memory import PAIRS_AT_ONCE, check_fits
from ..phase import PhaseDiagram, PhaseRow, crossing, phase_diagram
from .boundary import interruptible
from .console import progress, say, table
from .device import prepare
from .optional import available, figures
from .settings import to_json
from .simulate import write_figure
from .simulation import Phase

KIND, PICTURE = "phase-diagram", "phase.png"
INTERACTIONS = {"softmax": fields.Softmax(), "unnormalised": fields.Unnormalised()}
MATRICES: dict[str, Callable[[Phase], fields.AbstractMatrices | None]] = {
    "identity": lambda s: None,
    "gaussian": lambda s: fields.GaussianMatrices(s.rank),
    "goe": lambda s: fields.GOEMatrices(),
    "signed": lambda s: fields.SignedValue(),
}


def phase(s: Phase):
    """Draws the diagram of the settings, or goes on with it."""
    drawn = available(figures, PICTURE)  # now, not after the solves
    _check(s)
    prepare()
    with claim(s.resume or s.out, KIND, going_on=True if s.resume else None) as folder:
        if not (folder / CONFIG).exists():
            write_settings(folder, KIND, to_json(s) | {"jaxflow": __version__})
        start = time.perf_counter()
        diagram = _solve(folder, s)
        _write_run(folder, diagram)
        if drawn:
            write_figure(folder / PICTURE, viz.phase_diagram(diagram).get_figure(root=True))
    _summarise(diagram, time.perf_counter() - start)
    if drawn:
        say(f"Figure: {folder / PICTURE}")


def _check(s: Phase):
    """Raises an error for a threshold that rounding hides, and for what does not fit."""
    number = jnp.finfo(jnp.result_type(float))
    if 1 - s.threshold < 100 * number.eps:
        raise ValueError(
            f"1 - --threshold must be at least 100 roundings of {number.eps:.1e}, got "
            f"{1 - s.threshold:.1e}: take a lower one."
        )
    tokens = s.systems * s.n
    states = tokens * (3 * s.d + 24 * min(s.n, s.d)) + min(tokens * s.n, PAIRS_AT_ONCE)
    check_fits(
        states * number.bits // 8 + 16 * s.times * (s.betas + s.systems),
        f"a diagram of {s.systems} systems of {s.n} tokens in R^{s.d}",
        "Take fewer systems (--systems), tokens (--n), dimensions (--d), --betas or --times.",
    )


def _solve(folder: Path, s: Phase) -> PhaseDiagram:
    """The diagram, with a bar and a line of metrics for each beta."""
    betas = np.linspace(s.beta_min, s.beta_max, s.betas)
    ts = np.linspace(0, s.t1, s.times)
    say(f"{len(betas)} betas, {s.systems} systems of {s.n} tokens in R^{s.d}, {len(ts)} times.")
    clock, lines = _Clock(len(betas)), []
    with progress("betas", len(betas)) as show:

        def told(row: PhaseRow):
            lines.append(json.dumps(_metrics(ts, row)) + "\n")
            if not row.kept or len(lines) == len(betas):
                write_text(folder / "metrics.jsonl", "".join(lines))
            if (text := clock.tick(row)) is not None:
                say(text)
            show(len(lines), f"{len(lines)} of {len(betas)} betas")

        draw = partial(
            phase_diagram,
            betas,
            ts,
            n=s.n,
            d=s.d,
            systems=s.systems,
            threshold=s.threshold,
            interaction=INTERACTIONS[s.interaction],
            tolerance=s.tolerance,
            matrices=MATRICES[s.matrices](s),
            key=jax.random.key(s.seed),
            path=folder / "betas",
            progress=told,
        )
        return interruptible(draw)


class _Clock:
    """Says after the second beta that was solved for what the others will cost."""

    def __init__(self, betas: int):
        self.left, self.kept = betas, 0
        self.took: list[float] = []
        self.start = time.perf_counter()

    def tick(self, row: PhaseRow) -> str | None:
        now, self.left = time.perf_counter(), self.left - 1
        took, self.start = now - self.start, now
        if row.kept:
            self.kept += 1
            return None
        self.took.append(took)
        if len(self.took) == 1:
            return f"{self.kept} of the betas were there already." if self.kept else None
        if len(self.took) > 2:
            return None
        return (
            f"The first beta took {self.took[0]:.2g} s, compilation included, the second "
            f"{took:.2g} s: about {took * self.left:.0f} s for the other {self.left}."
        )


def _metrics(ts: np.ndarray, row: PhaseRow) -> dict[str, Any]:
    """What JSON can hold: None for a time that is not reached, and for one system's error."""
    finite = lambda x: float(x) if np.isfinite(x) else None
    return {
        "beta": row.beta,
        "half_time": finite(crossing(ts, row.probability, 0.5)),
        "probability_at_t1": float(row.probability[-1]),
        "largest_standard_error": finite(row.standard_error.max()),
    }


def _write_run(folder: Path, diagram: PhaseDiagram):
    content = io.BytesIO()
    np.savez(
        content,
        betas=diagram.betas,
        ts=diagram.ts,
        probability=diagram.probability,
        standard_error=diagram.standard_error,
        curve=diagram.curve,
    )
    write_bytes(folder / "phase.npz", content.getvalue())


def _summarise(diagram: PhaseDiagram, seconds: float):
    half = diagram.boundary()
    shown = np.unique(np.linspace(0, len(half) - 1, 7).astype(int))
    rows = [tuple(f"{x[i]:.4g}" for x in (diagram.betas, half, diagram.curve)) for i in shown]
    table("phase diagram", [("beta", "p = 1/2 at t", "equiangular tokens at t"), *rows])
    say(f"{seconds:.1f} s.")
