"""What a command that computes does first: compiled programs are kept, kernels are checked."""

import typer

from .._cache import enable_compilation_cache
from ..kernels.check import once
from .console import plain


def prepare():
    """Keeps compiled programs on disk; checks the kernels of a device that has no record yet."""
    enable_compilation_cache()
    once(lambda text: typer.echo(plain(text), err=True))
