"""Run folders: of one kind of run, of one process at a time, and written whole.

    runs/20260131-093000/config.json     {"command": kind, ..., "sha256": of all the rest}

config.json says what kind of run a folder belongs to, and its sha256 tells a record that was edited
or damaged. A lock, which dies with its process, keeps two processes out of one folder.
"""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

CONFIG = "config.json"
_LOCK, _HOLDER = ".lock", ".lock-holder"
_LARGEST_JSON = 2**28  # bytes; what a run writes is far smaller

# What runs write beside config.json: without one, these are somebody else's.
_RESULTS = {"metrics.jsonl", "checkpoints", "betas", "phase.npz", "phase.png", "summary.png"}
_RESULTS |= {
    "flow.html",
    "film.gif",
    "film.mp4",
    "merges.json",
    "merges.png",
    "loss.png",
    "index.html",
}


@contextlib.contextmanager
def claim(
    folder: str | Path | None,
    kind: str,
    *,
    going_on: bool | None = False,
    own: Collection[str] = (),
) -> Iterator[Path]:
    """Takes a folder for one run as long as the context lasts.

        with claim(out, "simulate") as folder:
            write_settings(folder, "simulate", settings)

    A folder that was made here, and in which nothing was written before the context failed, is
    removed again. The thread that holds a folder may claim it again, such as a command that calls
    `jaxflow.training.fit`: that changes and checks nothing.

    **Arguments:**

    - `folder`: the run folder; `None` makes a new one, runs/DATE-TIME, of a name that no other job
      has.
    - `kind`: the kind of run, such as "simulate" or "train".
    - `going_on`: whether the folder has to hold a run of this kind. `False`: it must not hold one.
      `None`: it may be either.
    - `own`: names of results that may be in a folder without config.json: they are of such a run.

    **Returns:** a context manager, which yields the path of the folder.

    **Raises:** ValueError if the folder belongs to another kind of run, holds a run where a new one
    was asked or none where one was to go on, holds other files that would be overwritten, is a
    file, or is used by another process, which the message names; OSError if it cannot be made or
    written to.
    """
    path, made = _made(folder, going_on)
    try:
        with locked(path) as again:
            if not again:
                _check(path, kind, going_on, own)
            yield path
    except BaseException:
        for new in made:
            with contextlib.suppress(OSError):  # something was written
                new.rmdir()
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keeps other processes, and other threads, out of a folder while the context lasts.

    **Returns:** a context manager, which yields whether this thread holds the folder already.

    **Raises:** ValueError if it is in use, naming the process and its host.
    """
    # Here, as only a run that writes needs it.
    import filelock

    lock = filelock.FileLock(folder.resolve() / _LOCK, blocking=False, is_singleton=True)
    if lock.is_locked:
        yield True
        return
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"{folder} is in use by {_holder(folder)}: wait, or stop it.") from None
    try:
        about = {"process": os.getpid(), "host": socket.gethostname()}
        (folder / _HOLDER).write_text(json.dumps(about), encoding="utf-8")
        yield False
    finally:
        # Before the lock goes; whoever opened its file meanwhile sees that it has no name.
        for name in (_HOLDER, _LOCK):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        lock.release()


def write_settings(folder: Path, kind: str, settings: dict[str, Any]):
    """Writes config.json: what repeats a run, the kind of the run, and the sha256 of both.

    **Raises:** TypeError for settings that are not JSON, before anything is written.
    """
    record = {"command": kind} | settings
    record |= {"sha256": sealed(record)}
    write_text(folder / CONFIG, json.dumps(record, indent=2) + "\n")


def read_settings(path: Path, *, unchanged: bool) -> dict[str, Any]:
    """Reads a config.json, without its sha256.

    **Arguments:**

    - `path`: of the file.
    - `unchanged`: whether it is a run's own record, which must be as the run wrote it. A file that
      a user passes as input may be edited.

    **Raises:** ValueError, naming the file, if it is missing, not JSON, or not as it was written.
    """
    record = read_json(path)
    stated = record.pop("sha256", None)
    if unchanged and stated != sealed(record):
        raise ValueError(
            f"{path} does not have the sha256 that it states: it was edited or damaged after the "
            "run wrote it, or an older jaxflow did. Put it back as it was; a run with other "
            "settings takes another folder."
        )
    return record


def sealed(content: Any) -> str:
    """The sha256 of something as canonical JSON.

    **Raises:** TypeError if it is not JSON.
    """
    # Read back, as a key that is a number becomes a string.
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    **Raises:** ValueError, naming the file, if it is missing, no regular file, not UTF-8, not JSON,
    or not an object.
    """
    try:
        return json_object(_content(path).decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from None


def json_object(text: str, what: str) -> dict[str, Any]:
    """Reads a JSON object; `what` names it in the ValueError that is raised if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} must hold a JSON object, got a {type(found).__name__}.")
    return found


def short_names(folders: Sequence[Path]) -> list[str]:
    """As many of the last parts of each path as tell them apart; a number for one that is there
    twice."""
    paths = [folder.resolve() for folder in folders]
    tails = (["/".join(p.parts[-k:]) for p in paths] for k in itertools.count(1))
    names = next(tail for tail in tails if len(set(tail)) == len(set(paths)))
    return [
        name if (earlier := names[:k].count(name)) == 0 else f"{name} ({earlier + 1})"
        for k, name in enumerate(names)
    ]


def write_text(path: Path, text: str):
    """Writes a file that is whole, or the one before, whenever the process is killed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes):
    """Writes a file that is whole, or the one before, whenever the process is killed.

    **Raises:** OSError if it cannot be written; the file before is still there.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path):
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------ what a folder holds


def _made(folder: str | Path | None, going_on: bool | None) -> tuple[Path, list[Path]]:
    """The folder, and which folders were made for it, the innermost first."""
    if folder is None:
        return _new(Path("runs"))
    path = Path(folder)
    if going_on and not path.is_dir():
        raise ValueError(f"{path} is no run to go on with: there is no such folder.")
    missing = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"a run folder is asked for, and {path} is, or is in, a file.") from None
    return path, missing


def _new(parent: Path) -> tuple[Path, list[Path]]:
    _, made = _made(parent, None)
    name = time.strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path, [path, *made]


def _check(path: Path, kind: str, going_on: bool | None, own: Collection[str]):
    config = path / CONFIG
    if os.path.lexists(config):
        found = read_settings(config, unchanged=going_on is not False).get("command")
        if found != kind:
            raise ValueError(
                f"{path} belongs to another kind of run: {config} says {found}, not {kind}. Take "
                "another folder."
            )
        if going_on is False:
            raise ValueError(
                f"{path} holds a run already: go on with it (resume), or take another folder."
            )
        return
    if going_on:
        raise ValueError(f"{path} is no run to go on with: it has no {CONFIG}.")
    if others := sorted(_RESULTS.intersection(os.listdir(path)) - set(own)):
        raise ValueError(
            f"{path} is no run folder, as it has no {CONFIG}, and holds {others[0]}, which would "
            "be overwritten. Take another folder."
        )


def _holder(path: Path) -> str:
    try:
        about = read_json(path / _HOLDER)
        return f"process {about['process']} on {about['host']}"
    except (ValueError, KeyError):  # it is about to say so
        return "another process"


def _content(path: Path) -> bytes:
    """The bytes of a regular file that is not too large for JSON."""
    try:
        if not path.is_file():
            there = os.path.lexists(path)
            raise ValueError(f"{path} is no regular file." if there else f"there is no {path}.")
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise ValueError(f"{path} has {size:,} bytes, and JSON here at most {_LARGEST_JSON:,}.")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
