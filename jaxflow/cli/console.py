"""Where the commands write."""

from rich.console import Console

console = Console()
