"""What fields, norms and curves refuse: the rule and the value, before any work."""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow import _rules as rules

# Each line is evaluated without the import hook that checks types in tests, as users' code is.
REFUSED = {
    # numbers
    "UnitNorm(-1.0)": "ValueError: the radius of UnitNorm must be positive and finite, got -1.0",
    "UnitNorm(nan)": "ValueError: the radius of UnitNorm must be positive and finite, got nan",
    "UnitNorm(True)": "TypeError: the radius of UnitNorm must be a real number, got True",
    "UnitNorm(10**400)": "ValueError: the radius of UnitNorm must be positive and finite, got 1000",
    "NGPT(flat, 0)": "ValueError: alpha must be positive and finite, got 0",
    "NGPT(flat, 1e300)": "ValueError: alpha must be positive and finite, got 1e+300",
    "1j * drift": "TypeError: the factor of a field must be a real number, got 1j",
    "inf * drift": "ValueError: the factor of a field must be finite, got inf",
    "np.ones(2) * drift": "ValueError: the factor of a field must be a scalar, got shape (2,)",
    "SelfAttention(beta=nan)": "ValueError: beta must be finite, got nan",
    "SelfAttention(beta='4')": "TypeError: beta must be a real number, got '4'",
    "LayerNorm(4.0)": "TypeError: dim must be a whole number, got 4.0",
    "LayerNorm(True)": "TypeError: dim must be a whole number, got True",
    "RMSNorm(0)": "ValueError: dim must be at least 1, got 0",
    "RMSNorm(2**40)": "ValueError: dim must be below 2^31, got 1099511627776",
    "LayerNorm(4, -1e-5)": "ValueError: epsilon must be finite and not negative, got -1e-05",
    "MultiHeadAttention(4, 0, key=key)": "ValueError: heads must be at least 1, got 0",
    "MultiHeadAttention(4, 3, key=key)": "ValueError: heads must divide dim, got dim=4 and heads=3",
    "MultiHeadAttention(4, 2.0, key=key)": "TypeError: heads must be a whole number, got 2.0",
    "MultiHeadAttention(4, 2, rotary=-1, key=key)": "ValueError: rotary, the base of the",
    "MultiHeadAttention(4, 2, key=0)": "TypeError: key must be one PRNG key such as",
    "FeedForward(3, 0, key=key)": "ValueError: width must be at least 1, got 0",
    "FeedForward(3, 3, 'relu', key=key)": "TypeError: activation must be a function such as",
    "Hardmax(-1.0)": "ValueError: tolerance must be finite and not negative, got -1.0",
    "Sinkhorn(2.5)": "TypeError: iterations must be a whole number, got 2.5",
    "Sinkhorn(tolerance=0.0)": "ValueError: tolerance must be positive and finite, got 0.0",
    "divergence(drift, 0.0, x, Measure(x), key=key, samples=1.5)": "TypeError: samples must be a",
    # arrays
    "SelfAttention(np.eye(2) * nan)": "ValueError: query must be finite, got nan at index (0, 0)",
    "SelfAttention(value=1j * np.eye(2))": "TypeError: value must be floating point, got complex",
    "SelfAttention('Q')": "TypeError: query must be an array of real numbers",
    "LinearDrift([[1.0, 2.0], [3.0]])": "TypeError: matrix must be an array of real numbers",
    "LinearDrift(np.eye(2, dtype=bool))": "TypeError: matrix must hold real numbers, got bool",
    "LinearDrift(np.eye(3))(0.0, x, Measure(x))": "ValueError: a matrix of shape (3, 3) acts on",
    "LayerNorm(3)(x)": "ValueError: a norm of dimension 3 takes tokens of that dimension, got 2",
    # parts
    "Sum(())": "ValueError: a sum takes a tuple of at least one field, got ()",
    "drift + 3": "TypeError: only fields can be added, multiplied, wrapped or moved in time",
    "PreNorm(flat, LayerNorm)": "TypeError: norm must be an instance such as jaxflow.LayerNorm",
    "PreNorm(flat, UnitNorm(), dtype=int)": "TypeError: dtype must be a floating-point dtype such",
    "PreNorm(SelfAttention(), UnitNorm())": "ValueError: normalised tokens move in R^d, got a",
    "PostNorm(flat, Sphere)": "TypeError: geometry must be an instance such as jaxflow.Sphere()",
    "SqrtScaling(None)": "TypeError: only fields can be added, multiplied, wrapped or moved in",
    "SelfAttention(interaction=Softmax)": "TypeError: interaction must be an instance such as",
    "SelfAttention(causal=1)": "TypeError: causal must be True or False, got 1",
    "SelfAttention(window=True)": "TypeError: window must be a number of keys, a pair of them",
    "SelfAttention(backend=1)": "TypeError: backend must be a name such as",
    # curves
    "PiecewiseConstant([], [1.0])": "ValueError: a curve needs at least one field",
    "PiecewiseConstant(drift, [1.0])": "TypeError: a curve takes a list of fields, got LinearDrift",
    "PiecewiseConstant([3, 3], [1.0])": "TypeError: only fields can be added, multiplied, wrapped",
    "PiecewiseLinear([drift], ['a'])": "TypeError: the times of a curve must be real numbers, got",
    "PiecewiseLinear([drift], [True])": "TypeError: the times of a curve must be real numbers, got",
    "Legendre([drift], 0.0, inf)": "ValueError: times must be finite and increasing",
    "Fourier([drift], -1.0)": "ValueError: the period must be positive and finite, got -1.0",
    "jax.jit(lambda p: Fourier([drift], p).period)(1.0)": "TypeError: the period is part of the",
    "Constant(3)": "TypeError: only fields can be added, multiplied, wrapped or moved in",
    "TimeDependent(drift)": "TypeError: TimeDependent takes a curve, such as",
    "HyperNetwork(drift, width=0, key=key)": "ValueError: width must be at least 1, got 0",
    "HyperNetwork(drift, rank=2.0, key=key)": "TypeError: rank must be a whole number, got 2.0",
    "HyperNetwork(drift, embedding=4.0, key=key)": "TypeError: embedding must be a whole number",
    "HyperNetwork(drift, t1=0.0, key=key)": "ValueError: t1 must be positive and finite, got 0.0",
    "HyperNetwork(ellipsoid, key=key)": "ValueError: the geometry Ellipsoid(",
    "fields.time.sample(Constant(drift), [0.0])": "ValueError: a layer lies between two edges",
    "fields.time.fit(Constant(drift), drift, t1=1.0)": "TypeError: like must be an instance such",
    "fields.time.fit(Constant(drift), smooth, t1=0.0)": "ValueError: times must be finite and incr",
    "fields.time.relative_distance(smooth, 3, t1=1.0)": "TypeError: b must be an instance such as",
    # methods
    "solvers.LieTrotter(1)": "TypeError: solver must be an instance such as diffrax.Heun(), got 1",
    "solvers.Geodesic(1)": "ValueError: Geodesic takes an explicit Runge-Kutta method, got int",
    "solvers.default_adjoint(0)": "ValueError: a solve has at least one step, got 0",
}  # fmt: skip

SCRIPT = """
import json, sys, warnings
import jax, jax.numpy as jnp, numpy as np, jaxflow
from math import inf, nan
names = {name: getattr(jaxflow, name) for name in jaxflow.__all__} | {"fields": jaxflow.fields}
names |= {"jax": jax, "np": np, "inf": inf, "nan": nan, "key": jax.random.key(0)}
names |= {"x": jnp.ones((2, 2)), "drift": jaxflow.LinearDrift(1.0)}
names["flat"] = jaxflow.SelfAttention(geometry=jaxflow.Euclidean())
names["ellipsoid"] = jaxflow.PostNorm(names["flat"], jaxflow.Ellipsoid([1.0, 2.0, 3.0]))
names["smooth"] = jaxflow.Legendre([names["drift"]], 0.0, 1.0)
found = {}
for line in json.load(sys.stdin):
    try:
        found[line] = repr(eval(line, dict(names)))
    except Exception as error:
        found[line] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(list(REFUSED)), text=True, check=True,
        capture_output=True,
    )  # fmt: skip
    return json.loads(out.stdout)


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line, found):
    assert found[line].startswith(REFUSED[line])


def test_traced_numbers_are_trusted():
    """They are not known yet; a bad one is then seen in the result."""
    norm = jax.jit(lambda radius: jf.UnitNorm(radius)(jnp.array([3.0, 4.0])))
    np.testing.assert_allclose(norm(-1.0), [-0.6, -0.8], rtol=1e-6)
    assert np.isnan(norm(np.nan)).all()


def test_numbers_keep_their_dtype():
    """An array's own, else the default: never a weak one."""
    for value, dtype in ((1, "float32"), (np.float64(1), "float32"), (jnp.bfloat16(1), "bfloat16")):
        number: Any = rules.real("number", value)
        assert number.dtype == dtype and not number.weak_type
    with jax.enable_x64(True):
        assert rules.real("number", 1).dtype == "float64"
        assert rules.real("number", jnp.float32(1)).dtype == "float32"
