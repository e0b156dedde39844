"""Run folders: what `fit(run=...)` leaves, and models read back from it."""

from pathlib import Path
from typing import Any

import equinox as eqx

from .. import models
from . import checkpoints
from .tokenizers import tokenizer_from_dict


def load(path: str | Path, like: Any = None, *, which: str = "best") -> Any:
    """The model of a run.

    **Arguments:**

    - `path`: the run folder.
    - `like`: a model of the same structure. `None` builds it from the configuration of the run,
      for one that the command line made, or whose `fit` was given `config={"model": ...}` as
      [`jaxflow.models.build`][] takes it.
    - `which`: "best", by validation loss, or "latest".

    **Raises:** ValueError where there is no such run, or its checkpoint is damaged.
    """
    if which not in ("best", "latest"):
        raise ValueError(f'which must be "best" or "latest", got {which!r}.')
    checkpoint = _checkpoint(path, which)
    if like is None:
        config = checkpoints.metadata(checkpoint)["config"]["config"]
        if "model" not in config:
            raise ValueError(
                f"{path} does not say how its model is built: pass like=, a model of its structure."
            )
        like = models.build(config["model"])
    params, static = eqx.partition(like, eqx.is_inexact_array)
    state, _ = checkpoints.restore(checkpoint, _Params(params), partial=True)
    return eqx.combine(state.params, static)


def tokenizer(path: str | Path) -> Any:
    """The tokenizer of a run on text."""
    data = checkpoints.metadata(_checkpoint(path, "latest"))["config"]["data"]
    if "tokenizer" not in data:
        raise ValueError(f"{path} was not trained on text, so it has no tokenizer.")
    return tokenizer_from_dict(data["tokenizer"])


class _Params(eqx.Module):
    """The part of the loop's state that a model needs, under the same name."""

    params: Any


def _checkpoint(path: str | Path, which: str) -> Path:
    folder = Path(path) / "checkpoints"
    found = checkpoints.best(folder) if which == "best" else None
    found = found or checkpoints.latest(folder)
    if found is None:
        raise ValueError(f"{path} is no run with a checkpoint.")
    return found
