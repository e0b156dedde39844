"""`jaxflow compare RUN RUN ...`: what differs between runs, in their settings and their results."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .. import viz
from ..viz.style import require
from .console import console

Run = dict[str, Any]


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two or more run folders of one command.")],
    metric: Annotated[
        list[str] | None, typer.Option(help="Draw this metric; repeatable (default: all).")
    ] = None,
    out: Annotated[Path, typer.Option(help="The figure.")] = Path("compare.png"),
):
    """Compare runs: the settings that differ, the last value of each metric, and their curves.

    Examples:

    `jaxflow compare runs/post runs/pre --metric diameter`

    `jaxflow compare runs/layers runs/smooth --metric validation_loss --out losses.png`
    """
    if len(runs) < 2:
        raise typer.BadParameter("compare takes two or more run folders.")
    names = _names(runs)
    read = {name: _read(folder) for name, folder in zip(names, runs, strict=True)}
    shared = _shared_metrics(read, metric)
    console.print(_settings_table(read))
    console.print(_results_table(read, shared))
    _draw(read, shared, out)
    console.print(f"Figure: {out}", soft_wrap=True)


def _names(runs: list[Path]) -> list[str]:
    """The last part of each path, or the whole of it where that is not enough."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(runs) else [str(run) for run in runs]


def _read(folder: Path) -> Run:
    for file in ("config.json", "metrics.jsonl"):
        if not (folder / file).is_file():
            raise typer.BadParameter(f"{folder} is no run: it has no {file}.")
    config = json.loads((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not rows:
        raise typer.BadParameter(f"{folder} has no metrics yet.")
    axis = next(iter(rows[0]))  # t, beta or step
    return {"settings": config.get("settings", config), "rows": rows, "axis": axis}


def _shared_metrics(read: dict[str, Run], wanted: list[str] | None) -> list[str]:
    axes = {run["axis"] for run in read.values()}
    if len(axes) > 1:
        raise typer.BadParameter(f"the runs are of different commands: measured over {axes}.")
    columns = [[k for row in run["rows"] for k in row] for run in read.values()]
    numbers = lambda name: any(
        isinstance(row.get(name), int | float) for run in read.values() for row in run["rows"]
    )
    shared = [k for k in dict.fromkeys(columns[0]) if all(k in c for c in columns[1:])]
    shared = [k for k in shared if k not in axes and numbers(k)]
    if missing := set(wanted or []) - set(shared):
        raise typer.BadParameter(
            f"not measured by all runs: {', '.join(sorted(missing))}; all measured "
            f"{', '.join(shared)}."
        )
    return [k for k in shared if not wanted or k in wanted]


def _settings_table(read: dict[str, Run]) -> Table:
    table = Table("setting", *read, title="settings that differ")
    settings = [run["settings"] for run in read.values()]
    for name in sorted({k for s in settings for k in s}):
        values = [s.get(name) for s in settings]
        if any(value != values[0] for value in values[1:]):
            table.add_row(name, *(str(value) for value in values))
    return table


def _values(run: Run, metric: str) -> tuple[list[float], list[float]]:
    rows = [r for r in run["rows"] if isinstance(r.get(metric), int | float)]
    return [r[run["axis"]] for r in rows], [r[metric] for r in rows]


def _results_table(read: dict[str, Run], metrics: list[str]) -> Table:
    table = Table("metric", *read, title="last value")
    axis = next(iter(read.values()))["axis"]
    table.add_row(axis, *(f"{run['rows'][-1][axis]:.6g}" for run in read.values()))
    for metric in metrics:
        table.add_row(metric, *(f"{_values(run, metric)[1][-1]:.6g}" for run in read.values()))
    return table


def _draw(read: dict[str, Run], metrics: list[str], out: Path):
    figure = require("matplotlib.figure").Figure(
        figsize=(5.5, 3.2 * len(metrics)), layout="constrained"
    )
    axis = next(iter(read.values()))["axis"]
    for ax, metric in zip(figure.subplots(len(metrics), squeeze=False)[:, 0], metrics, strict=True):
        pairs = {name: _values(run, metric) for name, run in read.items()}
        viz.curves(pairs, xlabel=axis, ylabel=metric.replace("_", " "), ax=ax)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
