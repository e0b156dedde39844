"""What a training leaves in its run folder, and how it goes on from there.

    run/config.json      what the user says of the run, with its sha256
    run/metrics.jsonl    a line a logged step
    run/checkpoints/     see `checkpoints`; each cursor seals the log up to its step

Everything is compared with what was sealed before anything is written or removed.
"""

import contextlib
import hashlib
import json
import math
import reprlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._folder import claim, json_object, sealed, sync, write_bytes, write_settings
from . import checkpoints
from .processes import gathered, is_first

KIND = "train"
CHECKPOINTS, LOG = "checkpoints", "metrics.jsonl"

# What of a config may differ where a run goes on; the text and the images have to hold the same.
CHANGEABLE = frozenset(
    {"steps", "learning_rate", "patience", "budget", "evaluation_batches", "checkpoint_every"}
    | {"minutes", "evaluate_on_interrupt", "tensorboard"}
    | {"text", "images", "labels", "cache", "jaxflow"}
)


class Place(NamedTuple):
    """Where a training is.

    The number of steps, evaluations of the field, the best loss and evaluations since; what is to
    be logged of a step whose evaluation a signal cut off; and the seconds that it took.
    """

    step: int = 0
    spent: int = 0
    best: float = math.inf
    since: int = 0
    pending: dict[str, float] | None = None
    seconds: float = 0.0

    def after(self, evaluations: float, seconds: float) -> "Place":
        """A step on."""
        return self._replace(
            step=self.step + 1, spent=self.spent + int(evaluations), seconds=seconds
        )

    def evaluated(self, loss: float) -> "Place":
        better = loss < self.best
        return self._replace(best=min(loss, self.best), since=0 if better else self.since + 1)


@contextlib.contextmanager
def opened(run: str | Path | None, *, resume: bool) -> Iterator[Path | None]:
    """Holds the run folder, if there is one, while the context lasts.

    **Raises:** ValueError as `jaxflow._folder.claim` does, and where there is no run to
    resume, or one already that is not to be resumed.
    """
    if run is None or not is_first():
        yield None
        return
    if resume and not Path(run).is_dir():
        raise ValueError(f"{run} is no run to resume: there is no such folder.")
    with claim(run, KIND, going_on=None, own=(CHECKPOINTS, LOG)) as folder:
        if not resume and checkpoints.listed(folder / CHECKPOINTS):
            raise ValueError(
                f"{run} holds a run already: pass resume=True to go on with it, or another folder."
            )
        yield folder


class Record:
    """The files of a run. Without a folder, the history alone; of `keep` None no checkpoints."""

    def __init__(self, folder: Path | None, keep: int | None, about: dict[str, Any]):
        self.folder, self.about = folder, about
        self.keep = None if keep is None else max(2, keep)
        self.log_file = _Log(None if folder is None else folder / LOG)
        self.history: list[dict[str, Any]] = []
        self.saved, self.loss = -1, None  # the step of the last checkpoint, and its loss

    @property
    def checkpoints(self) -> Path:
        assert self.folder is not None
        return self.folder / CHECKPOINTS

    def begin(self):
        """Starts a log, and says what the run is."""
        self.about = self.about | {"config": self.about["config"] or {}}
        if self.folder is not None:
            self.log_file.begin()
            write_settings(self.folder, KIND, self.about["config"])

    def resume(self, state: Any) -> tuple[Any, Any, Place] | None:
        """(state, best parameters, place) of the last checkpoint; None where there is none yet.

        One whose step failed is no place to go on from: it is removed, and the one before taken.

        **Raises:** ValueError if anything is damaged, or the run was trained with other settings.
        """
        about = {path: checkpoints.metadata(path) for path in checkpoints.listed(self.checkpoints)}
        for path, manifest in about.items():
            self._check_alike(path, manifest)
        good = {path: m for path, m in about.items() if not m["cursor"].get("failed")}
        last = next(iter(good), None)
        found = None if last is None else self._restored(state, last, good)
        # From here on all is verified.
        for path in about.keys() - good.keys():
            checkpoints.remove(path)
        if found is not None:
            self.log_file.cut()
            assert self.folder is not None
            write_settings(self.folder, KIND, self.about["config"])
        return found

    def _restored(self, state, last: Path, good: dict[Path, dict]) -> tuple[Any, Any, Place]:
        sealed_cursor = good[last]["cursor"]
        # One of an older version counted no seconds.
        cursor = Place._field_defaults | {
            name: sealed_cursor[name] for name in Place._fields if name in sealed_cursor
        }
        best = checkpoints.smallest(good, "loss")
        params = None if best is None else checkpoints.restore(best, state)[0].params
        state, _ = checkpoints.restore(last, state)
        self.history = self.log_file.verify(sealed_cursor["log"])
        cursor["best"] = math.inf if cursor["best"] is None else cursor["best"]
        place = Place(**cursor)
        self.saved, self.loss = place.step, good[last]["metrics"].get("loss")
        return state, jax.tree.map(jnp.copy, params), place

    def log(self, step: int, numbers: dict[str, Any]):
        self.history.append({"step": step} | numbers)
        self.log_file.append(self.history[-1])

    def save(
        self, state: Any, place: Place, loss: float | None = None, *, failed: bool = False
    ) -> bool:
        """Writes a checkpoint, and says whether it did: there is a folder, and some are kept."""
        self.saved, self.loss = place.step, loss
        state = gathered(state)
        if self.folder is None or self.keep is None:
            return False
        # JSON knows no infinity.
        best = None if math.isinf(place.best) else place.best
        cursor = {"best": best, "failed": failed, "log": self.log_file.mark()}
        checkpoints.save(
            self.checkpoints,
            state,
            step=place.step,
            config=self.about,
            cursor=place._asdict() | cursor,
            metrics=None if loss is None else {"loss": loss},
            keep=self.keep,
        )
        return True

    def fail(self, state: Any, place: Place):
        """Keeps the parameters of a failed step for a look, and the checkpoint before them."""
        if self.keep is not None:
            self.keep += 1
        loss = self.loss if self.saved == place.step else None
        self.save(state, place, loss, failed=True)

    def _check_alike(self, path: Path, manifest: dict[str, Any]):
        """The batches that come next, and the updates, depend on all of this."""
        before, now = manifest["config"], self.about
        if "log" not in manifest["cursor"]:
            raise ValueError(
                f"{path} was not written by `fit` of this version, so it cannot be resumed; "
                "load(run) still reads its model."
            )
        data = lambda about: {"accumulate": about["accumulate"]} | about["data"]
        if difference := _difference(data(before), data(now), {"source"}):
            raise ValueError(
                f"the run was trained on other data: {difference}. Pass the same data, batch size "
                "and accumulation to resume it."
            )
        if difference := _difference(before.get("frozen"), now.get("frozen"), (), "its sha256"):
            raise ValueError(
                f"{path} trained a part of another model, as what it left alone differs: "
                f"{difference}. Pass the same model and `trainable` to resume it."
            )
        if now["config"] is None:
            self.about = now | {"config": before["config"]}
        elif difference := _difference(before["config"], now["config"], CHANGEABLE):
            raise ValueError(
                f"{path} is of a run with another config: {difference}. Resume it with its own; "
                f"these may change: {', '.join(sorted(CHANGEABLE))}."
            )


def _difference(before: Any, now: Any, free: Collection[str], name: str = "") -> str:
    """The first entry that differs, as "name was A and is B"; "" where none does."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted((before.keys() | now.keys()) - set(free)):
            inner = f"{name}.{key}" if name else key
            if difference := _difference(before.get(key), now.get(key), free, inner):
                return difference
        return ""
    same = sealed(before) == sealed(now)
    return "" if same else f"{name} was {reprlib.repr(before)} and is {reprlib.repr(now)}"


class _Log:
    """metrics.jsonl, and the sha256 of what it holds; nothing where there is no file."""

    def __init__(self, path: Path | None):
        self.path = path
        self.content = b""
        self.digest = hashlib.sha256()
        self.size = 0

    def begin(self):
        assert self.path is not None
        write_bytes(self.path, b"")

    def append(self, row: dict[str, Any]):
        if self.path is None:
            return
        line = (json.dumps(row) + "\n").encode()
        with self.path.open("ab") as opened:
            opened.write(line)
        self.digest.update(line)
        self.size += len(line)

    def mark(self) -> dict[str, Any]:
        """What is to be there when the run goes on from now, and is on the disk."""
        assert self.path is not None
        if self.path.exists():
            sync(self.path)
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}

    def verify(self, mark: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows up to a mark; none where there is no file.

        **Raises:** ValueError if they are not those that were written.
        """
        assert self.path is not None
        if not self.path.exists():
            return []
        self.content = self.path.read_bytes()[: mark["bytes"]]
        self.digest, self.size = hashlib.sha256(self.content), len(self.content)
        if self.digest.hexdigest() != mark["sha256"]:
            raise ValueError(
                f"{self.path} is damaged: its first {mark['bytes']} bytes, which the last "
                "checkpoint was saved with, are not as they were written. Put them back, or delete "
                "the file to go on without what was logged before."
            )
        lines = self.content.decode().splitlines()
        return [json_object(line, f"a line of {self.path}") for line in lines]

    def cut(self):
        """Forgets what was logged after the mark: it is going to happen again."""
        assert self.path is not None
        write_bytes(self.path, self.content)
