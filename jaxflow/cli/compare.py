"""`jaxflow compare RUN RUN ...`: what differs between runs, in their settings and their results."""

import math
from pathlib import Path
from typing import Any

from .. import viz
from .._folder import CONFIG, json_object, read_json, read_settings, short_names
from ..viz.style import require
from .choices import At
from .console import say, table
from .optional import available, figures
from .reading import Comparison
from .simulate import write_figure

LOG = "metrics.jsonl"
CLOCKS = {At.time: "seconds", At.evaluations: "total_evaluations"}  # beside a run's own axis
Run = dict[str, Any]


def compare(s: Comparison):
    """Prints the settings that differ and the values, and draws the curves where it can."""
    drawn = available(figures, str(s.out))
    folder = next(parent for parent in s.out.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"--out must be in a folder, and {folder} is a file.")
    runs = [_over(_read(run), s.at, run) for run in s.runs]
    read = dict(zip(short_names(s.runs), runs, strict=True))
    shared = _shared_metrics(read, s.metric)
    table("settings that differ", [("setting", *read), *_settings(read)])
    table("last value", [("metric", *read), *_results(read, shared)])
    title = f"at the largest common {_axis(read).replace('_', ' ')}"
    table(title, [("metric", _axis(read), *read), *_common(read, shared)])
    if drawn:
        _draw(read, shared, s.out)
        say(f"Figure: {s.out}")


def _read(folder: Path) -> Run:
    for file in (CONFIG, LOG):
        if not (folder / file).exists():
            raise ValueError(f"{folder} is no run: it has no {file}.")
    config = folder / CONFIG
    settings = read_settings(config, unchanged="sha256" in read_json(config))
    text = _text(folder / LOG)
    rows = [
        json_object(line, f"line {k} of {folder / LOG}")
        for k, line in enumerate(text.splitlines(), 1)
    ]
    if not rows or not rows[0]:
        raise ValueError(f"{folder} has no metrics yet.")
    axis = next(iter(rows[0]))  # t, beta or step
    for k, row in enumerate(rows, 1):
        if not _is_number(row.get(axis)):
            raise ValueError(f"line {k} of {folder / LOG} must have a number {axis}, got {row}.")
    return {"settings": settings.get("settings", settings), "rows": rows, "axis": axis}


def _over(run: Run, at: At, folder: Path) -> Run:
    """The run with what it is compared at as its axis: the rows that have it."""
    axis = CLOCKS[at] if at in CLOCKS else run["axis"]
    rows = [row for row in run["rows"] if _is_number(row.get(axis))]
    if not rows:
        raise ValueError(
            f"{folder} does not say its {axis.replace('_', ' ')}: leave out --at {at}."
        )
    return run | {"rows": rows, "axis": axis}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shared_metrics(read: dict[str, Run], wanted: list[str] | None) -> list[str]:
    """The metrics to show: those that are numbers in every run."""
    axes = {run["axis"] for run in read.values()}
    if len(axes) > 1:
        told = ", ".join(f"{name} over {run['axis']}" for name, run in read.items())
        raise ValueError(f"the runs are of different commands: {told}.")
    measured = [
        {k: 0 for row in run["rows"] for k in row if _is_number(row[k])} for run in read.values()
    ]
    shared = [k for k in measured[0] if k not in axes and all(k in other for other in measured)]
    if missing := sorted(set(wanted or []) - set(shared)):
        raise ValueError(
            f"not measured by all runs: {', '.join(missing)}; all measured {', '.join(shared)}."
        )
    if not shared:
        raise ValueError("the runs have no metric in common.")
    return [k for k in shared if not wanted or k in wanted]


def _settings(read: dict[str, Run]) -> list[tuple[str, ...]]:
    """A row for each setting that is not the same in all runs."""
    settings = [run["settings"] for run in read.values()]
    names = sorted({k for s in settings for k in s})
    rows = [(name, *(s.get(name) for s in settings)) for name in names]
    return [tuple(map(str, row)) for row in rows if any(value != row[1] for value in row[2:])]


def _values(run: Run, metric: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run["rows"] if _is_number(row.get(metric))]
    return [float(row[run["axis"]]) for row in rows], [float(row[metric]) for row in rows]


def _axis(read: dict[str, Run]) -> str:
    return next(iter(read.values()))["axis"]


def _results(read: dict[str, Run], metrics: list[str]) -> list[tuple[str, ...]]:
    last = lambda metric: (f"{_values(run, metric)[1][-1]:.6g}" for run in read.values())
    return [(metric, *last(metric)) for metric in (_axis(read), *metrics)]


def _common(read: dict[str, Run], metrics: list[str]) -> list[tuple[str, ...]]:
    """For each metric where it is compared, and the value of each run there or last before."""
    rows = []
    for metric in metrics:
        found = [_values(run, metric) for run in read.values()]
        shared = set.intersection(*(set(xs) for xs, _ in found))
        end = max(shared, default=min(max(xs) for xs, _ in found))
        # A run that measured nothing up to there has no value.
        upto = ([y for x, y in zip(*pair, strict=True) if x <= end] for pair in found)
        rows.append((metric, f"{end:.6g}", *(f"{ys[-1]:.6g}" if ys else "-" for ys in upto)))
    return rows


def _draw(read: dict[str, Run], metrics: list[str], out: Path):
    figure = require("matplotlib.figure").Figure(
        figsize=(5.5, 3.2 * len(metrics)), layout="constrained"
    )
    for ax, metric in zip(figure.subplots(len(metrics), squeeze=False)[:, 0], metrics, strict=True):
        pairs = {name: _values(run, metric) for name, run in read.items()}
        viz.curves(
            pairs, xlabel=_axis(read).replace("_", " "), ylabel=metric.replace("_", " "), ax=ax
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_figure(out, figure)
