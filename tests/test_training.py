"""The loop, its losses, and what a run folder survives."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxflow as jf
from benchmarks import resume
from jaxflow import training
from jaxflow._folder import claim, read_settings, write_settings
from jaxflow.models import Depth, LanguageModel, ResidualNetwork
from jaxflow.observables import AttentionEntropy, KineticEnergy
from jaxflow.training import checkpoints, loop
from jaxflow.training.step import State, Step, evaluated

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Points:
    """Points of the plane and the sign of their product; infinite in the batch `bad`."""

    size: int = 8
    bad: int | None = None

    def batch(self, step):
        x = np.random.default_rng(step).standard_normal((self.size, 2)).astype(np.float32)
        targets = (x[:, 0] * x[:, 1] > 0).astype(np.int32)
        return (x * np.inf if step == self.bad else x), targets

    def validation_batches(self, count=None):
        for i in range(count or 2):
            yield self.batch(10_000 + i)

    def describe(self):
        return {"kind": "points", "size": self.size}


# One optimiser, so that runs of one model share their program.
ADAM = training.adamw(6)


def network(**options):
    return ResidualNetwork(2, 2, 4, 2, width=8, key=KEY, **options)


class Line(eqx.Module):
    """A model without a solve, for what has nothing to do with it: it compiles at once."""

    weight: jax.Array = eqx.field(default_factory=lambda: 0.1 * jnp.ones((2, 2)))

    def __call__(self, x):
        return x @ self.weight


class Outputs(training.AbstractLoss):
    """The cross-entropy of outputs, without a solve; the key moves the inputs by `noise`."""

    noise: float = 0.0

    def __call__(self, model, inputs, targets, key):
        inputs = inputs + self.noise * jax.random.normal(key, inputs.shape)
        return training.Valued(
            training.cross_entropy(model(inputs), targets), jnp.array(True), {"one": jnp.ones(())}
        )


def fit(model, data, **options):
    defaults: dict[str, Any] = {"steps": 6, "evaluate_every": 3, "log_every": 1, "progress": False}
    defaults["optimiser"] = ADAM
    return training.fit(model, data, **defaults | options)


def quick(data=None, **options):
    return fit(Line(), data or Points(), **{"loss": Outputs()} | options)


def losses(fitted):
    return [row["loss"] for row in fitted.history]


def arrays(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


def same(a, b):
    for x, y in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(x, y)


def contents(folder):
    """All that a folder holds, byte for byte."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


# ------------------------------------------------------------------ the loop


def test_it_learns_in_one_trace():
    traces = []

    def loss(outputs, targets):
        traces.append(outputs.shape)
        return training.cross_entropy(outputs, targets)

    model = network()
    before = [np.array(a) for a in arrays(model)]
    rate = optax.adam(0.03)
    fitted = fit(model, Points(64), steps=150, optimiser=rate, loss=loss, evaluate_every=75)
    assert len(traces) == 2  # the step, and the evaluation
    assert fitted.reason == "done" and fitted.step == 150 == len(fitted.history)
    assert np.mean(losses(fitted)[-10:]) < 0.5 * losses(fitted)[0]
    assert training.accuracy(fitted.best, Points(64).validation_batches()) > 0.85
    # Donation is for the loop's own arrays.
    for a, b in zip(arrays(model), before, strict=True):
        np.testing.assert_array_equal(a, b)
    row = fitted.history[-1]
    assert (
        row["num_evaluations"] == 2 and row["targets_per_second"] > 0 and row["gradient_norm"] > 0
    )
    assert row["validation_loss"] >= fitted.validation_loss
    assert row["validation_num_evaluations"] == 2


def test_evaluation_is_the_mean_over_what_counts():
    """Targets of -1 count for nothing; a solve that fails has no loss."""
    model: Any = network()
    x, y = Points(6).batch(0)
    short = x[:4], y[:4]
    padded = np.concatenate([x[4:], x[:2]]), np.concatenate([y[4:], np.full(2, -1, np.int32)])
    whole = training.evaluate(model, [(x, y)])
    assert whole["num_evaluations"] == 2
    parts = training.evaluate(model, [short, padded])
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    finer = training.evaluate(model.with_depth(Depth(t1=1.0, steps=8)), [(x, y)])
    assert finer["num_evaluations"] == 8
    failing = Depth(t1=1.0, tolerance=1e-6, solver=diffrax.Tsit5(), max_steps=1)
    assert np.isnan(training.evaluate(model.with_depth(failing), [(x, y)])["loss"])
    assert np.isnan(training.evaluate(model, [])["loss"])
    numbers = np.array([[-1.0, -1.0], [1.0, 3.0]], np.float32)  # -1 counts: these are no classes
    error = training.evaluate(model, [(x[:2], numbers)], training.squared_error)["loss"]
    outputs = model(jnp.asarray(x[:2]))
    assert error == pytest.approx(float(((outputs - numbers) ** 2).mean()), rel=1e-5)


def test_a_step_is_the_optimiser_on_the_mean_gradient():
    """Accumulated batches of one size are one batch; a step of SGD is minus the gradient."""

    @dataclasses.dataclass(frozen=True)
    class Joined:
        def batch(self, step):
            parts = [Points().batch(2 * step + i) for i in range(2)]
            return tuple(np.concatenate(p) for p in zip(*parts, strict=True))

        validation_batches, describe = Points().validation_batches, Points().describe

    options = {"steps": 3, "optimiser": optax.sgd(0.5)}
    split, joined = quick(accumulate=2, **options), quick(Joined(), **options)
    for a, b in zip(arrays(split.model), arrays(joined.model), strict=True):
        # Sums of 16 float32 terms in another order, three times.
        np.testing.assert_allclose(a, b, atol=3e-6)
    x, y = Joined().batch(0)
    gradient = jax.grad(lambda w: training.cross_entropy(x @ w, jnp.asarray(y)))(Line().weight)
    one = quick(Joined(), **options | {"steps": 1})
    np.testing.assert_allclose(one.model.weight, Line().weight - 0.5 * gradient, atol=1e-6)


def test_resumed_losses_are_bit_identical(tmp_path):
    whole = fit(network(), Points())
    assert fit(network(), Points(), steps=3, run=tmp_path).step == 3
    rest = fit(network(), Points(), run=tmp_path, resume=True)
    assert rest.step == 6 and losses(rest) == losses(whole)
    same(rest.model, whole.model)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in lines] == losses(whole)
    assert rest.validation_loss == whole.validation_loss


def test_the_default_optimiser_is_adamw_of_the_steps(monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "adamw", lambda steps: asked.append(steps) or ADAM)
    same(quick(optimiser=None).model, quick().model)
    assert asked == [6]


def test_the_key_is_in_the_checkpoint(tmp_path):
    options = {"loss": Outputs(noise=1.0), "optimiser": optax.sgd(0.1)}
    whole = quick(key=jax.random.key(5), **options)
    quick(steps=3, key=jax.random.key(5), run=tmp_path, **options)
    # Another key, or none, does not matter to a run that has one.
    rest = quick(run=tmp_path, resume=True, **options)
    assert losses(rest) == losses(whole)
    assert losses(quick(**options)) != losses(whole)


@pytest.mark.slow
def test_the_best_model_is_a_trained_one(tmp_path):
    """Where nothing was evaluated it is the last; a failed step leaves the best where it is."""
    stopped = fit(network(), Points(), steps=50, evaluate_every=50, budget=4)
    assert (stopped.reason, stopped.step) == ("budget", 2)
    assert np.isfinite(stopped.validation_loss)
    assert eqx.tree_equal(stopped.best, stopped.model)
    with pytest.raises(training.TrainingError):
        quick(Points(bad=3), run=tmp_path)
    best = training.best(tmp_path / "checkpoints")
    assert best is not None and training.metadata(best)["step"] == 3


def test_a_step_that_is_not_finite_leaves_the_last_good_parameters(tmp_path):
    good = fit(network(), Points(), steps=2)
    with pytest.raises(training.TrainingError, match=r"step 3 failed.*must be finite, got"):
        fit(network(), Points(bad=2), run=tmp_path)
    same(training.load(tmp_path, network(), which="latest"), good.model)


@pytest.mark.parametrize("rate", [np.nan, np.inf, 3e38])
def test_an_update_that_is_not_finite_is_no_step(tmp_path, rate):
    """The gradient is finite, and what the optimiser makes of it is not."""
    optimiser = optax.chain(optax.sgd(1.0), optax.scale(rate), optax.scale(1e6))
    with pytest.raises(training.TrainingError, match=r"step 1 failed.*update of .*weight.*rate"):
        quick(optimiser=optimiser, run=tmp_path)
    same(training.load(tmp_path, Line(), which="latest"), Line())


def test_a_state_of_the_optimiser_that_is_not_finite_is_no_step(tmp_path):
    """The parameters would stay finite, and no later step would be right."""

    def spoil(updates, state, params=None):
        return jax.tree.map(jnp.zeros_like, updates), state * jnp.nan

    optimiser = optax.GradientTransformation(lambda params: jnp.ones(()), spoil)
    with pytest.raises(training.TrainingError, match="step 1 failed.*update of .*not finite"):
        quick(optimiser=optimiser)
    # Infinite from the start, such as the best loss so far, is no failure.
    keep = lambda updates, state, params=None: (updates, state)
    waiting = optax.GradientTransformation(lambda params: jnp.inf * jnp.ones(()), keep)
    assert quick(optimiser=waiting).reason == "done"


def test_an_evaluation_that_is_not_finite_stops_the_training(tmp_path):
    with pytest.raises(
        training.TrainingError, match=r"evaluation after step 3 failed.*must be fin"
    ):
        fit(network(), Points(bad=10_001), run=tmp_path)
    last = training.latest(tmp_path / "checkpoints")
    assert last is not None and training.metadata(last)["step"] == 3
    assert training.best(tmp_path / "checkpoints") is None


def test_training_without_validation_data(tmp_path):
    class Unseen(Points):
        def validation_batches(self, count=None):
            return iter(())

    fitted = quick(Unseen(), run=tmp_path, log_every=4, patience=1)
    assert fitted.reason == "done" and fitted.validation_loss == np.inf
    assert eqx.tree_equal(fitted.best, fitted.model)
    assert [row["step"] for row in fitted.history] == [1, 4, 6]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_tokens_on_a_sphere_that_overflow_are_named():
    model = LanguageModel(7, 8, 2, 1, 4, placement="post", key=KEY)
    bad = eqx.tree_at(lambda m: m.embedding, model, jnp.inf * model.embedding)
    tokens = np.random.default_rng(0).integers(0, 7, (2, 5)).astype(np.int32)
    params, static = eqx.partition(bad, eqx.is_inexact_array)
    step = Step(static, ADAM, training.FlowLoss(training.cross_entropy))
    batches = lambda: iter([(tokens[:, :-1], tokens[:, 1:])])
    with pytest.raises(training.TrainingError, match=r"step 1 failed.*must be finite"):
        evaluated(step, State(params, None, KEY), 1, batches)


def test_a_solve_that_blows_up_names_the_time_and_the_tensor():
    class Bursting(jf.AbstractField):
        geometry: jf.Euclidean = jf.Euclidean()
        gain: jax.Array = eqx.field(default_factory=lambda: jnp.ones(()))

        def __call__(self, t, x, mu):
            return jnp.where(t > 0.5, jnp.inf, 1.0).astype(x.dtype) * self.gain * x

    depth = Depth(t1=1.0, steps=4, solver=jf.models.SOLVERS["euler"])
    model = eqx.tree_at(lambda m: (m.field, m.depth), network(), (Bursting(), depth))
    with pytest.raises(training.TrainingError, match=r"step 1 failed.*t = .*not finite"):
        fit(model, Points(), optimiser=optax.sgd(0.1))


def test_a_gradient_that_is_not_finite_is_named():
    class Rooted(training.AbstractLoss):
        def __call__(self, model, inputs, targets, key):
            # Its derivative at 0 is infinite.
            root = jnp.sqrt((0 * model(inputs)).sum())
            return training.Valued(root, jnp.array(True), {})

    with pytest.raises(training.TrainingError, match=r"the gradient of .*weight.*not finite"):
        quick(loss=Rooted())


def test_patience_and_budget_end_the_training():
    still = optax.sgd(0.0)
    stopped = quick(steps=50, optimiser=still, evaluate_every=2, patience=3)
    assert stopped.reason == "early stop" and stopped.step == 8
    # Two evaluations of the field a step.
    spent = fit(network(), Points(), steps=50, budget=9)
    assert spent.reason == "budget" and spent.step == 5


# ------------------------------------------------------------------ what is refused


class Listless(Points):
    def describe(self):
        return {"size": {1, 2}}


class Still(eqx.Module):
    """A model without a parameter."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # Annotations are checked here too, so only a wrong value has our own message.
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 1, got -1"),
        ({"evaluation_batches": 0}, "evaluation_batches must be at least 1"),
        ({"patience": float("nan")}, "patience"),
        ({"budget": 0}, "budget must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"log_every": False}, "log_every must be a whole number, got False"),
        ({"config": {"z": 1j}}, "must be JSON"),
        ({"trainable": False}, "no floating-point arrays that trainable selects"),
        ({"data": Listless()}, "must be JSON"),
        ({"data": [1, 2]}, "data"),
        ({"budget": 5}, "the loss logs no num_evaluations"),
        ({"model": Still()}, "no floating-point arrays"),
        ({"optimiser": 0.1}, "optimiser"),
        ({"loss": 3}, "loss"),
        ({"key": 3}, "key"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    tmp_path, ran, options, message, resume
):
    folder = ran if resume else tmp_path / "run"
    before = contents(tmp_path), contents(ran)
    options = {"model": Line(), "data": Points(), "loss": Outputs()} | options
    with pytest.raises((ValueError, TypeError, AttributeError), match=message):
        fit(options.pop("model"), options.pop("data"), run=folder, resume=resume, **options)
    assert (contents(tmp_path), contents(ran)) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((0.1, Outputs(), KEY), "optimiser must be an Optax optimiser, got 0.1"),
        ((ADAM, 3, KEY), "loss must be a function .*, got 3"),
        ((ADAM, Outputs(), 3), "key must be one PRNG key, got 3"),
        ((ADAM, Outputs(), jax.random.split(KEY)), "key must be one PRNG key"),
    ],
)
def test_a_part_of_the_wrong_kind_is_refused(parts, message):
    with pytest.raises(TypeError, match=message):
        loop._check_parts(*parts)


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="needs the folder"):
        quick(resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and at least 0, got nan"),
        ({"learning_rate": np.inf}, "learning_rate must be finite and at least 0, got inf"),
        ({"learning_rate": -1e-3}, "learning_rate must be"),
        ({"final": float("nan")}, "final must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"clip": 0.0}, "clip must be finite and greater than 0"),
        ({"clip": float("nan")}, "clip must be"),
        ({"b1": 1.0}, "b1 must be at least 0 and below 1"),
        ({"b2": -0.5}, "b2 must be"),
    ],
)
def test_adamw_refuses_numbers_that_no_step_survives(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        training.adamw(**{"steps": 10} | options)


def test_adamw_is_one_program_for_any_number_of_steps_and_rate():
    """Its rates are those of Optax's schedule, which counts them from 1 here."""
    traces = []

    @eqx.filter_jit
    def rates(optimiser):
        traces.append(1)

        def step(state, _):  # Adam moves by the rate along a gradient that stays 1.
            updates, state = optimiser.update(jnp.ones(1), state, jnp.ones(1))
            return state, -updates[0]

        return jax.lax.scan(step, optimiser.init(jnp.ones(1)), length=20)[1]

    with jax.numpy_dtype_promotion("standard"):
        for steps, warmup, rate in [(20, 2, 0.1), (8, 0, 0.3)]:
            given = {"learning_rate": rate, "warmup": 3, "weight_decay": 0.0, "clip": None}
            found = rates(training.adamw(steps, **given))
            schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps, rate / 10)
            np.testing.assert_allclose(found, schedule(jnp.arange(1, 21)), rtol=1e-5)
    assert len(traces) == 1


# ------------------------------------------------------------------ losses and optimiser


def test_cross_entropy_leaves_out_negative_targets():
    logits = jax.random.normal(KEY, (3, 5))
    targets = jnp.array([4, -1, 0])
    rows = jax.nn.log_softmax(logits)
    expected = -(rows[0, 4] + rows[2, 0]) / 2
    np.testing.assert_allclose(training.cross_entropy(logits, targets), expected, rtol=1e-6)
    assert training.cross_entropy(logits, jnp.full(3, -1)) == 0


@pytest.mark.usefixtures("x64")
def test_chunked_cross_entropy_is_that_of_the_logits():
    """Its value and gradients, with targets that count for nothing and a last chunk that is short;
    to the rounding of sums in another order."""
    h, r = (
        jax.random.normal(k, shape) for k, shape in ((KEY, (2, 5, 3)), (jax.random.key(1), (7, 3)))
    )
    targets = jnp.array([[0, 6, -1, 2, 3], [-1, 1, 5, 5, 4]])
    whole = lambda h, r: training.cross_entropy(h @ r.T, targets)
    parts = lambda h, r: training.chunked_cross_entropy(h, r, targets, rows=4)
    for found, expected in zip(
        jax.tree.leaves(jax.value_and_grad(parts, (0, 1))(h, r)),
        jax.tree.leaves(jax.value_and_grad(whole, (0, 1))(h, r)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    assert training.chunked_cross_entropy(h, r, jnp.full((2, 5), -1), rows=4) == 0
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        training.chunked_cross_entropy(h, r, targets, rows=0)


def test_a_step_never_holds_all_logits_of_a_large_vocabulary():
    """Nothing in it is as large; with a loss that asks for the logits, they are."""
    words, batch, n = 50_257, 2, 8
    model = eqx.filter_eval_shape(lambda: LanguageModel(words, 4, 1, 1, n, width=4, key=KEY))
    params, static = eqx.partition(model, lambda a: isinstance(a, jax.ShapeDtypeStruct))
    tokens = np.zeros((1, batch, n), np.int32)

    def largest(outputs):
        step = Step(static, ADAM, training.FlowLoss(outputs))
        gradient = lambda params: step.gradient(State(params, None, KEY), (tokens, tokens), 0)[0]
        shapes = re.findall(r":[a-z]+\d+\[([\d,]+)\]", str(jax.make_jaxpr(gradient)(params)))
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest(training.cross_entropy) < batch * n * words
    assert largest(lambda *given: training.cross_entropy(*given)) >= batch * n * words


@pytest.mark.slow
def test_weight_decay_acts_on_matrices_alone():
    model = LanguageModel(7, 8, 2, 3, 4, key=KEY)
    params = eqx.filter(model, eqx.is_inexact_array)
    mask = training.matrices(params)
    block = mask.field.curve.coefficients
    attention, forward = block.fields
    assert attention.field.query and attention.field.output and forward.field.weight_in
    assert not (attention.norm.gain or attention.norm.bias or forward.field.bias_in)
    assert mask.embedding and not mask.norm.gain
    # A curve of curves: two axes of coefficients before those of a parameter.
    nested = training.matrices(jf.Legendre([model.field] * 3, 0.0, 1.0))
    attention = nested.coefficients.curve.coefficients.fields[0]
    assert attention.field.query and not attention.norm.gain
    # With a gradient of zero only what decays moves.
    optimiser = optax.adamw(0.1, weight_decay=0.5, mask=training.matrices)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimiser.update(
            jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params
        )
    moved = jax.tree.map(lambda u: bool((u != 0).any()), updates)
    assert moved.embedding and not moved.norm.gain
    assert not moved.field.curve.coefficients.fields[0].norm.gain


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_kinetic_energy_along_a_linear_flow():
    """x' = a x: int_0^1 |x'|^2 dt = a (e^{2a} - 1)/2 |x(0)|^2, by a rule of order 2."""
    a, x0 = 0.7, jax.random.normal(KEY, (5, 3))
    exact = a * np.expm1(2 * a) / 2 * float((x0**2).sum(axis=1).mean())
    errors = []
    for steps in (8, 16):
        depth = Depth(t1=1.0, steps=steps, solver=jf.models.SOLVERS["tsit5"])
        field = jf.LinearDrift(a)
        sol = depth.flow(field, jf.Measure(x0), {"kinetic": KineticEnergy(field)})
        errors.append(float(sol.integral("kinetic")) - exact)
    assert 0 < errors[1] < errors[0] and errors[0] / errors[1] == pytest.approx(4, rel=0.02)


@pytest.mark.slow
def test_costs_enter_the_loss_and_the_log():
    data, weight = Points(), 0.3
    plain = training.FlowLoss(training.cross_entropy)
    costly = training.FlowLoss(training.cross_entropy, {"kinetic": (weight, KineticEnergy)})
    inputs, targets = map(jnp.asarray, data.batch(0))
    without, with_cost = (f(network(), inputs, targets, KEY) for f in (plain, costly))
    kinetic = float(with_cost.metrics["kinetic"])
    assert kinetic > 0
    assert float(with_cost.value) == pytest.approx(float(without.value) + weight * kinetic)
    assert with_cost.metrics["outputs_loss"] == without.value
    # A heavy cost straightens the flow.
    ends, adam = [], optax.adam(0.03)
    for strength in np.array([0.0, 1.0]):  # not Python's, so that both are one program
        loss = training.FlowLoss(training.cross_entropy, {"kinetic": (strength, KineticEnergy)})
        ends.append(fit(network(), data, steps=60, loss=loss, optimiser=adam))
    free, held = ends
    assert held.history[-1]["kinetic"] < 0.5 * free.history[-1]["kinetic"]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_attention_entropy():
    """Of causal heads; test_observables.py has that of a head that sees all tokens."""
    heads = jf.MultiHeadAttention(6, 2, causal=True, key=KEY)
    x = jax.random.normal(KEY, (5, 6))
    logs = jnp.log(jnp.array([0.1, 0.3, 0.2, 0.0, 0.4]))
    entropies = []
    for q, k in zip(heads.query, heads.key, strict=True):
        scores = (x @ q.T) @ (x @ k.T).T / np.sqrt(3) + logs[None]
        scores = jnp.where(np.tri(5, dtype=bool), scores, -jnp.inf)
        p = jax.nn.softmax(scores, axis=1)
        entropies.append(jax.scipy.special.entr(p).sum(axis=1))
    expected = float(np.average(np.mean(entropies, axis=0), weights=np.exp(logs)))
    found = AttentionEntropy(2.0 * heads + jf.LinearDrift(1.0))(0.0, jf.Measure(x, logs))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(TypeError, match="no attention"):
        AttentionEntropy(jf.LinearDrift(1.0))(0.0, jf.Measure(x))


# ------------------------------------------------------------------ run folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of four steps, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    quick(steps=4, evaluate_every=2, keep=3, run=folder, config={"steps": 4, "solver": "heun"})
    return folder


@pytest.fixture
def ran(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "ran")


def go_on(folder, data=None, **options):
    return quick(data, run=folder, resume=True, **options)


def test_a_run_folder_says_what_it_is_of(ran):
    assert read_settings(ran / "config.json", unchanged=True) == {
        "command": "train",
        "steps": 4,
        "solver": "heun",
    }
    assert [p.name for p in sorted(ran.iterdir())] == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
    ]


def test_a_run_is_not_overwritten_nor_resumed_on_other_data(tmp_path, ran):
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds a run already.*resume=True"):
        quick(run=ran)
    with pytest.raises(ValueError, match="other data: size was 8 and is 9"):
        go_on(ran, Points(9))
    with pytest.raises(ValueError, match="accumulate was 1 and is 2"):
        go_on(ran, accumulate=2)
    with pytest.raises(ValueError, match="no such folder"):
        go_on(tmp_path / "none")
    with pytest.raises(ValueError, match="another config: solver was 'heun' and is 'euler'"):
        go_on(ran, config={"steps": 6, "solver": "euler"})
    with pytest.raises(ValueError, match="another config: solver was 'heun' and is None"):
        go_on(ran, config={"steps": 6})
    with pytest.raises(ValueError, match="does not fit the tree"):
        go_on(ran, optimiser=optax.sgd(0.1))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is, or is in, a file"):
        quick(run=tmp_path / "file")
    (tmp_path / "file").unlink()
    assert contents(tmp_path) == before
    # What says how long is free.
    assert go_on(ran, config={"steps": 6, "solver": "heun"}).step == 6
    assert read_settings(ran / "config.json", unchanged=True)["steps"] == 6
    assert go_on(ran, steps=8).step == 8  # with its own config


def test_a_folder_of_another_kind_of_run_is_not_taken(tmp_path):
    with claim(tmp_path, "simulate") as folder:
        write_settings(folder, "simulate", {})
    before = contents(tmp_path)
    for again in (False, True):
        with pytest.raises(ValueError, match="another kind of run.*simulate"):
            quick(run=tmp_path, resume=again)
    assert contents(tmp_path) == before


def test_a_config_that_was_edited_is_not_resumed(ran):
    file = ran / "config.json"
    file.write_text(file.read_text().replace("heun", "euler"))
    before = contents(ran)
    with pytest.raises(ValueError, match=r"config.json does not have the sha256"):
        go_on(ran)
    assert contents(ran) == before


def test_a_run_that_another_process_trains_is_left_alone(ran):
    before = contents(ran)
    with ThreadPoolExecutor(1) as other, claim(ran, "train", going_on=True):
        for again in (False, True):
            refused = other.submit(quick, run=ran, resume=again).exception()
            assert f"in use by process {os.getpid()} on {socket.gethostname()}" in str(refused)
    assert contents(ran) == before


def test_a_failure_that_a_folder_only_claims_deletes_nothing(ran):
    """Only a sealed checkpoint says that its step failed."""
    before = contents(ran)
    for claimed in ('{"step": 0}', "garbage", ""):
        (ran / "failed.json").write_text(claimed)
        assert go_on(ran, steps=4).step == 4
        (ran / "failed.json").unlink()
        assert contents(ran) == before


def test_a_damaged_log_is_named(ran):
    log = ran / "metrics.jsonl"
    content = log.read_bytes()
    for damaged in (content[:-1], content[:50], b"", content.replace(b"2", b"3", 1)):
        log.write_bytes(damaged)
        before = contents(ran)
        with pytest.raises(ValueError, match=r"metrics.jsonl is damaged"):
            go_on(ran)
        assert contents(ran) == before
    # A line that a kill cut off, and steps that no checkpoint knows, are going to happen again.
    log.write_bytes(content + b'{"step": 5, "loss": 1}\n{"st')
    assert [row["step"] for row in go_on(ran, steps=5).history] == [1, 2, 3, 4, 5]
    log.unlink()  # the user's own decision
    assert [row["step"] for row in go_on(ran, steps=6).history] == [6]


def test_a_damaged_checkpoint_is_not_resumed_nor_loaded_past(ran):
    """The last is the best here, and the one before would do for a careless reader."""
    kept = sorted((ran / "checkpoints").iterdir())
    assert [p.name[-1] for p in kept] == ["2", "4"]
    for path in kept:
        manifest = path / "manifest.json"
        content = manifest.read_bytes()
        manifest.write_bytes(content[: len(content) // 2])
        before = contents(ran)
        for attempt in (
            lambda: go_on(ran),
            lambda: training.load(ran, Line()),
            lambda path=path: training.metadata(path),
        ):
            with pytest.raises(ValueError, match=f"{path} is damaged: .*manifest.json"):
                attempt()
        assert contents(ran) == before
        manifest.write_bytes(content)
    shutil.rmtree(kept[1])  # the user's own decision: it goes on from the one before
    assert [row["step"] for row in go_on(ran, steps=4).history] == [1, 2, 3, 4]


def test_a_checkpoint_of_something_else_is_not_resumed(tmp_path):
    training.save(tmp_path / "checkpoints", Line(), step=3, config={"a": 1}, cursor={})
    with pytest.raises(ValueError, match="was not written by `fit`"):
        go_on(tmp_path)
    with pytest.raises(ValueError, match="is not of `fit`"):
        training.load(tmp_path)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    started = go_on(tmp_path, steps=2)
    assert losses(started) == losses(quick(steps=2))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_that_failed_is_resumed_from_before(tmp_path):
    """From its last checkpoint that a good step followed, or from the start."""
    run = {"run": tmp_path / "early", "checkpoint_every": 2}
    with pytest.raises(training.TrainingError, match="step 2 failed"):
        quick(Points(bad=1), **run)
    whole = losses(quick())
    assert losses(quick(resume=True, **run)) == whole
    run = {"run": tmp_path / "late", "checkpoint_every": 2, "keep": 1, "evaluate_every": 6}
    with pytest.raises(training.TrainingError, match="step 5 failed"):
        quick(Points(bad=4), **run)
    kept = sorted((tmp_path / "late" / "checkpoints").glob("step-*"))
    assert [training.metadata(path)["step"] for path in kept] == [2, 4]
    # What is good stays where it is until the resume is known to go on from it.
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="other data"):
        quick(Points(9), resume=True, **run)
    assert contents(tmp_path) == before
    resumed = quick(resume=True, **run)
    assert losses(resumed) == whole and resumed.step == 6


def test_a_disk_that_is_full_leaves_the_checkpoint_before(ran, monkeypatch):
    before = contents(ran / "checkpoints")

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            go_on(ran)
    assert contents(ran / "checkpoints") == before
    assert losses(go_on(ran)) == losses(quick())


def test_a_model_is_loaded_whole(tmp_path):
    """An array that the run trained and `like` lacks is refused."""
    fit(network(), Points(), steps=1, run=tmp_path)
    like: Any = network()
    without = eqx.tree_at(lambda m: m.output.bias, like, None)
    with pytest.raises(ValueError, match="output.bias"):
        training.load(tmp_path, without)


def test_load_builds_the_model_of_the_config(tmp_path):
    sizes = {"inputs": 2, "outputs": 2, "dim": 4, "layers": 2, "width": 8}
    depth = {"t1": 1.0, "steps": 2, "solver": "heun"}
    config = {"model": "ResidualNetwork", "seed": 3, "depth": depth} | sizes
    model = jf.models.build(config)
    better, last = model, eqx.tree_at(lambda m: m.output.bias, model, jnp.ones(2))
    about = {"config": {"model": config}, "data": {}, "accumulate": 1}
    for step, trained in {1: better, 2: last}.items():
        params = eqx.filter(trained, eqx.is_inexact_array)
        where = {"step": step, "config": about, "cursor": {}, "metrics": {"loss": float(step)}}
        training.save(tmp_path / "checkpoints", State(params, None, KEY), **where)
    assert eqx.tree_equal(training.load(tmp_path), better)
    assert eqx.tree_equal(training.load(tmp_path, which="latest"), last)
    training.export(tmp_path, tmp_path / "last.safetensors", which="latest")
    assert eqx.tree_equal(training.load(tmp_path / "last.safetensors"), last)


def test_load_refuses_what_it_cannot_read(tmp_path, ran):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file", tmp_path):
        for read in (training.load, training.tokenizer):
            with pytest.raises(ValueError, match="no run with a checkpoint"):
                read(path)
    with pytest.raises(ValueError, match='"best" or "latest"'):
        training.load(ran, which="first")
    with pytest.raises(ValueError, match="does not say how its model is built"):
        training.load(ran)
    with pytest.raises(ValueError, match="was not trained on text"):
        training.tokenizer(ran)
    for data in ran.rglob("d/*"):
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged"):
        training.load(ran, Line())


# ------------------------------------------------------------------ signals


@dataclasses.dataclass(frozen=True)
class Interrupted(Points):
    """Sends this process a signal with a batch of a step, or of an evaluation."""

    number: signal.Signals = signal.SIGTERM
    step: int = -1
    evaluation: int = -1

    def batch(self, step):
        if step == self.step:
            os.kill(os.getpid(), self.number)
        return Points.batch(self, step)

    def validation_batches(self, count=None):
        for i in range(4):
            if i == self.evaluation:
                os.kill(os.getpid(), self.number)
            assert not -1 < self.evaluation < i - 1, "an evaluation goes on after a signal"
            yield self.batch(10_000 + i)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(tmp_path, number):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stopped = quick(Interrupted(number=number, step=2), run=tmp_path)
    assert (stopped.reason, stopped.step) == (number.name, 3)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    last = training.latest(tmp_path / "checkpoints")
    assert last is not None and training.metadata(last)["step"] == 3
    # One that comes with the last step is no less heard: what follows must not start.
    assert quick(Interrupted(number=number, step=2), steps=3).reason == number.name
    assert losses(go_on(tmp_path, Interrupted())) == losses(quick(Interrupted()))


def test_callbacks_are_told_of_the_last_step_once(tmp_path):
    told = []
    tell = lambda step, metrics, model: told.append(step)
    quick(Interrupted(step=2), run=tmp_path, log_every=1, callbacks=[tell])
    assert told == [1, 2, 3]


@pytest.mark.parametrize("steps", [3, 6])
def test_an_evaluation_that_a_signal_cuts_off_is_made_when_the_run_goes_on(tmp_path, steps):
    whole = quick(Interrupted(), steps=steps)
    stopped = quick(Interrupted(evaluation=1), steps=steps, run=tmp_path)
    assert (stopped.reason, stopped.step) == ("SIGTERM", 3)
    assert len(stopped.history) == 2 and stopped.validation_loss == np.inf
    rest = go_on(tmp_path, Interrupted(), steps=steps)
    validated = lambda fitted: [row.get("validation_loss") for row in fitted.history]
    assert rest.reason == "done" and rest.validation_loss == whole.validation_loss
    assert losses(rest) == losses(whole) and validated(rest) == validated(whole)


@pytest.mark.slow
def test_killed_again_and_again_the_losses_are_the_same(tmp_path):
    whole, killed, kills = resume.compare(tmp_path, kills=3, steps=60, longest_s=0.1)
    assert kills >= 2  # the other found it done
    assert len(whole) == 60 and whole == killed


@pytest.mark.slow
def test_a_signal_to_a_process_saves_and_ends_it(tmp_path):
    child = resume.start(tmp_path, Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), 10_000)
    resume.wait_for_step(child, tmp_path)
    child.send_signal(signal.SIGTERM)
    assert child.communicate()[0].strip() == "SIGTERM"
    assert child.returncode == 0
    last = training.latest(tmp_path / "checkpoints")
    assert last is not None
    done = training.metadata(last)["step"]
    assert 1 <= done < 10_000 and resume.logged(tmp_path) == done
