"""What the commands print: text as it is, in lines that no terminal wraps.

Words of a text, paths and what a model wrote are data: no markup, no emoji code and no control
character among them does anything.
"""

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import typer


def plain(text: str) -> str:
    """The text with its control characters written out, but for tabs and ends of lines."""
    control = lambda c: c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs")
    return "".join(ascii(c)[1:-1] if control(c) else c for c in text)


def say(text: str = ""):
    typer.echo(plain(text))


def table(title: str, rows: Iterable[Sequence[Any]]):
    """Rows of cells, each column as wide as its widest."""
    cells = [[plain(str(cell)).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    say(f"\n{title}")
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        say("  " + "  ".join(padded).rstrip())


@contextmanager
def progress(what: str, total: float | int | None = None):
    """A bar on the terminal; `show(completed, text)` moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)

        def show(completed: float | int, text: str = what):
            bar.update(task, completed=completed, description=plain(text))

        yield show
