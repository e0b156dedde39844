"""The loop: batches -> gradients through the solve -> updates; evaluated, saved, resumed.

Everything that a user passes is checked, and the step traced, before the run folder is touched.
"""

import dataclasses
import itertools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .._rules import count
from ..models import AbstractModel
from . import checkpoints, record
from .devices import Devices, Placement, placement
from .losses import AbstractLoss, FlowLoss, cross_entropy
from .optimisers import adamw
from .record import Place, Record
from .step import State, Step, TrainingError, diagnosis, evaluated, update


@runtime_checkable
class Data(Protocol):
    """What the loop reads: the batch of a step is a function of its number alone."""

    def batch(self, step: int) -> tuple[Any, Any]: ...

    def validation_batches(self, count: int | None = None) -> Iterable[tuple[Any, Any]]: ...

    def describe(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training returns.

    - `model`: after the last step. `best`: with the least validation loss (`model` where nothing
      was evaluated).
    - `step`: the number of steps done. `reason`: why it ended: "done", "early stop", "budget", or
      the name of a signal, "SIGTERM" or "SIGINT".
    - `history`: one dictionary a logged step, as in metrics.jsonl.
    - `validation_loss`: of `best`.
    """

    model: Any
    best: Any
    step: int
    reason: str
    history: list[dict[str, Any]]
    validation_loss: float


def fit(
    model: eqx.Module,
    data: Data,
    *,
    steps: int,
    optimiser: optax.GradientTransformation | None = None,
    loss: AbstractLoss | Callable[[Array, Array], Array] = cross_entropy,
    key: PRNGKeyArray | None = None,
    accumulate: int = 1,
    devices: Devices = None,
    evaluate_every: int = 250,
    evaluation_batches: int | None = None,
    patience: int | None = None,
    budget: int | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    keep: int = 2,
    log_every: int = 10,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Fitted:
    """Trains a model through its solve.

        theta <- optimiser(theta, d/dtheta loss(model_theta(inputs), targets))

    **Arguments:**

    - `model`: a [`jaxflow.models.AbstractModel`][], or any Equinox module that a loss of your own
      takes. Its floating-point arrays are trained.
    - `data`: what [`jaxflow.training.text_data`][] or [`jaxflow.training.image_data`][] return, or
      an object with their `batch`, `validation_batches` and `describe`.
    - `steps`: of the optimiser.
    - `optimiser`: any Optax optimiser; `None` is [`jaxflow.training.adamw`][] of the steps.
    - `loss`: (outputs, targets) -> number, or an [`jaxflow.training.AbstractLoss`][], such as
      `FlowLoss(cross_entropy, costs={"kinetic": (0.01, jaxflow.observables.KineticEnergy)})`.
    - `key`: PRNG key of losses that draw numbers; a resumed run goes on with its own.
    - `accumulate`: batches whose gradients are averaged into one step.
    - `devices`: how many, or which ones, share each batch, all with the same parameters; or a
      [`jaxflow.training.FullySharded`][], whose devices share the parameters and the optimiser's
      state as well. The losses are those of one device, to rounding. `None` is one device, with a
      warning that names those that are idle. A run may go on with another number of devices.
    - `evaluate_every`: steps between evaluations of the loss, and one after the last step, each
      on `evaluation_batches` validation batches (`None`: all). `patience`: evaluations without a
      better loss before training stops.
    - `budget`: of evaluations of the field in the forward solves of the steps; training stops when
      it is spent.
    - `run`: a folder for config.json, metrics.jsonl and checkpoints. One process at a time writes
      to it. `resume`: go on from its last checkpoint, or start where it has none yet; the losses
      are those of a run that was never stopped, bit for bit. On a GPU in 16 bits that takes
      XLA_FLAGS=--xla_gpu_deterministic_ops=true in the environment, before JAX starts: cuDNN's
      gradient of attention else adds up in the order in which its blocks end.
    - `checkpoint_every`: steps between checkpoints (default `evaluate_every`); `keep`: how many of
      the last stay, two at least, as the step after the last may fail. The best one stays too.
    - `log_every`: steps between lines of metrics.jsonl.
    - `config`: JSON kept in config.json and each checkpoint. Where a run goes on, `None` is its
      own, and another one may differ from it in the entries of
      `jaxflow.training.record.CHANGEABLE` alone, such as "steps" and "learning_rate".
    - `progress`: show a progress bar.

    SIGTERM and Ctrl-C end the step, or the evaluation after its batch, save, and return. An
    evaluation that was cut off is made when the run goes on.

    **Returns:** a [`jaxflow.training.Fitted`][].

    **Raises:**

    - ValueError or TypeError for arguments that cannot be trained with, before anything is written.
    - ValueError if the folder holds a run that is not to be resumed, is used by another process, or
      if what is to be resumed is damaged, naming the file, or was trained on other data or with
      another config. Nothing was changed then.
    - `TrainingError` if a loss, a gradient or what the optimiser makes of it is not finite or a
      solve fails, in a step or an evaluation, naming the step, the time and the tensor. The last
      finite parameters are then the latest checkpoint in `run`; `resume` goes on from the one
      before, which made a good step, so that another learning rate can help.

    ```python
    >>> digits = jaxflow.training.image_data(batch_size=8)
    >>> model = jaxflow.models.ResidualNetwork(64, 10, 4, 1, width=4, key=jax.random.key(0))
    >>> fitted = jaxflow.training.fit(
    ...     model, digits, steps=1, evaluation_batches=1, progress=False
    ... )
    >>> fitted.model(jnp.zeros(64)).shape
    (10,)

    ```
    """
    schedule = _Schedule(
        steps=steps,
        accumulate=accumulate,
        evaluate_every=evaluate_every,
        log_every=log_every,
        checkpoint_every=evaluate_every if checkpoint_every is None else checkpoint_every,
        evaluation_batches=evaluation_batches,
        patience=patience,
        budget=budget,
    )
    keep = count("keep", keep)
    if resume and run is None:
        raise ValueError("resume=True needs the folder of the run: pass run=...")
    if run is not None:
        checkpoints.require()
    about = _about(data, config, accumulate)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimiser = adamw(steps) if optimiser is None else optimiser
    key = jax.random.key(0) if key is None else key
    _check_parts(optimiser, loss, key)
    loss = loss if isinstance(loss, AbstractLoss) else FlowLoss(loss)
    placing = placement(devices)
    step = Step(static, optimiser, loss, placing)
    # The step gives its state's memory to the next one, and the caller keeps the model.
    state = placing.state(jax.tree.map(jnp.copy, State(params, optimiser.init(params), key)))
    first = _batches(data, 0, accumulate, placing)
    placing.check_batch(first[0].shape[1])
    _check_step(step, state, first, budget)
    with record.opened(run, resume=resume) as folder, _Signals() as signals:
        kept = Record(folder, keep, about)
        resumed = kept.resume(state) if resume else None
        if resumed is None:
            kept.begin()
        state, best, place = resumed or (state, None, Place())
        cost = _cost(model, params, first[0][0])
        with _Display(steps, place.step, progress, cost) as display:
            loop = _Loop(step, data, schedule, kept, signals, display, state, best, place)
            reason = loop.run()
        reason = signals.caught or reason  # one that came with the last step counts too
    best = loop.state.params if loop.best is None else loop.best
    whole = lambda params: eqx.combine(placing.returned(params), static)
    return Fitted(
        whole(loop.state.params),
        whole(best),
        loop.place.step,
        reason,
        kept.history,
        loop.place.best,
    )


# ------------------------------------------------------------------ the loop


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """What happens after which step: whole numbers, at least 1, where they are given."""

    steps: int
    accumulate: int
    evaluate_every: int
    log_every: int
    checkpoint_every: int
    evaluation_batches: int | None
    patience: int | None
    budget: int | None

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value is not None:
                count(name, value)

    def spent(self, place: Place) -> bool:
        return self.budget is not None and place.spent >= self.budget

    def reason(self, place: Place) -> str:
        """Why training ends here; "" where it does not."""
        if place.step >= self.steps:
            return "done"
        if self.patience is not None and place.since >= self.patience:
            return "early stop"
        return "budget" if self.spent(place) else ""

    def is_last(self, place: Place) -> bool:
        return place.step == self.steps or self.spent(place)

    def evaluates(self, place: Place) -> bool:
        return place.step % self.evaluate_every == 0 or self.is_last(place)

    def logs(self, place: Place) -> bool:
        return place.step % self.log_every == 0 or place.step == 1 or self.is_last(place)


@dataclasses.dataclass
class _Loop:
    """Makes steps; each is evaluated, logged and saved where the schedule says so."""

    step: Step
    data: Data
    schedule: _Schedule
    record: Record
    signals: "_Signals"
    display: "_Display"
    state: State
    best: Any
    place: Place

    def run(self) -> str:
        """Why it ended."""
        while not (reason := self.reason()):
            if self.place.pending is None:
                self.advance()
            if not self.schedule.evaluates(self.place):
                self.note({})
            elif (found := self.evaluated()) is not None:
                self.note(found)
        if self.record.saved != self.place.step:
            self.record.save(self.state, self.place)
        return reason

    def reason(self) -> str:
        if self.signals.caught:
            return self.signals.caught
        return self.schedule.reason(self.place) if self.place.pending is None else ""

    def advance(self):
        """Makes a step; its numbers are pending until they are logged."""
        batches, number = self.schedule.accumulate, self.place.step
        batch, start = (
            _batches(self.data, number, batches, self.step.placement),
            time.perf_counter(),
        )
        self.state, ok, metrics = update((self.step, batch, np.int32(number)), self.state)
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not ok:
            self.record.fail(self.state, self.place)
            failed = f"step {number + 1} failed (loss {numbers['loss']:.6g}): "
            raise TrainingError(failed + diagnosis(self.step, self.state, batch, number))
        numbers["per_second"] = np.size(batch[1]) / (time.perf_counter() - start)
        self.place = self.place.after(numbers.get("num_evaluations", 0.0) * batches, numbers)

    def evaluated(self) -> dict[str, float] | None:
        """The validation losses; None where a signal cut the evaluation off."""

        def batches() -> Iterator[tuple[Any, Any]]:
            found = self.data.validation_batches(self.schedule.evaluation_batches)
            return itertools.takewhile(lambda _: not self.signals.caught, found)

        try:
            found = evaluated(self.step, self.state, self.place.step, batches)
        except TrainingError:
            self.record.fail(self.state, self.place._replace(pending=None))
            raise
        return None if self.signals.caught else found

    def note(self, found: dict[str, float]):
        """Logs and saves a step with what its evaluation found."""
        numbers = (self.place.pending or {}) | found
        self.place = self.place._replace(pending=None)
        loss = found.get("validation_loss")
        if loss is not None:
            if loss < self.place.best:
                self.best = jax.tree.map(jnp.copy, self.state.params)
            self.place = self.place.evaluated(loss)
        if loss is not None or self.schedule.logs(self.place):
            self.record.log(self.place.step, numbers)
        if loss is not None and self.place.since == 0:
            self.record.save(self.state, self.place, loss)
        elif self.place.step % self.schedule.checkpoint_every == 0:
            self.record.save(self.state, self.place)
        self.display.show(self.place.step, numbers)


def _batches(data: Data, step: int, accumulate: int, place: Placement):
    """The batches of a step, along a new first axis, on their devices."""
    parts = [data.batch(step * accumulate + i) for i in range(accumulate)]
    inputs, targets = zip(*parts, strict=True)
    return place.batch(np.stack(inputs), axis=1), place.batch(np.stack(targets), axis=1)


# ------------------------------------------------------------------ what is refused


def _about(data: Data, config: Mapping[str, Any] | None, accumulate: int) -> dict[str, Any]:
    """What each checkpoint says of the run, as JSON gives it back."""
    if not isinstance(data, Data):
        raise TypeError(
            f"data must have `batch`, `validation_batches` and `describe`, as text_data(...) and "
            f"image_data(...) do; got {type(data).__name__}."
        )
    config = None if config is None else dict(config)
    about = {"config": config, "data": data.describe(), "accumulate": int(accumulate)}
    if not isinstance(about["data"], dict):
        raise TypeError(f"data.describe() must return a dictionary, got {about['data']!r}.")
    try:
        return json.loads(json.dumps(about))
    except TypeError as error:
        raise TypeError(f"config and data.describe() must be JSON: {error}.") from error


def _check_parts(optimiser: Any, loss: Any, key: Any):
    if not isinstance(optimiser, optax.GradientTransformation):
        raise TypeError(f"optimiser must be an Optax optimiser, got {optimiser!r}.")
    if not callable(loss):
        raise TypeError(f"loss must be a function (outputs, targets) -> number, got {loss!r}.")
    try:
        jax.eval_shape(lambda k: jax.random.fold_in(k, 0), key)
    except (TypeError, ValueError):
        raise TypeError(
            f"key must be one PRNG key, got {key!r}: pass jax.random.key(...)."
        ) from None


def _check_step(step: Step, state: State, batch, budget: int | None):
    """Traces the step, which the first call has to do anyway: what cannot be trained ends here."""
    if not jax.tree.leaves(state.params):
        raise ValueError("the model has no floating-point arrays, so there is nothing to train.")
    _, _, numbers = eqx.filter_eval_shape(update, (step, batch, np.int32(0)), state)
    for name, number in numbers.items():
        if number.shape != ():
            raise ValueError(
                f"a loss logs numbers, one a batch; {name} has the shape {number.shape}."
            )
    if budget is not None and "num_evaluations" not in numbers:
        raise ValueError(
            "a budget counts evaluations of the field, and the loss logs no num_evaluations "
            "(implicit methods do not report them): pass budget=None, or an explicit method."
        )


# ------------------------------------------------------------------ the outside world


def _cost(model, params, inputs) -> str:
    """What training takes, before it starts."""
    count = sum(a.size for a in jax.tree.leaves(params))
    text = f"{count:,} parameters: {16 * count / 1e6:.3g} MB with gradients and Adam's moments"
    if isinstance(model, AbstractModel):
        mu0 = eqx.filter_eval_shape(model.embed, jnp.asarray(inputs))
        text += f"; states kept for the gradient: {model.depth.memory(mu0) / 1e6:.3g} MB"
    return text


class _Signals:
    """Notes SIGTERM and SIGINT, so that a step ends before the loop does."""

    def __init__(self):
        self.caught = ""
        self.before: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.caught == "SIGINT":  # asked twice
            raise KeyboardInterrupt
        self.caught = signal.Signals(number).name

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class _Display:
    """A progress bar with the last numbers."""

    def __init__(self, steps: int, start: int, shown: bool, cost: str):
        console = Console(stderr=True, quiet=not shown)
        console.print(cost)
        self.validation = math.nan
        columns = [
            TextColumn("training"),
            BarColumn(),
            TextColumn("step {task.completed:,.0f} of {task.total:,.0f}  {task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        self.bar = Progress(*columns, console=console, disable=not shown)
        self.task = self.bar.add_task("training", total=steps, completed=start, numbers="compiling")

    def __enter__(self):
        self.bar.start()
        return self

    def show(self, step: int, numbers: dict[str, Any]):
        self.validation = numbers.get("validation_loss", self.validation)
        text = f"loss {numbers['loss']:.4f}, validation {self.validation:.4f}, "
        text += f"{numbers['per_second']:,.0f} targets/s"
        if "num_evaluations" in numbers:
            text += f", {numbers['num_evaluations']:.0f} evaluations"
        self.bar.update(self.task, completed=step, numbers=text)

    def __exit__(self, *_):
        self.bar.stop()
