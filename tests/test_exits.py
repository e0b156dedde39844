"""Tokens that exit early: when, what they leave to those that follow, and what is not computed."""

from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import KEY, TOKENS, language_model

import jaxflow as jf
from jaxflow import training
from jaxflow.models import Depth, DistributionExit, VelocityExit, exits

STEPS, T = 4, 2.0
PROMPTS = jnp.asarray(TOKENS[:, :3], jnp.int32)
MIDDLE = {DistributionExit: 0.2, VelocityExit: 1.2}  # some tokens exit early, some do not

solved = eqx.filter_jit(exits.solve)


@pytest.fixture(scope="module", autouse=True)
def doubled():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model(doubled) -> Any:
    return language_model().with_depth(Depth(t1=T, steps=STEPS))


@eqx.filter_jit
def by_hand(model, tokens, kind, tolerance):
    """Two layers of two parts, in four steps: x += h part(x), unless x stays."""
    x, h = model.embed(tokens).points, T / STEPS
    stays, counted = jnp.zeros(len(x), bool), jnp.zeros(len(x), int)
    for k in range(STEPS):
        y = x
        for part in model.field.at(k * h + h / 2).parts:
            y = jnp.where(stays[:, None], x, y + h * part(k * h, y, jf.Measure(y)))
        counted += jnp.where(stays, 0, 1)
        if kind is VelocityExit:
            change = jnp.linalg.norm(y - x, axis=1) / (h * jnp.linalg.norm(y, axis=1))
        else:
            p, q = (jax.nn.softmax(model.norm(z) @ model.embedding.T) for z in (x, y))
            change = 0.5 * jnp.abs(p - q).sum(axis=1)
        stays, x = stays | (change < tolerance), y
    return x, counted


@pytest.mark.parametrize("kind", MIDDLE)
def test_all_tokens_at_once_are_the_steps_by_hand(model, kind):
    """The states, and when each token exits; rounding of some hundred operations."""
    for tolerance in (0.0, MIDDLE[kind], 1e9):
        final, counted = solved(model, TOKENS, kind(tolerance))
        expected, steps = by_hand(model, jnp.asarray(TOKENS[1]), kind, tolerance)
        np.testing.assert_allclose(final.points[1], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(counted[1], steps)
        few, many = int(counted.min()), int(counted.max())
        ends = {0.0: few == many == STEPS, 1e9: few == many == 1}
        assert ends.get(tolerance, few < many)


def test_a_larger_tolerance_takes_fewer_evaluations(model):
    """Of the first token at each tolerance, as nothing is before it; of all in the mean."""
    counted = jnp.stack(
        [solved(model, TOKENS, DistributionExit(a))[1] for a in np.linspace(0, 1.1, 12)]
    )
    assert (np.diff(counted[:, :, 0], axis=0) <= 0).all()
    assert (np.diff(counted.sum(axis=(1, 2))) <= 0).all()
    assert len(set(np.asarray(counted[:, 1, 0]).tolist())) > 2


def test_a_text_goes_on_as_all_its_tokens_at_once_say(model):
    """One token after another, past keys and values of tokens that stay: each is the most likely
    one of the distribution that the text up to it has, after so many steps."""
    exit = DistributionExit(MIDDLE[DistributionExit])
    found = model.generate_early(PROMPTS, 3, exit, temperature=0)
    assert (found.tokens[:, :3] == PROMPTS).all()
    final, counted = solved(model, found.tokens, exit)
    likeliest = model.read_out(final).argmax(axis=-1)
    np.testing.assert_array_equal(found.tokens[:, 3:], likeliest[:, 2:-1])
    np.testing.assert_array_equal(found.evaluations, counted[:, 2:-1])
    # Of the batch so many steps are made: those of its last token to exit.
    np.testing.assert_array_equal(found.made[1:], found.evaluations[:, 1:].max(axis=0))
    assert found.made[0] == counted[:, :3].max()
    assert found.evaluations.min() < found.evaluations.max()


def test_the_ends_are_all_steps_and_one(model):
    """No tolerance: the usual text. A huge one: a step each."""
    usual = model.generate(PROMPTS, 3, temperature=0)
    whole = model.generate_early(PROMPTS, 3, DistributionExit(0), temperature=0)
    np.testing.assert_array_equal(whole.tokens, usual)
    assert (whole.evaluations == STEPS).all() and (whole.made == STEPS).all()
    one = model.generate_early(PROMPTS, 3, DistributionExit(1e9), temperature=0)
    assert (one.evaluations == 1).all() and (one.made == 1).all()
    tokens = model.generate(PROMPTS, 3, temperature=0, exit=DistributionExit(1e9))
    np.testing.assert_array_equal(tokens, one.tokens)


CALLS = []


class Counted(jf.fields.AbstractWrapper):
    """A field that counts, on the host, how often it is computed, for a whole batch at once."""

    field: jf.AbstractField
    linear: ClassVar[bool] = False

    @property
    def geometry(self):
        return self.field.geometry

    def enter(self, x):
        return x

    def leave(self, t, x, v):
        jax.debug.callback(lambda: CALLS.append(1))
        return v


def test_steps_after_the_last_exit_are_not_computed(model):
    """The flow of one prompt, and that of each token added to it but the last."""
    counted: Any = Counted
    inside = counted(model.field.at(0.0).parts[0])
    counting = model.with_curve(jf.Constant(inside))
    for tolerance, steps in {1e9: 1, 0.0: STEPS}.items():
        CALLS.clear()
        found = counting.generate_early(PROMPTS[0], 3, VelocityExit(tolerance), temperature=0)
        jax.effects_barrier()
        assert len(CALLS) == 3 * steps == found.made.sum()


def test_the_loss_with_exits(model):
    batch = [(TOKENS, TOKENS[:, ::-1])]
    usual = training.evaluate(model, batch)
    for tolerance in (0.0, MIDDLE[DistributionExit]):
        exit = DistributionExit(tolerance)
        found = training.evaluate(model, batch, training.ExitLoss(exit))
        final, counted = solved(model, TOKENS, exit)
        expected = training.cross_entropy(model.read_out(final), jnp.asarray(TOKENS[:, ::-1]))
        assert found["loss"] == pytest.approx(float(expected), rel=1e-12)
        assert found["num_evaluations"] == float(counted.mean())
        assert (found["loss"] == pytest.approx(usual["loss"], rel=1e-12)) == (tolerance == 0)


@pytest.mark.parametrize("kind", [DistributionExit, VelocityExit])
@pytest.mark.parametrize(
    "tolerance, error", [(-0.1, ValueError), (np.nan, ValueError), ("a", TypeError)]
)
def test_tolerances_that_are_none(kind, tolerance, error):
    with pytest.raises(error, match="the tolerance of an exit must be"):
        kind(tolerance)


def test_what_cannot_exit_is_refused(model):
    exit = DistributionExit(0.1)
    draw = lambda model, prompt=TOKENS[0], length=3, **options: model.generate_early(
        prompt, length, **{"exit": exit, "temperature": 0} | options
    )
    with pytest.raises(TypeError, match="exit"):
        draw(model, exit=0.1)
    adaptive = Depth(t1=T, tolerance=1e-3, solver=diffrax.Tsit5())
    with pytest.raises(ValueError, match="must have fixed steps of an explicit method"):
        draw(model.with_depth(adaptive))
    with pytest.raises(ValueError, match="within the context of 12; got 6 and 7"):
        draw(model, length=7)
    with pytest.raises(ValueError, match="length, the number of tokens to add, must be at least 1"):
        draw(model, length=0)
    with pytest.raises(ValueError, match="drawing tokens needs key"):
        draw(model, temperature=1.0)
    with pytest.raises(ValueError, match="take cache=True"):
        model.generate(TOKENS[0], 3, exit=exit, cache=False, key=KEY)
    with pytest.raises(TypeError, match="exit"):
        training.ExitLoss(0.1)  # pyright: ignore[reportArgumentType]
    line = jf.models.ResidualNetwork(2, 2, 4, 2, width=8, key=KEY)
    with pytest.raises(TypeError, match="model must be an instance such as"):
        training.evaluate(line, [(np.ones((1, 2)), np.zeros(1, int))], training.ExitLoss(exit))
