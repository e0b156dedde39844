"""Backends of users: functions of one system and subclasses, used by name, checked, refused."""

import dataclasses
import inspect
import re
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow.kernels import AbstractBackend, check_backend, conformance, register_backend, registry
from jaxflow.kernels.blocked import Blocked

TRIALS = conformance.TRIALS
X = jnp.linspace(-1.0, 1.0, 30).reshape(2, 5, 3) ** 2 + jnp.eye(5, 3)[None]
X = X / jnp.linalg.norm(X, axis=-1, keepdims=True)
NUMBERS = count()


@pytest.fixture
def name(monkeypatch):
    """A name that nothing else has, and that is free again after the test."""
    fresh = f"of test {next(NUMBERS)}"
    yield fresh
    registry.REGISTRY.pop(fresh, None)


def written_out(q, k, v, log_weights, scale, visible=None):
    """Softmax as everybody writes it: nan where a query sees no key."""
    s = scale * jnp.matmul(q, k.T, precision="highest") + log_weights[None, :]
    s = s if visible is None else jnp.where(visible, s, -jnp.inf)
    return jax.nn.softmax(s, axis=1) @ v, jax.nn.logsumexp(s, axis=1)


@dataclasses.dataclass(frozen=True)
class Scaled(AbstractBackend):
    """The portable backend, off by a factor, without bands."""

    factor: float = 1.0

    def forward(self, operands, problem):
        mean, log_partition = Blocked().forward(operands, problem)
        return self.factor * mean, log_partition

    def tangent(self, operands, problem):
        return Blocked().tangent(operands, problem)

    def cotangent(self, operands, problem):
        return Blocked().cotangent(operands, problem)

    def refusal(self, mode, shapes, problem):
        return None if problem.all_pairs else "it has no bands"

    def kernel(self, mode, shapes, problem):
        return "scaled"


def test_a_function_is_a_backend_wherever_one_is_named(name):
    """In a batch of fields and the gradient through it."""
    register_backend(name, written_out)
    assert name in jf.kernels.BACKENDS
    assert jf.select_backend(X, X, X, backend=name) == name
    assert jf.kernels.describe_backend(X, X, X, backend=name).endswith("(a function of one system)")

    def solved(x, backend):
        field = jf.SelfAttention(beta=2.0, backend=backend)
        velocity = jax.vmap(lambda x: field(0.0, x, jf.Measure(x)))(x)
        return (velocity**3).sum()

    gradient = jax.jit(jax.value_and_grad(solved), static_argnums=1)
    mine, right = (gradient(X, backend) for backend in (name, "reference"))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(right), strict=True):
        # Sums of 30 terms of size 1 in float32.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_what_a_function_is_not_asked_for_it_refuses(name):
    """Plain softmax is right also for a system without a key; benchmarks/README.md has masks."""
    register_backend(name, written_out)
    found = check_backend(name, dtypes=["float32"], trials=TRIALS[1:3])
    assert not found.faults, found
    assert {f.case for f in found.right} == {"masked keys"}
    assert {f.case for f in found.findings if f.refusal} == {"causal"}


def test_half_precision_is_widened(name):
    def in_float32(q, k, v, log_weights, scale):
        assert {a.dtype.name for a in (q, k, v, log_weights, scale)} == {"float32"}
        return written_out(q, k, v, log_weights, scale)

    register_backend(name, in_float32)
    found = check_backend(name, dtypes=["bfloat16"], trials=TRIALS[1:2])
    assert len(found.right) == 3


def test_a_rule_for_reverse_mode_alone(name):
    """`jax.custom_vjp` gives the cotangent; the tangent says what it lacks."""
    rule = jax.custom_vjp(written_out)
    rule.defvjp(lambda *a: (written_out(*a), a), lambda a, g: jax.vjp(written_out, *a)[1](g))
    register_backend(name, rule)
    found = check_backend(name, dtypes=["float32"], trials=TRIALS[:1])
    assert [f.mode for f in found.right] == ["forward", "cotangent"]
    assert re.search("tangent, .* wrong: .*forward-mode", str(found))


def test_a_subclass_and_its_faults(name):
    other = f"{name} too"
    register_backend(name, Scaled())
    register_backend(other, Scaled(1.01))
    try:
        right, wrong = (
            check_backend(n, dtypes=["float32"], trials=TRIALS[:1]) for n in (name, other)
        )
    finally:
        registry.REGISTRY.pop(other)
    assert len(right.right) == 3
    [fault] = wrong.faults
    assert fault.mode == "forward" and "off by 1.0e-02 of the largest entry" in str(fault)
    assert str(wrong).startswith(f"{other}: 2 right, 1 wrong of 3")


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda q, k, v, b, scale: q, r"\(mean, log_partition\).*\(1, 1\) and \(1,\) here"),
        (lambda q, k, v, b, scale: (v, v), r"got \(1, 1\), \(1, 1\)"),
        (lambda q: q, "it did not run"),
    ],
)
def test_a_function_that_returns_something_else(name, fn, message):
    register_backend(name, fn)
    [fault, *_] = check_backend(name, dtypes=["float32"], trials=TRIALS[:1]).faults
    assert re.search(message, str(fault))


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        (("blocked", written_out), {}, ValueError, "'blocked' is registered already.*another name"),
        (("a:b", written_out), {}, ValueError, "without a colon.*got 'a:b'"),
        ((" ", written_out), {}, ValueError, "must be a word"),
        ((3, written_out), {}, TypeError, "must be a string, got 3"),
        (("new", 3), {}, TypeError, "a function of one system or an instance.*got 3"),
        (("new", Scaled), {}, TypeError, "an instance of a subclass"),
        (("new", written_out), {"masks": 1}, TypeError, "masks must be True or False"),
    ],
)
def test_what_is_not_registered(args, options, error, message):
    before = list(registry.REGISTRY)
    with pytest.raises(error, match=message):
        inspect.unwrap(register_backend)(*args, **options)
    assert list(registry.REGISTRY) == before


def test_a_name_keeps_its_meaning(name):
    """Compiled programs hold it."""
    register_backend(name, written_out)
    with pytest.raises(ValueError, match=f"{name}.*until the process ends"):
        register_backend(name, Scaled())


def test_what_a_registered_backend_refuses(name):
    register_backend(name, written_out)
    x = X[0]
    with pytest.raises(NotImplementedError, match="all pairs, registered without masks=True"):
        jf.softmax_expectation(x, x, x, backend=name, causal=True)
    with pytest.raises(NotImplementedError, match="all pairs, registered without masks=True"):
        jf.softmax_expectation(x, x, x, backend=name, window=1)
    with pytest.raises(NotImplementedError, match="masks are for reference and blocked"):
        jf.softmax_expectation(x, x, x, backend=name, mask=jf.masks.Blocks(2))
    with pytest.raises(ValueError, match="the ring goes around a backend whose derivatives"):
        jf.softmax_expectation(x, x, x, backend=f"ring:a:{name}")
    with pytest.raises(ValueError, match=f"one of reference, .*{name} or None, got 'nope'"):
        jf.softmax_expectation(x, x, x, backend="nope")
    with pytest.raises(ValueError, match="one of reference, .*got 'nope'"):
        check_backend("nope")
    with pytest.raises(ValueError, match="dtypes must be of float32, .*got 'int8'"):
        check_backend(name, dtypes=["int8"])


def test_masks_that_depend_on_scores_are_refused(name):
    register_backend(name, written_out, masks=True)
    x = X[0]
    with pytest.raises(NotImplementedError, match="those of TopK depend on the scores"):
        jf.softmax_expectation(x, x, x, backend=name, mask=jf.masks.TopK(2))
