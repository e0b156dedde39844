"""Fields around fields: what they compute, their parts, and that they are seen through."""

# pyright takes a property for a field of the dataclass, where the base class declares it.
# pyright: reportCallIssue=false

from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow.explicit import explicit_step
from jaxflow.fields import AbstractWrapper
from jaxflow.fields.base import can_be_continued, divergence_by_derivatives
from jaxflow.solvers import LieTrotter, Strang

pytestmark = pytest.mark.usefixtures("x64")

FLAT = jf.Euclidean()
ELLIPSOID = jf.Ellipsoid(np.array([0.5, 1.0, 2.0]), centred=False)
T, H = 0.3, 0.2


class Doubled(AbstractWrapper):
    """X_t[mu](x) = F_t[2_# mu](2 x) / (1 + t): a wrapper of a user's own, linear in F."""

    field: jf.AbstractField
    linear: ClassVar[bool] = True

    @property
    def geometry(self):
        return self.field.geometry

    def enter(self, x):
        return 2 * x

    def leave(self, t, x, v):
        return v / (1 + t)


class Clipped(AbstractWrapper):
    """X[mu](x) = clip(F[mu](x)): one that is not."""

    field: jf.AbstractField
    linear: ClassVar[bool] = False

    @property
    def geometry(self):
        return self.field.geometry

    def enter(self, x):
        return x

    def leave(self, t, x, v):
        return jnp.clip(v, -0.5, 0.5)


class Drift(jf.AbstractField):
    """X(x) = -x: a field of a user's own that keeps nothing of tokens."""

    geometry: Any = jf.Euclidean()

    def __call__(self, t, x, mu):
        return -x


class Mean(jf.fields.AbstractCausalField):
    """X[mu](x) = the mean of the tokens up to x, minus x / 2: a causal field of a user's own."""

    geometry: Any = jf.Euclidean()

    def __call__(self, t, x, mu):
        return jnp.cumsum(mu.points, axis=0) / jnp.arange(1.0, mu.n + 1)[:, None] - x / 2

    def keys_values(self, t, y, start=0):
        return y

    def attend(self, t, x, keys_values, index):
        seen = jnp.arange(len(keys_values)) <= index
        total = jnp.where(seen[:, None], keys_values, 0).sum(axis=0, keepdims=True)
        return total / (index + 1) - x / 2


def matrix(seed):
    return np.random.default_rng(seed).normal(size=(3, 3))


def attention(beta=1.0, **options: Any):
    return jf.SelfAttention(beta=beta, causal=True, geometry=FLAT, **options)


def two() -> Any:
    return Mean() + jf.LinearDrift(matrix(0))


# Around a field F of R^3: linear in F, by the definition of what is around it.
LINEAR = {
    "multiple": lambda f: -2.0 * f,
    "post": lambda f: jf.PostNorm(f, ELLIPSOID),
    "pre": lambda f: jf.PreNorm(f, jf.LayerNorm(3)),
    "sqrt": jf.SqrtScaling,
    "doubled": Doubled,
    "nested": lambda f: jf.SqrtScaling(jf.PostNorm(jf.PreNorm(3.0 * f, jf.UnitNorm()))),
    "curve": lambda f: jf.TimeDependent(jf.Constant(jf.SqrtScaling(f))),
    "of a curve": lambda f: Doubled(jf.TimeDependent(jf.Legendre([f], 0.0, 1.0))),
}
OTHERS = {
    "peri": lambda f: jf.PeriNorm(f, jf.UnitNorm()),
    "ngpt": lambda f: jf.NGPT(f, 0.5),
    "clipped": Clipped,
}


def points(geometry=FLAT, n=4):
    x = jnp.asarray(np.random.default_rng(5).normal(size=(n, 3)))
    return geometry.retract(x)


def velocity(field, t, x):
    return field(t, x, jf.Measure(x))


def split(field):
    """The field, the sum of its parts, and a step of each splitting method, by `explicit_step` and
    as the composition of steps of the parts."""
    x = points(field.geometry)
    evaluate = lambda part, t, y: velocity(part, t, y)
    step = lambda solver: explicit_step(solver, field, T, T + H, x, evaluate)
    first, second = field.parts
    y = x + H * velocity(first, T, x)
    lie = step(LieTrotter()), y + H * velocity(second, T, y)
    z = x + H / 2 * velocity(first, T, x)
    z = z + H * velocity(second, T, z)
    strang = step(Strang(diffrax.Euler())), z + H / 2 * velocity(first, T + H / 2, z)
    total = velocity(first, T, x) + velocity(second, T, x)
    return velocity(field, T, x), total, lie, strang


def continued(field):
    """attend, of what is kept of the tokens, and the field at the last of them."""
    x = points(field.geometry)
    return field.attend(T, x[3:], field.keys_values(T, x), 3), velocity(field, T, x)[3:]


@pytest.fixture(scope="module")
def values():
    """Of all wrappers around a sum, as one program."""

    @eqx.filter_jit
    def run(linear, others):
        both = [{name: continued(field) for name, field in d.items()} for d in (linear, others)]
        return {name: split(field) for name, field in linear.items()}, *both

    with jax.enable_x64(True):
        return run(*({name: make(two()) for name, make in d.items()} for d in (LINEAR, OTHERS)))


@pytest.mark.parametrize("name", LINEAR)
def test_a_wrapper_that_is_linear_is_split(name, values):
    """The parts add up to the field, and one step of a splitting method is the composition of the
    steps of the wrapped parts."""
    whole, total, lie, strang = values[0][name]
    np.testing.assert_allclose(total, whole, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(*lie, rtol=1e-13)
    np.testing.assert_allclose(*strang, rtol=1e-13)
    euler = points(LINEAR[name](two()).geometry) + H * whole
    assert np.abs(lie[0] - euler).max() > 1e-4 and np.abs(lie[0] - strang[0]).max() > 1e-4


@pytest.mark.parametrize("name", OTHERS)
def test_a_wrapper_that_is_not_linear_is_one_part(name):
    field = OTHERS[name](two())
    assert field.parts == (field,)


def test_a_flow_splits_a_scaled_sum():
    """1 / sqrt(t + 1) at the ends of two steps, drift after drift."""
    a, b = (jf.LinearDrift(matrix(seed)) for seed in range(2))
    x = points()
    sol = jf.flow(
        jf.SqrtScaling(a + b), jf.Measure(x), t1=1.0, dt0=0.5, solver=LieTrotter(),
        stepsize_controller=diffrax.ConstantStepSize(),
    )  # fmt: skip
    y = np.asarray(x)
    for t in (0.0, 0.5):
        for part in (a, b):
            y = y + 0.5 / np.sqrt(t + 1) * y @ np.asarray(part.matrix).T
    np.testing.assert_allclose(sol.measures.points[-1], y, rtol=1e-13)


@pytest.mark.parametrize("kind, name", [(1, n) for n in LINEAR] + [(2, n) for n in OTHERS])
def test_a_causal_flow_can_be_continued(kind, name, values):
    np.testing.assert_allclose(*values[kind][name], rtol=1e-12, atol=1e-14)
    assert can_be_continued((LINEAR | OTHERS)[name](two()))


@pytest.mark.parametrize("make", [Drift, lambda: 2.0 * (Mean() + Drift())], ids=["own", "sum"])
def test_other_fields_cannot_be_continued(make):
    field = make()
    assert not can_be_continued(field)
    assert not can_be_continued(jf.TimeDependent(jf.Constant(Doubled(field))))
    with pytest.raises(TypeError, match="Drift does not say what it keeps.*cache=False"):
        Doubled(field).keys_values(0.0, points())


@pytest.mark.parametrize("name", ["multiple", "sqrt"])
def test_divergences(name):
    """Closed forms against derivatives."""
    make = LINEAR[name]
    x = points()
    mu = jf.Measure(x)
    field = make(jf.SelfAttention(matrix(1), matrix(2), matrix(3), beta=0.3, geometry=FLAT))
    assert isinstance(field, jf.fields.AbstractDivergenceField)
    both = lambda: (jf.divergence(field, T, x, mu), divergence_by_derivatives(field, T, x, mu))
    np.testing.assert_allclose(*jax.jit(both)(), rtol=1e-11)


def test_attention_is_found_inside_of_any_wrapper():
    """A wrapper that doubles its tokens makes beta four times as large; the entropy of a sum is the
    mean over its attention."""
    mu = jf.Measure(points())
    fields: list[Any] = [attention(4.0), Doubled(attention()), Clipped(Doubled(2.0 * attention()))]
    entropy = eqx.filter_jit(
        lambda fields: [jf.observables.attention_entropy(f, mu) for f in fields]
    )
    first, *others = entropy([*fields, jf.SqrtScaling(fields[0] + fields[1] + jf.LinearDrift(1.0))])
    assert 0.01 < first < np.log(4)
    np.testing.assert_allclose(others, first, rtol=1e-12)


def test_a_curve_keeps_its_geometry():
    """Stored where it has no arrays; where it has, it is that of the field, whose derivatives it
    carries: a token x is put at sqrt(3) x / |x / g|."""
    calls = []

    class Counted(jf.fields.AbstractCurve):
        field: Any

        @property
        def breakpoints(self):
            return ()

        def at(self, t):
            calls.append(t)
            return self.field

    field = jf.TimeDependent(Counted(attention()))
    count = len(calls)
    assert field.geometry == FLAT and (2.0 * field).geometry == FLAT and len(calls) == count
    x = points()

    def total(gain):
        around = jf.PostNorm(attention(), jf.Ellipsoid(gain, centred=False))
        return (jf.TimeDependent(jf.Constant(around)).geometry.retract(x) ** 2).sum()

    gradient = jax.jit(jax.grad(total))(jnp.ones(3))
    y = np.asarray(x)
    length = lambda g: (3 * y**2 / ((y / g) ** 2).sum(axis=1, keepdims=True)).sum()
    steps = 1e-6 * np.eye(3)
    numeric = [(length(1 + e) - length(1 - e)) / 2e-6 for e in steps]
    np.testing.assert_allclose(gradient, numeric, rtol=1e-7)
