"""Checkpoints that are whole or absent, and verified.

    run/step-00001000/arrays/          the arrays of the state, by orbax
    run/step-00001000/manifest.json    array -> shape, dtype, sha256; file -> sha256;
                                       step, config, cursor, metrics; its own sha256

A checkpoint is written beside its place, flushed to the disk and renamed, so a run killed at any
moment leaves the previous one. Orbax restores an array with a flipped bit without a word; here each
array, and the manifest itself, has to match its sha256. One process writes to a folder at a time;
any number may read.
"""

import hashlib
import importlib
import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

_TEMPORARY = ".saving-"
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
      tree; everything else comes from `like` in [`jaxflow.training.restore`][].
    - `step`: the number of steps done, which names the checkpoint. One that has this number
      already is replaced.
    - `config`, `cursor`, `metrics`: JSON; what rebuilds the run, where its data go on, how good
      it is.
    - `keep`: how many of the last checkpoints stay, at least 1.
    - `metric`: the checkpoint with the smallest finite `metrics[metric]` stays as well.

    **Returns:** the checkpoint's folder.

    **Raises:** TypeError for a config, cursor or metrics that are not JSON.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be >= 0 and keep >= 1; got {step} and {keep}.")
    # Here, because the package is not whole yet when it imports this module.
    from .. import __version__

    leaves = _arrays(state)
    arrays = {name: _to_host(leaf) for name, leaf in leaves.items()}
    manifest: dict[str, Any] = {
        "jaxflow": __version__,
        "step": step,
        "config": config,
        "cursor": cursor,
        "metrics": metrics or {},
        "arrays": {
            name: _layout(leaf) | {"sha256": _digest(arrays[name])} for name, leaf in leaves.items()
        },
    }
    _seal(manifest)  # refuses what is no JSON before anything is written
    run = Path(folder).absolute()
    run.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(run)
    final = run / f"step-{step:08d}"
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=run) as temporary:
        work = Path(temporary) / final.name
        work.mkdir()
        _write_arrays(work, arrays)
        manifest["files"] = _file_digests(work)
        sealed = {"sha256": _seal(manifest), "manifest": manifest}
        (work / _MANIFEST).write_text(json.dumps(sealed, indent=1) + "\n")
        _publish(work, final)
        _prune(run, final, Path(temporary), keep, metric)
    return final


def restore(folder: str | Path, like: Any, *, partial: bool = False) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint into a tree like the one that was saved.

    **Arguments:**

    - `folder`: a checkpoint, as [`jaxflow.training.latest`][] finds it.
    - `like`: a PyTree with arrays, or `jax.ShapeDtypeStruct`, of the saved names, shapes and
      dtypes. Arrays go to the devices that those of `like` were put on.
    - `partial`: whether `like` may leave out whole parts of the checkpoint: arrays under none of
      the names at the top of its tree.

    **Returns:** the state, and the manifest: `step`, `config`, `cursor`, `metrics`, `jaxflow` (the
    version that wrote it).

    **Raises:** ValueError if the checkpoint is damaged, naming the array, or if its arrays are not
    those of `like`.
    """
    path = Path(folder).absolute()
    manifest = _manifest(path)
    leaves = _arrays(like)
    expected = manifest["arrays"]
    if partial:
        tops = {_top(name) for name in leaves}
        expected = {name: entry for name, entry in expected.items() if _top(name) in tops}
    _check_alike(path, leaves, expected)
    arrays = _read_arrays(path, manifest)
    stored = (_from_host(arrays[name], leaf) for name, leaf in leaves.items())
    state = jtu.tree_map(lambda leaf: next(stored) if _is_stored(leaf) else leaf, like)
    return state, _without_digests(manifest)


def metadata(folder: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without its arrays: `step`, `config`, `cursor`, ..."""
    return _without_digests(_manifest(Path(folder).absolute()))


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run that has a whole manifest; None if there is none."""
    return next(iter(_checkpoints(Path(folder))), None)


def best(folder: str | Path, metric: str = "loss") -> Path | None:
    """The checkpoint of a run with the smallest finite `metrics[metric]`; None if there is none."""
    scores = {
        path: manifest["metrics"].get(metric)
        for path, manifest in _checkpoints(Path(folder)).items()
    }
    finite = [p for p, x in scores.items() if isinstance(x, int | float) and math.isfinite(x)]
    return min(finite, key=lambda path: scores[path], default=None)


def remove(folder: str | Path, since: int):
    """Removes the checkpoints of that step and later ones, the last first."""
    run = Path(folder).absolute()
    _remove_leftovers(run)
    for path in _folders(run):
        if int(path.stem.removeprefix("step-")) >= since:
            with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=run) as temporary:
                os.rename(path, Path(temporary) / path.name)


# ------------------------------------------------------------------ arrays of a tree


def _is_stored(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _arrays(tree: Any) -> dict[str, Any]:
    leaves = jtu.tree_leaves_with_path(tree)
    return {jtu.keystr(path): leaf for path, leaf in leaves if _is_stored(leaf)}


def _top(name: str) -> str:
    """The first key of a name such as ".params.field[0]"."""
    return re.match(r"\W*\w*", name).group()  # pyright: ignore[reportOptionalMemberAccess]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """The generator of PRNG keys; by a trace, which knows that of a ShapeDtypeStruct too."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _to_host(leaf: Any) -> np.ndarray:
    # A copy: the next step may write to the memory of the array.
    return np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _from_host(stored: np.ndarray, leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return stored
    if isinstance(leaf, np.generic):
        return stored[()]
    array = jnp.array(stored)
    if _is_key(leaf):
        array = jax.random.wrap_key_data(array, impl=_key_impl(leaf))
    placed = isinstance(leaf, jax.Array) and leaf.committed
    return jax.device_put(array, leaf.sharding) if placed else array


def _layout(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of an array as it is stored, and the generator of a PRNG key."""
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    layout = {"dtype": str(data.dtype), "shape": list(data.shape)}
    return layout | ({"key": str(_key_impl(leaf))} if _is_key(leaf) else {})


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


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
        asked = _layout(leaf)
        saved = {k: v for k, v in expected[name].items() if k != "sha256"}
        if saved != asked:
            raise ValueError(
                f"checkpoint {path} does not fit the tree: array {name} is {saved}, the tree has "
                f"{asked}. {remedy}"
            )


# ------------------------------------------------------------------ files


def require() -> Any:
    """The module that writes arrays."""
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError(
            'checkpoints need orbax-checkpoint: pip install "jaxflow[train]".'
        ) from error


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]):
    # Orbax takes neither an array without an element nor a tree without an array.
    if filled := {name: array for name, array in arrays.items() if array.size}:
        with require().StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "arrays", filled)


def _read_arrays(path: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    expected = manifest["arrays"]
    filled = [name for name, entry in expected.items() if math.prod(entry["shape"])]
    empty = set(expected) - set(filled)
    arrays = {k: np.zeros(expected[k]["shape"], expected[k]["dtype"]) for k in empty}
    if manifest["files"] == _file_digests(path):
        arrays |= _restore_arrays(path, filled)
    else:
        for name in filled:  # one by one, to find the array that the damage is in
            try:
                arrays |= _restore_arrays(path, [name])
            except Exception as error:  # orbax and tensorstore raise whatever the bytes lead to
                raise _damaged(path, f"array {name} cannot be read") from error
    for name, entry in expected.items():
        found, sha256 = _layout(arrays[name]), _digest(arrays[name])
        if found["shape"] != entry["shape"] or found["dtype"] != entry["dtype"]:
            raise _damaged(path, f"array {name} is {found}, expected {entry}")
        if sha256 != entry["sha256"]:
            raise _damaged(path, f"array {name} has sha256 {sha256}, expected {entry['sha256']}")
    return arrays


def _restore_arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    if not names:
        return {}
    orbax = require()
    asked = orbax.args.PyTreeRestore(item=dict.fromkeys(names, 0), partial_restore=True)
    with orbax.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(path / "arrays", args=asked)
    return {name: np.asarray(found[name]) for name in names}


def _file_digests(path: Path) -> dict[str, str]:
    """The sha256 of each file that holds arrays."""
    digests = {}
    for file in sorted((path / "arrays").rglob("*")):
        if file.is_file():
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            digests[file.relative_to(path).as_posix()] = digest
    return digests


def _seal(manifest: Any) -> str:
    """The sha256 of the manifest as canonical JSON."""
    try:
        # Read back, as a key that is a number becomes a string.
        text = json.dumps(json.loads(json.dumps(manifest)), sort_keys=True)
    except TypeError as error:
        raise TypeError(f"config, cursor and metrics must be JSON: {error}.") from error
    return hashlib.sha256(text.encode()).hexdigest()


def _whole_manifest(path: Path) -> dict[str, Any] | None:
    try:
        sealed = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        whole = sealed["sha256"] == _seal(sealed["manifest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sealed["manifest"] if whole else None


def _manifest(path: Path) -> dict[str, Any]:
    if not (path / _MANIFEST).is_file():
        raise ValueError(
            f"{path} is no checkpoint: it has no {_MANIFEST}. latest(folder) finds those of a run."
        )
    manifest = _whole_manifest(path)
    if manifest is None:
        raise _damaged(path, f"{_MANIFEST} does not have the sha256 that it states")
    return manifest


def _without_digests(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name not in ("arrays", "files")}


def _damaged(path: Path, what: str) -> ValueError:
    others = [other for other in _checkpoints(path.parent) if other != path]
    remedy = f"and resume from {others[0]}" if others else "; no other one is beside it"
    return ValueError(f"checkpoint {path} is damaged: {what}; delete it {remedy}.")


def _folders(run: Path) -> list[Path]:
    """The checkpoints by name, newest first; of one that is being replaced, the new one."""
    found: dict[int, Path] = {}
    for path in sorted(run.glob("step-*")):
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), path)
    return [found[step] for step in sorted(found, reverse=True)]


def _checkpoints(run: Path) -> dict[Path, dict[str, Any]]:
    """The checkpoints with a whole manifest, newest first."""
    manifests = ((path, _whole_manifest(path)) for path in _folders(run))
    return {path: manifest for path, manifest in manifests if manifest is not None}


def _remove_leftovers(run: Path):
    """What a run killed within `save` left behind."""
    for path in run.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)
    for path in run.glob(f"step-*{_REPLACED}"):
        if path.with_suffix("").exists():
            shutil.rmtree(path)


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, text: str):
    """Writes a file that is whole, or the one before, whenever the process is killed."""
    beside = path.with_name(_TEMPORARY + path.name)
    beside.write_text(text)
    _sync(beside)
    os.replace(beside, path)


def _publish(work: Path, final: Path):
    """Flushes the checkpoint to the disk and gives it its name, so that it is whole or absent."""
    for path in [work, *work.rglob("*")]:
        _sync(path)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():  # `latest` finds it by this name too, until the new one has its own
        os.rename(final, replaced)
    os.rename(work, final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _prune(run: Path, final: Path, temporary: Path, keep: int, metric: str):
    """Removes all but `keep` and the best; first by a rename, so that none is found in parts."""
    kept = {final, best(run, metric), *list(_checkpoints(run))[:keep]}
    for path in _folders(run):
        if path not in kept:
            os.rename(path, temporary / path.name)
