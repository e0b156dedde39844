"""The command line; README.md says how to use it."""

import json
import os
from pathlib import Path
from typing import Annotated

# Rivals share the memory of one GPU, so JAX must not take most of it at its first use.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from . import kernels, shapes

COLUMNS = {
    "shape": "{}",
    "mode": "{}",
    "rival": "{}",
    "error": "{:.0e}",
    "compile_s": "{:.2f}",
    "ms": "{:.3g}",
    "vs_best": "{:.2f}",
    "vs_jnp": "{:.2f}",
    "of_floor": "{:.0%}",
    "peak_mib": "{:.0f}",
    "note": "{}",
}


def table(rows: list[dict]) -> Table:
    """A Markdown table of the rows."""
    out = Table(*COLUMNS, box=box.MARKDOWN)
    for row in rows:
        cells = ((row.get(name), form) for name, form in COLUMNS.items())
        out.add_row(*("" if x is None else form.format(x) for x, form in cells))
    return out


def main(
    suite: Annotated[str, typer.Argument(help="kernels")] = "kernels",
    quick: Annotated[bool, typer.Option(help="A few small shapes.")] = False,
    backend: Annotated[
        list[str] | None, typer.Option(help="Time this backend of jaxflow too; repeatable.")
    ] = None,
    only: Annotated[str, typer.Option(help="Shapes whose name starts so.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
):
    """Benchmarks of jaxflow against its rivals."""
    if suite != "kernels":
        raise typer.BadParameter(f"suite must be kernels, got {suite!r}.")
    console, progress = Console(width=150), Console(stderr=True)
    with progress.status("ceilings") as status:
        named = shapes.QUICK if quick else shapes.FULL
        chosen = [s for s in named if s.name.startswith(only)]
        names = (*kernels.RIVALS, *(f"jaxflow {name}" for name in backend or ()))
        report = kernels.run(chosen, names, log=status.update)
    versions = ", ".join(f"{name} {v}" for name, v in report["versions"].items())
    rates = report["ceilings"]
    commit = f"commit {report['commit']}" + " (modified)" * report["modified"]
    console.print(f"{report['device']}; Python {report['python']}, {versions}; {commit}")
    console.print(f"{rates['flops'] / 1e9:.0f} GFLOP/s, {rates['exps'] / 1e9:.2f} Gexp/s")
    console.print(table(report["rows"]))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
