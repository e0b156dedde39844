"""A study's table, and its picture beside the record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..plots import COLORS, MARKERS, STYLE

LEFT_OUT = ("case", "n", "seeds", "flops", "seconds")


def table(record: dict[str, Any]) -> Table:
    """A Markdown table of the rows: mean +- spread."""
    rows = record["rows"]
    names = dict.fromkeys(
        name for row in rows for name, value in row.items()
        if name not in LEFT_OUT and "mean" in value
    )  # fmt: skip
    out = Table("case", "n", *names, box=box.MARKDOWN)
    for row in rows:
        out.add_row(row["case"], str(row["n"]), *(_cell(row.get(name)) for name in names))
    return out


def _cell(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    spread = "" if value["spread"] is None else f" ± {value['spread']:.2g}"
    return f"{value['mean']:.4g}{spread}"


def draw(record: dict[str, Any], json_file: Path) -> str:
    """Writes the picture of a study that has one; a line on it."""
    paint = PICTURES.get(record["study"])
    if paint is None or not record["rows"]:
        return f"The record is {json_file}."
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return f"The record is {json_file}; no picture: matplotlib is not installed."
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        paint(figure, record["rows"])
        path = json_file.with_suffix(".png")
        figure.savefig(path)
    return f"The record is {json_file}, its picture {path}."


def characters(figure, rows):
    """The loss at other numbers of steps than those of the training."""
    axes = figure.subplots()
    names = "continuous 4", "elastic", "elastic, 6000", "heun, elastic, 6000"
    shown = [row for row in rows if row["case"] in names]
    for i, row in enumerate(shown):
        at = [int(n) for n in row["losses"]]
        means = [loss["mean"] for loss in row["losses"].values()]
        axes.plot(at, means, MARKERS[i] + "-", color=COLORS[i], label=f"trained: {row['case']}")
    alone = [row for row in rows if row["case"].startswith("continuous")]
    at = [int(row["case"].split()[1]) for row in alone]
    axes.plot(at, [row["last"]["mean"] for row in alone], "k*", label="trained at that number")
    axes.set(xlabel="steps of evaluation", ylabel="validation loss")
    axes.legend()


def transport(figure, rows):
    """The accuracy against the weight of the cost."""
    axes = figure.subplots()
    for i, name in enumerate(("accuracy", "noisy")):
        means = [row[name]["mean"] for row in rows]
        spreads = [row[name]["spread"] or 0.0 for row in rows]
        look = {"fmt": MARKERS[i] + "-", "color": COLORS[i], "capsize": 3}
        axes.errorbar(range(len(rows)), means, spreads, label=name, **look)
    axes.set_xticks(range(len(rows)), [row["case"].removeprefix("weight ") for row in rows])
    axes.set(xlabel="weight of the transport cost", ylabel="accuracy")
    axes.legend()


def adjoints(figure, rows):
    """Time, memory and error against the number of steps."""
    figure.set_size_inches(15, 4.6)
    names = dict.fromkeys(_split(row["case"])[0] for row in rows)
    labels = {"ms": "ms", "temp_mib": "MiB of temporaries", "error": "relative error"}
    for axes, key in zip(figure.subplots(1, 3), labels, strict=True):
        for i, name in enumerate(names):
            own = [row for row in rows if _split(row["case"])[0] == name]
            at = [_split(row["case"])[1] for row in own]
            axes.plot(
                at, [row[key]["mean"] for row in own], MARKERS[i] + "-", color=COLORS[i], label=name
            )
        axes.set(xlabel="steps", ylabel=labels[key], xscale="log", yscale="log")
    axes.legend(fontsize=9)


def _split(case: str) -> tuple[str, int]:
    """The adjoint and the number of steps."""
    name, steps = case.split(", ")
    return name, int(steps.removesuffix(" steps"))


PICTURES: dict[str, Callable[[Any, list[dict[str, Any]]], None]] = {
    "characters": characters,
    "transport": transport,
    "adjoints": adjoints,
}
