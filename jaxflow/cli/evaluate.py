"""`jaxflow evaluate RUN`: the loss of a trained model at its own depth and at others."""

import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import models, training, viz
from ..training import checkpoints
from .console import console
from .train import Solver, read_images, read_text

_COLUMNS = {"loss": ".4f", "accuracy": ".2%", "num_evaluations": ".4g"}


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a `jaxflow train` run.")],
    steps: Annotated[
        list[int] | None, typer.Option(help="Another number of steps; repeatable.")
    ] = None,
    tolerance: Annotated[
        list[float] | None, typer.Option(help="Adaptive steps; repeatable.")
    ] = None,
    solver: Annotated[list[Solver] | None, typer.Option(help="Another solver; repeatable.")] = None,
    batches: Annotated[
        int | None, typer.Option(help="Validation batches (default: all of them).")
    ] = None,
    latest: Annotated[bool, typer.Option(help="The last checkpoint, not the best.")] = False,
):
    """Measure a trained model at other depths, without training it again.

    The validation loss with each solver at each number of steps and each tolerance, in
    RUN/evaluate.jsonl; RUN/evaluate.png draws it against the evaluations of the field. Layers take
    a multiple of their number as steps.

    Examples:

    `jaxflow evaluate runs/shakespeare --steps 4 --steps 8 --steps 16 --solver heun`

    `jaxflow evaluate runs/shakespeare --solver tsit5 --tolerance 1e-2 --tolerance 1e-4`
    """
    model = training.load(run, which="latest" if latest else "best")
    data = _data(run)
    rows = []
    for depth in _depths(model.depth, solver or [], steps or [], tolerance or []):
        with console.status(f"{_name(depth)}, {depth.steps or 'adaptive'} steps"):
            rows.append(_row(model.with_depth(depth), data, batches, own=not rows))
    console.print(_table(run, rows))
    for note in dict.fromkeys(row["note"] for row in rows if "note" in row):
        console.print(f"[yellow]-[/yellow] {note}", highlight=False)
    checkpoints.write(run / "evaluate.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    _draw(rows, run / "evaluate.png")
    console.print(f"Figure: {run / 'evaluate.png'}", soft_wrap=True)


def depth_like(
    depth: models.Depth,
    solver: Solver | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
) -> models.Depth:
    """The depth with what is given in place of its own."""
    if steps is not None and tolerance is not None:
        raise typer.BadParameter("a depth has either --steps or a --tolerance; give one of them.")
    if steps is None and tolerance is None:
        steps, tolerance = depth.steps, depth.tolerance
    return models.Depth(
        t1=depth.t1,
        steps=steps,
        tolerance=tolerance,
        solver=depth.solver if solver is None else models.SOLVERS[solver.value],
        max_steps=depth.max_steps,
    )


def _depths(own, solvers, steps, tolerances) -> list[models.Depth]:
    """Its own first; then each solver with each number of steps and each tolerance."""
    sizes = [{"steps": n} for n in steps] + [{"tolerance": a} for a in tolerances]
    if not (solvers or sizes):
        return [own]
    pairs = itertools.product(solvers or [None], sizes or [{}])
    return [own, *(depth_like(own, chosen, **size) for chosen, size in pairs)]


def _data(run: Path):
    config = json.loads((run / "config.json").read_text())["settings"]
    if config["task"] == "lm":
        return read_text(config, training.tokenizer(run))
    return read_images(config)


def _row(model, data, batches: int | None, *, own: bool) -> dict[str, Any]:
    depth = model.depth
    row = {"solver": _name(depth), "steps": depth.steps, "tolerance": depth.tolerance}
    try:
        row |= training.evaluate(model, data.validation_batches(batches))
    except ValueError as error:  # steps that do not fit its layers
        if own:
            raise
        return row | {"note": str(error)}
    if isinstance(data, training.Images) and math.isfinite(row["loss"]):
        row["accuracy"] = training.accuracy(model, data.validation_batches(batches))
    return row


def _name(depth: models.Depth) -> str:
    return next(name for name, solver in models.SOLVERS.items() if solver == depth.solver)


def _table(run: Path, rows: list[dict[str, Any]]) -> Table:
    shown = {name: form for name, form in _COLUMNS.items() if name in rows[0]}
    names = [name.replace("num_", "") for name in shown]
    table = Table("solver", "steps", *names, title=f"{run}: validation, its own depth first")
    for row in rows:
        steps = f"to {row['tolerance']:g}" if row["steps"] is None else str(row["steps"])
        numbers = (f"{row[name]:{form}}" if name in row else "-" for name, form in shown.items())
        table.add_row(row["solver"], steps, *numbers)
    return table


def _draw(rows: list[dict[str, Any]], path: Path):
    """The loss against the evaluations of the field, a curve a solver."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "num_evaluations" in row:
            drawn.setdefault(row["solver"], []).append((row["num_evaluations"], row["loss"]))
    pairs = {}
    for name, points in drawn.items():
        evaluations, losses = zip(*sorted(points), strict=True)
        pairs[name] = evaluations, losses
    axes = viz.curves(pairs, xlabel="evaluations of the field", ylabel="validation loss")
    for line in axes.lines:
        line.set_marker("o")
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=120)
