"""`jaxflow evaluate RUN`: the loss of a trained model at its own depth and at others."""

import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from .. import models, training, viz
from .._folder import write_text
from ..fields import TimeDependent
from ..fields.time import sample
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
    layers: Annotated[
        list[int] | None, typer.Option(help="Its curve sampled into so many layers; repeatable.")
    ] = None,
    batches: Annotated[
        int | None, typer.Option(help="Validation batches (default: all of them).")
    ] = None,
    latest: Annotated[bool, typer.Option(help="The last checkpoint, not the best.")] = False,
):
    """Measure a trained model at other depths, without training it again.

    The validation loss with each solver at each number of steps and each tolerance, in
    RUN/evaluate.jsonl; RUN/evaluate.png draws it against the evaluations of the field. Layers take
    a multiple of their number as steps. With --layers the parameters are those in the middle of
    each of so many pieces, one step a piece.

    Examples:

    `jaxflow evaluate runs/shakespeare --steps 4 --steps 8 --steps 16 --solver heun`

    `jaxflow evaluate runs/shakespeare --solver tsit5 --tolerance 1e-2 --tolerance 1e-4`

    `jaxflow evaluate runs/shakespeare --layers 4 --layers 8 --layers 16`
    """
    model = training.load(run, which="latest" if latest else "best")
    data = _data(run)
    rows = []
    depths, notes = _depths(model.depth, solver or [], steps or [], tolerance or [])
    variants = [(model.with_depth(depth), {}) for depth in depths]
    variants += [(_layered(model, count), {"layers": count}) for count in layers or []]
    for variant, about in variants:
        depth = variant.depth
        with console.status(f"{_name(depth)}, {depth.steps or 'adaptive'} steps"):
            rows.append(_row(variant, data, batches, own=not rows) | about)
    console.print(_table(run, rows))
    for note in dict.fromkeys(notes + [row["note"] for row in rows if "note" in row]):
        console.print(f"[yellow]-[/yellow] {note}", highlight=False)
    write_text(run / "evaluate.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
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


def _depths(own, solvers, steps, tolerances) -> tuple[list[models.Depth], list[str]]:
    """Its own first; then each solver with each number of steps and each tolerance, and why not."""
    sizes = [{"steps": n} for n in steps] + [{"tolerance": a} for a in tolerances]
    depths, notes = [own], []
    pairs = itertools.product(solvers or [None], sizes or [{}]) if solvers or sizes else ()
    for chosen, size in pairs:
        try:
            depths.append(depth_like(own, chosen, **size))
        except ValueError as error:  # adaptive steps without an error estimate
            notes.append(str(error))
    return depths, notes


def _layered(model: models.AbstractModel, count: int) -> models.AbstractModel:
    """Layers in place of the model's curve, one step a layer."""
    if not isinstance(model.field, TimeDependent):
        raise typer.BadParameter("--layers is for models whose parameters are a curve in time.")
    if count < 1:
        raise typer.BadParameter(f"--layers must be at least 1, got {count}.")
    layers = sample(model.field.curve, np.linspace(0.0, model.depth.t1, count + 1))
    return model.with_curve(layers).with_depth(depth_like(model.depth, steps=count))


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
        steps = f"{row['layers']} layers" if "layers" in row else steps
        numbers = (f"{row[name]:{form}}" if name in row else "-" for name, form in shown.items())
        table.add_row(row["solver"], steps, *numbers)
    return table


def _draw(rows: list[dict[str, Any]], path: Path):
    """The loss against the evaluations of the field, a curve a solver."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "num_evaluations" in row:
            name = row["solver"] + ", layers" * ("layers" in row)
            drawn.setdefault(name, []).append((row["num_evaluations"], row["loss"]))
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
