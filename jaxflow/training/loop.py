"""The loop: batches -> gradients through the solve -> updates; evaluated, saved, resumed.

A step that is not finite changes nothing: its update is dropped inside the compiled step, so the
last good parameters are at hand when the loop stops to say what went wrong.
"""

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..flow import FlowError
from ..models import AbstractModel
from . import checkpoints
from .losses import AbstractLoss, FlowLoss, cross_entropy, evaluate
from .optimisers import adamw


@runtime_checkable
class Data(Protocol):
    """What the loop reads: the batch of a step is a function of its number alone."""

    def batch(self, step: int) -> tuple[Any, Any]: ...

    def validation_batches(self, count: int | None = None) -> Iterable[tuple[Any, Any]]: ...

    def describe(self) -> dict[str, Any]: ...


class TrainingError(RuntimeError):
    """A step that is not finite, or a solve that failed; the message says where."""


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training returns.

    - `model`: after the last step. `best`: with the least validation loss (`model` where nothing
      was evaluated).
    - `step`: the number of steps done. `reason`: why it ended: "done", "early stop", "budget", or
      the name of a signal.
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
    model: AbstractModel,
    data: Data,
    *,
    steps: int,
    optimiser: optax.GradientTransformation | None = None,
    loss: AbstractLoss | Callable[[Array, Array], Array] = cross_entropy,
    key: PRNGKeyArray | None = None,
    accumulate: int = 1,
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
    - `evaluate_every`: steps between evaluations of the loss, and one after the last step, each
      on `evaluation_batches` validation batches (`None`: all). `patience`: evaluations without a
      better loss before training stops.
    - `budget`: of evaluations of the field in the forward solves of the steps; training stops when
      it is spent.
    - `run`: a folder for checkpoints and metrics.jsonl. `resume`: go on from its last checkpoint,
      or start where it has none yet; the losses are those of a run that was never stopped, bit for
      bit.
    - `checkpoint_every`: steps between checkpoints (default `evaluate_every`); `keep`: how many of
      the last stay, two at least, as the step after the last may fail. The best one stays too.
    - `log_every`: steps between lines of metrics.jsonl.
    - `config`: JSON kept in each checkpoint.
    - `progress`: show a progress bar.

    SIGTERM and Ctrl-C end the step, save, and return.

    **Returns:** a [`jaxflow.training.Fitted`][].

    **Raises:** `TrainingError` if a loss or a gradient is not finite or a solve fails, in a step or
    an evaluation, naming the step, the time and the tensor. The last finite parameters are then the
    latest checkpoint in `run`; `resume` goes on from the one before, which made a good step, so
    that another learning rate can help.
    """
    every = evaluate_every if checkpoint_every is None else checkpoint_every
    _check(
        run,
        resume,
        steps=steps,
        budget=budget,
        accumulate=accumulate,
        evaluate_every=evaluate_every,
        evaluation_batches=evaluation_batches,
        patience=patience,
        checkpoint_every=every,
        keep=keep,
        log_every=log_every,
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss = loss if isinstance(loss, AbstractLoss) else FlowLoss(loss)
    optimiser = adamw(steps) if optimiser is None else optimiser
    step_fn = _Step(static, optimiser, loss)
    key = jax.random.key(0) if key is None else key
    # The step gives its state's memory to the next one, and the caller keeps the model.
    state = jax.tree.map(jnp.copy, _State(params, optimiser.init(params), key))
    place = _Place(0, 0, math.inf, 0)
    about = {"config": dict(config or {}), "data": data.describe(), "accumulate": accumulate}
    record = _Record(None if run is None else Path(run), keep, about)
    best = None
    if resume:
        record.forget_failure()
    if resume and record.resumable():
        state, best, place = record.resume(state)
    else:
        record.begin()
    cost = _cost(model, params, data.batch(0)[0])
    with _Signals() as signals, _Display(steps, place.step, progress, cost) as display:
        while not (reason := _reason_to_stop(place, steps, patience, budget, signals)):
            batch, start = _batches(data, place.step, accumulate), time.perf_counter()
            state, ok, metrics = step_fn(state, np.int32(place.step), batch)
            numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not ok:
                record.fail(state, place)
                failed = f"step {place.step + 1} failed (loss {numbers['loss']:.6g}): "
                raise TrainingError(failed + _diagnosis(step_fn, state, batch, place.step))
            place = place.after(_evaluations(numbers, budget) * accumulate)
            numbers["per_second"] = np.size(batch[1]) / (time.perf_counter() - start)
            last = place.step == steps or (budget is not None and place.spent >= budget)
            if place.step % evaluate_every == 0 or last:
                try:
                    numbers |= step_fn.evaluate(state, place.step, data, evaluation_batches)
                except TrainingError:
                    record.fail(state, place)
                    raise
            if evaluated := "validation_loss" in numbers:
                if numbers["validation_loss"] < place.best:
                    best = jax.tree.map(jnp.copy, state.params)
                place = place.evaluated(numbers["validation_loss"])
            if evaluated or last or place.step % log_every == 0 or place.step == 1:
                record.log(place.step, numbers)
            if evaluated and place.since == 0:
                record.save(state, place, numbers["validation_loss"])
            elif place.step % every == 0:
                record.save(state, place)
            display.show(place.step, numbers)
    record.save(state, place, replace=False)
    best = state.params if best is None else best
    whole = lambda params: eqx.combine(params, static)
    return Fitted(whole(state.params), whole(best), place.step, reason, record.history, place.best)


# ------------------------------------------------------------------ one step


class _State(eqx.Module):
    params: Any
    optimiser: Any
    key: PRNGKeyArray


class _Step(eqx.Module):
    """One update, compiled once."""

    static: Any
    optimiser: optax.GradientTransformation = eqx.field(static=True)
    loss: AbstractLoss

    def value(self, params, inputs, targets, key):
        out = self.loss(eqx.combine(params, self.static), inputs, targets, key)
        return out.value, (out.ok, out.metrics)

    def gradient(self, params, batch, key):
        """Means over the batches along the first axis: (gradient, loss, ok, metrics)."""
        inputs, targets = batch
        grad = eqx.filter_value_and_grad(self.value, has_aux=True)

        def one(total, item):
            (value, (ok, metrics)), gradient = grad(params, *item)
            return jax.tree.map(jnp.add, total, gradient), (value, ok, metrics)

        keys = jax.random.split(key, len(inputs))
        zero = jax.tree.map(jnp.zeros_like, params)
        total, (values, ok, metrics) = jax.lax.scan(one, zero, (inputs, targets, keys))
        mean = lambda x: jnp.asarray(x, float).mean(axis=0)
        gradient = jax.tree.map(lambda g: g / len(inputs), total)
        return gradient, values.mean(), ok.all(), jax.tree.map(mean, metrics)

    def __call__(self, state, step, batch):
        """(state, ok, metrics); a step that is not ok returns the state as it was."""
        return _update((self, step, batch), state)

    def update(self, state, step, batch):
        key = jax.random.fold_in(state.key, step)
        gradient, value, ok, metrics = self.gradient(state.params, batch, key)
        norm = optax.tree.norm(gradient)
        ok = ok & jnp.isfinite(value) & jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):  # Optax needs it
            updates, optimiser = self.optimiser.update(gradient, state.optimiser, state.params)
            moved = optax.apply_updates(state.params, updates), optimiser
        keep = lambda new, old: jnp.where(ok, new, old)
        params, optimiser = jax.tree.map(keep, moved, (state.params, state.optimiser))
        state = _State(params, optimiser, state.key)
        return state, ok, {"loss": value, "gradient_norm": norm} | metrics

    def evaluate(self, state: _State, step: int, data: Data, count: int | None) -> dict[str, float]:
        """Means over the validation batches, validation_loss among them; none without a batch."""
        model = eqx.combine(state.params, self.static)
        means = lambda batches: evaluate(model, batches, self.loss, key=state.key)
        found = means(data.validation_batches(count))
        if math.isfinite(found["loss"]):
            return {f"validation_{name}": value for name, value in found.items()}
        for batch in data.validation_batches(count):
            if not math.isfinite(value := means([batch])["loss"]):
                failed = f"the evaluation after step {step} failed (loss {value:.6g}): "
                batch = jax.tree.map(lambda a: jnp.asarray(a)[None], batch)
                raise TrainingError(failed + _diagnosis(self, state, batch, step))
        return {}


@eqx.filter_jit(donate="all-except-first")
def _update(inputs, state):
    step_fn, step, batch = inputs
    return step_fn.update(state, step, batch)


def _batches(data: Data, step: int, accumulate: int):
    """The batches of a step, along a new first axis."""
    parts = [data.batch(step * accumulate + i) for i in range(accumulate)]
    inputs, targets = zip(*parts, strict=True)
    return jnp.asarray(np.stack(inputs)), jnp.asarray(np.stack(targets))


def _diagnosis(step_fn: _Step, state: _State, batch, step: int) -> str:
    """What was not finite, computed again outside of jit for the time and the tensor."""
    remedy = " Lower the learning rate, clip gradients, or look at the batch."
    model = eqx.combine(state.params, step_fn.static)
    for inputs in batch[0]:
        if not isinstance(model, AbstractModel):
            break
        try:
            sol = model.depth.flow(model.field, model.embed(inputs), throw=True)
        except (FlowError, ValueError) as error:  # a ValueError for x(0) itself
            return str(error)
        if not np.isfinite(np.asarray(model.read_out(sol.measures[-1]))).all():
            return f"the outputs at t = {model.depth.t1:g} are not finite." + remedy
    key = jax.random.fold_in(state.key, step)
    gradient = eqx.filter_jit(step_fn.gradient)(state.params, batch, key)[0]
    for path, leaf in jtu.tree_leaves_with_path(gradient):
        if not np.isfinite(np.asarray(leaf)).all():
            return f"the gradient of {jtu.keystr(path)} is not finite." + remedy
    if np.isfinite(np.asarray(optax.tree.norm(gradient))):
        return "the loss is not finite." + remedy
    return "the gradient's norm overflows." + remedy


# ------------------------------------------------------------------ where the training is


class _Place(NamedTuple):
    """The number of steps, evaluations of the field, the best loss and evaluations since."""

    step: int
    spent: int
    best: float
    since: int

    def after(self, evaluations: float) -> "_Place":
        return self._replace(step=self.step + 1, spent=self.spent + int(evaluations))

    def evaluated(self, loss: float) -> "_Place":
        better = loss < self.best
        return self._replace(best=min(loss, self.best), since=0 if better else self.since + 1)


def _evaluations(numbers, budget: int | None) -> float:
    if budget is not None and "num_evaluations" not in numbers:
        raise ValueError(
            "a budget counts evaluations of the field, and the loss logs no num_evaluations "
            "(implicit methods do not report them): pass budget=None, or an explicit method."
        )
    return numbers.get("num_evaluations", 0.0)


def _reason_to_stop(place, steps, patience, budget, signals) -> str:
    if signals.caught:
        return signals.caught
    if place.step >= steps:
        return "done"
    if patience is not None and place.since >= patience:
        return "early stop"
    return "budget" if budget is not None and place.spent >= budget else ""


_FAILED = "failed.json"  # the step that was not finite, in the run folder


class _Record:
    """The run folder: checkpoints and metrics.jsonl. Without a folder, the history alone."""

    def __init__(self, folder: Path | None, keep: int, config: dict):
        self.folder, self.keep = folder, max(2, keep)
        self.config = json.loads(json.dumps(config))  # refuses now what no checkpoint could hold
        self.history: list[dict[str, Any]] = []
        self.saved = -1

    @property
    def checkpoints(self) -> Path:
        assert self.folder is not None
        return self.folder / "checkpoints"

    def resumable(self) -> bool:
        assert self.folder is not None
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is no run to resume: there is no such folder.")
        return checkpoints.latest(self.checkpoints) is not None

    def begin(self):
        if self.folder is None:
            return
        if checkpoints.latest(self.checkpoints) is not None:
            raise ValueError(
                f"{self.folder} holds a run already: pass resume=True to go on with it, or another "
                "folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.jsonl").write_text("")

    def log(self, step: int, numbers: dict[str, Any]):
        self.history.append({"step": step} | numbers)
        if self.folder is not None:
            with (self.folder / "metrics.jsonl").open("a") as lines:
                lines.write(json.dumps(self.history[-1]) + "\n")

    def save(self, state: _State, place: _Place, loss: float | None = None, replace: bool = True):
        if self.folder is None or (self.saved == place.step and not replace):
            return
        self.saved = place.step
        checkpoints.save(
            self.checkpoints,
            state,
            step=place.step,
            config=self.config,
            # JSON knows no infinity.
            cursor=place._asdict() | {"best": None if math.isinf(place.best) else place.best},
            metrics=None if loss is None else {"loss": loss},
            keep=self.keep,
        )

    def fail(self, state: _State, place: _Place):
        """Keeps the parameters of a failed step for a look, and the checkpoint before them."""
        if self.folder is None:
            return
        checkpoints.write(self.folder / _FAILED, json.dumps({"step": place.step}) + "\n")
        self.keep += 1
        self.save(state, place, replace=False)

    def forget_failure(self):
        """Removes what a failed step left: nothing good comes from there."""
        assert self.folder is not None
        failed = self.folder / _FAILED
        if failed.exists():
            checkpoints.remove(self.checkpoints, json.loads(failed.read_text())["step"])
            failed.unlink()

    def resume(self, state: _State):
        """(state, best parameters, place) of the last checkpoint."""
        assert self.folder is not None
        path = checkpoints.latest(self.checkpoints)
        assert path is not None
        state, about = checkpoints.restore(path, state)
        self._check_alike(about["config"])
        cursor = about["cursor"]
        place = _Place(**cursor | {"best": math.inf if cursor["best"] is None else cursor["best"]})
        best = checkpoints.best(self.checkpoints)
        params = None if best is None else checkpoints.restore(best, state)[0].params
        self._cut(place.step)
        self.saved = place.step
        return state, jax.tree.map(jnp.copy, params), place

    def _check_alike(self, config: dict):
        """The batches that come next depend on all of this."""
        both = ({"accumulate": c.get("accumulate", 1)} | c["data"] for c in (config, self.config))
        before, now = both
        differ = [k for k in sorted(now | before) if now.get(k) != before.get(k) and k != "source"]
        if differ:
            name = differ[0]
            raise ValueError(
                f"the run was trained on other data: {name} was {before.get(name)} and is "
                f"{now.get(name)}. Pass the same data, batch size and accumulation to resume it."
            )

    def _cut(self, step: int):
        """Forgets what was logged after the checkpoint: it is going to happen again."""
        assert self.folder is not None
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # a line that a kill cut off
                self.history.append(json.loads(line))
        self.history = [row for row in self.history if row["step"] <= step]
        checkpoints.write(path, "".join(json.dumps(row) + "\n" for row in self.history))


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


def _check(run, resume, **counts: int | None):
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if resume and run is None:
        raise ValueError("resume=True needs the folder of the run: pass run=...")
    if run is not None:
        checkpoints.require()
