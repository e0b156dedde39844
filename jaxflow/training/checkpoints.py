"""Checkpoints that are whole or absent, and verified.

    run/step-00001000/arrays/          the arrays of the state, by orbax
    run/step-00001000/manifest.json    array -> shape, dtype, sha256; file -> sha256;
                                       step, config, cursor, metrics; its own sha256

A checkpoint is written beside its place, flushed to the disk and renamed, so a run killed at any
moment leaves the previous one. Orbax restores an array with a flipped bit without a word; here each
file, each array and the manifest itself has to match its sha256. A checkpoint that does not is an
error, never skipped and never removed. One process writes to a folder at a time; any may read.
"""

import hashlib
import importlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np

from .. import __version__
from .._folder import locked, read_json, sealed, sync
from .._rules import count
from .leaves import digest, from_host, is_stored, layout, named, to_host, top

_TEMPORARY = re.compile(r"\.saving-\w{8}")
_REPLACED = ".replaced"
_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_MANIFEST = "manifest.json"


def save(
    folder: str | Path,
    state: Any,
    *,
    step: int,
    config: dict[str, Any],
    cursor: dict[str, Any],
    metrics: dict[str, float] | None = None,
    keep: int = 2,
    metric: str = "loss",
) -> Path:
    """Writes the checkpoint of a step, then removes old ones.

    **Arguments:**

    - `folder`: of the run's checkpoints; made if need be.
    - `state`: any PyTree. Its arrays (JAX, NumPy, PRNG keys) are stored, by their names in the
      tree; everything else comes from `like` in `jaxflow.training.restore`.
    - `step`: the number of steps done, which names the checkpoint. One that has this number
      already is replaced.
    - `config`, `cursor`, `metrics`: JSON objects: what rebuilds the run, where its data go on, how
      good it is.
    - `keep`: how many of the last checkpoints stay, at least 1.
    - `metric`: the checkpoint with the smallest finite `metrics[metric]` stays as well. One that is
      damaged stays too: it is never removed here.

    **Returns:** the checkpoint's folder.

    **Raises:** TypeError for a config, cursor or metrics that are not JSON objects, or a step or
    `keep` that is no whole number; ValueError for a step below 0 or a `keep` below 1, or if another
    process writes to the folder; OSError if the disk is full. What was there before is then as it
    was.

    ```python
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = jaxflow.training.save(folder, {"w": jnp.ones(2)}, step=3, config={}, cursor={})
    >>> path.name
    'step-00000003'

    ```
    """
    count("step", step, least=0)
    count("keep", keep)
    about = {"config": config, "cursor": cursor, "metrics": metrics or {}}
    _check_json(about)
    leaves = named(state)
    arrays = {name: to_host(leaf) for name, leaf in leaves.items()}
    manifest = {"jaxflow": __version__, "step": int(step)} | about
    manifest["arrays"] = {
        name: layout(leaf) | {"sha256": digest(arrays[name])} for name, leaf in leaves.items()
    }
    run = Path(folder).absolute()
    run.mkdir(parents=True, exist_ok=True)
    final = run / f"step-{step:08d}"
    with locked(run):
        _remove_leftovers(run)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=run) as temporary:
            work = Path(temporary) / final.name
            work.mkdir()
            _write_arrays(work, arrays)
            manifest["files"] = _file_digests(work)
            record = {"sha256": sealed(manifest), "manifest": manifest}
            (work / _MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            _publish(work, final)
            _prune(run, final, Path(temporary), keep, metric)
    return final


def restore(folder: str | Path, like: Any, *, partial: bool = False) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint into a tree like the one that was saved.

    **Arguments:**

    - `folder`: a checkpoint, as `jaxflow.training.latest` finds it.
    - `like`: a PyTree with arrays, or `jax.ShapeDtypeStruct`, of the saved names, shapes and
      dtypes. Arrays go to the devices that those of `like` were put on.
    - `partial`: whether `like` may leave out whole parts of the checkpoint: arrays under none of
      the names at the top of its tree.

    **Returns:** the state, and the manifest: `step`, `config`, `cursor`, `metrics`, `jaxflow` (the
    version that wrote it).

    **Raises:** ValueError if the checkpoint is damaged, naming the file and, where it is known, the
    array, or if its arrays are not those of `like`.

    ```python
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = jaxflow.training.save(folder, {"w": jnp.ones(2)}, step=3, config={}, cursor={})
    ...     state, about = jaxflow.training.restore(path, {"w": jnp.zeros(2)})
    >>> state["w"].tolist()
    [1.0, 1.0]

    ```
    """
    path = Path(folder).absolute()
    manifest = _manifest(path)
    leaves = named(like)
    expected = manifest["arrays"]
    if partial:
        tops = {top(name) for name in leaves}
        expected = {name: entry for name, entry in expected.items() if top(name) in tops}
    _check_alike(path, leaves, expected)
    _check_files(path, manifest)
    arrays = _read_arrays(path, manifest["arrays"])
    if damage := _array_damage(arrays, manifest["arrays"]):
        raise _damaged(path, damage)
    stored = (from_host(arrays[name], leaf) for name, leaf in leaves.items())
    state = jtu.tree_map(lambda leaf: next(stored) if is_stored(leaf) else leaf, like)
    return state, _without_digests(manifest)


def metadata(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without its arrays: `step`, `config`, `cursor`, ...

    **Arguments:** `folder`: of one checkpoint.

    **Returns:** a dictionary.

    **Raises:** ValueError if it is no checkpoint, or its manifest is damaged.

    ```python
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = jaxflow.training.save(folder, {"w": jnp.ones(2)}, step=3, config={}, cursor={})
    ...     about = jaxflow.training.metadata(path)
    >>> about["step"]
    3

    ```
    """
    return _without_digests(_manifest(Path(folder).absolute()))


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run; None if there is none.

    **Arguments:** `folder`: of the checkpoints.

    **Returns:** its path, or `None`.

    **Raises:** ValueError if the manifest of the newest one is damaged.

    ```python
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = jaxflow.training.save(folder, {"w": jnp.ones(2)}, step=3, config={}, cursor={})
    ...     newest = jaxflow.training.latest(folder)
    >>> newest.name
    'step-00000003'

    ```
    """
    path = next(iter(listed(folder)), None)
    if path is not None:
        _manifest(path)
    return path


def best(folder: str | Path, metric: str = "loss") -> Path | None:
    """The checkpoint of a run with the smallest finite `metrics[metric]`; None if there is none.

    **Arguments:** `folder`: of the checkpoints; `metric`: a name among the metrics that they hold.

    **Returns:** its path, or `None`.

    **Raises:** ValueError if the manifest of any is damaged, as that may be the best.

    ```python
    >>> import tempfile
    >>> about = {"config": {}, "cursor": {}, "metrics": {"loss": 2.0}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = jaxflow.training.save(folder, {"w": jnp.ones(2)}, step=3, **about)
    ...     least = jaxflow.training.best(folder)
    >>> least.name
    'step-00000003'

    ```
    """
    return smallest({path: _manifest(path) for path in listed(folder)}, metric)


def listed(folder: str | Path) -> list[Path]:
    """The checkpoints of a run by name, newest first; of one being replaced, the new one."""
    run = Path(folder)
    try:
        names = os.listdir(run)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found: dict[int, Path] = {}
    for name in sorted(names):
        if match := _NAME.fullmatch(name):
            found.setdefault(int(match[1]), run / name)
    return [found[step] for step in sorted(found, reverse=True)]


def remove(folder: str | Path):
    """Removes a checkpoint; one that a kill cuts off in the middle is found no more.

    **Raises:** ValueError if its manifest is damaged, as it may not be what it seems.
    """
    path = Path(folder).absolute()
    _manifest(path)
    with (
        locked(path.parent),
        tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as temporary,
    ):
        os.rename(path, Path(temporary) / path.name)


# ------------------------------------------------------------------ what is refused


def _check_json(about: dict[str, Any]):
    for name, value in about.items():
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dictionary, got {value!r}.")
    for name, number in about["metrics"].items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"metrics must be numbers; {name} is {number!r}.")
    try:
        sealed(about)
    except TypeError as error:
        raise TypeError(f"config, cursor and metrics must be JSON: {error}.") from error


def _check_alike(path: Path, leaves: dict[str, Any], expected: dict[str, Any]):
    remedy = "Build the tree from the checkpoint's config."
    for kind, names in {
        "has no": sorted(set(leaves) - set(expected)),
        "has besides": sorted(set(expected) - set(leaves)),
    }.items():
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(
                f"checkpoint {path} does not fit the tree: it {kind} {shown} ({len(names)} of "
                f"{len(expected)} arrays). {remedy}"
            )
    for name, leaf in leaves.items():
        asked = layout(leaf)
        saved = {k: v for k, v in expected[name].items() if k != "sha256"}
        if saved != asked:
            raise ValueError(
                f"checkpoint {path} does not fit the tree: array {name} is {saved}, the tree has "
                f"{asked}. {remedy}"
            )


def _check_files(path: Path, manifest: dict[str, Any]):
    """Refuses files that are missing, not of the checkpoint, or not as they were written."""
    stated, found = manifest["files"], _file_digests(path)
    wrong = sorted(name for name in stated | found if stated.get(name) != found.get(name))
    if not wrong:
        return
    name = wrong[0]
    known = "is not as it was written" if name in stated else "is not one of its files"
    what = f"file {name} {known if name in found else 'is missing'}"
    # Damaged values may be read, to find their array; damaged sizes could ask for any memory.
    if all(name in stated and name in found and Path(name).parent.name == "d" for name in wrong):
        what = _damaged_array(path, manifest["arrays"]) + what
    raise _damaged(path, what)


def _damaged_array(path: Path, expected: dict[str, Any]) -> str:
    for name in expected:
        one = {name: expected[name]}
        try:
            damage = _array_damage(_read_arrays(path, one), one)
        except Exception:  # orbax and tensorstore raise whatever the bytes lead to
            damage = f"array {name} cannot be read"
        if damage:
            return damage + "; "
    return ""


def _array_damage(arrays: dict[str, np.ndarray], expected: dict[str, Any]) -> str:
    for name, entry in expected.items():
        found = layout(arrays[name]) | {"sha256": digest(arrays[name])}
        for what, value in found.items():
            if value != entry[what]:
                return f"array {name} has {what} {value}, expected {entry[what]}"
    return ""


def _damaged(path: Path, what: str) -> ValueError:
    others = [other for other in _whole(path.parent) if other != path]
    remedy = f"and resume from {others[0]}" if others else "; no other one is beside it"
    return ValueError(f"checkpoint {path} is damaged: {what}; delete it {remedy}.")


# ------------------------------------------------------------------ arrays in files


def require() -> Any:
    """The module that writes arrays.

    **Raises:** ImportError, with what to install.
    """
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError(
            'checkpoints need orbax-checkpoint: pip install "jaxflow[train]".'
        ) from error


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]):
    # Orbax takes neither an array without an element nor a tree without an array.
    if filled := {name: array for name, array in arrays.items() if array.size}:
        orbax = require()
        try:
            with orbax.StandardCheckpointer(multiprocessing_options=_alone(orbax)) as checkpointer:
                checkpointer.save(path / "arrays", filled)
        except (OSError, ValueError) as error:  # tensorstore's error of a full disk is the latter
            raise OSError(
                f"{path.name} could not be written: {error}. Those before are as they were."
            ) from error


def _read_arrays(path: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    filled = [name for name, entry in expected.items() if math.prod(entry["shape"])]
    empty = set(expected) - set(filled)
    arrays = {k: np.zeros(expected[k]["shape"], expected[k]["dtype"]) for k in empty}
    if not filled:
        return arrays
    orbax = require()
    asked = orbax.args.PyTreeRestore(item=dict.fromkeys(filled, 0), partial_restore=True)
    alone = {"multiprocessing_options": _alone(orbax)}
    with orbax.Checkpointer(orbax.PyTreeCheckpointHandler(**alone), **alone) as checkpointer:
        found = checkpointer.restore(path / "arrays", args=asked)
    return arrays | {name: np.asarray(found[name]) for name in filled}


def _alone(orbax: Any) -> Any:
    """Of several processes, the one that calls reads and writes without the others."""
    if jax.process_count() == 1:
        return orbax.options.MultiprocessingOptions()
    own = jax.process_index()
    return orbax.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process-{own}"
    )


def _file_digests(path: Path) -> dict[str, str]:
    """The sha256 of each file of a checkpoint but its manifest."""
    digests = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if name != _MANIFEST and not file.is_dir():
            with file.open("rb") as content:
                digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return digests


# ------------------------------------------------------------------ manifests


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which is what was written."""
    file, match = path / _MANIFEST, _NAME.fullmatch(path.name)
    if not path.is_dir() or not (match or os.path.lexists(file)):
        lacks = f"it has no {_MANIFEST}" if path.is_dir() else "there is no such folder"
        raise ValueError(f"{path} is no checkpoint: {lacks}. latest(folder) finds those of a run.")
    try:
        record = read_json(file)
        manifest = record.get("manifest")
        if record.get("sha256") != sealed(manifest) or not isinstance(manifest, dict):
            raise ValueError(f"{_MANIFEST} does not have the sha256 that it states")
        if match is not None and int(match[1]) != manifest["step"]:
            raise ValueError(f"{_MANIFEST} is of step {manifest['step']}")
    except ValueError as error:
        raise _damaged(path, str(error).rstrip(".")) from None
    return manifest


def _whole(run: Path) -> dict[Path, dict[str, Any]]:
    """The checkpoints with a whole manifest, newest first, for those who may not fail."""
    found = {}
    for path in listed(run):
        try:
            record = read_json(path / _MANIFEST)
            if record["sha256"] == sealed(record["manifest"]):
                found[path] = record["manifest"]
        except (ValueError, KeyError):
            continue
    return found


def _without_digests(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name not in ("arrays", "files")}


def smallest(manifests: dict[Path, dict[str, Any]], metric: str) -> Path | None:
    """The checkpoint with the smallest finite metric among these."""
    scores = {path: manifest["metrics"].get(metric) for path, manifest in manifests.items()}
    finite = [p for p, x in scores.items() if isinstance(x, int | float) and math.isfinite(x)]
    return min(finite, key=lambda path: scores[path], default=None)


# ------------------------------------------------------------------ names that come and go


def _remove_leftovers(run: Path):
    """What a run killed within `save` left behind; the lock says that none is at it."""
    for path in run.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_dir():
            if all(_NAME.fullmatch(name) for name in os.listdir(path)):
                shutil.rmtree(path)
    for path in run.glob(f"step-*{_REPLACED}"):
        new = path.with_suffix("")
        if _NAME.fullmatch(path.name) and new in _whole(run):
            _check_files(new, _manifest(new))
            shutil.rmtree(path)


def _publish(work: Path, final: Path):
    """Flushes the checkpoint to the disk and gives it its name, so that it is whole or absent."""
    for path in [work, *work.rglob("*")]:
        sync(path)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():  # `latest` finds it by this name too, until the new one has its own
        os.rename(final, replaced)
    os.rename(work, final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _prune(run: Path, final: Path, temporary: Path, keep: int, metric: str):
    """Removes all but `keep` and the best; first by a rename, so that none is found in parts."""
    whole = _whole(run)
    kept = {final, smallest(whole, metric), *list(whole)[:keep]}
    for path in whole:
        if path not in kept:
            os.rename(path, temporary / path.name)
