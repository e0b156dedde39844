"""What a command leaves out where an optional library is missing, which it says before it works."""

from collections.abc import Callable
from functools import partial

import typer

from ..viz.style import require
from .console import plain

figures = partial(require, "matplotlib.figure")


def available(library: Callable[[], object], without: str) -> bool:
    """Whether an optional library is there; if not, says how to get it and what is left out."""
    try:
        library()
    except ImportError as error:
        typer.echo(plain(f"{error} It goes on without {without}."), err=True)
        return False
    return True
