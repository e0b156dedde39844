"""What a training costs, counted by hand."""

import diffrax
import jax
import numpy as np
import pytest

from jaxflow.models import Depth, LanguageModel, layered, shared, smooth
from jaxflow.training import operations

BLOCK = 12 * 8**2 + 2 * 2 * 8 + 5 * 8  # attention and feed-forward, two norms, biases
ENDS = (11 + 6 + 2) * 8  # embedding, positions, the last norm
TOKENS = np.zeros((3, 6), np.int32)


def model(curve, depth):
    return LanguageModel(11, 8, 2, 4, 6, curve=curve, depth=depth, key=jax.random.key(0))


@pytest.mark.parametrize("curve", [layered, shared, smooth])
def test_each_parameter_costs_its_multiply_adds(curve):
    """Of a curve those that act at one time count; Heun's method evaluates them twice a step."""
    products = 2 * 18 * (4 * 4 * BLOCK + 3 * ENDS)
    assert operations(model(curve, Depth(4.0, 4)), TOKENS) == products
    heun = operations(model(curve, Depth(4.0, 4, solver=diffrax.Heun())), TOKENS)
    assert heun is not None and heun - products == 2 * 18 * 4 * 4 * BLOCK


def test_drawn_steps_count_by_their_mean_and_adaptive_ones_are_not_known():
    at = lambda **options: operations(model(smooth, Depth(4.0, 4)), TOKENS, **options)
    counted, usual = at(steps=5.5), at()
    assert counted is not None and usual is not None
    assert counted - usual == pytest.approx(2 * 18 * 4 * 1.5 * BLOCK)
    adaptive = Depth(4.0, tolerance=1e-3, solver=diffrax.Tsit5())
    assert operations(model(smooth, adaptive), TOKENS) is None
