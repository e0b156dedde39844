"""`jaxflow phase-diagram`: where tokens cluster, by inverse temperature and time.

The run folder holds config.json, metrics.jsonl (a line a beta), phase.npz, phase.png, and in betas/
what each finished beta gave, so that an interrupted run goes on where it was.
"""

import enum
import json
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__, fields, viz
from ..phase import PhaseDiagram, PhaseRow, crossing, phase_diagram
from .console import console

COMMAND = "phase-diagram"
INTERACTIONS = {"softmax": fields.Softmax(), "unnormalised": fields.Unnormalised()}
Interaction = enum.StrEnum("Interaction", list(INTERACTIONS))


def phase(
    n: Annotated[int, typer.Option(help="Number of tokens.")] = 32,
    d: Annotated[int, typer.Option(help="Dimension of a token.")] = 128,
    beta_min: Annotated[float, typer.Option(help="Least inverse temperature.")] = 0.1,
    beta_max: Annotated[float, typer.Option(help="Largest inverse temperature.")] = 9.0,
    betas: Annotated[int, typer.Option(help="Number of inverse temperatures.", min=1)] = 90,
    t1: Annotated[float, typer.Option(help="Time to flow to.")] = 30.0,
    times: Annotated[int, typer.Option(help="Number of times from 0 on.", min=2)] = 200,
    systems: Annotated[int, typer.Option(help="Number of initial laws.")] = 64,
    threshold: Annotated[
        float, typer.Option(help="Tokens with this inner product or more have met.")
    ] = 0.999,
    interaction: Annotated[
        Interaction, typer.Option(help="How a query weighs the tokens.")
    ] = Interaction["softmax"],
    tolerance: Annotated[float, typer.Option(help="Relative and absolute, of the solver.")] = 1e-5,
    seed: Annotated[int, typer.Option(help="Seed of the initial laws.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder (default: runs/DATE-TIME); one that was cut off goes on."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run; its own settings hold.")
    ] = None,
):
    """Draw the probability that two tokens have met, by inverse temperature and time.

    Uniform tokens on the sphere move by self-attention, V = Q = K = I (arXiv 2312.10794).

    Examples:

    `jaxflow phase-diagram`

    `jaxflow phase-diagram --d 8 --betas 30 --systems 16 --out runs/phase-8`

    `jaxflow phase-diagram --resume runs/phase-8`
    """
    given = {k: v for k, v in sorted(locals().items()) if k not in ("out", "resume")}
    folder = resume or out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    config = _config(folder, given, go_on=resume is not None)
    start = time.perf_counter()
    diagram = _solve(folder, config)
    _write_run(folder, diagram)
    _summarise(folder, diagram, time.perf_counter() - start)


def _config(folder: Path, given: dict[str, Any], *, go_on: bool) -> dict[str, Any]:
    """The settings of the run: those given, or those of the run to go on with."""
    file = folder / "config.json"
    if not file.is_file():
        if go_on:
            raise typer.BadParameter(f"{folder} is no run: it has no config.json.")
        folder.mkdir(parents=True, exist_ok=True)
        described = {"command": COMMAND} | given | {"jaxflow": __version__}
        file.write_text(json.dumps(described, indent=2) + "\n")
        return given
    kept = json.loads(file.read_text())
    if kept.get("command") != COMMAND:
        raise typer.BadParameter(f"{folder} holds a run of another command: take another --out.")
    if go_on:
        return kept
    others = [name for name in given if given[name] != kept.get(name)]
    if others:
        told = ", ".join(f"{name} = {kept.get(name)}, not {given[name]}" for name in others)
        raise typer.BadParameter(
            f"{folder} holds a run with {told}: --resume it as it is, or take another --out."
        )
    return given


def _solve(folder: Path, config: dict[str, Any]) -> PhaseDiagram:
    """The diagram, with a bar and a line of metrics for each beta."""
    betas = np.linspace(config["beta_min"], config["beta_max"], config["betas"])
    ts = np.linspace(0, config["t1"], config["times"])
    console.print(
        f"{len(betas)} betas, {config['systems']} systems of {config['n']} tokens in "
        f"R^{config['d']}, {len(ts)} times."
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    remaining = TextColumn("left:"), TimeRemainingColumn()
    with (
        (folder / "metrics.jsonl").open("w") as lines,
        Progress(*columns, *remaining, console=console) as bar,
    ):
        task = bar.add_task("betas", total=len(betas))
        clock = _Clock(len(betas))

        def progress(row: PhaseRow):
            lines.write(json.dumps(_metrics(ts, row)) + "\n")
            lines.flush()
            if (text := clock.tick(row)) is not None:
                console.print(text)
            bar.advance(task)

        return phase_diagram(
            betas,
            ts,
            n=config["n"],
            d=config["d"],
            systems=config["systems"],
            threshold=config["threshold"],
            interaction=INTERACTIONS[config["interaction"]],
            tolerance=config["tolerance"],
            key=jax.random.key(config["seed"]),
            path=folder / "betas",
            progress=progress,
        )


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
    np.savez(
        folder / "phase.npz",
        betas=diagram.betas,
        ts=diagram.ts,
        probability=diagram.probability,
        standard_error=diagram.standard_error,
        curve=diagram.curve,
    )
    figure = viz.phase_diagram(diagram).get_figure(root=True)
    assert figure is not None
    figure.savefig(folder / "phase.png", dpi=120)


def _summarise(folder: Path, diagram: PhaseDiagram, seconds: float):
    table = Table("beta", "p = 1/2 at t", "equiangular tokens at t", title="phase diagram")
    half = diagram.boundary()
    shown = np.unique(np.linspace(0, len(half) - 1, 7).astype(int))
    for i in shown:
        table.add_row(*(f"{x[i]:.4g}" for x in (diagram.betas, half, diagram.curve)))
    console.print(table)
    console.print(f"{seconds:.1f} s. Figure: {folder / 'phase.png'}", soft_wrap=True)
