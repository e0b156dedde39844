"""The parts of pages that are made of results and of the program, so that nobody types a number."""

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

from jaxflow.cli import app


def command_line() -> str:
    """All commands and options, below one heading."""
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="jaxflow")
    return text.removeprefix("# `jaxflow`")


GENERATED = {"command_line": command_line}
