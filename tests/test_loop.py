"""What a training tells and whom it hears: callbacks, lines, signals, time; steps made ahead."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import Interrupted, Line, Points, losses, quick, same

from jaxflow import training
from jaxflow.training import ahead, callbacks, watch


@pytest.fixture
def events(monkeypatch):
    """The steps of a training in the order in which they are launched and fetched."""
    found = []
    launch, fetch = ahead.Ahead.launch, ahead.Ahead.fetch

    def launched(self):
        found.append(("launch", self.next + 1))
        launch(self)

    def fetched(self):
        made = fetch(self)
        found.append(("fetch", made.number + 1))
        return made

    monkeypatch.setattr(ahead.Ahead, "launch", launched)
    monkeypatch.setattr(ahead.Ahead, "fetch", fetched)
    return found


# ------------------------------------------------------------------ one step ahead


def test_the_next_step_is_launched_before_one_is_fetched(events, monkeypatch):
    """And each is fetched once, by one transfer; an evaluation waits for what is underway."""
    transfers, get = [], jax.device_get
    monkeypatch.setattr(ahead.jax, "device_get", lambda x: transfers.append(x) or get(x))

    class Unseen(Points):
        def validation_batches(self, count=None):
            return iter(())

    quick(Unseen(), steps=4, evaluate_every=3)
    order = "launch 1, launch 2, fetch 1, launch 3, fetch 2, fetch 3, launch 4, fetch 4"
    assert ", ".join(f"{what} {step}" for what, step in events) == order
    assert len(transfers) == 4


def test_nothing_is_launched_past_what_must_be_looked_at(events):
    alone = lambda **options: quick(evaluate_every=9, steps=3, **options)
    behind = [("launch", 1), ("fetch", 1), ("launch", 2), ("fetch", 2), ("launch", 3), ("fetch", 3)]
    for options in (
        {"callbacks": [lambda step, metrics, model: None]},
        {"checkpoint_every": 1},
        {"minutes": 1e-9},
    ):
        events.clear()
        alone(**options)
        assert events == behind[: 2 if "minutes" in options else 6]


def test_a_step_behind_one_that_failed_changes_nothing(events, tmp_path):
    """It is underway when the failure is heard of."""
    with pytest.raises(training.TrainingError, match="step 2 failed"):
        quick(Points(bad=1), run=tmp_path, evaluate_every=9)
    assert ("launch", 3) in events and ("fetch", 3) not in events
    same(training.load(tmp_path, Line(), which="latest"), quick(steps=1).model)


def test_what_the_data_raise_comes_through_and_the_run_goes_on(tmp_path):
    class Torn(Points):
        def batch(self, step):
            if step == 3:
                raise OSError("the disk is gone")
            return Points.batch(self, step)

    options = {"run": tmp_path, "evaluate_every": 9}
    with pytest.raises(OSError, match="the disk is gone"):
        quick(Torn(), **options)
    rest = quick(resume=True, **options)
    assert [row["step"] for row in rest.history] == [1, 2, 3, 4, 5, 6]
    assert losses(rest) == losses(quick(evaluate_every=9))


# ------------------------------------------------------------------ callbacks


def test_callbacks_hear_of_logs_evaluations_and_checkpoints():
    told = []
    note = lambda step, metrics, model: told.append((step, metrics, model))
    fitted = quick(steps=7, log_every=4, evaluate_every=3, checkpoint_every=5, callbacks=[note])
    # 1, 4 and 7 are logged, 3, 6 and 7 evaluated, 5 saved where there is a folder.
    assert [step for step, *_ in told] == [1, 3, 4, 5, 6, 7]
    assert [step for step, metrics, _ in told if "validation_loss" in metrics] == [3, 6, 7]
    # The model is that of its step, and stays when the next ones take its memory.
    for step, metrics, model in told:
        assert isinstance(metrics["loss"], float)
        same(model, quick(steps=step, evaluate_every=9).model)
    same(told[-1][2], fitted.model)


def test_what_is_measured_has_its_unit_in_its_name():
    rows = quick(optimiser=optax.sgd(0.5), steps=2).history
    assert rows[0].keys() == {
        "step", "loss", "one", "gradient_norm", "update_to_weight", "targets_per_second", "seconds",
    }  # fmt: skip
    x, y = map(jnp.asarray, Points().batch(0))
    gradient = jax.grad(lambda w: training.cross_entropy(x @ w, y))(Line().weight)
    norm = float(jnp.linalg.norm(gradient))
    assert rows[0]["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    size = float(jnp.linalg.norm(Line().weight))
    assert rows[0]["update_to_weight"] == pytest.approx(0.5 * norm / size, rel=1e-5)
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"]


class Counted(training.AbstractLoss):
    """Says that a batch took five evaluations of the field."""

    def __call__(self, model, inputs, targets, key):
        value = training.cross_entropy(model(inputs), targets)
        return training.Valued(value, jnp.array(True), {"num_evaluations": 5 * jnp.ones(())})


def test_evaluations_of_the_field_add_up(tmp_path):
    options = {"loss": Counted(), "accumulate": 2, "run": tmp_path}
    quick(steps=2, **options)
    rows = quick(steps=3, resume=True, **options).history
    assert [(r["num_evaluations"], r["total_evaluations"]) for r in rows] == [
        (5, 10), (5, 20), (5, 30),
    ]  # fmt: skip


def test_a_callback_that_fails_is_named_and_the_run_goes_on(tmp_path):
    def reporter(step, metrics, model):
        if step == 4:
            raise ConnectionError("no route to host")

    options = {"run": tmp_path, "evaluate_every": 9}
    with pytest.raises(
        training.TrainingError, match="reporter failed after step 4: ConnectionError: no route"
    ) as failed:
        quick(callbacks=[reporter], **options)
    assert isinstance(failed.value.__cause__, ConnectionError)
    rest = quick(resume=True, **options)
    assert losses(rest) == losses(quick(evaluate_every=9))


@pytest.mark.parametrize("given", [print, [3], [lambda step: None], {"log": print}])
def test_callbacks_of_another_kind_are_refused(given):
    with pytest.raises(TypeError, match=r"callbacks must be a list of functions \(step, metrics"):
        callbacks.check(given)


def test_tensorboard_draws_the_metrics(tmp_path):
    pytest.importorskip("tensorboardX")
    draw = training.tensorboard(tmp_path / "events")
    assert not (tmp_path / "events").exists()
    draw(3, {"loss": 0.5, "seconds": 2.0}, None)
    draw(4, {"loss": 0.25}, None)
    (file,) = (tmp_path / "events").iterdir()
    content = file.read_bytes()
    assert content.count(b"loss") == 2 and content.count(b"seconds") == 1
    assert np.float32(0.25).tobytes() in content


# ------------------------------------------------------------------ lines, time, Ctrl-C


def test_without_a_terminal_each_log_is_a_line(capsys):
    quick(steps=5, log_every=2, evaluate_every=4, progress=True)
    cost, *lines = capsys.readouterr().err.splitlines()
    assert cost.startswith("4 parameters: ")
    assert [line.split(":")[0] for line in lines] == [f"step {k} of 5" for k in (1, 2, 4, 5)]
    assert all("loss 0." in line and "targets/s" in line and line.endswith(" s") for line in lines)
    quick(steps=2)  # progress=False
    assert capsys.readouterr() == ("", "")


def test_time_ends_a_training_after_a_step_and_its_evaluation(tmp_path):
    options = {"run": tmp_path, "evaluate_every": 9}
    for step in (1, 2):  # a run that goes on has its minutes anew
        stopped = quick(minutes=1e-9, resume=step > 1, **options)
        assert (stopped.reason, stopped.step) == ("time", step)
        assert "validation_loss" in stopped.history[-1]
    rest = quick(resume=True, minutes=60.0, **options)
    assert rest.reason == "done" and losses(rest) == losses(quick(evaluate_every=9))
    seconds = [row["seconds"] for row in rest.history]
    assert seconds == sorted(seconds)
    for minutes in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="minutes must be finite and greater than 0"):
            quick(minutes=minutes)


def test_an_evaluation_on_interrupt(tmp_path):
    """The first Ctrl-C leaves it its time, the second cuts it off, and neither loses a step."""
    data = Interrupted(number=signal.SIGINT, step=1)
    options = {"evaluate_on_interrupt": True, "evaluate_every": 9}
    stopped = quick(data, **options)
    assert (stopped.reason, stopped.step) == ("SIGINT", 2)
    assert "validation_loss" in stopped.history[-1]
    again = Interrupted(number=signal.SIGINT, step=1, evaluation=1)
    cut = quick(again, run=tmp_path, **options)
    assert (cut.reason, cut.step, cut.validation_loss) == ("SIGINT", 2, np.inf)
    rest = quick(Interrupted(), run=tmp_path, resume=True, evaluate_every=9)
    assert losses(rest) == losses(quick(Interrupted(), evaluate_every=9))
    # A script that handles SIGTERM itself goes on.
    default = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        ended = quick(Interrupted(number=signal.SIGTERM, step=1), **options)
    finally:
        signal.signal(signal.SIGTERM, default)
    assert (ended.reason, ended.validation_loss) == ("SIGTERM", np.inf)


def test_a_profile_is_of_the_steps_after_the_first(tmp_path, events, monkeypatch):
    turns = []
    monkeypatch.setattr(watch.jax.profiler, "start_trace", lambda f: turns.append(events[-1]))
    monkeypatch.setattr(watch.jax.profiler, "stop_trace", lambda: turns.append(events[-1]))
    quick(steps=9, evaluate_every=9, profile=tmp_path)
    assert turns == [("fetch", 1), ("fetch", 6)]
    turns.clear()
    quick(steps=3, evaluate_every=9, profile=tmp_path)  # which ends before
    assert turns == [("fetch", 1), ("fetch", 3)]
