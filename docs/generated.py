"""What pages have made for them: `<!-- generated: NAME -->` becomes what NAME here returns."""

from collections.abc import Callable
from functools import partial

import typer
from tables import TABLES, table
from typer.cli import get_docs_for_click
from typer.main import get_command

from jaxflow.cli import app


def command_line() -> str:
    """Each command with its options; Typer's own list of commands cuts their lines short."""
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="jaxflow")
    return text[text.index("## ") :]


GENERATED: dict[str, Callable[[], str]] = {
    "command line": command_line,
    **{name: partial(table, name) for name in TABLES},
}
