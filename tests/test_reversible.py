"""Gradients of steps that are undone."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import jaxflow as jf
from jaxflow.models import Depth, LanguageModel, smooth
from jaxflow.reversible import ReversibleAdjoint

REVERSIBLE = {
    "solver": diffrax.ReversibleHeun(),
    "stepsize_controller": diffrax.StepTo(jnp.linspace(0, 1, 7) ** 1.2),
    "adjoint": ReversibleAdjoint(),
}


def start():
    return jf.measure.uniform_sphere(4, 3, key=jax.random.key(0))


def gradient(adjoint):
    """Of a function of the end, in the inverse temperature, the value matrix and the start."""

    def end(beta, value, points):
        field = jf.SelfAttention(value=value, beta=beta, geometry=jf.Euclidean())
        mu0 = dataclasses.replace(start(), points=points)
        out = jf.flow(field, mu0, t1=1.0, **REVERSIBLE | {"adjoint": adjoint})
        return (out.final.points**3).sum()

    value = jnp.eye(3) + 0.3 * jnp.triu(jnp.ones((3, 3)))
    return jax.grad(end, (0, 1, 2))(2.0, value, start().points)


def test_the_gradient_is_that_of_the_steps(x64):
    """To the rounding of float64, on unequal steps."""
    found = gradient(ReversibleAdjoint())
    expected = gradient(diffrax.RecursiveCheckpointAdjoint())
    for a, b in zip(found, expected, strict=True):
        assert jnp.abs(a - b).max() < 1e-12 * jnp.abs(b).max()


def temporaries(steps, adjoint) -> int:
    """Bytes that the gradient of a model takes beside its arguments and results."""
    depth = Depth(1.0, steps, solver=diffrax.ReversibleHeun(), adjoint=adjoint)
    model = LanguageModel(5, 4, 1, 2, 64, width=0, curve=smooth, depth=depth, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    loss = lambda arrays, tokens: (eqx.combine(arrays, static)(tokens) ** 2).mean()
    tokens = jnp.zeros((64, 64), jnp.int32)
    program = jax.jit(jax.grad(loss)).lower(arrays, tokens).compile()
    found = program.memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


def test_the_memory_does_not_grow_with_the_number_of_steps():
    states = 64 * 64 * 4 * 4
    assert temporaries(64, ReversibleAdjoint()) - temporaries(4, ReversibleAdjoint()) < states


REFUSED = {
    "another method": ({"solver": diffrax.Heun()}, "solver is Heun"),
    "adaptive steps": ({"stepsize_controller": None}, "PIDController"),
    "times": ({"saveat": diffrax.SaveAt(ts=jnp.array([0.5]))}, "last state alone"),
    "an event": ({"event": diffrax.Event(lambda t, y, args, **_: t > 0.5)}, "no event"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_undone_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        jf.flow(jf.SelfAttention(), start(), t1=1.0, **REVERSIBLE | change)


def test_layers_are_refused_and_so_are_costs_along_the_flow():
    depth = Depth(2.0, 2, solver=diffrax.ReversibleHeun(), adjoint=ReversibleAdjoint())
    model = LanguageModel(5, 4, 1, 2, 4, depth=depth, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"jump, at \[1.0\]: take a curve"):
        model(jnp.zeros(4, int))
    with pytest.raises(ValueError, match="ReversibleAdjoint keeps no path"):
        model.solve(jnp.zeros(4, int), {"energy": lambda t, mu: t})


def test_a_second_derivative_is_refused():
    def end(beta):
        out = jf.flow(jf.SelfAttention(beta=beta), start(), t1=1.0, **REVERSIBLE)
        return out.final.points.sum()

    with pytest.raises(TypeError, match="second derivative does not pass through Reversible"):
        jax.grad(jax.grad(end))(1.0)
