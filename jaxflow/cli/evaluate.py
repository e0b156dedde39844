"""`jaxflow evaluate RUN`: the loss of a trained model at its own depth and at others."""

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import models, training, viz
from .._folder import write_text
from ..fields import TimeDependent
from ..fields.time import sample
from ..models.exits import check_exit
from ..models.generation import can_be_cached
from .boundary import interruptible
from .choices import Solver
from .console import progress, say, table
from .device import prepare
from .learning import TASKS, AbstractTraining, LanguageTraining, training_settings
from .optional import available, figures
from .reading import Evaluation
from .simulate import write_figure
from .train import read_data

PICTURE = "evaluate.png"
_COLUMNS = {"loss": ".4f", "accuracy": ".2%", "num_evaluations": ".4g"}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run as its checkpoint, which is sealed, has it."""

    folder: Path
    model: models.AbstractModel
    settings: AbstractTraining
    data: dict[str, Any]  # what it was trained on


@contextlib.contextmanager
def trained(run: Path, *, latest: bool) -> Iterator[Trained]:
    """The run in a folder, in its precision."""
    checkpoint = training.latest(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{run} is no run with a checkpoint.")
    about = training.metadata(checkpoint)["config"]
    config = about["config"]
    settings = training_settings(config, str(checkpoint))
    kind = TASKS[settings.pop("task")]
    double = config.get("double", jnp.result_type(float) == jnp.float64)
    with jax.enable_x64(double):
        model = training.load(run, which="latest" if latest else "best")
        yield Trained(run, model, kind(**settings), about["data"])


def evaluate(s: Evaluation):
    """Prints, writes and draws the loss at each depth."""
    drawn = available(figures, PICTURE)
    prepare()
    with trained(s.run, latest=s.latest) as run:
        data, about = _data(run, s)
        rows: list[dict[str, Any]] = []
        depths, notes = _depths(run.model.depth, s)
        variants: list[tuple[Any, dict[str, Any], training.AbstractLoss]] = []
        usual = training.FlowLoss(training.cross_entropy)
        variants += [(run.model.with_depth(depth), {}, usual) for depth in depths]
        variants += [(_layered(run.model, n), {"layers": n}, usual) for n in s.layers or []]
        variants += [
            (run.model, {"exit": exit}, _exiting(run.model, exit)) for exit in s.exit or []
        ]
        with progress("evaluating", len(variants)) as show:
            for variant, others, loss in variants:
                row = interruptible(_row, variant, data, s.batches, not rows, loss)
                rows.append(row | others | about)
                show(len(rows), f"{rows[-1]['solver']}, {rows[-1]['steps'] or 'adaptive'} steps")
    _print(rows, s.run, about)
    for note in dict.fromkeys(notes + [row["note"] for row in rows if "note" in row]):
        say(f"- {note}")
    write_text(s.run / "evaluate.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if drawn:
        _draw(rows, s.run / PICTURE)
        say(f"Figure: {s.run / PICTURE}")


def depth_like(
    depth: models.Depth,
    solver: Solver | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
) -> models.Depth:
    """The depth with what is given in place of its own."""
    if steps is None and tolerance is None:
        steps, tolerance = depth.steps, depth.tolerance
    return models.Depth(
        t1=depth.t1,
        steps=steps,
        tolerance=tolerance,
        solver=depth.solver if solver is None else models.SOLVERS[solver],
        max_steps=depth.max_steps,
    )


def _depths(own: models.Depth, s: Evaluation) -> tuple[list[models.Depth], list[str]]:
    """Its own first; then each solver with each number of steps and each tolerance, and why not."""
    sizes: list[dict[str, Any]] = [{"steps": n} for n in s.steps or []]
    sizes += [{"tolerance": a} for a in s.tolerance or []]
    depths, notes = [own], []
    pairs = itertools.product(s.solver or [None], sizes or [{}]) if s.solver or sizes else ()
    for chosen, size in pairs:
        try:
            depths.append(depth_like(own, chosen, **size))
        except ValueError as error:  # adaptive steps without an error estimate
            notes.append(str(error))
    return depths, notes


def _layered(model: models.AbstractModel, count: int) -> models.AbstractModel:
    """Layers in place of the model's curve, one step a layer."""
    if not isinstance(model.field, TimeDependent):
        raise ValueError("--layers is for models whose parameters are a curve in time.")
    layers = sample(model.field.curve, np.linspace(0.0, model.depth.t1, count + 1))
    return model.with_curve(layers).with_depth(depth_like(model.depth, steps=count))


def _exiting(model: models.AbstractModel, exit: float) -> training.ExitLoss:
    """The loss of a model whose tokens exit early."""
    if not isinstance(model, models.LanguageModel):
        raise ValueError(
            f"--exit is of the tokens of a text; the run has a {type(model).__name__}."
        )
    found = models.DistributionExit(exit)
    check_exit(found, can_be_cached(model))
    return training.ExitLoss(found)


def _data(run: Trained, s: Evaluation) -> tuple[Any, dict[str, Any]]:
    """What to evaluate on: the run's own data, or others, which every row then names."""
    language = isinstance(run.settings, LanguageTraining)
    given, wrong = (s.text, s.images) if language else (s.images, s.text)
    if wrong is not None:
        flags = ("--text", "--images") if language else ("--images", "--text")
        raise ValueError(
            f"{run.folder} was trained on other data: give {flags[0]}, not {flags[1]}."
        )
    changed = {} if given is None else {"text" if language else "images": given}
    changed |= {"labels": s.labels} if s.images is not None else {}
    settings = dataclasses.replace(run.settings, **changed)
    data = read_data(settings, training.tokenizer(run.folder) if language else None)
    if data.sha256 == run.data["sha256"]:
        return data, {}
    if given is None:
        flag = "--text" if language else "--images"
        raise ValueError(
            f"{data.source} is not what {run.folder} was trained on, by its sha256: put that back, "
            f"or name another with {flag}."
        )
    if isinstance(data, training.Images) and not (
        list(data.shape) == run.data["shape"] and data.classes <= run.data["classes"]
    ):
        raise ValueError(
            f"{given} has {data.classes} classes of images {data.shape}; {run.folder} was trained "
            f"on {run.data['classes']} of {tuple(run.data['shape'])}."
        )
    return data, {"data": str(given.resolve())}


def _row(
    model, data, batches: int | None, own: bool, loss: training.AbstractLoss
) -> dict[str, Any]:
    depth = model.depth
    row = {"solver": _name(depth), "steps": depth.steps, "tolerance": depth.tolerance}
    try:
        row |= training.evaluate(model, data.validation_batches(batches), loss)
    except ValueError as error:  # steps that do not fit its layers
        if own:
            raise
        return row | {"note": str(error)}
    if isinstance(data, training.Images) and math.isfinite(row["loss"]):
        row["accuracy"] = training.accuracy(model, data.validation_batches(batches))
    return row


def _name(depth: models.Depth) -> str:
    return next(name for name, solver in models.SOLVERS.items() if solver == depth.solver)


def _print(rows: list[dict[str, Any]], run: Path, about: dict[str, Any]):
    shown = {name: form for name, form in _COLUMNS.items() if name in rows[0]}
    cells = [("solver", "steps", *(name.replace("num_", "") for name in shown))]
    for row in rows:
        steps = f"to {row['tolerance']:g}" if row["steps"] is None else str(row["steps"])
        steps = f"{row['layers']} layers" if "layers" in row else steps
        steps = f"exit at {row['exit']:g}" if "exit" in row else steps
        numbers = (f"{row[name]:{form}}" if name in row else "-" for name, form in shown.items())
        cells.append((row["solver"], steps, *numbers))
    on = f"validation on {about['data']}, not its own data" if about else "validation"
    table(f"{run}: {on}; its own depth first", cells)


def _draw(rows: list[dict[str, Any]], path: Path):
    """The loss against the evaluations of the field, a curve a solver."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "num_evaluations" in row:
            name = row["solver"] + ", layers" * ("layers" in row) + ", early exit" * ("exit" in row)
            drawn.setdefault(name, []).append((row["num_evaluations"], row["loss"]))
    pairs = {}
    for name, points in drawn.items():
        evaluations, losses = zip(*sorted(points), strict=True)
        pairs[name] = evaluations, losses
    axes = viz.curves(pairs, xlabel="evaluations of the field", ylabel="validation loss")
    for line in axes.lines:
        line.set_marker("o")
    write_figure(path, axes.get_figure(root=True))
