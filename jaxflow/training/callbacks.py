"""Callbacks of a training, functions (step, metrics, model), and TensorBoard's.

Other trackers need no code of ours. Weights & Biases:

    import wandb

    with wandb.init(project="flows", dir=folder, config=config) as tracked:
        log = lambda step, metrics, model: tracked.log(metrics, step=step)
        jaxflow.training.fit(model, data, steps=1000, callbacks=[log])

MLflow:

    import mlflow

    with mlflow.start_run():
        mlflow.log_params(config)
        log = lambda step, metrics, model: mlflow.log_metrics(metrics, step=step)
        jaxflow.training.fit(model, data, steps=1000, callbacks=[log])
"""

import importlib
import inspect
import os
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .step import TrainingError

# (step, metrics, model): the number of steps done, what was measured, the model then.
Callback = Callable[[int, dict[str, float], Any], Any]


def check(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks of a training.

    **Raises:** TypeError for what is no sequence of functions (step, metrics, model).
    """
    rule = "callbacks must be a list of functions (step, metrics, model)"
    if not isinstance(callbacks, Sequence):
        raise TypeError(f"{rule}, got {callbacks!r}.")
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"{rule}; it has {callback!r}.")
        try:
            inspect.signature(callback).bind(0, {}, None)
        except ValueError:  # a function in C need not tell
            continue
        except TypeError as error:
            raise TypeError(f"{rule}; {name(callback)} cannot be called so: {error}.") from None
    return tuple(callbacks)


def name(callback: Callback) -> str:
    return getattr(callback, "__qualname__", None) or repr(callback)


def call(callbacks: Sequence[Callback], step: int, metrics: dict[str, float], model: Any):
    """Calls each, with a dictionary of its own.

    **Raises:** TrainingError, naming the callback, from what it raised.
    """
    for callback in callbacks:
        try:
            callback(step, dict(metrics), model)
        except Exception as error:
            raise TrainingError(
                f"the callback {name(callback)} failed after step {step}: "
                f"{type(error).__name__}: {error}. The training itself is well: a run with a "
                "folder is saved there, and resume=True goes on after this step."
            ) from error


def tensorboard(folder: str | Path) -> Callback:
    """A callback that writes the metrics for TensorBoard.

    `fit(..., callbacks=[tensorboard("runs/one/tensorboard")])`, and `tensorboard --logdir runs`
    shows them. A run that goes on replaces what was written of the steps that it makes again.

    **Arguments:** `folder`: of the event files, made with the first of them.

    **Returns:** a callback, for `fit(callbacks=[...])`.

    **Raises:** ImportError, with what to install, where tensorboardX is missing.

    ```python
    >>> write = jaxflow.training.tensorboard("runs/one/events")  # no file before it is called
    >>> fitted = jaxflow.training.fit(model, data, steps=9, callbacks=[write])  # doctest: +SKIP

    ```
    """
    try:
        modules = ("event_file_writer", "proto.event_pb2", "summary")
        writer, events, summaries = (importlib.import_module(f"tensorboardX.{m}") for m in modules)
    except ImportError as error:
        raise ImportError(
            'TensorBoard needs tensorboardX: pip install "jaxflow[tensorboard]".'
        ) from error
    return _TensorBoard(Path(folder), writer.EventsWriter, events, summaries.scalar)


class _TensorBoard:
    """Writes at once, as a queue would lose what a process that is killed has measured last."""

    __qualname__ = "tensorboard"

    def __init__(self, folder: Path, writer: Callable, events: Any, scalar: Callable):
        self.folder, self.writer, self.events, self.scalar = folder, writer, events, scalar
        self.file: Any = None

    def __call__(self, step: int, metrics: dict[str, float], model: Any):
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A file of its own, though another run began in the same second.
            self.file = self.writer(str(self.folder / "events"), f".{os.getpid()}.{step}")
            weakref.finalize(self, self.file.close)
            start = self.events.SessionLog(status=self.events.SessionLog.START)
            self._write(step, session_log=start)  # what earlier runs wrote from here on is void
        for name, value in metrics.items():
            self._write(step, summary=self.scalar(name, value))
        self.file.flush()

    def _write(self, step: int, **what: Any):
        self.file.write_event(self.events.Event(step=step, wall_time=time.time(), **what))
