"""The loop, its losses, and what a run folder survives."""

import dataclasses
import json
import signal
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
from jaxflow.models import Depth, LanguageModel, ResidualNetwork
from jaxflow.observables import AttentionEntropy, KineticEnergy

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


def network(**options):
    return ResidualNetwork(2, 2, 4, 2, width=8, key=KEY, **options)


def fit(model, data, **options):
    defaults = {"steps": 6, "evaluate_every": 3, "log_every": 1, "progress": False}
    return training.fit(model, data, **defaults | options)


def losses(fitted):
    return [row["loss"] for row in fitted.history]


def arrays(model):
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


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
    assert row["num_evaluations"] == 2 and row["per_second"] > 0 and row["gradient_norm"] > 0
    assert row["validation_loss"] >= fitted.validation_loss
    assert row["validation_num_evaluations"] == 2


def test_evaluation_is_the_mean_over_what_counts():
    """Targets of -1 count for nothing; a solve that fails has no loss."""
    model: Any = network()
    x, y = Points(6).batch(0)
    short, last = (x[:4], y[:4]), (x[4:], y[4:])
    padded = np.concatenate([x[4:], x[:2]]), np.concatenate([y[4:], np.full(2, -1, np.int32)])
    whole = training.evaluate(model, [(x, y)])
    assert whole["num_evaluations"] == 2
    for batches in ([short, last], [short, padded]):
        assert training.evaluate(model, batches)["loss"] == pytest.approx(whole["loss"], rel=1e-6)
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
    """Accumulated batches of one size are one batch."""

    @dataclasses.dataclass(frozen=True)
    class Joined:
        def batch(self, step):
            parts = [Points().batch(2 * step + i) for i in range(2)]
            return tuple(np.concatenate(p) for p in zip(*parts, strict=True))

        validation_batches, describe = Points().validation_batches, Points().describe

    options = {"steps": 3, "optimiser": optax.sgd(0.5)}
    split, joined = (
        fit(network(), Points(), accumulate=2, **options),
        fit(network(), Joined(), **options),
    )
    for a, b in zip(arrays(split.model), arrays(joined.model), strict=True):
        # Sums of 16 float32 terms in another order, three times.
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_resumed_losses_are_bit_identical(tmp_path):
    whole = fit(network(), Points())
    assert fit(network(), Points(), steps=3, run=tmp_path, optimiser=training.adamw(6)).step == 3
    rest = fit(network(), Points(), run=tmp_path, resume=True)
    assert rest.step == 6 and losses(rest) == losses(whole)
    for a, b in zip(arrays(rest.model), arrays(whole.model), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in lines] == losses(whole)
    assert rest.validation_loss == whole.validation_loss


def test_the_key_is_in_the_checkpoint(tmp_path):
    class Noisy(training.AbstractLoss):
        def __call__(self, model, inputs, targets, key):
            noise = jax.random.normal(key, inputs.shape)
            value = training.cross_entropy(model(inputs + noise), targets)
            return training.Valued(value, jnp.array(True), {})

    options = {"loss": Noisy(), "optimiser": optax.sgd(0.1)}
    whole = fit(network(), Points(), key=jax.random.key(5), **options)
    fit(network(), Points(), steps=3, key=jax.random.key(5), run=tmp_path, **options)
    # Another key, or none, does not matter to a run that has one.
    rest = fit(network(), Points(), run=tmp_path, resume=True, **options)
    assert losses(rest) == losses(whole)
    assert losses(fit(network(), Points(), **options)) != losses(whole)


def test_a_run_is_not_overwritten_nor_resumed_on_other_data(tmp_path):
    fit(network(), Points(), steps=2, run=tmp_path)
    with pytest.raises(ValueError, match="holds a run already.*resume=True"):
        fit(network(), Points(), steps=2, run=tmp_path)
    with pytest.raises(ValueError, match="other data: size was 8 and is 9"):
        fit(network(), Points(9), steps=4, run=tmp_path, resume=True)
    with pytest.raises(ValueError, match="accumulate was 1 and is 2"):
        fit(network(), Points(), steps=4, run=tmp_path, resume=True, accumulate=2)
    with pytest.raises(ValueError, match="no such folder"):
        fit(network(), Points(), run=tmp_path / "none", resume=True)


def test_a_model_is_loaded_whole(tmp_path):
    """An array that the run trained and `like` lacks is refused."""
    fit(network(), Points(), steps=1, run=tmp_path)
    like: Any = network()
    without = eqx.tree_at(lambda m: m.output.bias, like, None)
    with pytest.raises(ValueError, match="output.bias"):
        training.load(tmp_path, without)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    started = fit(network(), Points(), steps=2, run=tmp_path, resume=True)
    assert losses(started) == losses(fit(network(), Points(), steps=2))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_best_model_is_a_trained_one(tmp_path):
    """Where nothing was evaluated it is the last; a failed step leaves the best where it is."""
    stopped = fit(network(), Points(), steps=50, evaluate_every=50, budget=4)
    assert (stopped.reason, stopped.step) == ("budget", 2)
    assert np.isfinite(stopped.validation_loss)
    assert eqx.tree_equal(stopped.best, stopped.model)
    with pytest.raises(training.TrainingError):
        fit(network(), Points(bad=3), run=tmp_path)
    best = training.best(tmp_path / "checkpoints")
    assert best is not None and training.metadata(best)["step"] == 3


def test_a_step_that_is_not_finite_leaves_the_last_good_parameters(tmp_path):
    good = fit(network(), Points(), steps=2, optimiser=training.adamw(6))
    with pytest.raises(training.TrainingError, match=r"step 3 failed.*must be finite, got"):
        fit(network(), Points(bad=2), run=tmp_path)
    kept = training.load(tmp_path, network(), which="latest")
    for a, b in zip(arrays(kept), arrays(good.model), strict=True):
        np.testing.assert_array_equal(a, b)


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

    fitted = fit(network(), Unseen(), run=tmp_path, log_every=4, patience=1)
    assert fitted.reason == "done" and fitted.validation_loss == np.inf
    assert eqx.tree_equal(fitted.best, fitted.model)
    assert [row["step"] for row in fitted.history] == [1, 4, 6]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_run_that_diverged_is_resumed_from_before(tmp_path):
    """From its last checkpoint that made a good step, or from the start, with another rate."""
    rate = lambda start, changes=None: optax.sgd(optax.piecewise_constant_schedule(start, changes))
    wild, tame, late = rate(1e30), rate(0.1), rate(0.1, {3: 1e31})
    run = {"run": tmp_path / "early", "checkpoint_every": 2}
    with pytest.raises(training.TrainingError, match="step 2 failed"):
        fit(network(), Points(), optimiser=wild, **run)
    resumed = fit(network(), Points(), optimiser=tame, resume=True, **run)
    assert losses(resumed) == losses(fit(network(), Points(), optimiser=tame))
    run = {"run": tmp_path / "late", "checkpoint_every": 2, "keep": 1, "evaluate_every": 6}
    with pytest.raises(training.TrainingError, match="step 5 failed"):
        fit(network(), Points(), optimiser=late, **run)
    kept = sorted((tmp_path / "late" / "checkpoints").glob("step-*"))
    assert [training.metadata(path)["step"] for path in kept] == [2, 4]
    resumed = fit(network(), Points(), optimiser=tame, resume=True, **run)
    assert losses(resumed) == losses(fit(network(), Points(), optimiser=tame))


def test_tokens_on_a_sphere_that_overflow_stop_the_training():
    model = LanguageModel(7, 8, 2, 1, 4, placement="post", key=KEY)
    bad = eqx.tree_at(lambda m: m.embedding, model, jnp.inf * model.embedding)

    class Tokens(Points):
        def batch(self, step):
            tokens = np.random.default_rng(step).integers(0, 7, (2, 5)).astype(np.int32)
            return tokens[:, :-1], tokens[:, 1:]

    with pytest.raises(training.TrainingError, match=r"step 1 failed.*must be finite"):
        fit(bad, Tokens())


def test_a_solve_that_blows_up_names_the_time_and_the_tensor():
    class Bursting(jf.AbstractField):
        geometry: jf.Euclidean = jf.Euclidean()
        gain: jax.Array = eqx.field(default_factory=lambda: jnp.ones(()))

        def __call__(self, t, x, mu):
            return jnp.where(t > 0.5, jnp.inf, 1.0).astype(x.dtype) * self.gain * x

    depth = Depth(t1=1.0, steps=4, solver=jf.models.SOLVERS["euler"])
    model = eqx.tree_at(lambda m: (m.field, m.depth), network(), (Bursting(), depth))
    with pytest.raises(training.TrainingError, match=r"step 1 failed.*t = .*not finite"):
        fit(model, Points())


def test_a_gradient_that_is_not_finite_is_named():
    def loss(outputs, targets):
        # Its derivative at 0 is infinite.
        return jnp.sqrt((0 * outputs).sum())

    with pytest.raises(training.TrainingError, match=r"the gradient of .*embedding.*not finite"):
        fit(network(), Points(), loss=loss)


def test_patience_and_budget_end_the_training():
    still = optax.sgd(0.0)
    stopped = fit(network(), Points(), steps=50, optimiser=still, evaluate_every=2, patience=3)
    assert stopped.reason == "early stop" and stopped.step == 8
    # Two evaluations of the field a step.
    spent = fit(network(), Points(), steps=50, budget=9)
    assert spent.reason == "budget" and spent.step == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"resume": True}, "needs the folder"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fit(network(), Points(), **options)


# ------------------------------------------------------------------ losses and optimiser


def test_cross_entropy_leaves_out_negative_targets():
    logits = jax.random.normal(KEY, (3, 5))
    targets = jnp.array([4, -1, 0])
    rows = jax.nn.log_softmax(logits)
    expected = -(rows[0, 4] + rows[2, 0]) / 2
    np.testing.assert_allclose(training.cross_entropy(logits, targets), expected, rtol=1e-6)
    assert training.cross_entropy(logits, jnp.full(3, -1)) == 0


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
        ts, values = sol.ts[1], sol.observed[1]["kinetic"]
        errors.append(float(np.trapezoid(values, ts)) - exact)
    assert 0 < errors[1] < errors[0] and errors[0] / errors[1] == pytest.approx(4, rel=0.02)


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
    ends = []
    for strength in (0.0, 1.0):
        loss = training.FlowLoss(training.cross_entropy, {"kinetic": (strength, KineticEnergy)})
        ends.append(fit(network(), data, steps=60, loss=loss, optimiser=optax.adam(0.03)))
    free, held = ends
    assert held.history[-1]["kinetic"] < 0.5 * free.history[-1]["kinetic"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("causal", [False, True])
def test_attention_entropy(causal):
    heads = jf.MultiHeadAttention(6, 2, causal=causal, key=KEY)
    x = jax.random.normal(KEY, (5, 6))
    logs = jnp.log(jnp.array([0.1, 0.3, 0.2, 0.0, 0.4]))
    entropies = []
    for q, k in zip(heads.query, heads.key, strict=True):
        scores = (x @ q.T) @ (x @ k.T).T / np.sqrt(3) + logs[None]
        scores = jnp.where(np.tri(5, dtype=bool), scores, -jnp.inf) if causal else scores
        p = jax.nn.softmax(scores, axis=1)
        entropies.append(jax.scipy.special.entr(p).sum(axis=1))
    expected = float(np.average(np.mean(entropies, axis=0), weights=np.exp(logs)))
    found = AttentionEntropy(2.0 * heads + jf.LinearDrift(1.0))(0.0, jf.Measure(x, logs))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(TypeError, match="no attention"):
        AttentionEntropy(jf.LinearDrift(1.0))(0.0, jf.Measure(x))


# ------------------------------------------------------------------ run folders


def test_load_builds_the_model_of_the_config(tmp_path):
    sizes = {"inputs": 2, "outputs": 2, "dim": 4, "layers": 2, "width": 8}
    depth = {"t1": 1.0, "steps": 2, "solver": "heun"}
    config = {"model": "ResidualNetwork", "seed": 3, "depth": depth} | sizes
    model = jf.models.build(config)
    fitted = fit(model, Points(), run=tmp_path, config={"model": config})
    loaded = training.load(tmp_path, which="latest")
    inputs = jnp.asarray(Points().batch(0)[0])
    np.testing.assert_array_equal(loaded(inputs), fitted.model(inputs))
    np.testing.assert_array_equal(training.load(tmp_path)(inputs), fitted.best(inputs))
    with pytest.raises(ValueError, match="no run with a checkpoint"):
        training.load(tmp_path / "none")
    with pytest.raises(ValueError, match='"best" or "latest"'):
        training.load(tmp_path, which="first")


def test_load_refuses_a_damaged_checkpoint(tmp_path):
    fit(network(), Points(), steps=2, run=tmp_path)
    files = sorted((tmp_path / "checkpoints").rglob("d/*"))
    data = max(files, key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged"):
        training.load(tmp_path, network())


@pytest.mark.slow
def test_killed_twenty_times_the_losses_are_the_same(tmp_path):
    whole, killed, kills = resume.compare(tmp_path, kills=20, steps=400)
    assert kills >= 10  # the others found it done
    assert len(whole) == 400 and whole == killed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end(tmp_path, number):
    child = resume.start(tmp_path, tmp_path / "cache", 10_000)
    resume.wait_for_step(child, tmp_path)
    child.send_signal(number)
    assert child.communicate()[0].strip() == number.name
    assert child.returncode == 0
    last = training.latest(tmp_path / "checkpoints")
    assert last is not None
    done = training.metadata(last)["step"]
    assert 1 <= done < 10_000 and resume.logged(tmp_path) == done
