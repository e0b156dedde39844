"""What is kept of a diagram: a folder with its settings and one file for each finished beta."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from .checks import short


class Rows(NamedTuple):
    """A folder of rows, one file a beta, and the settings that they belong to; or none."""

    folder: Path | None

    def check(self, settings: dict[str, Any]):
        """Refuses a folder with other settings; writes them to a new one."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        if not file.exists():
            text = json.dumps(settings, indent=1) + "\n"
            _write(file, lambda opened: opened.write(text.encode()))
            return
        kept = json.loads(file.read_text())
        others = [name for name in settings if settings[name] != kept.get(name)]
        if others:
            told = "; ".join(
                f"{name} is {short(kept.get(name))} there and {short(settings[name])} here"
                for name in others
            )
            raise ValueError(
                f"{self.folder} holds another phase diagram: {told}. Go on with its settings, or "
                "take another folder."
            )

    def read(self, i: int, times: int) -> Float[np.ndarray, "2 ts"] | None:
        """Row i, or None where it is not there, or not whole."""
        if self.folder is None:
            return None
        try:
            row = np.load(_file(self.folder, i))
        except (OSError, EOFError, ValueError):
            return None
        return row if row.shape == (2, times) and row.dtype == np.float64 else None

    def write(self, i: int, row: Float[np.ndarray, "2 ts"]):
        if self.folder is not None:
            _write(_file(self.folder, i), lambda opened: np.save(opened, row))


def _file(folder: Path, i: int) -> Path:
    return folder / f"beta-{i:05d}.npy"


def _write(file: Path, write: Callable[[BinaryIO], Any]):
    """A file that is there as a whole or not at all."""
    work = file.with_suffix(".part")
    with work.open("wb") as opened:
        write(opened)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(work, file)
