"""A run folder as the server sees it."""

import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .._folder import CONFIG, json_object, read_settings
from .._page import embedded
from .metrics import Table

LOG, FILM = "metrics.jsonl", "flow.html"
AT_ONCE = 2**22  # bytes of a log that one request reads
LARGEST_FILM, LARGEST_CONFIG = 2**27, 2**22


class WatchedRun:
    """A run folder; nothing of it is written.

    **Raises:** `ValueError` if it is none.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder.resolve(), name
        self.lock = threading.Lock()
        self.version = 0  # of what is known of the log
        self._forget(None)
        if not (self.folder / CONFIG).exists():
            raise ValueError(
                f"{folder} is no run: it has no {CONFIG}. Give folders that `jaxflow simulate`, "
                "`train` or `phase-diagram` wrote."
            )
        command, _ = self._settings()
        if command == "reproduce":
            raise ValueError(
                f"{folder} is a run of `jaxflow reproduce`, which has no curves: open the page "
                f"{folder / 'index.html'}."
            )

    def _settings(self) -> tuple[str, dict[str, Any]]:
        """The command, and the settings that it had."""
        with self._opened(CONFIG) as opened:
            text = _whole(opened, LARGEST_CONFIG, CONFIG).decode("utf-8-sig")
        sealed_config = "sha256" in json_object(text, str(self.folder / CONFIG))
        record = read_settings(self.folder / CONFIG, unchanged=sealed_config)
        command = str(record.pop("command", "?"))
        settings = record.get("settings")
        return command, settings if isinstance(settings, dict) else record

    def about(self) -> dict[str, Any]:
        """What the page says of the run; a config that was damaged meanwhile is told, too."""
        try:
            (command, settings), error = self._settings(), None
        except (ValueError, OSError) as problem:
            command, settings, error = "?", {}, str(problem)
        shown = {str(k): str(v)[:400] for k, v in settings.items()}
        about = {"name": self.name, "path": str(self.folder), "command": command}
        return about | {"settings": shown, "error": error}

    # ------------------------------------------------------------------ the log

    def state(self) -> dict[str, Any]:
        """Reads on in the log, and says what there is."""
        with self.lock:
            error = self._advance()
            return {
                "version": self.version,
                "age": None if self.changed is None else max(0.0, time.time() - self.changed),
                "read": self.read / max(self.size, 1),
                "more": self.more,
                "error": error,
                "film": self._film_version(),
            }

    def metrics(self) -> dict[str, Any]:
        with self.lock:
            return {"version": self.version} | self.table.to_json()

    def _forget(self, file: tuple[int, int] | None):
        """A log from its first line on."""
        self.file, self.read, self.size, self.more, self.changed = file, 0, 0, False, None
        self.table = Table()
        self.version += 1

    def _advance(self) -> str | None:
        """Reads whole lines; what the last one lacks is being written."""
        try:
            with self._opened(LOG) as opened:
                about = os.fstat(opened.fileno())
                file = about.st_dev, about.st_ino
                # A training that goes on cuts its log, in a file of the same name.
                if file != self.file or about.st_size < self.read:
                    self._forget(file)
                self.size, self.changed = about.st_size, about.st_mtime
                opened.seek(self.read)
                self._take(opened.read(AT_ONCE))
        except FileNotFoundError:
            if self.file is not None:
                self._forget(None)
        except (ValueError, OSError) as problem:
            return str(problem)
        return None

    def _take(self, content: bytes):
        end = content.rfind(b"\n") + 1
        if end == 0 and len(content) == AT_ONCE:
            end = len(content)  # no line of a run is so long
        self.more = len(content) == AT_ONCE
        lines = content[:end].splitlines()
        for line in lines:
            self.table.add(line)
        self.read += end
        self.version += 1 if lines else 0

    # ------------------------------------------------------------------ the film

    def _film_version(self) -> str | None:
        try:
            with self._opened(FILM) as opened:
                return str(os.fstat(opened.fileno()).st_mtime_ns)
        except (ValueError, OSError):
            return None

    def film(self) -> Any:
        """The data of flow.html.

        **Raises:** `ValueError` or `OSError` where it holds none.
        """
        with self._opened(FILM) as opened:
            return embedded(_whole(opened, LARGEST_FILM, FILM).decode("utf-8", "replace"))

    # ------------------------------------------------------------------ files

    @contextmanager
    def _opened(self, name: str) -> Iterator[BinaryIO]:
        """A regular file of the folder; no link leads out of it, and no pipe is waited for.

        **Raises:** `ValueError` for any other, `FileNotFoundError` where there is none.
        """
        path = Path(os.path.realpath(self.folder / name))
        if not path.is_relative_to(self.folder):
            raise ValueError(f"{self.folder / name} is a link out of the run, and is not read.")
        guarded = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | guarded)
        with os.fdopen(descriptor, "rb") as opened:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{self.folder / name} is no regular file.")
            yield opened


def _whole(opened: BinaryIO, most: int, name: str) -> bytes:
    content = opened.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{name} has more than {most:,} bytes, and is not read.")
    return content
