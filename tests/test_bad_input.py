"""What is not asked right is refused before work starts: the rule, the value and the remedy."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_calls import CALLS, KEY, language_model

import jaxflow as jf
from jaxflow import measure, observables


@pytest.fixture(scope="module")
def outcomes():
    """The errors as users see them."""
    script = Path(__file__).with_name("bad_calls.py")
    paths = [str(Path(jf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CALLS)
def test_refused(name, outcomes):
    _, error, message = CALLS[name]
    kind, text = outcomes[name]
    assert kind == error.__name__ and re.search(message, text), f"{kind}: {text}"


def test_a_word_of_two_megabytes_costs_its_length():
    """A table of words as wide as the longest would take 300 GB."""
    mu, tokens = measure.from_text("x" * 2_000_000 + " a b" * 2_000, 4, key=KEY, max_tokens=4001)
    assert len(tokens) == mu.n == 4001


@pytest.mark.parametrize("concentration", [1e8, 1e30])
def test_points_of_any_concentration(concentration):
    """sin^2 of the angle to the mean is Gamma((d-1)/2) / (kappa / 2) in law: mean (d-1) / kappa."""
    mu = measure.von_mises_fisher(4000, [0.0, 3e30, 0.0], concentration, key=KEY)
    sines = np.asarray(mu.points, float)[:, [0, 2]]
    assert abs((sines**2).sum(axis=1).mean() * concentration / 2 - 1) < 5 / np.sqrt(4000)


def test_what_is_traced_is_not_a_number():
    """Under jit no value can be refused: it gives nan, and every loop ends."""
    sample = jax.jit(lambda m, k: measure.von_mises_fisher(4, m, k, key=KEY).points)
    assert jnp.isnan(sample(jnp.zeros(3), 1.0)).all()
    assert jnp.isnan(sample(jnp.ones(3), jnp.nan)).all()
    image = jax.jit(lambda x: measure.from_image(x, 1).points)
    assert jnp.isnan(image(jnp.ones((2, 2)).at[0, 0].set(jnp.nan))).all()
    model = language_model()
    call = eqx.filter_jit(model)
    assert (
        jnp.isnan(call(jnp.array([3, 11]))[1]).all() and jnp.isnan(call(jnp.array([-1, 3]))).all()
    )
    assert jnp.isfinite(call(jnp.array([3, 10]))).all()


def test_points_that_are_not_finite_give_nan():
    """Neither 0 nor a number that leaves them out; a token without mass may be what it will."""
    x = jnp.array([[1.0, 0.0], [0.0, 1.0], [jnp.nan, 0.0], [0.5, 0.5]])
    padding = jnp.where(jnp.arange(4) == 2, -jnp.inf, 0.0)
    both = jf.Measure(jnp.stack([x, x]), jnp.stack([jnp.zeros(4), padding]))
    for name, of in {
        "diameter": observables.diameter,
        "hull_area": observables.hull_area,
        "order_parameter": observables.order_parameter,
        "fourier_modes": lambda mu: observables.fourier_modes(mu, 1),
        "pair_distances": lambda mu: observables.pair_distances(mu, [0.0, 2.0])[..., 0],
        "wasserstein": lambda mu: observables.wasserstein(
            mu, measure.circle(2), geometry=jf.Sphere()
        ),
    }.items():
        assert jnp.isnan(of(both)).tolist() == [True, False], name
    logs = jax.jit(lambda mu, logs: observables.diameter(jf.Measure(mu.points, logs)))
    assert jnp.isnan(logs(both[1], jnp.full(4, -jnp.inf)))
