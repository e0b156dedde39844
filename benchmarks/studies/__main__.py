"""The command line of the studies; benchmarks/README.md says how to use it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import adjoints, characters, images
from .report import draw, table
from .study import RESULTS, Plan, Study, run

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _studies():
    """What trained models reach, over seeds, each in one command.

    A command says what it costs and, where it was stopped, goes on."""


Seeds = Annotated[int, typer.Option(min=1, help="How often each case is trained.")]
Only = Annotated[list[str] | None, typer.Option(help="This case alone; repeatable.")]
Minutes = Annotated[float | None, typer.Option(help="Stop then; the same command goes on.")]
Json = Annotated[Path | None, typer.Option("--json", help="The record.")]
Runs = Annotated[Path, typer.Option(help="Where trainings keep their checkpoints.")]


def report(made: Study, seeds: int, only, minutes, json_file: Path | None, runs: Path):
    plan = Plan(
        json_file or RESULTS / f"{made.name}.json",
        runs / made.name,
        seeds,
        tuple(only or ()),
        minutes,
    )
    try:
        record = run(made, plan, lambda line: print(line, flush=True))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    Console(width=160).print(table(record))
    print(draw(record, plan.json_file))


@app.command("characters")
def _characters(
    text: Annotated[Path, typer.Option(help="Such as the tiny Shakespeare.", exists=True)],
    seeds: Seeds = 3,
    only: Only = None,
    minutes: Minutes = None,
    json_file: Json = None,
    runs: Runs = Path("runs/studies"),
):
    """Models of characters in nanoGPT's setting for a CPU."""
    report(characters.study(text), seeds, only, minutes, json_file, runs)


@app.command("digits")
def _digits(
    file: Annotated[
        Path,
        typer.Option(
            "--images", help="idx(.gz) or .npz, such as MNIST's test images.", exists=True
        ),
    ],
    seeds: Seeds = 5,
    only: Only = None,
    minutes: Minutes = None,
    json_file: Json = None,
    runs: Runs = Path("runs/studies"),
):
    """One small attention-only block with transport cost on digits."""
    report(images.digits(file), seeds, only, minutes, json_file, runs)


@app.command("transport")
def _transport(
    seeds: Seeds = 5,
    only: Only = None,
    minutes: Minutes = None,
    json_file: Json = None,
    runs: Runs = Path("runs/studies"),
):
    """The weight of the transport cost against generalisation on little data."""
    report(images.transport(), seeds, only, minutes, json_file, runs)


@app.command("adjoints")
def _adjoints(
    seeds: Seeds = 3,
    only: Only = None,
    minutes: Minutes = None,
    json_file: Json = None,
    runs: Runs = Path("runs/studies"),
):
    """Time, memory and error of the gradient by each adjoint."""
    report(adjoints.study(), seeds, only, minutes, json_file, runs)


if __name__ == "__main__":
    app()
