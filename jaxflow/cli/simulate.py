"""`jaxflow simulate`: a flow, with pictures.

The run folder holds config.json (which repeats the run: --config), metrics.jsonl (a line a saved
time), summary.png and flow.html; and, if asked for, merges.json and merges.png, and a film.
"""

import enum
import json
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__, events, observables, viz
from ..flow import FlowSolution, flow, memory_estimate
from ..measure import Measure
from .console import console
from .systems import (
    EVENTS,
    GEOMETRIES,
    INTERACTIONS,
    LAWS,
    OBSERVABLES,
    SCHEMES,
    SOLVERS,
    initial_measure,
    make_field,
)

if TYPE_CHECKING:
    from typer import Context
else:
    Context = typer.Context.__base__  # typer hands over an instance of this class

COMMAND = "simulate"
Interaction = enum.StrEnum("Interaction", list(INTERACTIONS))
Solver = enum.StrEnum("Solver", list(SOLVERS))
Law = enum.StrEnum("Law", list(LAWS))
Geometry = enum.StrEnum("Geometry", list(GEOMETRIES))
Scheme = enum.StrEnum("Scheme", list(SCHEMES))
Observable = enum.StrEnum("Observable", list(OBSERVABLES))
Until = enum.StrEnum("Until", list(EVENTS))


def simulate(
    ctx: Context,
    n: Annotated[int, typer.Option(help="Number of tokens.")] = 256,
    d: Annotated[int, typer.Option(help="Dimension of a token.")] = 3,
    law: Annotated[Law, typer.Option(help="Law of the first tokens.")] = Law["uniform"],
    text: Annotated[
        Path | None,
        typer.Option(help="A text file: its words are the tokens.", exists=True, dir_okay=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="With --text: words read at most.")] = 512,
    image: Annotated[
        Path | None,
        typer.Option(help="An image: its patches are the tokens.", exists=True, dir_okay=False),
    ] = None,
    patch: Annotated[int, typer.Option(help="With --image: side of a patch in pixels.")] = 8,
    beta: Annotated[float, typer.Option(help="Inverse temperature.")] = 4.0,
    interaction: Annotated[
        Interaction, typer.Option(help="How a query weighs the tokens.")
    ] = Interaction["softmax"],
    repulsive: Annotated[bool, typer.Option(help="Take V = -I instead of I.")] = False,
    causal: Annotated[bool, typer.Option(help="Token i sees the tokens up to i.")] = False,
    normalisation: Annotated[Scheme, typer.Option(help="How tokens are normalised.")] = Scheme[
        "post"
    ],
    alpha: Annotated[float, typer.Option(help="With --normalisation ngpt: its step.")] = 1.0,
    geometry: Annotated[
        Geometry | None, typer.Option(help="Where tokens live (default: as normalised).")
    ] = None,
    t1: Annotated[float, typer.Option(help="Time to flow to.")] = 15.0,
    until: Annotated[Until, typer.Option(help="Stop before t1.")] = Until["never"],
    clusters: Annotated[int, typer.Option(help="With --until clustered: this number.")] = 1,
    speed: Annotated[float, typer.Option(help="With --until steady: of the fastest token.")] = 1e-6,
    solver: Annotated[Solver, typer.Option(help="One-step method.")] = Solver["tsit5"],
    rtol: Annotated[float, typer.Option(help="Relative and absolute tolerance.")] = 1e-5,
    dt: Annotated[float | None, typer.Option(help="Fixed step (default: adaptive steps).")] = None,
    max_steps: Annotated[int, typer.Option(help="Most steps of the solver.")] = 100_000,
    double: Annotated[bool, typer.Option(help="Compute in double precision.")] = False,
    frames: Annotated[int, typer.Option(help="Number of saved times.", min=2)] = 121,
    log_time: Annotated[bool, typer.Option(help="Save evenly in log t.")] = False,
    threshold: Annotated[
        float, typer.Option(help="Tokens with a larger cosine are linked into a cluster.")
    ] = 0.999,
    observe: Annotated[
        list[Observable] | None, typer.Option(help="Measure this too; repeatable.")
    ] = None,
    merges: Annotated[bool, typer.Option(help="Find the time and pair of each merge.")] = False,
    film: Annotated[bool, typer.Option(help="Write a film too.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option(
            help="config.json of another run: its settings, but for the flags given.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder (default: runs/DATE-TIME).")] = None,
):
    """Flow tokens by self-attention, and draw what they do.

    Examples:

    `jaxflow simulate --n 512 --d 3 --beta 9 --t1 30`

    `jaxflow simulate --n 16 --d 2 --beta 9 --t1 1e7 --log-time --double --solver kvaerno5 --merges`

    `jaxflow simulate --n 64 --until clustered --t1 1000 --observe order --observe entropy`

    `jaxflow simulate --normalisation pre --observe diameter --film`

    `jaxflow simulate --text README.md --d 32 --beta 8 --t1 20`

    `jaxflow simulate --image photo.png --patch 8 --beta 4`

    `jaxflow simulate --config runs/first/config.json --beta 2`
    """
    settings = _settings(ctx)
    folder = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    described = {"command": COMMAND} | settings | {"jaxflow": __version__}
    with jax.enable_x64(settings["double"]):
        _run(SimpleNamespace(**settings), folder, described)


def _run(s: SimpleNamespace, folder: Path, described: dict[str, Any]):
    mu0, words = initial_measure(s)
    field = make_field(s, mu0.d)
    mu0 = Measure(field.geometry.retract(mu0.points), mu0.log_weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    start = time.perf_counter()
    sol = _solve(s, field, mu0)
    seconds = time.perf_counter() - start
    files = _write_run(folder, sol, words, s)
    if s.merges:
        files |= _write_merges(folder, field, mu0, s)
    _summarise(sol, seconds, words, s, files)


# ------------------------------------------------------------------ settings


def _settings(ctx: Context) -> dict[str, Any]:
    """The settings of a run as JSON: those of --config, but for the flags given."""
    flags = {k: _json(v) for k, v in sorted(ctx.params.items()) if k not in ("config", "out")}
    if (path := ctx.params["config"]) is None:
        return flags
    kept = json.loads(path.read_text())
    if kept.pop("command", COMMAND) != COMMAND:
        raise typer.BadParameter(f"{path} is not of a run of `jaxflow simulate`.")
    if (version := kept.pop("jaxflow", None)) != __version__:
        console.print(f"{path} was written by jaxflow {version}; this is {__version__}.")
    if unknown := set(kept) - set(flags):
        raise typer.BadParameter(f"{path} has settings that are not known: {sorted(unknown)}.")
    sources = {k: ctx.get_parameter_source(k) for k in flags}
    given = {k for k, source in sources.items() if source and source.name == "COMMANDLINE"}
    return flags | {k: v for k, v in kept.items() if k not in given}


def _json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    return value.value if isinstance(value, enum.Enum) else value


# ------------------------------------------------------------------ the solve


def _solve(s: SimpleNamespace, field, mu0: Measure) -> FlowSolution:
    """The flow, with its cost said first and a bar of its progress."""
    ts = events.log_times(1e-4 * s.t1, s.t1, s.frames - 1) if s.log_time else None
    ts = jnp.linspace(0, s.t1, s.frames) if ts is None else ts
    # The last time is t1, or that of the event.
    saveat = diffrax.SaveAt(ts=ts[:-1], t1=True)
    names: list[str] = ["energy", "clusters", *(s.observe or [])]
    _announce(field, mu0, SOLVERS[s.solver], saveat)
    columns = TextColumn("t = {task.completed:.3g} of {task.total:g}"), TimeElapsedColumn()
    with Progress(TextColumn("flowing"), BarColumn(), *columns, console=console) as bar:
        meter = RichProgressMeter(bar, bar.add_task("flow", total=s.t1), s.t1)
        sol = flow(
            field,
            mu0,
            t1=s.t1,
            saveat=saveat,
            event=EVENTS[s.until](s),
            progress_meter=meter,
            observe={name: OBSERVABLES[name](s, field) for name in names},
            **_steps(s),
        )
        jax.block_until_ready(sol.measures.points)
        jax.effects_barrier()
        bar.update(meter.task, completed=float(sol.ts[jnp.isfinite(sol.ts)][-1]))
    return sol


def _steps(s: SimpleNamespace) -> dict[str, Any]:
    """How the run steps, in the words of `flow` and `merges`."""
    adaptive = s.dt is None
    return {
        "dt0": s.dt,
        "solver": SOLVERS[s.solver],
        "stepsize_controller": diffrax.PIDController(s.rtol, s.rtol)
        if adaptive
        else diffrax.ConstantStepSize(),
        "max_steps": s.max_steps,
    }


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


# ------------------------------------------------------------------ what is written


def _rows(sol: FlowSolution) -> list[dict[str, float]]:
    """What was measured at each time that was reached."""
    columns = {"t": sol.ts} | sol.observed
    reached = np.isfinite(np.asarray(sol.ts))
    values = {name: np.asarray(column)[reached].tolist() for name, column in columns.items()}
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def _write_run(folder: Path, sol: FlowSolution, words, s) -> dict[str, str]:
    lines = [json.dumps(row | {"clusters": int(row["clusters"])}) for row in _rows(sol)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    viz.summary(sol, threshold=s.threshold).savefig(folder / "summary.png", dpi=120)
    viz.sphere(sol, labels=words, threshold=s.threshold).write_html(folder / "flow.html")
    files = {
        "figure": str(folder / "summary.png"),
        "page": f"{folder / 'flow.html'} (open it in a browser)",
    }
    if s.film:
        with console.status("film") as status:
            told = lambda done, frames: status.update(f"film: {done} of {frames} frames")
            path = viz.film(sol, folder / "film", threshold=s.threshold, progress=told)
        files["film"] = str(path)
    return files


def _write_merges(folder: Path, field, mu0: Measure, s) -> dict[str, str]:
    with console.status("merges") as status:
        tree = events.merges(
            field,
            mu0,
            t1=s.t1,
            threshold=s.threshold,
            progress=lambda t, left: status.update(f"merges: t = {t:.4g}, {left} clusters left"),
            **_steps(s),
        )
    links = [] if tree.links is None else tree.links.tolist()
    merged = zip(tree.times.tolist(), links, tree.sizes.tolist(), strict=True)
    rows = [{"t": t, "tokens": link, "size": size} for t, link, size in merged]
    (folder / "merges.json").write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        return {"merges": f"none, {folder / 'merges.json'}"}
    figure = viz.merge_tree(tree).get_figure(root=True)
    assert figure is not None
    figure.savefig(folder / "merges.png", dpi=120)
    return {"merges": f"{len(rows)}, {folder / 'merges.json'}, {folder / 'merges.png'}"}


def _summarise(sol: FlowSolution, seconds: float, words, s, files: dict[str, str]):
    rows, last = _rows(sol), sol.last
    table = Table(show_header=False, title="flow")
    table.add_row("tokens", f"{last.n} in R^{last.d}")
    stopped = f", stopped by --until {s.until}" if sol.event_mask is not None else ""
    table.add_row("time", f"{rows[-1]['t']:.6g}" + (stopped if np.any(sol.event_mask) else ""))
    for name, first in list(rows[0].items())[1:]:
        table.add_row(name, f"{first:.6g} at t = 0, {rows[-1][name]:.6g} at the end")
    table.add_row("steps", f"{int(sol.stats['num_steps'])}")
    evaluations = sol.stats["num_evaluations"]
    table.add_row("evaluations", str(evaluations or "not counted by implicit solvers"))
    table.add_row("wall time", f"{seconds:.1f} s, compilation included")
    for name, value in files.items():
        table.add_row(name, value)
    console.print(table)
    if words is not None:
        _summarise_text(np.asarray(observables.cluster_labels(last, s.threshold)), words)


def _summarise_text(labels: np.ndarray, words: list[str]):
    table = Table("cluster", "tokens", "its words", title="largest clusters of the text")
    for label, size in Counter(labels.tolist()).most_common(6):
        members = Counter(w.lower() for w, c in zip(words, labels, strict=True) if c == label)
        shown = ", ".join(w for w, _ in members.most_common(10))
        table.add_row(str(label), str(size), shown)
    console.print(table)
