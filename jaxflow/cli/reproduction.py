"""The settings of `reproduce`."""

import dataclasses
from pathlib import Path

from .settings import argument, flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Recompute published results, each beside what theory expects of it.

    The run folder holds NAME.json (measured, expected, tolerance, what the published step gives),
    NAME.png, and index.html, which shows all. Results that are there already, whole and of the same
    version and settings, are kept. The exit code is 1 where a result fails.

    Examples:

    `jaxflow reproduce --list`

    `jaxflow reproduce staircase`

    `jaxflow reproduce all --quick --out runs/reproduce`
    """

    names: list[str] | None = argument("Names of results, or all.", default=None)
    list_: bool = flag(False, "Print a line for each result.", kept=False, name="--list")
    quick: bool = flag(False, "Smaller systems and fewer points.")
    again: bool = flag(False, "Compute also what is there already.", kept=False)
    out: Path | None = flag(
        None, "Run folder (default: runs/DATE-TIME); one cut off goes on.", kept=False
    )

    def check(self):
        """Raises ValueError for settings that do not go together."""
        if self.list_ == bool(self.names):
            raise ValueError("give names of results, or all, or else --list.")
