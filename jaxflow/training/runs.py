"""Run folders: what `fit(run=...)` leaves, and models read back from it."""

from pathlib import Path
from typing import Any

import equinox as eqx

from .. import models
from .._rules import path as path_of
from . import checkpoints, parameters
from .parts import check_frozen, parted
from .record import CHECKPOINTS
from .tokenizers import tokenizer_from_dict


def load(
    path: str | Path,
    like: Any = None,
    *,
    which: str = "best",
    trainable: Any = eqx.is_inexact_array,
) -> Any:
    """The model of a run.

    **Arguments:**

    - `path`: the run folder, or a file that `jaxflow.training.export` wrote.
    - `like`: a model of the same structure. `None` builds it from the configuration of the run,
      for one that the command line made, or whose `fit` was given `config={"model": ...}` as
      `jaxflow.models.build` takes it.
    - `which`: "best", by validation loss, or "latest". Where nothing was evaluated the best is the
      latest.

    - `trainable`: as `fit` was given it, of a run that trained a part of the model; `like` then has
      the rest, with its own numbers.

    **Returns:** the model with the parameters of the checkpoint.

    **Raises:** ValueError where there is no such run, the model has other parameters, or the
    checkpoint is damaged. Another checkpoint is never returned in its place.

    ```python
    >>> import tempfile
    >>> model = jaxflow.models.ResidualNetwork(4, 2, 3, 1, width=2, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxflow.training.export(model, f"{folder}/model.safetensors")
    ...     same = jaxflow.training.load(f"{folder}/model.safetensors", like=model)
    >>> bool(jnp.array_equal(same.embedding.weight, model.embedding.weight))
    True

    ```
    """
    if which not in ("best", "latest"):
        raise ValueError(f'which must be "best" or "latest", got {which!r}.')
    path = path_of("path", path)
    if path.suffix == parameters.ENDING and not path.is_dir():
        return parameters.read(path, like)
    checkpoint = _checkpoint(path, which)
    if like is None:
        config = _about(checkpoint)["config"]
        if "model" not in config:
            raise ValueError(
                f"{path} does not say how its model is built: pass like=, a model of its "
                "structure, to jaxflow.training.load; what that returns can be exported."
            )
        like = models.build(config["model"])
    params, static = parted(like, trainable)
    check_frozen(static, _about(checkpoint), path)
    state, _ = checkpoints.restore(checkpoint, _Params(params), partial=True)
    return eqx.combine(state.params, static)


def export(run: str | Path | eqx.Module, file: str | Path, *, which: str = "best") -> None:
    """Writes the parameters of a run, or of a model, to a safetensors file for any library.

    The name of an array is the path of its attribute in the model, such as `embedding`,
    `norm.gain` or `field.curve.coefficients.fields.0.field.query`, and its shape that of the
    docstring of its class, with the layers first. `jaxflow.training.load` reads the file back,
    of a run that says how its model is built without `like`; PyTorch by `safetensors.torch`.

    **Arguments:**

    - `run`: the run folder, or a model. `which`: as in `jaxflow.training.load`.
    - `file`: a path that ends in .safetensors. A file that is there is replaced when the new one is
      whole.

    **Raises:** ValueError where there is no such run or folder for the file, or the checkpoint is
    damaged; ImportError without the safetensors library.

    ```python
    >>> import tempfile
    >>> model = jaxflow.models.ResidualNetwork(4, 2, 3, 1, width=2, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxflow.training.export(model, f"{folder}/model.safetensors")

    ```
    """
    file = path_of("file", file)
    if isinstance(run, eqx.Module):
        return parameters.write(run, file, None)
    run = path_of("run, if it is no model,", run)
    config = _about(_checkpoint(run, which))["config"].get("model")
    parameters.write(load(run, which=which), file, config)


def tokenizer(path: str | Path) -> Any:
    """The tokenizer of a run on text.

    **Arguments:** `path`: the run folder.

    **Returns:** a fitted `Bytes`, `Chars`, `BPE` or `TokenizerFile`.

    **Raises:** ValueError where there is no such run, its last checkpoint is damaged, or it was not
    trained on text.

    ```python
    >>> jaxflow.training.tokenizer("runs/shakespeare").encode("ROMEO:")  # doctest: +SKIP

    ```
    """
    data = _about(_checkpoint(path, "latest"))["data"]
    if "tokenizer" not in data:
        raise ValueError(f"{path} was not trained on text, so it has no tokenizer.")
    return tokenizer_from_dict(data["tokenizer"])


class _Params(eqx.Module):
    """The part of the loop's state that a model needs, under the same name."""

    params: Any


def _checkpoint(path: str | Path, which: str) -> Path:
    folder = Path(path) / CHECKPOINTS
    found = checkpoints.best(folder) if which == "best" else None
    found = found or checkpoints.latest(folder)
    if found is None:
        raise ValueError(
            f"{path} is no run with a checkpoint: pass the folder that fit(run=...) or `jaxflow "
            "train` wrote to."
        )
    return found


def _about(checkpoint: Path) -> dict[str, Any]:
    """What `fit` said of the run: its config and its data."""
    about = checkpoints.metadata(checkpoint)["config"]
    if not {"config", "data"} <= about.keys():
        raise ValueError(f"checkpoint {checkpoint} is not of `fit`, which says how to go on.")
    return about
