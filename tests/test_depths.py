"""Depths that are drawn anew for each step of training, and steps that are cut or moved."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import KEY, Line, Points, arrays, fit, losses, network, same

import jaxflow as jf
from jaxflow import training
from jaxflow.fields import AbstractField
from jaxflow.geometry import Euclidean
from jaxflow.models import Depth, smooth
from jaxflow.training import loop
from jaxflow.training.depths import seed_of, steps_of
from jaxflow.training.step import Step

OWN = Depth(t1=2.0, steps=1)
SEED = seed_of(jax.random.key(3))


def steps(elastic) -> Any:
    model = network(curve=smooth, depth=OWN)
    return steps_of(Step(model, optax.sgd(0.1), training.FlowLoss(training.cross_entropy)), elastic)


# ------------------------------------------------------------------ what is drawn


def test_a_draw_is_a_function_of_the_key_and_the_number_of_the_step():
    elastic = training.Elastic((1, 2, Depth(t1=2.0, steps=3, solver=diffrax.Heun()), 2), jitter=0.5)
    found = steps(elastic)
    assert [depth.steps for depth in found.depths] == [1, 2, 3]
    assert found.depths[2].solver == diffrax.Heun() and found.depths[1].t1 == 2.0
    draws = [found.at(SEED, number) for number in range(600)]
    assert all(step.jitter == 0.5 for step in draws) and found.own.jitter == 0
    # Another object, from the middle on: what a run that goes on draws.
    again = steps(elastic)
    assert [again.at(SEED, n).depth for n in range(300, 600)] == [s.depth for s in draws[300:]]
    counts = np.bincount([step.depth.steps for step in draws])[1:]
    # 600 draws of probability 1/3 have the standard deviation 11.5.
    assert counts.sum() == 600 and (abs(counts - 200) < 4 * 11.5).all()
    other = [found.at(seed_of(KEY), number).depth for number in range(600)]
    assert other != [step.depth for step in draws]
    assert seed_of(jax.random.PRNGKey(3)) == SEED


def test_the_first_steps_are_at_the_own_depth():
    found, always = (steps(training.Elastic((1, 2), after=after)) for after in (3, 0))
    depths = [found.at(SEED, number).depth for number in range(20)]
    assert depths[:3] == [OWN] * 3
    assert depths[3:] == [always.at(SEED, number).depth for number in range(3, 20)]
    # Each is one program: that of the own depth is the drawn one's, where it is among them.
    assert found.at(SEED, 0) is found.drawn[0] and found.trained == found.drawn
    other = steps(training.Elastic((2, 3), after=3))
    assert other.trained == [other.own, *other.drawn] and other.at(SEED, 2) is other.own
    moved = steps(training.Elastic((1, 2), jitter=0.5, after=3))
    assert moved.at(SEED, 0) is moved.own
    with pytest.raises(ValueError, match="after must be at least 0, got -1"):
        training.Elastic((1, 2), after=-1)


def test_the_cost_counts_the_own_depth_where_it_is_trained():
    model = network(curve=smooth, depth=Depth(t1=2.0, steps=9))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    step = Step(static, optax.sgd(0.1), training.FlowLoss(training.cross_entropy))

    def told(after: int) -> str:
        found = steps_of(step, training.Elastic((1, 2), after=after))
        return loop._cost(model, params, static, Points().batch(0)[0][None], found)

    memory = lambda text: float(text.split("gradient: ")[1].split(" MB")[0])
    assert memory(told(5)) > memory(told(0)) and "after 5 steps at the model's own" in told(5)


def test_evaluations_are_at_the_ends_or_where_they_are_asked_for():
    assert list(steps(training.Elastic(range(1, 5))).evaluated) == ["4"]  # 1 is the model's own
    heun = Depth(t1=2.0, steps=2, solver=diffrax.Heun())
    asked = training.Elastic((2, 3), evaluate=[3, heun, Depth(2.0, None, 0.1, diffrax.Tsit5())])
    assert list(steps(asked).evaluated) == ["3", "Heun-2", "Tsit5-0.1"]
    alone = steps(None)
    assert alone.at(SEED, 7) is alone.own and not alone.depths and not alone.evaluated


# ------------------------------------------------------------------ steps, cut and moved


class Decay(AbstractField):
    """dx/dt = -x."""

    geometry: Euclidean = Euclidean()

    def __call__(self, t, x, mu):
        return -x


def test_a_grid_is_where_the_steps_end():
    """On a grid of steps h_k, Euler's method takes x to prod_k (1 - h_k) x."""
    depth = Depth(t1=2.0, steps=8).jittered(0.5, KEY)
    lengths = np.diff(np.asarray(depth.times))
    assert depth.times[0] == 0 and depth.times[-1] == 2
    assert (0.125 <= lengths).all() and (lengths <= 0.375).all() and np.ptp(lengths) > 0.05
    mu = jf.Measure(jnp.ones((1, 2)))
    flow = eqx.filter_jit(lambda depth, mu: depth.flow(Decay(), mu).final.points)
    np.testing.assert_allclose(flow(depth, mu), np.prod(1 - lengths), rtol=8 * 2**-23)
    moved = Depth(t1=2.0, steps=8).jittered(0.5, jax.random.key(1))
    assert not np.allclose(flow(depth, mu), flow(moved, mu), rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(depth.halved().times)[::2], depth.times)
    np.testing.assert_allclose(np.diff(depth.halved().times)[::2], lengths / 2, rtol=1e-5)
    assert depth.with_steps(4) == Depth(t1=2.0, steps=4)
    assert Depth(t1=2.0, steps=3).halved() == Depth(t1=2.0, steps=6)
    with pytest.raises(ValueError, match="none can be halved"):
        Depth(t1=1.0, tolerance=0.1, solver=diffrax.Tsit5()).halved()


# ------------------------------------------------------------------ from layers to a curve


def test_layers_become_a_smooth_curve():
    """As many coefficients as layers: the same outputs. One: the mean of the layers."""
    layers = network()
    x = jnp.asarray(Points().batch(0)[0])
    whole = layers.smoothed(2)
    assert isinstance(whole.field.curve, jf.Legendre)
    np.testing.assert_allclose(whole(x), layers(x), rtol=1e-5, atol=1e-6)
    assert np.isfinite(whole.with_depth(layers.depth.with_steps(3))(x)).all()
    (mean,) = arrays(layers.smoothed(1).field)[0]
    np.testing.assert_allclose(mean, arrays(layers.field)[0].mean(axis=0), rtol=1e-5)
    with pytest.raises(ValueError, match="2 steps determine as many coefficients, got 3"):
        layers.smoothed(3)
    with pytest.raises(ValueError, match="adaptive steps"):
        layers.with_depth(Depth(2.0, None, 0.1, diffrax.Tsit5())).smoothed(2)


# ------------------------------------------------------------------ the loop


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    elastic = training.Elastic((1, 2), jitter=0.5)
    loss = training.FlowLoss(training.cross_entropy, consistency=0.5)
    model = network(curve=smooth, depth=OWN)
    optimiser = optax.adam(0.1)  # far enough from the first block that depths differ

    def trained(**options):
        return fit(model, Points(), depths=elastic, loss=loss, optimiser=optimiser, **options)

    whole = trained(steps=6)
    trained(steps=3, run=tmp_path / "run")
    rest = trained(steps=6, run=tmp_path / "run", resume=True)
    assert losses(rest) == losses(whole)
    same(rest.model, whole.model)
    # A batch takes n evaluations, and 2 n where each step is cut into two.
    drawn: Any = steps_of(Step(model, optimiser, loss), elastic)
    counts = [drawn.at(seed_of(KEY), number).depth.steps for number in range(6)]
    assert [row["num_evaluations"] for row in whole.history] == [3 * n for n in counts]
    assert set(counts) == {1, 2}
    # The model keeps its own depth, where it is evaluated.
    assert whole.model.depth == OWN
    batches = list(Points().validation_batches())
    row = whole.history[-1]
    at = lambda n: whole.model.with_depth(OWN.with_steps(n))
    assert row["validation_loss"] == training.evaluate(whole.model, batches, loss)["loss"]
    assert row["validation_loss@2"] == training.evaluate(at(2), batches, loss)["loss"]
    assert row["validation_loss@2"] != row["validation_loss"]
    change = np.mean([(at(1)(x) - at(2)(x)) ** 2 for x, _ in batches])
    assert row["validation_consistency"] == pytest.approx(change, rel=1e-5)
    outputs = row["validation_outputs_loss"] + 0.5 * row["validation_consistency"]
    assert row["validation_loss"] == pytest.approx(outputs, rel=1e-6)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "given, error, told",
    [
        ({"depths": ()}, ValueError, "one depth at least"),
        ({"depths": range(1, 34)}, ValueError, "at most 32"),
        ({"depths": range(10**12)}, ValueError, "at most 32"),
        ({"depths": range(3)}, ValueError, "each of depths must be at least 1, got 0"),
        ({"depths": [2.0]}, TypeError, "depths"),
        ({"depths": 4}, TypeError, "depths"),
        ({"depths": "2:4"}, TypeError, "depths"),
        ({"depths": [2], "evaluate": [0]}, ValueError, "each of evaluate"),
        ({"depths": [2], "jitter": 1.0}, ValueError, "jitter must be at least 0 and less than 1"),
        ({"depths": [2], "jitter": -0.1}, ValueError, "jitter"),
        ({"depths": [2], "jitter": np.nan}, ValueError, "jitter"),
    ],
)
def test_depths_that_make_no_training(given, error, told):
    with pytest.raises(error, match=told):
        training.Elastic(**given)


def test_a_model_that_cannot_be_trained_so_is_refused_before_the_folder_is_touched(tmp_path):
    elastic = training.Elastic((1, 2))
    with pytest.raises(TypeError, match=r"AbstractModel, got a Line"):
        fit(Line(), Points(), depths=elastic, run=tmp_path / "run")
    layers = network()
    with pytest.raises(ValueError, match="jitter moves the ends of steps"):
        fit(layers, Points(), depths=training.Elastic((2, 4), 0.5), run=tmp_path / "run")
    with pytest.raises(ValueError, match="steps must end where the parameters"):
        fit(layers, Points(), depths=training.Elastic((2, 3)), run=tmp_path / "run")
    with pytest.raises(TypeError, match="depths"):
        fit(layers, Points(), depths=range(2, 4))
    for consistency in (-1.0, np.inf):
        with pytest.raises(ValueError, match="consistency must be finite and at least 0"):
            training.FlowLoss(training.cross_entropy, consistency=consistency)
    assert not (tmp_path / "run").exists()
