"""The command line: `jaxflow simulate`, `phase-diagram`, `compare`, `train`, `evaluate`, `sample`,
`info`.

Every run writes a folder with its configuration (config.json), its metrics (metrics.jsonl) and
pictures. `jaxflow --install-completion` teaches the shell its commands and options.
"""

import typer

from ..flow import FlowError
from ..training import TrainingError
from .compare import compare
from .console import console
from .evaluate import evaluate
from .info import info
from .phase import COMMAND, phase
from .sample import sample
from .simulate import simulate
from .train import train

app = typer.Typer(
    help="Transformers as flows of measures.", no_args_is_help=True, rich_markup_mode="markdown"
)
app.command()(simulate)
app.command(COMMAND)(phase)
app.command()(compare)
app.add_typer(train, name="train")
app.command()(evaluate)
app.command()(sample)
app.command()(info)


ERRORS = ValueError, TypeError, MemoryError, OSError, ImportError, FlowError, TrainingError


def main():
    """The entry point: an error that states its remedy is shown without a traceback."""
    try:
        app()
    except ERRORS as error:
        console.print(f"[red]error[/red] {error}", highlight=False)
        raise SystemExit(1) from None
