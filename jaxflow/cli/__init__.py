"""The command line: `jaxflow simulate`, `phase-diagram`, `compare`, `view`, `train`, `evaluate`,
`sample`, `inspect`, `reproduce`, `info`.

Every run writes a folder with its configuration (config.json), its metrics (metrics.jsonl) and
pictures. `jaxflow --install-completion` teaches the shell its commands and options. Help and
completion import no JAX: a command imports its work when it runs.
"""

import io
import sys

import typer

from .. import __version__
from . import learning, reading, reproduction, simulation
from .boundary import Boundary, Group, leave
from .settings import command

__all__ = ["app", "main"]


def __dir__() -> list[str]:
    return __all__


app = typer.Typer(
    cls=Boundary,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
trainings = typer.Typer(
    help="Train a model whose depth is time.",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"jaxflow {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _start(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_version, is_eager=True
    ),
):
    """Transformers as flows of measures."""


@command(app, "simulate", simulation.Simulation, simulation.of_config)
def _simulate(settings: simulation.Simulation):
    from .simulate import simulate

    simulate(settings)


@command(app, "phase-diagram", simulation.Phase, simulation.of_run)
def _phase(settings: simulation.Phase):
    from .phase import phase

    phase(settings)


@command(app, "compare", reading.Comparison)
def _compare(settings: reading.Comparison):
    from .compare import compare

    compare(settings)


@command(app, "view", reading.Viewing)
def _view(settings: reading.Viewing):
    from .view import view

    view(settings)


def _train(settings: learning.AbstractTraining):
    from .train import train

    train(settings)


for task, kind in learning.TASKS.items():
    command(trainings, task, kind, learning.base)(_train)
app.add_typer(trainings, name="train")


@command(app, "evaluate", reading.Evaluation)
def _evaluate(settings: reading.Evaluation):
    from .evaluate import evaluate

    evaluate(settings)


@command(app, "sample", reading.Sampling)
def _sample(settings: reading.Sampling):
    from .sample import sample

    sample(settings)


@command(app, "inspect", reading.Inspecting)
def _inspect(settings: reading.Inspecting):
    from .inspect import inspect

    inspect(settings)


@command(app, "reproduce", reproduction.Reproduction)
def _reproduce(settings: reproduction.Reproduction):
    from .reproduce import reproduce

    reproduce(settings)


@command(app, "info", reading.Information)
def _info(settings: reading.Information):
    from .info import info

    info(settings)


def main():
    """The entry point: an error is one line, and the exit code says of which kind."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks, as \\x...
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except SystemExit as stop:
        leave(stop.code)
