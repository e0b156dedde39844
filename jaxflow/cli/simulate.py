"""`jaxflow simulate`: a flow, with pictures.

The run folder holds config.json (which repeats the run: --config), metrics.jsonl (a line a saved
time), summary.png (or .pdf, .svg: --format) and flow.html; and, if asked for, merges.json and
merges.png, and a film. --save writes the times and the tokens at them to a file of its own. Without
matplotlib the figures are left out.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .. import __version__, events, observables, viz
from .._folder import claim, write_bytes, write_settings, write_text
from ..fields import AbstractField
from ..flow import FlowError, FlowSolution, flow, memory_estimate
from ..measure import Measure
from ..models import SOLVERS
from ..noise import Noise
from ..viz.style import require
from .boundary import interruptible
from .console import progress, say, table
from .device import prepare
from .optional import available, figures
from .settings import to_json
from .simulation import Simulation
from .systems import EVENTS, OBSERVABLES, initial_measure, make_field

SEGMENTS = 8  # of a solve with adaptive steps: what is done of it is shown, and kept if it stops
OUTPUTS = "metrics.jsonl", "summary.*", "flow.html", "merges.*", "film.*"


def simulate(s: Simulation):
    """Flows the tokens of the settings and writes the run folder."""
    drawn = _drawn(s)  # now, not after the flow
    prepare()
    with jax.enable_x64(s.double):
        mu0, words = initial_measure(s)
        field = make_field(s, mu0.d)
        mu0 = Measure(field.geometry.retract(mu0.points), mu0.log_weights)
        ts = _times(s)
        with claim(s.out, "simulate", going_on=None) as folder:
            for old in (path for name in OUTPUTS for path in folder.glob(name)):
                old.unlink()
            write_settings(folder, "simulate", to_json(s) | {"jaxflow": __version__})
            start = time.perf_counter()
            sol = _solve(s, field, mu0, ts, folder)
            seconds = time.perf_counter() - start
            files = _write_run(folder, sol, words, s, drawn)
            if s.merges:
                files |= _write_merges(folder, field, mu0, s, drawn)
        _summarise(sol, seconds, words, s, files)


def _drawn(s: Simulation) -> bool:
    """Whether figures can be drawn here; says what is left out. A film is asked for by name, so
    that it is an error to miss it."""
    if s.film:
        require("matplotlib.animation")
    return available(figures, f"summary.{s.format}" + f" and merges.{s.format}" * s.merges)


# ------------------------------------------------------------------ the solve


def _times(s: Simulation) -> np.ndarray:
    """The saved times, from 0 on."""
    log = s.log_time
    ts = (
        events.log_times(1e-4 * s.t1, s.t1, s.frames - 1)
        if log
        else jnp.linspace(0, s.t1, s.frames)
    )
    ts = np.asarray(ts)
    if (np.diff(ts) <= 0).any():
        raise ValueError(
            f"--frames {s.frames} times from 0 to {s.t1:g} are not distinct in {ts.dtype}: take "
            "fewer" + (", or --double." if not s.double else ".")
        )
    return ts


def _segments(s: Simulation, ts: np.ndarray) -> Iterator[np.ndarray]:
    """The times of each segment, with both ends. All have one length, so that they share a program:
    the last one repeats t1. Fixed steps are not cut."""
    size = math.ceil((len(ts) - 1) / (SEGMENTS if s.dt is None else 1))
    for k in range(0, len(ts) - 1, size):
        yield np.pad(ts[k : k + size + 1], (0, max(0, k + size + 1 - len(ts))), "edge")


def _solve(
    s: Simulation, field: AbstractField, mu0: Measure, ts: np.ndarray, folder: Path
) -> FlowSolution:
    """The flow, with its cost said first. If it is stopped, metrics.jsonl holds what was done."""
    names = ["energy", "clusters", *map(str, s.observe or [])]
    observe = {name: OBSERVABLES[name](s, field) for name in names}
    parts: list[FlowSolution] = []
    _announce(field, mu0, s)
    try:
        with progress("flowing", s.t1) as show:
            for times in _segments(s, ts):
                start = parts[-1].measures[-1] if parts else mu0
                parts.append(interruptible(_segment, s, field, start, times, observe))
                reached, steps = _reached(parts[-1]), sum(_steps_of(part) for part in parts)
                show(reached, f"flowing, t = {reached:.4g} of {s.t1:g}")
                if np.any(parts[-1].event_mask):
                    break
                if steps > s.max_steps:
                    stiff = "" if "kvaerno" in s.solver else ", or take --solver kvaerno5 if stiff"
                    raise FlowError(
                        f"the flow stopped at t = {reached:.6g} of t1 = {s.t1:g} after {steps} "
                        f"steps, and --max-steps is {s.max_steps}. Raise it, loosen --rtol{stiff}."
                    )
    except BaseException:
        if parts:
            _write_metrics(folder, sol := _joined(parts))
            say(f"{folder / 'metrics.jsonl'} holds the flow up to t = {_reached(sol):.6g}.")
        raise
    return _joined(parts)


def _segment(s, field, mu0, times, observe) -> FlowSolution:
    start, end = float(times[0]), float(times[-1])
    try:
        return flow(
            field,
            mu0,
            t0=start,
            t1=end,
            # The last time is the end, or that of the event.
            saveat=diffrax.SaveAt(ts=jnp.asarray(times[:-1]), t1=True),
            event=EVENTS[s.until](s),
            observe=observe,
            noise=_noise(s),
            **_steps(s),
        )
    except FlowError as error:
        raise FlowError(f"from t = {start:.6g} to {end:.6g} of {s.t1:g}: {error}") from None


def _noise(s: Simulation) -> Noise | None:
    """The noise of --kappa, by a key that is not that of the first tokens."""
    if s.kappa is None:
        return None
    key = jax.random.fold_in(jax.random.key(s.seed), 1)
    return Noise(s.kappa, key=key, common=s.noise == "common")


def _steps(s: Simulation) -> dict[str, Any]:
    """How the run steps, in the words of `flow` and `merges`."""
    adaptive = diffrax.PIDController(s.rtol, s.rtol)
    return {
        "dt0": s.dt,
        "solver": SOLVERS[s.solver],
        "stepsize_controller": adaptive if s.dt is None else diffrax.ConstantStepSize(),
        "max_steps": s.max_steps,
    }


def _steps_of(sol: FlowSolution) -> int:
    return int(sol.stats["num_steps"])


def _reached(sol: FlowSolution) -> float:
    ts = np.asarray(sol.ts)
    return float(ts[np.isfinite(ts)][-1])


def _joined(parts: list[FlowSolution]) -> FlowSolution:
    """The segments as one flow, without times that were not reached and those that repeat."""
    ts = np.concatenate([part.ts for part in parts])
    reached = np.where(np.isfinite(ts), ts, -np.inf)
    new = np.append(True, reached[1:] > np.maximum.accumulate(reached)[:-1])
    both = [(part.measures.points, part.observed) for part in parts]
    joined = lambda *arrays: jnp.asarray(np.concatenate(arrays)[new])
    points, observed = jax.tree.map(joined, *both)
    last = parts[-1]
    counts = {
        name: None if value is None else sum(part.stats[name] for part in parts)
        for name, value in last.stats.items()
        if name.startswith("num_")
    }
    return dataclasses.replace(
        last,
        t0=parts[0].t0,
        ts=jnp.asarray(ts[new]),
        measures=Measure(points, last.log_weights),
        observed=observed,
        stats=last.stats | counts,
    )


def _announce(field: AbstractField, mu0: Measure, s: Simulation):
    """What the run will cost, before it starts."""
    velocity = eqx.filter_jit(lambda field, mu: field(0.0, mu.points, mu))
    interruptible(velocity, field, mu0)
    start = time.perf_counter()
    interruptible(velocity, field, mu0)
    milliseconds = 1e3 * (time.perf_counter() - start)
    megabytes = memory_estimate(mu0, saveat=diffrax.SaveAt(ts=jnp.zeros(s.frames))) / 1e6
    say(
        f"{mu0.n} tokens in R^{mu0.d}: {milliseconds:.2g} ms an evaluation of the field, about "
        f"{megabytes:.2g} MB of states. Solves take some hundred to some thousand evaluations."
    )


# ------------------------------------------------------------------ what is written


def _rows(sol: FlowSolution) -> list[dict[str, float]]:
    """What was measured at each time."""
    columns = {"t": sol.ts} | sol.observed
    values = {name: np.asarray(column).tolist() for name, column in columns.items()}
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _write_metrics(folder: Path, sol: FlowSolution):
    lines = [json.dumps(row | {"clusters": int(row["clusters"])}) for row in _rows(sol)]
    write_text(folder / "metrics.jsonl", "\n".join(lines) + "\n")


def write_figure(path: Path, figure: Any):
    """Writes a picture of matplotlib, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format=path.suffix.removeprefix(".").lower())
    write_bytes(path, content.getvalue())


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place to write a file, which gets its name when it is whole."""
    work = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def _write_run(
    folder: Path, sol: FlowSolution, words, s: Simulation, drawn: bool
) -> dict[str, str]:
    _write_metrics(folder, sol)
    page = viz.sphere(sol, labels=words, threshold=s.threshold)
    write_text(folder / "flow.html", page.html)
    size = f"{len(page.html) / 1e6:.1f} MB"
    files = {"page": f"{folder / 'flow.html'} ({size}, open it in a browser)"}
    if drawn:
        summary = folder / f"summary.{s.format}"
        write_figure(summary, viz.summary(sol, threshold=s.threshold))
        files["figure"] = str(summary)
    if s.save is not None:
        _save_points(s.save, sol)
        files["points"] = str(s.save)
    if s.film:
        ending = ".mp4" if require("matplotlib.animation").FFMpegWriter.isAvailable() else ".gif"
        with progress("film") as show, _beside(folder / f"film{ending}") as work:
            told = lambda done, frames: show(done, f"film: {done} of {frames} frames")
            viz.film(sol, work, threshold=s.threshold, progress=told)
        files["film"] = str(folder / f"film{ending}")
    return files


def _save_points(path: Path, sol: FlowSolution):
    """ts (t,) and points (t, n, d); tokens of a simulation have one weight."""
    assert isinstance(sol.measures, Measure)
    content = io.BytesIO()
    np.savez(content, ts=np.asarray(sol.ts), points=np.asarray(sol.measures.points))
    write_bytes(path, content.getvalue())


def _write_merges(folder: Path, field, mu0: Measure, s: Simulation, drawn: bool) -> dict[str, str]:
    with progress("merges", s.t1) as show:
        tree = interruptible(_merges, s, field, mu0, show)
    links = [] if tree.links is None else tree.links.tolist()
    merged = zip(tree.times.tolist(), links, tree.sizes.tolist(), strict=True)
    rows = [{"t": t, "tokens": link, "size": size} for t, link, size in merged]
    write_text(folder / "merges.json", json.dumps(rows, indent=1) + "\n")
    if not rows or not drawn:
        return {"merges": f"{len(rows) or 'none'}, {folder / 'merges.json'}"}
    figure = viz.merge_tree(tree).get_figure(root=True)
    picture = folder / f"merges.{s.format}"
    write_figure(picture, figure)
    return {"merges": f"{len(rows)}, {folder / 'merges.json'}, {picture}"}


def _merges(s, field, mu0, show) -> observables.MergeTree:
    told = lambda t, left: show(t, f"merges: t = {t:.4g}, {left} clusters left")
    return events.merges(field, mu0, t1=s.t1, threshold=s.threshold, progress=told, **_steps(s))


def _summarise(sol: FlowSolution, seconds: float, words, s: Simulation, files: dict[str, str]):
    rows, last = _rows(sol), sol.last
    stopped = f", stopped by --until {s.until}" if np.any(sol.event_mask) else ""
    lines = [("tokens", f"{last.n} in R^{last.d}"), ("time", f"{rows[-1]['t']:.6g}{stopped}")]
    for name, first in list(rows[0].items())[1:]:
        lines.append((name, f"{first:.6g} at t = 0, {rows[-1][name]:.6g} at the end"))
    evaluations = sol.stats["num_evaluations"]
    lines += [
        ("steps", _steps_of(sol)),
        ("evaluations", evaluations or "not counted by implicit solvers"),
        ("wall time", f"{seconds:.1f} s, compilation included"),
        *files.items(),
    ]
    table("flow", lines)
    if words is not None:
        _summarise_text(np.asarray(observables.cluster_labels(last, s.threshold)), words)


def _summarise_text(labels: np.ndarray, words: list[str]):
    rows = [("cluster", "tokens", "its words")]
    for label, size in Counter(labels.tolist()).most_common(6):
        members = Counter(w.lower() for w, c in zip(words, labels, strict=True) if c == label)
        rows.append((str(label), str(size), ", ".join(w for w, _ in members.most_common(10))))
    table("largest clusters of the text", rows)
