"""The loop: batches -> gradients through the solve -> updates; evaluated, saved, resumed.

Everything that a user passes is checked, and the step traced, before the run folder is touched.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray

from .._rules import constant, count, positive
from .._rules import path as path_of
from ..models import AbstractModel
from . import callbacks as called
from . import checkpoints, record
from .ahead import Ahead
from .callbacks import Callback, call
from .cost import operations
from .depths import Elastic, Steps, steps_of
from .devices import Devices, Placement, placement
from .losses import AbstractLoss, FlowLoss, cross_entropy, valued
from .optimisers import adamw
from .parts import frozen, parted
from .processes import gathered, is_first, of_first
from .record import Place, Record
from .step import State, Step, TrainingError, diagnosis, evaluated, update
from .watch import Clock, Display, Signals, Trace


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
    - `step`: the number of steps done. `reason`: why it ended: "done", "early stop", "budget",
      "time", or the name of a signal, "SIGTERM" or "SIGINT".
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
    depths: Elastic | None = None,
    trainable: Any = eqx.is_inexact_array,
    accumulate: int = 1,
    devices: Devices = None,
    evaluate_every: int = 250,
    evaluation_batches: int | None = None,
    patience: int | None = None,
    budget: int | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    checkpoint_every: int | None = None,
    keep: int | None = 2,
    log_every: int = 10,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    minutes: float | None = None,
    evaluate_on_interrupt: bool = False,
    profile: str | Path | None = None,
) -> Fitted:
    """Trains a model through its solve.

        theta <- optimiser(theta, d/dtheta loss(model_theta(inputs), targets))

    **Arguments:**

    - `model`: a `jaxflow.models.AbstractModel`, or any Equinox module that a loss of your own
      takes. Its floating-point arrays are trained.
    - `data`: what `jaxflow.training.text_data` or `jaxflow.training.image_data` return, or
      an object with their `batch`, `validation_batches` and `describe`.
    - `steps`: of the optimiser.
    - `optimiser`: any Optax optimiser; `None` is `jaxflow.training.adamw` of the steps.
    - `loss`: (outputs, targets) -> number, or an `jaxflow.training.AbstractLoss`, such as
      `FlowLoss(cross_entropy, costs={"kinetic": (0.01, jaxflow.observables.KineticEnergy)})`.
    - `key`: PRNG key of losses that draw numbers; a resumed run goes on with its own.
    - `depths`: draw the depth of each step anew, as `jaxflow.training.Elastic` says; `None` is
      the model's own. The loss is then also evaluated at other depths, as "validation_loss@12".
    - `trainable`: what is trained, a filter of Equinox's: a tree of booleans like the model, such
      as `jaxflow.fields.adapters` of it, or a function of an array. The rest stays as it is,
      and is not in the checkpoints of a run, which name it by its sha256.
    - `accumulate`: batches whose gradients are averaged into one step.
    - `devices`: how many, or which ones, share each batch, all with the same parameters; or a
      `jaxflow.training.FullySharded`, whose devices share the parameters and the optimiser's
      state as well. The losses are those of one device, to rounding. `None` is one device, with a
      warning that names those that are idle. A run may go on with another number of devices.
    - `evaluate_every`: steps between evaluations of the loss, and one after the last step, each
      on `evaluation_batches` validation batches (`None`: all). `patience`: evaluations without a
      better loss before training stops.
    - `budget`: of evaluations of the field in the forward solves of the steps; training stops when
      it is spent.
    - `run`: a folder for config.json, metrics.jsonl and checkpoints. One process at a time writes
      to it. `resume`: go on from its last checkpoint, or start where its folder has none; the
      losses are those of a run that was never stopped, bit for bit. On a GPU in 16 bits that takes
      XLA_FLAGS=--xla_gpu_deterministic_ops=true in the environment, before JAX starts: cuDNN's
      gradient of attention else adds up in the order in which its blocks end.
    - `checkpoint_every`: steps between checkpoints (default `evaluate_every`); `keep`: how many of
      the last stay, two at least, as the step after the last may fail. The best one stays too. With
      `keep=None` there are none, nor need of orbax-checkpoint: such a run cannot go on, and its
      model is in what is returned alone.
    - `log_every`: steps between lines of metrics.jsonl.
    - `config`: JSON kept in config.json and each checkpoint. Where a run goes on, `None` is its
      own, and another one may differ from it in the entries of
      `training.record.CHANGEABLE` alone, such as "steps" and "learning_rate".
    - `progress`: show a progress bar; where there is no terminal, print a line a log.
    - `callbacks`: functions (step, metrics, model), called after each step that is logged,
      evaluated or saved, with the number of steps done, a dictionary of what was measured, and a
      copy of the model: see `jaxflow.training.tensorboard`, and `jaxflow.training.callbacks`
      for Weights & Biases and MLflow.
    - `minutes`: of wall time for this call, compilation included. The step that is underway then
      is evaluated and saved; a run that goes on has so many minutes anew.
    - `evaluate_on_interrupt`: Ctrl-C leaves time for an evaluation, a second one cuts it off.
    - `profile`: a folder for a trace of five steps by `jax.profiler`, which TensorBoard and
      https://ui.perfetto.dev show.

    SIGTERM and Ctrl-C end the step, or the evaluation after its batch, save, and return. An
    evaluation that was cut off is made when the run goes on. A script that would start something
    else asks first: `if fitted.reason == "SIGTERM": raise SystemExit(143)`, as SLURM and Kubernetes
    kill what has not ended some seconds later.

    Several processes (`jaxflow.training.join`) call `fit` with the same arguments, and
    `devices` of all of them. The first alone writes; a signal to any of them, and the end of
    `minutes`, count from the next step that is logged.

    Measured are "loss" and what the loss logs, such as "num_evaluations" (of the field, in the
    forward solve of a batch); "gradient_norm" (before the optimiser clips it) and
    "update_to_weight", the norm of the step over that of the parameters; "total_evaluations",
    "targets_per_second" and "seconds" of the whole training; after an evaluation
    "validation_loss" and others that begin so.

    The device is at the next step while the numbers of the one before are fetched, one fetch a
    step, but where a callback, an evaluation or a checkpoint looks at the model, or a budget is to
    be kept.

    **Returns:** a `jaxflow.training.Fitted`.

    **Raises:**

    - ValueError or TypeError for arguments that cannot be trained with, before anything is written.
    - ValueError if the folder holds a run that is not to be resumed, is used by another process, or
      if what is to be resumed is damaged, naming the file, or was trained on other data or with
      another config. Nothing was changed then.
    - `TrainingError` if a callback raises, naming it; the run is saved then, and goes on after that
      step. What the data raise comes through as it is, and the run is saved as well.
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
    keep = None if keep is None else count("keep", keep)
    if minutes is not None:
        minutes = constant("minutes", minutes, "finite and greater than 0", positive)
    callbacks = called.check(callbacks)
    run = None if run is None else path_of("run", run)
    profile = None if profile is None else path_of("profile", profile)
    if resume and run is None:
        raise ValueError("resume=True needs the folder of the run: pass run=...")
    if resume or (run is not None and keep is not None):
        checkpoints.require()
    params, static = parted(model, trainable)
    about = _about(data, config, accumulate) | frozen(static)
    optimiser = adamw(steps) if optimiser is None else optimiser
    key = jax.random.key(0) if key is None else key
    _check_parts(optimiser, loss, key)
    loss = loss if isinstance(loss, AbstractLoss) else FlowLoss(loss)
    placing = placement(devices)
    step = Step(placing.constants(static), optimiser, loss, placing)
    at_depths = steps_of(step, depths)
    # The step gives its state's memory to the next one, and the caller keeps the model.
    state = placing.state(jax.tree.map(jnp.copy, State(params, optimiser.init(params), key)))
    first = _batches(data, 0, accumulate, placing)
    placing.check_batch(first[0].shape[1])
    for trained in at_depths.trained:
        _check_step(trained, state, first, budget)
    if depths is not None:
        _check_evaluations(at_depths, state, first)
    signals = Signals(evaluating=evaluate_on_interrupt)
    with record.opened(run, resume=resume) as folder, signals:
        kept = Record(folder, keep, about)
        resumed = _resumed(kept, state) if resume else None
        if resumed is None:
            kept.begin()
        state, best, place = resumed or (state, None, Place())
        cost = _cost(model, params, static, first[0], at_depths)
        ahead = Ahead(
            at_depths, lambda number: _batches(data, number, accumulate, placing), state, place.step
        )
        trace = Trace(profile, place.step)
        clock = Clock(place.seconds, minutes)
        with Display(steps, place.step, progress and is_first(), cost) as display:
            loop = _Loop(
                ahead, data, schedule, kept, signals, display, clock, trace, callbacks, best, place
            )
            reason = loop.run()
        reason = signals.caught or reason  # one that came with the last step counts too
    params = ahead.state.params
    whole = lambda params: eqx.combine(placing.returned(params), static)
    return Fitted(
        whole(params),
        whole(params if loop.best is None else loop.best),
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

    def evaluates(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step == self.steps

    def logs(self, step: int) -> bool:
        return step % self.log_every == 0 or step in (1, self.steps)

    def saves(self, step: int) -> bool:
        return step % self.checkpoint_every == 0


@dataclasses.dataclass
class _Loop:
    """Makes steps; each is evaluated, logged and saved where the schedule says so."""

    ahead: Ahead
    data: Data
    schedule: _Schedule
    record: Record
    signals: Signals
    display: Display
    clock: Clock
    trace: Trace
    callbacks: Sequence[Callback]
    best: Any
    place: Place
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)  # of the last step
    validated: int = -1  # the last step that was evaluated
    told: int = -1  # the last step that callbacks were told of

    def run(self) -> str:
        """Why it ended. What the data or a callback raises ends it with a checkpoint, too."""
        try:
            while not (reason := self.reason()):
                if self.place.pending is None:
                    self.advance()
                if not self.evaluates():
                    self.note({})
                elif (found := self.evaluated()) is not None:
                    self.note(found)
        except Exception:
            self.keep()
            raise
        finally:
            self.trace.stop()
        if self.keep():
            self.tell()
        return reason

    def reason(self) -> str:
        """Time, and Ctrl-C where it asks for that, end the training after an evaluation alone."""
        if self.schedule.logs(self.place.step):
            self.signals.agree()
            self.clock.agree()
        evaluated = self.validated == self.place.step
        if self.ahead or (self.signals.evaluates and not evaluated):
            return ""
        if self.signals.caught or self.place.pending is not None:
            return self.signals.caught
        return self.schedule.reason(self.place) or ("time" if self.clock.over and evaluated else "")

    def advance(self):
        """Makes a step; the next one starts before it waits, unless that would be in the way."""
        if not self.ahead:
            self.ahead.launch()
        if not self.stops_at(self.place.step + 1):
            self.ahead.launch()
        self.fetch()

    def stops_at(self, step: int) -> bool:
        """Whether the state after this step is looked at, or there may be no step after it."""
        asked = self.callbacks and self.schedule.logs(step)
        planned = self.schedule.evaluates(step) or self.schedule.saves(step) or asked
        ending = self.signals.caught or self.clock.over or self.schedule.budget is not None
        return bool(planned or ending or self.trace.turns(step))

    def fetch(self):
        """Waits for the first step underway; its numbers are pending until they are logged."""
        made = self.ahead.fetch()
        if not made.ok:
            state = self.ahead.stop()
            self.record.fail(state, self.place)
            failed = f"step {made.number + 1} failed (loss {made.metrics['loss']:.6g}): "
            raise TrainingError(failed + diagnosis(made.step, state, made.batch, made.number))
        self.place = self.place.after(
            made.metrics.get("num_evaluations", 0.0) * self.schedule.accumulate, self.clock.seconds
        )
        times = {
            "targets_per_second": self.clock.rate(np.size(made.batch[1])),
            "seconds": self.place.seconds,
        }
        spent = {"total_evaluations": float(self.place.spent)} if self.place.spent else {}
        self.numbers = made.metrics | spent | times
        self.place = self.place._replace(pending=self.numbers)

    def evaluates(self) -> bool:
        """Whether the step is evaluated: as planned, or as it is the last."""
        ends = self.schedule.spent(self.place) or self.clock.over or self.signals.evaluates
        return self.schedule.evaluates(self.place.step) or (ends and not self.ahead)

    def evaluated(self) -> dict[str, float] | None:
        """The validation losses; None where a signal cut the evaluation off."""

        def batches() -> Iterator[tuple[Any, Any]]:
            found = self.data.validation_batches(self.schedule.evaluation_batches)
            return itertools.takewhile(lambda _: not self.signals.cut, found)

        try:
            found = self.measured(batches)
        except TrainingError:
            self.record.fail(self.ahead.state, self.place._replace(pending=None))
            raise
        if self.signals.cut:
            return None
        self.validated = self.place.step
        return found

    def measured(self, batches: Callable[[], Iterator]) -> dict[str, float]:
        """The validation losses at the model's own depth, and the loss alone at others."""
        at = lambda step: evaluated(step, self.ahead.state, self.place.step, batches)
        found = at(self.ahead.steps.own)
        for name, step in self.ahead.steps.evaluated.items():
            if "validation_loss" in (there := at(step)):
                found[f"validation_loss@{name}"] = there["validation_loss"]
        return found

    def note(self, found: dict[str, float]):
        """Logs and saves a step with what its evaluation found."""
        self.numbers = (self.place.pending or {}) | found
        self.place = self.place._replace(pending=None)
        loss = found.get("validation_loss")
        if loss is not None:
            if loss < self.place.best:
                self.best = jax.tree.map(jnp.copy, self.ahead.state.params)
            self.place = self.place.evaluated(loss)
        step = self.place.step
        logged = loss is not None or self.schedule.logs(step) or self.schedule.spent(self.place)
        if logged:
            self.record.log(step, self.numbers)
        if loss is not None and self.place.since == 0:
            self.record.save(self.ahead.state, self.place, loss)
        elif self.schedule.saves(step):
            self.record.save(self.ahead.state, self.place)
        self.display.show(step, self.numbers, logged=logged)
        if logged or self.schedule.saves(step):
            self.tell()
        self.trace.after(step)

    def tell(self):
        """Calls the callbacks, once a step, with a copy of the model, as the next step takes its
        memory."""
        if self.callbacks and self.told != self.place.step:
            self.told = self.place.step
            state = jax.tree.map(jnp.copy, self.ahead.state)
            call(self.callbacks, self.place.step, self.numbers, self.ahead.steps.own.model(state))
        self.clock.lap()

    def keep(self) -> bool:
        """Saves what was reached, unless it is saved, and says whether it did."""
        if self.ahead:
            self.fetch()
        if self.record.saved == self.place.step:
            return False
        return self.record.save(self.ahead.state, self.place)


def _batches(data: Data, step: int, accumulate: int, place: Placement):
    """The batches of a step, along a new first axis, on their devices."""
    parts = [data.batch(step * accumulate + i) for i in range(accumulate)]
    inputs, targets = zip(*parts, strict=True)
    return place.batch(np.stack(inputs), axis=1), place.batch(np.stack(targets), axis=1)


def _resumed(kept: Record, state: State) -> tuple[State, Any, Place] | None:
    """State, best parameters and place of the last checkpoint, in all processes."""
    like = gathered(state)

    def read():
        found = kept.resume(like)
        return found and (*found[:2], found[2]._asdict())

    if (found := of_first(read, state)) is None:
        return None
    kept.saved = found[2]["step"]
    return *found[:2], Place(**found[2])


# ------------------------------------------------------------------ what is refused


def _about(data: Data, config: Mapping[str, Any] | None, accumulate: int) -> dict[str, Any]:
    """What each checkpoint says of the run, as JSON gives it back."""
    if not isinstance(data, Data):
        raise TypeError(
            f"data must have `batch`, `validation_batches` and `describe`, as text_data(...) and "
            f"image_data(...) do; got {type(data).__name__}."
        )
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"config must be a dictionary, got {config!r}.")
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
        raise ValueError(
            "the model has no floating-point arrays that trainable selects, so there is nothing to "
            "train."
        )
    _, _, numbers = eqx.filter_eval_shape(
        update, (step, batch, np.int32(0), jnp.array(True)), state
    )
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


def _check_evaluations(at_depths: Steps, state: State, batch):
    """Traces the evaluations at depths that no step of training has."""
    inputs, targets = (array[0] for array in batch)
    for step in (at_depths.own, *at_depths.evaluated.values()):
        model = step.model(state)
        eqx.filter_eval_shape(valued, step.loss, model, inputs, targets, state.key)


# ------------------------------------------------------------------ the outside world


def _cost(model, params, static, batches, at_depths: Steps) -> str:
    """What training takes, before it starts; `batches` are the inputs of a step."""
    count = sum(a.size for a in jax.tree.leaves(params))
    text = f"{count:,} parameters: {16 * count / 1e6:.3g} MB with gradients and Adam's moments"
    if others := sum(a.size for a in jax.tree.leaves(eqx.filter(static, eqx.is_inexact_array))):
        text += f"; {others:,} others stay as they are"
    if isinstance(model, AbstractModel):
        drawn = at_depths.depths or [model.depth]
        mu0 = eqx.filter_eval_shape(model.embed, jnp.asarray(batches[0]))
        trained = [step.depth or model.depth for step in at_depths.trained]
        memory = max(depth.memory(mu0) for depth in trained)
        text += f"; states kept for the gradient: {memory / 1e6:.3g} MB"
        counted = [operations(model.with_depth(depth), batches[0]) for depth in drawn]
        known = [len(batches) * number for number in counted if number is not None]
        if len(known) == len(drawn):
            text += f"; {sum(known) / len(known):.2g} floating-point operations a step"
    if depths := at_depths.depths:
        text += f"; {len(depths)} depths, each compiled when it is first drawn"
        text += f", after {at_depths.after} steps at the model's own" * (at_depths.after > 0)
    return text
