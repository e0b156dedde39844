"""`jaxflow simulate`: a flow, with pictures.

The run folder holds config.json, metrics.jsonl (a line a saved time), summary.png and flow.html.
"""

import enum
import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__, fields, measure, observables, viz
from ..flow import FlowSolution, flow, memory_estimate
from ..measure import Measure
from .console import console

INTERACTIONS = {
    "softmax": fields.Softmax(),
    "unnormalised": fields.Unnormalised(),
    "linear": fields.Linear(),
    "hardmax": fields.Hardmax(),
    "sinkhorn": fields.Sinkhorn(),
}
SOLVERS = {
    "tsit5": diffrax.Tsit5(),
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
    "heun": diffrax.Heun(),
    "euler": diffrax.Euler(),
    "kvaerno5": diffrax.Kvaerno5(),
}
Interaction = enum.StrEnum("Interaction", list(INTERACTIONS))
Solver = enum.StrEnum("Solver", list(SOLVERS))


def simulate(
    n: Annotated[int, typer.Option(help="Number of tokens (without --text).")] = 256,
    d: Annotated[int, typer.Option(help="Dimension of a token.")] = 3,
    beta: Annotated[float, typer.Option(help="Inverse temperature.")] = 4.0,
    t1: Annotated[float, typer.Option(help="Time to flow to.")] = 15.0,
    interaction: Annotated[
        Interaction, typer.Option(help="How a query weighs the tokens.")
    ] = Interaction["softmax"],
    repulsive: Annotated[bool, typer.Option(help="Take V = -I instead of I.")] = False,
    causal: Annotated[bool, typer.Option(help="Token i sees the tokens up to i.")] = False,
    solver: Annotated[Solver, typer.Option(help="diffrax solver.")] = Solver["tsit5"],
    rtol: Annotated[float, typer.Option(help="Relative and absolute tolerance.")] = 1e-5,
    dt: Annotated[float | None, typer.Option(help="Fixed step (default: adaptive steps).")] = None,
    max_steps: Annotated[int, typer.Option(help="Most steps of the solver.")] = 100_000,
    frames: Annotated[int, typer.Option(help="Number of saved times.")] = 121,
    threshold: Annotated[
        float, typer.Option(help="Tokens with a larger cosine are linked into a cluster.")
    ] = 0.999,
    text: Annotated[
        Path | None,
        typer.Option(help="A text file: its words become the tokens.", exists=True, dir_okay=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="With --text: words read at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder (default: runs/DATE-TIME).")] = None,
):
    """Flow tokens on the sphere by self-attention, and draw what they do.

    Examples:

    `jaxflow simulate --n 512 --d 3 --beta 9 --t1 30`

    `jaxflow simulate --text README.md --d 32 --beta 8 --t1 20`

    `jaxflow simulate --n 64 --d 2 --interaction unnormalised --solver kvaerno5`
    """
    if frames < 2:
        raise typer.BadParameter("a picture over time needs at least 2 frames.")
    config = dict(sorted(locals().items())) | {"jaxflow": __version__}
    key = jax.random.key(seed)
    words = None
    if text is None:
        mu0 = measure.uniform_sphere(n, d, key=key)
    else:
        mu0, words = measure.from_text(text.read_text(), d, key=key, max_tokens=max_tokens)
    field = fields.SelfAttention(
        value=-jnp.eye(d) if repulsive else None,
        beta=beta,
        interaction=INTERACTIONS[interaction],
        causal=causal,
    )
    fixed = dt is not None
    controller = diffrax.ConstantStepSize() if fixed else diffrax.PIDController(rtol, rtol)
    saveat = diffrax.SaveAt(ts=jnp.linspace(0, t1, frames))
    _announce(field, mu0, SOLVERS[solver], saveat)
    start = time.perf_counter()
    with Progress(
        TextColumn("flowing"),
        BarColumn(),
        TextColumn("t = {task.completed:.3g} of {task.total:g}"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        meter = RichProgressMeter(bar, bar.add_task("flow", total=t1), t1)
        sol = flow(
            field,
            mu0,
            t1=t1,
            dt0=dt,
            solver=SOLVERS[solver],
            stepsize_controller=controller,
            saveat=saveat,
            max_steps=max_steps,
            progress_meter=meter,
            observe={
                "energy": observables.InteractionEnergy(beta or 1.0),
                "clusters": observables.ClusterCount(threshold),
            },
        )
        jax.block_until_ready(sol.measures.points)
        jax.effects_barrier()
        bar.update(meter.task, completed=t1)
    seconds = time.perf_counter() - start
    folder = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    _write_run(folder, config, sol, words, threshold)
    _summarise(sol, seconds, folder, words, threshold)


def _announce(field, mu0: Measure, solver, saveat):
    """What the run will cost, before it starts."""
    velocity = jax.jit(lambda mu: field(0.0, mu.points, mu))
    jax.block_until_ready(velocity(mu0))
    start = time.perf_counter()
    jax.block_until_ready(velocity(mu0))
    seconds = time.perf_counter() - start
    megabytes = memory_estimate(mu0, solver=solver, saveat=saveat) / 1e6
    console.print(
        f"{mu0.n} tokens in R^{mu0.d}: {1e3 * seconds:.2g} ms an evaluation of the field, about "
        f"{megabytes:.2g} MB of states. Solves take some hundred to some thousand evaluations."
    )


class RichProgressMeter(diffrax.AbstractProgressMeter):
    """Shows how far a solve is in a rich progress bar."""

    bar: Progress
    task: Any
    t1: float

    def init(self):
        return jnp.asarray(0.0)

    def step(self, state, progress):
        """Shows each further percent."""

        def show():
            jax.debug.callback(
                lambda p: self.bar.update(self.task, completed=float(p) * self.t1), progress
            )
            return jnp.asarray(progress, state.dtype)

        return jax.lax.cond(progress >= state + 0.01, show, lambda: state)

    def close(self, state):
        pass


def _write_run(folder: Path, config, sol: FlowSolution, words, threshold):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    with (folder / "metrics.jsonl").open("w") as lines:
        for t, energy, clusters in _rows(sol):
            row = {"t": t, "energy": energy, "clusters": clusters}
            lines.write(json.dumps(row) + "\n")
    viz.summary(sol).savefig(folder / "summary.png", dpi=120)
    viz.sphere(sol, labels=words, threshold=threshold).write_html(folder / "flow.html")


def _rows(sol: FlowSolution):
    columns = sol.ts, sol.observed["energy"], sol.observed["clusters"]
    for t, energy, clusters in zip(*map(np.asarray, columns), strict=True):
        yield float(t), float(energy), int(clusters)


def _summarise(sol: FlowSolution, seconds: float, folder: Path, words, threshold):
    rows = list(_rows(sol))
    last = sol.measures[-1]
    norms = np.linalg.norm(np.asarray(last.points), axis=1)
    table = Table(show_header=False, title="flow")
    for name, value in {
        "tokens": f"{last.n} in R^{last.d}",
        "clusters": f"{rows[0][2]} at t = 0, {rows[-1][2]} at t = {rows[-1][0]:g}",
        "energy": f"{rows[0][1]:.6g} at t = 0, {rows[-1][1]:.6g} at the end",
        "steps": f"{int(sol.stats['num_steps'])}",
        "evaluations": str(sol.stats["num_evaluations"] or "not counted by implicit solvers"),
        "largest | |x| - 1 |": f"{np.abs(norms - 1).max():.1e}",
        "wall time": f"{seconds:.1f} s, compilation included",
        "figure": str(folder / "summary.png"),
        "page": f"{folder / 'flow.html'} (open it in a browser)",
    }.items():
        table.add_row(name, value)
    console.print(table)
    if words is not None:
        labels = np.asarray(observables.cluster_labels(last, threshold))
        table = Table("cluster", "tokens", "its words", title="largest clusters of the text")
        for label, size in Counter(labels.tolist()).most_common(6):
            members = Counter(w.lower() for w, c in zip(words, labels, strict=True) if c == label)
            shown = ", ".join(w for w, _ in members.most_common(10))
            table.add_row(str(label), str(size), shown)
        console.print(table)
