"""Fields whose parameters move in time: layers, breakpoints, curves, and what they cost."""

from typing import Any, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflow as jf
from jaxflow.fields import time
from jaxflow.models import Depth

pytestmark = pytest.mark.usefixtures("x64")

TIGHT = diffrax.PIDController(rtol=1e-10, atol=1e-12)
FIXED = diffrax.ConstantStepSize()
EDGES = (0.0, 0.3, 1.1, 1.5)


def filled(make, seed=0, scale=0.5) -> Any:
    """What `make()` returns, with normal parameters: the shapes of a model without its sampler."""
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(scale * rng.normal(size=a.shape), a.dtype)
    shapes = eqx.filter_eval_shape(make)
    is_shape = lambda a: isinstance(a, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda a: draw(a) if is_shape(a) else a, shapes, is_leaf=is_shape)


def block(seed) -> Any:
    """attention(LN x) + feedforward(LN x) in R^4, two heads."""
    key = jax.random.key(0)
    attention = lambda: jf.MultiHeadAttention(4, 2, causal=True, key=key)
    forward = lambda: jf.FeedForward(4, 6, jnp.tanh, key=key)
    make = lambda: jf.PreNorm(attention(), jf.LayerNorm(4)) + jf.PreNorm(forward(), jf.LayerNorm(4))
    return filled(make, seed)


def points(n=5, d=4, seed=7):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)))


def drifts(count=3, d=2, geometry: Any = None) -> list[Any]:
    """x' = A x with matrices that do not commute."""
    rng = np.random.default_rng(3)
    geometry = geometry or jf.Euclidean()
    return [jf.LinearDrift(rng.normal(size=(d, d)), geometry=geometry) for _ in range(count)]


def exponential(matrix, t):
    values, vectors = np.linalg.eig(np.asarray(matrix) * t)
    return (vectors * np.exp(values) @ np.linalg.inv(vectors)).real


def exact(fields, edges, x):
    for field, start, end in zip(fields, edges, edges[1:], strict=False):
        x = x @ exponential(field.matrix, end - start).T
    return x


def final(field, x, **options: Any):
    return jf.flow(field, jf.Measure(x), **options).measures.points[-1]


# ------------------------------------------------------------------ layers


@pytest.mark.slow
def test_layers_are_the_discrete_transformer():
    """One step a piece is x += attention(LN x); x += feedforward(LN x); the gradients of every
    layer's parameters too. Rounding: some hundred operations of 2e-16. One step of a field that is
    not split, x += h F(x), is in test_models.py: a residual network is its loop."""
    edges, x, probe = [0.0, 0.5, 1.5, 2.0], points(), points(seed=8)
    layers = [block(seed) for seed in range(3)]

    def by_flow(layers):
        field = jf.TimeDependent(jf.PiecewiseConstant(layers, edges))
        steps = diffrax.StepTo(jnp.asarray(edges))
        return final(field, x, t1=2.0, solver=jf.solvers.LieTrotter(), stepsize_controller=steps)

    def by_hand(layers):
        y = x
        for layer, start, end in zip(layers, edges, edges[1:], strict=False):
            for part in layer.fields:
                y = y + (end - start) * part(start, y, jf.Measure(y))
        return y

    def both(fn):
        return eqx.filter_jit(eqx.filter_value_and_grad(lambda ls: (fn(ls) * probe).sum()))(layers)

    (value, gradient), (truth, expected) = both(by_flow), both(by_hand)
    np.testing.assert_allclose(value, truth, rtol=1e-12)
    leaves, others = jax.tree.leaves(gradient), jax.tree.leaves(expected)
    assert len(leaves) == len(others) == 3 * 12
    for a, b in zip(leaves, others, strict=True):
        assert np.abs(b).max() > 1e-6
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ breakpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver, geometry",
    [(diffrax.Tsit5(), jf.Sphere()), (diffrax.Heun(), None)],
    ids=["Tsit5 on the sphere", "Heun"],
)
def test_fixed_steps_end_at_breakpoints(solver, geometry):
    """A step longer than a piece, one that divides it and one that does not; Tsit5 reuses its last
    slope, which is of the piece before. A flow of several pieces is that of each after the other:
    the same steps, so up to the rounding of their ends."""
    fields, x = drifts(geometry=geometry), points(d=2)
    x = fields[0].geometry.retract(x)
    field = jf.TimeDependent(jf.PiecewiseConstant(fields, EDGES))
    options: dict[str, Any] = {"solver": solver, "stepsize_controller": FIXED}
    ends = [0.0]
    y = x
    for piece, start, end in zip(fields, EDGES, EDGES[1:], strict=False):
        count = int(np.ceil((end - start) / 0.4 - 1e-9))  # 1, 2 and 1 steps
        ends += list(np.linspace(start, end, count + 1)[1:])
        y = final(piece, y, t0=start, t1=end, dt0=(end - start) / count, **options)
    assert len(ends) == 5
    sol = jf.flow(field, jf.Measure(x), t1=1.5, dt0=0.4, **options)
    assert int(sol.stats["num_steps"]) == 4
    np.testing.assert_allclose(sol.measures.points[-1], y, rtol=1e-12)
    if not isinstance(geometry, jf.Sphere):
        return
    steps = diffrax.StepTo(jnp.asarray(ends))
    stepped = final(field, x, t1=1.5, solver=solver, stepsize_controller=steps)
    np.testing.assert_allclose(stepped, y, rtol=1e-12)


@pytest.mark.parametrize("solver, order", [(diffrax.Heun(), 2), (diffrax.Tsit5(), 5)])
def test_the_order_is_kept_over_discontinuities(solver, order):
    fields, x = drifts(), points(d=2)
    field = jf.TimeDependent(jf.PiecewiseConstant(fields, EDGES))
    truth = exact(fields, EDGES, np.asarray(x))
    options: dict[str, Any] = {"t1": 1.5, "solver": solver, "stepsize_controller": FIXED}
    steps = np.array([0.2, 0.1, 0.05])  # divide no piece but for 0.1 and 0.05
    errors = [np.abs(final(field, x, dt0=h, **options) - truth).max() for h in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.3 < slope < order + 1


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param(jf.Euclidean(), id="plane", marks=pytest.mark.slow),
        pytest.param(jf.Sphere(), id="sphere"),
    ],
)
def test_adaptive_steps_stop_at_breakpoints(geometry):
    """The projected flow of x' = A x is the flow projected. Without the breakpoints a hundred steps
    are rejected; with them, some at the start of each of three pieces."""
    fields, x = drifts(geometry=geometry), geometry.retract(points(d=2))
    field = jf.TimeDependent(jf.PiecewiseConstant(fields, EDGES))
    saveat = diffrax.SaveAt(steps=True)
    sol = jf.flow(field, jf.Measure(x), t1=1.5, stepsize_controller=TIGHT, saveat=saveat)
    count = int(sol.stats["num_accepted_steps"])
    truth = geometry.retract(jnp.asarray(exact(fields, EDGES, np.asarray(x))))
    np.testing.assert_allclose(sol.measures.points[count - 1], truth, rtol=1e-8, atol=1e-9)
    assert int(sol.stats["num_rejected_steps"]) <= 9
    for jump in EDGES[1:-1]:
        assert np.abs(sol.ts - jump).min() < 1e-15


def test_steps_over_a_breakpoint_are_refused():
    field = jf.TimeDependent(jf.PiecewiseConstant(drifts(), EDGES))
    run = lambda ts: final(
        field, points(d=2), t1=1.5, solver=diffrax.Heun(), stepsize_controller=diffrax.StepTo(ts)
    )
    with pytest.raises(ValueError, match=r"jump, at \[0.3, 1.1\]; none ends at 1.1"):
        run(jnp.array([0.0, 0.3, 1.5]))
    depth = Depth(t1=1.5, steps=2)
    with pytest.raises(ValueError, match="none ends at 0.3"):
        jax.jit(lambda x: depth.flow(field, jf.Measure(x)).measures)(points(d=2))
    # A kink is no jump.
    hat = jf.TimeDependent(jf.PiecewiseLinear(drifts(), [0.0, 0.7, 1.5]))
    assert time.breakpoints(hat) == (0.0, 0.7, 1.5) and time.jumps(hat) == ()
    assert depth.flow(hat, jf.Measure(points(d=2))).stats["num_steps"] == 2


def test_step_times_meet_jumps_up_to_rounding():
    ts = np.linspace(0, 3, 7).astype(np.float32)
    moved = jf.solvers.step_times(ts * (1 + 1e-7), (0.5, 2.0, 9.0))
    assert moved[1] == 0.5 and moved[4] == 2.0
    np.testing.assert_allclose(moved, ts, rtol=1e-6)


def test_backsolve_needs_adaptive_steps():
    """x(T) = exp(sum a_l h_l) x(0), so dx(T)/da_l = h_l x(T)."""
    rates = jnp.array([0.4, -1.0, 0.7])
    x, lengths = points(n=2, d=1), np.diff(EDGES)

    def total(rates, controller, **options: Any):
        fields = [jf.LinearDrift(rate) for rate in rates]
        field = jf.TimeDependent(jf.PiecewiseConstant(fields, EDGES))
        options = {"adjoint": diffrax.BacksolveAdjoint()} | options
        return final(field, x, t1=1.5, stepsize_controller=controller, **options).sum()

    with pytest.raises(ValueError, match="adaptive step size"):
        total(rates, FIXED, dt0=0.1)
    gradient = jax.jit(jax.grad(lambda rates: total(rates, TIGHT)))(rates)
    value = float(np.exp(rates @ lengths) * x.sum())
    np.testing.assert_allclose(gradient, lengths * value, rtol=1e-7)


@pytest.mark.slow
def test_derivatives_in_the_times():
    """d/dT of the flow is the velocity at its end; the ends of steps hold no dt0."""
    fields, x = drifts(), points(d=2)
    field = jf.TimeDependent(jf.PiecewiseConstant(fields, EDGES))

    def total(t1, dt0):
        return final(field, x, t1=t1, dt0=dt0, stepsize_controller=FIXED).sum()

    gradient = jax.jit(jax.grad(total, (0, 1)))(1.5, 0.02)
    end = exact(fields, EDGES, np.asarray(x))
    np.testing.assert_allclose(gradient[0], (end @ np.asarray(fields[-1].matrix).T).sum(), 1e-9)
    assert gradient[1] == 0


def test_nothing_moves_in_no_time():
    field = jf.TimeDependent(jf.PiecewiseConstant(drifts(), EDGES))
    options: dict[str, Any] = {"solver": diffrax.Heun(), "stepsize_controller": FIXED, "dt0": 0.1}
    for t in (0.3, 0.5):
        assert (final(field, points(d=2), t0=t, t1=t, **options) == points(d=2)).all()


def test_other_times_do_not_recompile():
    traces, x = [], points(d=2)

    class Counted(jf.AbstractField):
        rate: jax.Array
        geometry: Any = jf.Euclidean()

        def __call__(self, t, x, mu):
            traces.append(t)
            return self.rate * x

    def run(rates, **options: Any):
        fields = [Counted(rate=jnp.asarray(rate)) for rate in rates]
        field = jf.TimeDependent(jf.PiecewiseConstant(fields, [0.0, 0.5, 1.0]))
        solver = diffrax.Heun()
        return final(field, x, solver=solver, stepsize_controller=FIXED, **options)

    run([0.1, 0.2], t1=1.0, dt0=0.1)
    count = len(traces)
    y = run([0.3, -0.2], t1=1.3, dt0=0.07)
    assert len(traces) == count > 0
    np.testing.assert_allclose(y, np.exp(0.3 * 0.5 - 0.2 * 0.8) * x, rtol=1e-4)


def test_evaluations_are_counted():
    """A method that reuses its last slope evaluates the field again after a jump."""
    calls = []

    class Ledger(jf.AbstractField):
        rate: jax.Array
        geometry: Any = jf.Euclidean()

        def __call__(self, t, x, mu):
            jax.debug.callback(lambda t: calls.append(t), t)
            return self.rate * x

    fields = [Ledger(rate=jnp.asarray(rate)) for rate in (0.3, 0.1)]
    field = jf.TimeDependent(jf.PiecewiseConstant(fields, [0.0, 0.5, 1.0]))
    steps = diffrax.StepTo(jnp.linspace(0.0, 1.0, 5))
    sol = jf.flow(field, jf.Measure(points(d=2)), t1=1.0, stepsize_controller=steps)
    jax.effects_barrier()
    assert int(sol.stats["num_evaluations"]) == len(calls) == 4 * 6 + 2


# ------------------------------------------------------------------ curves

VALUES = np.array([0.5, -1.0, 2.0])


def scalars(values=VALUES) -> list[Any]:
    return [jf.LinearDrift(value) for value in values]


def hat(t):
    return np.interp(t, [0.0, 1.0, 3.0], VALUES)


def fourier(t):
    return 0.5 - np.cos(2 * np.pi * t / 4) + 2 * np.sin(2 * np.pi * t / 4)


CURVES = {
    "constant": (lambda: jf.Constant(scalars()[1]), lambda t: np.full_like(t, -1.0)),
    "pieces": (
        lambda: jf.PiecewiseConstant(scalars(), [0.0, 1.0, 2.5, 3.0]),
        lambda t: VALUES[(t >= 1).astype(int) + (t >= 2.5)],
    ),
    "linear": (lambda: jf.PiecewiseLinear(scalars(), [0.0, 1.0, 3.0]), hat),
    "fourier": (lambda: jf.Fourier(scalars(), period=4.0), fourier),
    "legendre": (
        lambda: jf.Legendre(scalars(), 1.0, 3.0),
        lambda t: np.polynomial.legendre.legval(t - 2, VALUES),
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_its_formula(name):
    """At times before, at, between and after the nodes; its slope too, where it has one."""
    make, formula = CURVES[name]
    ts = np.array([-1.0, 0.0, 0.25, 1.0, 1.7, 2.5, 3.0, 4.2])
    between = np.array([0.25, 1.7, 2.6])

    def at(curve: Any, t):
        return curve.at(t).matrix

    @eqx.filter_jit
    def run(curve):
        slopes = jax.vmap(jax.grad(lambda t: at(curve, t)))(jnp.asarray(between))
        return jax.vmap(lambda t: at(curve, t))(jnp.asarray(ts)), slopes

    values, slopes = run(make())
    np.testing.assert_allclose(values, formula(ts), rtol=1e-14, atol=1e-14)
    expected = (formula(between + 1e-6) - formula(between - 1e-6)) / 2e-6
    np.testing.assert_allclose(slopes, expected, atol=1e-8)


def test_pieces_take_edges_or_what_is_inside():
    both = [jf.PiecewiseConstant(scalars(), ts) for ts in ([0.0, 1.0, 2.0, 3.0], [1.0, 2.0])]
    assert both[0].ts == both[1].ts == both[0].breakpoints == both[0].jumps == (1.0, 2.0)


def test_pieces_at_float32_times():
    """float32(0.7) < 0.7, and yet it is the edge."""
    curve = jf.PiecewiseConstant(scalars(), [0.7, 2.0])
    fields: list[Any] = [curve.at(jnp.float32(0.7)), curve.at(0.7)]
    assert [float(field.matrix) for field in fields] == [-1.0, -1.0]


def test_float32_points_in_a_world_of_float64():
    x = points(d=2).astype(jnp.float32)
    field = jf.TimeDependent(jf.PiecewiseConstant(drifts(), EDGES))
    truth = exact(drifts(), EDGES, np.asarray(x, float))
    for options in (
        {"stepsize_controller": diffrax.PIDController(1e-6, 1e-6)},
        {"stepsize_controller": diffrax.StepTo(jnp.linspace(0, 1.5, 16))},
    ):
        y = final(field, x, t1=1.5, **options)
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, truth, rtol=1e-4, atol=1e-5)


def hypernetwork(**options: Any) -> Any:
    key = jax.random.key(0)
    base = filled(lambda: jf.FeedForward(6, 8, key=key))
    return jf.HyperNetwork(base, width=5, embedding=4, key=key, **options)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_hypernetwork_starts_at_its_field(rank):
    """A = 0, and its gradient is not; with A, matrices move by matrices of the given rank."""
    curve = hypernetwork(rank=rank)
    assert eqx.tree_equal(eqx.filter_jit(lambda c: c.at(0.3))(curve), curve.base)
    sizes = [sum(a.size for a in jax.tree.leaves(head)) for head in curve.heads]
    matrices = 48 * 5 if rank is None else rank * (5 + 6 + 8)
    assert sizes == [matrices, 8 * 5, matrices, 6 * 5]

    def at(heads, t):
        return eqx.tree_at(lambda c: c.heads, curve, heads).at(t)

    total = lambda heads: sum(a.sum() for a in jax.tree.leaves(at(heads, 0.3)))
    gradient = eqx.filter_jit(eqx.filter_grad(total))(curve.heads)
    assert all(np.abs(head.matrix).max() > 0 for head in gradient)
    moved = eqx.filter_jit(at)(jax.tree.map(lambda a: a + 0.1, curve.heads), 0.3)
    step = np.asarray(moved.weight_in - curve.base.weight_in)
    assert np.linalg.matrix_rank(step, tol=1e-10) == (1 if rank is None else rank)


@pytest.mark.slow
def test_fit_is_exact_in_the_span():
    """Any Legendre curve of lower degree, Fourier in Fourier, and layers in finer layers."""
    rng = np.random.default_rng(0)
    matrices = lambda k: [jf.LinearDrift(rng.normal(size=(2, 2))) for _ in range(k)]
    pairs = [
        (jf.Legendre(matrices(3), 0.0, 2.0), jf.Legendre(matrices(5), 0.5, 2.0)),
        (jf.Fourier(matrices(3), 2.0), jf.Fourier(matrices(5), 2.0)),
        (
            jf.PiecewiseConstant(matrices(2), [0, 1, 2]),
            jf.PiecewiseConstant(matrices(4), [0.5, 1.0, 1.5]),
        ),
    ]
    for curve, like in pairs:
        fitted = time.fit(curve, like, t1=2.0, samples=64)
        assert type(fitted) is type(like)
        assert time.relative_distance(curve, like, t1=2.0, samples=16) > 0.1
        assert time.relative_distance(curve, fitted, t1=2.0, samples=16) < 1e-12
    with pytest.raises(ValueError, match="structure"):
        time.fit(pairs[0][0], jf.Legendre(scalars(), 0.0, 2.0), t1=2.0, samples=8)


def test_sample_gives_the_layers_of_a_curve():
    """theta(t) = t: layers are its values in the middle, at a distance h / sqrt(12) from it."""
    curve = jf.PiecewiseLinear([jf.LinearDrift(0.0), jf.LinearDrift(2.0)], [0.0, 2.0])
    layers = time.sample(curve, [0.0, 0.5, 1.0, 2.0])
    assert layers.ts == (0.5, 1.0)
    np.testing.assert_allclose(cast(Any, layers.coefficients).matrix, [0.25, 0.75, 1.5], rtol=1e-14)
    for count in (4, 8):
        layers = time.sample(curve, np.linspace(0, 2, count + 1))
        distance = time.relative_distance(curve, layers, t1=2.0, samples=4096)
        np.testing.assert_allclose(distance, 1 / (2 * count), rtol=1e-4)


# ------------------------------------------------------------------ as a field


def test_time_dependent_fields_differentiate_and_batch():
    curve = jf.Legendre([block(0), block(1)], 0.0, 2.0)
    field, x = jf.TimeDependent(curve), points()
    mu = jf.Measure(x)

    @eqx.filter_jit
    def run(field, ts):
        values = jax.vmap(lambda t: field(t, x, mu))(ts)
        return values, jax.jvp(lambda t: field(t, x, mu), (ts[1],), (jnp.ones(()),))[1]

    ts = jnp.array([0.0, 0.7, 1.0])
    values, slope = run(field, ts)
    at = eqx.filter_jit(lambda t: field.at(t)(t, x, mu))
    # P_1 vanishes in the middle.
    np.testing.assert_allclose(values[2], block(0)(0.0, x, mu), rtol=1e-13)
    np.testing.assert_allclose(values[1], at(jnp.asarray(0.7)), rtol=1e-13)
    difference = (at(jnp.asarray(0.7 + 1e-5)) - at(jnp.asarray(0.7 - 1e-5))) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-6, atol=1e-8)


def test_the_divergence_is_that_of_the_frozen_field():
    attention = lambda seed: filled(
        lambda: jf.MultiHeadAttention(3, 1, geometry=jf.Sphere(), key=jax.random.key(0)), seed
    )
    field = jf.TimeDependent(jf.PiecewiseLinear([attention(0), attention(1)], [0.0, 1.0]))
    x = jf.Sphere().retract(points(d=3))
    mu = jf.Measure(x)
    closed = eqx.filter_jit(jf.divergence)(field, 0.4, x, mu)

    @eqx.filter_jit
    def trace(field):
        def one(y):  # of the Jacobian of y -> X(y / |y|), on the tangent space
            velocity = lambda y: field(0.4, jf.Sphere().retract(y)[None], mu)[0]
            projection = jnp.eye(3) - jnp.outer(y, y)
            return jnp.trace(projection @ jax.jacfwd(velocity)(y))

        return jax.vmap(one)(x)

    np.testing.assert_allclose(closed, trace(field), rtol=1e-11)
    assert isinstance(field.geometry, jf.Sphere)


def test_a_curve_of_sums_has_parts():
    a, b, c = drifts(3)
    curve: Any = jf.TimeDependent(jf.Legendre([a + b, b + c], 0.0, 1.0))
    assert [len(f.parts) for f in (a, a + b, a + b + c, 2.0 * (a - b), curve, curve + a)] == [
        1, 2, 3, 2, 2, 3,
    ]  # fmt: skip
    x = points(d=2)
    mu, velocity = jf.Measure(x), eqx.filter_jit(lambda f: f(0.3, x, mu))
    for field in (curve, 2.0 * (a - b)):
        total = sum(velocity(part) for part in field.parts)
        np.testing.assert_allclose(total, velocity(field), rtol=1e-13)
    s = 2 * 0.3 - 1
    np.testing.assert_allclose(
        velocity(curve.parts[1]), x @ (b.matrix + s * c.matrix).T, rtol=1e-13
    )


def test_curves_inside_of_curves():
    inner = lambda scale: jf.TimeDependent(
        jf.PiecewiseConstant([jf.LinearDrift(scale), jf.LinearDrift(2 * scale)], [0.25])
    )
    field = jf.TimeDependent(jf.PiecewiseConstant([inner(1.0), inner(10.0)], [0.5]))
    assert time.breakpoints(field) == (0.25, 0.5)
    assert time.jumps(jf.TimeDependent(jf.PiecewiseLinear(drifts(), [0.1, 0.25, 1.0])) + field) == (
        0.25,
        0.5,
    )
    frozen = time.frozen(field, 0.3)
    assert isinstance(frozen, jf.LinearDrift) and frozen.matrix == 2.0
    assert time.frozen(jf.TimeDependent(jf.Constant(field)) + frozen, 0.7).fields[0].matrix == 20.0


# ------------------------------------------------------------------ errors


def test_errors():
    two = scalars()[:2]
    with pytest.raises(ValueError, match="finite and increasing"):
        jf.PiecewiseConstant(two, [0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="finite and increasing"):
        jf.Legendre(two, 1.0, 0.0)
    with pytest.raises(ValueError, match="2 pieces have 3 edges, or 1 inside; got 2"):
        jf.PiecewiseConstant(two, [0.0, 1.0])
    with pytest.raises(ValueError, match="one time a field: got 3 for 2"):
        jf.PiecewiseLinear(two, [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="odd number"):
        jf.Fourier(two, 1.0)
    with pytest.raises(ValueError, match="period must be positive"):
        jf.Fourier(two[:1], 0.0)
    with pytest.raises(ValueError, match="at least one field"):
        jf.PiecewiseConstant([], [0.0, 1.0])
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.jit(lambda ts: jf.PiecewiseConstant(two, ts).ts)(jnp.array([0.0, 1.0, 2.0]))
    others: list[Any] = [
        jf.LinearDrift(np.eye(2)),
        jf.LinearDrift(1.0, geometry=jf.Sphere()),
        2.0 * two[0],
    ]
    for other in others:
        with pytest.raises(ValueError, match="must have one structure"):
            jf.PiecewiseConstant([two[0], other], [1.0])
    with pytest.raises(ValueError, match="embedding must be even"):
        jf.HyperNetwork(two[0], embedding=3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        jf.HyperNetwork(two[0], rank=0, key=jax.random.key(0))


class Broken(jf.fields.AbstractCurve):
    """x' = -0.3 (1 + t) x up to t = 1, 1.5 (1 + t) x from then on: a curve of a user's own."""

    scale: Any

    @property
    def breakpoints(self):
        return (1.0,)

    def at(self, t):
        rate = jnp.where(jnp.asarray(t) < 1, -0.3, 1.5) * (1 + jnp.asarray(t))
        return jf.LinearDrift(self.scale * rate)


@pytest.mark.usefixtures("x64")
def test_fixed_steps_keep_their_order_across_a_jump():
    """Errors of Heun's method fall by 4 with half the step; no stage sees the next piece."""

    @jax.jit
    def last(ends):
        field = jf.TimeDependent(Broken(jnp.asarray(1.0)))
        controller = diffrax.StepTo(ends)
        mu = jf.Measure(jnp.ones((1, 1)))
        sol = jf.flow(field, mu, t1=2.0, solver=diffrax.Heun(), stepsize_controller=controller)
        return sol.measures[-1].points[0, 0]

    errors = [abs(last(np.linspace(0, 2, n)) / np.exp(-0.45 + 3.75) - 1) for n in (81, 161)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
