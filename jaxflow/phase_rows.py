"""What is kept of a phase diagram: a folder with its settings and one file for each finished beta.

    settings.json      all that a row depends on
    beta-00007.json    {"sha256": ..., "row": [probability, standard error]}

The sha256 is of the row, its number and the settings: a row that is damaged, or of another diagram,
is told from one that is not there.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ._folder import read_json, sealed, write_text

__all__ = [
    "Rows",
    "short",
]


def __dir__() -> list[str]:
    return __all__


class Rows(NamedTuple):
    """A folder of rows, one file a beta, and the settings that they belong to; or none."""

    folder: Path | None
    settings: dict[str, Any]

    def check(self):
        """Refuses a folder with other settings; writes them to a new one."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        if not file.exists():
            if rows := sorted(self.folder.glob("beta-*.json")):
                raise ValueError(
                    f"{self.folder} has rows of a diagram, such as {rows[0].name}, and no "
                    "settings.json that says of which. Take another folder."
                )
            write_text(file, json.dumps(self.settings, indent=1) + "\n")
            return
        kept = read_json(file)
        others = [name for name in self.settings if self.settings[name] != kept.get(name)]
        if others:
            told = "; ".join(
                f"{name} is {short(kept.get(name))} there and {short(self.settings[name])} here"
                for name in others
            )
            raise ValueError(
                f"{self.folder} holds another phase diagram: {told}. Go on with its settings, or "
                "take another folder."
            )

    def read(self, i: int) -> Float[np.ndarray, "2 ts"] | None:
        """Row i, or None where it is not there.

        **Raises:** `ValueError`, naming the file, where it is not as it was written.
        """
        if self.folder is None or not (file := self._file(i)).exists():
            return None
        kept = read_json(file)
        if kept.get("sha256") != self._seal(i, kept.get("row")):
            raise ValueError(
                f"{file} is damaged, or of another diagram: it does not have the sha256 that it "
                "states. Delete it, and this beta is solved for again."
            )
        return np.array(kept["row"], float)  # JSON's NaN of one system's error included

    def write(self, i: int, row: Float[np.ndarray, "2 ts"]):
        """Keeps row i."""
        if self.folder is not None:
            content = row.tolist()
            whole = {"sha256": self._seal(i, content), "row": content}
            write_text(self._file(i), json.dumps(whole) + "\n")

    def _file(self, i: int) -> Path:
        assert self.folder is not None
        return self.folder / f"beta-{i:05d}.json"

    def _seal(self, i: int, row: Any) -> str:
        return sealed([self.settings, i, row])


def short(value: Any) -> str:
    """A setting in a few words.

    **Arguments:** `value`: a number, a text or a sequence.

    **Returns:** its text; of four or more numbers how many there are, the first and the last.
    """
    axis = np.asarray(value)
    if axis.ndim != 1 or axis.size < 4:
        return str(value)
    return f"{axis.size} values from {axis[0]} to {axis[-1]}"
